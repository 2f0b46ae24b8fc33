"""The kernels for a few rows: the same product as ever, on every processor that has rules of its own."""

import os

import pytest
import torch
from test_generate import random_model, tokens_of
from torch.nn import functional as F

import generate
from internals import cpu_kernels
from model import KeyValueCache

PROCESSORS = {
    "AMD": {"cpu_name": "AMD EPYC 9R14", "avx512_bf16": True},
    "old AMD": {"cpu_name": "AMD Ryzen 7 5800X", "avx512_bf16": False},
    "AMX": {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True},
    "another": {"architecture": "arm64"},
}


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    """Each processor's rules in turn, with every matrix large: the kernels themselves run on any."""
    monkeypatch.setattr(cpu_kernels, "capabilities", lambda: PROCESSORS[request.param])
    monkeypatch.setattr(cpu_kernels, "LARGE", 1)
    return request.param


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs Linux's own description of the processor")
def test_the_processor_is_what_the_system_says():
    with open("/proc/cpuinfo") as file:
        text = file.read()
    assert cpu_kernels.is_amd() == ("AuthenticAMD" in text)
    assert bool(cpu_kernels.capabilities().get("amx_bf16")) == (" amx_bf16 " in text)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.002)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_product_whatever_the_kernel(processor, dtype, tolerance, with_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 24, dtype=dtype), torch.randn(40, dtype=dtype) if with_bias else None
    for shape in [(1, 1), (2, 1), (1, 2), (3, 1), (8, 1), (2, 4), (1, 9), (1,), ()]:
        x = torch.randn(*shape, 48, dtype=dtype)[..., ::2]  # not contiguous
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                y = cpu_kernels.Linear(weight, bias)(x)
            assert (y.shape, y.dtype) == (expected.shape, dtype) and y.is_contiguous()
            assert (y - expected).abs().max() < tolerance * expected.abs().max()
    assert torch.backends.mkldnn.enabled


def test_kernel_and_dtype_follow_from_the_processor(monkeypatch):
    def chosen(name, dtype, *shape):
        """For 1, 2 and 8 rows."""
        monkeypatch.setattr(cpu_kernels, "capabilities", lambda: PROCESSORS[name])
        return [cpu_kernels.choose(torch.empty(shape, dtype=dtype), rows) for rows in (1, 2, 8)]

    head, other, plain = (50_304, 384), (1536, 384), [F.linear] * 3
    assert chosen("AMX", torch.bfloat16, *head) == [
        cpu_kernels.vector,
        cpu_kernels.matrix_first,
        cpu_kernels.matrix_first,
    ]
    assert chosen("AMX", torch.bfloat16, *other) == [cpu_kernels.native_vector, *plain[1:]]
    for name in ("AMD", "old AMD", "another"):
        assert chosen(name, torch.bfloat16, *head) == [cpu_kernels.native_vector, cpu_kernels.native_linear, *plain[2:]]
    for name in ("AMX", "another"):
        assert chosen(name, torch.float32, *head) == plain
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for name in ("AMD", "old AMD"):
        assert chosen(name, torch.float32, *other) == [cpu_kernels.matrix_first] * 3
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert chosen("AMD", torch.float32, *other) == plain


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_model_computes_the_same_by_them(processor, dtype, tolerance, monkeypatch):
    """Its every product, head included, goes by them, and the model is as before when it is left."""
    called, choose = [], cpu_kernels.choose
    has_rules = choose(torch.empty(1, 1, dtype=dtype), 1) is not F.linear

    def watched(weight, rows):
        kernel = choose(weight, rows)
        return kernel if kernel is F.linear else lambda *args: called.append(len(args[0])) or kernel(*args)

    monkeypatch.setattr(cpu_kernels, "choose", watched)
    model, exact = random_model().to(dtype), random_model()
    idx = torch.randint(300, (1, 16))
    expected = exact(idx)[0]
    attributes = {module: dict(vars(module)) for module in model.modules()}
    cache, logits = KeyValueCache(model.config), []
    with torch.no_grad(), cpu_kernels.few_rows(model):
        for position in range(16):
            logits.append(model(idx[:, position : position + 1], cache=cache)[0, 0].float())
    error = (torch.stack(logits) - expected).std() / expected.std()
    assert error < tolerance
    assert called == ([1] * 16 * (4 * 2 + 1) if has_rules else [])
    assert {module: dict(vars(module)) for module in model.modules()} == attributes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_generations_from_one_model_do_not_disturb_each_other(processor, dtype):
    model = random_model().to(dtype)
    idx = torch.randint(300, (1, 5))
    alone = tokens_of(model, idx, 30, temperature=0)[0]
    first = generate.generate(model, idx, 30, temperature=0)
    begun = [next(first)[0] for _ in range(10)]
    second = generate.generate(model, idx, 30, temperature=0)
    other = [next(second)[0] for _ in range(3)]
    begun += [row[0] for row in first]
    second.close()
    assert not any("forward" in vars(module) or "head" in vars(module) for module in model.modules())
    if dtype == torch.float32:  # in bfloat16 two logits may be equal by rounding, and the kernels choose otherwise
        assert begun == alone and other == alone[:3]
