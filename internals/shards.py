"""The shard format: read, write, verify."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from internals.files import sha256
from internals.start import UserError

MAGIC, VERSION = 20240520, 1

HEADER_BYTES = 256 * 4

META_FORMAT = 1


def shard_path(data_dir: str | Path, split: str, index: int) -> Path:
    return Path(data_dir) / f"{split}_{index:06d}.bin"


def shard_header(tokens: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def read_shard(path: str | Path) -> np.ndarray:
    """The tokens of a shard, (N,) uint16, mapped and not read: only what is looked at comes from the disk.

    Raises:
        UserError: the file is missing, no shard, or not as long as its header says.
    """
    try:
        header = np.fromfile(path, dtype="<i4", count=256)
        size = os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; prepare the data again (prepare_data.py)") from error
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        raise UserError(f"{path}: is no token shard; prepare the data again (prepare_data.py --overwrite)")
    tokens = int(header[2])
    if size != HEADER_BYTES + 2 * tokens:
        raise UserError(
            f"{path}: has {size:,} bytes where its {tokens:,} tokens need {HEADER_BYTES + 2 * tokens:,}; it was cut "
            "short or damaged: prepare the data again (prepare_data.py --overwrite)"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))


class ShardWriter:
    """The shards of one split while they grow: each `FILE.partial` until `finish`, and full before the next begins.

    How far a split has come is one number, its tokens: opened with it, a writer drops whatever lies behind.

    Raises:
        UserError: the files hold fewer tokens than they should.
    """

    def __init__(self, data_dir: str | Path, split: str, shard_tokens: int, tokens: int = 0):
        self.data_dir, self.split, self.shard_tokens, self.tokens = Path(data_dir), split, shard_tokens, tokens
        self._file: BinaryIO | None = None
        for path in self.data_dir.glob(f"{split}_*.bin"):  # a run was stopped while it finished
            os.replace(path, self._partial(path))
        for path in sorted(self.data_dir.glob(f"{split}_*.bin.partial")):
            first = int(path.name.removeprefix(f"{split}_").removesuffix(".bin.partial")) * shard_tokens
            if first >= tokens:
                path.unlink()
            elif path.stat().st_size > (size := HEADER_BYTES + 2 * min(shard_tokens, tokens - first)):
                os.truncate(path, size)
        for index in range(self.count):
            path = self._partial(shard_path(data_dir, split, index))
            size = HEADER_BYTES + 2 * min(shard_tokens, tokens - index * shard_tokens)
            if not path.exists() or path.stat().st_size != size:
                raise UserError(f"{path}: is missing or was cut short; prepare the data again (--overwrite)")

    @staticmethod
    def _partial(path: Path) -> Path:
        return path.with_name(path.name + ".partial")

    @property
    def count(self) -> int:
        """Shards begun."""
        return -(-self.tokens // self.shard_tokens)

    def write(self, tokens: np.ndarray) -> None:
        """Append (N,) uint16. By `write`, as a full disk is an error here, and the end of the process with a memmap."""
        while len(tokens):
            index, filled = divmod(self.tokens, self.shard_tokens)
            if self._file is None:
                path = self._partial(shard_path(self.data_dir, self.split, index))
                self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (it stays open)
                if filled == 0:
                    self._write(bytes(HEADER_BYTES))  # the header proper comes last: until then this is no shard
            part = tokens[: self.shard_tokens - filled]
            self._write(part.astype("<u2", copy=False).tobytes())
            self.tokens += len(part)
            tokens = tokens[len(part) :]
            if filled + len(part) == self.shard_tokens:
                self.close()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # an unbuffered file may take a part only, and say why at the next one
            view = view[self._file.write(view) :]

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def tail(self, length: int) -> np.ndarray:
        """The last `length` tokens, (length,) uint16."""
        self.close()
        start, parts = self.tokens - length, []
        for index in range(start // self.shard_tokens, self.count):
            skip = max(0, start - index * self.shard_tokens)
            path = self._partial(shard_path(self.data_dir, self.split, index))
            parts.append(np.fromfile(path, "<u2", offset=HEADER_BYTES + 2 * skip))
        return np.concatenate(parts)

    def finish(self) -> list[dict[str, Any]]:
        """Give every shard its header and its name. Returns what meta.json says of them: file, tokens, sha256."""
        self.close()
        entries = []
        for index in range(self.count):
            path = shard_path(self.data_dir, self.split, index)
            tokens = min(self.shard_tokens, self.tokens - index * self.shard_tokens)
            with open(self._partial(path), "r+b") as file:
                file.write(shard_header(tokens))
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._partial(path), path)
            entries.append({"file": path.name, "tokens": tokens, "sha256": sha256(path)})
        return entries


def read_meta(data_dir: str | Path) -> dict[str, Any]:
    """What `meta.json` says of a finished data folder.

    Raises:
        UserError: the folder is missing, empty or not finished, or its meta.json is damaged or of another format.
    """
    folder, command = Path(data_dir), "run prepare_data.py (with the same --data-dir, or the same --preset)"
    if not folder.is_dir():
        raise UserError(f"--data-dir {folder}: there is no such folder; {command} first")
    path = folder / "meta.json"
    if not path.exists():
        state = "is not finished" if any(folder.glob("*.bin*")) else "holds no prepared data"
        raise UserError(f"--data-dir {folder}: {state} (no meta.json); {command}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != META_FORMAT:
            raise UserError(f"{path}: format {meta['format']}, where this version reads {META_FORMAT}; {command}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as meta.json ({error}); {command} --overwrite") from error
    return meta


def verify(data_dir: str | Path) -> None:
    """Check every shard's content against the SHA-256 in meta.json.

    Raises:
        UserError: a shard is missing, or not what prepare_data.py wrote.
    """
    shards = [shard for split in read_meta(data_dir)["splits"].values() for shard in split["shards"]]
    for shard in tqdm(shards, desc="verifying shards", unit="shard", leave=False, disable=None):
        path = Path(data_dir) / shard["file"]
        read_shard(path)
        if sha256(path) != shard["sha256"]:
            raise UserError(f"{path}: is damaged (its SHA-256 is not meta.json's); run prepare_data.py --overwrite")
