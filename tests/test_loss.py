"""The chunked loss against the plain way: all logits, then cross-entropy, and autograd for the gradients."""

import math
import shutil

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import model
from config import ModelConfig
from model import GPT, linear_cross_entropy

VOCAB, PADDED, C = 101, 128, 32


def plain(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    return F.cross_entropy(F.linear(x, weight)[:, :vocab_size].float(), targets)


def problem(rows: int = 50, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = (torch.randn(rows, C) * scale).requires_grad_()
    weight = torch.randn(PADDED, C).requires_grad_()
    return x, weight, torch.randint(VOCAB, (rows,))


def gradients(loss_function, x: Tensor, weight: Tensor, targets: Tensor, factor: float = 1.0, dtype=None):
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = loss_function(x, weight, targets, VOCAB)
    return loss.detach(), *torch.autograd.grad(loss * factor, (x, weight))


@pytest.fixture(params=[(1, 1), (8, 2), (64, 8), (32, 32), (1024, 1024)], ids="{0[0]} rows, in parts of {0[1]}".format)
def chunked(request, monkeypatch):
    rows, rows_in_part = request.param
    monkeypatch.setattr(model, "LOGITS_AT_ONCE", rows * PADDED)
    monkeypatch.setattr(model, "LOGITS_AT_ONCE_COMPILED", rows * PADDED)
    monkeypatch.setattr(model, "LOGITS_IN_CACHE", rows_in_part * PADDED)


@pytest.mark.parametrize(("logits", "rows"), [(2**27, 2048), (2048 * 50304 - 1, 1024), (50304, 1), (1, 1)])
def test_a_chunk_has_the_largest_power_of_two_of_rows_that_fits(logits, rows):
    assert model.rows_within(logits, torch.empty(50304, 1, device="meta")) == rows


def test_loss_and_gradients_are_those_of_the_plain_way(chunked):
    for ours, theirs in zip(
        gradients(linear_cross_entropy, *problem(), factor=3.0), gradients(plain, *problem(), factor=3.0), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_loss_of_targets_that_are_the_likeliest_tokens(chunked):
    x, weight, _ = problem()
    targets = F.linear(x, weight)[:, :VOCAB].argmax(1)
    for ours, theirs in zip(
        gradients(linear_cross_entropy, x, weight, targets), gradients(plain, x, weight, targets), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_exact_as_the_plain_way(chunked, dtype):
    exact = gradients(plain, *problem())
    ours, theirs = (gradients(loss, *problem(), dtype=dtype) for loss in (linear_cross_entropy, plain))
    for value, other, reference in zip(ours, theirs, exact, strict=True):
        assert value.dtype == torch.float32
        error, plain_error = ((v - reference).norm() / reference.norm() for v in (value, other))
        assert error <= 2 * plain_error + torch.finfo(dtype).eps / 4


def test_the_gradient_of_a_likely_token_is_as_exact_as_cross_entropys():
    """Where p(target) is almost 1, p - 1 must not lose its last digits to the dtype of the logits."""
    logits = torch.zeros(4, PADDED).to(torch.bfloat16)
    logits[:, 3] = torch.tensor([8.0, 12.0, 16.0, 100.0])
    target = torch.full((4, 1), 3)
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, target[:, 0], reduction="sum").backward()
    losses = model.cross_entropy_(logits, target, with_gradient=True)
    torch.testing.assert_close(
        losses.double().sum(), F.cross_entropy(exact, target[:, 0], reduction="sum"), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(logits.double(), exact.grad, atol=1.5e-7, rtol=2**-8)


def test_padded_rows_get_no_gradient_however_large_they_are(chunked):
    x, weight, targets = problem()
    with torch.no_grad():
        weight[VOCAB:] = 1e4
    loss, _, grad = gradients(linear_cross_entropy, x, weight, targets)
    torch.testing.assert_close(loss, plain(x, weight, targets, VOCAB).detach())
    assert (grad[VOCAB:] == 0).all()
    assert (grad[:VOCAB] != 0).all()


def test_a_target_whose_probability_rounds_to_zero_has_a_finite_loss():
    x, weight, targets = problem(scale=40.0)
    loss = linear_cross_entropy(x, weight, targets, VOCAB)
    assert loss > 150  # exp(-150) is 0 in float32
    torch.testing.assert_close(loss, plain(x, weight, targets, VOCAB))


def test_float16_with_a_gradient_scaler_loses_no_small_gradient():
    """A naive mean over many rows makes the gradients of unlikely tokens too small for float16."""
    x, weight, targets = problem(rows=20_000, scale=0.1)
    *_, exact = gradients(plain, x, weight, targets)
    *_, grad = gradients(linear_cross_entropy, x, weight, targets, factor=2.0**16, dtype=torch.float16)
    torch.testing.assert_close(grad[:VOCAB] / 2**16, exact[:VOCAB], atol=2e-6, rtol=2e-2)


def test_without_gradients_the_loss_is_the_same_and_needs_none():
    x, weight, targets = problem()
    expected = linear_cross_entropy(x, weight, targets, VOCAB)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, VOCAB)
    assert expected.requires_grad and not loss.requires_grad
    assert loss == expected
    with torch.inference_mode():
        assert linear_cross_entropy(x, weight, targets, VOCAB) == expected


def test_backward_twice_through_one_graph_gives_the_same_gradient():
    x, weight, targets = problem()
    loss = linear_cross_entropy(x, weight, targets, VOCAB)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_a_loss_that_is_no_number_is_not_hidden():
    x, weight, targets = problem()
    with torch.no_grad():
        x[3, 5] = math.nan
    loss, grad_x, _ = gradients(linear_cross_entropy, x, weight, targets)
    assert loss.isnan() and grad_x[3].isnan().all() and grad_x[4].isfinite().all()


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_without_a_break_it_is_the_same():
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, n_inner=32, block_size=8, vocab_size=VOCAB))
    idx, targets = torch.randint(VOCAB, (2, 4, 8))
    results = []
    for forward in (gpt, torch.compile(gpt, fullgraph=True, dynamic=False)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = forward(idx, targets)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(gpt.parameters()))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=2e-2, rtol=2e-2)
