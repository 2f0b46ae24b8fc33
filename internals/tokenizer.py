"""Tokenizers by name."""

import functools
import sys

import numpy as np
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public
from tqdm import tqdm

from internals.network import answer_within, patiently
from internals.start import UserError

END_OF_TEXT = "<|endoftext|>"

VOCABULARY = "the gpt2 tokenizer's vocabulary"
VOCABULARY_ADVICE = (
    "go online once, or point TIKTOKEN_CACHE_DIR to a folder that holds it and can be written, or use --tokenizer bytes"
)
FETCH_SECONDS, FETCH_ATTEMPTS = 15.0, 3  # with the pauses, 48 seconds at most

# GPT-2's pattern cuts a text into pieces, which are then encoded one by one. The bracket is ours. It holds everything
# that does not look ahead, so fancy-regex runs that part as an automaton and only the rest step by step. The pieces are
# the same and encoding takes two thirds of the time (benchmarks/prepare.py, `tiktoken` against `limit`).
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"


@functools.cache
def load_tokenizer(name: str) -> tiktoken.Encoding:
    """`gpt2` (50,257 tokens) or `bytes` (257 tokens: the 256 bytes and end-of-text; needs no download).

    Raises:
        UserError: the name is unknown, or GPT-2's vocabulary is neither on this machine nor within reach.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]+",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    if name == "gpt2":
        tiktoken.load.read_file = fetch  # which tiktoken calls if the vocabulary is not in its cache
        try:
            # The ranks and the special token of tiktoken's "gpt2", but in one file, which loads five times faster.
            encoding = tiktoken_ext.openai_public.r50k_base()
        except (OSError, ValueError) as error:  # the cache cannot be read or written, or the file is another one
            raise UserError(f"{VOCABULARY}: could not be read or stored ({error}); {VOCABULARY_ADVICE}") from error
        return tiktoken.Encoding(**{**encoding, "pat_str": GPT2_PATTERN})
    raise UserError(f"no tokenizer is called {name!r}: there are gpt2 and bytes")


def fetch(url: str) -> bytes:
    """The file at `url`, within `FETCH_SECONDS` a try."""
    import requests

    def download() -> bytes:
        answer = requests.get(url, timeout=FETCH_SECONDS)
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
def token_bytes(name: str) -> np.ndarray:
    """The bytes that each token stands for, (vocabulary,) int64; none for end-of-text."""
    encoding = load_tokenizer(name)
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab)]
    lengths[encoding.eot_token] = 0
    return np.array(lengths, np.int64)


def cut_tokens(encoding: tiktoken.Encoding, tokens: np.ndarray, length: int) -> np.ndarray:
    """The first `length` tokens of a text, or a few less where the cut would be inside a character."""
    while length and encoding.decode_single_token_bytes(int(tokens[length]))[0] & 0xC0 == 0x80:
        length -= 1
    return tokens[:length]
