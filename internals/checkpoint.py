"""The checkpoint format: save atomically, load safely, rebuild a model."""

import contextlib
import errno
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch.overrides import TorchFunctionMode

from config import ModelConfig
from internals.files import atomic_write, beside_the_code, system_error, writing
from internals.memory import is_out_of_memory
from internals.shards import MAGIC as SHARD_MAGIC
from internals.shell import shell_join
from internals.start import UserError, first_line
from internals.tokenizer import load_tokenizer, tokenizer_name
from model import GPT

FORMAT = 1

NO_CHECKPOINT = "not a checkpoint written by this project"
NAME_ANOTHER = "; name a run's best.pt, last.pt or folder"
REQUIRED = {"format", "model", "config", "tokenizer", "iter", "tokens", "val_loss"}


def save(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint. `path` always holds the old one or the new one, complete."""
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load(path: str | Path, mmap: bool = False, advice: str = NAME_ANOTHER) -> dict[str, Any]:
    """Read the checkpoint at `path`, with its tensors on the CPU. Runs no code from the file.

    With `mmap`, tensors are only read when they are used, and flipped bits are not noticed: for callers that need the
    settings alone. `advice` ends a message about the file's content.
    """
    path = Path(path)
    check_file(path)
    with reading(path, f"is damaged, or {NO_CHECKPOINT}{advice}"):
        checkpoint = read(path, mmap)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UserError(f"{path}: is {NO_CHECKPOINT}{advice}")
    if checkpoint["format"] != FORMAT:
        found = f"has checkpoint format {checkpoint['format']}, but this version reads {FORMAT}"
        raise UserError(f"{path}: {found}{advice}")
    if missing := REQUIRED - checkpoint.keys():
        raise UserError(f"{path}: is damaged (missing: {', '.join(sorted(missing))}){advice}")
    return checkpoint


def read(path: Path, mmap: bool) -> Any:
    """What torch.load returns. Unless the file is only mapped, its checksums are checked, which torch.load does not do."""
    if mmap:
        # A network drive may have no mmap, and PyTorch maps no file whose path is not UTF-8
        with contextlib.suppress(OSError, RuntimeError, UnicodeError):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with zipfile.ZipFile(path) as file:  # 0.6 s for the default model's last.pt (318 MB), where torch.load takes 1.3 s
        if damaged := file.testzip():
            raise zipfile.BadZipFile(f"{damaged}: wrong CRC-32")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_last(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The content of last.pt. If it is damaged, the message says how to continue without it."""
    best = path.with_name("best.pt")
    advice = "; to begin a new run, give another --out-dir, or --overwrite, which deletes it"
    if best.exists():
        name = shell_join([str(best)])
        advice = f"; to begin a new run with the best model, give --init-from {name} and another --out-dir"
    return load(path, mmap, advice)


def check_file(path: Path) -> None:
    """Refuse what cannot be a checkpoint, and say what it is."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                head, size = file.read(16), os.fstat(file.fileno()).st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: {no_checkpoint(path)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a folder; name the checkpoint in it, best.pt or last.pt")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is not a file; name a checkpoint that train.py wrote")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        raise UserError(
            f"{path}: is a safetensors file; give the folder that holds it, its config.json and its tokenizer"
        )
    if head[:4] == b"GGUF":
        raise UserError(
            f"{path}: is a GGUF file, which only llama.cpp reads; give the checkpoint that it was made from"
        )
    if head[:4] == SHARD_MAGIC.to_bytes(4, "little"):
        raise UserError(f"{path}: is a shard of tokens, {NO_CHECKPOINT}{NAME_ANOTHER}")


def no_checkpoint(path: Path) -> str:
    """What to do about a checkpoint that does not exist: `there is no checkpoint; ADVICE`."""
    if (path.parent / "model.safetensors").exists():
        what = f"{path.parent} is in Hugging Face format: give it to --init-from, or to generate.py --checkpoint"
    else:
        what = beside_the_code(path) or advice(path.parent.parent)
    return f"there is no checkpoint; {what}"


def advice(folder: Path) -> str:
    """What to do where there is no model. Names the models in the folder."""
    files = (file for name in ("best.pt", "model.safetensors") for file in folder.glob(f"*/{name}"))
    models = sorted({str(file.parent) for file in files})
    known = f": there are models in {', '.join(models[:5])}{', ...' if len(models) > 5 else ''}" if models else ""
    return f"train one first (train.py), or name another file or folder{known}"


@contextlib.contextmanager
def reading(path: Path, otherwise: str) -> Iterator[None]:
    """Turn a failure to read `path` into a UserError.

    Errors of the system (permission, disk, network drive) and too little memory keep their own message, so that nobody
    deletes a good file over them. All other errors get the message `otherwise`, `is damaged ...`.
    """
    try:
        yield
    except Exception as error:  # zip, pickle, torch, JSON and safetensors each have their own errors for a damaged file
        if is_out_of_memory(error):
            advice = "close other programs or use a machine with more memory"
            raise UserError(f"{path}: does not fit into memory ({first_line(error)}); {advice}") from error
        if cause := refusal_to_read(path, error):
            raise UserError(f"{path}: cannot be read ({cause.strerror or first_line(cause)})") from error
        empty = " (an empty file)" if os.path.getsize(path) == 0 else ""
        raise UserError(f"{path}{empty}: {otherwise}") from error


def refusal_to_read(path: Path, error: Exception) -> OSError | None:
    """The system's error on reading the file, if any. PyTorch and safetensors may hide it, so it is read again."""
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except OSError as refusal:
        return refusal
    cause = system_error(error)
    damaged = cause is None or cause.errno == errno.EINVAL  # too short: the search for a zip file's end left the file
    return None if damaged else cause


def load_model(path: str | Path) -> tuple[GPT, tiktoken.Encoding, dict[str, Any]]:
    """Load a model with its tokenizer.

    Returns:
        The model (float32, on the CPU, in eval mode), the tokenizer, and the whole checkpoint.
    """
    saved = load(path)
    tokenizer = load_tokenizer(saved["tokenizer"])
    model = build_model(saved, str(path)).eval()
    if tokenizer.n_vocab != model.config.vocab_size:
        raise UserError(
            f"{path}: is damaged: its model has {model.config.vocab_size:,} tokens, its tokenizer "
            f"({tokenizer_name(saved['tokenizer'])}) {tokenizer.n_vocab:,}"
        )
    return model, tokenizer, saved


def build_model(checkpoint: dict[str, Any], name: str = "the checkpoint") -> GPT:
    """The model of a loaded checkpoint, float32 on the CPU. `name` is for messages."""
    config = model_config(checkpoint, name)
    with fitting(f"{name}: its weights do not fit its configuration, or model.py has changed since"):
        with WithoutInit():
            model = GPT(config)
        model.load_state_dict(checkpoint["model"], assign=True)
    return model


def model_config(checkpoint: dict[str, Any], name: str) -> ModelConfig:
    """The sizes of a loaded checkpoint's model. A setting that it does not know has its default."""
    with fitting(f"{name}: its model's configuration is damaged, or config.py has changed since"):
        return ModelConfig(**checkpoint["config"]["model"])


class WithoutInit(TorchFunctionMode):
    """Inside, modules are created without random initial weights, which loading would replace.

    This saves 0.2 s of the second that generate.py takes to its first character (benchmarks/generate.py). PyTorch's own
    way, a meta device, costs 0.8 s: drawing random numbers there imports PyTorch's compiler.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def fitting(message: str) -> Iterator[None]:
    """Turn errors for weights, states or settings that do not fit into a UserError: `MESSAGE (REASON)`."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(f"the model does not fit into memory ({first_line(error)})") from error
        raise UserError(f"{message} ({first_line(error)})") from error
