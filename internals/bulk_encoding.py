"""Many texts to tokens in one call, in any number of threads, by tiktoken or, where it is installed, by gigatoken.

tiktoken is the reference. gigatoken is several times as fast and gives the same tokens.
"""

import base64
import copy
import functools
import itertools
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from internals.start import UserError, first_line
from internals.tokenizer import load_tokenizer
from internals.tokenizer_json import END_OF_TEXT, GPT2_PATTERN, OWN_PATTERN

PIECE = 1 << 16  # a longer text is encoded in pieces of so many characters: tiktoken's core fails on a million blanks
END = END_OF_TEXT.encode()

GIGATOKEN_PATTERNS = {
    GPT2_PATTERN: "gpt2",
    OWN_PATTERN: "qwen35",
}  # the patterns that gigatoken has code for, and their names there
INSTALL_GIGATOKEN = "pip install -r requirements-fast.txt makes this several times as fast"
# gigatoken's cache keeps every word, and version 0.10.0 cannot limit it. A new word costs time, so a limit on the time
# limits the memory too: to 0.15 GB more for ordinary text, 0.65 GB for random letters. Rebuilding the cache takes
# 0.03 s, refilling it 0.3 s.
CACHE_SECONDS = 3.0


class Texts(Sequence):
    """Texts in UTF-8, side by side in one buffer, with an end-of-text after each."""

    def __init__(self, texts: Sequence[Sequence[bytes]]):
        """`texts`: each in one or several parts, such as a title and what follows it."""
        self.data = b"".join(part for parts in texts for part in (*parts, END))
        self.sizes = np.array([sum(map(len, parts)) for parts in texts], np.int64)  # (texts,) bytes
        self.ends = np.cumsum(self.sizes + len(END))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: int) -> bytes:
        end = int(self.ends[number]) - len(END)
        return self.data[end - int(self.sizes[number]) : end]

    def joined(self, first: int, last: int) -> bytes:
        """The texts `first <= n < last` with their ends; all of them without a copy."""
        return self.data[int(self.ends[first - 1]) if first else 0 : int(self.ends[last - 1])]


class TiktokenEncoder:
    """tiktoken, in any number of threads.

    It releases Python's lock, so threads use all cores. But threads that share a tokenizer wait for each other inside
    its regular expression: two are slower than one (docs/experiments.md). So each thread has its own copy.
    """

    def __init__(self, encoding: tiktoken.Encoding, remark: str = ""):
        self.encoding, self.per_thread = encoding, threading.local()
        self.summary = f"encoding with tiktoken{remark}"

    @property
    def own(self) -> tiktoken.Encoding:
        if not hasattr(self.per_thread, "encoding"):
            self.per_thread.encoding = copy.copy(self.encoding)
        return self.per_thread.encoding

    def joined(self, data: bytes) -> np.ndarray:
        """The tokens of valid UTF-8, (N,) uint32. `<|endoftext|>` in it becomes the end-of-text token."""
        return self.own.encode_to_numpy(data.decode(), allowed_special={END_OF_TEXT})

    def ordinary(self, text: str) -> np.ndarray:
        """The tokens of a text, (N,) uint32. `<|endoftext|>` in it is plain text."""
        return self.own.encode_to_numpy(text, disallowed_special=())


class GigatokenEncoder(TiktokenEncoder):
    """gigatoken, and tiktoken for what it cannot do.

    Threads share one encoder and take turns. One thread encodes faster than the others read and join articles, and
    there is only one cache to fill and keep.

    Raises:
        ImportError: it is not installed.
    """

    def __init__(self, encoding: tiktoken.Encoding):
        super().__init__(encoding)
        self.lock, self.vocabulary = threading.Lock(), rank_lines(encoding)
        self.build()
        self.summary = f"encoding with gigatoken {version('gigatoken')}"

    def build(self) -> None:
        """Begin with an empty cache."""
        import gigatoken

        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "vocabulary")
                path.write_bytes(self.vocabulary)
                pattern, ends = GIGATOKEN_PATTERNS[self.encoding._pat_str], {END_OF_TEXT: self.encoding.eot_token}
                self.fast = gigatoken.Tokenizer.from_tiktoken(path, pattern, ends)
        except OSError as error:  # its callers would blame the data folder
            raise UserError(
                f"temporary folder {tempfile.tempdir or '(TMPDIR)'}: cannot be written ({error.strerror or first_line(error)}); "
                "make room there, or point TMPDIR to another folder"
            ) from error
        self.as_source, self.seconds = gigatoken.BytesSource, 0.0

    def joined(self, data: bytes) -> np.ndarray:
        with self.lock:
            if self.seconds > CACHE_SECONDS:
                self.build()
            began = time.thread_time()
            try:
                # Not a list: for a list it imports awkward, which takes longer than encoding a million tokens.
                rows, _ = self.fast.encode_batch_padded(self.as_source(data), 0, parallel=False)
            except BaseException as error:
                if not is_panic(error):
                    raise
                self.build()
                return super().joined(data)
            self.seconds += time.thread_time() - began
        return rows[0]

    def ordinary(self, text: str) -> np.ndarray:
        return super().ordinary(text) if END_OF_TEXT in text else self.joined(text.encode())


def rank_lines(encoding: tiktoken.Encoding) -> bytes:
    """A tokenizer's vocabulary in the format of tiktoken's files: a line for each token, in order."""
    tokens = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    return b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


@functools.cache
def bulk_encoder(tokenizer: str) -> TiktokenEncoder:
    """gigatoken if it is installed, works, knows the tokenizer's pattern and gives tiktoken's tokens; else tiktoken."""
    encoding = load_tokenizer(tokenizer)
    if encoding._pat_str not in GIGATOKEN_PATTERNS:
        return TiktokenEncoder(encoding)
    try:
        fast = GigatokenEncoder(encoding)
        same = fast.joined(probe().encode()).tolist() == encoding.encode_ordinary(probe())
    except ImportError:
        return TiktokenEncoder(encoding, f"; {INSTALL_GIGATOKEN}")
    except BaseException as error:  # another version may have another interface
        if isinstance(error, UserError) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        return TiktokenEncoder(encoding, f": gigatoken {version('gigatoken')} does not work here ({first_line(error)})")
    if not same:
        return TiktokenEncoder(encoding, f": on this machine, gigatoken {version('gigatoken')} gives other tokens")
    return fast


def is_panic(error: BaseException) -> bool:
    """Whether it comes from a bug in gigatoken's core, which is written in Rust. It is not an Exception."""
    return type(error).__name__ == "PanicException"


def probe() -> str:
    """A text with characters of every script, for a test: gigatoken has different code for each kind of processor."""
    characters = (chr(c) for c in range(0, 0x20000, 61) if not 0xD800 <= c < 0xE000)
    return "".join(f"a{c} {c}1  {c}.{c}\n" for c in characters)


class Encoded(NamedTuple):
    tokens: np.ndarray  # (N,) uint16: all texts, each followed by end-of-text
    lengths: np.ndarray  # (texts,) int64: tokens per text, end-of-text included


def encode(encoder: TiktokenEncoder, texts: Texts) -> Encoded:
    """Encode many texts in valid UTF-8. What looks like end-of-text inside a text is encoded as plain text.

    Neighbouring texts are encoded in one call. If the result has more ends than texts, one of the texts contains
    `<|endoftext|>`, and each text gets its own call. Long texts are cut into pieces.
    """
    end, parts = encoder.encoding.eot_token, []
    for is_long, group in itertools.groupby(range(len(texts)), lambda number: texts.sizes[number] > PIECE):
        numbers = list(group)
        if not is_long:
            tokens = encoder.joined(texts.joined(numbers[0], numbers[-1] + 1))
            if np.count_nonzero(tokens == end) == len(numbers):
                parts.append(tokens)
                continue
        for number in numbers:
            parts += [encoder.ordinary(piece) for piece in pieces(texts[number].decode(), encoder.encoding)]
            parts.append(np.array([end], np.uint32))
    tokens = np.concatenate(parts or [np.zeros(0)], dtype=np.uint16, casting="unsafe")
    return Encoded(tokens, np.diff(np.flatnonzero(tokens == end), prepend=-1))


# ----------------------------------------------------------------------------------------------------------------------
# Long texts

CUT_WITHIN = 4096  # characters at the end of a text in which to look for a cut
CUT_TRIES = 32  # for each kind of place
CUT_CONTEXT = 256  # characters on each side that are encoded together and apart


def pieces(text: str, encoding: tiktoken.Encoding) -> Iterator[str]:
    start = 0
    while start < len(text):
        piece = text[start : start + PIECE]
        if start + PIECE < len(text):
            piece = piece[: last_cut(piece, encoding)]
        yield piece
        start += len(piece)


def last_cut(text: str, encoding: tiktoken.Encoding) -> int:
    """Where to cut a text that is too long for one piece, so that the parts have the tokens of the whole.

    `"one two three" -> 7`: before a single blank or newline between two words near the end. Not every tokenizer's
    pattern ends a match there, so the tokenizer itself checks each cut. Text without such a place (Chinese) is cut
    between other characters. If there is no place at all (a long run of blanks), the cut is at the end. There, and
    inside a match of hundreds of characters, the tokens may differ, but they still decode to the exact text.
    """
    last = len(text) - CUT_CONTEXT
    offset = max(0, last - CUT_WITHIN)
    words = [offset + match.start() for match in re.finditer(r"(?<=\S)[ \n](?=\S)", text[offset : max(0, last) + 1])]
    others = range(last, max(0, last - CUT_TRIES), -1)
    for cut in itertools.chain(reversed(words[-CUT_TRIES:]), others):
        if can_cut(text, cut, encoding):
            return cut
    return len(text)


def can_cut(text: str, cut: int, encoding: tiktoken.Encoding) -> bool:
    """Whether the characters around a cut have the same tokens with the cut and without it.

    That is enough if a match of the pattern depends only on the text near it, as in all known tokenizers, and is not
    longer than `CUT_CONTEXT`. Inside a longer one (a letter repeated a million times), the merges depend on where it
    begins, and the tokens may differ. It would also fail for a pattern that counts, such as one for pairs of words.
    """
    left, right = text[max(0, cut - CUT_CONTEXT) : cut], text[cut : cut + CUT_CONTEXT]
    apart = encoding.encode_ordinary(left) + encoding.encode_ordinary(right)
    return apart == encoding.encode_ordinary(left + right)
