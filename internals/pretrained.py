"""Open a model: a checkpoint, the folder of a run, a GPT-2 in Hugging Face format, or one from the hub.

open_model         for generating: the model, its tokenizer and a description
open_checkpoint    for exporting: checkpoints of train.py only
initial_config     for --init-from: the model's sizes,
initial_model      and then the model
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
from torch import Tensor

from config import ModelConfig, flag_of
from internals import checkpoint
from internals.cli import is_given
from internals.huggingface_import import (
    INDEX,
    WEIGHTS,
    check_tokenizer,
    find_tokenizer,
    read_config,
    read_weights,
    without_weights,
)
from internals.start import UserError
from internals.tokenizer import load_tokenizer, prepare_with, tokenizer_name
from model import GPT

OURS = ("best.pt", "last.pt")  # in order of preference
OTHER_WEIGHTS = ("pytorch_model", "tf_model", "flax_model")  # beginnings of file names; these formats are not read
FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".gguf", ".json")  # a name with such an ending is not a hub id


class Opened(NamedTuple):
    model: GPT  # float32, on the CPU, in eval mode
    tokenizer: tiktoken.Encoding
    description: str  # "checkpoints/demo/best.pt, iteration 600"


def open_model(source: str) -> Opened:
    """Open a model to generate with. `source` is a file, a folder, or a hub id such as `openai-community/gpt2`."""
    with named("--checkpoint"):
        return find(source).open()


def open_checkpoint(source: str) -> tuple[GPT, tiktoken.Encoding, dict[str, Any]]:
    """What `checkpoint.load_model` returns, for a file or for the folder of a run."""
    with named("--checkpoint"):
        return checkpoint.load_model(find(source).checkpoint())


def initial_config(source: str, tokenizer: str, model_config: ModelConfig) -> ModelConfig:
    """The configuration of a model that starts from `source`, the value of `--init-from`.

    Args:
        tokenizer: the data's tokenizer, as `load_tokenizer` takes it. It must also be the model's.
        model_config: gives `block_size` (later positions are cut off) and `dropout`. The rest comes from `source`.
    """
    with named("--init-from"):
        config = find(source).config(tokenizer)
    if model_config.block_size > config.block_size:
        raise UserError(
            f"--block-size {model_config.block_size}: {source} has {config.block_size} positions; give --block-size "
            f"{config.block_size}, or less"
        )
    return replace(config, block_size=model_config.block_size, dropout=model_config.dropout)


def refuse_other_flags(asked: ModelConfig, config: ModelConfig) -> None:
    """Raise UserError if a flag asks for another model than that of `--init-from`.

    A caller without a command line gets the model's sizes.

    Args:
        asked: the command's, in which a value may also be a default; config: the model's.
    """
    for name, value in vars(asked).items():
        has, flag = getattr(config, name), flag_of(name)
        if name not in ("block_size", "dropout", "vocab_size") and value != has and is_given(flag):
            raise UserError(f"{flag} {value}: the model of --init-from has {has}; leave {flag} out")


def initial_model(source: str, tokenizer: str, model_config: ModelConfig) -> GPT:
    """The model that starts from `source`, float32 on the CPU. Arguments as for `initial_config`."""
    config = initial_config(source, tokenizer, model_config)
    with named("--init-from"):
        weights = find(source).weights(tokenizer)
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: config.block_size]
    with checkpoint.fitting(f"--init-from: {source}: its weights do not fit its configuration"):
        with checkpoint.WithoutInit():
            model = GPT(config)
        model.load_state_dict(weights)
    return model


@contextlib.contextmanager
def named(flag: str) -> Iterator[None]:
    """Inside, error messages get the flag in front."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# The two kinds of model


@dataclass(frozen=True)
class Checkpoint:
    """A file that train.py wrote."""

    path: Path

    def open(self) -> Opened:
        model, tokenizer, saved = checkpoint.load_model(self.path)
        return Opened(model, tokenizer, f"{self.path}, iteration {saved['iter']:,}")

    def checkpoint(self) -> Path:
        return self.path

    def config(self, tokenizer: str) -> ModelConfig:
        saved = checkpoint.load(self.path, mmap=True)
        if saved["tokenizer"] != tokenizer:
            raise UserError(
                f"{self.path}: was trained with the tokenizer {tokenizer_name(saved['tokenizer'])}, but the data is prepared "
                f"with {tokenizer_name(tokenizer)}; {prepare_with(saved['tokenizer'])}"
            )
        return checkpoint.model_config(saved, str(self.path))

    def weights(self, tokenizer: str) -> dict[str, Tensor]:
        return checkpoint.build_model(checkpoint.load(self.path), str(self.path)).state_dict()


@dataclass(frozen=True)
class HuggingFace:
    """A folder or a hub id."""

    source: str

    def open(self) -> Opened:
        config = read_config(self.source)
        rows = config.vocab_size
        tokenizer = load_tokenizer(find_tokenizer(self.source, rows))
        config = replace(config, vocab_size=tokenizer.n_vocab)
        weights = read_weights(self.source, rows, config)
        with checkpoint.WithoutInit():
            model = GPT(config).eval()
        model.load_state_dict(weights, assign=True)
        return Opened(model, tokenizer, f"{self.source}, in Hugging Face format")

    def checkpoint(self) -> Path:
        raise UserError(
            f"{self.source}: is a model in Hugging Face format; export.py takes a checkpoint (best.pt, last.pt) or the "
            "folder of a run"
        )

    def config(self, tokenizer: str) -> ModelConfig:
        config = read_config(self.source)
        return replace(config, vocab_size=check_tokenizer(self.source, config.vocab_size, tokenizer))

    def weights(self, tokenizer: str) -> dict[str, Tensor]:
        return read_weights(self.source, read_config(self.source).vocab_size, self.config(tokenizer))


def find(source: str) -> Checkpoint | HuggingFace:
    """The kind of model that `source` names, judged by the files there, or by the name itself if there are none."""
    path = Path(os.path.expanduser(source))
    try:
        names = os.listdir(path)
    except NotADirectoryError:
        return Checkpoint(path)
    except FileNotFoundError as error:
        if is_hub_id(source):
            return HuggingFace(source)
        raise UserError(f"{source}: {missing(source)}") from error
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from error
    ours = [name for name in OURS if name in names]
    theirs = [name for name in (WEIGHTS, INDEX) if name in names]  # not config.json: train.py's has the same name
    if ours and theirs:
        raise UserError(
            f"{source}: holds two models, {ours[0]} and {theirs[0]}; name {path / ours[0]}, or move one away"
        )
    if ours:
        return Checkpoint(path / ours[0])
    if theirs:  # maybe beside the .gguf that llama.cpp made from it
        return HuggingFace(str(path))
    if "meta.json" in names:
        raise UserError(f"{source}: is a data folder (it has a meta.json), not a model; name the folder of a run")
    if any(name.endswith(".gguf") for name in names):
        raise UserError(f"{source}: holds GGUF, which only llama.cpp reads; name the checkpoint that it was made from")
    if "adapter_config.json" in names:
        raise UserError(f"{source}: is a LoRA adapter; merge it into its model (merge_and_unload) and save that")
    if any(name.startswith(OTHER_WEIGHTS) for name in names):
        raise without_weights(source)
    raise UserError(
        f"{source}: holds no model: neither best.pt, which train.py writes, nor the config.json and model.safetensors of a "
        f"GPT-2; {checkpoint.advice(path)}"
    )


def is_hub_id(source: str) -> bool:
    """Whether a name without a file is OWNER/NAME on the hub. If OWNER is a folder here, it is a misspelt path."""
    owner, _, name = source.partition("/")
    form = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
    return bool(form) and not os.path.isdir(owner) and not name.endswith(FILE_ENDINGS)


def missing(source: str) -> str:
    if source in ("resume", "scratch"):  # nanoGPT's words
        return f"is not a model; {'give --resume' if source == 'resume' else 'without --init-from, a run starts from scratch'}"
    if source.endswith(".pt"):
        return checkpoint.no_checkpoint(Path(os.path.expanduser(source)))
    if re.fullmatch(r"gpt2(-\w+)?", source):
        return f"there is no such file or folder; on the hub it is called openai-community/{source}"
    return "there is no such file or folder; name a checkpoint, its folder, or a hub id such as openai-community/gpt2"
