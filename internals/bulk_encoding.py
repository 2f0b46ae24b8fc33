"""Many texts to tokens in one call, in any number of threads."""

import copy
import itertools
import re
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tiktoken

from internals.tokenizer import END_OF_TEXT, load_tokenizer

PIECE = 1 << 16  # characters per call of the tokenizer: tiktoken's core fails at a run of a million blanks

per_thread = threading.local()


def thread_tokenizer(name: str) -> tiktoken.Encoding:
    """This thread's own copy of a tokenizer.

    tiktoken releases Python's lock, so threads use all cores. But threads that share a tokenizer wait for each other
    inside its regular expression: two are slower than one (docs/experiments.md; measured by benchmarks/prepare.py).
    """
    if not hasattr(per_thread, name):
        setattr(per_thread, name, copy.copy(load_tokenizer(name)))
    return getattr(per_thread, name)


class Encoded(NamedTuple):
    tokens: np.ndarray  # (N,) uint16: all texts, each followed by end-of-text
    lengths: np.ndarray  # (texts,) int64: tokens per text, end-of-text included


def encode(encoding: tiktoken.Encoding, texts: list[str]) -> Encoded:
    """Encode many texts. What looks like end-of-text inside a text is encoded as plain text.

    Texts are joined by end-of-text and encoded in one call. If that gives more ends than texts, one of the texts
    contains the characters of an end-of-text, and each text gets a call of its own. Long texts are cut into pieces.
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
    return Encoded(tokens, np.diff(np.flatnonzero(tokens == encoding.eot_token), prepend=-1))


def pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        piece = text[start : start + PIECE]
        if start + PIECE < len(text):
            piece = piece[: last_cut(piece)]
        yield piece
        start += len(piece)


def last_cut(text: str) -> int:
    """Where to cut a text that is too long for one piece: `"one two three" -> 7`.

    The cut is before the last single blank or newline between two words, if there is one in the last 4,096 characters.
    GPT-2's pattern never matches across such a place, so the pieces have the tokens of the whole text. Otherwise the
    cut is at the end: the tokens may differ there, but they still decode to the exact text.
    """
    offset = max(0, len(text) - 4096)
    cuts = [match.start() for match in re.finditer(r"(?<=\S)[ \n](?=\S)", text[offset:])]
    return offset + cuts[-1] if cuts else len(text)
