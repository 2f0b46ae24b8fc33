"""Turn Wikipedia, or any text, into token shards: sources -> articles -> tokens -> shards.

    python prepare_data.py                                  the whole English Wikipedia, from the Hugging Face hub
    python prepare_data.py --preset demo                    the embedded sample
    python prepare_data.py --source my_texts/ --data-dir data/mine

The parent reads source files one after the other and cuts them into chunks of articles; worker processes turn chunks
into tokens; the parent appends those to the shards in the order of the source, whoever was first, so the result is the
same with any number of workers. About once a second it makes sure that what it wrote is on the disk and notes in
`progress.json` how far it came. A run that was stopped, however, goes on from that note.
"""

import codecs
import contextlib
import dataclasses
import glob
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from tqdm import tqdm

from config import PrepareConfig, UserError, parse, run
from data import END_OF_TEXT, META_FORMAT, ShardWriter, load_tokenizer, read_meta, sha256, write_json

SAMPLE = Path(__file__).resolve().parent / "sample" / "articles.jsonl"
FILE_TYPES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")

CHUNK_BYTES = 1 << 20  # text that a worker gets at once: large against the cost of sending it, small against memory
CHUNK_ROWS = 256
PIECE = 1 << 16  # characters that the tokenizer gets at once: far below the runs of one letter that make it fail
COMMIT_SECONDS = 1.0  # between notes of progress: the most work that a kill costs
LOCK_SECONDS = 10.0  # a killed run's folder is free at once; its workers may take a moment to end

# ----------------------------------------------------------------------------------------------------------------------
# Source files -> chunks of articles


@dataclass(frozen=True)
class Chunk:
    """Neighbouring articles of a source file, as cheap to cut out and to send as possible: the worker parses them.

    kind     parquet: `data` is an Arrow stream of the columns. jsonl: whole lines. txt: a piece of the one document.
    first    row, line or piece that it begins with, counted from 1
    position bytes of the file that are read when this chunk is done
    key      txt: what decides the document's split; ends: its last piece
    """

    kind: str
    name: str
    first: int
    data: bytes | str
    position: int
    key: bytes = b""
    ends: bool = True


def read_chunks(path: Path, name: str, text_column: str) -> Iterator[Chunk]:
    """The file's chunks: always the same ones, so that (file, number of chunks) is an exact place to go on from.

    Raises:
        UserError: the file is damaged, cannot be read, or lacks the column.
    """
    reader = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}[file_type(name)]
    try:
        yield from reader(path, name, text_column)
    except OSError as error:  # Arrow's errors about damaged files are OSErrors without a number
        raise UserError(f"{name}: cannot be read ({error}); is it whole?") from error
    except pa.ArrowException as error:
        raise UserError(f"{name}: is damaged ({error})") from error


def file_type(name: str) -> str:
    """.parquet, .jsonl or .txt, also behind a compression's suffix; empty where it is none of them."""
    ending = next((ending for ending in FILE_TYPES if name.lower().endswith(ending)), "")
    return ending.removesuffix(".gz").removesuffix(".zst")


def read_parquet(path: Path, name: str, text_column: str) -> Iterator[Chunk]:
    with pq.ParquetFile(path) as file:
        have = file.schema_arrow.names
        if text_column not in have:
            raise UserError(f"{name}: has no column {text_column!r}; give --text-column one of: {', '.join(have)}")
        columns = [name for name in ("id", "title", text_column) if name in have]
        size, rows, done = os.path.getsize(path), max(1, file.metadata.num_rows), 0
        for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=columns, use_threads=False):
            for part in split_batch(batch):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, part.schema) as writer:
                    writer.write_batch(part)
                first, done = done + 1, done + part.num_rows
                yield Chunk("parquet", name, first, sink.getvalue().to_pybytes(), size * done // rows)


def split_batch(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    if batch.nbytes <= 4 * CHUNK_BYTES or batch.num_rows == 1:
        yield batch
    else:
        half = batch.num_rows // 2
        yield from split_batch(batch.slice(0, half))
        yield from split_batch(batch.slice(half))


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """(the file, decompressed where its name says so; the file as it is, whose place tells how much is read)."""
    with pa.OSFile(str(path)) as raw:
        codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
        if codec is None:
            yield raw, raw
        else:
            with pa.CompressedInputStream(raw, codec) as stream:
                yield stream, raw


def read_jsonl(path: Path, name: str, text_column: str) -> Iterator[Chunk]:
    with open_stream(path) as (stream, raw):
        parts, line = [], 1
        while block := stream.read(CHUNK_BYTES):
            head, newline, rest = block.rpartition(b"\n")
            if not newline:  # a line longer than the block
                parts.append(block)
                continue
            data = b"".join([*parts, head, newline])
            yield Chunk("jsonl", name, line, data, raw.tell())
            parts, line = [rest], line + data.count(b"\n")
        if data := b"".join(parts):
            yield Chunk("jsonl", name, line, data, raw.tell())


def read_txt(path: Path, name: str, text_column: str) -> Iterator[Chunk]:
    digest = hashlib.sha256()  # the split is decided by all of the text, so it is read twice
    with open_stream(path) as (stream, _):
        while block := stream.read(CHUNK_BYTES):
            digest.update(block)
    with open_stream(path) as (stream, raw):
        # Bytes that are no UTF-8 become lone surrogates here, and the worker treats all of those alike.
        text, piece, decoder = "", 1, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        while block := stream.read(CHUNK_BYTES):
            text += decoder.decode(block)
            if len(text) > PIECE:
                cut = last_cut(text)
                yield Chunk("txt", name, piece, text[:cut], raw.tell(), digest.digest(), ends=False)
                text, piece = text[cut:], piece + 1
        yield Chunk("txt", name, piece, text + decoder.decode(b"", final=True), raw.tell(), digest.digest())


# ----------------------------------------------------------------------------------------------------------------------
# Chunks -> tokens, in the worker processes


@dataclass(frozen=True)
class Job:
    """What a worker has to know of the command."""

    tokenizer: str
    text_column: str
    held_out: float | None  # None: the source is a single document, split where it ends


@dataclass(frozen=True)
class Tokens:
    """A chunk's tokens: (N,) uint16 as bytes, and for each article how many of them, its UTF-8 bytes, and its split."""

    tokens: bytes
    lengths: np.ndarray  # (articles,) int64
    sizes: np.ndarray  # (articles,) int64
    val: np.ndarray  # (articles,) bool
    ends: bool  # False: the one article goes on in the next chunk
    skipped: int  # articles without text
    repaired: int  # articles in which something was no valid Unicode

    def until(self, articles: int) -> "Tokens":
        """The first so many articles."""
        tokens = self.tokens[: 2 * int(self.lengths[:articles].sum())]
        lengths, sizes, val = self.lengths[:articles], self.sizes[:articles], self.val[:articles]
        return dataclasses.replace(self, tokens=tokens, lengths=lengths, sizes=sizes, val=val)


def start_worker() -> None:
    """Ctrl-C is the parent's to handle, and when the parent ends, however it does, so does the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def tokenize(chunk: Chunk, job: Job) -> Tokens:
    """Raises UserError where the chunk is no such data as it should be, with the file and line."""
    encoding = load_tokenizer(job.tokenizer)
    end_of_text = [np.array([encoding.encode_single_token(END_OF_TEXT)], dtype=np.uint16)]
    parts, lengths, sizes, val, skipped, repaired = [], [], [], [], 0, 0
    for key, title, text in PARSERS[chunk.kind](chunk, job.text_column):
        if not text.strip() and (chunk.kind != "txt" or (chunk.first == 1 and chunk.ends)):
            skipped += 1
            continue
        article = f"{title}\n\n{text}" if title else text
        try:
            data = article.encode()
        except UnicodeEncodeError:  # a lone surrogate, which is no character
            article, repaired = re.sub("[\ud800-\udfff]", "\ufffd", article), repaired + 1
            data = article.encode()
        new = [encode(encoding, piece) for piece in pieces(article)] + (end_of_text if chunk.ends else [])
        parts += new
        lengths.append(sum(map(len, new)))
        sizes.append(len(data))
        val.append(job.held_out is not None and share_of(key if key is not None else data) < job.held_out)
    tokens = np.concatenate(parts).tobytes() if parts else b""
    return Tokens(
        tokens,
        np.array(lengths, np.int64),
        np.array(sizes, np.int64),
        np.array(val, bool),
        chunk.ends,
        skipped,
        repaired,
    )


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """(N,) uint16. What looks like a special token is text."""
    return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)


def pieces(text: str) -> Iterator[str]:
    while len(text) > PIECE:
        cut = last_cut(text[:PIECE])
        yield text[:cut]
        text = text[cut:]
    yield text


def last_cut(text: str) -> int:
    """Where to cut a long text: before the last single blank between two words if there is one near the end.

    GPT-2's pattern never looks across such a place, so the tokens stay those of the whole text. Elsewhere (a million
    times one letter) they may not, but they always decode to it.
    """
    cut = len(text)
    for match in re.finditer(r"(?<=\S)[ \n](?=\S)", text[-4096:]):
        cut = len(text) - min(len(text), 4096) + match.start()
    return cut


def share_of(key: bytes) -> float:
    """A number from 0 to 1 that depends on the key alone: below `val_fraction`, the article is held out."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64


Article = tuple[bytes | None, str | None, str]  # (id, if there is one; title, if there is one; text)


def parse_parquet(chunk: Chunk, text_column: str) -> Iterator[Article]:
    batch = pa.ipc.open_stream(chunk.data).read_all()

    def column(name: str, is_text: bool) -> list[Any]:
        if name not in batch.column_names:
            return [None] * batch.num_rows
        values = batch.column(name)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            # Text that is no UTF-8 becomes lone surrogates, as everywhere here.
            data = values.cast(pa.large_binary()).to_pylist()
            return [value and value.decode("utf-8", "surrogateescape") for value in data]
        if is_text:
            raise UserError(f"{chunk.name}: column {name!r} holds {values.type}, not text; give another --text-column")
        return values.to_pylist()

    for key, title, text in zip(column("id", False), column("title", False), column(text_column, True), strict=True):
        yield article(key, title, text or "")


def parse_jsonl(chunk: Chunk, text_column: str) -> Iterator[Article]:
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{chunk.name}, line {number}: is no JSON ({error}); mend or remove the line") from error
        if not isinstance(row, dict) or text_column not in row:
            have = f"; it has: {', '.join(row)}" if isinstance(row, dict) else ""
            raise UserError(f"{chunk.name}, line {number}: has no {text_column!r} (see --text-column){have}")
        text = row[text_column]
        if not isinstance(text, str | None):
            raise UserError(f"{chunk.name}, line {number}: {text_column!r} is no text")
        yield article(row.get("id"), row.get("title"), text or "")


def parse_txt(chunk: Chunk, text_column: str) -> Iterator[Article]:
    yield chunk.key, None, chunk.data


def article(key: Any, title: Any, text: str) -> Article:
    key = None if key is None or key == "" else str(key).encode("utf-8", "surrogateescape")
    return key, title if isinstance(title, str) else None, text


PARSERS = {"parquet": parse_parquet, "jsonl": parse_jsonl, "txt": parse_txt}

# ----------------------------------------------------------------------------------------------------------------------
# Where the files come from


@dataclass(frozen=True)
class SourceFile:
    name: str
    bytes: int


class LocalFiles:
    """A file, a folder or a glob; also the embedded sample."""

    def __init__(self, source: str):
        self.root, paths = self._find(source)
        total = sum(path.stat().st_size for path in paths)
        self.files, digest = [], hashlib.sha256()
        with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None, leave=False) as bar:
            for path in paths:
                size = path.stat().st_size
                self.files.append(SourceFile(path.relative_to(self.root).as_posix(), size))
                digest.update(f"{self.files[-1].name}\n{size}\n{sha256(path)}\n".encode())
                bar.update(size)
        kind = "sample" if source == "sample" else "files"
        self.identity = {"kind": kind, "files": len(paths), "bytes": total, "sha256": digest.hexdigest()}

    @staticmethod
    def _find(source: str) -> tuple[Path, list[Path]]:
        if source == "sample":
            return SAMPLE.parent, [SAMPLE]
        path = Path(source).expanduser()
        if path.is_dir():
            root, found = path, sorted(p for p in path.rglob("*") if p.is_file())
        elif path.is_file():
            root, found = path.parent, [path]
        else:
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
            root = Path(os.path.commonpath([p.parent for p in found])) if found else path
            if not found:
                raise UserError(
                    f"--source {source}: there is no such file or folder, and no file matches; "
                    "give wikipedia, sample, or a file, folder or glob of .parquet, .jsonl or .txt"
                )
        taken = [p for p in found if file_type(p.name)]
        if not taken:
            raise UserError(f"--source {source}: holds none of {', '.join(FILE_TYPES)}")
        if len(taken) < len(found):
            print(f"{len(found) - len(taken)} files of other types are left out")
        return root, taken

    def path(self, number: int) -> Path:
        return self.root / self.files[number].name

    def release(self, number: int) -> None:
        """The file is no longer needed: nothing to do for one that is the user's."""

    def single(self, text_column: str) -> bool:
        """Whether this is one document, which is split where it ends, and not by documents."""
        if len(self.files) > 1:
            return False
        if file_type(self.files[0].name) == ".txt":
            return True
        chunks = list(islice(read_chunks(self.path(0), self.files[0].name, text_column), 2))
        return len(chunks) == 1 and sum(1 for _ in PARSERS[chunks[0].kind](chunks[0], text_column)) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Tokens -> shards


SPLITS = ("train", "val")


def prepare(config: PrepareConfig) -> None:
    """Write `config.data_dir`, or go on with it, or say that it is finished.

    Raises:
        UserError: something foreseen went wrong. What is done so far is kept, and the same command goes on with it.
    """
    data_dir = Path(config.data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(data_dir / ".lock", timeout=LOCK_SECONDS):
            Preparation(config, data_dir).run()
    except filelock.Timeout as error:
        raise UserError(f"--data-dir {data_dir}: another prepare_data.py is at work in it; wait for it") from error


class Preparation:
    """One run of the command over a data folder, whose lock is held.

    The state is all that is needed to go on: which file of the source, how many chunks of it, and how far each split
    has come. `progress.json` holds it while the folder is not finished; whatever the shards hold beyond is dropped.
    """

    def __init__(self, config: PrepareConfig, data_dir: Path):
        self.config, self.data_dir = config, data_dir
        self.note = data_dir / "progress.json"
        self.source = LocalFiles(config.source)
        self.request = {
            "source": self.source.identity,
            "text_column": config.text_column,
            "tokenizer": config.tokenizer,
            "val_fraction": config.held_out,
            "shard_tokens": config.shard_tokens,
            "max_tokens": config.max_tokens,
        }
        self.state: dict[str, Any] = {
            "format": META_FORMAT,
            **self.request,
            "file": 0,
            "chunk": 0,
            "splits": {split: {"tokens": 0, "bytes": 0, "articles": 0} for split in SPLITS},
            "skipped": 0,
            "repaired": 0,
            "ended": "",
        }

    def run(self) -> None:
        if self.config.overwrite:
            self.clear()
        meta = self.data_dir / "meta.json"
        if meta.exists():
            self.compare(read_meta(self.data_dir), "is finished")
            print(f"{self.data_dir} is finished already (--overwrite starts again)")
            return
        if self.note.exists():
            try:
                state = json.loads(self.note.read_text(encoding="utf-8"))
                self.compare(state, "is begun")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.note}: is damaged ({error}); start again with --overwrite") from error
            self.state = state
            print(f"going on with {self.data_dir}, {self.tokens:,} tokens are there")
        load_tokenizer(self.config.tokenizer)  # a vocabulary that has to be fetched is fetched once
        self.single = self.source.single(self.config.text_column)
        self.open_shards()
        if not self.state["ended"]:
            self.write_shards()
        self.finish()

    def clear(self) -> None:
        for pattern in (
            "meta.json",
            "progress.json",
            *(f"{split}_*.bin{end}" for split in SPLITS for end in ("", ".partial")),
        ):
            for path in self.data_dir.glob(pattern):
                path.unlink()

    def compare(self, request: dict[str, Any], state: str) -> None:
        for key, value in self.request.items():
            if request.get(key) != value:
                flag = "--" + key.replace("_", "-")
                raise UserError(
                    f"--data-dir {self.data_dir}: {state} with {flag} {request.get(key)}, not {value}; "
                    "give the same command, another --data-dir, or --overwrite to start again"
                )

    @property
    def tokens(self) -> int:
        return sum(split["tokens"] for split in self.state["splits"].values())

    def open_shards(self) -> None:
        splits = self.state["splits"]
        self.shards = {
            split: ShardWriter(self.data_dir, split, self.config.shard_tokens, splits[split]["tokens"])
            for split in SPLITS
        }

    def commit(self) -> None:
        for writer in self.shards.values():
            writer.sync()
        write_json(self.note, self.state)

    def write_shards(self) -> None:
        job = Job(self.config.tokenizer, self.config.text_column, None if self.single else self.config.held_out)
        workers = count_workers(self.config)
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
        total = sum(file.bytes for file in self.source.files)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None)
        committed = time.monotonic()
        try:
            for chunk, number, index, tokens in in_order(pool, job, self.source, self.state, in_flight=3 * workers):
                done = self.append(tokens)
                self.state.update(file=number, chunk=index + 1)
                bar.update(sum(file.bytes for file in self.source.files[:number]) + chunk.position - bar.n)
                if done:
                    break
                if time.monotonic() - committed > COMMIT_SECONDS:
                    self.commit()
                    committed = time.monotonic()
            self.state["ended"] = "max_tokens" if done else "source"
            self.commit()
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed (out of memory?); the same command goes on") from error
        finally:
            bar.close()
            pool.shutdown(cancel_futures=True)

    def append(self, new: Tokens) -> bool:
        """Write a chunk's tokens. Returns whether --max-tokens is reached."""
        limit, done = self.config.max_tokens, False
        if limit is not None and new.ends and self.tokens + new.lengths.sum() >= limit:
            new = new.until(1 + int(np.searchsorted(np.cumsum(new.lengths), limit - self.tokens)))
            done = True
        tokens, val = np.frombuffer(new.tokens, np.uint16), np.repeat(new.val, new.lengths)
        for split, mine, articles in (("train", ~val, ~new.val), ("val", val, new.val)):
            self.shards[split].write(tokens[mine])
            state = self.state["splits"][split]
            state["tokens"] += int(mine.sum())
            state["bytes"] += int(new.sizes[articles].sum())
            state["articles"] += int(articles.sum()) if new.ends else 0
        self.state["skipped"] += new.skipped
        self.state["repaired"] += new.repaired
        return done

    def finish(self) -> None:
        splits = self.state["splits"]
        if (
            self.single
            and splits["val"]["tokens"] == 0
            and (count := int(splits["train"]["tokens"] * self.config.held_out))
        ):
            # The split of a single document: its last tokens move to validation.
            tail = self.shards["train"].tail(count)
            self.shards["val"].write(tail)
            size = len(load_tokenizer(self.config.tokenizer).decode_bytes(tail[:-1].tolist()))
            splits["train"].update(tokens=splits["train"]["tokens"] - count, bytes=splits["train"]["bytes"] - size)
            splits["val"].update(tokens=count, bytes=size)
            self.commit()
            self.open_shards()
        for split, name in (("train", "training"), ("val", "validation")):
            if splits[split]["tokens"] == 0:
                raise UserError(
                    f"--val-fraction {self.config.held_out}: leaves no text for {name}; "
                    f"give a {'larger' if split == 'val' else 'smaller'} one, with --overwrite"
                )
        meta = {
            "format": META_FORMAT,
            **self.request,
            "vocab_size": load_tokenizer(self.config.tokenizer).n_vocab,
            "ended": self.state["ended"],
            "skipped": self.state["skipped"],
            "repaired": self.state["repaired"],
            "splits": {split: {**splits[split], "shards": self.shards[split].finish()} for split in SPLITS},
        }
        write_json(self.data_dir / "meta.json", meta)
        self.note.unlink(missing_ok=True)
        for split in SPLITS:
            state = splits[split]
            print(
                f"{split}: {state['tokens']:,} tokens, {state['articles']:,} articles, {state['bytes']:,} bytes of text"
            )


def in_order(
    pool: ProcessPoolExecutor, job: Job, source: LocalFiles, state: dict[str, Any], in_flight: int
) -> Iterator[tuple[Chunk, int, int, Tokens]]:
    """(chunk, number of its file, number in its file, its tokens), in the order of the source, from `state` on."""
    waiting: deque = deque()
    for number in range(state["file"], len(source.files)):
        skip = state["chunk"] if number == state["file"] else 0
        chunks = read_chunks(source.path(number), source.files[number].name, job.text_column)
        for index, chunk in islice(enumerate(chunks), skip, None):
            waiting.append((dataclasses.replace(chunk, data=b""), number, index, pool.submit(tokenize, chunk, job)))
            if len(waiting) >= in_flight:
                *place, future = waiting.popleft()
                yield *place, future.result()
    while waiting:
        *place, future = waiting.popleft()
        yield *place, future.result()


def count_workers(config: PrepareConfig) -> int:
    if config.workers is not None:
        return config.workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    prepare(parse(PrepareConfig, __doc__))


if __name__ == "__main__":
    run(main)
