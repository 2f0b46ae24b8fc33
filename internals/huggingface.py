"""A model as a Hugging Face folder, which transformers opens. `huggingface_import.py` is the way back.

Every tokenizer here is a byte-level BPE like GPT-2's (Radford et al., 2019); `bytes` is the one without merges. Those
trained here cut text by another pattern, which only tokenizer.json can express: vocab.json and merges.txt would be read
as GPT-2's.
"""

from pathlib import Path

import tiktoken
from safetensors.torch import save
from torch import Tensor

from config import GenerateConfig
from internals.files import as_json
from internals.tokenizer_json import END_OF_TEXT, is_own, merges, to_json, vocabulary
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

generate = pipeline("text-generation", model=$quoted)
print(generate("$prompt", max_new_tokens=$new_tokens)[0]["generated_text"])
```

A prompt and its continuation have $context tokens at most, the model's context. A larger `max_new_tokens` ends in an error.

`transformers` reads `<|endoftext|>` in a text as the end of an article. With `split_special_tokens=True` its tokenizer
reads it literally, as in training."""


def write_huggingface(folder: Path, model: GPT, tokenizer: tiktoken.Encoding) -> None:
    """Write files for transformers' AutoModelForCausalLM, AutoTokenizer and pipeline, in the model's dtype."""
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
    # Without a limit the pipeline of transformers adds 256 tokens, and fails (IndexError) once the context is full.
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
    """The text of each tokenizer file in a Hugging Face folder, by file name."""
    own = is_own(tokenizer)
    settings = {
        # GPT-2's class cuts by GPT-2's pattern, whatever tokenizer.json says.
        "tokenizer_class": "PreTrainedTokenizerFast" if own else "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # generating adds tokens on the right
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT),
    }
    texts = {"tokenizer.json": to_json(tokenizer), "tokenizer_config.json": as_json(settings)}
    if own:
        return texts
    merge_list = "\n".join(["#version: 0.2", *merges(tokenizer), ""])
    return {**texts, "vocab.json": as_json(vocabulary(tokenizer)), "merges.txt": merge_list}
