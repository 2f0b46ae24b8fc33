"""Windows of a split: which tokens a training step or an evaluation sees."""

import bisect
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from internals.shards import AGAIN, read_meta, read_shard
from internals.start import UserError


class TokenStream:
    """The shards of a split as one sequence of tokens. All ids are below `vocab_size`, unless a shard is damaged."""

    def __init__(self, shards: Sequence[np.ndarray], vocab_size: int = 2**16, name: str = ""):
        self.shards = [np.asarray(shard) for shard in shards]  # slicing an np.memmap itself takes ten times as long
        self.vocab_size, self.name = vocab_size, name
        self.starts = [0, *itertools.accumulate(len(shard) for shard in shards)]

    @classmethod
    def open(cls, data_dir: str | Path, split: str) -> "TokenStream":
        """A split of a finished data folder. Each shard is checked for its size."""
        shards, meta = [], read_meta(data_dir)
        for entry in meta["splits"][split]["shards"]:
            path = Path(data_dir) / entry["file"]
            shards.append(read_shard(path))
            if len(shards[-1]) != entry["tokens"]:
                raise UserError(
                    f"{path}: holds {len(shards[-1]):,} tokens, but meta.json says {entry['tokens']:,}; {AGAIN}"
                )
        return cls(shards, meta["vocab_size"], str(data_dir))

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens `start` to `start + length - 1`, (length,) uint16, across the borders of shards. Read-only."""
        parts = []
        shard = bisect.bisect_right(self.starts, start) - 1
        while length > 0:
            local = start - self.starts[shard]
            part = self.shards[shard][local : local + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Epoch(NamedTuple):
    offset: int  # tokens of the split before its first window
    order: np.ndarray  # (per_epoch,) uint32: a permutation of the windows


class TrainingWindows:
    """The order in which training visits a split: a pure function of the seed and a window's id.

    A window is `block_size + 1` neighbouring tokens. The first `block_size` are inputs, the last `block_size` are their
    targets. Every epoch visits every window once, in a new permutation and from a new offset, so the text is cut
    differently each time. An id counts windows from the start of training, across epochs. The caller maps iteration,
    micro-step and process to ids, so a resumed run has nothing to skip, and 1 or 8 processes visit the same windows.
    """

    def __init__(self, stream: TokenStream, block_size: int, seed: int):
        self.stream, self.block_size, self.seed = stream, block_size, seed
        self.per_epoch = (len(stream) - block_size) // block_size  # windows that fit after the largest offset
        if self.per_epoch < 1:
            raise UserError(
                f"the training split has {len(stream):,} tokens, too few for --block-size {block_size}; prepare more "
                "text, or take a smaller --block-size"
            )
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)  # 2: a batch may cross from one to the next

    @property
    def epoch_tokens(self) -> int:
        """Tokens that an epoch reads."""
        return self.per_epoch * self.block_size

    def _make_epoch(self, number: int) -> Epoch:
        rng = np.random.default_rng([self.seed, number])
        offset = int(rng.integers(self.block_size))
        return Epoch(offset, rng.permutation(np.arange(self.per_epoch, dtype=np.uint32)))

    def start(self, window_id: int) -> int:
        """Where in the split a window begins, in tokens."""
        number, place = divmod(window_id, self.per_epoch)
        epoch = self._epoch(number)
        return epoch.offset + int(epoch.order[place]) * self.block_size

    def batch(self, window_ids: Sequence[int]) -> np.ndarray:
        """Windows with these ids, (len(window_ids), block_size + 1) int64."""
        return read_windows(self.stream, [self.start(window_id) for window_id in window_ids], self.block_size)


class ValidationWindows:
    """The windows of every evaluation: all of the split's, or evenly spaced ones if it has more than `eval_tokens`.

    Raises:
        UserError: the split or `eval_tokens` is shorter than a window.
    """

    def __init__(self, stream: TokenStream, block_size: int, eval_tokens: int):
        self.stream, self.block_size = stream, block_size
        self.available = (len(stream) - 1) // block_size
        if self.available < 1:
            raise UserError(
                f"the validation split has {len(stream):,} tokens, too few for --block-size {block_size}; prepare with "
                "a larger --val-fraction, or train with a smaller --block-size"
            )
        if eval_tokens < block_size:  # --eval-only gets here unchecked: its block_size is the checkpoint's
            raise UserError(f"--eval-tokens {eval_tokens}: must hold at least one window of --block-size {block_size}")
        self.count = min(self.available, eval_tokens // block_size)

    def __len__(self) -> int:
        return self.count

    @property
    def tokens(self) -> int:
        """Tokens that an evaluation predicts."""
        return self.count * self.block_size

    def batch(self, first: int, last: int) -> np.ndarray:
        """Windows `first` to `last - 1`, (last - first, block_size + 1) int64."""
        starts = [n * self.available // self.count * self.block_size for n in range(first, last)]
        return read_windows(self.stream, starts, self.block_size)


def read_windows(stream: TokenStream, starts: Sequence[int], block_size: int) -> np.ndarray:
    windows = np.stack([stream.read(start, block_size + 1) for start in starts])
    if windows.max() >= stream.vocab_size:  # on a GPU it would be an assertion that names no cause
        raise UserError(
            f"{stream.name}: has token {windows.max()}, but a vocabulary of {stream.vocab_size}, so a shard is damaged; "
            "train.py --check with the same --data-dir says which"
        )
    return windows.astype(np.int64)
