"""A second GPT-2, to check exported files against: plain PyTorch that does not use model.py.

    read_huggingface, read_gguf    the files of an export -> the GPT-2 that they describe
    check                          does it compute what the model computes?

If somebody changes the architecture in model.py, the files say "GPT-2" all the same. Only the numbers show it.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from internals.memory import is_out_of_memory
from internals.start import UserError, first_line

TOKENS = 256  # in the comparison, at most: the default model's whole context
TOLERANCE = 1e-7  # relative to the largest logit; all of it is computed in float64, where rounding is below 1e-12

# llama.cpp's names for the parts of a GPT-2
GGUF_NAMES = {
    "token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "attn_norm": "ln_1", "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj", "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
NORMS, PRODUCTS = ("ln_1", "ln_2"), ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True)
class GPT2:
    """GPT-2 (Radford et al., 2019). `weights` has GPT-2's own names, and matrices are (in, out)."""

    weights: dict[str, Tensor]
    n_layer: int
    n_head: int
    eps: float

    def logits(self, idx: Tensor) -> Tensor:
        """(T,) token ids to logits (T, V), in float64."""
        x = self["wte.weight"][idx] + self["wpe.weight"][: len(idx)]  # (T, C)
        for n in range(self.n_layer):
            x = x + self.attention(self.norm(x, f"h.{n}.ln_1"), f"h.{n}.attn")
            hidden = self.linear(self.norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc")
            gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
            x = x + self.linear(gelu, f"h.{n}.mlp.c_proj")
        return self.norm(x, "ln_f") @ self["wte.weight"].T

    def attention(self, x: Tensor, name: str) -> Tensor:
        T, C = x.shape
        heads = self.linear(x, f"{name}.c_attn").view(T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(1, 2, 0, 3)  # (H, T, D) each
        scores = q @ k.transpose(1, 2) / math.sqrt(C // self.n_head)  # (H, T, T)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self.linear(y.transpose(0, 1).reshape(T, C), f"{name}.c_proj")

    def norm(self, x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * self[f"{name}.weight"] + self[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self[f"{name}.weight"] + self[f"{name}.bias"]

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name].double()


def tensor_names(n_layer: int) -> set[str]:
    """The names of all tensors of a GPT-2: `{"wte.weight", ..., "h.0.ln_1.weight", ...}`."""
    parts = ["ln_f", *(f"h.{n}.{part}" for n in range(n_layer) for part in (*NORMS, *PRODUCTS))]
    return {"wte.weight", "wpe.weight"} | {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}


# ----------------------------------------------------------------------------------------------------------------------
# Reading the files


def read_huggingface(folder: Path) -> GPT2:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load((folder / "model.safetensors").read_bytes())  # not mapped: some drives rename no folder in use
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    return GPT2(weights, config["n_layer"], config["n_head"], config["layer_norm_epsilon"])


def read_gguf(folder: Path) -> GPT2:
    import gguf  # imported here: only this format needs it

    reader = gguf.GGUFReader(folder / "model.gguf")
    layers, heads, eps = (
        reader.get_field(f"gpt2.{key}").contents()
        for key in ("block_count", "attention.head_count", "attention.layer_norm_epsilon")
    )
    weights = {}
    for tensor in reader.tensors:
        *block, part, kind = tensor.name.split(".")  # blk.0.attn_qkv.weight, output_norm.bias
        name = ".".join([*(["h", block[1]] if block else []), GGUF_NAMES[part], kind])
        value = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        product = GGUF_NAMES[part] in PRODUCTS and kind == "weight"
        weights[name] = value.T if product else value  # llama.cpp has (out, in)
    return GPT2(weights, layers, heads, eps)


# ----------------------------------------------------------------------------------------------------------------------
# The comparison


def check_tensors(names: set[str], n_layer: int) -> None:
    """Refuse a model whose parameters (`{"transformer.wte.weight", ...}`) are not those of a GPT-2."""
    expected = {f"transformer.{name}" for name in tensor_names(n_layer)}
    for what, different in (("lacks", expected - names), ("has", names - expected)):
        if different:
            raise something_else(f"it {what} the tensor {min(different)}" + ", which GPT-2 does not" * (what == "has"))


@torch.no_grad()
def check(model: nn.Module, reference: GPT2) -> None:
    """Refuse a model whose logits differ from those of its export.

    Args:
        model: idx (1, T) to logits (1, T, V), in eval mode, with a `config`. It is not changed.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(config.vocab_size, (min(TOKENS, config.block_size),), generator=generator)
    try:
        theirs = reference.logits(idx)
        ours = copy.deepcopy(model).double()(idx[None])[0]
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise  # export.py has a message for it
        raise something_else(f"they cannot be compared in float64: {first_line(error)}") from error
    if ours.shape != theirs.shape:
        raise something_else(f"its logits are {tuple(ours.shape)}, those of GPT-2 {tuple(theirs.shape)}")
    bound = TOLERANCE * theirs.nan_to_num(posinf=0, neginf=0).abs().max().item()
    if not torch.allclose(ours, theirs, rtol=0, atol=bound, equal_nan=True):
        difference = (ours - theirs).abs().max().item()
        raise something_else(f"their logits differ by up to {difference:.2g}")


def something_else(reason: str) -> UserError:
    return UserError(
        f"the model does not compute what GPT-2 computes ({reason}); other tools would read its files wrongly, so "
        "nothing was written. docs/export.md says what can be exported"
    )
