"""A model as a Hugging Face folder, which transformers opens. `huggingface_import.py` is the way back.

Every tokenizer here is a byte-level BPE like GPT-2's (Radford et al., 2019), `bytes` being the one without merges.
"""

import itertools
from pathlib import Path

import tiktoken
from safetensors.torch import save
from torch import Tensor

from config import GenerateConfig
from internals.files import as_json
from internals.tokenizer import END_OF_TEXT
from model import GPT

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

generate = pipeline("text-generation", model="$name")
print(generate("$prompt", max_new_tokens=$new_tokens)[0]["generated_text"])
```

A prompt and its continuation have $context tokens at most, the model's context. A larger `max_new_tokens` ends in an error.

`transformers` reads `<|endoftext|>` in a text as the end of an article. With `split_special_tokens=True` its tokenizer
reads it literally, as in training."""


def write_huggingface(folder: Path, model: GPT, tokenizer: tiktoken.Encoding) -> None:
    """Write what transformers opens with AutoModelForCausalLM, AutoTokenizer and pipeline, in the model's dtype."""
    c = model.config
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot_token)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **ARCHITECTURE,
        **{"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_inner": c.n_inner},
        **{"n_positions": c.block_size, "n_ctx": c.block_size, "vocab_size": c.vocab_size},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), c.dropout),
        "dtype": str(model.transformer.wte.weight.dtype).removeprefix("torch."),
        **ends,
    }
    # The sampling defaults of generate.py. The default of transformers, greedy text, repeats itself.
    sampling = {"do_sample": True, "temperature": GenerateConfig.temperature, "top_k": GenerateConfig.top_k}
    # Without a limit the pipeline of transformers adds 256 tokens, and fails with an IndexError where the context is full.
    limit = {"max_length": c.block_size}
    texts = {
        **tokenizer_files(tokenizer, c.block_size),
        "generation_config.json": as_json({**ends, **limit, **sampling}),
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
        "padding_side": "left",  # generating adds tokens on the right
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT),
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
