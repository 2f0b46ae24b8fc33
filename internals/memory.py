"""Running out of memory, the peak memory of a run, and the random state that a new attempt starts from."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from internals.device import held_by_others
from internals.machine import Machine, OutOfMemoryElsewhere
from internals.screen import plural
from internals.start import UserError, first_line
from model import GPT

T = TypeVar("T")


class MicroBatch:
    """The number of sequences in a micro-step: `--batch-size`, or fewer once memory has run out.

    There are more micro-steps when they are smaller, so the iteration has the same text. Its gradient differs by
    rounding, and with dropout by other random masks. The size is the same in all processes: if one runs out of memory,
    all take smaller micro-steps.
    """

    def __init__(self, size: int, model: GPT, machine: Machine):
        self.size, self.model, self.machine = size, model, machine

    def retry_smaller(self, compute: Callable[..., T], *args: Any) -> T:
        """`compute(size, *args)`. When memory runs out, tries again with half the size, or the next smaller divisor.

        A failed attempt leaves no trace in gradients and random numbers, so `compute` must not change the optimizer. All
        processes call this together, and `compute` calls `machine.confirm_memory` before each exchange.

        Raises:
            UserError: a single sequence is too much, or other programs fill the card.
        """
        random = random_state(self.machine.device)
        while True:
            try:
                return compute(self.size, *args)
            except (RuntimeError, MemoryError) as error:
                # A failed exchange is not repeated: the others may have completed theirs
                if isinstance(error, dist.DistError) or not is_out_of_memory(error):
                    raise
                if not isinstance(error, OutOfMemoryElsewhere):
                    self.machine.deny_memory()
                    # If others hold more than this share of the card, smaller micro-steps do not help
                    if others := held_by_others(0.5 if self.size == 1 else 0.9):
                        raise UserError(f"out of memory: {others}") from error
                if self.size == 1:
                    raise UserError(
                        "out of memory at --batch-size 1; only a run with a smaller --block-size or model would fit"
                    ) from error
            self._shrink()  # after the except block, which keeps the tensors of the failed attempt alive
            set_random_state(random, self.machine.device)

    def _shrink(self) -> None:
        smaller = next(n for n in range(self.size // 2, 0, -1) if self.size % n == 0)
        self.machine.print(
            f"Out of memory: micro-steps now have {plural(smaller, 'sequence')}, not {self.size}, of the same text."
        )
        self.size = smaller
        self.model.zero_grad()
        if self.machine.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.machine.device)  # only the peak of the size that fits counts


def is_out_of_memory(error: Exception) -> bool:
    """CUDA and Python have exceptions of their own for it. The CPU and MPS raise a RuntimeError that says so."""
    words = (
        "out of memory", "can't allocate memory", "not enough memory",
        "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "Storage size calculation overflowed",
        "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # on a card that others fill
        "Invalid buffer size",  # mps: larger than Metal allows
    )  # fmt: skip
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


@contextlib.contextmanager
def enough_memory(message: str) -> Iterator[None]:
    """Turn the errors for too little memory into a UserError: `MESSAGE (REASON)`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(f"{message} ({first_line(error)})") from error
        raise


class Memory(NamedTuple):
    """Bytes."""

    peak: int
    total: int


def peak_memory(machine: Machine) -> Memory | None:
    """On a GPU, the peak of PyTorch's allocator and the card's memory; on a CPU, this process's and the machine's.
    None on mps and on Windows, which do not tell."""
    if machine.device.type == "cuda":
        total = torch.cuda.get_device_properties(machine.device).total_memory
        return Memory(torch.cuda.max_memory_reserved(machine.device), total)
    if machine.device.type != "cpu" or os.name == "nt":
        return None
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Memory(peak, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
