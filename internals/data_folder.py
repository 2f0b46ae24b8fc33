"""The files in a data folder that prepare_data.py wrote. It never deletes, renames or overwrites any others."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from internals.files import sha256
from internals.shards import MAGIC, SHARD_NAME, TOKENIZER_FILE, UNFINISHED_HEADER, shard_bytes, unreadable
from internals.start import UserError

DOWNLOADS = ".downloads-in-progress"  # a name that no user gives to a folder
BEGINNING = b'{\n  "format": '  # of our JSON files
TOKENIZER_FILES = (TOKENIZER_FILE, f"{TOKENIZER_FILE}.tmp")
TOKENIZER_BEGINNING = b'{\n  "version": "1.0",\n  "truncation": null'


class DataFolder:
    """The files of a data folder, and which of them are ours.

    Ours are a `meta.json` and a `progress.json` with our keys, the shards and the `tokenizer.json` that one of them
    names, and unfinished shards with our header. A missing file of ours, or a shard in `meta.json` that was cut short,
    does not stop the command. A file that cannot be recognised as ours does.
    """

    def __init__(self, path: Path):
        self.path = path
        self.meta, self.progress = (own_json(path / name) for name in ("meta.json", "progress.json"))

    def refuse_foreign(self, own_tokenizer: bool) -> None:
        """Raise UserError if a foreign file has a name that the command needs."""
        paths = [
            path for path in sorted(self.path.iterdir()) if own_tokenizer or path.name.lower() not in TOKENIZER_FILES
        ]
        if foreign := [path.name for path in paths if self.is_in_the_way(path)]:
            what, them = f"{self.path / foreign[0]}: is", "it"
            if len(foreign) > 1:
                what, them = f"{self.path / foreign[0]} and {len(foreign) - 1:,} more: are", "them"
            raise UserError(
                f"{what} damaged, or not made by this command; nothing is deleted or overwritten: move {them} away, or give "
                "another --data-dir"
            )

    def is_in_the_way(self, path: Path) -> bool:
        lower = path.with_name(path.name.lower())
        if os.path.lexists(lower):  # on Windows and macOS `Meta.json` is also called `meta.json`
            path = lower
        if path.name in ("meta.json", "progress.json"):
            return own_json(path) is None
        if path.name in ("meta.json.tmp", "progress.json.tmp"):
            return not path.is_file() or not begins_as(path, BEGINNING)
        if path.name == TOKENIZER_FILE:
            return not self.is_own_tokenizer(path)
        if path.name == f"{TOKENIZER_FILE}.tmp":
            return not (self.tokenizers() and path.is_file() and begins_as(path, TOKENIZER_BEGINNING))
        if path.name == DOWNLOADS:
            return path.is_symlink() or not path.is_dir()
        return bool(SHARD_NAME.fullmatch(path.name)) and not self.is_own_shard(path)

    def is_own_shard(self, path: Path) -> bool:
        split, number, partial = SHARD_NAME.fullmatch(path.name).groups()
        if not path.is_file():
            return False
        length = self.recorded_length(split, int(number))
        if partial:
            return length > 0 or begins_as(path, UNFINISHED_HEADER)
        sizes = [shard_bytes(tokens) for name, tokens in self.meta_entries(split) if name == path.name]
        if sizes:
            return path.stat().st_size == sizes[0] or has_magic(path)
        return length > 0 and path.stat().st_size == shard_bytes(length) and has_magic(path)

    def tokenizers(self) -> list[str]:
        """The SHA-256 of each tokenizer.json that was written here."""
        finished = [self.meta["tokenizer_sha256"]] if self.meta and "tokenizer_sha256" in self.meta else []
        return finished + list((self.progress or {}).get("tokenizers", []))

    def is_own_tokenizer(self, path: Path) -> bool:
        return path.is_file() and sha256(path) in self.tokenizers()

    def meta_entries(self, split: str) -> list[tuple[str, int]]:
        """The name and the number of tokens of each shard in `meta.json`."""
        with contextlib.suppress(KeyError, TypeError):
            return [(entry["file"], entry["tokens"]) for entry in self.meta["splits"][split]["shards"]]
        return []

    def recorded_length(self, split: str, index: int) -> int:
        """Tokens of a shard according to `progress.json`; 0 if it names no such shard."""
        with contextlib.suppress(KeyError, TypeError):
            size = self.progress["shard_tokens"]
            return max(0, min(size, self.progress["splits"][split]["tokens"] - index * size))
        return 0

    def delete(self) -> None:
        """Delete our files, except downloads, which may be of this run. Those that show which are ours go last, so a
        killed deletion can be repeated."""
        for path in sorted(self.path.iterdir()):
            is_shard = SHARD_NAME.fullmatch(path.name) and self.is_own_shard(path)
            if is_shard or (path.name == TOKENIZER_FILE and self.is_own_tokenizer(path)):
                path.unlink()
        self.delete_records()
        (self.path / "meta.json").unlink(missing_ok=True)

    def delete_unfinished(self) -> None:
        """Delete our files that a finished folder does not need."""
        Downloads(self.path).delete_all()
        self.delete_records()

    def delete_records(self) -> None:
        """Delete progress.json, and what was half written."""
        for name in (f"{TOKENIZER_FILE}.tmp", "progress.json", "progress.json.tmp", "meta.json.tmp"):
            if os.path.lexists(self.path / name) and not self.is_in_the_way(self.path / name):
                with contextlib.suppress(PermissionError):  # Windows, where another program has it open: it is replaced
                    (self.path / name).unlink()


class Downloads:
    """The subfolder of a data folder that keeps downloads until they are tokenized."""

    def __init__(self, data_dir: Path):
        self.data_dir, self.folder = data_dir, data_dir / DOWNLOADS

    def delete(self, files: Iterable[str]) -> None:
        for name in files:
            path = self.folder / name
            if path.parent.resolve().is_relative_to(self.data_dir.resolve()):  # not through a link that leads elsewhere
                with contextlib.suppress(PermissionError):  # Windows, where a virus scanner has it open: the next time
                    path.unlink(missing_ok=True)

    def delete_all(self) -> None:
        """Delete the folder and all in it. Links are not followed.

        A download that --max-tokens made needless may still run. Windows and network drives keep its open file.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.is_dir() and not self.folder.is_symlink():
            again = "the same command, given again, deletes it"
            print(f"warning: {self.folder}: cannot be deleted while a file in it is open; {again}", file=sys.stderr)


def own_json(path: Path) -> dict[str, Any] | None:
    """A JSON file that this command wrote; None if it is missing, foreign or damaged. Raises UserError if it cannot be
    read: that says nothing about its content."""
    try:
        value = json.loads(path.read_bytes())
        is_own = {"format", "source", "tokenizer", "splits"} <= value.keys() and "kind" in value["source"]
        return value if is_own else None
    except (FileNotFoundError, IsADirectoryError, ValueError, AttributeError, TypeError, RecursionError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def begins_as(path: Path, beginning: bytes) -> bool:
    """Whether the file begins with these bytes, or is only the first of them, as after a killed write."""
    with open(path, "rb") as file:
        data = file.read(len(beginning))
    return beginning.startswith(data)


def has_magic(path: Path) -> bool:
    return begins_as(path, MAGIC.to_bytes(4, "little"))
