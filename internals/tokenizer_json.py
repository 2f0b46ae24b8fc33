"""Hugging Face's tokenizer.json for the byte-level BPEs of this project: written, read, checked.

They cut text into pieces by one of two patterns, GPT-2's or ours. Three programs need the pattern, each in its own
form: tiktoken takes the pattern itself, tokenizer.json a pre-tokenizer, llama.cpp the name of a model.
"""

import itertools
import json
from typing import Any

import tiktoken

from internals.files import as_json, sha256_of
from internals.start import UserError

END_OF_TEXT = "<|endoftext|>"
MOST_TOKENS = 65_536  # different ones: in the shards they are uint16

# GPT-2's pattern cuts a text into pieces, which are then encoded one by one. The bracket is ours. It holds everything
# that does not look ahead, so fancy-regex runs that part as an automaton and only the rest step by step. The pieces are
# the same and encoding takes two thirds of the time (benchmarks/prepare.py, `tiktoken` against `limit`).
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"

# Our own tokenizers use the pattern of Qwen 3.5 for every script; llama.cpp knows it. Marks stay with their letters
# (GPT-2's pattern cuts every Hindi, Thai or vowelled Arabic word into pieces), a digit is a piece, and line breaks are
# joined with the punctuation or the blanks before them. docs/data.md and benchmarks/tokenizer.py give the reasons.
OWN_PATTERN = (
    r"(?:'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+)|\s+(?!\S)|\s+"
)

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
OWN_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": OWN_PATTERN}, "behavior": "Isolated", "invert": False},
        {**BYTE_LEVEL, "use_regex": False},
    ],
}


def is_own(tokenizer: tiktoken.Encoding) -> bool:
    """Whether it cuts text by our pattern."""
    return tokenizer._pat_str == OWN_PATTERN


def to_json(tokenizer: tiktoken.Encoding) -> str:
    """The text of its tokenizer.json. Equal tokenizers have equal texts."""
    end_of_text = {"id": tokenizer.eot_token, "content": END_OF_TEXT, "special": True}
    return as_json(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end_of_text | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
            "normalizer": None,
            "pre_tokenizer": OWN_PRE_TOKENIZER if is_own(tokenizer) else BYTE_LEVEL,
            "post_processor": BYTE_LEVEL,
            "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "vocab": vocabulary(tokenizer), "merges": merges(tokenizer)},
        }
    )


def from_json(text: str) -> tiktoken.Encoding:
    """The tokenizer whose `to_json` this is. A BPE's ids, in the order of its merges, are the ranks of tiktoken.

    Raises:
        ValueError, KeyError, TypeError: it is not such a text, or it cuts text by another pattern than ours.
    """
    byte = {character: value for value, character in enumerate(byte_alphabet())}
    value = json.loads(text)
    if value["pre_tokenizer"] != OWN_PRE_TOKENIZER:
        raise ValueError("it cuts text by another pattern")
    tokens = [
        bytes(byte[character] for character in token) for token in value["model"]["vocab"] if token != END_OF_TEXT
    ]
    if b"" in tokens or not {bytes([value]) for value in range(256)} <= set(tokens):
        raise ValueError("a token is empty, or a byte has none")
    return own_tokenizer(short_name(text), tokens)


def own_tokenizer(name: str, tokens: list[bytes]) -> tiktoken.Encoding:
    """A tokenizer that cuts by our pattern, with these tokens in the order of their merges, and then end-of-text."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    ends = {END_OF_TEXT: len(tokens)}
    return tiktoken.Encoding(name, pat_str=OWN_PATTERN, mergeable_ranks=ranks, special_tokens=ends)


def short_name(text: str) -> str:
    return f"own-{sha256_of(text)[:8]}"


def canonical(text: str, path: str) -> str:
    """A tokenizer.json as this project writes it. `tokenizers` and transformers may have saved it anew since.

    Raises:
        UserError: it is not a tokenizer that prepare_data.py trained, or too large. `path` is for the message.
    """
    try:
        ours = to_json(from_json(text))
        theirs, wanted = (essence(json.loads(one)) for one in (text, ours))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        theirs, wanted = None, {}
    if theirs != wanted:
        raise UserError(f"{path}: is not a tokenizer that prepare_data.py trained (--tokenizer train)")
    if len(theirs["model"]["vocab"]) > MOST_TOKENS:
        raise UserError(
            f"{path}: has {len(theirs['model']['vocab']):,} tokens; a shard can hold {MOST_TOKENS:,} at most"
        )
    return ours


def essence(value: dict[str, Any]) -> dict[str, Any]:
    """The parts that decide the tokens. In the model, null, false and missing are equal; merges have two notations."""
    model = {key: part for key, part in value["model"].items() if part not in (None, False, "")}
    model["merges"] = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    model["vocab"] = {**model["vocab"], **{token["content"]: token["id"] for token in value["added_tokens"]}}
    model.pop("ignore_merges", None)
    return {
        "model": model,
        "added": [(token["id"], token["content"], token["special"]) for token in value["added_tokens"]],
        "cut": (value["normalizer"], value["pre_tokenizer"]),
        "ends": value["post_processor"],
    }


def vocabulary(tokenizer: tiktoken.Encoding) -> dict[str, int]:
    """Every token in the notation of GPT-2's vocab.json, with its id: `{"!": 0, ...}`, in the order of the ids."""
    alphabet = byte_alphabet()
    tokens = (tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.eot_token))
    return {"".join(alphabet[byte] for byte in token): i for i, token in enumerate(tokens)} | {
        END_OF_TEXT: tokenizer.eot_token
    }


def merges(tokenizer: tiktoken.Encoding) -> list[str]:
    """The merges of a byte-level BPE in order, in the notation of GPT-2's merges.txt: `["Ġ t", "Ġ a", ...]`.

    tiktoken keeps only the tokens, by rank. Applying all earlier merges to the bytes of a token leaves two parts: the
    merge that made it.
    """
    alphabet = byte_alphabet()
    ranks = {tokenizer.decode_single_token_bytes(i): i for i in range(tokenizer.eot_token)}
    result = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            result.append(" ".join("".join(alphabet[byte] for byte in part) for part in parts))
    return result


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary files: its own if that is printable, else one from
    U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
