"""A few rows times a matrix on a CPU, as fast as the matrix can be read: what generating text is made of.

A new token is one row times every matrix of the model. `F.linear` is made for many rows; which of PyTorch's other
kernels does better with few depends on the processor, and may be twice as fast on one and half as fast on another. The
rules in `choose` are what was measured on an AMD EPYC and on an Intel Xeon with AMX (benchmarks/LOG.md). They follow
from the processor and not from a timing, so that the same seed makes the same text every time.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT

LARGE = 1 << 22  # elements: such a matrix comes from memory, a smaller one may be in a cache
MOST_ROWS = 8  # above, F.linear was as fast or faster on both processors

# x (rows, in), weight (out, in), bias (out,) -> (rows, out)
Kernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def matrix_first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By the product W x^T. One row goes in twice: with a single column, another kernel would be taken."""
    columns = x.repeat(2 if len(x) == 1 else 1, 1).T  # (in, columns)
    y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)  # (out, columns)
    return y.T[: len(x)].contiguous()


def vector(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row, as a vector."""
    y = torch.mv(weight, x[0])  # addmv, with the bias in it, may take ten times as long
    return (y if bias is None else y + bias)[None]


def without_onednn(kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By PyTorch's own kernels for bfloat16, which are at work before oneDNN, made for large products, is prepared."""
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        return kernel(x, weight, bias)
    finally:
        torch.backends.mkldnn.enabled = enabled


native_vector = functools.partial(without_onednn, vector)
native_linear = functools.partial(without_onednn, F.linear)


@functools.cache
def capabilities() -> dict[str, Any]:
    """What the CPU can do: `cpu_name`, and True for each set of instructions (`amx_bf16`: Intel's for bfloat16 matrices)."""
    if hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.11 and later
        return dict(torch.cpu.get_capabilities())
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""  # Linux; other systems are treated as an unknown CPU
    name = "AMD" if "AuthenticAMD" in text else ""
    return {"cpu_name": name, **{flag: f" {flag}" in text for flag in ("amx_bf16", "avx512_bf16")}}


def is_amd() -> bool:
    return "AMD" in capabilities().get("cpu_name", "")


def choose(weight: Tensor, rows: int) -> Kernel:
    """The fastest kernel for `rows` rows, at most MOST_ROWS, times `weight`."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        if is_amd() and torch.backends.mkl.is_available():  # F.linear is Intel's MKL
            return matrix_first
    elif weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        if not capabilities().get("amx_bf16"):
            return {1: native_vector, 2: native_linear}.get(rows, F.linear)
        if weight.numel() >= LARGE:
            return vector if rows == 1 else matrix_first
        if rows == 1:
            return native_vector
    return F.linear


class Linear:
    """`F.linear` of (..., in), to (..., out), by the kernel that `choose` has for so many rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias = weight, bias
        self.kernels = {rows: choose(weight, rows) for rows in range(1, MOST_ROWS + 1)}

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        kernel = self.kernels.get(rows, F.linear)
        if kernel is F.linear or torch.is_grad_enabled() or x.dtype != self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        return kernel(x.reshape(rows, -1), self.weight, self.bias).view(*x.shape[:-1], -1)


@contextlib.contextmanager
def few_rows(model: GPT) -> Iterator[None]:
    """Inside, all products in `model` are `Linear`'s, where that makes a difference. Its results differ by rounding."""
    changed: list[tuple[nn.Module, str]] = []

    def use(module: nn.Module, method: str, weight: Tensor, bias: Tensor | None) -> None:
        linear = Linear(weight, bias)
        if any(kernel is not F.linear for kernel in linear.kernels.values()):
            setattr(module, method, linear)
            changed.append((module, method))

    use(model, "head", model.transformer.wte.weight, None)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            use(module, "forward", module.weight, module.bias)
    try:
        yield
    finally:
        for module, method in changed:
            vars(module).pop(method, None)  # the class's own is what is left
