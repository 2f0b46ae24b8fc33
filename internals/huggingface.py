"""GPT-2 in Hugging Face's format, both ways."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import GenerateConfig, ModelConfig
from internals.start import UserError
from internals.tokenizer import END_OF_TEXT, load_tokenizer
from model import GPT

MAX_VOCAB_SIZE = 2**16  # shards hold uint16

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's files have them (in, out), nn.Linear (out, in)

# What config.json may say of the architecture, and model.py computes. Where it says nothing, GPT-2's default holds,
# which is the same.
ARCHITECTURE = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",  # the tanh form, like llama.cpp's
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def byte_alphabet() -> list[str]:
    """For each byte the character by which GPT-2's vocabulary files write it: itself where it can be printed, else one
    of those from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def vocabulary(tokenizer: tiktoken.Encoding) -> dict[str, int]:
    """Every token, as GPT-2's vocab.json writes it, with its id; in the order of the ids."""
    alphabet = byte_alphabet()
    tokens = (tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.eot_token))
    return {"".join(alphabet[byte] for byte in token): i for i, token in enumerate(tokens)} | {
        END_OF_TEXT: tokenizer.eot_token
    }


def merges(tokenizer: tiktoken.Encoding) -> list[str]:
    """The merges of a byte-level BPE, in order, as GPT-2's merges.txt writes them.

    tiktoken keeps only the tokens, by rank. The merge that made a token joins the two parts that are left when all
    earlier merges have been applied to its bytes.
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


def tokenizer_files(tokenizer: tiktoken.Encoding, block_size: int) -> dict[str, str]:
    """The text of each tokenizer file of a Hugging Face GPT-2 folder, by file name.

    One difference to encoding here: transformers reads `<|endoftext|>` in a text as the end of an article, unless it
    is called with `split_special_tokens=True`; here it is text like any other.
    """
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


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def real_weights(model: GPT) -> dict[str, Tensor]:
    """The model's weights by GPT-2's names, without the padded rows of the embedding; the tied head is not repeated."""
    weights = dict(model.state_dict())
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: model.config.vocab_size]
    return weights


def write_huggingface(folder: Path, model: GPT, tokenizer: tiktoken.Encoding) -> None:
    """What transformers opens with AutoModelForCausalLM, AutoTokenizer and pipeline."""
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
    # Sampling as generate.py has it by default: greedy text, which transformers would choose, repeats itself.
    sampling = {"do_sample": True, "temperature": GenerateConfig.temperature, "top_k": GenerateConfig.top_k}
    weights = {
        name: (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
        for name, tensor in real_weights(model).items()
    }
    texts = {
        **tokenizer_files(tokenizer, c.block_size),
        "generation_config.json": as_json({**ends, "pad_token_id": tokenizer.eot_token, **sampling}),
        "config.json": as_json(config),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    # safetensors makes a file that only its owner may read: give it the permissions that the others have.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def import_gpt2(source: str, tokenizer: str, config: ModelConfig) -> GPT:
    """A GPT-2 in Hugging Face format, for `--init-from`. Undoes an export bit for bit.

    Args:
        source: a local folder, or a hub id such as `openai-community/gpt2`.
        tokenizer: the data's (`gpt2` or `bytes`), which the model must have too.
        config: its `block_size` (later positions are cut off) and `dropout` are kept, the rest comes from `source`.

    Returns:
        The model, float32 on the CPU. Its `config` is the one in force.

    Raises:
        UserError: there is no such model, it is no GPT-2 as model.py computes it, files or tensors are missing or
            damaged, its tokenizer is another one than the data's, or it has fewer positions than `block_size`.
    """
    model_config = gpt2_config(source, tokenizer, config)
    paths = sorted(fetch(source, ["model*.safetensors"]).glob("model*.safetensors"))
    if not paths:
        raise UserError(f"--init-from {source}: has no model.safetensors (other formats of weights are not read)")
    weights = {}
    for path in paths:
        try:
            weights |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: is damaged, or no safetensors file ({error})") from error

    model = GPT(model_config)
    fitted = fit_weights(source, weights, model)
    model.load_state_dict(fitted)
    return model


def gpt2_config(source: str, tokenizer: str, config: ModelConfig) -> ModelConfig:
    """The sizes of a GPT-2 in Hugging Face format. Arguments and errors are those of `import_gpt2`.

    Fetches the small files alone: a model of another kind is refused before gigabytes of it were downloaded.
    """
    folder = fetch(source, ["config.json", "tokenizer.json", "vocab.json"])
    model_config = read_config(source, folder, config)
    check_vocabulary(source, folder, model_config.vocab_size, tokenizer)
    return model_config


def fetch(source: str, patterns: list[str]) -> Path:
    """The folder that holds the files of `source` with these names: itself, or what the hub's client keeps of it."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download  # here and not above: local folders do not need it

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub, and the HTTP library below it, have no common base
        raise UserError(
            f"--init-from {source}: there is no such folder, and the hub did not give it ({type(error).__name__}); "
            "check the name, or go online"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is no JSON object")
    return value


def read_config(source: str, folder: Path, config: ModelConfig) -> ModelConfig:
    """What config.json says of the model's shape, if model.py computes such a model."""
    found = read_json(folder / "config.json")
    for key, value in ARCHITECTURE.items():
        if found.get(key, value) != value:
            raise UserError(
                f"--init-from {source}: its config.json says {key} = {found[key]!r}; only {value!r} can be trained here"
            )
    sizes = {key: found.get(key) for key in ("n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size")}
    if sizes["n_inner"] is None and isinstance(sizes["n_embd"], int):
        sizes["n_inner"] = 4 * sizes["n_embd"]  # as GPT-2 has it
    for key, value in sizes.items():
        if not isinstance(value, int):
            raise UserError(f"--init-from {source}: its config.json says {key} = {value!r}, which is no size")
    if sizes["vocab_size"] > MAX_VOCAB_SIZE:
        raise UserError(
            f"--init-from {source}: its vocabulary of {sizes['vocab_size']:,} tokens does not fit the uint16 of the "
            f"shards (at most {MAX_VOCAB_SIZE:,})"
        )
    positions = sizes.pop("n_positions")
    if config.block_size > positions:
        raise UserError(f"--block-size {config.block_size}: {source} has {positions} positions; take at most that many")
    try:
        return replace(config, **sizes)
    except ValueError as error:
        raise UserError(f"--init-from {source}: its config.json makes no model ({error})") from error


def check_vocabulary(source: str, folder: Path, vocab_size: int, tokenizer: str) -> None:
    """Refuse a model whose tokens are not those of the data. Where it brings no tokenizer file, its size must do."""
    ours = vocabulary(load_tokenizer(tokenizer))
    theirs = None
    if (folder / "tokenizer.json").exists():
        fast = read_json(folder / "tokenizer.json")
        try:
            theirs = fast["model"]["vocab"] | {token["content"]: token["id"] for token in fast["added_tokens"]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / 'tokenizer.json'}: is no BPE tokenizer as GPT-2 has it") from error
    elif (folder / "vocab.json").exists():
        theirs = read_json(folder / "vocab.json")
    if vocab_size != len(ours) or theirs not in (None, ours):
        raise UserError(
            f"--init-from {source}: its tokenizer ({vocab_size:,} tokens) is not the data's, {tokenizer} "
            f"({len(ours):,} tokens); prepare the data with the model's tokenizer (prepare_data.py --tokenizer)"
        )


def fit_weights(source: str, weights: dict[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """GPT-2's tensors as the state dict of `model`: renamed, transposed, cut to its positions, padded to its rows."""
    # OpenAI's own files lack the prefix. Old files also hold the causal mask, and some the tied head once more.
    weights = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in weights.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    head = weights.pop("lm_head.weight", None)
    expected = model.state_dict()
    if missing := expected.keys() - weights.keys():
        raise UserError(f"--init-from {source}: {len(missing)} tensors are missing, {min(missing)} among them")
    if unknown := weights.keys() - expected.keys():
        raise UserError(f"--init-from {source}: {len(unknown)} tensors are no GPT-2's, {min(unknown)} among them")
    if head is not None and not torch.equal(head, weights["transformer.wte.weight"]):
        raise UserError(f"--init-from {source}: its output head is not tied to its embedding; only such can be trained")

    c = model.config
    for name, tensor in weights.items():
        if name.endswith(TRANSPOSED):
            tensor = tensor.T
        rows = len(expected[name])
        if name == "transformer.wpe.weight":
            tensor = tensor[:rows]
        elif name == "transformer.wte.weight" and len(tensor) == c.vocab_size:
            tensor = torch.cat([tensor, tensor.new_zeros(rows - c.vocab_size, c.n_embd)])
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise UserError(
                f"--init-from {source}: {name} is {weights[name].dtype} of shape {tuple(weights[name].shape)}, which is "
                "not what its config.json leads to"
            )
        weights[name] = tensor.float()
    return weights
