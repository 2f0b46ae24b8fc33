"""Where text comes from: the files of a source (this machine's, or the hub's Wikipedia), and the articles in them.

Reading is in two halves, so that many threads can share it: `read_chunks` cuts a file into runs of neighbouring
articles, as cheaply as it can, and `articles` takes such a chunk apart, in whichever thread it was given to.
"""

import codecs
import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from config import UserError
from data import sha256

T = TypeVar("T")

SAMPLE = Path(__file__).resolve().parent / "sample" / "articles.jsonl"
FILE_TYPES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
REPOSITORY = "wikimedia/wikipedia"

CHUNK_BYTES = 1 << 20  # text in a chunk, about: large against the cost of giving it to a thread, small against memory
CHUNK_ROWS = 256
ATTEMPTS = 6  # at a request of the hub, each longer after the last: 1, 2, 4, 8, 16 s, and what huggingface_hub adds
ANSWER_SECONDS = 120  # to wait for an answer about the repository; for a file huggingface_hub waits 10 s at a time

# ----------------------------------------------------------------------------------------------------------------------
# A file -> chunks of articles


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
        raise UserError(f"{name}: cannot be read, it may be cut short or damaged ({_first_line(error)})") from error


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


# ----------------------------------------------------------------------------------------------------------------------
# A chunk -> articles

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


# ----------------------------------------------------------------------------------------------------------------------
# Sources: files that are on this machine


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


# ----------------------------------------------------------------------------------------------------------------------
# Sources: the hub's Wikipedia


class HubWikipedia:
    """One language and dump of `wikimedia/wikipedia`: `datasets` names the files, `huggingface_hub` fetches them.

    The revision is resolved to a commit once, and all that follows, also after a stop, is of that commit. The dump lies
    ordered by page id, old articles first; the files are taken in an order that has nothing to do with it (by the hash
    of their names), so that the first quarter of them is a fair quarter.

    `resolved` is what an earlier run found out, from its `provenance()`. A file lies in `folder` from its download,
    which begins when the file before it is read, until `release`; one that is in the Hugging Face cache is read there.

    Raises:
        UserError: the hub cannot be reached or has no such thing.
    """

    def __init__(self, language: str, dump: str, revision: str, folder: Path):
        self.config, self.folder = f"{dump}.{language}", folder
        self.identity = {"kind": "hub", "repository": REPOSITORY, "config": self.config, "revision": revision}
        # Xet, the hub's newer protocol, has been seen to hang for over an hour (github.com/huggingface/xet-core, issue 883).
        # Plain HTTP asks again after 10 s of silence and goes on where it stood. To be set before the first import.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
        warnings.filterwarnings("ignore", "Not enough free disk space")  # huggingface_hub's, beside our own message
        self.commit, self.files = "", []
        self.seconds_per_byte = 0.0  # of the last download
        self._downloads: dict[int, Future] = {}

    def resolve(self) -> dict[str, Any]:
        """Find the commit and its files. Returns them for `restore`, as plain data."""
        from huggingface_hub import HfApi

        def find() -> tuple[str, list[SourceFile]]:
            api = HfApi()
            commit = api.dataset_info(REPOSITORY, revision=self.identity["revision"]).sha
            names = self._file_names(commit)
            infos = api.get_paths_info(REPOSITORY, names, revision=commit, repo_type="dataset")
            return commit, [SourceFile(i.path, i.size, i.lfs.sha256 if i.lfs else None) for i in infos]

        self.commit, files = self._patiently(f"{REPOSITORY} {self.config}", lambda: _within(ANSWER_SECONDS, find))
        self.files = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
        return {"commit": self.commit, "files": [vars(file) for file in self.files]}

    def restore(self, resolved: dict[str, Any]) -> None:
        self.commit, self.files = resolved["commit"], [SourceFile(**file) for file in resolved["files"]]
        for path in self.folder.rglob("*.incomplete"):  # of a download that was killed; nothing would go on with it
            path.unlink()

    def _file_names(self, commit: str) -> list[str]:
        import datasets

        available = datasets.get_dataset_config_names(REPOSITORY, revision=commit)
        if self.config not in available:
            language = self.config.split(".", 1)[1]
            others = [name.split(".")[0] for name in available if name.split(".", 1)[-1] == language]
            hint = f"--dump {' or '.join(others)}" if others else "a --language that https://wikimedia.org lists"
            raise UserError(f"--dump, --language: {REPOSITORY} has no {self.config}; give {hint}")
        builder = datasets.load_dataset_builder(REPOSITORY, self.config, revision=commit)
        prefix = f"hf://datasets/{REPOSITORY}@{commit}/"
        return [str(name).removeprefix(prefix) for name in builder.config.data_files["train"]]

    def summary(self) -> str:
        size = sum(file.bytes for file in self.files) / 1e9
        return f"{REPOSITORY} {self.config} at commit {self.commit[:12]}: {count(len(self.files), 'file')} of {size:,.2f} GB"

    def provenance(self) -> dict[str, Any]:
        return {
            **self.identity,
            "commit": self.commit,
            "files": len(self.files),
            "bytes": sum(file.bytes for file in self.files),
        }

    def is_one_document(self, text_column: str) -> bool:
        return False

    def fetch(self, number: int) -> Path:
        """The file with this number, downloaded and checked; the one behind it is being downloaded from now on."""
        for ahead in (number, number + 1):
            if ahead < len(self.files) and ahead not in self._downloads:
                file = self.files[ahead]
                self._downloads[ahead] = _in_background(
                    lambda file=file: self._patiently(file.name, lambda: self._download(file))
                )
        return self._downloads[number].result()

    def release(self, before: int) -> None:
        """The files before this one are done with: delete what was downloaded of them."""
        for number in [n for n in self._downloads if n < before]:
            del self._downloads[number]
        for file in self.files[:before]:
            (self.folder / file.name).unlink(missing_ok=True)
        if before == len(self.files):
            shutil.rmtree(self.folder, ignore_errors=True)

    def most_bytes_at_once(self) -> int:
        """Of downloaded files: the one at work, the next one, and one that is done but not yet noted so."""
        return sum(sorted((file.bytes for file in self.files), reverse=True)[:3])

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def _download(self, file: SourceFile) -> Path:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        where = {"repo_id": REPOSITORY, "filename": file.name, "repo_type": "dataset", "revision": self.commit}
        cached = try_to_load_from_cache(**where)
        for path in (self.folder / file.name, Path(cached) if isinstance(cached, str) else None):
            if path and path.exists() and _is_whole(path, file):
                return path
        begin = time.monotonic()
        path = Path(hf_hub_download(**where, local_dir=self.folder, force_download=True))
        self.seconds_per_byte = (time.monotonic() - begin) / file.bytes
        if not _is_whole(path, file):  # huggingface_hub looks at the size alone
            path.unlink()
            raise OSError("what came is not what the hub has (its SHA-256 differs)")
        return path

    @staticmethod
    def _patiently(what: str, action: Callable[[], T]) -> T:
        """`action`, again and again with longer pauses while the network or the hub is at fault."""
        from huggingface_hub import constants

        for attempt in range(ATTEMPTS):
            try:
                return action()
            except UserError:
                raise
            except Exception as error:  # those of the libraries and of their libraries have no common base
                if getattr(error, "errno", None) in DISK_FULL:
                    raise
                status = getattr(getattr(error, "response", None), "status_code", 0)
                if constants.HF_HUB_OFFLINE:
                    raise UserError(f"{what}: is not on this machine, and HF_HUB_OFFLINE is set; go online") from error
                if 400 <= status < 500 and status not in (408, 429):  # asking again would not help
                    hint = "is HF_TOKEN right?" if status in (401, 403) else "is --revision right?"
                    raise UserError(f"{what}: the hub refuses it ({_first_line(error)}); {hint}") from error
                if attempt == ATTEMPTS - 1:
                    raise UserError(
                        f"{what}: could not be fetched ({_first_line(error)}), tried {ATTEMPTS} times; "
                        "what is done is kept: give the same command when the network is back"
                    ) from error
                pause = 2**attempt
                tqdm.write(f"{what}: {_first_line(error)}; trying again in {pause} s", file=sys.stderr)
                time.sleep(pause)
        raise AssertionError("not reached")


def _in_background(action: Callable[[], T]) -> Future:
    """`action` in a thread of its own. Not a pool's: Python, ending, would wait for that, and so for the network."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # whatever it is, it belongs to the one who waits
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _within(seconds: float, action: Callable[[], T]) -> T:
    """The result of `action`. Raises OSError where there is none after so many seconds."""
    try:
        return _in_background(action).result(timeout=seconds)
    except FutureTimeoutError as error:
        raise OSError(f"no answer in {seconds:g} s") from error


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _is_whole(path: Path, file: SourceFile) -> bool:
    return path.stat().st_size == file.bytes and (file.sha256 is None or sha256(path) == file.sha256)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
