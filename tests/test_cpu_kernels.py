"""Packed weights: products stay the same, also in several threads, and only processors that gain from them use them."""

import math
import os
import platform
import re
import threading

import pytest
import torch
from generating import TINY, random_model, tokens_of
from torch import nn
from torch.nn import functional as F

from internals import cpu_kernels
from internals.cpu_kernels import Float16Linear, PackedLinear, pack_weights
from internals.device import resolve_dtype
from internals.start import UserError
from internals.surprise import NOT_FINITE
from model import GPT, KeyValueCache

PROCESSORS = {
    "AMD": {"cpu_name": "AMD EPYC 9R14", "avx512_bf16": True},
    "old AMD": {"cpu_name": "AMD Ryzen 7 5800X", "avx512_bf16": False},
    "AMX": {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True},
    "another": {"architecture": "arm64"},
}

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="needs oneDNN and a processor that it supports in bfloat16",
)
needs_fbgemm = pytest.mark.skipif(not cpu_kernels.has_float16_products(), reason="needs x86 with AVX2")


def pretend(monkeypatch, name: str) -> None:
    monkeypatch.setattr(cpu_kernels, "capabilities", lambda: PROCESSORS[name])


def is_packed(model: GPT, packed: type[nn.Module] = PackedLinear) -> bool:
    kinds = {type(module) for module in model.modules()}
    assert (nn.Linear in kinds) != (packed in kinds)
    assert ("head" in vars(model)) == (packed in kinds)
    return packed in kinds


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs /proc/cpuinfo")
def test_the_processor_is_what_the_system_says():
    with open("/proc/cpuinfo") as file:
        text = file.read()
    flags = text.split()
    assert cpu_kernels.is_amd() == ("AuthenticAMD" in text)
    for flag in ("amx_bf16", "avx512_bf16"):
        assert bool(cpu_kernels.capabilities().get(flag)) == (flag in flags)


@pytest.mark.parametrize(
    "kind, dtype, tolerance",
    [
        pytest.param(PackedLinear, torch.float32, 1e-5, marks=needs_onednn),
        pytest.param(PackedLinear, torch.bfloat16, 0.02, marks=needs_onednn),
        pytest.param(Float16Linear, torch.float32, 1e-3, marks=needs_fbgemm),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_packed_product_is_the_product(kind, dtype, tolerance, with_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 24, dtype=dtype), torch.randn(40, dtype=dtype) if with_bias else None
    packed = kind(weight, bias)
    for shape in [(1, 1), (2, 1), (1, 2), (3, 1), (8, 1), (2, 4), (1, 9), (1,)]:
        x = torch.randn(*shape, 48, dtype=dtype)[..., ::2]  # not contiguous
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                y = packed(x)
            assert (y.shape, y.dtype) == (expected.shape, dtype) and y.is_contiguous()
            assert (y - expected).abs().max() < tolerance * expected.abs().max()


@needs_onednn
@pytest.mark.parametrize(
    "name, float32, bfloat16",
    [("AMD", True, True), ("old AMD", True, False), ("AMX", False, True), ("another", False, False)],
)
def test_what_is_packed_follows_from_the_processor(monkeypatch, name, float32, bfloat16):
    pretend(monkeypatch, name)
    assert is_packed(pack_weights(random_model())) == float32
    assert is_packed(pack_weights(random_model().to(torch.bfloat16))) == bfloat16
    assert not is_packed(pack_weights(random_model().to("meta")))  # as on any device but a CPU
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # as in a PyTorch without oneDNN
    assert not is_packed(pack_weights(random_model()))


@needs_fbgemm
def test_on_a_cpu_float16_is_for_generating_on_x86(monkeypatch):
    cpu = torch.device("cpu")
    for machine in ("x86_64", "AMD64"):  # Linux's and Windows' name
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert resolve_dtype("float16", cpu, generating=True) == (torch.float16, "as requested")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")  # where PyTorch 2.11 also names FBGEMM
    with pytest.raises(UserError, match="--dtype float16: CPUs gain nothing from it"):
        resolve_dtype("float16", cpu, generating=True)


@needs_fbgemm
def test_a_float16_model_has_float16_matrices_and_computes_in_float32(monkeypatch):
    packed = pack_weights(random_model().half())
    assert is_packed(packed, Float16Linear)
    assert {parameter.dtype for parameter in packed.parameters()} == {torch.float32}
    monkeypatch.setattr(cpu_kernels, "has_float16_products", lambda: False)
    assert not is_packed(pack_weights(random_model().half()), Float16Linear)


@needs_fbgemm
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e5])
def test_what_float16_cannot_hold_is_not_taken_for_a_large_number(value):
    """FBGEMM would take each for 65,504."""
    model = random_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = value
    with pytest.raises(UserError, match=re.escape(NOT_FINITE)):
        tokens_of(pack_weights(model.half()), torch.tensor([1, 2, 3]), 1)


@pytest.mark.parametrize(
    "kind, dtype, tolerance",
    [
        pytest.param(PackedLinear, torch.float32, 1e-5, marks=needs_onednn),
        pytest.param(PackedLinear, torch.bfloat16, 0.05, marks=needs_onednn),
        pytest.param(Float16Linear, torch.float16, 2e-3, marks=needs_fbgemm),
    ],
)
def test_a_packed_model_computes_the_same(monkeypatch, kind, dtype, tolerance):
    """One token at a time, every product by `kind`, the head included."""
    pretend(monkeypatch, "AMD")
    model, exact = pack_weights(random_model().to(dtype)), random_model()
    assert not model.training and not any(module.training for module in model.modules())
    called, forward = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: called.append(x.shape[:-1].numel()) or forward(self, x))
    model.head = model.head.__self__.forward  # rebind it to the patched method
    monkeypatch.setattr(F, "linear", None)
    idx = torch.randint(TINY.vocab_size, (1, 16))
    cache, logits = KeyValueCache(model.config), []
    with torch.no_grad():
        for position in range(16):
            logits.append(model(idx[:, position : position + 1], cache=cache)[0, 0].float())
        monkeypatch.undo()
        expected = exact(idx)[0]
    assert (torch.stack(logits) - expected).std() / expected.std() < tolerance
    assert called == [1] * 16 * (4 * 2 + 1)
    wte = model.transformer.wte.weight
    assert torch.equal(wte, random_model().to(dtype).transformer.wte.weight.to(wte.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["packed", "not packed", "in training"])
def test_threads_that_share_a_model_get_what_each_alone_gets(dtype, kind):
    model = random_model(dropout=0.5, block_size=64).to(dtype)
    if kind == "packed":
        model = pack_weights(model)
    if kind == "in training":
        model.train()
    prompts = torch.randint(TINY.vocab_size, (4, 5))

    def text(i: int) -> list[list[int]]:
        draw = torch.Generator().manual_seed(i)
        return tokens_of(model, prompts[i], 100, num_samples=i + 1, temperature=i, generator=draw)

    alone = [text(i) for i in range(4)]
    together: list[list[list[int]] | None] = [None] * 4
    threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, text(i))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert torch.backends.mkldnn.enabled
    assert model.training == (kind == "in training")
