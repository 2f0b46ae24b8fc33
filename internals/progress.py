"""The progress of preparing a data folder: saved on the disk, shown on the screen."""

import codecs
import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import PrepareConfig, flag_of
from internals.articles import FEW_IDS, Tokens
from internals.cli import with_preset
from internals.files import nearest_folder, sha256_of, write_json
from internals.screen import command_to_train, duration, listed, plural, printable, wrap
from internals.settings import differences
from internals.shards import META_FORMAT, SPLITS, check_fields
from internals.start import UserError
from internals.text_files import FEW_DOCUMENTS, Source
from internals.tokenizer import given_tokenizer, is_json

MEASURE_SECONDS = 3.0  # of tokenizing, before the whole run's needs are estimated


@dataclass
class Split:
    tokens: int = 0
    bytes: int = 0  # of text, in UTF-8
    articles: int = 0


@dataclass
class Progress:
    """The progress of a folder. `progress.json` holds this and the settings of the command."""

    file: int = 0  # source files done
    row: int = 0  # rows (lines, pieces) done of the next file
    end: str = ""  # what ended the text: "source" (all of it is done) or "max_tokens"; empty: not ended yet
    splits: dict[str, Split] = field(default_factory=lambda: {name: Split() for name in SPLITS})
    empty: int = 0  # articles without text, left out
    repaired_files: dict[str, list[int]] = field(default_factory=dict)  # name -> [replaced, all] characters
    tail: bool = False  # the end of the text is held out, not whole documents
    cut: str = ""  # the file whose document --max-tokens cut
    ids: list[str] = field(default_factory=list)  # different ids seen, while they are few
    reading: str = ""  # the file that was read last
    characters: int = 0  # of that file
    tokenizers: list[str] = field(default_factory=list)  # SHA-256 of each tokenizer.json written; the last is in use
    resolved: dict[str, Any] = field(default_factory=dict)  # what the source resolved: the hub's commit and files

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    @property
    def documents(self) -> int:
        return sum(split.articles for split in self.splits.values())

    @property
    def held_out(self) -> float:
        return self.splits["val"].tokens / max(1, self.tokens)

    def add_text(self, name: str, new: Tokens) -> None:
        """Count the empty articles and replaced characters in a chunk of the file `name`, and collect its ids."""
        name = as_utf8_name(name)
        self.empty += new.empty
        if name != self.reading:
            self.reading, self.characters = name, 0
        self.characters += new.characters
        if new.replaced.any() or name in self.repaired_files:
            bad = self.repaired_files.get(name, [0, 0])[0] + int(new.replaced.sum())
            self.repaired_files[name] = [bad, self.characters]
        if len(self.ids) < FEW_IDS:
            self.ids = sorted({*self.ids, *map(shown_id, new.ids)})[:FEW_IDS]

    def missed_share(self, cfg: PrepareConfig) -> str:
        """Why choosing whole documents misses the share to hold out; empty if it does not.

        0.5 to 1.5 times the share is near enough, in documents and in tokens, if both splits are then long enough to
        train on. An excess of two percent of all tokens does no harm.
        """
        wanted, splits = cfg.held_out, self.splits
        if self.documents < FEW_DOCUMENTS:
            are = "is" if self.documents == 1 else "are"
            return f"{plural(self.documents, 'document')} {are} too few to choose from"
        of_documents = splits["val"].articles / self.documents
        enough = all(splits[name].tokens >= need for name, need in cfg.least_tokens.items())
        too_many = self.held_out > max(1.5 * wanted, wanted + 0.02)
        if abs(of_documents - wanted) <= wanted / 2 and self.held_out >= wanted / 2 and enough and not too_many:
            return ""
        text = f"choosing whole documents holds out {100 * self.held_out:.3g}% of the tokens, not {100 * wanted:.3g}%"
        if len(self.ids) < FEW_IDS:
            ids = "the same id or text" if len(self.ids) == 1 else f"one of {len(self.ids)} ids or texts"
            text += f", because all {self.documents:,} have {ids}: {printable(', '.join(self.ids))}"
        return text

    def settings_to_keep(self, saved: dict[str, Any], cfg: PrepareConfig) -> dict[str, Any]:
        """The settings that a resumed run must have: the saved ones, with the new `--max-tokens` if neither has mattered yet.

        It matters where the text ends, for what a preset chooses by the size, and where the end of the text is held out.
        """
        has_mattered = self.end or self.tail or cfg.by_size or self.tokens >= (cfg.max_tokens or math.inf)
        return saved if has_mattered else saved | {"max_tokens": cfg.max_tokens}

    def start_again(self) -> None:
        """Go back to the first file, and hold out the end of the text."""
        # In place, because others hold this object
        vars(self).update(vars(Progress(tail=True, tokenizers=self.tokenizers, resolved=self.resolved)))

    @staticmethod
    def path(cfg: PrepareConfig) -> Path:
        return Path(cfg.data_dir) / "progress.json"

    def save(self, cfg: PrepareConfig, source: Source) -> None:
        settings = {"format": META_FORMAT, "source": source.identity, **shard_settings(cfg)}
        write_json(self.path(cfg), settings | dataclasses.asdict(self))

    @classmethod
    def load(cls, cfg: PrepareConfig, source: Source) -> "Progress":
        path = cls.path(cfg)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            check_same_source(cfg, source, saved, "is half done,")
            values = {one.name: saved[one.name] for one in dataclasses.fields(cls)}
            check_fields("", saved, {name: type(value) for name, value in vars(cls()).items()})
            values["splits"] = {name: Split(**saved["splits"][name]) for name in SPLITS}
            for name, split in values["splits"].items():
                check_fields(f"{name}: ", vars(split), dict.fromkeys(vars(split), int))
        except KeyError as error:
            raise UserError(
                f"{path}: was written by another version (it has no {error}); give --overwrite to start again"
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is damaged ({error}); give --overwrite to start again") from error
        return cls(**values)


def shown_id(key: bytes) -> str:
    """An id, or the text without one, as people may read it. That of a file without ids is a digest."""
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError:
        return key.hex()[:8]


def as_utf8_name(name: str) -> str:
    """A file's name as JSON can hold it: bytes that are not UTF-8 are spelt out."""
    return name.encode("utf-8", "backslashreplace").decode()


def shard_settings(cfg: PrepareConfig) -> dict[str, Any]:
    """The settings that decide the shards, besides the source. Resuming needs the same ones."""
    return {
        **tokenizer_settings(cfg),
        "text_column": cfg.text_column,
        "encoding": codecs.lookup(cfg.encoding).name,
        "separator": cfg.separator_text,
        "val_fraction": cfg.held_out,
        "shard_tokens": cfg.shard_tokens,
        "max_tokens": cfg.max_tokens,
    }


def tokenizer_settings(cfg: PrepareConfig) -> dict[str, Any]:
    """The command's settings of the tokenizer. For a trained tokenizer, `meta.json` adds its SHA-256."""
    if cfg.trained_size:
        return {"tokenizer": "own", "trained": True, "vocab_size": cfg.trained_size}
    tokenizer = given_tokenizer(cfg.tokenizer)
    if is_json(tokenizer):
        return {"tokenizer": "own", "tokenizer_sha256": sha256_of(tokenizer)}
    return {"tokenizer": tokenizer}


def tokenizer_flags(settings: dict[str, Any]) -> str:
    """The flags of these settings: `--tokenizer train --vocab-size 8192`."""
    if settings["tokenizer"] != "own":
        return f"--tokenizer {settings['tokenizer']}"
    if settings.get("trained"):
        return f"--tokenizer train --vocab-size {settings['vocab_size']}"
    return f"a --tokenizer of SHA-256 {settings['tokenizer_sha256'][:8]}"


def check_same_source(cfg: PrepareConfig, source: Source, saved: dict[str, Any], state: str) -> None:
    """Raise UserError if the folder was begun with another source. `source` need not be resolved."""
    if not source.identity.items() <= saved["source"].items():
        other = f"from another source ({describe_source(saved['source'])}, not {describe_source(source.identity)})"
        raise begun_otherwise(cfg, state, other)


def check_same_settings(cfg: PrepareConfig, saved: dict[str, Any], state: str) -> None:
    """Raise UserError if the folder was begun with other settings."""
    settings, tokenizer = shard_settings(cfg), tokenizer_settings(cfg)
    others = {name: value for name, value in settings.items() if name not in tokenizer}
    changes = differences(saved, others, defaults=shard_settings(with_preset(PrepareConfig, cfg.preset)))
    if "chosen_vocab_size" in saved:  # the text yielded fewer tokens than were chosen
        saved = saved | {"vocab_size": saved["chosen_vocab_size"]}
    same_tokenizer = tokenizer.items() <= saved.items()
    if cfg.by_size and "max_tokens" in changes:  # share and vocabulary follow from it: they were not flags
        changes.pop("val_fraction", None)
        same_tokenizer = same_tokenizer or bool(tokenizer.get("trained") and saved.get("trained"))
    differs = [begun_with(flag_of(name), old, new) for name, (old, new) in changes.items()]
    if not same_tokenizer:
        differs.insert(0, f"with {tokenizer_flags(saved)}, not {tokenizer_flags(tokenizer)}")
    if differs:
        raise begun_otherwise(cfg, state, " and ".join(differs))


def begun_otherwise(cfg: PrepareConfig, state: str, how: str) -> UserError:
    return UserError(
        f"--data-dir {cfg.data_dir}: {state} {how}; give the same command as before, or another --data-dir, or "
        "--overwrite to start again"
    )


def begun_with(flag: str, old: Any, new: Any) -> str:
    """A changed setting in words: `with --encoding cp1252, not utf-8`, or `without --max-tokens` if it was left out."""
    then, now = (str(value) if str(value).isprintable() else repr(value) for value in (old, new))
    if old in (None, ""):
        return f"without {flag}"
    return f"with {flag} {then}" + ("" if new in (None, "") else f", not {now}")


def describe_source(source: dict[str, Any]) -> str:
    if source["kind"] == "hub":
        return f"{source['repository']} {source['config']}, revision {source['revision']}"
    files = f"{plural(source['files'], 'file')} of {source['bytes']:,} bytes"
    return f"{'the sample' if source['kind'] == 'sample' else files}, SHA-256 {source['sha256'][:8]}"


class Display:
    """A progress bar and, after a few seconds, the time and disk space that the whole run needs."""

    def __init__(self, cfg: PrepareConfig, source: Source, progress: Progress):
        self.cfg, self.source, self.progress = cfg, source, progress
        self.source_bytes = sum(file.bytes for file in source.files)
        self.bar = tqdm(initial=progress.tokens, unit=" tokens", unit_scale=True, desc="tokenizing", disable=None)
        self.began, self.tokens_before = 0.0, 0  # time and tokens when the measurement began
        self.needs_printed = False

    def update(self, position: int) -> None:
        """Show the progress after `position` bytes of the source."""
        now, tokens = time.monotonic(), self.progress.tokens
        if not self.began:  # the first chunk is done, so all workers are busy
            self.began, self.tokens_before = now, tokens
        elif not self.needs_printed and now - self.began > MEASURE_SECONDS:
            self.print_needs((tokens - self.tokens_before) / (now - self.began), position)
            self.needs_printed = True
        self.bar.total = self.estimate(position)
        self.bar.update(tokens - self.bar.n)

    def estimate(self, position: int) -> int:
        """Tokens of the whole run, if the rest of the source is like its first `position` bytes."""
        tokens = self.progress.tokens * self.source_bytes // max(1, position)
        return min(tokens, self.cfg.max_tokens or tokens)

    def print_needs(self, tokens_per_second: float, position: int) -> None:
        """Print the time and the disk space that the whole run needs. Raises UserError if the disk is too small."""
        total = self.estimate(position)
        left = total - self.progress.tokens
        seconds, disk = left / max(1.0, tokens_per_second), 2 * left
        text = f"needs about {2 * total / 1e9:,.2f} GB of disk for {total / 1e6:,.0f} million tokens"
        if passing := self.source.peak_bytes:
            here, rest = self.source.bytes_on_disk, left * position // max(1, self.progress.tokens)
            download = max(0, min(rest, self.source.missing_bytes) - here)
            seconds = max(seconds, download * self.source.seconds_per_byte)
            disk += self.needed_for_downloads(passing - here)
            text += f", {passing / 1e9:,.2f} GB more while it downloads, {download / 1e9:,.2f} GB still to download"
        free = shutil.disk_usage(self.cfg.data_dir).free
        tqdm.write(wrap(f"{text}, and about {duration(seconds)}; {free / 1e9:,.2f} GB of disk are free"))
        if disk > free:
            room = free - (disk - 2 * left)  # what the downloads leave
            fits = int(self.progress.tokens + 0.8 * room / 2)
            fewer = f", or start again with --overwrite --max-tokens {fits}" if room > 0 else ""
            if self.cfg.keep_downloads:
                fewer += ", or leave --keep-downloads out"
            raise UserError(
                f"--data-dir {self.cfg.data_dir}: needs {disk / 1e9:,.2f} GB more, but only {free / 1e9:,.2f} GB are "
                f"free; make room{fewer}"
            )

    def needed_for_downloads(self, size: int) -> int:
        """Bytes of the data folder's disk that such downloads take. Raises UserError if their own disk is too small."""
        folder = nearest_folder(self.source.download_folder)  # nothing may be there yet
        if folder.stat().st_dev == Path(self.cfg.data_dir).stat().st_dev:
            return size
        free = shutil.disk_usage(folder).free
        if size > free:
            raise UserError(
                f"--keep-downloads: needs {size / 1e9:,.2f} GB more in {folder}, but only {free / 1e9:,.2f} GB are "
                "free; make room, or point HF_HOME to another disk, or leave the flag out"
            )
        return 0


def print_result(cfg: PrepareConfig, progress: Progress) -> None:
    """Print the contents of the finished folder, what was left out, and the next command."""
    if progress.end == "max_tokens":
        cut = f" inside a document of {printable(progress.cut)}" if progress.cut else ""
        print(f"stopped at --max-tokens {cfg.max_tokens:,}{cut}: the rest of the source is left out")
    if progress.empty:
        print(f"left out {plural(progress.empty, 'article')} without text")
    if progress.repaired_files:
        names = [f"{name} ({100 * bad / total:.2g}%)" for name, (bad, total) in progress.repaired_files.items()]
        where = plural(len(names), "file")
        text = f"replaced invalid Unicode with U+FFFD in {where} (share of the characters): {listed(names, limit=10)}"
        print(wrap(text, indent="  "))
    for name, split in progress.splits.items():
        print(f"{name}: {split.tokens:,} tokens, {plural(split.articles, 'article')}, {split.bytes:,} bytes of text")
    print(f"held out {100 * progress.held_out:.3g}% of the tokens (--val-fraction {cfg.held_out:g})")
    print(f"Next: {command_to_train(cfg)}")
