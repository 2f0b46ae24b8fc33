"""Matrix products on a CPU, prepared once for generating text.

Generating reads every weight matrix for every token, with one row of input per sample. `F.linear` takes the matrix as
it was trained, and oneDNN, which computes the product, rearranges it each time. Here the matrix is rearranged once,
after loading. benchmarks/generate.py measures the gain.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import GPT


def pack_weights(model: GPT) -> GPT:
    """Give the model the fastest products for generating, if this processor is known to gain from them.

    Changes the model, which can then only generate: its matrices are no longer parameters. Call it once, when device
    and dtype are final. It changes no setting of PyTorch, and threads may share the model. On a CPU a float16 model
    keeps its matrices in float16 and computes in float32, which is also the dtype of its logits.

    Returns:
        The same model, in eval mode. Its numbers differ from `F.linear`'s by rounding.
    """
    weight = model.transformer.wte.weight
    packed: type[PackedLinear | Float16Linear] | None = None
    if weight.device.type == "cpu" and weight.dtype == torch.float16 and has_float16_products():
        model = model.float()
        # FBGEMM would take infinity and NaN for float16's largest number, and so hide that the model is damaged
        packed = Float16Linear if all(p.sum().isfinite() for p in model.parameters()) else None
    elif weight.device.type == "cpu" and gains_from_packing(weight.dtype):
        packed = PackedLinear
    if packed:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, packed(child.weight, child.bias))
        model.head = packed(weight).forward  # in place of the class's own method
    return model.eval()


class PackedLinear(nn.Module):
    """`nn.Linear` for inference: (..., in) to (..., out), by oneDNN, with the weight in oneDNN's own layout.

    The operators are those that torch.compile uses for the same purpose.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Float16Linear(nn.Module):
    """`nn.Linear` for inference: (..., T, in) to (..., T, out), by FBGEMM, with the weight in float16 and all else in float32.

    Half the bytes to read, with as little as AVX2; but packing takes longer than generating a short text saves. The
    operators are those of PyTorch's dynamic quantization.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight.detach(), None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.weight)


def has_float16_products() -> bool:
    """Whether this PyTorch and this processor have `Float16Linear`'s products: on x86, with AVX2."""
    # PyTorch names FBGEMM on ARM, too
    return platform.machine().lower() in ("x86_64", "amd64") and "fbgemm" in torch.backends.quantized.supported_engines


def gains_from_packing(dtype: torch.dtype) -> bool:
    """Whether products in `dtype` are faster with packed weights on this processor.

    The answer follows from the processor, not from a timing, so that the same seed always gives the same text. In
    float32 on Intel, `F.linear` uses Intel's own MKL, which is fast on one row. docs/experiments.md has the
    measurements.
    """
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # PyTorch for a Mac has no oneDNN
        return False
    if dtype == torch.bfloat16:
        return bool(capabilities().get("avx512_bf16"))
    return dtype == torch.float32 and is_amd()


def is_amd() -> bool:
    return "AMD" in capabilities().get("cpu_name", "")


@functools.cache
def capabilities() -> dict[str, Any]:
    """The processor's name, `cpu_name`, and True for each instruction set it has (`amx_bf16`: Intel's for matrices)."""
    if hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.11 and later
        return dict(torch.cpu.get_capabilities())
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""  # Linux; other systems count as an unknown processor
    name = "AMD" if "AuthenticAMD" in text else ""
    return {"cpu_name": name, **{flag: f" {flag}" in text for flag in ("amx_bf16", "avx512_bf16")}}
