"""What a training process computes with, and what may fail on one machine and not on another.

Machine          device, precision, and this process's place among those that torchrun started
make_forward     the model as the iterations call it: shared among processes, compiled where that works
fit              smaller micro-batches where memory runs out
catch_signals    Ctrl-C and SIGTERM as a wish to stop
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

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
# The processes, and what each computes with


@dataclass(frozen=True)
class Machine:
    """Where this process computes and in which precision, and which of the processes that torchrun started it is."""

    device: torch.device
    dtype: torch.dtype
    why: str  # this dtype
    rank: int
    processes: int

    @property
    def name(self) -> str:
        """The GPU's name, or the kind of device and its threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} ({torch.get_num_threads()} threads)"

    def describe(self) -> dict[str, Any]:
        """What the rounding of a run depends on beside its configuration: kept in `last.pt`, compared on resuming."""
        return {
            "device": self.device.type if self.device.type != "cuda" else self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "processes": self.processes,
            "torch": str(torch.__version__),
        }

    @property
    def is_main(self) -> bool:
        """Process 0 alone prints and writes."""
        return self.rank == 0

    def print(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)  # which leaves a progress bar whole

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision (Micikevicius et al., 2018): matrix products in `dtype`; weights, sums and loss in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def gather(self, values: Tensor) -> Tensor:
        """(N,) of this process -> (processes, N) of all."""
        if self.processes == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.processes)]
        dist.all_gather(parts, values)
        return torch.stack(parts)

    def windows(self, array: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B, T + 1) windows -> inputs (B, T) and the targets (B, T) one token on, on the device."""
        tokens = torch.from_numpy(array)
        if self.device.type == "cuda":  # from pinned memory the copy runs beside the computation
            tokens = tokens.pin_memory()
        tokens = tokens.to(self.device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]


def make_machine(cfg: TrainConfig) -> Machine:
    """What this process computes with. Under torchrun, joins the other processes too.

    Raises:
        UserError: there is no such device, or fewer GPUs than processes.
    """
    device = resolve_device(cfg.device)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
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
        # Its functions have the process group as a default argument, from when they are imported. PyTorch's own imports
        # come to that later, and the group would then live as long as the module: its threads, too, which may abort the
        # process while Python goes down. Imported before there is a group, it holds none.
        importlib.import_module("torch.distributed.nn.functional")

        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype, why = resolve_dtype(cfg.dtype, device)
    if processes > 1:
        dtypes = [dtype] * processes
        dist.all_gather_object(dtypes, dtype)
        if len(set(dtypes)) > 1:
            dtype, why = torch.float32, "the processes' devices differ in their fastest one"
    torch.set_float32_matmul_precision("high")  # float32 products on tensor cores (TF32), where there are such
    return Machine(device, dtype, why, rank, processes)


def resolve_device(name: str) -> torch.device:
    """The device for `--device`. Raises UserError where this machine, or this PyTorch, has no such device."""
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


def peak_memory(machine: Machine) -> tuple[int | None, int | None]:
    """Bytes in use at the peak, and bytes that there are: of the GPU by PyTorch's allocator, on a CPU of this process and
    of the machine. None where it cannot be told."""
    if machine.device.type == "cuda":
        total = torch.cuda.get_device_properties(machine.device).total_memory
        return torch.cuda.max_memory_reserved(machine.device), total
    try:
        import resource  # not on Windows
    except ImportError:
        return None, None
    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if machine.device.type == "cpu" else None
    return used, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
# Compiling, and memory


def make_forward(model: GPT, cfg: TrainConfig, machine: Machine) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """The model as the iterations call it, compiled and shared among the processes, and a word on compiling. `model`
    itself stays as it is: evaluation and saving use that."""
    forward: Any = model
    compiling = "off"
    if cfg.compile == "on" or (cfg.compile == "auto" and machine.device.type == "cuda"):
        forward, compiling = try_compile(model, cfg, machine)
    if machine.processes > 1:
        forward = DistributedDataParallel(
            forward, device_ids=[machine.device] if machine.device.type == "cuda" else None
        )
    return forward, compiling


def try_compile(model: GPT, cfg: TrainConfig, machine: Machine) -> tuple[Any, str]:
    """The compiled model, tried in a forward and a backward pass. A compiler that fails, in whichever of the processes,
    costs its speed-up, not the run: then it is the model as it was, and why."""
    compiled: Any = torch.compile(model, dynamic=False)
    reason = ""
    try:
        # In the layout of a real batch: another one would be compiled once more
        inputs, targets = machine.windows(np.zeros((cfg.batch_size, cfg.model.block_size + 1), dtype=np.int64))
        with machine.autocast():
            loss = compiled(inputs, targets)
        loss.backward()
    except Exception as error:  # whatever a compiler's many parts may raise
        if not is_out_of_memory(error):  # that one is met again, and dealt with, by the iterations
            reason = type(error).__name__
    model.zero_grad()
    failed = machine.gather(torch.tensor([float(bool(reason))], device=machine.device)).any().item()
    return (model, f"off, since it failed here ({reason or 'in another process'})") if failed else (compiled, "on")


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has an exception of its own for it; the CPU and MPS have a RuntimeError that says so."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def fit(compute: Callable[[int], T], batch_size: int, model: GPT, machine: Machine) -> tuple[T, int]:
    """`compute(batch_size)`, and where memory runs out, the same with smaller micro-batches: half the size each time,
    where that is a whole number. Twice the micro-steps make up for it, so the iteration, and the run, stay the same. A
    failed attempt leaves no trace in gradients and random numbers.

    Returns:
        The result, and the batch size that it was had with.

    Raises:
        UserError: a single sequence is too much, or several processes would have to agree on the smaller size.
    """
    random = random_state(machine.device)
    while True:
        try:
            return compute(batch_size), batch_size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if machine.processes > 1 or batch_size == 1:
                advice = "--batch-size" if batch_size > 1 else "--block-size or a smaller model"
                raise UserError(f"out of memory at --batch-size {batch_size}; take a smaller {advice}") from error
        # Behind the except block, where the failed attempt's tensors are no longer held
        smaller = next(n for n in range(batch_size // 2, 0, -1) if batch_size % n == 0)
        machine.print(
            f"Out of memory: micro-steps of {smaller} sequences from here on, not {batch_size}; the same run."
        )
        batch_size = smaller
        model.zero_grad()
        set_random_state(random, machine.device)
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------------------------
# Stopping: by a signal, or since another process did


@contextlib.contextmanager
def catch_signals(machine: Machine) -> Iterator[threading.Event]:
    """An event that is set when SIGINT (Ctrl-C) or SIGTERM comes: the run then saves and ends after the iteration. The
    same signal a second time ends it at once."""
    stop = threading.Event()

    def handler(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)
        if machine.is_main:  # by os.write, since a signal may come amid a print
            os.write(2, b"\nStopping: this iteration is finished and saved first. Once more to stop at once.\n")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def is_lost_process(error: RuntimeError) -> bool:
    """NCCL and the store have exceptions of their own for it; gloo has a RuntimeError that names its source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
