"""The checkpoint format: save atomically, load safely, rebuild a model.

`best.pt` holds what generating needs: format, model, config, tokenizer, iter, tokens, val_loss, and data, a description
of what it was trained on. `last.pt` holds that and what resuming needs besides: best_val_loss, seconds, machine,
optimizer, scaler, rng (one random state for each process). Tensors and plain values only, so that loading runs no code.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from config import ModelConfig, UserError
from model import GPT

FORMAT = 1
REQUIRED = {"format", "model", "config", "tokenizer", "iter", "tokens", "val_loss"}


def save(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint such that `path` holds the old one or the new one whole, whatever happens meanwhile.

    Raises:
        UserError: the disk is full, or the folder cannot be written to. What was at `path` is still there.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause: BaseException | None = error  # torch's zip writer raises a RuntimeError over the system's own
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        kept = "; the one saved before is kept" if path.exists() else ""
        raise UserError(
            f"{path}: the checkpoint could not be written ({reason}){kept}. Make room and --resume"
        ) from error


def sync_folder(folder: str | Path) -> None:
    """Make a rename in this folder outlive a power cut. Windows has no such call, and needs none."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: str | Path) -> dict[str, Any]:
    """The checkpoint at `path`, its tensors on the CPU. Runs no code from the file.

    Raises:
        UserError: there is none, it is damaged, it is something else, or it has another format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: there is no checkpoint; train one first (train.py), or name another with --checkpoint"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have errors of their own for a damaged or foreign file
        raise UserError(f"{path}: is damaged, or no checkpoint of this project's (it cannot be loaded)") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UserError(f"{path}: is no checkpoint of this project's")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path}: has checkpoint format {checkpoint['format']}, where this version reads {FORMAT}")
    if missing := REQUIRED - checkpoint.keys():
        raise UserError(f"{path}: is damaged (without {', '.join(sorted(missing))})")
    return checkpoint


class SkipInit(TorchFunctionMode):
    """Inside, modules are made without the random initial weights that loading would only replace (0.3 s of them)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return function(*args, **(kwargs or {}))


def build_model(checkpoint: dict[str, Any]) -> GPT:
    """The model of a loaded checkpoint, float32 on the CPU, with dropout as it was trained.

    Raises:
        UserError: its weights and its configuration do not belong together.
    """
    try:
        with SkipInit():
            model = GPT(ModelConfig(**checkpoint["config"]["model"]))
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the checkpoint is damaged: its weights do not fit its configuration ({reason})") from error
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Where a model lives, and in which precision it computes


def resolve_device(name: str) -> torch.device:
    """The device for `--device`. Raises UserError where this machine, or this PyTorch, has no such device."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch {torch.__version__} finds none here; take --device auto")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The arithmetic's dtype for `--dtype` on a device, and why.

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
        speedup = cpu_bfloat16_speedup()
        if speedup > 1.3:
            return torch.bfloat16, f"{speedup:.1f} times as fast as float32 in a matrix product on this CPU"
        return torch.float32, "bfloat16 is not faster on this CPU"
    return torch.float32, "the safe choice on this device"


def cpu_bfloat16_speedup() -> float:
    """How much faster a matrix product is in bfloat16 than in float32, measured here in a few milliseconds."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(torch.float32) / seconds(torch.bfloat16)
