"""GPT-2 in Hugging Face's format, both ways.

    write_huggingface    a model -> a folder that transformers opens
    import_gpt2          a folder, or a model of the hub -> a model to train

Every tokenizer here is a byte-level BPE like GPT-2's (Radford et al., 2019), `bytes` being the one without merges.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from config import GenerateConfig, ModelConfig
from internals.files import as_json
from internals.start import UserError, first_line
from internals.tokenizer import END_OF_TEXT, load_tokenizer
from model import GPT

MAX_VOCAB_SIZE = 2**16  # shards hold uint16

# Stored as (in, out) in GPT-2's files, where nn.Linear has (out, in)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# What model.py computes, in the words of config.json. The values are GPT-2's defaults, so a key may be absent there.
ARCHITECTURE = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",  # the tanh form, like llama.cpp's
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}

USAGE = """```python
from transformers import pipeline

generate = pipeline("text-generation", model="NAME")
print(generate("The best thing is", max_new_tokens=100)[0]["generated_text"])
```

`transformers` reads `<|endoftext|>` in a text as the end of an article. With `split_special_tokens=True` its tokenizer
reads it literally, as in training."""

# ----------------------------------------------------------------------------------------------------------------------
# Out: a model to a folder


def write_huggingface(folder: Path, model: GPT, tokenizer: tiktoken.Encoding) -> None:
    """Write what transformers opens with AutoModelForCausalLM, AutoTokenizer and pipeline."""
    c = model.config
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot_token)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **ARCHITECTURE,
        **{"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_inner": c.n_inner},
        **{"n_positions": c.block_size, "n_ctx": c.block_size, "vocab_size": c.vocab_size},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), c.dropout),
        "dtype": "float32",
        **ends,
    }
    # The sampling defaults of generate.py. The default of transformers, greedy text, repeats itself.
    sampling = {"do_sample": True, "temperature": GenerateConfig.temperature, "top_k": GenerateConfig.top_k}
    texts = {
        **tokenizer_files(tokenizer, c.block_size),
        "generation_config.json": as_json({**ends, "pad_token_id": tokenizer.eot_token, **sampling}),
        "config.json": as_json(config),
    }
    weights = {
        name: (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
        for name, tensor in real_weights(model).items()
    }
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())


def real_weights(model: GPT) -> dict[str, Tensor]:
    """The weights under GPT-2's names, without the padded rows of the embedding and without the tied head."""
    weights = dict(model.state_dict())
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: model.config.vocab_size]
    return weights


def tokenizer_files(tokenizer: tiktoken.Encoding, block_size: int) -> dict[str, str]:
    """The text of each tokenizer file in a Hugging Face GPT-2 folder, by file name."""
    vocab, merge_list = vocabulary(tokenizer), merges(tokenizer)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end_of_text = {"id": tokenizer.eot_token, "content": END_OF_TEXT, "special": True}
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merge_list},
    }
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    return {
        "tokenizer.json": as_json(fast),
        "tokenizer_config.json": as_json(settings),
        "vocab.json": as_json(vocab),
        "merges.txt": "\n".join(["#version: 0.2", *merge_list, ""]),
    }


def vocabulary(tokenizer: tiktoken.Encoding) -> dict[str, int]:
    """Every token in the notation of GPT-2's vocab.json, with its id: `{"!": 0, ...}`, in the order of the ids."""
    alphabet = byte_alphabet()
    tokens = (tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.eot_token))
    return {"".join(alphabet[byte] for byte in token): i for i, token in enumerate(tokens)} | {
        END_OF_TEXT: tokenizer.eot_token
    }


def merges(tokenizer: tiktoken.Encoding) -> list[str]:
    """The merges of a byte-level BPE in order, in the notation of GPT-2's merges.txt: `["Ġ t", "Ġ a", ...]`.

    tiktoken keeps only the tokens, by rank. Applying all earlier merges to the bytes of a token leaves two parts: the
    merge that made it.
    """
    alphabet = byte_alphabet()
    ranks = {tokenizer.decode_single_token_bytes(i): i for i in range(tokenizer.eot_token)}
    result = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            result.append(" ".join("".join(alphabet[byte] for byte in part) for part in parts))
    return result


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary files: printable ones for themselves, the others
    for characters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


# ----------------------------------------------------------------------------------------------------------------------
# Back: a folder, or a model of the hub, to a model


def import_gpt2(source: str, tokenizer_name: str, cfg: ModelConfig) -> GPT:
    """Load a GPT-2 in Hugging Face format, for `--init-from`. Undoes an export bit for bit.

    Args:
        source: a local folder, or a hub id such as `openai-community/gpt2`.
        tokenizer_name: the data's tokenizer, which must be the model's as well.
        cfg: gives `block_size` (later positions are cut off) and `dropout`. The rest comes from `source`.

    Returns:
        The model, float32 on the CPU, with its own `config`.
    """
    cfg = gpt2_config(source, tokenizer_name, cfg)
    paths = sorted(fetch(source, ["model*.safetensors"]).glob("model*.safetensors"))
    if not paths:
        raise UserError(f"--init-from {source}: has no model.safetensors (other formats of weights are not read)")
    weights = {}
    for path in paths:
        try:
            weights |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: is damaged, or not a safetensors file ({first_line(error)})") from error
    model = GPT(cfg)
    model.load_state_dict(fit_weights(source, weights, model))
    return model


def gpt2_config(source: str, tokenizer_name: str, cfg: ModelConfig) -> ModelConfig:
    """The sizes of a GPT-2 in Hugging Face format. Arguments as for `import_gpt2`.

    Fetches only the small files, so that a model of another kind is refused before gigabytes are downloaded.
    """
    folder = fetch(source, ["config.json", "tokenizer.json", "vocab.json"])
    cfg = read_config(source, folder, cfg)
    check_vocabulary(source, folder, cfg.vocab_size, tokenizer_name)
    return cfg


def fetch(source: str, patterns: list[str]) -> Path:
    """The folder with the files of `source` that match: `source` itself, or the cache of the hub's client."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download  # imported here: local folders do not need it

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # the errors of huggingface_hub and of its HTTP library have no common base
        raise UserError(
            f"--init-from {source}: there is no such folder, and the hub did not provide it ({type(error).__name__}); "
            "check the name, or go online"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def read_config(source: str, folder: Path, cfg: ModelConfig) -> ModelConfig:
    """`cfg` with the sizes in config.json. Refuses a model that model.py does not compute."""
    found = read_json(folder / "config.json")
    for key, value in ARCHITECTURE.items():
        if found.get(key, value) != value:
            raise UserError(
                f"--init-from {source}: its config.json says {key} = {found[key]!r}; only {value!r} can be trained here"
            )
    sizes = {key: found.get(key) for key in ("n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size")}
    if sizes["n_inner"] is None and isinstance(sizes["n_embd"], int):
        sizes["n_inner"] = 4 * sizes["n_embd"]  # GPT-2's default
    for key, value in sizes.items():
        if not isinstance(value, int):
            raise UserError(f"--init-from {source}: its config.json says {key} = {value!r}, which is not a size")
    if sizes["vocab_size"] > MAX_VOCAB_SIZE:
        raise UserError(
            f"--init-from {source}: its vocabulary of {sizes['vocab_size']:,} tokens does not fit the uint16 of the "
            f"shards (at most {MAX_VOCAB_SIZE:,})"
        )
    positions = sizes.pop("n_positions")
    if cfg.block_size > positions:
        raise UserError(f"--block-size {cfg.block_size}: {source} has {positions} positions; take at most that many")
    try:
        return replace(cfg, **sizes)
    except ValueError as error:
        raise UserError(f"--init-from {source}: its config.json describes no valid model ({error})") from error


def check_vocabulary(source: str, folder: Path, vocab_size: int, tokenizer_name: str) -> None:
    """Refuse a model whose tokens differ from the data's. Without a tokenizer file, only their number is compared."""
    ours = vocabulary(load_tokenizer(tokenizer_name))
    theirs = None
    if (folder / "tokenizer.json").exists():
        fast = read_json(folder / "tokenizer.json")
        try:
            theirs = fast["model"]["vocab"] | {token["content"]: token["id"] for token in fast["added_tokens"]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / 'tokenizer.json'}: is not a BPE tokenizer like GPT-2's") from error
    elif (folder / "vocab.json").exists():
        theirs = read_json(folder / "vocab.json")
    if vocab_size != len(ours) or theirs not in (None, ours):
        raise UserError(
            f"--init-from {source}: its tokenizer ({vocab_size:,} tokens) is not the data's, {tokenizer_name} "
            f"({len(ours):,} tokens); prepare the data with the model's tokenizer (prepare_data.py --tokenizer)"
        )


def fit_weights(source: str, weights: dict[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """GPT-2's tensors as the state dict of `model`: renamed, transposed, cut to its positions, padded to its rows."""
    # OpenAI's own files lack the prefix. Old files also hold the causal mask, and some repeat the tied head.
    weights = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in weights.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    head = weights.pop("lm_head.weight", None)
    expected = model.state_dict()
    for problem, names in (
        ("missing", expected.keys() - weights.keys()),
        ("unknown", weights.keys() - expected.keys()),
    ):
        if names:
            raise UserError(f"--init-from {source}: {len(names)} tensors are {problem}: {min(names)} among them")
    if head is not None and not torch.equal(head, weights["transformer.wte.weight"]):
        raise UserError(f"--init-from {source}: its output head is not tied to its embedding; only such can be trained")
    return {name: fit_tensor(source, name, tensor, expected[name], model.config) for name, tensor in weights.items()}


def fit_tensor(source: str, name: str, tensor: Tensor, expected: Tensor, cfg: ModelConfig) -> Tensor:
    fitted = tensor.T if name.endswith(TRANSPOSED) else tensor
    if name == "transformer.wpe.weight":
        fitted = fitted[: cfg.block_size]
    elif name == "transformer.wte.weight" and len(fitted) == cfg.vocab_size:
        fitted = torch.cat([fitted, fitted.new_zeros(cfg.padded_vocab_size - cfg.vocab_size, cfg.n_embd)])
    if fitted.shape != expected.shape or not fitted.is_floating_point():
        raise UserError(
            f"--init-from {source}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, which does not fit its "
            "config.json"
        )
    return fitted.float()
