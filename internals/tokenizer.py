"""Tokenizers by name, and many texts through one of them at once."""

import copy
import functools
import itertools
import threading
from collections.abc import Iterator

import numpy as np
import tiktoken
import tiktoken_ext.openai_public

from internals.start import UserError
from internals.text_files import last_cut

END_OF_TEXT = "<|endoftext|>"

# GPT-2's pattern, which cuts a text into the pieces that are encoded one by one, with a bracket around all that does not
# look ahead: tiktoken's engine of regular expressions (fancy-regex) hands such a part to an automaton, and walks through
# the rest step by step. The pieces are the same, and encoding takes two thirds of the time.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"


@functools.cache
def load_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer of that name: `gpt2` (50,257 tokens) or `bytes` (the 256 bytes and end-of-text; no download).

    Raises:
        UserError: no tokenizer has that name, or GPT-2's vocabulary can neither be fetched nor found on this machine.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]+",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    if name == "gpt2":
        try:
            # The same ranks and special token as those of "gpt2", in one file, loaded five times faster.
            encoding = tiktoken_ext.openai_public.r50k_base()
        except Exception as error:  # requests' and tiktoken's own errors have no common base
            raise UserError(
                f"the gpt2 tokenizer's vocabulary could not be fetched ({type(error).__name__}). Go online once, or "
                "point TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bytes"
            ) from error
        return tiktoken.Encoding(**{**encoding, "pat_str": GPT2_PATTERN})
    raise UserError(f"no tokenizer is called {name!r}: there are gpt2 and bytes")


PIECE = 1 << 16  # characters that the tokenizer gets at once: far below the runs of one letter that make it fail

# tiktoken works without Python's lock, so threads use all cores. But they must not share a tokenizer: the copies of its
# regular expression that it keeps for them wait for each other, and two threads are slower than one.
own = threading.local()


def own_tokenizer(name: str) -> tiktoken.Encoding:
    """This thread's own copy of a tokenizer."""
    if not hasattr(own, name):
        setattr(own, name, copy.copy(load_tokenizer(name)))
    return getattr(own, name)


def encode(encoding: tiktoken.Encoding, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all texts, with an end-of-text behind each, (N,) uint16, and how many are whose, (texts,) int64.

    Many texts are one call, joined by end-of-text, at which tiktoken cuts first of all. Where that makes too many of
    them, a text holds what looks like one, which is text, too: then it is one call for each. A long text is cut:
    tiktoken's core gives up on a run of a million blanks, and not by an ordinary exception.
    """
    parts = []
    for is_long, group in itertools.groupby(texts, lambda text: len(text) > PIECE):
        group = list(group)
        if not is_long:
            tokens = encoding.encode_to_numpy(END_OF_TEXT.join([*group, ""]), allowed_special={END_OF_TEXT})
            if np.count_nonzero(tokens == encoding.eot_token) == len(group):
                parts.append(tokens)
                continue
        for text in group:
            parts += [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)]
            parts.append(np.array([encoding.eot_token], np.uint32))
    tokens = np.concatenate(parts or [np.zeros(0)], dtype=np.uint16, casting="unsafe")
    return tokens, np.diff(np.flatnonzero(tokens == encoding.eot_token), prepend=-1)


def pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        piece = text[start : start + PIECE]
        if start + PIECE < len(text):
            piece = piece[: last_cut(piece)]
        yield piece
        start += len(piece)
