"""Turn Wikipedia, or any text, into token shards: sources -> articles -> tokens -> shards.

    python prepare_data.py                                  all of English Wikipedia, from the Hugging Face hub
    python prepare_data.py --max-tokens 1_100_000_000       a fair quarter of it, enough for the default training run
    python prepare_data.py --preset demo                    the embedded sample
    python prepare_data.py --source my_texts --data-dir data/my_texts

Stop it when you like, however you like: the same command goes on where it stood.
"""

from internals import start

if __name__ == "__main__":
    start.begin()  # mistakes and --help are answered at once

    from config import PrepareConfig
    from internals.cli import parse

    CFG = parse(PrepareConfig, __doc__)

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from tqdm import tqdm

from config import PrepareConfig
from internals.files import DISK_FULL, write_json
from internals.shards import META_FORMAT, ShardWriter, read_meta
from internals.start import UserError
from internals.text_files import Chunk, LocalFiles, articles, read_chunks
from internals.tokenizer import encode, load_tokenizer, own_tokenizer
from internals.wikipedia import HubWikipedia
from internals.windows import TokenStream

SPLITS = ("train", "val")
COMMIT_SECONDS = 1.0  # between notes of progress: the most work that a kill costs
MEASURE_SECONDS = 3.0  # of tokenizing, before saying what the whole of it will need
LOCK_SECONDS = 10.0  # to wait for a run that is just ending

# ----------------------------------------------------------------------------------------------------------------------
# Chunks of articles -> tokens, in the worker threads


@dataclass(frozen=True)
class Job:
    """What a worker has to know of the command."""

    tokenizer: str
    text_column: str
    val_fraction: float  # 0: all for training


@dataclass(frozen=True)
class Tokens:
    """What a worker makes of a chunk. The tokens of all articles in their order; for each article the number of them,
    the bytes of its text in UTF-8, and whether it is held out.
    """

    tokens: np.ndarray  # (N,) uint16
    lengths: np.ndarray  # (articles,) int64
    text_bytes: np.ndarray  # (articles,) int64
    val: np.ndarray  # (articles,) bool
    ends: bool = True  # False: the one article goes on in the next chunk
    empty: int = 0  # articles without text, left out
    repaired: int = 0  # articles in which something is no valid Unicode

    def first(self, count: int) -> "Tokens":
        """The first so many articles."""
        return dataclasses.replace(
            self,
            tokens=self.tokens[: self.lengths[:count].sum()],
            lengths=self.lengths[:count],
            text_bytes=self.text_bytes[:count],
            val=self.val[:count],
        )


def tokenize(chunk: Chunk, job: Job) -> Tokens:
    """An article is its title, a blank line, its text (the text alone where there is no title), and end-of-text.

    Raises:
        UserError: a row of the chunk is not what it should be.
    """
    texts, text_bytes, val, empty, repaired = [], [], [], 0, 0
    for key, title, text in articles(chunk, job.text_column):
        is_whole = chunk.kind != "txt" or (chunk.first == 0 and chunk.ends)
        if is_whole and not text.strip():
            empty += 1
            continue
        text = f"{title}\n\n{text}" if title else text
        try:
            data = text.encode()
        except UnicodeEncodeError:  # lone surrogates, which are no characters
            text, repaired = re.sub("[\ud800-\udfff]", "\ufffd", text), repaired + 1
            data = text.encode()
        texts.append(text)
        text_bytes.append(len(data))
        val.append(is_held_out(data if key is None else key, job.val_fraction))
    tokens, lengths = encode(own_tokenizer(job.tokenizer), texts)
    if not chunk.ends:  # the document goes on: no end-of-text yet
        tokens, lengths = tokens[:-1], lengths - 1
    return Tokens(tokens, lengths, np.array(text_bytes, np.int64), np.array(val, bool), chunk.ends, empty, repaired)


def is_held_out(key: bytes, val_fraction: float) -> bool:
    """A pure function of the article's id, or of its text: another run, or another machine, splits alike."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < val_fraction * 2**64


# ----------------------------------------------------------------------------------------------------------------------
# Tokens -> shards, in the main thread


class Preparation:
    """The command at work in a folder whose lock it holds.

    The main thread reads the source files one after the other and gives chunks of them to the workers; what they make
    of them it appends to the shards in the order of the source, whoever was first: so the shards are the same with any
    number of workers. Every second it sees to it that what it wrote is on the disk, and then notes in `progress.json`
    how far it is: the source files done, the rows done of the next one, and the length of each split. To go on from
    there is to drop what the shards hold beyond.
    """

    def __init__(self, config: PrepareConfig, data_dir: Path):
        self.config, self.data_dir = config, data_dir
        self.meta, self.note, downloads = data_dir / "meta.json", data_dir / "progress.json", data_dir / "downloads"
        if config.source == "wikipedia":
            self.source = HubWikipedia(config.language, config.dump, config.revision, downloads)
        else:
            self.source = LocalFiles(config.source)
        # What decides the shards, beside the source: all of it must be the same to go on.
        self.settings = {
            "tokenizer": config.tokenizer,
            "text_column": config.text_column,
            "val_fraction": config.held_out,
            "shard_tokens": config.shard_tokens,
            "max_tokens": config.max_tokens,
        }
        self.state: dict[str, Any] = {}

    def run(self) -> None:
        if self.config.overwrite:
            shutil.rmtree(self.data_dir / "downloads", ignore_errors=True)
            self.remove(self.meta, self.note, *(p for split in SPLITS for p in self.data_dir.glob(f"{split}_*.bin*")))
        if self.meta.exists():
            self.check_same(read_meta(self.data_dir), "is finished, and was prepared")
            for split in SPLITS:
                TokenStream.open(self.data_dir, split)  # raises where a shard is no longer what it was
            self.clean_up()
            print(f"{self.data_dir} is finished: nothing to do (--overwrite starts again)")
            return
        load_tokenizer(self.config.tokenizer)  # now: nothing is begun without it
        self.begin_or_go_on()
        if not self.state["end"]:
            self.tokenize_source()
        self.finish()

    # Beginning

    def begin_or_go_on(self) -> None:
        if self.note.exists():
            try:
                self.state = json.loads(self.note.read_text(encoding="utf-8"))
                self.check_same(self.state, "is half done,")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.note}: is damaged ({error}); --overwrite starts again") from error
            if "resolved" in self.state:
                self.source.restore(self.state["resolved"])
            print(f"going on with {self.data_dir}: {self.tokens:,} tokens are done")
        else:
            self.state = {
                "format": META_FORMAT,
                "source": self.source.identity,
                **self.settings,
                "file": 0,  # source files done
                "row": 0,  # and of the next one, rows
                "end": "",  # why there is no more: "source" (that was all of it) or "max_tokens"
                "splits": {split: {"tokens": 0, "bytes": 0, "articles": 0} for split in SPLITS},
                "empty": 0,
                "repaired": 0,
            }
            if isinstance(self.source, HubWikipedia):
                self.state["resolved"] = self.source.resolve()
        self.is_one_document = self.source.is_one_document(self.config.text_column)
        self.open_shards()
        self.commit()
        self.source_bytes = [file.bytes for file in self.source.files]
        print(self.source.summary())

    def check_same(self, there: dict[str, Any], state: str) -> None:
        """Raise UserError where the folder was begun by a command that makes other shards."""
        differs = [
            f"with --{name.replace('_', '-')} {there.get(name)}, not {value}"
            for name, value in self.settings.items()
            if there.get(name) != value
        ]
        if any(there["source"].get(name) != value for name, value in self.source.identity.items()):
            differs.insert(
                0, f"from another source ({describe(there['source'])}, not {describe(self.source.identity)})"
            )
        if differs:
            raise UserError(
                f"--data-dir {self.data_dir}: {state} {' and '.join(differs)}; give the command as it was, "
                "or another --data-dir, or --overwrite to start again"
            )

    def open_shards(self) -> None:
        """Open the splits as long as the state says, whatever the files hold."""
        self.shards = {
            split: ShardWriter(self.data_dir, split, self.config.shard_tokens, self.state["splits"][split]["tokens"])
            for split in SPLITS
        }

    @property
    def tokens(self) -> int:
        return sum(split["tokens"] for split in self.state["splits"].values())

    # The work itself

    def tokenize_source(self) -> None:
        job = Job(self.config.tokenizer, self.config.text_column, 0.0 if self.is_one_document else self.config.held_out)
        workers = self.config.workers or count_cores()
        pool = ThreadPoolExecutor(workers)
        bar = tqdm(initial=self.tokens, unit=" tokens", unit_scale=True, desc="tokenizing", disable=None)
        measuring_since, said = None, False
        committed = time.monotonic()
        try:
            for place, position, future in self.in_order(pool, job, in_flight=3 * workers):
                full = self.append(future.result())
                self.state.update(place)
                if full:
                    break
                if measuring_since is None:  # when the workers are under way
                    measuring_since, tokens_then = time.monotonic(), self.tokens
                elif not said and (seconds := time.monotonic() - measuring_since) > MEASURE_SECONDS:
                    self.say_needs((self.tokens - tokens_then) / seconds, position)
                    said = True
                if time.monotonic() - committed > COMMIT_SECONDS:
                    self.commit()
                    committed = time.monotonic()
                bar.total = self.estimate(position)
                bar.update(self.tokens - bar.n)
            self.state["end"] = "max_tokens" if full else "source"
            self.commit()
        except UserError:
            self.commit()
            raise
        finally:
            bar.close()
            pool.shutdown(cancel_futures=True)

    def in_order(self, pool: Executor, job: Job, in_flight: int) -> Iterator[tuple[dict[str, int], int, Future]]:
        """Chunks at work, in the order of the source: (the state behind it, bytes of the source behind it, Tokens)."""
        waiting: deque = deque()
        try:
            for number in range(self.state["file"], len(self.source.files)):
                before = sum(self.source_bytes[:number])
                for chunk, is_last in with_last(self.chunks(number)):
                    file, row = (number + 1, 0) if is_last else (number, chunk.first + chunk.count)
                    future = pool.submit(tokenize, chunk, job)
                    waiting.append(({"file": file, "row": row}, before + chunk.position, future))
                    if len(waiting) == in_flight:
                        yield waiting.popleft()
        except UserError:  # that a file cannot be had or read does not undo what is at work
            yield from waiting
            raise
        yield from waiting

    def chunks(self, number: int) -> Iterator[Chunk]:
        """Those of a source file that are still to do."""
        done = self.state["row"] if number == self.state["file"] else 0
        name = self.source.files[number].name
        for chunk in read_chunks(self.source.fetch(number), name, self.config.text_column):
            if chunk.first < done < chunk.first + chunk.count:
                raise UserError(f"{self.note}: was written by another version; start again with --overwrite")
            if chunk.first >= done:
                yield chunk

    def append(self, new: Tokens) -> bool:
        """Write what came of a chunk. Returns True where that makes --max-tokens full."""
        room = (self.config.max_tokens or np.inf) - self.tokens
        full = new.ends and new.lengths.sum() >= room
        if full:
            new = new.first(1 + int(np.searchsorted(np.cumsum(new.lengths), room)))
        for split, articles_in in (("train", ~new.val), ("val", new.val)):
            self.shards[split].write(new.tokens[np.repeat(articles_in, new.lengths)])
            counts = self.state["splits"][split]
            counts["tokens"] = self.shards[split].tokens
            counts["bytes"] += int(new.text_bytes[articles_in].sum())
            counts["articles"] += int(articles_in.sum()) * new.ends
        self.state["empty"] += new.empty
        self.state["repaired"] += new.repaired
        return bool(full)

    def commit(self) -> None:
        """Make what is done so far last: from here a later run goes on."""
        for shards in self.shards.values():
            shards.sync()
        write_json(self.note, self.state)
        self.source.release(before=self.state["file"])

    def estimate(self, position: int) -> int:
        """Tokens in all, judged by those in the first `position` bytes of the source."""
        tokens = self.tokens * sum(self.source_bytes) // max(1, position)
        return min(tokens, self.config.max_tokens or tokens)

    def say_needs(self, tokens_per_second: float, position: int) -> None:
        """Say what the run will need, by what the first seconds showed. Raises UserError where the disk is too small."""
        total = self.estimate(position)
        left = total - self.tokens
        seconds, disk = left / max(1.0, tokens_per_second), 2 * left
        text = f"needs about {2 * total / 1e9:,.2f} GB on disk for {total / 1e6:,.0f} million tokens"
        if isinstance(self.source, HubWikipedia):
            download = left * position // max(1, self.tokens)
            seconds = max(seconds, download * self.source.seconds_per_byte)
            passing = self.source.most_bytes_at_once()
            disk += passing - self.source.bytes_on_disk()
            text += f", {passing / 1e9:,.2f} GB more in passing, {download / 1e9:,.2f} GB of download from here"
        free = shutil.disk_usage(self.data_dir).free
        tqdm.write(f"{text}, and about {duration(seconds)}; {free / 1e9:,.2f} GB of disk are free")
        if disk > free:
            fits = int(self.tokens + 0.8 * free / 2)
            raise UserError(
                f"--data-dir {self.data_dir}: {disk / 1e9:,.2f} GB more are needed there, and {free / 1e9:,.2f} GB are "
                f"free; make space and give the same command, or start again with --overwrite --max-tokens {fits}"
            )

    # The end

    def finish(self) -> None:
        splits = self.state["splits"]
        if self.tokens == 0:
            raise UserError(f"--source {self.config.source}: holds no text ({self.state['empty']} empty articles)")
        if self.is_one_document and splits["val"]["tokens"] == 0:
            self.split_document()
        for split, name, hint in (("train", "training", "smaller"), ("val", "validation", "larger")):
            if splits[split]["tokens"] == 0:
                raise UserError(
                    f"--val-fraction {self.config.held_out}: leaves nothing for {name} of "
                    f"{splits['train']['articles'] + splits['val']['articles']:,} articles; give a {hint} one, and "
                    "--overwrite"
                )
        meta = {
            "format": META_FORMAT,
            "source": self.source.provenance(),
            **self.settings,
            "vocab_size": load_tokenizer(self.config.tokenizer).n_vocab,
            "end": self.state["end"],
            "empty": self.state["empty"],
            "repaired": self.state["repaired"],
            "splits": {split: {**splits[split], "shards": self.shards[split].finish()} for split in SPLITS},
        }
        write_json(self.meta, meta)
        self.clean_up()
        if meta["end"] == "max_tokens":
            print(f"stopped at --max-tokens {self.config.max_tokens:,}: not all of the source is in")
        if meta["empty"]:
            print(f"left out {meta['empty']:,} articles without text")
        if meta["repaired"]:
            print(f"in {meta['repaired']:,} articles put U+FFFD in place of what is no valid Unicode")
        for split in SPLITS:
            print(
                "{}: {tokens:,} tokens, {articles:,} articles, {bytes:,} bytes of text".format(split, **splits[split])
            )

    def split_document(self) -> None:
        """A source of one document gives its last tokens to validation."""
        train, val = self.state["splits"]["train"], self.state["splits"]["val"]
        if held_out := int(train["tokens"] * self.config.held_out):
            tail = self.shards["train"].tail(held_out)
            self.shards["val"].write(tail)
            text_bytes = len(load_tokenizer(self.config.tokenizer).decode_bytes(tail[:-1].tolist()))  # less end-of-text
            train.update(tokens=train["tokens"] - held_out, bytes=train["bytes"] - text_bytes)
            val.update(tokens=held_out, bytes=text_bytes)
            self.commit()
            self.open_shards()  # which cuts the training split to its new length

    def clean_up(self) -> None:
        """What a finished folder has no use for."""
        self.remove(self.note, *self.data_dir.glob("*.json.partial"))
        self.source.release(before=len(self.source.files))

    @staticmethod
    def remove(*paths: Path) -> None:
        for path in paths:
            path.unlink(missing_ok=True)


def with_last(chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, bool]]:
    """Each chunk, and whether it is the last."""
    chunk = next(chunks, None)
    while chunk is not None:
        following = next(chunks, None)
        yield chunk, following is None
        chunk = following


def describe(source: dict[str, Any]) -> str:
    if source["kind"] == "hub":
        return f"{source['repository']} {source['config']}, revision {source['revision']}"
    if source["kind"] == "sample":
        return f"the sample, SHA-256 {source['sha256'][:8]}"
    return f"{source['files']} files of {source['bytes']:,} bytes, SHA-256 {source['sha256'][:8]}"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "a minute"


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(config: PrepareConfig) -> None:
    """Write `config.data_dir`, or go on with it, or say that it is finished.

    Raises:
        UserError: anything foreseen went wrong. What is done so far is kept, and the same command goes on with it.
    """
    data_dir = Path(config.data_dir)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(data_dir / ".lock", timeout=LOCK_SECONDS):
            Preparation(config, data_dir).run()
    except filelock.Timeout as error:
        raise UserError(
            f"--data-dir {data_dir}: another prepare_data.py is at work there; wait until it ends"
        ) from error
    except KeyboardInterrupt as error:
        raise UserError(
            "stopped; the same command goes on where it stood (with --overwrite, from the start)"
        ) from error
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(
                f"--data-dir {data_dir}: the disk is full ({error.strerror}); make space and give the same command: it "
                "goes on where it stood"
            ) from error
        raise UserError(f"{error.filename or data_dir}: {error.strerror or error}") from error


if __name__ == "__main__":
    start.run(lambda: prepare(CFG))
