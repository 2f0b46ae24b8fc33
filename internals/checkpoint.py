"""The checkpoint format: save atomically, load safely, rebuild a model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch.overrides import TorchFunctionMode

from config import ModelConfig
from internals.files import atomic_write, writing
from internals.start import UserError, first_line
from internals.tokenizer import load_tokenizer
from model import GPT

FORMAT = 1

REQUIRED = {"format", "model", "config", "tokenizer", "iter", "tokens", "val_loss"}


def save(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint. At every moment `path` holds the old one or the new one, whole."""
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load(path: str | Path) -> dict[str, Any]:
    """Read the checkpoint at `path`, with its tensors on the CPU. Runs no code from the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: there is no checkpoint; train one first (train.py), or name another with --checkpoint"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own errors for a damaged or foreign file
        raise UserError(f"{path}: is damaged, or not a checkpoint written by this project") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UserError(f"{path}: is not a checkpoint written by this project")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path}: has checkpoint format {checkpoint['format']}, but this version reads {FORMAT}")
    if missing := REQUIRED - checkpoint.keys():
        raise UserError(f"{path}: is damaged (without {', '.join(sorted(missing))})")
    return checkpoint


def load_model(path: str | Path) -> tuple[GPT, tiktoken.Encoding, dict[str, Any]]:
    """Load a model with its tokenizer.

    Returns:
        The model (float32, on the CPU, in eval mode), the tokenizer, and the whole checkpoint.
    """
    saved = load(path)
    tokenizer = load_tokenizer(saved["tokenizer"])
    model = build_model(saved).eval()
    if tokenizer.n_vocab != model.config.vocab_size:
        raise UserError(
            f"{path}: is damaged: its model has {model.config.vocab_size:,} tokens, its tokenizer "
            f"({saved['tokenizer']}) {tokenizer.n_vocab:,}"
        )
    return model, tokenizer, saved


def build_model(checkpoint: dict[str, Any]) -> GPT:
    """The model of a loaded checkpoint, float32 on the CPU."""
    with fitting("the checkpoint is damaged: its weights do not fit its configuration"):
        with WithoutInit():
            model = GPT(ModelConfig(**checkpoint["config"]["model"]))
        model.load_state_dict(checkpoint["model"], assign=True)
    return model


class WithoutInit(TorchFunctionMode):
    """Inside, modules are created without random initial weights, which loading would replace.

    This saves 0.2 s of the second that generate.py needs to its first character (benchmarks/generate.py). PyTorch's own
    way, a meta device, costs 0.8 s: drawing random numbers there imports PyTorch's compiler.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def fitting(message: str) -> Iterator[None]:
    """Turn PyTorch's errors for weights or states that do not fit into a UserError: `MESSAGE (REASON)`."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{message} ({first_line(error)})") from error
