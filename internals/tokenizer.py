"""Tokenizers. One string identifies each: `gpt2`, `bytes`, or the text of a trained one's tokenizer.json.

Equal strings are equal tokenizers: `tokenizer_json.py` writes each in one way only.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public
from tqdm import tqdm

from internals.network import answer_within, patiently
from internals.start import UserError, first_line
from internals.tokenizer_json import END_OF_TEXT, GPT2_PATTERN, canonical, from_json, short_name

NAMES = ("gpt2", "bytes")

VOCABULARY = "the gpt2 tokenizer's vocabulary"
VOCABULARY_ADVICE = (
    "go online once, or point TIKTOKEN_CACHE_DIR to a folder that holds it and can be written; data can also be "
    "prepared with --tokenizer bytes"
)
SILENT_SECONDS, FETCH_SECONDS, FETCH_ATTEMPTS = 15.0, 180.0, 3  # to wait for the next bytes, and for all of them


@functools.cache
def load_tokenizer(tokenizer: str) -> tiktoken.Encoding:
    """`gpt2` (50,257 tokens), `bytes` (257 tokens: the 256 bytes and end-of-text; needs no download), or a trained one.

    Raises:
        UserError: there is no such tokenizer, or GPT-2's vocabulary is neither on this machine nor within reach.
    """
    if is_json(tokenizer):
        try:
            return from_json(tokenizer)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the tokenizer {short_name(tokenizer)} is damaged, or of another version ({first_line(error)})"
            ) from error
    if tokenizer == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]+",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    if tokenizer == "gpt2":
        tiktoken.load.read_file = fetch  # which tiktoken calls if the vocabulary is not in its cache
        try:
            # The ranks and the special token of tiktoken's "gpt2", but in one file, which loads five times faster.
            encoding = tiktoken_ext.openai_public.r50k_base()
        except (OSError, ValueError) as error:  # the cache cannot be read or written, or the file is another one
            raise UserError(f"{VOCABULARY}: could not be read or stored ({error}); {VOCABULARY_ADVICE}") from error
        return tiktoken.Encoding(**{**encoding, "pat_str": GPT2_PATTERN})
    raise UserError(f"there is no tokenizer {tokenizer!r}; give gpt2, bytes or a tokenizer.json")


def prepare_with(tokenizer: str) -> str:
    """What to do if data has another tokenizer than a model, whose own this is."""
    name = "FILE, the model's tokenizer.json (export.py writes it, too)" if is_json(tokenizer) else tokenizer
    return f"prepare the data in another --data-dir with prepare_data.py --tokenizer {name}"


def is_json(tokenizer: str) -> bool:
    return tokenizer.startswith("{")


def tokenizer_name(tokenizer: str) -> str:
    """Its name for people: `gpt2`, `bytes`, or for a trained one `own-` and the beginning of its SHA-256."""
    return short_name(tokenizer) if is_json(tokenizer) else tokenizer


@functools.cache
def given_tokenizer(name: str) -> str:
    """The tokenizer that `--tokenizer NAME` names: one of `NAMES`, or a file.

    Raises:
        UserError: there is no such file, or it is not a tokenizer of ours.
    """
    if name in NAMES:
        return name
    try:
        text = Path(name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"--tokenizer {name}: there is no such file; give gpt2, bytes, train or a tokenizer.json"
        ) from error
    except OSError as error:
        raise UserError(f"--tokenizer {name}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        text = ""
    return canonical(text, f"--tokenizer {name}")


def fetch(url: str) -> bytes:
    """The file at `url`. An attempt ends after `FETCH_SECONDS`, or `SILENT_SECONDS` after the last byte that came."""
    import requests

    def download() -> bytes:
        answer = requests.get(url, timeout=SILENT_SECONDS)
        answer.raise_for_status()
        return answer.content

    tqdm.write(f"fetching {VOCABULARY} (1 MB) from {url}", file=sys.stderr)
    return patiently(
        VOCABULARY,
        lambda: answer_within(FETCH_SECONDS, download),
        FETCH_ATTEMPTS,
        VOCABULARY_ADVICE,
        lambda error: None,
    )


@functools.cache
def token_bytes(tokenizer: str) -> np.ndarray:
    """The number of bytes that each token stands for, (vocabulary,) int64; 0 for end-of-text."""
    encoding = load_tokenizer(tokenizer)
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab)]
    lengths[encoding.eot_token] = 0
    return np.array(lengths, np.int64)


def cut_tokens(encoding: tiktoken.Encoding, tokens: np.ndarray, length: int) -> np.ndarray:
    """The first `length` of more tokens, or a few fewer if the cut would be inside a character."""
    # While the next token begins inside a character: with a byte of the form 10xxxxxx
    while length and encoding.decode_single_token_bytes(int(tokens[length]))[0] & 0xC0 == 0x80:
        length -= 1
    return tokens[:length]
