"""Token shards on the disk: write, read and verify them."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from internals.files import beside_the_code, rename, sha256, sync_file
from internals.start import UserError

MAGIC, VERSION = 20240520, 1  # of llm.c's shard format
HEADER_BYTES = 256 * 4
META_FORMAT = 1
SPLITS = ("train", "val")
UNFINISHED_HEADER = b"prepare_data.py: not finished\n".ljust(HEADER_BYTES, b"\0")  # marks an unfinished shard as ours
PIECE_TOKENS = 1 << 20  # read at once
TOKENIZER_FILE = "tokenizer.json"  # of a tokenizer of our own
AGAIN = "prepare the data again: the prepare_data.py command that made it, with --overwrite"
# The fields of meta.json, of each split and each shard in it, and their types. `source` may have more
META_FIELDS = {"source": dict, "tokenizer": str, "vocab_size": int, "splits": dict}
SPLIT_FIELDS = {"tokens": int, "bytes": int, "articles": int, "shards": list}
SHARD_FIELDS = {"file": str, "tokens": int, "sha256": str}
SHARD_NAME = re.compile(r"(train|val)_(\d{6,})\.bin(\.partial)?")


def shard_bytes(tokens: int) -> int:
    """The size of a shard's file."""
    return HEADER_BYTES + 2 * tokens


def shard_path(data_dir: str | Path, split: str, index: int) -> Path:
    return Path(data_dir) / f"{split}_{index:06d}.bin"


def shard_header(tokens: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def read_shard(path: str | Path) -> np.ndarray:
    """The tokens of a shard, (N,) uint16. The file is mapped: only the parts that are used are read from the disk."""
    try:
        header = np.fromfile(path, dtype="<i4", count=256)
        size = os.path.getsize(path)
        if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
            raise UserError(f"{path}: is not a token shard; {AGAIN}")
        tokens = int(header[2])
        if size != shard_bytes(tokens):
            raise UserError(
                f"{path}: has {size:,} bytes, but its {tokens:,} tokens need {shard_bytes(tokens):,}; the file was "
                f"cut short or damaged: {AGAIN}"
            )
        return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))
    except OSError as error:
        if error.errno == errno.ENOENT:
            advice = AGAIN
        elif error.errno in (errno.EMFILE, errno.ENFILE):  # each mapped shard keeps its file open
            advice = "allow more (ulimit -n 4096), or prepare the data again with a larger --shard-tokens"
        else:  # some network drives cannot map files
            advice = "make it readable, or copy the data folder to a local disk"
        raise UserError(f"{path}: {error.strerror}; {advice}") from error


class ShardWriter:
    """Appends tokens to the shards of one split.

    A shard is called `FILE.partial` until `finish`. It is filled before the next one begins, so the number of tokens
    tells the progress of a split. A writer that is opened with that number drops everything after it.

    The caller has made sure that no file with the name of a shard is somebody else's (`DataFolder.refuse_foreign`).

    Raises:
        UserError: the files hold fewer tokens than `tokens`.
    """

    def __init__(self, data_dir: str | Path, split: str, shard_tokens: int, tokens: int = 0):
        self.data_dir, self.split, self.shard_tokens, self.tokens = Path(data_dir), split, shard_tokens, tokens
        self._file: BinaryIO | None = None
        for index in range(self.count):
            path, partial = shard_path(self.data_dir, split, index), self._partial(index)
            if path.exists() and not partial.exists():  # the last run was stopped in `finish`
                rename(path, partial)
            if not partial.exists() or partial.stat().st_size < shard_bytes(self._length(index)):
                raise UserError(f"{partial}: is missing or was cut short; {AGAIN}")
            os.truncate(partial, shard_bytes(self._length(index)))
        for path in self.data_dir.glob(f"{split}_*.bin.partial"):
            name = SHARD_NAME.fullmatch(path.name)
            if name and int(name[2]) >= self.count:
                path.unlink()

    @property
    def count(self) -> int:
        """Shards begun."""
        return -(-self.tokens // self.shard_tokens)

    def _partial(self, index: int) -> Path:
        path = shard_path(self.data_dir, self.split, index)
        return path.with_name(path.name + ".partial")

    def _length(self, index: int) -> int:
        """Tokens in a shard."""
        return min(self.shard_tokens, self.tokens - index * self.shard_tokens)

    def write(self, tokens: np.ndarray) -> None:
        """Append (N,) uint16. A plain write: with a memmap, a full disk would kill the process instead of raising."""
        while len(tokens):
            index, filled = divmod(self.tokens, self.shard_tokens)
            if self._file is None:
                self._file = open(self._partial(index), "ab", buffering=0)  # noqa: SIM115 (it stays open)
                if filled == 0:
                    self._write(UNFINISHED_HEADER)  # `finish` replaces it
            part = tokens[: self.shard_tokens - filled]
            self._write(part.astype("<u2", copy=False).tobytes())
            self.tokens += len(part)
            tokens = tokens[len(part) :]
            if filled + len(part) == self.shard_tokens:
                self.close()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # an unbuffered file may take only a part; the next call then raises the reason
            view = view[self._file.write(view) :]

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        if self._file is not None:
            sync_file(self._file)

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def tail(self, length: int) -> Iterator[np.ndarray]:
        """The last `length` tokens, in pieces of (N,) uint16."""
        self.close()
        start = self.tokens - length
        while start < self.tokens:
            index, skip = divmod(start, self.shard_tokens)
            count = min(PIECE_TOKENS, self._length(index) - skip)
            yield np.fromfile(self._partial(index), "<u2", count=count, offset=HEADER_BYTES + 2 * skip)
            start += count

    def finish(self) -> list[dict[str, Any]]:
        """Give each shard its header and its name. Returns their entries in meta.json: file, tokens, sha256."""
        self.close()
        entries = []
        for index in range(self.count):
            path = shard_path(self.data_dir, self.split, index)
            with open(self._partial(index), "r+b") as file:
                file.write(shard_header(self._length(index)))
                sync_file(file)
            if path.exists():
                raise UserError(f"{path}: was created by another program in the meantime; move it away")
            rename(self._partial(index), path)
            entries.append({"file": path.name, "tokens": self._length(index), "sha256": sha256(path)})
        return entries


def read_meta(data_dir: str | Path) -> dict[str, Any]:
    """The `meta.json` of a finished data folder."""
    folder = Path(data_dir)
    command = "run prepare_data.py (with the same --preset and --data-dir, and --source for a text of your own)"
    if not folder.is_dir():
        raise UserError(
            f"--data-dir {folder}: there is no such folder; {beside_the_code(folder) or f'{command} first'}"
        )
    path = folder / "meta.json"
    if not path.exists():
        names = [shard.name for shard in folder.glob("*.bin*")]
        if names and not any(map(SHARD_NAME.fullmatch, names)):  # nanoGPT's and llm.c's
            raise UserError(
                f"--data-dir {folder}: holds the token files of another program ({min(names)}), and a run needs those of "
                "prepare_data.py; give their text as --source, with another --data-dir"
            )
        state = "is not finished" if names else "holds no prepared data"
        raise UserError(f"--data-dir {folder}: {state} (no meta.json); {command}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != META_FORMAT:
            raise UserError(f"{path}: format {meta['format']!r}, but this version reads {META_FORMAT}; {AGAIN}")
        check_meta(meta)
    except OSError as error:  # says nothing about the content
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read as meta.json ({error}); move it and the shards beside it away, then {command}"
        ) from error
    return meta


def unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); make it readable")


def check_meta(meta: dict[str, Any]) -> None:
    """Raise ValueError if a field of meta.json is missing, or of another type than prepare_data.py writes."""
    check_fields("", meta, META_FIELDS)
    check_fields("source: ", meta["source"], {"kind": str})
    if meta["source"]["kind"] == "hub":  # prepare_data.py chooses settings by its size
        check_fields("source: ", meta["source"], {"bytes": int})
        if meta["source"]["bytes"] < 1:
            raise ValueError(f"source: bytes is {meta['source']['bytes']}")
    if not 257 <= meta["vocab_size"] <= 65_536:  # bytes and end-of-text are the smallest vocabulary; tokens are uint16
        raise ValueError(f"vocab_size is {meta['vocab_size']}")
    for name in SPLITS:
        check_fields("splits: ", meta["splits"], {name: dict})
        split = meta["splits"][name]
        check_fields(f"{name}: ", split, SPLIT_FIELDS)
        if split["bytes"] < 1:  # bits per byte divide by it
            raise ValueError(f"{name}: bytes is {split['bytes']}")
        for shard in split["shards"]:
            check_fields(f"{name}, a shard: ", shard, SHARD_FIELDS)


def check_fields(where: str, value: Any, fields: dict[str, type]) -> None:
    for name, kind in fields.items():
        if not isinstance(value, dict) or type(value.get(name)) is not kind:
            raise ValueError(f"{where}{name} is missing or of a wrong type")


def read_tokenizer(data_dir: str | Path, meta: dict[str, Any]) -> str:
    """The tokenizer of a data folder, as `load_tokenizer` takes it: its name, or the text of its tokenizer.json."""
    if "tokenizer_sha256" not in meta:
        return meta["tokenizer"]
    path = Path(data_dir) / TOKENIZER_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing; restore it, or {AGAIN}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if hashlib.sha256(content).hexdigest() != meta["tokenizer_sha256"]:
        raise UserError(
            f"{path}: is not the tokenizer of the shards beside it; restore it, or move it away and {AGAIN}"
        )
    return content.decode()


def verify(data_dir: str | Path) -> None:
    """Check the content of every shard against its SHA-256 in meta.json."""
    shards = [shard for split in read_meta(data_dir)["splits"].values() for shard in split["shards"]]
    for shard in tqdm(shards, desc="verifying shards", unit="shard", leave=False, disable=None):
        path = Path(data_dir) / shard["file"]
        read_shard(path)
        if sha256(path) != shard["sha256"]:
            raise UserError(f"{path}: is damaged (its SHA-256 is not meta.json's); {AGAIN}")
