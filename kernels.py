"""A few rows times a matrix on a CPU, as fast as the matrix can be read: what generating text is made of.

A new token is one row times every matrix of the model. `F.linear` is made for many rows; which of PyTorch's other
kernels does better with few depends on the processor, and may be twice as fast on one and half as fast on another. The
rules in `choose` are what was measured on an AMD EPYC and on an Intel Xeon with AMX (benchmarks/LOG.md). They follow
from the processor and not from a timing, so that the same seed makes the same text every time.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import checkpoint
from model import GPT

LARGE = 1 << 22  # elements: such a matrix comes from memory, a smaller one may be in a cache

# x (rows, in), weight (out, in), bias (out,) -> (rows, out)
Kernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def matrix_first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By the product W x^T. One row goes in twice: with a single column, another kernel would be taken."""
    columns = x.repeat(2 if len(x) == 1 else 1, 1).T  # (in, columns)
    y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)  # (out, columns)
    return y.T[: len(x)].contiguous()


def without_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By PyTorch's own kernels for bfloat16, which are at work before oneDNN, made for large products, is prepared."""
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        if len(x) > 1:
            return F.linear(x, weight, bias)
        y = torch.mv(weight, x[0])  # addmv, with the bias in it, takes ten times as long
        return (y if bias is None else y + bias)[None]
    finally:
        torch.backends.mkldnn.enabled = enabled


@functools.cache
def processor() -> tuple[bool, bool]:
    """Whether the CPU is AMD's, and whether it has AMX, Intel's units for matrices in bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    return "AMD" in capabilities.get("cpu_name", ""), capabilities.get("amx_bf16", False)


def choose(weight: Tensor) -> tuple[Kernel, int]:
    """The fastest kernel for a few rows times `weight`, and up to how many rows that is so; above, it is `F.linear`."""
    is_amd, has_amx = processor()
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and is_amd and torch.backends.mkl.is_available():
        return matrix_first, 8  # in float32 F.linear is Intel's MKL
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        if has_amx:
            return (matrix_first, 8) if weight.numel() >= LARGE else (without_onednn, 1)
        return without_onednn, 2
    return F.linear, 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, (..., in) to (..., out), by the kernel that `choose` has for so many rows."""
    kernel, most_rows = choose(weight)
    rows = x.numel() // x.size(-1)
    if rows > most_rows or torch.is_grad_enabled() or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    return kernel(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], -1)


@contextlib.contextmanager
def few_rows(model: GPT) -> Iterator[None]:
    """Inside, all products in `model` are `linear`'s, where that makes a difference. Its results differ by rounding."""
    changed: list[tuple[nn.Module, str]] = []

    def use(module: nn.Module, method: str, weight: Tensor, bias: Tensor | None) -> None:
        if choose(weight)[0] is not F.linear:
            setattr(module, method, functools.partial(linear, weight=weight, bias=bias))
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


@torch.inference_mode()
def fastest_dtype(model: GPT, device: torch.device) -> tuple[torch.dtype, str]:
    """The weights' dtype that generates fastest on a device, and why.

    What takes the time is one row times a matrix, at the speed of reading the matrix from memory, and not the products
    of large matrices that training is made of. So on a CPU such a product is timed, with rows of the model's own head,
    in turn.
    """
    if device.type != "cpu":
        return checkpoint.resolve_dtype("auto", device)
    float32 = model.transformer.wte.weight[:16_384]
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    heads = {dtype: float32.to(dtype) for dtype in times}
    for _ in range(7):
        for dtype, head in heads.items():
            begin = time.perf_counter()
            linear(head[:1], head)
            times[dtype].append(time.perf_counter() - begin)
    speedup = min(times[torch.float32]) / min(times[torch.bfloat16])  # the least disturbed by other work
    if speedup > 1.2:
        return torch.bfloat16, f"{speedup:.1f} times as fast as float32 in one row times a matrix on this CPU"
    return torch.float32, "bfloat16 is not faster on this CPU"
