"""Sampling: draws agree with the exact probabilities, and a seed makes the same tokens again."""

import math

import pytest
import torch
from generating import prompt_of, random_model, tokens_of

import generate
from internals.start import UserError

LOGITS = [2.0, 1.0, 1.0, 0.5, 0.0, -0.3, -1.0, -1.0, -2.0, 3.0, 0.2, -4.0]


def exact(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """The probabilities by definition, one token after the other, in float64."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def chi_square_limit(degrees: int) -> float:
    """Exceeded by chance once in 100,000 times (Wilson and Hilferty, 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.265 * math.sqrt(2 / (9 * degrees))) ** 3


def draw(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.tensor(logits).expand(50_000, -1)
    tokens = generate.sample(rows, generate.Sampling(temperature, top_k, top_p, generator=generator))
    assert tokens.shape == (50_000,) and tokens.dtype == torch.int64
    return torch.bincount(tokens, minlength=len(logits)).tolist()


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, None, 1.0), (0.5, None, 1.0), (3.0, None, 1.0), (1.0, 4, 1.0), (1.0, 1, 1.0), (0.8, 9, 1.0),
        (1.0, 12, 1.0), (1.0, 1000, 1.0), (1.0, None, 0.9), (1.0, None, 0.5), (1.0, None, 0.01), (2.0, 6, 0.8),
        (0.7, 1000, 0.95), (1.0, None, 0.999999),
    ],
)  # fmt: skip
def test_draws_agree_with_the_exact_probabilities(temperature, top_k, top_p):
    counts = draw(LOGITS, temperature, top_k, top_p)
    expected = [50_000 * p for p in exact(LOGITS, temperature, top_k, top_p)]
    assert all(count == 0 for count, e in zip(counts, expected, strict=True) if e == 0)
    likely = [(count, e) for count, e in zip(counts, expected, strict=True) if e >= 5]
    if len(likely) > 1:
        assert sum((count - e) ** 2 / e for count, e in likely) < chi_square_limit(len(likely) - 1)


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> tuple[float, float]:
    """The statistic of `counts` against the probabilities `p`, both (K,), and its limit. Rare outcomes count as one."""
    expected = counts.sum() * p
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])).clamp_min(1e-9)
    return ((counts - expected) ** 2 / expected).sum().item(), chi_square_limit(len(counts) - 1)


@pytest.mark.parametrize(
    "dtype, temperature, top_k",
    [(torch.float32, 0.7, None), (torch.bfloat16, 1.0, None), (torch.bfloat16, 0.8, 200)],
)
def test_draws_from_a_large_vocabulary_agree_with_softmax(dtype, temperature, top_k):
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(50_257, generator=generator)).to(dtype)
    exact = (logits.double() / temperature).softmax(0)
    if top_k:
        likeliest = logits.float().topk(top_k).indices
        exact = torch.zeros_like(exact).scatter(0, likeliest, exact[likeliest] / exact[likeliest].sum())
    counts, sampling = torch.zeros(50_257), generate.Sampling(temperature, top_k, generator=generator)
    for _ in range(40):
        counts += torch.bincount(generate.sample(logits.expand(50, -1), sampling), minlength=50_257)
    statistic, limit = chi_square(counts, exact)
    assert statistic < limit


def test_each_row_of_a_batch_is_drawn_from_its_own_distribution_and_by_itself():
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, -1.0], [0.0, 0.0, -9.0]])
    p, generator = logits.double().softmax(1), torch.Generator().manual_seed(2)
    rows = logits.repeat(20_000, 1)  # (60,000, 3): the three rows in turn
    tokens = generate.sample(rows, generate.Sampling(generator=generator)).view(20_000, 3)
    together = torch.bincount(tokens @ torch.tensor([9, 3, 1]), minlength=27)
    statistic, limit = chi_square(together, (p[0, :, None, None] * p[1, :, None] * p[2]).flatten())
    assert statistic < limit


@pytest.mark.parametrize(
    "uniform, index", [(0.0, 5), (1 - 2**-53, 1), (0.4, 1), (1.4e-8, 5), (4e-8, 4), (7e-8, 3), (1e-7, 2)]
)
def test_a_draw_is_exact_to_the_rarest_token(monkeypatch, uniform, index):
    """Float32 would give each of the rare tokens nothing, or four times its share."""
    p = torch.tensor([[0.0, 1.0, 3e-8, 3e-8, 3e-8, 3e-8, 0.0]])
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **options: torch.full(shape, uniform, dtype=dtype))
    assert generate.draw(p).tolist() == [[index]]


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_logits_that_become_nan_later_are_an_error(sampling):
    logits = torch.tensor([LOGITS, [math.nan] * len(LOGITS)])
    with pytest.raises(UserError, match="infinite or NaN"):
        generate.sample(logits, generate.Sampling(**sampling))


def test_a_seed_makes_the_same_tokens_again():
    model, prompt = random_model(block_size=64), prompt_of(5)

    def tokens(seed: int, **sampling) -> list[list[int]]:
        return tokens_of(model, prompt, 30, generator=torch.Generator().manual_seed(seed), **sampling)

    for sampling in ({}, {"top_k": 20}, {"top_p": 0.9}, {"num_samples": 3}):
        assert tokens(1, **sampling) == tokens(1, **sampling) != tokens(2, **sampling)


def test_top_k_keeps_exactly_k_of_equals():
    # The first two are kept. Of the three equal ones after them one is kept, always the same.
    counts = draw([2.0, 1.0, 0.0, 0.0, 0.0, -1.0], 1.0, 3, 1.0)
    chosen = [token for token, count in enumerate(counts) if count]
    assert len(chosen) == 3 and chosen[:2] == [0, 1] and chosen[2] in (2, 3, 4)
    expected = [50_000 * p for p in exact([2.0, 1.0, 0.0], 1.0, None, 1.0)]
    assert sum((counts[c] - e) ** 2 / e for c, e in zip(chosen, expected, strict=True)) < chi_square_limit(2)


def test_extreme_temperatures_are_no_special_case():
    assert draw(LOGITS, 1e-300, None, 1.0)[9] == 50_000
    assert draw(LOGITS, 1e-3, 5, 0.9)[9] == 50_000
    counts = draw(LOGITS, 1e30, None, 1.0)
    assert sum((count - 50_000 / 12) ** 2 / (50_000 / 12) for count in counts) < chi_square_limit(11)


@pytest.mark.parametrize("top_p", [1e-3, 1e-30, 5e-324])
def test_the_smallest_top_p_leaves_the_likeliest_token(top_p):
    assert draw(LOGITS, 1.0, None, top_p)[9] == draw(LOGITS, 1.0, 5, top_p)[9] == 50_000


def test_temperature_0_is_greedy():
    assert draw(LOGITS, 0, None, 1.0)[9] == 50_000
    assert generate.sample(torch.tensor([LOGITS]), generate.Sampling(0, top_k=3, top_p=0.1)).tolist() == [9]
