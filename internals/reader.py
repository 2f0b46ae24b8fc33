"""The base of all readers of text files: a file is read in chunks, a chunk is parsed into articles."""

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from config import PrepareConfig
from internals.encodings import Block, FileCheck, as_utf8, check_text
from internals.file_walk import COMPRESSIONS
from internals.start import UserError, first_line
from internals.tokenizer_json import END_OF_TEXT

CHUNK_BYTES = 1 << 20  # of text in a chunk, about: much work for a thread, little memory
CHUNK_ROWS = 256
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class ReadOptions:
    """How files are read: three flags, and the tokenizer of the shards, as `load_tokenizer` takes it."""

    text_column: str = "text"
    encoding: str = "utf-8"
    separator: str = ""
    tokenizer: str = "bytes"  # a cut in a long document must not change its tokens; with bytes it never does

    @classmethod
    def of(cls, cfg: PrepareConfig, tokenizer: str = "bytes") -> "ReadOptions":
        return cls(cfg.text_column, cfg.encoding, cfg.separator_text, tokenizer)

    @property
    def title_column(self) -> str | None:
        """The column of the title. None if it is the text itself, which would otherwise come twice."""
        return None if self.text_column == "title" else "title"


class Article(NamedTuple):
    id: bytes | None  # decides the split; None: the text does
    title: str | None
    text: bytes  # UTF-8, with the invalid bytes of the file; empty if there is no text

    @classmethod
    def from_row(cls, id: Any, title: Any, text: str | bytes | None) -> "Article":
        is_missing = id is None or id == "" or id != id  # NaN != NaN
        id = None if is_missing else str(id).encode("utf-8", "surrogatepass")
        return cls(id, as_title(title), to_utf8(text) if isinstance(text, str) else text or b"")

    @property
    def heading(self) -> bytes:
        return to_utf8(f"{self.title}\n\n") if self.title else b""

    @property
    def is_blank(self) -> bool:
        head = self.text[:64].decode("utf-8", "ignore").strip()
        return not head and not self.text.decode("utf-8", "surrogateescape").strip()


def other_column(row: dict[str, Any]) -> str:
    """What to do about a row of JSON that lacks the column of the text."""
    if texts := [name for name, value in row.items() if isinstance(value, str)]:
        return f"fix it, or give --text-column one of: {', '.join(texts[:10])}"
    if lists := [name for name, value in row.items() if isinstance(value, list)]:
        return f"write the list {lists[0]!r} in it to a file of its own (jq '.[\"{lists[0]}\"]' FILE > NEW.json)"
    return "fix or delete it"


def to_utf8(text: str) -> bytes:
    """UTF-8. A lone surrogate is not a character and becomes an invalid byte."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\udcff", text).encode("utf-8", "surrogateescape")


def is_utf8(data: bytes) -> bool:
    """Whether the bytes are valid UTF-8. Arrow checks them without Python's lock and without a copy."""
    ends = pa.py_buffer(struct.pack("=2q", 0, len(data)))
    try:
        pa.LargeStringArray.from_buffers(1, ends, pa.py_buffer(data)).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def as_title(value: Any) -> str | None:
    """The title as text; it may be a number or a date. None for lists, objects, booleans and NaN."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    is_title = value is not None and not isinstance(value, bool | list | dict) and value == value  # NaN != NaN
    return str(value) if is_title else None


@dataclass(frozen=True)
class Chunk:
    """Neighbouring articles of a file, not parsed yet, or one piece of a long document."""

    reader: "Reader"
    first: int  # the row, line or piece of the file that it begins with, from 0
    count: int  # rows, lines or pieces in it
    position: int  # bytes of the file read so far, about
    data: Any  # what the reader's `articles` parses
    starts: bool = True  # False: it continues the article of the chunk before
    ends: bool = True  # False: the next chunk continues its article

    def articles(self) -> Iterator[Article]:
        """Raises UserError, with the file and the line, if a row is not an article."""
        return self.reader.articles(self)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn a failure to read a file of the source into a UserError."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); make it readable, or leave it out") from error
    except MemoryError as error:  # Arrow's is an ArrowException, too
        much = f"{name}: does not fit into memory ({first_line(error)})"
        raise UserError(f"{much}; close other programs, or check whether the file is damaged") from error
    except (OSError, pa.ArrowException, UnicodeError) as error:  # Arrow reports damage as either
        raise UserError(f"{name}: cannot be read, it may be cut short or damaged ({first_line(error)})") from error


@dataclass(frozen=True)
class Reader:
    """Reads one file: `chunks()` in the main thread, `articles(chunk)`, which parses, in the worker threads."""

    path: Path
    name: str
    options: ReadOptions

    def check(self) -> FileCheck:
        """Whether the file holds `wanted`, and the size of its text. Raises UserError if its content does not match its
        name."""
        with reading(self.name):
            with open(self.path, "rb") as file:
                head = file.read(len(LFS_POINTER))
                if not head and self.codec:  # Arrow would take it for the compressed form of nothing
                    raise UserError(f"{self.name}: is empty, so it is not a {self.codec} file; leave it out")
                if head == LFS_POINTER:
                    raise UserError(
                        f"{self.name}: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
                    )
            return self.check_content()

    @property
    def wanted(self) -> bytes:
        """The mark to look for between documents: the first line of the separator, or end-of-text."""
        return (self.options.separator.strip("\r\n").split("\n")[0] or END_OF_TEXT).encode()

    def check_content(self) -> FileCheck:
        return check_text(self.name, self.raw_blocks, self.options.encoding, self.wanted)

    def opened(self) -> pa.NativeFile:
        return pa.OSFile(os.fsencode(self.path) if os.name == "posix" else str(self.path))

    @property
    def codec(self) -> str | None:
        return COMPRESSIONS.get(self.path.suffix.lower())

    def raw_blocks(self) -> Iterator[Block]:
        with self.opened() as file, pa.CompressedInputStream(file, self.codec) if self.codec else file as content:
            while data := content.read(CHUNK_BYTES):
                yield Block(data, file.tell())

    def blocks(self) -> Iterator[Block]:
        """The text in UTF-8."""
        return as_utf8(self.raw_blocks(), self.options.encoding)

    def records(self, end: bytes) -> Iterator[Chunk]:
        """Chunks that end with an `end`. What follows the last one in the file is a chunk, too."""
        parts, first = [], 0
        for block in self.blocks():
            head, found, rest = block.data.rpartition(end)
            if not found:  # a record longer than the block
                parts.append(block.data)
                continue
            data = b"".join([*parts, head, end])
            count = data.count(end)
            yield Chunk(self, first, count, block.position, data)
            parts, first = [rest], first + count
        if data := b"".join(parts):
            yield Chunk(self, first, data.count(end) + 1, os.path.getsize(self.path), data)

    def article(self, row: Any, where: str) -> Article:
        """The article in a row of JSON."""
        column = self.options.text_column
        if not isinstance(row, dict):
            raise UserError(f'{where}: is not a JSON object such as {{"title": ..., "text": ...}}; fix or delete it')
        if column not in row:
            raise UserError(f"{where}: has no {column!r}; {other_column(row)}")
        if not isinstance(row[column], str | None):
            raise UserError(f"{where}: {column!r} is not text; fix it, or give another --text-column")
        return Article.from_row(row.get("id"), row.get(self.options.title_column), row[column])
