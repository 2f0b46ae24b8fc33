"""Read a GPT-2 in Hugging Face format, from a folder or the hub, for model.py. Undoes an export bit for bit.

    read_config        config.json -> sizes
    find_tokenizer     its tokenizer, as load_tokenizer takes it
    read_weights       model.safetensors, or the files that its index names -> the weights of a GPT

In all functions, `source` is a local folder or a hub id such as `openai-community/gpt2`.
"""

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from config import ModelConfig
from internals.checkpoint import WithoutInit, fitting, reading
from internals.files import writing
from internals.huggingface import ARCHITECTURE, TRANSPOSED
from internals.network import refuse_local_failure
from internals.screen import plural
from internals.start import UserError
from internals.tokenizer import is_json, load_tokenizer, prepare_with, tokenizer_name
from internals.tokenizer_json import BYTE_LEVEL, OWN_PRE_TOKENIZER, canonical, vocabulary
from model import GPT

SMALL_FILES = ("config.json", "tokenizer.json", "vocab.json")  # read first: gigabytes follow only if the model fits
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

TOKENIZERS = {"bytes": 257, "gpt2": 50257}  # their sizes: only a vocabulary of the right size is loaded

# The names of each size in config.json, GPT-2's own first, and the value if none is there.
SIZES = {
    "n_layer": (("n_layer", "num_hidden_layers"), 12),
    "n_head": (("n_head", "num_attention_heads"), 12),
    "n_embd": (("n_embd", "hidden_size"), 768),
    "n_inner": (("n_inner",), None),
    "block_size": (("n_positions", "max_position_embeddings", "n_ctx"), 1024),
    "vocab_size": (("vocab_size",), 50257),
}

# Other names of the tanh form of GELU, which model.py computes. They differ from it by rounding.
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")

# ----------------------------------------------------------------------------------------------------------------------
# Files


@functools.cache  # the hub is asked once
def fetch(source: str, names: tuple[str, ...]) -> Path:
    """The folder with those files of `names` that `source` has: `source` itself, or the cache of the hub's client."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download  # imported here: local folders do not need it

    with asking_hub(source):
        return Path(snapshot_download(source, allow_patterns=list(names)))


def find_file(source: str, name: str, names: tuple[str, ...] = SMALL_FILES) -> Path | None:
    """The file `name` of those `names` that are fetched together; None if the model has no such file.

    Raises:
        UserError: it may be missing only because the hub does not answer. Its client then takes the cache, which may hold
            only what another program once asked for.
    """
    path = fetch(source, names) / name
    if path.exists():
        return path
    if Path(source).is_dir():
        return None
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if try_to_load_from_cache(source, name) is _CACHED_NO_EXIST:  # the hub said so before
        return None
    with asking_hub(source):
        try:
            return Path(hf_hub_download(source, name))
        except LocalEntryNotFoundError as error:
            raise UserError(
                f"{source}: {name} is not in this machine's cache, and the hub cannot be reached; go online"
            ) from error
        except EntryNotFoundError:  # the hub has no such file either
            return None


@contextlib.contextmanager
def asking_hub(source: str) -> Iterator[None]:
    """Turn a failure of the hub, of the network or of the cache's disk into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the errors of huggingface_hub and of its HTTP library have no common base
        with writing(f"{source}, in the hub's cache", advice="HF_HOME can name another folder"):
            refuse_local_failure(source, error)
        raise UserError(
            f"{source}: there is no such file or folder, and the hub did not provide it ({type(error).__name__}); check "
            "the name, or go online"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    with reading(path, "is damaged, or not JSON"):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# config.json


def read_config(source: str) -> ModelConfig:
    """The sizes in config.json. `vocab_size` is the number of rows of the embedding, which may be padded.

    Raises:
        UserError: model.py cannot compute this model.
    """
    path = find_file(source, "config.json")
    if path is None:
        raise UserError(f"{source}: has no config.json; save the model again with save_pretrained")
    found = read_json(path)
    if found.get("activation_function") in TANH_GELU:
        found["activation_function"] = ARCHITECTURE["activation_function"]
    for key, value in ARCHITECTURE.items():
        if found.get(key, value) != value:
            known = TANH_GELU if key == "activation_function" else (value,)
            raise UserError(
                f"{source}: its config.json says {key} = {found[key]!r}; only {' or '.join(map(repr, known))} is supported"
            )
    sizes = {name: read_size(source, found, names, default) for name, (names, default) in SIZES.items()}
    if sizes["n_inner"] is None:
        sizes["n_inner"] = 4 * sizes["n_embd"]
    try:
        return ModelConfig(**sizes)
    except ValueError as error:
        raise UserError(f"{source}: its config.json does not describe a valid model ({error})") from error


def read_size(source: str, found: dict[str, Any], names: Sequence[str], default: int | None) -> int | None:
    values = {name: found[name] for name in names if found.get(name) is not None}
    for name, value in values.items():
        if type(value) is not int:
            raise UserError(f"{source}: its config.json says {name} = {value!r}, which is not a size")
    if len(values) > 1:  # n_ctx is obsolete: it only decides where nothing else does
        values.pop("n_ctx", None)
    if len(set(values.values())) > 1:
        said = " and ".join(f"{name} = {value}" for name, value in values.items())
        raise UserError(f"{source}: its config.json says {said}, which are names of the same size")
    return next(iter(values.values()), default)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def read_vocabulary(source: str, rows: int) -> dict[str, int] | None:
    """Its tokens, in GPT-2's notation, with their ids. None if there is no tokenizer among its files.

    Args:
        rows: of the embedding; there may be more of them than tokens.
    """
    found, folder = None, fetch(source, SMALL_FILES)
    is_slow = (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists()
    if not is_slow and (path := find_file(source, "tokenizer.json")):
        fast = read_json(path)
        try:
            found = fast["model"]["vocab"] | {token["content"]: token["id"] for token in fast["added_tokens"]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: is not a BPE tokenizer like GPT-2's") from error
    elif path := find_file(source, "vocab.json"):
        found = read_json(path)
    if found is not None and len(found) > rows:
        raise UserError(f"{source}: its tokenizer has {len(found):,} tokens, its embedding only {rows:,} rows")
    return found


def find_tokenizer(source: str, rows: int) -> str:
    """Its tokenizer, as `load_tokenizer` takes it. `rows` is the number of rows of the embedding."""
    theirs = read_vocabulary(source, rows)
    if theirs is None:
        raise UserError(f"{source}: has no tokenizer (tokenizer.json or vocab.json); save it there, too")
    path = fetch(source, SMALL_FILES) / "tokenizer.json"
    settings = read_json(path) if path.exists() else {}
    if settings.get("pre_tokenizer") == OWN_PRE_TOKENIZER:
        return canonical(path.read_text(encoding="utf-8"), str(path))
    for name, size in TOKENIZERS.items():
        if len(theirs) == size and leaves_text_as_it_is(settings) and theirs == vocabulary(load_tokenizer(name)):
            return name
    raise UserError(
        f"{source}: its tokenizer ({len(theirs):,} tokens) is not one of this project's: {', '.join(TOKENIZERS)}, or one "
        "that prepare_data.py trained"
    )


def leaves_text_as_it_is(settings: dict[str, Any]) -> bool:
    """Whether a tokenizer.json has the pieces of GPT-2's pattern encoded, all of a text and nothing else."""
    cut = {"add_prefix_space": False, "use_regex": True, **(settings.get("pre_tokenizer") or BYTE_LEVEL)}
    return settings.get("normalizer") is None and cut | {"trim_offsets": True} == BYTE_LEVEL


def check_tokenizer(source: str, rows: int, tokenizer: str) -> int:
    """Refuse a model whose tokens are not those of `tokenizer`. Returns their number; later rows are unused.

    Without a tokenizer among its files, the number of rows decides for one that everybody has (`TOKENIZERS`): it must be
    the number of tokens, or that padded to a multiple of 64 or 128.
    """
    ours, theirs = load_tokenizer(tokenizer).n_vocab, read_vocabulary(source, rows)
    if theirs is None and not is_json(tokenizer):
        rows_of = {name: {math.ceil(size / n) * n for n in (1, 64, 128)} for name, size in TOKENIZERS.items()}
        own, tokens = next((name for name in rows_of if rows in rows_of[name]), ""), rows
    else:
        own, tokens = find_tokenizer(source, rows), len(theirs or ())
    if own != tokenizer:
        advice = prepare_with(own) if own else "save its tokenizer there, too (tokenizer.json or vocab.json)"
        raise UserError(
            f"{source}: its tokenizer ({tokens:,} tokens) is not the data's, {tokenizer_name(tokenizer)} ({ours:,} tokens); "
            f"{advice}"
        )
    return ours


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def read_weights(source: str, rows: int, config: ModelConfig) -> dict[str, Tensor]:
    """The weights for `GPT(config)`, float32: renamed, transposed, the embedding cut to the real tokens.

    Args:
        rows: of the embedding, in the files.
        config: its `vocab_size` is the number of real tokens.
    """
    # OpenAI's own files lack the prefix. Old files also hold the causal mask, and some repeat the tied head.
    weights = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in read_tensors(source).items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    head = weights.pop("lm_head.weight", None)
    with fitting(f"{source}: its config.json does not describe a valid model"), WithoutInit():
        expected = GPT(config).state_dict()
    for problem, names in (
        ("missing", expected.keys() - weights.keys()),
        ("unknown", weights.keys() - expected.keys()),
    ):
        if names:
            raise UserError(f"{source}: {plural(len(names), 'tensor')} {problem}: {min(names)}, ...")
    embedding = weights["transformer.wte.weight"]
    if head is not None and not torch.equal(head, embedding.to(head.dtype)):  # it may be a rounded copy
        raise UserError(f"{source}: its output head is not tied to its embedding; only tied heads are supported")
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    shapes["transformer.wte.weight"] = torch.Size([rows, config.n_embd])
    fitted = {name: fit_tensor(source, name, tensor, shapes[name]) for name, tensor in weights.items()}
    embedding = fitted["transformer.wte.weight"][: config.vocab_size]
    padding = embedding.new_zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
    return fitted | {"transformer.wte.weight": torch.cat([embedding, padding])}


def fit_tensor(source: str, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    fitted = tensor.T if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    if fitted.shape != shape or not fitted.is_floating_point():
        raise UserError(
            f"{source}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, which does not fit its config.json"
        )
    return fitted.float().contiguous()


def read_tensors(source: str) -> dict[str, Tensor]:
    """The tensors in model.safetensors, or else those that its index names, each from the file that it names."""
    names = (WEIGHTS, INDEX)
    # With an index alone on this machine, the hub is not asked whether there is a whole file, too
    is_split = (fetch(source, names) / INDEX).exists() and not (fetch(source, names) / WEIGHTS).exists()
    if not is_split and (whole := find_file(source, WEIGHTS, names)):
        return load_tensors(whole)
    index = find_file(source, INDEX, names)
    if index is None:
        raise without_weights(source)
    files = read_index(index)
    folder = fetch(source, tuple(sorted(set(files.values()))))
    if missing := sorted({file for file in files.values() if not (folder / file).exists()}):
        raise UserError(f"{source}: files that {INDEX} names are missing: {', '.join(missing)}")
    weights = {}
    for file in sorted(set(files.values())):
        weights |= {name: tensor for name, tensor in load_tensors(folder / file).items() if files.get(name) == file}
    return weights


def without_weights(source: str) -> UserError:
    return UserError(
        f"{source}: has no {WEIGHTS}; other formats (pytorch_model.bin) are not read. Load it in transformers and save it "
        "again with save_pretrained"
    )


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor: `{"transformer.wte.weight": "model-00001-of-00002.safetensors", ...}`."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path}: is damaged (weight_map, the file of each tensor, is missing)")
    for file in files.values():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise UserError(f"{path}: is damaged ({file!r} is not the name of a safetensors file beside it)")
    return files


def load_tensors(path: Path) -> dict[str, Tensor]:
    with reading(path, "is damaged, or not a safetensors file"):
        return load_file(path)
