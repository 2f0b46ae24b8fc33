"""Turn Wikipedia, or any text, into token shards: source -> articles -> tokens -> shards.

    python prepare_data.py                                  all of English Wikipedia, from the Hugging Face hub
    python prepare_data.py --max-tokens 1_100_000_000       a fair quarter of it, enough for the default training run
    python prepare_data.py --preset demo                    the embedded sample
    python prepare_data.py --source my_texts --data-dir data/my_texts

Stop it whenever you like: the same command resumes where it stopped.
"""

from internals import start

if __name__ == "__main__":
    start.begin()  # mistakes and --help are answered before the slow imports

    from config import PrepareConfig
    from internals.cli import parse

    CFG = parse(PrepareConfig, __doc__)

import dataclasses
import hashlib
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np

from config import PrepareConfig
from internals.files import write_json, writing
from internals.progress import SPLITS, Display, Progress, Split, check_same, shard_settings
from internals.shards import META_FORMAT, ShardWriter, read_meta
from internals.start import UserError
from internals.text_files import Chunk, LocalFiles, Source, read_chunks
from internals.tokenizer import encode, load_tokenizer, thread_tokenizer
from internals.wikipedia import HubWikipedia
from internals.windows import TokenStream

COMMIT_SECONDS = 1.0  # between notes of the progress: a kill costs that much work
LOCK_SECONDS = 10.0  # to wait for a run that is just ending


def prepare(cfg: PrepareConfig) -> None:
    """Write the folder `cfg.data_dir`, resume it, or say that it is finished. A failure loses nothing that is done."""
    data_dir = Path(cfg.data_dir)
    with writing(f"--data-dir {data_dir}", "the same command resumes where it stopped"):
        data_dir.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(data_dir / ".lock", timeout=LOCK_SECONDS):
                prepare_locked(cfg, data_dir)
        except filelock.Timeout as error:
            raise UserError(
                f"--data-dir {data_dir}: another prepare_data.py is at work there; wait until it ends"
            ) from error
        except KeyboardInterrupt as error:
            raise UserError("stopped; the same command resumes here (with --overwrite, it starts again)") from error


def prepare_locked(cfg: PrepareConfig, data_dir: Path) -> None:
    """`prepare`, in a folder that no other process prepares."""
    # 1. The source, and what the folder holds already
    if cfg.source == "wikipedia":
        source = HubWikipedia(cfg.language, cfg.dump, cfg.revision, data_dir / "downloads")
    else:
        source = LocalFiles(cfg.source)
    if cfg.overwrite:
        delete_shards(data_dir)
    if (data_dir / "meta.json").exists():
        check_same(cfg, source, read_meta(data_dir), "is finished, and was prepared")
        for split in SPLITS:
            TokenStream.open(data_dir, split)  # raises if a shard has been damaged
        clean_up(data_dir, source)
        print(f"{data_dir} is finished: nothing to do (--overwrite starts again)")
        return
    load_tokenizer(cfg.tokenizer)  # before anything is written

    # 2. Where to begin
    progress = Progress()
    if (data_dir / "progress.json").exists():
        progress = Progress.load(data_dir / "progress.json", cfg, source)
        print(f"resuming {data_dir}: {progress.tokens:,} tokens are done")
    progress.resolved = source.resolve(progress.resolved)
    pipeline = Pipeline(cfg, source, progress)
    print(source.summary())

    # 3. Articles -> tokens -> shards
    if not progress.end:
        pipeline.tokenize_source()
    pipeline.finish()

    # 4. The result
    clean_up(data_dir, source)
    if progress.end == "max_tokens":
        print(f"stopped at --max-tokens {cfg.max_tokens:,}: the rest of the source is left out")
    if progress.empty:
        print(f"left out {progress.empty:,} articles without text")
    if progress.repaired:
        print(f"replaced invalid Unicode with U+FFFD in {progress.repaired:,} articles")
    for name, split in progress.splits.items():
        print(f"{name}: {split.tokens:,} tokens, {split.articles:,} articles, {split.bytes:,} bytes of text")


def delete_shards(data_dir: Path) -> None:
    shutil.rmtree(data_dir / "downloads", ignore_errors=True)
    shards = [path for split in SPLITS for path in data_dir.glob(f"{split}_*.bin*")]
    for path in (data_dir / "meta.json", data_dir / "progress.json", *shards):
        path.unlink(missing_ok=True)


def clean_up(data_dir: Path, source: Source) -> None:
    """Delete what a finished folder does not need."""
    for name in ("progress.json", "progress.json.tmp", "meta.json.tmp"):
        (data_dir / name).unlink(missing_ok=True)
    source.release(before=len(source.files))


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline: source -> chunks -> tokens -> shards


class Work(NamedTuple):
    """A chunk that a worker tokenizes, and how far the source is after it."""

    tokens: Future  # -> Tokens
    file: int  # source files done
    row: int  # rows done of the next file
    position: int  # bytes of the source


class Pipeline:
    """Tokenizes a source into the shards of a folder that this process has locked.

    The main thread reads one source file after another, hands chunks to worker threads, and appends their tokens to the
    shards in the order of the source. So the shards are the same with any number of workers. Every second it syncs the
    shards and then notes the progress. A resumed run drops what the shards hold beyond that note.
    """

    def __init__(self, cfg: PrepareConfig, source: Source, progress: Progress):
        self.cfg, self.source, self.progress, self.data_dir = cfg, source, progress, Path(cfg.data_dir)
        self.is_one_document = source.is_one_document(cfg.text_column)
        self.open_shards()
        self.commit()

    def open_shards(self) -> None:
        """Cut the splits to the lengths that the progress has, and open them."""
        self.shards = {
            name: ShardWriter(self.data_dir, name, self.cfg.shard_tokens, split.tokens)
            for name, split in self.progress.splits.items()
        }

    def commit(self) -> None:
        """Make sure that a later run resumes here."""
        for shards in self.shards.values():
            shards.sync()
        self.progress.save(self.data_dir / "progress.json", self.cfg, self.source)
        self.source.release(before=self.progress.file)

    def tokenize_source(self) -> None:
        workers = self.cfg.workers or count_cores()
        pool, display = ThreadPoolExecutor(workers), Display(self.cfg, self.source, self.progress)
        committed = time.monotonic()
        try:
            for work in self.work_in_order(pool, in_flight=3 * workers):
                self.append(work.tokens.result())
                self.progress.file, self.progress.row = work.file, work.row
                if self.progress.end:
                    break
                if time.monotonic() - committed > COMMIT_SECONDS:
                    self.commit()
                    committed = time.monotonic()
                display.update(work.position)
            self.progress.end = self.progress.end or "source"
            self.commit()
        except UserError:
            self.commit()
            raise
        finally:
            display.bar.close()
            pool.shutdown(cancel_futures=True)

    def work_in_order(self, pool: Executor, in_flight: int) -> Iterator[Work]:
        """Keep the workers busy with `in_flight` chunks. Yields them in the order of the source."""
        val_fraction = 0.0 if self.is_one_document else self.cfg.held_out
        waiting: deque[Work] = deque()
        try:
            for number in range(self.progress.file, len(self.source.files)):
                before = sum(file.bytes for file in self.source.files[:number])
                for chunk, following in pairwise(chain(self.chunks(number), [None])):
                    file, row = (number, chunk.first + chunk.count) if following else (number + 1, 0)
                    tokens = pool.submit(tokenize, chunk, self.cfg.tokenizer, val_fraction)
                    waiting.append(Work(tokens, file, row, before + chunk.position))
                    if len(waiting) == in_flight:
                        yield waiting.popleft()
        except UserError:  # a file is missing or damaged: keep the work on those before it
            yield from waiting
            raise
        yield from waiting

    def chunks(self, number: int) -> Iterator[Chunk]:
        """The chunks of a source file that are still to do."""
        done = self.progress.row if number == self.progress.file else 0
        for chunk in read_chunks(self.source.fetch(number), self.source.files[number].name, self.cfg.text_column):
            if chunk.first < done < chunk.first + chunk.count:
                path = self.data_dir / "progress.json"
                raise UserError(f"{path}: was written by another version; start again with --overwrite")
            if chunk.first >= done:
                yield chunk

    def append(self, new: "Tokens") -> None:
        """Write a chunk's tokens to the shards. At --max-tokens, write the articles that reach it, and end."""
        taken = np.ones(len(new.lengths), bool)
        room = (self.cfg.max_tokens or np.inf) - self.progress.tokens
        if new.ends and new.lengths.sum() >= room:
            taken[1 + np.searchsorted(np.cumsum(new.lengths), room) :] = False
            self.progress.end = "max_tokens"
        for name, chosen in (("train", taken & ~new.val), ("val", taken & new.val)):
            self.shards[name].write(new.tokens[np.repeat(chosen, new.lengths)])
            split = self.progress.splits[name]
            split.tokens = self.shards[name].tokens
            split.bytes += int(new.text_bytes[chosen].sum())
            split.articles += int(chosen.sum()) * new.ends
        self.progress.empty += new.empty
        self.progress.repaired += new.repaired

    def finish(self) -> None:
        """Check that both splits have text, name the shards, and write meta.json."""
        train, val = self.progress.splits["train"], self.progress.splits["val"]
        if self.progress.tokens == 0:
            raise UserError(f"--source {self.cfg.source}: holds no text ({self.progress.empty} empty articles)")
        if self.is_one_document and val.tokens == 0:
            self.split_document(train, val)
        for split, name, hint in ((train, "training", "smaller"), (val, "validation", "larger")):
            if split.tokens == 0:
                raise UserError(
                    f"--val-fraction {self.cfg.held_out}: leaves nothing for {name} of {train.articles + val.articles:,} "
                    f"articles; give a {hint} one, and --overwrite"
                )
        meta = {
            "format": META_FORMAT,
            "source": self.source.provenance(),
            **shard_settings(self.cfg),
            "vocab_size": load_tokenizer(self.cfg.tokenizer).n_vocab,
            "end": self.progress.end,
            "empty": self.progress.empty,
            "repaired": self.progress.repaired,
            "splits": {
                name: {**dataclasses.asdict(split), "shards": self.shards[name].finish()}
                for name, split in self.progress.splits.items()
            },
        }
        write_json(self.data_dir / "meta.json", meta)

    def split_document(self, train: Split, val: Split) -> None:
        """Move the last tokens of a source that is one document to the validation split."""
        if held_out := int(train.tokens * self.cfg.held_out):
            tail = self.shards["train"].tail(held_out)
            self.shards["val"].write(tail)
            text = load_tokenizer(self.cfg.tokenizer).decode_bytes(tail[:-1].tolist())  # without end-of-text
            train.tokens, train.bytes = train.tokens - held_out, train.bytes - len(text)
            val.tokens, val.bytes = held_out, len(text)
            self.commit()
            self.open_shards()  # which cuts the training split


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------------------------
# In the worker threads: articles -> tokens


@dataclass(frozen=True)
class Tokens:
    """A tokenized chunk."""

    tokens: np.ndarray  # (N,) uint16, of all articles in their order
    lengths: np.ndarray  # (articles,) int64, tokens of each
    text_bytes: np.ndarray  # (articles,) int64, of each text in UTF-8
    val: np.ndarray  # (articles,) bool: in the validation split
    ends: bool  # False: the next chunk continues the article
    empty: int  # articles without text, left out
    repaired: int  # articles with invalid Unicode, replaced


def tokenize(chunk: Chunk, tokenizer: str, val_fraction: float) -> Tokens:
    """An article becomes its title, a blank line, its text (without a title: its text), and end-of-text."""
    texts, text_bytes, val, empty, repaired = [], [], [], 0, 0
    for article in chunk.articles():
        if chunk.starts and chunk.ends and not article.text.strip():
            empty += 1
            continue
        text = f"{article.title}\n\n{article.text}" if article.title else article.text
        try:
            data = text.encode()
        except UnicodeEncodeError:  # lone surrogates, which are not characters
            text, repaired = re.sub("[\ud800-\udfff]", "\ufffd", text), repaired + 1
            data = text.encode()
        texts.append(text)
        text_bytes.append(len(data))
        val.append(is_held_out(data if article.id is None else article.id, val_fraction))
    tokens, lengths = encode(thread_tokenizer(tokenizer), texts)
    if not chunk.ends:  # the document continues: no end-of-text yet
        tokens, lengths = tokens[:-1], lengths - 1
    return Tokens(tokens, lengths, np.array(text_bytes, np.int64), np.array(val, bool), chunk.ends, empty, repaired)


def is_held_out(key: bytes, val_fraction: float) -> bool:
    """A pure function of an article's id or text, so that every run on every machine splits alike."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < val_fraction * 2**64


if __name__ == "__main__":
    start.run(lambda: prepare(CFG))
