"""The contract between preparing and training: tokenizers by name, the shard format, and the order of batches.

A data folder holds, for each split (train, val), shards `train_000000.bin ...` in the layout of llm.c (Karpathy, 2024;
modded-nanogpt reads it too): 256 little-endian int32 (magic, version, token count, zeros), then so many uint16 tokens.
`meta.json` is written last of all: a folder without it is not finished.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tiktoken
import tiktoken_ext.openai_public
from tqdm import tqdm

from config import UserError

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
META_FORMAT = 1
END_OF_TEXT = "<|endoftext|>"

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

# GPT-2's pattern, which cuts a text into the pieces that are encoded one by one, with a bracket around all that does not
# look ahead: tiktoken's engine of regular expressions (fancy-regex) hands such a part to an automaton, and walks through
# the rest step by step. The pieces are the same, and encoding takes two thirds of the time.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"


@functools.cache
def load_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer of that name: `gpt2` (50,257 tokens) or `bytes` (the 256 bytes and end-of-text; no download).

    Raises:
        UserError: no tokenizer has that name, or GPT-2's vocabulary can neither be fetched nor found on this machine.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]+",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    if name == "gpt2":
        try:
            # The same ranks and special token as those of "gpt2", in one file, loaded five times faster.
            encoding = tiktoken_ext.openai_public.r50k_base()
        except Exception as error:  # requests' and tiktoken's own errors have no common base
            raise UserError(
                f"the gpt2 tokenizer's vocabulary could not be fetched ({type(error).__name__}). Go online once, or "
                "point TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bytes"
            ) from error
        return tiktoken.Encoding(**{**encoding, "pat_str": GPT2_PATTERN})
    raise UserError(f"no tokenizer is called {name!r}: there are gpt2 and bytes")


# ----------------------------------------------------------------------------------------------------------------------
# Shards


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


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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


def write_json(path: str | Path, value: Any) -> None:
    """Write atomically: the file has all of the old content or all of the new, whenever the power fails."""
    partial = Path(f"{path}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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


# ----------------------------------------------------------------------------------------------------------------------
# Reading a split


class TokenStream:
    """The shards of a split as one long row of tokens."""

    def __init__(self, shards: Sequence[np.ndarray]):
        self.shards = shards
        self.starts = np.cumsum([0, *(len(shard) for shard in shards)])

    @classmethod
    def open(cls, data_dir: str | Path, split: str) -> "TokenStream":
        """The split's shards, each checked for its size.

        Raises:
            UserError: a shard is missing, damaged, or not as long as meta.json says.
        """
        shards = []
        for entry in read_meta(data_dir)["splits"][split]["shards"]:
            path = Path(data_dir) / entry["file"]
            shards.append(read_shard(path))
            if len(shards[-1]) != entry["tokens"]:
                raise UserError(
                    f"{path}: holds {len(shards[-1]):,} tokens where meta.json says {entry['tokens']:,}; "
                    "prepare the data again (prepare_data.py --overwrite)"
                )
        return cls(shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens `start` to `start + length`, (length,) uint16, across the borders of shards."""
        parts = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while length > 0:
            local = start - int(self.starts[shard])
            part = self.shards[shard][local : local + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return np.concatenate(parts)


class TrainingWindows:
    """The order in which training visits a split: a pure function of (seed, sequence number).

    A window is `block_size + 1` neighbouring tokens: the first `block_size` are inputs, the last `block_size` their
    targets. Every epoch visits every window once, in a fresh permutation and from a fresh offset, so that windows are
    cut differently each time. Nothing has to be saved to go on after a stop, and nothing to be skipped; which numbers
    are whose (iteration, micro-step, process) is the caller's arithmetic, so 1 or 8 processes visit the same windows.

    Raises:
        UserError: the split is shorter than two windows.
    """

    def __init__(self, stream: TokenStream, block_size: int, seed: int):
        self.stream, self.block_size, self.seed = stream, block_size, seed
        self.per_epoch = (len(stream) - block_size) // block_size  # as many as fit behind the largest offset
        if self.per_epoch < 1:
            raise UserError(
                f"the training split has {len(stream):,} tokens, too few for --block-size {block_size}; prepare more "
                "text, or take a smaller --block-size"
            )
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)  # a batch may straddle two epochs

    def _epoch_order(self, epoch: int) -> tuple[int, np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        offset = int(rng.integers(self.block_size))
        return offset, rng.permutation(np.arange(self.per_epoch, dtype=np.uint32))

    def start(self, number: int) -> int:
        """Where in the split the window with this sequence number begins, in tokens."""
        epoch, place = divmod(number, self.per_epoch)
        offset, order = self._order(epoch)
        return offset + int(order[place]) * self.block_size

    def batch(self, numbers: Sequence[int]) -> np.ndarray:
        """The windows with these sequence numbers, (len(numbers), block_size + 1) int64."""
        return np.stack([self.stream.read(self.start(n), self.block_size + 1) for n in numbers]).astype(np.int64)


class ValidationWindows:
    """The windows that every evaluation uses: the whole split, or where that has more than `eval_tokens`, so many
    windows at equal distances all through it.

    Raises:
        UserError: the split is shorter than a window.
    """

    def __init__(self, stream: TokenStream, block_size: int, eval_tokens: int):
        self.stream, self.block_size = stream, block_size
        available = (len(stream) - 1) // block_size
        if available < 1:
            raise UserError(
                f"the validation split has {len(stream):,} tokens, too few for --block-size {block_size}; prepare with "
                "a larger --val-fraction, or take a smaller --block-size"
            )
        self.count = min(available, max(1, eval_tokens // block_size))
        self.available = available

    def __len__(self) -> int:
        return self.count

    def batch(self, first: int, last: int) -> np.ndarray:
        """Windows `first` to `last - 1`, (last - first, block_size + 1) int64."""
        starts = [n * self.available // self.count * self.block_size for n in range(first, last)]
        return np.stack([self.stream.read(start, self.block_size + 1) for start in starts]).astype(np.int64)
