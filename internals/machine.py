"""The machine of a training process: device, precision, and its place among the processes of the run."""

import contextlib
import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from config import TrainConfig
from internals.device import limit_threads, resolve_device, resolve_dtype
from internals.processes import any_process, join_processes, place_among_processes, require_same
from internals.screen import plural, printable

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # numbers of mallopt's parameters, from glibc's malloc.h


class Outcome(NamedTuple):
    """The results of an iteration, of all processes together."""

    losses: list[float]  # of all micro-steps, in the order of their windows: in each micro-step, process 0 first
    grad_norm: float
    stop: bool  # a process was asked to stop


class OutOfMemoryElsewhere(MemoryError):
    """Another process ran out of memory, so this one must give up the same attempt."""


@dataclass(frozen=True)
class Machine:
    """This process's device, precision, and rank among the processes."""

    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    rank: int
    processes: int

    @property
    def name(self) -> str:
        """The GPU's name, or the kind of device and its threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} ({plural(torch.get_num_threads(), 'thread')})"

    @property
    def is_main(self) -> bool:
        """Process 0 alone prints and writes."""
        return self.rank == 0

    def describe(self) -> dict[str, Any]:
        """What a run's exact numbers depend on, besides its configuration. last.pt stores it, and resuming compares it."""
        return {
            "device": self.device.type if self.device.type != "cuda" else self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "processes": self.processes,
            "torch": str(torch.__version__),
            "numpy": np.__version__,  # draws the order of the text, which a version may change
        }

    def print(self, text: str) -> None:
        if self.is_main:
            tqdm.write(printable(text))  # leaves a progress bar whole

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision (Micikevicius et al., 2018): matrix products in `dtype`; weights, sums and loss in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def to_device(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Windows (B, T + 1) -> inputs (B, T) and their targets (B, T), the next tokens, on the device."""
        tokens = torch.from_numpy(windows)
        if self.device.type == "cuda":  # from pinned memory the copy overlaps with the computation
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        else:  # an asynchronous copy to mps may read the memory after it was freed
            tokens = tokens.to(self.device)
        return tokens[:, :-1], tokens[:, 1:]

    @property
    def or_float32(self) -> str:
        """More advice against a loss that is not finite; empty if the run computes in float32 already."""
        return "" if self.dtype == torch.float32 else ", or give --dtype float32"

    def gather(self, values: Tensor) -> Tensor:
        """(N,) of this process -> (processes, N) of all, on the CPU. Waits for the device and the other processes."""
        values = values.cpu()
        if self.processes == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.processes)]
        dist.all_gather(parts, values)
        return torch.stack(parts)

    def wait(self, losses: Tensor, grad_norm: Tensor, stop: bool) -> Outcome:
        """Wait for the device, and for the other processes. `losses` (micro-steps,) are this process's."""
        on_device = torch.cat([losses, grad_norm[None]])
        row = torch.cat([on_device.cpu(), torch.tensor([float(stop)])])
        *losses, grad_norms, stops = self.gather(row).T.tolist()  # (micro-steps + 2, processes)
        return Outcome([loss for micro_step in losses for loss in micro_step], grad_norms[0], any(stops))

    def confirm_memory(self) -> None:
        """Tell the others that memory was enough so far. Waits until all processes say so, but not for the device.

        Each exchange that is part of an attempt (`MicroBatch`) comes after this, and nothing after the last one allocates
        memory. So a process that has run out finds the others here, and none waits in an exchange for a process that has
        given up.

        Raises:
            OutOfMemoryElsewhere: another process has called `deny_memory` instead.
        """
        if self.processes > 1 and any_process(False):
            raise OutOfMemoryElsewhere("out of memory in another process")

    def deny_memory(self) -> None:
        """Tell the others that this process ran out of memory. They learn it in `confirm_memory`."""
        if self.processes > 1:
            any_process(True)

    def sum_gradients(self, model: nn.Module) -> None:
        """Replace each gradient by its sum over the processes, all in one all-reduce.

        This takes the place of PyTorch's DistributedDataParallel, which cannot stop half-way: it exchanges gradients while
        others are computed, and a process that runs out of memory then leaves the others waiting. docs/training.md says
        what that costs.
        """
        if self.processes == 1:
            return
        parameters = list(model.parameters())
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        self.confirm_memory()
        dist.all_reduce(flat)
        for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = total.view_as(parameter)

    def share_weights(self, model: nn.Module) -> None:
        """Give every process the weights of process 0: another kind of CPU may draw weights that differ in a bit."""
        if self.processes > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.detach(), src=0)


def make_machine(cfg: TrainConfig) -> Machine:
    """This process's machine. Under torchrun, also joins the other processes.

    Raises:
        UserError: there is no such device, or fewer GPUs than processes, or some train and some only evaluate.
    """
    device = resolve_device(cfg.device)
    rank, processes = place_among_processes()
    if processes > 1:
        device = join_processes(device)
        require_same({"eval_only": cfg.eval_only})  # which exchanges other things than training
    limit_threads()
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        stay_on_card(device)
    dtype, reason = resolve_dtype(cfg.dtype, device)
    if processes > 1:
        dtypes = [dtype] * processes
        dist.all_gather_object(dtypes, dtype)
        if len(set(dtypes)) > 1:
            dtype, reason = torch.float32, "the processes' devices have different fastest dtypes"
    torch.set_float32_matmul_precision("high")  # float32 products on tensor cores (TF32), where there are any
    return Machine(device, dtype, reason, rank, processes)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensors, unless an environment variable for its malloc is set.

    It would return large tensors to Linux. Those of the next iteration would then come page by page, each filled with zeros
    first. That took a tenth of the time (docs/experiments.md).
    """
    if (
        sys.platform == "linux"
        and platform.libc_ver()[0] == "glibc"
        and not any(name.startswith("MALLOC_") for name in os.environ)
    ):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # no mappings of their own, which are returned when they are freed
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # nothing at the end of the heap is returned, either


def stay_on_card(device: torch.device) -> None:
    """On Windows and in WSL, limit PyTorch to the memory of the card that is free now.

    The driver there gives a process that needs more some of the computer's own memory: nothing fails, and training
    becomes many times slower. With the limit, PyTorch runs out of memory instead, and `MicroBatch` handles that.
    """
    if platform.system() == "Windows" or "microsoft" in platform.release().lower():
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)  # what this process has taken already
        torch.cuda.set_per_process_memory_fraction(free / total)  # of the process's card; "cuda" has no number
