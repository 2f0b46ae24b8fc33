"""What a training process computes with: device, precision, processes, compilation, memory, signals.

    make_machine      device, dtype, and this process's place among those that torchrun started
    training_model    the model as the iterations call it: compiled, shared among processes
    MicroBatch        smaller micro-steps when memory runs out
    catch_signals     Ctrl-C and SIGTERM as a request to stop

`resolve_device` and `resolve_dtype` serve generating, too.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import TrainConfig
from internals import cpu_kernels
from internals.start import UserError
from model import GPT

T = TypeVar("T")

# ----------------------------------------------------------------------------------------------------------------------
# Device, dtype, processes


class Outcome(NamedTuple):
    """What the device computed in an iteration, for all processes together."""

    losses: list[float]  # of all micro-steps, in the order of their windows: of process 0 first in each micro-step
    grad_norm: float
    stop: bool  # a process was asked to stop


@dataclass(frozen=True)
class Machine:
    """Where this process computes, in which precision, and which of the processes it is."""

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
        return f"{self.device.type} ({torch.get_num_threads()} threads)"

    @property
    def is_main(self) -> bool:
        """Process 0 alone prints and writes."""
        return self.rank == 0

    def describe(self) -> dict[str, Any]:
        """What the rounding of a run depends on besides its configuration. last.pt keeps it, resuming compares it."""
        return {
            "device": self.device.type if self.device.type != "cuda" else self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "processes": self.processes,
            "torch": str(torch.__version__),
        }

    def print(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)  # leaves a progress bar whole

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision (Micikevicius et al., 2018): matrix products in `dtype`; weights, sums and loss in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def to_device(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Windows (B, T + 1) -> inputs (B, T) and their targets (B, T), the next tokens, on the device."""
        tokens = torch.from_numpy(windows)
        if self.device.type == "cuda":  # from pinned memory the copy runs beside the computation
            tokens = tokens.pin_memory()
        tokens = tokens.to(self.device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]

    def gather(self, values: Tensor) -> Tensor:
        """(N,) of this process -> (processes, N) of all."""
        if self.processes == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.processes)]
        dist.all_gather(parts, values)
        return torch.stack(parts)

    def wait(self, losses: Tensor, grad_norm: Tensor, stop: bool) -> Outcome:
        """Wait for the device, and for the other processes. `losses` (micro-steps,) are this process's."""
        row = torch.cat([losses, torch.stack([grad_norm, torch.full_like(grad_norm, stop)])])
        *losses, grad_norms, stops = self.gather(row).T.tolist()  # (micro-steps + 2, processes)
        return Outcome([loss for micro_step in losses for loss in micro_step], grad_norms[0], any(stops))


def make_machine(cfg: TrainConfig) -> Machine:
    """What this process computes with. Under torchrun, joins the other processes, too.

    Raises:
        UserError: there is no such device, or fewer GPUs than processes.
    """
    device = resolve_device(cfg.device)
    rank, processes = place_among_processes()
    if processes > 1:
        device = join_processes(device)
    dtype, reason = resolve_dtype(cfg.dtype, device)
    if processes > 1:
        dtypes = [dtype] * processes
        dist.all_gather_object(dtypes, dtype)
        if len(set(dtypes)) > 1:
            dtype, reason = torch.float32, "the processes' devices differ in their fastest one"
    torch.set_float32_matmul_precision("high")  # float32 products on tensor cores (TF32), where there are any
    return Machine(device, dtype, reason, rank, processes)


def place_among_processes() -> tuple[int, int]:
    """(rank, number of processes), as torchrun tells them by the environment; (0, 1) without torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in os.environ]
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(given):
        return 0, 1
    missing = [name for name in names if name not in given]
    numbers = [os.environ.get(name, "") for name in names[:3]]
    if missing or not all(number.isdecimal() for number in numbers):
        raise UserError(
            f"the environment has {' '.join(f'{name}={os.environ[name]}' for name in given)}"
            + (f", but no {' and no '.join(missing)}" if missing else "")
            + "; start several processes with torchrun, or unset these for one"
        )
    return int(numbers[0]), int(numbers[1])


def join_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun started. Returns this process's own device."""
    if device.type == "mps":
        raise UserError("--device mps: several processes need cuda or cpu")
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc-per-node: process {local_rank + 1} of this machine finds no GPU of its own, there "
                f"are {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # The functions of this module have the process group as a default argument from the moment of import. PyTorch
    # imports it later by itself. The group would then live as long as the module, and so would the group's threads,
    # which may abort the process while Python goes down. Imported before there is a group, it holds none.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def resolve_device(name: str) -> torch.device:
    """The device for `--device`. Raises UserError if this machine, or this PyTorch, has no such device."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch {torch.__version__} finds none here; take --device auto")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device, generating: bool = False) -> tuple[torch.dtype, str]:
    """The dtype for `--dtype` on a device, and the reason for it.

    `auto` follows from the hardware alone, so that the same command always computes the same numbers. What counts on a
    CPU is the speed of large matrix products in training, and the speed of reading a matrix in generating.

    Raises:
        UserError: float16 on a CPU, which is a hundred times slower than float32.
    """
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            raise UserError("--dtype float16: CPUs are a hundred times slower in it; take bfloat16 or float32")
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        # is_bf16_supported() also says yes to GPUs that only emulate it: ask for the hardware's generation.
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor} has it"
        return torch.float16, f"compute capability {major}.{minor} has no bfloat16"
    if device.type == "cpu":
        cpu = cpu_kernels.capabilities()
        # Without AMX, Intel's vector instructions for bfloat16 speed up large products, but not reading (not measured).
        if cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and (cpu_kernels.is_amd() or not generating)):
            return torch.bfloat16, "this CPU has instructions for it"
        return torch.float32, "this CPU is not known to be faster in bfloat16"
    return torch.float32, "the safe choice on this device"


# ----------------------------------------------------------------------------------------------------------------------
# Compilation


def training_model(model: GPT, cfg: TrainConfig, machine: Machine) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """The model as the iterations call it, compiled and shared among the processes, and a word on compiling.

    `model` itself stays as it is: evaluating, sampling and saving use that one.
    """
    forward: Any = model
    compiling = "off"
    if cfg.compile == "on" or (cfg.compile == "auto" and machine.device.type == "cuda"):
        forward, compiling = try_compile(model, cfg, machine)
    if machine.processes > 1:
        devices = [machine.device] if machine.device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=devices)
    return forward, compiling


def try_compile(model: GPT, cfg: TrainConfig, machine: Machine) -> tuple[Any, str]:
    """The compiled model, tried in a forward and a backward pass. If that fails in any process: `model`, and why.

    A compiler that fails costs the run its speed-up, nothing else.
    """
    compiled: Any = torch.compile(model, dynamic=False)
    reason = ""
    try:
        # In the layout of a real batch: another one would be compiled again
        inputs, targets = machine.to_device(np.zeros((cfg.batch_size, cfg.model.block_size + 1), dtype=np.int64))
        with machine.autocast():
            loss = compiled(inputs, targets)
        loss.backward()
    except Exception as error:  # the many parts of a compiler have no common base for what they raise
        if not is_out_of_memory(error):  # the iterations meet it again, and MicroBatch deals with it
            reason = type(error).__name__
    model.zero_grad()
    failed = machine.gather(torch.tensor([float(bool(reason))], device=machine.device)).any().item()
    return (model, f"off, since it failed here ({reason or 'in another process'})") if failed else (compiled, "on")


# ----------------------------------------------------------------------------------------------------------------------
# Memory


class MicroBatch:
    """How many sequences a micro-step has: `--batch-size`, or what fits into memory, once that has run out.

    Smaller micro-steps are more micro-steps, so the iteration stays the same, and so does the run.
    """

    def __init__(self, size: int, model: GPT, machine: Machine):
        self.size, self.model, self.machine = size, model, machine

    def retry_smaller(self, compute: Callable[..., T], *args: Any) -> T:
        """`compute(size, *args)`. When memory runs out, the same again with half the size, or the next smaller divisor.

        A failed attempt leaves no trace in gradients and random numbers.

        Raises:
            UserError: a single sequence is too much, or several processes would have to agree on the smaller size.
        """
        random = random_state(self.machine.device)
        while True:
            try:
                return compute(self.size, *args)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.machine.processes > 1 or self.size == 1:
                    advice = "--batch-size" if self.size > 1 else "--block-size or a smaller model"
                    raise UserError(f"out of memory at --batch-size {self.size}; take a smaller {advice}") from error
            self._shrink()  # after the except block, which keeps the tensors of the failed attempt alive
            set_random_state(random, self.machine.device)

    def _shrink(self) -> None:
        smaller = next(n for n in range(self.size // 2, 0, -1) if self.size % n == 0)
        self.machine.print(
            f"Out of memory: micro-steps of {smaller} sequences from here on, not {self.size}; the same run."
        )
        self.size = smaller
        self.model.zero_grad()
        if self.machine.device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has an exception of its own for it. The CPU and MPS raise a RuntimeError that says so."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


class Memory(NamedTuple):
    """Bytes. None where the system does not tell."""

    peak: int | None
    total: int | None


def peak_memory(machine: Machine) -> Memory:
    """A GPU's memory, by PyTorch's allocator; on a CPU this process's, and the machine's."""
    if machine.device.type == "cuda":
        total = torch.cuda.get_device_properties(machine.device).total_memory
        return Memory(torch.cuda.max_memory_reserved(machine.device), total)
    try:
        import resource  # not on Windows
    except ImportError:
        return Memory(None, None)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if machine.device.type == "cpu" else None
    return Memory(peak, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


# ----------------------------------------------------------------------------------------------------------------------
# Random numbers


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


# ----------------------------------------------------------------------------------------------------------------------
# Stopping: by a signal, or because another process stopped


@contextlib.contextmanager
def catch_signals(machine: Machine) -> Iterator[threading.Event]:
    """An event that SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal has gone) set: the run then saves and ends after
    the iteration. A second signal of the same kind ends it at once. A signal that was ignored before stays so (`nohup`).
    """
    stop = threading.Event()

    def handler(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)
        if machine.is_main:
            with contextlib.suppress(OSError):  # os.write, since a signal may arrive in the middle of a print
                os.write(2, b"\nStopping: this iteration is finished and saved first. Once more to stop at once.\n")

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def is_lost_process(error: RuntimeError) -> bool:
    """NCCL and the store have exceptions of their own for it. Gloo raises a RuntimeError that names its source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
