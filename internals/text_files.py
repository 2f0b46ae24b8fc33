"""Text files: a source is files, a file is read in chunks, a chunk is parsed into articles."""

import codecs
import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from internals.files import sha256
from internals.start import UserError, first_line
from internals.tokenizer import last_cut

SAMPLE = Path(__file__).resolve().parents[1] / "sample" / "articles.jsonl"
FILE_TYPES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")

CHUNK_BYTES = 1 << 20  # about the text in a chunk: much work for a thread, little memory
CHUNK_ROWS = 256

# ----------------------------------------------------------------------------------------------------------------------
# A source: which files there are


@dataclass(frozen=True)
class SourceFile:
    name: str  # relative to the source's folder or to the hub's repository
    bytes: int
    sha256: str | None


class Source:
    """Where text comes from: `fetch(number)` returns the path of `files[number]`, `summary()` a line for the person.

    The defaults below are those of files that are already on this machine.
    """

    identity: dict[str, Any]  # what was asked for; a folder of shards resumes only with the same
    files: list[SourceFile]
    peak_bytes = 0  # the most that downloads take on the disk at one time
    bytes_on_disk = 0  # what they take now
    seconds_per_byte = 0.0  # of the last download

    def resolve(self, known: dict[str, Any]) -> dict[str, Any]:
        """Find out what must stay the same in later runs, unless an earlier run did. Takes and returns plain data."""
        return {}

    def release(self, before: int) -> None:
        """The files before this number are not needed any more."""

    def is_one_document(self, text_column: str) -> bool:
        """Whether the source is a single article. Then its tokens are split, as there are no articles to choose from."""
        return False

    def provenance(self) -> dict[str, Any]:
        """What meta.json says of the source."""
        return self.identity


class LocalFiles(Source):
    """A file, a folder or a glob; `sample` is the embedded one. Contents are hashed, so no change goes unnoticed."""

    def __init__(self, source: str):
        found = Found(SAMPLE.parent, [SAMPLE]) if source == "sample" else find_files(source)
        paths = [path for path in found.paths if file_type(path.name)]
        if not paths:
            raise UserError(f"--source {source}: holds no file that ends in {', '.join(FILE_TYPES)}")
        self.source, self.root, self.left_out, self.files = source, found.root, len(found.paths) - len(paths), []
        total = sum(path.stat().st_size for path in paths)
        with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=None, leave=False, delay=1) as bar:
            for path in paths:
                name, size = path.relative_to(self.root).as_posix(), path.stat().st_size
                with reading(name):
                    self.files.append(SourceFile(name, size, sha256(path)))
                bar.update(size)
        listing = "".join(f"{file.sha256}  {file.name}\n" for file in self.files)  # what `sha256sum FILE...` prints
        self.identity = {
            "kind": "sample" if source == "sample" else "files",
            "files": len(paths),
            "bytes": total,
            "sha256": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
        }

    def fetch(self, number: int) -> Path:
        return self.root / self.files[number].name

    def is_one_document(self, text_column: str) -> bool:
        if len(self.files) > 1:
            return False
        chunks = islice(read_chunks(self.fetch(0), self.files[0].name, text_column), 2)
        beginnings = [chunk for chunk in chunks if chunk.starts]
        return len(beginnings) == 1 and sum(1 for _ in beginnings[0].articles()) == 1

    def summary(self) -> str:
        text = f"{self.source}: {counted(len(self.files), 'file')} of {self.identity['bytes'] / 1e6:,.1f} MB"
        if self.left_out:
            text += f" (left out {counted(self.left_out, 'file')} that end in none of {', '.join(FILE_TYPES)})"
        return text


class Found(NamedTuple):
    root: Path  # names of files are relative to it
    paths: list[Path]  # sorted, of any type


def find_files(source: str) -> Found:
    """The files that `--source` names. In a folder, hidden files and those in hidden folders do not count."""
    path = Path(source).expanduser()
    if path.is_dir():
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        return Found(path, sorted(p for p in inside if p.is_file()))
    if path.is_file():
        return Found(path.parent, [path])
    paths = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
    if not paths:
        raise UserError(
            f"--source {source}: there is no such file or folder, and no file matches; "
            f"give wikipedia, sample, or a file, folder or glob of {', '.join(FILE_TYPES)}"
        )
    return Found(Path(os.path.commonpath([p.parent for p in paths])), paths)


def counted(number: int, noun: str) -> str:
    """`counted(4, "file") -> "4 files"`"""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


# ----------------------------------------------------------------------------------------------------------------------
# A file: chunks, and the articles in them. Each file type has its reader.


class Article(NamedTuple):
    id: bytes | None  # decides the split; None: the text does
    title: str | None
    text: str  # invalid UTF-8 is kept as lone surrogates; empty if there is no text

    @classmethod
    def from_row(cls, id: Any, title: Any, text: str | None) -> "Article":
        id = None if id is None or id == "" else str(id).encode("utf-8", "surrogatepass")
        return cls(id, title if isinstance(title, str) else None, text or "")


@dataclass(frozen=True)
class Chunk:
    """Neighbouring articles of a file, not parsed yet, or one piece of a long document."""

    reader: "Reader"
    first: int  # the row, line or piece of the file that it begins with, from 0
    count: int  # rows, lines or pieces in it
    position: int  # bytes of the file read so far, about
    data: pa.RecordBatch | bytes | Article  # of parquet, of jsonl, of txt
    starts: bool = True  # False: it continues the article of the chunk before
    ends: bool = True  # False: the next chunk continues its article

    def articles(self) -> Iterator[Article]:
        """Raises UserError, with the file and the line, if a row is not an article."""
        return self.reader.articles(self)


def file_type(name: str) -> str:
    """`.parquet`, `.jsonl` or `.txt`, compressed or not; empty for any other file."""
    ending = next((ending for ending in FILE_TYPES if name.lower().endswith(ending)), "")
    return ending.removesuffix(".gz").removesuffix(".zst")


def read_chunks(path: Path, name: str, text_column: str) -> Iterator[Chunk]:
    """The chunks of the file at `path`, which messages call `name`."""
    with reading(name):
        yield from READERS[file_type(name)](path, name, text_column).chunks()


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn a failure to read a file of the source into a UserError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:  # Arrow reports damage as either
        raise UserError(f"{name}: cannot be read, it may be cut short or damaged ({first_line(error)})") from error


class Block(NamedTuple):
    data: bytes  # decompressed
    position: int  # bytes of the file read so far, as it is on the disk


@dataclass(frozen=True)
class Reader:
    """Reads one file: `chunks()` in the main thread, `articles(chunk)`, which parses, in the worker threads."""

    path: Path
    name: str
    text_column: str

    def blocks(self) -> Iterator[Block]:
        codec = {".gz": "gzip", ".zst": "zstd"}.get(self.path.suffix.lower())
        with pa.OSFile(str(self.path)) as file, pa.CompressedInputStream(file, codec) if codec else file as content:
            while data := content.read(CHUNK_BYTES):
                yield Block(data, file.tell())


class ParquetReader(Reader):
    def chunks(self) -> Iterator[Chunk]:
        with pq.ParquetFile(self.path) as file:
            have = file.schema_arrow.names
            if self.text_column not in have:
                raise UserError(
                    f"{self.name}: has no column {self.text_column!r}; give --text-column one of: {', '.join(have)}"
                )
            columns = [column for column in ("id", "title", self.text_column) if column in have]
            size, rows, first = os.path.getsize(self.path), file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=columns, use_threads=False):
                for part in halves(batch):
                    done = first + part.num_rows
                    yield Chunk(self, first, part.num_rows, size * done // rows, part)
                    first = done

    def articles(self, chunk: Chunk) -> Iterator[Article]:
        columns = (self.column(chunk, name) for name in ("id", "title", self.text_column))
        for row in zip(*columns, strict=True):
            yield Article.from_row(*row)

    def column(self, chunk: Chunk, name: str) -> list[Any]:
        """A column as Python values, all None if there is no such column."""
        if name not in chunk.data.schema.names:
            return [None] * chunk.count
        values = chunk.data.column(name)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            data = values.cast(pa.large_binary()).to_pylist()  # decoded here: Arrow would stop at invalid UTF-8
            return [value and value.decode("utf-8", "surrogateescape") for value in data]
        if name == self.text_column:
            raise UserError(f"{self.name}: column {name!r} is not text ({values.type}); give another --text-column")
        return values.to_pylist()


def halves(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch, halved until each part is at most four chunks long or one row."""
    if batch.nbytes <= 4 * CHUNK_BYTES or batch.num_rows == 1:
        yield batch
    else:
        half = batch.num_rows // 2
        yield from halves(batch.slice(0, half))
        yield from halves(batch.slice(half))


class JsonlReader(Reader):
    def chunks(self) -> Iterator[Chunk]:
        parts, first = [], 0
        for block in self.blocks():
            head, newline, rest = block.data.rpartition(b"\n")
            if not newline:  # a line longer than the block
                parts.append(block.data)
                continue
            data = b"".join([*parts, head])
            count = data.count(b"\n") + 1
            yield Chunk(self, first, count, block.position, data)
            parts, first = [rest], first + count
        if data := b"".join(parts):
            yield Chunk(self, first, 1, os.path.getsize(self.path), data)

    def articles(self, chunk: Chunk) -> Iterator[Article]:
        for number, line in enumerate(chunk.data.split(b"\n"), chunk.first + 1):
            if line.strip():
                row = self.parse(line, f"{self.name}, line {number}")
                yield Article.from_row(row.get("id"), row.get("title"), row[self.text_column])

    def parse(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            row = json.loads(line.decode("utf-8-sig", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: invalid JSON ({error}); fix or delete that line") from error
        if not isinstance(row, dict):
            raise UserError(
                f'{where}: is not a JSON object such as {{"title": ..., "text": ...}}; fix or delete that line'
            )
        if self.text_column not in row:
            raise UserError(
                f"{where}: has no {self.text_column!r}; fix that line, or give --text-column one of: {', '.join(row)}"
            )
        if not isinstance(row[self.text_column], str | None):
            raise UserError(f"{where}: {self.text_column!r} is not text; fix that line, or give another --text-column")
        return row


class TxtReader(Reader):
    """The file is one document. Its content decides the split, so it is read twice."""

    def chunks(self) -> Iterator[Chunk]:
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block.data)
        text, piece, decoder = "", 0, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        for block in self.blocks():
            if text and ((cut := last_cut(text)) < len(text) or cut > 4 * CHUNK_BYTES):
                article = Article(digest.digest(), None, text[:cut])
                yield Chunk(self, piece, 1, block.position, article, starts=piece == 0, ends=False)
                text, piece = text[cut:], piece + 1
            text += decoder.decode(block.data)
        article = Article(digest.digest(), None, text + decoder.decode(b"", final=True))
        yield Chunk(self, piece, 1, os.path.getsize(self.path), article, starts=piece == 0)

    def articles(self, chunk: Chunk) -> Iterator[Article]:
        yield chunk.data


READERS = {".parquet": ParquetReader, ".jsonl": JsonlReader, ".txt": TxtReader}
