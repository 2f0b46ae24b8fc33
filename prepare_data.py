"""Turn Wikipedia, or any text, into token shards: source -> articles -> tokens -> shards.

    python prepare_data.py                                  all of English Wikipedia, from the Hugging Face hub
    python prepare_data.py --max-tokens 1.2e9               about a quarter of it, enough for the default training run
    python prepare_data.py --preset laptop                  60 million tokens of it, with their own tokenizer, for two CPU cores
    python prepare_data.py --preset demo                    the embedded sample
    python prepare_data.py --source my_texts --data-dir data/my_texts
    python prepare_data.py --language hi --tokenizer train --data-dir data/hindi    with its own tokenizer

Stop it whenever you like: the same command resumes where it stopped.
"""

from internals import start

if __name__ == "__main__":
    start.begin()  # mistakes and --help are answered before the slow imports

    import sys

    from config import PrepareConfig
    from internals.cli import parse

    start.reconfigure(sys.stdout, errors="backslashreplace")  # file names that the output cannot encode
    CFG = parse(PrepareConfig, __doc__)

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import PrepareConfig, flag_of
from internals.articles import tokenize
from internals.bulk_encoding import bulk_encoder
from internals.cli import with_preset
from internals.cores import count_cores
from internals.data_folder import DataFolder
from internals.encodings import check_encoding
from internals.file_walk import file_type
from internals.files import DISK_FULL, locked, sha256_of, system_error, write_json, writing
from internals.progress import (
    Display,
    Progress,
    as_utf8_name,
    check_same_settings,
    check_same_source,
    print_result,
    shard_settings,
)
from internals.reader import Chunk, ReadOptions
from internals.screen import command_to_train, given_command, listed
from internals.shards import META_FORMAT, SPLITS, TOKENIZER_FILE, ShardWriter, read_meta, read_tokenizer
from internals.show import show_tokens
from internals.source_size import choose_by_size, enough_tokens, refuse_hopeless_source, refuse_short
from internals.start import UserError
from internals.text_files import LocalFiles, Source
from internals.tokenizer import NAMES, given_tokenizer, is_json, load_tokenizer, token_bytes
from internals.tokenizer_training import find_tokenizer, make_tokenizer, write_tokenizer
from internals.wikipedia import HubWikipedia
from internals.windows import TokenStream

MOST_WORKERS = 8  # by default: more gain nothing (docs/data.md), and each holds a copy of the vocabulary
COMMIT_SECONDS = 1.0  # between saves of the progress: a killed run loses that much work, and the chunks in hand
LOCK_SECONDS = 10.0  # to wait for another run that is about to end
LEAST_CUT = 4096  # tokens: an article that exceeds --max-tokens by less, or by less than a tenth of it, stays whole


def prepare(cfg: PrepareConfig) -> None:
    """Write the folder `cfg.data_dir`, resume it, or say that it is finished. A failure loses no finished work."""
    data_dir = Path(cfg.data_dir)
    check_encoding(cfg.encoding)
    if cfg.show:
        show_tokens(data_dir, list(chain.from_iterable(cfg.show)))
        start.require_printed()
        return
    held = "another prepare_data.py is running there; wait until it ends"
    with writing(f"--data-dir {data_dir}"), locked(data_dir, "--data-dir", held, LOCK_SECONDS):
        prepare_locked(cfg, data_dir)


def prepare_locked(cfg: PrepareConfig, data_dir: Path) -> None:
    """`prepare`, in a folder that this process has locked."""
    # 1. The source, and what the folder holds already
    source, folder = make_source(cfg, data_dir), DataFolder(data_dir)
    if folder.meta and not cfg.overwrite:
        meta = read_meta(data_dir)
        state = "is finished, and was prepared"
        check_same_source(cfg, source, meta, state)
        source.recall(meta["source"])
        cfg = choose_by_size(cfg, source)
        check_same_settings(cfg, meta, state)
        read_tokenizer(data_dir, meta)  # raises if it has been damaged
        for split in SPLITS:
            TokenStream.open(data_dir, split)  # raises if a shard has been damaged
        folder.delete_unfinished()
        print(f"{data_dir} is finished: nothing to do (--overwrite starts again)\nNext: {command_to_train(cfg)}")
        return
    folder.refuse_foreign(own_tokenizer=cfg.tokenizer not in NAMES)
    if cfg.overwrite and Path(cfg.tokenizer).resolve() == (data_dir / TOKENIZER_FILE).resolve():
        raise UserError(f"--tokenizer {cfg.tokenizer}: --overwrite deletes this file; copy it to another folder first")
    if not cfg.trained_size:
        load_tokenizer(given_tokenizer(cfg.tokenizer))  # before anything is written

    # 2. Where to begin
    resumes = folder.progress is not None and not cfg.overwrite
    progress = Progress.load(cfg, source) if resumes else Progress(tail=source.has_few_documents())
    progress.resolved = source.resolve(progress.resolved)
    cfg = choose_by_size(cfg, source)
    if resumes:
        check_same_settings(cfg, progress.settings_to_keep(folder.progress, cfg), "is half done,")
        print(f"resuming {cfg.data_dir}: {progress.tokens:,} tokens are done")
    print(source.summary())
    if cfg.trained_size and not progress.tokens:
        refuse_hopeless_source(cfg, source)
    tokenizer = find_tokenizer(cfg, source, progress)
    if not progress.tokens:
        refuse_short(cfg, *enough_tokens(cfg, source, tokenizer))
    if cfg.overwrite:
        folder.delete()  # only now: a mistake in the flags, the files' form or the length must not cost the old shards
    write_tokenizer(tokenizer, cfg, source, progress)
    pipeline = Pipeline(cfg, source, progress, tokenizer)
    print(bulk_encoder(pipeline.tokenizer).summary)

    # 3. Articles -> tokens -> shards, and the result
    with resumable(data_dir, source, progress):
        if not progress.end:
            pipeline.tokenize_source()
        pipeline.finish()
        DataFolder(data_dir).delete_unfinished()  # read again: meta.json exists only now
        print_result(cfg, progress)


@contextlib.contextmanager
def resumable(data_dir: Path, source: Source, progress: Progress) -> Iterator[None]:
    """After a stop or a failure inside the block, name the command that continues. It omits --overwrite: once the old
    shards are deleted, that would delete the new ones."""
    again = f"Continue: {given_command(without='--overwrite')}"
    with writing(f"--data-dir {data_dir}", f"finished work is kept. {again}"):
        try:
            yield
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"Stopped; finished work is kept. {again}") from error
        except UserError as error:
            if not progress.tokens:
                raise
            kept = ". Finished work is kept for the same source and flags; changed ones need --overwrite"
            # With all text done, or a fault in it, the same command would end here again; on a full disk it continues
            cause = system_error(error)
            helps = (isinstance(source, HubWikipedia) and not progress.end) or (cause and cause.errno in DISK_FULL)
            told = "" if "is kept" in str(error) else kept
            raise UserError(f"{error}{told}" + (f". {again}" if helps else "")) from error


def make_source(cfg: PrepareConfig, data_dir: Path) -> Source:
    if cfg.sources == ("wikipedia",):
        source = HubWikipedia(cfg.language, cfg.dump, cfg.revision, data_dir, cfg.keep_downloads, cfg.max_tokens)
        types = {".parquet"}
    else:
        hub_only = f"only for --source wikipedia, but the source is {listed(cfg.sources)}"
        refuse_flags(cfg, ("language", "dump", "revision", "keep_downloads"), hub_only)
        # Not text, if the data folder lies inside a source of .json files.
        ours = [data_dir / name for name in ("meta.json", "progress.json", TOKENIZER_FILE)]
        source = LocalFiles(cfg.sources, ReadOptions.of(cfg), ours)
        types = {file_type(file.name) for file in source.files}
    if types == {".parquet"}:
        refuse_flags(cfg, ("encoding",), ".parquet files are always UTF-8")
    if types == {".txt"}:
        refuse_flags(cfg, ("text_column",), ".txt files have no columns")
    if ".txt" not in types:
        refuse_flags(cfg, ("separator",), "the source has no .txt file, and other formats already separate documents")
    return source


def refuse_flags(cfg: PrepareConfig, names: tuple[str, ...], reason: str) -> None:
    """Raise UserError if one of these flags has another value than its default. `reason` says why it would be ignored."""
    usual = with_preset(PrepareConfig, cfg.preset)
    for name in names:
        if getattr(cfg, name) != getattr(usual, name):
            raise UserError(f"{flag_of(name)}: {reason}; leave the flag out")


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline: source -> chunks -> tokens -> shards


class Work(NamedTuple):
    """A chunk that a worker tokenizes, and the position in the source after it."""

    tokens: Future  # of Tokens
    name: str  # of the source file
    file: int  # source files done
    row: int  # rows done of the next file
    position: int  # bytes of the source


class Pipeline:
    """Tokenizes a source into the shards of a folder that this process has locked.

    The main thread reads one source file after another, hands chunks to worker threads, and appends their tokens to the
    shards in the order of the source. So the shards are the same with any number of workers. Every second it syncs the
    shards and then saves the progress. A resumed run drops any tokens in the shards beyond that.
    """

    def __init__(self, cfg: PrepareConfig, source: Source, progress: Progress, tokenizer: str):
        self.cfg, self.source, self.progress, self.data_dir = cfg, source, progress, Path(cfg.data_dir)
        self.tokenizer = tokenizer
        self.shards: dict[str, ShardWriter] = {}
        self.open_shards()

    def open_shards(self) -> None:
        """Cut the splits to their lengths in the progress, and open them."""
        for shards in self.shards.values():
            shards.close()
        self.shards = {
            name: ShardWriter(self.data_dir, name, self.cfg.shard_tokens, split.tokens)
            for name, split in self.progress.splits.items()
        }

    def commit(self) -> None:
        """Save the progress, so that a later run resumes here. Before the first token there is nothing to save."""
        if not self.progress.tokens:
            return
        for shards in self.shards.values():
            shards.sync()
        self.progress.save(self.cfg, self.source)
        self.source.release(before=self.progress.file)

    def tokenize_source(self) -> None:
        workers = self.cfg.workers or min(count_cores(), MOST_WORKERS)
        pool, display = ThreadPoolExecutor(workers), Display(self.cfg, self.source, self.progress)
        committed = 0.0
        try:
            for work in self.work_in_order(pool, in_flight=3 * workers):
                self.append(work)
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
        val_fraction = 0.0 if self.progress.tail else self.cfg.held_out
        waiting: deque[Work] = deque()
        positions = list(accumulate((file.bytes for file in self.source.files), initial=0))
        try:
            for number in range(self.progress.file, len(self.source.files)):
                for chunk, following in pairwise(chain(self.chunks(number), [None])):
                    is_last = following is None
                    file, row = (number + 1, 0) if is_last else (number, chunk.first + chunk.count)
                    tokens = pool.submit(tokenize, chunk, self.tokenizer, val_fraction)
                    waiting.append(Work(tokens, chunk.reader.name, file, row, positions[number] + chunk.position))
                    if len(waiting) == in_flight:
                        yield waiting.popleft()
        except UserError:  # a file is missing or damaged: keep the work on those before it
            yield from waiting
            raise
        yield from waiting

    def chunks(self, number: int) -> Iterator[Chunk]:
        """The chunks of a source file that are still to do."""
        done = self.progress.row if number == self.progress.file else 0
        for chunk in self.source.chunks(number, ReadOptions.of(self.cfg, self.tokenizer)):
            if chunk.first < done < chunk.first + chunk.count:
                path = Progress.path(self.cfg)
                raise UserError(f"{path}: was written by another version; give --overwrite to start again")
            if chunk.first >= done:
                self.source.fetch(number)  # raises if the file has changed by now, before its text is taken
                yield chunk
        self.source.fetch(number)

    def append(self, work: Work) -> None:
        """Write a chunk's tokens to the shards, up to --max-tokens. Where that ends the text, `progress.end` says so."""
        new = work.tokens.result()
        count, room = len(new.tokens), (self.cfg.max_tokens or math.inf) - self.progress.tokens
        if count and count >= room:
            limit = max(self.cfg.max_tokens // 10, LEAST_CUT)
            new, is_cut = new.up_to(int(room), limit, load_tokenizer(self.tokenizer))
            is_all = len(new.tokens) == count and not any(file.bytes for file in self.source.files[work.file :])
            self.progress.end = "source" if is_all else "max_tokens"
            self.progress.cut = as_utf8_name(work.name) if is_cut else ""
        for split_name, chosen in (("train", ~new.val), ("val", new.val)):
            self.shards[split_name].write(new.tokens[np.repeat(chosen, new.lengths)])
            split = self.progress.splits[split_name]
            split.tokens = self.shards[split_name].tokens
            split.bytes += int(new.text_bytes[chosen].sum())
            split.articles += int(chosen.sum()) if new.ends else 0  # a document counts where it ends
        self.progress.add_text(work.name, new)

    def finish(self) -> None:
        """Check that both splits are long enough, name the shards, and write meta.json."""
        cfg, progress = self.cfg, self.progress
        if not progress.tail and (reason := progress.missed_share(cfg)):
            refuse_short(cfg, progress.tokens, progress.empty)  # before everything is prepared once more
            print(f"{reason}; the end of the text is held out instead")
            self.start_again_with_tail()
        if progress.tail and progress.splits["val"].tokens == 0:
            refuse_short(cfg, progress.tokens, progress.empty)
            self.hold_out_tail()
        size = load_tokenizer(self.tokenizer).n_vocab
        meta = {
            "format": META_FORMAT,
            "source": self.source.provenance(),
            **shard_settings(cfg),
            "vocab_size": size,
            **({"chosen_vocab_size": cfg.trained_size} if cfg.trained_size not in (None, size) else {}),
            **({"tokenizer_sha256": sha256_of(self.tokenizer)} if is_json(self.tokenizer) else {}),
            "end": progress.end,
            "empty": progress.empty,
            "repaired_files": progress.repaired_files,
            "splits": {
                name: {**dataclasses.asdict(split), "shards": self.shards[name].finish()}
                for name, split in progress.splits.items()
            },
        }
        write_json(self.data_dir / "meta.json", meta)

    def start_again_with_tail(self) -> None:
        """Prepare the source once more, all of it as training text. The tail is then held out from that."""
        self.progress.start_again()
        if self.cfg.trained_size:  # again: the old one was trained on the end of the text, too
            try:
                has_fewer = load_tokenizer(self.tokenizer).n_vocab < self.cfg.trained_size
                or_fewer = self.cfg.vocab_size is None or has_fewer
                self.tokenizer = make_tokenizer(self.cfg, self.source, self.progress, or_fewer)
            except UserError as error:
                raise UserError(f"{error}; start again with --overwrite") from error
            write_tokenizer(self.tokenizer, self.cfg, self.source, self.progress)
            bulk_encoder(self.tokenizer)  # built once here, not in each worker at the same time
        self.progress.save(self.cfg, self.source)
        self.open_shards()
        self.tokenize_source()

    def hold_out_tail(self) -> None:
        """Move the last tokens of the training split to the validation split."""
        train, val = self.progress.splits["train"], self.progress.splits["val"]
        tokenizer, sizes = load_tokenizer(self.tokenizer), token_bytes(self.tokenizer)
        held_out = int(train.tokens * self.cfg.held_out)
        before_cut = next(self.shards["train"].tail(held_out + 1))[0]  # end-of-text if it falls between two articles
        ends = 0
        for part in self.shards["train"].tail(held_out):
            self.shards["val"].write(part)
            val.bytes += int(sizes[part].sum())
            ends += int(np.count_nonzero(part == tokenizer.eot_token))
        # An article counts where it begins, and the first end may be that of an article which began before the cut.
        val.tokens, val.articles = held_out, ends - int(before_cut != tokenizer.eot_token)
        train.tokens, train.bytes, train.articles = (
            train.tokens - held_out, train.bytes - val.bytes, train.articles - val.articles,
        )  # fmt: skip
        self.commit()
        self.open_shards()  # which cuts the training split


if __name__ == "__main__":
    start.run(lambda: prepare(CFG), interrupted="Stopped. The same command continues.")
