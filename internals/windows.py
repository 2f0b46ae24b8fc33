"""Reading a split: the token stream, and the windows of training and validation."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from internals.shards import read_meta, read_shard
from internals.start import UserError


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
