"""A model in GGUF, llama.cpp's format."""

from pathlib import Path

import tiktoken
import torch
from torch import nn

from internals.huggingface import ARCHITECTURE, real_weights
from internals.start import UserError
from internals.tokenizer_json import END_OF_TEXT, is_own, merges, vocabulary
from model import GPT

USAGE = """With [llama.cpp](https://github.com/ggml-org/llama.cpp):

```sh
llama-server -m $path
curl http://127.0.0.1:8080/v1/completions -d '{"prompt": "$prompt", "max_tokens": $new_tokens}'
```

A prompt and its continuation have $context tokens at most. `llama-server` stops there. In other programs, such as
llama-cpp-python, limit `max_tokens`: beyond the context llama.cpp ends the whole process. llama-cpp-python 0.3.36 leaves
tokens of more than 32 bytes (long words in many scripts) out of its text, unless it is given the tokenizer of an export in
Hugging Face format."""


# llama.cpp's names for a tensor's dtype, and for a file whose matrices have it
NUMBERS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


def matrices(model: GPT) -> list[nn.Parameter]:
    """The tensors that llama.cpp takes in another dtype than float32: the embedding of tokens and the projections."""
    projections = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return [model.transformer.wte.weight, *projections]


def round_matrices(model: GPT, dtype: torch.dtype) -> GPT:
    """Round the matrices. Changes the model.

    Its norms, biases and embedding of positions stay in float32, as in llama.cpp's own conversion.
    """
    for matrix in matrices(model):
        matrix.data = matrix.data.to(dtype)
    return model


def write_gguf(folder: Path, model: GPT, tokenizer: tiktoken.Encoding, name: str) -> None:
    """Write `model.gguf`, each tensor in its own dtype. llama.cpp's llama-quantize can make it smaller."""
    try:
        import gguf  # imported here: only this format needs it
    except ImportError as error:
        raise UserError("--format gguf: needs the gguf package; pip install gguf") from error
    if not hasattr(gguf.ReaderField, "contents"):  # gpt2_reference.py reads the file with it
        raise UserError("--format gguf: the gguf package is too old; pip install --upgrade gguf")

    c, vocab = model.config, vocabulary(tokenizer)
    writer = gguf.GGUFWriter(folder / "model.gguf", gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[model.transformer.wte.weight.dtype]])
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_context_length(c.block_size)
    writer.add_layer_norm_eps(ARCHITECTURE["layer_norm_epsilon"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35" if is_own(tokenizer) else "gpt-2")  # the pattern, by the name of a model
    writer.add_token_list(list(vocab))
    writer.add_token_types([gguf.TokenType.NORMAL] * tokenizer.eot_token + [gguf.TokenType.CONTROL])
    # llama.cpp refuses a vocabulary without merges, such as bytes. This merge never applies to a text.
    writer.add_token_merges(merges(tokenizer) or [f"{END_OF_TEXT} {END_OF_TEXT}"])
    writer.add_bos_token_id(tokenizer.eot_token)
    writer.add_eos_token_id(tokenizer.eot_token)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    for gpt2_name, tensor in real_weights(model).items():  # projections are (out, in) in llama.cpp, as in nn.Linear
        numbers = gguf.GGMLQuantizationType[NUMBERS[tensor.dtype]]
        data = gguf.quantize(tensor.float().numpy(), numbers)  # numpy has no bfloat16
        writer.add_tensor(names.get_name(gpt2_name, try_suffixes=(".weight", ".bias")), data, raw_dtype=numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
