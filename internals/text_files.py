"""Text files: a file -> chunks -> articles."""

import codecs
import contextlib
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from internals.files import sha256
from internals.start import UserError, first_line

SAMPLE = Path(__file__).resolve().parents[1] / "sample" / "articles.jsonl"

FILE_TYPES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")

CHUNK_BYTES = 1 << 20  # text in a chunk, about: large against the cost of giving it to a thread, small against memory

CHUNK_ROWS = 256


@dataclass(frozen=True)
class Chunk:
    """Neighbouring articles of a source file, not yet taken apart.

    kind      parquet: `data` is some rows. jsonl: whole lines. txt: a piece of the one document.
    first     the row, line or piece of the file that it begins with, counted from 0; `count`: how many it has
    position  bytes of the file that are read when this chunk is
    key       txt: what decides the document's split; `ends`: this is its last piece
    """

    kind: str
    name: str
    first: int
    count: int
    data: pa.RecordBatch | bytes | str
    position: int
    key: bytes | None = None
    ends: bool = True


def file_type(name: str) -> str:
    """.parquet, .jsonl or .txt, also in front of a compression's suffix; empty where it is none of them."""
    ending = next((ending for ending in FILE_TYPES if name.lower().endswith(ending)), "")
    return ending.removesuffix(".gz").removesuffix(".zst")


def read_chunks(path: Path, name: str, text_column: str) -> Iterator[Chunk]:
    """The chunks of the file at `path`, called `name` in messages.

    Raises:
        UserError: the file is damaged, cannot be read, or lacks the column.
    """
    reader = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_txt}[file_type(name)]
    try:
        yield from reader(path, name, text_column)
    except (OSError, pa.ArrowException) as error:  # Arrow reports damage as either
        raise UserError(f"{name}: cannot be read, it may be cut short or damaged ({first_line(error)})") from error


def _read_parquet(path: Path, name: str, text_column: str) -> Iterator[Chunk]:
    with pq.ParquetFile(path) as file:
        have = file.schema_arrow.names
        if text_column not in have:
            raise UserError(f"{name}: has no column {text_column!r}; give --text-column one of: {', '.join(have)}")
        columns = [column for column in ("id", "title", text_column) if column in have]
        size, rows, done = os.path.getsize(path), file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=columns, use_threads=False):
            for part in _split(batch):
                first, done = done, done + part.num_rows
                yield Chunk("parquet", name, first, part.num_rows, part, size * done // rows)


def _split(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    if batch.nbytes <= 4 * CHUNK_BYTES or batch.num_rows == 1:
        yield batch
    else:
        half = batch.num_rows // 2
        yield from _split(batch.slice(0, half))
        yield from _split(batch.slice(half))


@contextlib.contextmanager
def _open_stream(path: Path) -> Iterator[tuple[pa.NativeFile, pa.NativeFile]]:
    """(the file, decompressed where its name says so; the file as it is, which tells how much of it is read)."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    with pa.OSFile(str(path)) as raw:
        if codec is None:
            yield raw, raw
        else:
            with pa.CompressedInputStream(raw, codec) as stream:
                yield stream, raw


def _read_jsonl(path: Path, name: str, text_column: str) -> Iterator[Chunk]:
    with _open_stream(path) as (stream, raw):
        parts, first = [], 0
        while block := stream.read(CHUNK_BYTES):
            head, newline, rest = block.rpartition(b"\n")
            if not newline:  # a line longer than the block
                parts.append(block)
                continue
            data = b"".join([*parts, head])
            count = data.count(b"\n") + 1
            yield Chunk("jsonl", name, first, count, data, raw.tell())
            parts, first = [rest], first + count
        if data := b"".join(parts):
            yield Chunk("jsonl", name, first, 1, data, raw.tell())


def _read_txt(path: Path, name: str, text_column: str) -> Iterator[Chunk]:
    digest = hashlib.sha256()  # the split is decided by all of the text, so it is read twice
    with _open_stream(path) as (stream, _):
        while block := stream.read(CHUNK_BYTES):
            digest.update(block)
    key = digest.digest()
    with _open_stream(path) as (stream, raw):
        text, piece, decoder = "", 0, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        while block := stream.read(CHUNK_BYTES):
            if text and ((cut := last_cut(text)) < len(text) or cut > 4 * CHUNK_BYTES):
                yield Chunk("txt", name, piece, 1, text[:cut], raw.tell(), key, ends=False)
                text, piece = text[cut:], piece + 1
            text += decoder.decode(block)
        text += decoder.decode(b"", final=True)
        yield Chunk("txt", name, piece, 1, text, raw.tell(), key)


def last_cut(text: str) -> int:
    """Where to cut a text that is too long for one piece: before the last single blank or newline between two words,
    if there is one near the end. GPT-2's pattern never looks across such a place, so the tokens of the pieces are those
    of the whole. Else the end: what follows is another piece, and its tokens still decode to the exact text.
    """
    offset = max(0, len(text) - 4096)
    cuts = [match.start() for match in re.finditer(r"(?<=\S)[ \n](?=\S)", text[offset:])]
    return offset + cuts[-1] if cuts else len(text)


# (what decides the split: the id, None where there is none; the title, None where there is none; the text)
Article = tuple[bytes | None, str | None, str]


def articles(chunk: Chunk, text_column: str) -> Iterator[Article]:
    """The chunk's articles. What is no UTF-8 stands in them as lone surrogates; what has no text, as empty text.

    Raises:
        UserError: a row is not what it should be; the message names file and line.
    """
    parse = {"parquet": _parse_parquet, "jsonl": _parse_jsonl, "txt": _parse_txt}[chunk.kind]
    return parse(chunk, text_column)


def _parse_parquet(chunk: Chunk, text_column: str) -> Iterator[Article]:
    def column(name: str) -> list[Any]:
        if name not in chunk.data.schema.names:
            return [None] * chunk.count
        values = chunk.data.column(name)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            data = values.cast(pa.large_binary()).to_pylist()  # decoded here: Arrow would stop at what is no UTF-8
            return [value and value.decode("utf-8", "surrogateescape") for value in data]
        if name == text_column:
            raise UserError(f"{chunk.name}: column {name!r} is no text ({values.type}); give another --text-column")
        return values.to_pylist()

    for key, title, text in zip(column("id"), column("title"), column(text_column), strict=True):
        yield _article(key, title, text)


def _parse_jsonl(chunk: Chunk, text_column: str) -> Iterator[Article]:
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first + 1):
        if not line.strip():
            continue  # an empty line is no row
        where = f"{chunk.name}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: is no JSON ({error}); mend or delete that line") from error
        if not isinstance(row, dict):
            raise UserError(
                f'{where}: is no JSON object such as {{"title": ..., "text": ...}}; mend or delete that line'
            )
        if text_column not in row:
            raise UserError(f"{where}: has no {text_column!r}; mend it, or give --text-column one of: {', '.join(row)}")
        if not isinstance(row[text_column], str | None):
            raise UserError(f"{where}: {text_column!r} is no text; mend it, or give another --text-column")
        yield _article(row.get("id"), row.get("title"), row[text_column])


def _parse_txt(chunk: Chunk, text_column: str) -> Iterator[Article]:
    yield chunk.key, None, chunk.data


def _article(key: Any, title: Any, text: str | None) -> Article:
    key = None if key is None or key == "" else str(key).encode("utf-8", "surrogatepass")
    return key, title if isinstance(title, str) else None, text or ""


@dataclass(frozen=True)
class SourceFile:
    name: str  # below the source's folder, or in the hub's repository
    bytes: int
    sha256: str | None


class LocalFiles:
    """A file, a folder or a glob; also the embedded sample.

    `identity` is what meta.json says of the source: names and contents, so that nothing that changed goes unnoticed.

    Raises:
        UserError: there is nothing there, or nothing of a known type.
    """

    def __init__(self, source: str):
        is_sample = source == "sample"
        self.root, paths, self.left_out = (SAMPLE.parent, [SAMPLE], 0) if is_sample else self._find(source)
        self.source, self.files = source, []
        total = sum(path.stat().st_size for path in paths)
        with tqdm(total=total, unit="B", unit_scale=True, desc="looking", disable=None, leave=False, delay=1) as bar:
            for path in paths:
                size = path.stat().st_size
                self.files.append(SourceFile(path.relative_to(self.root).as_posix(), size, sha256(path)))
                bar.update(size)
        listing = "".join(f"{file.sha256}  {file.name}\n" for file in self.files)
        self.identity = {
            "kind": "sample" if is_sample else "files",
            "files": len(paths),
            "bytes": total,
            "sha256": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),  # of `sha256sum FILE...`
        }

    @staticmethod
    def _find(source: str) -> tuple[Path, list[Path], int]:
        """(their folder, the files, how many there are of other types)"""

        def is_hidden(path: Path, root: Path) -> bool:
            return any(part.startswith(".") for part in path.relative_to(root).parts)

        path = Path(source).expanduser()
        if path.is_dir():
            root, found = path, sorted(p for p in path.rglob("*") if p.is_file() and not is_hidden(p, path))
        elif path.is_file():
            root, found = path.parent, [path]
        else:
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
            if not found:
                raise UserError(
                    f"--source {source}: there is no such file or folder, and no file matches; "
                    f"give wikipedia, sample, or a file, folder or glob of {', '.join(FILE_TYPES)}"
                )
            root = Path(os.path.commonpath([p.parent for p in found]))
        taken = [p for p in found if file_type(p.name)]
        if not taken:
            raise UserError(f"--source {source}: holds no file that ends in {', '.join(FILE_TYPES)}")
        return root, taken, len(found) - len(taken)

    def summary(self) -> str:
        text = f"{self.source}: {count(len(self.files), 'file')} of {self.identity['bytes'] / 1e6:,.1f} MB"
        if self.left_out:
            text += f" (left out {count(self.left_out, 'file')} that end in none of {', '.join(FILE_TYPES)})"
        return text

    def provenance(self) -> dict[str, Any]:
        return self.identity

    def fetch(self, number: int) -> Path:
        return self.root / self.files[number].name

    def release(self, before: int) -> None:
        """The files before this one are done with. They are the user's: nothing to do."""

    def is_one_document(self, text_column: str) -> bool:
        """Whether all is a single article: it is split where it ends, as there are no articles to split between."""
        if len(self.files) > 1:
            return False
        first = list(islice(read_chunks(self.fetch(0), self.files[0].name, text_column), 2))
        if file_type(self.files[0].name) == ".txt":
            return True
        return len(first) == 1 and sum(1 for _ in articles(first[0], text_column)) == 1


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"
