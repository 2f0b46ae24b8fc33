"""The checkpoint format: save atomically, load safely, rebuild a model."""

import contextlib
import os
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch.overrides import TorchFunctionMode

from config import GenerateConfig, ModelConfig
from internals.files import sync_folder
from internals.machine import fastest_dtype, resolve_device, resolve_dtype
from internals.start import UserError
from internals.text_stream import say
from internals.tokenizer import load_tokenizer
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


def load_model(config: GenerateConfig) -> tuple[GPT, tiktoken.Encoding]:
    """The checkpoint's model, on the device and in the dtype asked for, and its tokenizer."""
    saved = load(config.checkpoint)
    tokenizer = load_tokenizer(saved["tokenizer"])
    model = build_model(saved)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise UserError(
            f"{config.checkpoint}: is damaged: its model has {model.config.vocab_size:,} tokens, its tokenizer "
            f"({saved['tokenizer']}) {tokenizer.n_vocab:,}"
        )
    device = resolve_device(config.device)
    if config.dtype == "auto":
        dtype, why = fastest_dtype(device)
    else:
        dtype, why = resolve_dtype(config.dtype, device)
    size, name = model.num_parameters()["total"] / 1e6, str(dtype).removeprefix("torch.")
    say(
        f"{config.checkpoint}: {size:.1f} million parameters, iteration {saved['iter']:,}; on {device} in {name} ({why})"
    )
    return model.to(device, dtype), tokenizer
