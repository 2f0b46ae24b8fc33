"""The files in a data folder that prepare_data.py wrote. It never deletes, renames or overwrites any others."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from internals.files import sha256
from internals.shards import HEADER_BYTES, MAGIC, SHARD_NAME, TOKENIZER_FILE, UNFINISHED_HEADER
from internals.start import UserError

DOWNLOADS = ".downloads-in-progress"  # a name that no user gives to a folder
OLD_DOWNLOADS = "downloads"  # of versions before November 2026
BEGINNING = b'{\n  "format": '  # of our JSON files
TOKENIZER_FILES = (TOKENIZER_FILE, f"{TOKENIZER_FILE}.tmp")
TOKENIZER_BEGINNING = b'{\n  "version": "1.0",\n  "truncation": null'


class DataFolder:
    """The files of a data folder, and which of them are ours.

    Ours are a `meta.json` and a `progress.json` with our keys, the shards and the `tokenizer.json` that one of them names,
    and unfinished shards with our header. A missing or damaged file of ours does not stop the command; a foreign one
    does.
    """

    def __init__(self, path: Path):
        self.path = path
        self.meta, self.noted = (own_json(path / name) for name in ("meta.json", "progress.json"))

    def refuse_foreign(self, own_tokenizer: bool) -> None:
        """Raise UserError if a foreign file has a name that the command needs."""
        names = [path for path in sorted(self.path.iterdir()) if own_tokenizer or path.name not in TOKENIZER_FILES]
        if foreign := [path.name for path in names if self.is_in_the_way(path)]:
            more = f" and {len(foreign) - 1:,} more" if len(foreign) > 1 else ""
            raise UserError(
                f"{self.path / foreign[0]}{more}: is damaged, or not made by this command; nothing is deleted or "
                "overwritten: move it away, or give another --data-dir"
            )

    def is_in_the_way(self, path: Path) -> bool:
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
        length = self.noted_length(split, int(number))
        if partial:  # before November 2026 the header of an unfinished shard was zeros
            return begins_as(path, UNFINISHED_HEADER) or (
                self.noted is not None and (length > 0 or begins_as(path, bytes(HEADER_BYTES)))
            )
        sizes = [HEADER_BYTES + 2 * entry["tokens"] for entry in self.meta_entries(split) if entry["file"] == path.name]
        if sizes:
            return path.stat().st_size == sizes[0] or has_magic(path)
        return length > 0 and path.stat().st_size == HEADER_BYTES + 2 * length and has_magic(path)

    def tokenizers(self) -> list[str]:
        """The SHA-256 of each tokenizer.json that was written here."""
        finished = [self.meta["tokenizer_sha256"]] if self.meta and "tokenizer_sha256" in self.meta else []
        return finished + list((self.noted or {}).get("tokenizers", []))

    def is_own_tokenizer(self, path: Path) -> bool:
        return path.is_file() and sha256(path) in self.tokenizers()

    def meta_entries(self, split: str) -> list[dict[str, Any]]:
        with contextlib.suppress(KeyError, TypeError):
            return self.meta["splits"][split]["shards"]
        return []

    def noted_length(self, split: str, index: int) -> int:
        """Tokens of a shard according to `progress.json`; 0 if it names no such shard."""
        with contextlib.suppress(KeyError, TypeError):
            size = self.noted["shard_tokens"]
            return max(0, min(size, self.noted["splits"][split]["tokens"] - index * size))
        return 0

    def delete(self) -> None:
        """Delete our files. Those that show which are ours go last, so a killed deletion can be repeated."""
        for path in sorted(self.path.iterdir()):
            is_shard = SHARD_NAME.fullmatch(path.name) and self.is_own_shard(path)
            if is_shard or (path.name == TOKENIZER_FILE and self.is_own_tokenizer(path)):
                path.unlink()
        self.delete_notes()
        (self.path / "meta.json").unlink(missing_ok=True)
        self.meta = None

    def delete_notes(self) -> None:
        """Delete our files that a finished folder does not need."""
        Downloads.of(self.path, (self.noted or {}).get("resolved") or {}).delete_all()
        for name in (f"{TOKENIZER_FILE}.tmp", "progress.json", "progress.json.tmp", "meta.json.tmp"):
            if os.path.lexists(self.path / name) and not self.is_in_the_way(self.path / name):
                (self.path / name).unlink()
        self.noted = None


class Downloads:
    """The subfolder of a data folder that keeps downloads until they are tokenized."""

    def __init__(self, data_dir: Path, name: str, files: Iterable[str]):
        self.data_dir, self.folder, self.files = data_dir, data_dir / name, list(files)

    @classmethod
    def of(cls, data_dir: Path, resolved: dict[str, Any]) -> "Downloads":
        """The downloads of a source. `resolved` is its entry in `progress.json`."""
        name = resolved.get("folder", OLD_DOWNLOADS) if resolved else DOWNLOADS
        return cls(data_dir, name, (file["name"] for file in resolved.get("files", [])))

    def delete(self, files: Iterable[str]) -> None:
        for name in files:
            path = self.folder / name
            if path.parent.resolve().is_relative_to(self.data_dir.resolve()):  # not through a link that leads elsewhere
                path.unlink(missing_ok=True)

    def delete_all(self) -> None:
        """Delete the files and the folder. The old folder may be the user's, so there only empty folders go."""
        self.delete(self.files)
        if self.folder.name == DOWNLOADS:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.files and not self.folder.is_symlink():
            for folder in {parent for name in self.files for parent in folders_of(self.folder, name)}:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            with contextlib.suppress(OSError):
                self.folder.rmdir()


def folders_of(folder: Path, name: str) -> Iterator[Path]:
    parents = list(Path(name).parents)[:-1]
    return (folder / parent for parent in parents)


def own_json(path: Path) -> dict[str, Any] | None:
    """A JSON file that this command wrote; None if it is missing, foreign or damaged."""
    try:
        value = json.loads(path.read_bytes())
        return value if {"format", "source", "tokenizer", "splits"} <= value.keys() else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def begins_as(path: Path, beginning: bytes) -> bool:
    """Whether the file begins with these bytes, or is only the first of them, as after a killed write."""
    with open(path, "rb") as file:
        data = file.read(len(beginning))
    return beginning.startswith(data)


def has_magic(path: Path) -> bool:
    return np.fromfile(path, "<i4", 1).tolist() == [MAGIC]
