"""Generating: the cache against no cache and against transformers, sampling against exact probabilities, the text stream,
and the command in terminals and pipes."""

import dataclasses
import io
import json
import math
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import REPO, assert_user_error, run_script, unboxed, without_network_settings
from test_model import transformers_twin

import generate
from config import GenerateConfig, ModelConfig
from internals import checkpoint, text_stream
from internals.cli import parse
from internals.start import UserError
from internals.text_stream import TextStream, print_json
from internals.tokenizer import load_tokenizer
from model import GPT, KeyValueCache

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_inner=64, block_size=16, vocab_size=300)


def random_model(seed: int = 0, **overrides) -> GPT:
    """A model whose output depends on its context; with GPT-2's small initial weights it hardly would."""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(TINY, **overrides)).eval()
    for name, parameter in model.named_parameters():
        gain = "ln_" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(gain), std=0.3)
    return model


def prompt_of(length: int) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, (length,))


def tokens_of(model: GPT, idx: torch.Tensor, new: int, **sampling) -> list[list[int]]:
    """All of `generate`'s tokens, one list per sample."""
    steps = list(generate.generate(model, idx, new, generate.Sampling(**sampling)))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@torch.no_grad()
def plain_loop(model: GPT, idx: torch.Tensor, new: int, samples: int = 1) -> list[list[int]]:
    """`generate` in its simplest form, without a cache. Greedy, except for `fan`'s first tokens."""
    block_size = model.config.block_size
    window = idx[None, -block_size:]
    out = [model(window)[0, -1].topk(samples).indices]
    window = window.expand(samples, -1)
    while len(out) < new:
        window = torch.cat((window, out[-1][:, None]), dim=1)
        if window.size(1) > block_size:
            window = window[:, -max(1, block_size // 2) :]
        out.append(model(window)[:, -1].argmax(-1))
    return torch.stack(out, dim=1).tolist()


@pytest.fixture
def fan(monkeypatch):
    """Make samples differ without chance: each begins with a different likely token and is greedy from there."""

    def sample(logits, sampling):
        first = logits.stride(0) == 0  # all rows are the same memory: the prompt's
        return logits[0].topk(len(logits)).indices if first else logits.argmax(-1)

    monkeypatch.setattr(generate, "sample", sample)


# ----------------------------------------------------------------------------------------------------------------------
# The cache


@torch.no_grad()
def test_cached_logits_are_the_uncached_ones_at_every_position():
    model = random_model()
    idx = torch.randint(TINY.vocab_size, (3, TINY.block_size))
    expected = model(idx)
    for prompt in range(1, TINY.block_size + 1):
        cache = KeyValueCache(model.config)
        logits = model(idx[:, :prompt], cache=cache)
        torch.testing.assert_close(logits[:, 0], expected[:, prompt - 1], atol=1e-4, rtol=1e-4)
        for position in range(prompt, TINY.block_size):
            logits = model(idx[:, position : position + 1], cache=cache)
            torch.testing.assert_close(logits[:, 0], expected[:, position], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_several_tokens_may_be_added_to_a_cache_that_is_not_empty():
    model = random_model()
    idx = torch.randint(TINY.vocab_size, (2, TINY.block_size))
    expected = model(idx)
    for first in range(1, TINY.block_size):
        for second in range(first + 1, TINY.block_size + 1):
            cache = KeyValueCache(model.config)
            model(idx[:, :first], cache=cache)
            logits = model(idx[:, first:second], cache=cache)
            assert cache.length == second
            torch.testing.assert_close(logits[:, 0], expected[:, second - 1], atol=1e-4, rtol=1e-4)


def test_greedy_tokens_are_those_of_transformers_and_of_the_plain_loop():
    model = random_model(block_size=256)
    prompts = torch.randint(TINY.vocab_size, (3, 8))
    ours = [tokens_of(model, prompt, 200, temperature=0)[0] for prompt in prompts]
    assert ours == [plain_loop(model, prompt, 200)[0] for prompt in prompts]
    assert len({tuple(row) for row in ours}) == 3  # equal samples would agree trivially
    assert all(len(set(row)) > 10 for row in ours)
    theirs = transformers_twin(model).generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=200, pad_token_id=0
    )
    assert ours == theirs[:, 8:].tolist()
    for prompt, row in zip(prompts, ours, strict=True):
        assert tokens_of(model, prompt, 200, temperature=0, num_samples=2) == [row, row]


def test_samples_that_differ_are_those_of_the_plain_loop(fan):
    model, prompt = random_model(block_size=256), prompt_of(8)
    ours = tokens_of(model, prompt, 200, num_samples=4)
    assert ours == plain_loop(model, prompt, 200, samples=4)
    assert len({tuple(row[1:]) for row in ours}) == 4 and all(len(set(row)) > 10 for row in ours)


@pytest.mark.parametrize("block_size", [1, 2, 7, 16])
@pytest.mark.parametrize("prompt", [1, 7, 16, 40])
def test_past_the_context_its_newest_half_is_kept(block_size, prompt, fan):
    model, idx, new = random_model(block_size=block_size), prompt_of(prompt), 5 * block_size + 3
    assert tokens_of(model, idx, new) == plain_loop(model, idx, new)
    assert tokens_of(model, idx, new, num_samples=3) == plain_loop(model, idx, new, samples=3)


def test_past_the_context_the_work_per_token_does_not_grow():
    model = random_model()
    queries = []
    forward = model.forward
    model.forward = lambda idx, **kwargs: queries.append(idx.size(1)) or forward(idx, **kwargs)
    tokens_of(model, torch.zeros(16, dtype=torch.long), 1 + 8 * 20)
    # The prompt; then, whenever the context is full, its newest 8 tokens at once and 8 single tokens
    assert queries == [16] + [8, *[1] * 8] * 17 + [8, *[1] * 6]


def test_a_sample_that_has_ended_is_not_computed_and_disturbs_no_other(fan):
    model, idx = random_model(), prompt_of(5)
    full = tokens_of(model, idx, 40, num_samples=4)
    assert full == plain_loop(model, idx, 40, samples=4) and len({tuple(row) for row in full}) == 4
    length = [40, 3, 12, 21]  # the context of 16 is full, and begins anew, at tokens 12 and 21, too
    seen = [0] * 4

    def stop(row: int, token: int) -> bool:
        assert token == full[row][seen[row]]
        seen[row] += 1
        return seen[row] == length[row]

    batches = []
    forward = model.forward
    model.forward = lambda idx, **kwargs: batches.append(idx.size(0)) or forward(idx, **kwargs)
    steps = list(generate.generate(model, idx, 40, generate.Sampling(num_samples=4), stop))
    assert tokens_of(model, idx, 0) == []
    for row in range(4):
        assert [step[row] for step in steps] == full[row][: length[row]] + [None] * (40 - length[row])
    assert batches == [1] + [4] * 2 + [3] * 9 + [2] * 9 + [1] * 19


def test_it_ends_when_every_sample_has_ended():
    sampling = generate.Sampling(num_samples=3)
    steps = generate.generate(random_model(), prompt_of(2), 50, sampling, stop=lambda row, token: True)
    assert len(list(steps)) == 1


def test_padded_ids_are_never_drawn():
    model = random_model(vocab_size=257)
    with torch.no_grad():
        model.transformer.wte.weight[257:] = 100 * torch.randn(320 - 257, TINY.n_embd)
    idx = torch.zeros(1, dtype=torch.long)
    for temperature in (0, 1, 1000.0):
        for row in tokens_of(model, idx, 60, num_samples=20, temperature=temperature):
            assert max(row) < 257


def test_generating_leaves_model_and_global_state_alone():
    model = random_model(dropout=0.5).to(torch.bfloat16).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draw = torch.Generator().manual_seed(1)
    idx = torch.zeros(3, dtype=torch.long)
    first = tokens_of(model, idx, 40, generator=draw)
    for _ in generate.generate(model, idx, 40, generate.Sampling(generator=draw)):
        assert model.training and all(module.training for module in model.modules())  # in the middle, too
        break
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mkldnn.enabled
    assert not torch.is_inference_mode_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Dropout was off: the same draws give the same tokens in eval mode
    assert tokens_of(model.eval(), idx, 40, generator=torch.Generator().manual_seed(1)) == first
    # ... and training can continue
    model.train()(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)).backward()


def test_a_model_with_nan_logits_is_an_error():
    model = random_model()
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    with pytest.raises(UserError, match="infinite or NaN"):
        tokens_of(model, torch.zeros(3, dtype=torch.long), 5)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling

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


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"temperature": 0.0}])
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


def test_temperature_0_is_greedy():
    assert draw(LOGITS, 0, None, 1.0)[9] == 50_000
    assert generate.sample(torch.tensor([LOGITS]), generate.Sampling(0, top_k=3, top_p=0.1)).tolist() == [9]


# ----------------------------------------------------------------------------------------------------------------------
# Text

BYTES = load_tokenizer("bytes")
EOT = BYTES.eot_token


class Forced(GPT):
    """A model that says the given tokens, whatever it reads."""

    def __init__(self, tokens: list[int]):
        super().__init__(ModelConfig(n_layer=1, n_head=1, n_embd=8, n_inner=8, block_size=1024, vocab_size=257))
        self.tokens, self.step = torch.tensor(tokens), -1

    def forward(self, idx, targets=None, cache=None):
        super().forward(idx, cache=cache)  # the cache is used as usual
        self.step += 1
        return torch.nn.functional.one_hot(self.tokens[self.step], 257).float().expand(1, 1, -1) * 100


def texts_of(model: GPT, **options) -> list[str]:
    """The text of one sample as it grows, from before its first token to its end."""
    stream = text_stream.TextStream(BYTES, **options)
    steps = generate.continue_text(model, [1], 1000, generate.Sampling(temperature=0), [stream])
    texts = [stream.text for _ in steps]
    assert stream.ended
    return texts


def forced_bytes(text: str) -> list[int]:
    return [*text.encode(), EOT]


HARD = "naïve 日本語 — 👩‍👩‍👧 🏳️‍🌈 中文维基百科 \u0000 ẹ́"


def test_the_stream_never_shows_half_a_character():
    seen = texts_of(Forced(forced_bytes(HARD)))
    assert all(HARD.startswith(text) for text in seen) and seen[-1] == HARD
    # Each character as soon as it is whole
    assert sorted(set(seen), key=len) == [HARD[:n] for n in range(len(HARD) + 1)]


def test_a_stream_counts_its_tokens():
    stream = text_stream.TextStream(BYTES)
    list(generate.continue_text(Forced(forced_bytes(HARD)), [1], 1000, generate.Sampling(temperature=0), [stream]))
    assert stream.ended and stream.tokens == len(HARD.encode()) + 1


def test_a_character_cut_off_by_the_end_is_one_replacement_mark():
    model = Forced(list("日本".encode()))
    assert generate.generate_text(model, BYTES, "x", 5, temperature=0) == ["日\ufffd"]
    model = Forced([*"日".encode()[:2], *b"ab", EOT])
    assert generate.generate_text(model, BYTES, "x", 50, temperature=0) == ["\ufffdab"]


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo", ["\n\n"], "one\ntwo"),
        ("aaab", ["aab"], "a"),
        ("one two three", ["three", "two"], "one "),
        ("one two", ["o", "one"], ""),
        ("one two thr", ["three"], "one two thr"),
        ("日本語", ["本"], "日"),
    ],
)
def test_the_text_ends_before_a_stop_text_and_never_shows_a_part_of_it(text, stop, expected):
    seen = texts_of(Forced(forced_bytes(text)), stop=stop)
    assert all(expected.startswith(text) for text in seen) and seen[-1] == expected


def test_end_of_text_ends_the_text_unless_told_otherwise():
    rows = [*b"one", EOT, *b"two"]
    assert generate.generate_text(Forced(rows), BYTES, "x", 7, temperature=0) == ["one"]
    assert generate.generate_text(Forced(rows), BYTES, "x", 7, temperature=0, ignore_eot=True) == [
        "one<|endoftext|>two"
    ]


def test_the_prompt_is_taken_literally():
    assert generate.encode(BYTES, "<|endoftext|>") == list(b"<|endoftext|>")
    assert generate.encode(BYTES, "") == [EOT]


def test_samples_are_printed_one_after_the_other_with_a_blank_line_between(monkeypatch):
    written = []
    monkeypatch.setattr(text_stream, "write", written.append)
    streams = [text_stream.TextStream(BYTES) for _ in range(3)]

    def steps():
        yield streams
        for tokens in ([65, 97, 49], [66, 98, 50], [EOT, 99, EOT], [None, EOT, None]):
            for stream, token in zip(streams, tokens, strict=True):
                if token is not None:
                    stream.push(token)
            yield streams

    text_stream.print_text("> ", steps())
    assert "".join(written) == "> AB\n\n> abc\n\n> 12\n"
    assert written[:3] == ["> ", "A", "B"]  # each as it comes


@pytest.mark.parametrize(("stop", "expected"), [(r"\n", "one\n"), ("wo", "one\nt\n"), (r"\\n", "one\ntwo\n")])
def test_a_stop_text_may_be_a_line_break(monkeypatch, capsys, stop, expected):
    """The shell passes backslash and n."""
    monkeypatch.setattr(generate, "open_model", lambda source: (Forced(forced_bytes("one\ntwo")), BYTES, "forced"))
    monkeypatch.setattr(generate, "pack_weights", lambda model: model)
    generate.main(GenerateConfig(stop=(stop,), temperature=0.0, device="cpu"))
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(("users", "threads"), [(None, [1]), ("2", [])], ids=["ours", "the user's"])
def test_a_small_model_takes_one_thread_unless_the_user_says_otherwise(monkeypatch, users, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if users:
        monkeypatch.setenv("OMP_NUM_THREADS", users)
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(generate, "open_model", lambda source: (Forced(forced_bytes("one")), BYTES, "forced"))
    monkeypatch.setattr(generate, "pack_weights", lambda model: model)
    generate.main(GenerateConfig(temperature=0.0, device="cpu"))
    assert seen == threads


def test_a_larger_model_takes_as_many_threads_as_there_are_cores_for_it(monkeypatch):
    """Fewer than the machine has, in a container with a limit."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(generate, "ONE_THREAD", 0)
    monkeypatch.setattr("internals.device.count_cores", lambda: 2)
    monkeypatch.setattr(generate, "open_model", lambda source: (Forced(forced_bytes("one")), BYTES, "forced"))
    monkeypatch.setattr(generate, "pack_weights", lambda model: model)
    generate.main(GenerateConfig(temperature=0.0, device="cpu"))
    assert seen == [2]


def test_text_is_generated_for_programs():
    model = random_model(vocab_size=257)
    texts = generate.generate_text(
        model, BYTES, "abc", 10, num_samples=3, top_k=50, generator=torch.Generator().manual_seed(0)
    )
    assert len(texts) == 3 and len(set(texts)) == 3
    assert generate.generate_text(model, BYTES, "abc", 0) == [""]


def test_no_attention_that_plans_for_each_length_and_training_may_use_it_again():
    """cuDNN's, on Hopper and Blackwell: seconds for a text. train.py generates between iterations."""

    class Watched(Forced):
        def forward(self, *args, **kwargs):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            return super().forward(*args, **kwargs)

    seen, before = [], torch.backends.cuda.cudnn_sdp_enabled()
    generate.generate_text(Watched(forced_bytes("one")), BYTES, "x", 3, temperature=0)
    assert before and seen == [False] * 3 and torch.backends.cuda.cudnn_sdp_enabled()


# ----------------------------------------------------------------------------------------------------------------------
# The command


def save_checkpoint(path, tokenizer: str = "bytes", **changes):
    model = random_model(vocab_size=257, block_size=32)
    contents = {
        "format": 1, "model": model.state_dict(), "config": {"model": dataclasses.asdict(model.config)},
        "tokenizer": tokenizer, "iter": 10, "tokens": 1000, "val_loss": 5.5,
    }  # fmt: skip
    checkpoint.save(path, contents | changes)
    return path


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run") / "best.pt")


def command(best, *args, **kwargs):
    return run_script("generate.py", "--device", "cpu", "--checkpoint", best, *args, **kwargs)


def test_text_goes_to_stdout_and_all_else_to_stderr(best):
    first = command(best, "--prompt", "Größe", "--seed", 7, "--ignore-eot", "--max-new-tokens", 50, encoding="utf-8")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Größe") and first.stdout.endswith("\n") and len(first.stdout) > 20
    assert "million parameters" in first.stderr and "--seed" not in first.stderr
    again = command(
        best, "--prompt", "Größe", "--seed", 7, "--ignore-eot", "--max-new-tokens", 50, "--no-stream", encoding="utf-8"
    )
    assert again.stdout == first.stdout


def test_json_lines(best):
    run = command(best, "--prompt", "abc", "--num-samples", 3, "--json", "--ignore-eot", "--max-new-tokens", 20)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert list(row) == ["prompt", "text", "tokens", "seed", "seconds", "tokens_per_second"]
        assert row["prompt"] == "abc" and row["tokens"] == 20
        assert row["tokens_per_second"] == pytest.approx(20 / row["seconds"], rel=0.05)
        assert (
            f"To get the same text again, add --seed {row['seed']}" in run.stderr
        )  # without --seed, the seed that was drawn is printed
    assert len({row["text"] for row in rows}) == 3


def test_a_megabyte_on_stdin(best):
    text = "Ein Wörterbuch. " * 65_536
    run = command(best, "--prompt", "-", "--max-new-tokens", 5, input=text + "\n", encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(text) and not run.stdout.startswith(text + "\n")
    assert run.stderr.count("the model reads the last 32 of them") == 1


def test_interactive_answers_line_by_line(best):
    greedy = ["--temperature", 0, "--max-new-tokens", 4]
    bad = "\ufeffone \udcff\ntwo\n"  # a byte-order mark is no text, a byte that is not UTF-8 does not end the session
    run = command(best, "--interactive", *greedy, input=bad, encoding="utf-8", errors="surrogateescape")
    assert run.returncode == 0, run.stderr
    single = command(best, "--prompt", "two", *greedy, encoding="utf-8")
    assert run.stdout.startswith("one \ufffd") and run.stdout.endswith(single.stdout)
    assert "--seed" not in run.stderr and "--seed" not in single.stderr  # no text here depends on it
    drawn = command(best, "--interactive", "--max-new-tokens", 4, input="one\n")
    assert "To get the same texts for the same prompts again, add --seed " in drawn.stderr


def test_line_ends_of_windows_are_not_part_of_a_prompt(monkeypatch):
    prompts = []
    stdin = io.TextIOWrapper(io.BytesIO(b"one\r\n\r\ntwo\r\n"), newline="\n")  # as Python opens it on Linux and macOS
    monkeypatch.setattr(sys, "stdin", stdin)
    generate.interact(types.SimpleNamespace(cfg=GenerateConfig(), answer=prompts.append))
    assert prompts == ["one", "", "two"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_no_control_characters_and_a_pipe_the_exact_text(best):
    import pty

    prompt = "a\x1b[31m\x9bz\u00a0é"
    args = ["--prompt", prompt, "--max-new-tokens", 0]
    piped = command(best, *args, encoding="utf-8")
    assert piped.stdout == f"{prompt}\n" and "--seed" not in piped.stderr
    main, side = pty.openpty()
    line = [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best), *map(str, args)]
    process = subprocess.run(line, cwd=REPO, stdout=side, stderr=subprocess.PIPE)
    assert process.returncode == 0, process.stderr
    assert os.read(main, 65536).decode() == "a\ufffd[31m\ufffdz\u00a0é\r\n"
    os.close(side)  # only now: macOS may discard unread text when the last writer has closed
    os.close(main)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_terminal_control_c_stops_the_text_and_control_d_leaves(best):
    import pty

    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best), "--interactive", "--ignore-eot",
         "--max-new-tokens", "100000000"],
        cwd=REPO, stdin=side, stdout=side, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(side)

    def read_until(what: bytes, more: int = 0) -> None:
        seen, deadline = b"", time.monotonic() + 60
        while what not in seen or len(seen) < more:
            assert time.monotonic() < deadline, seen[-500:]
            if select.select([main], [], [], 1)[0]:
                seen += os.read(main, 65536)

    try:
        read_until(b"> ")
        os.write(main, b"hello\r")
        read_until(b"hello", more=500)  # the text is under way
        os.write(main, b"\x03")
        read_until(b"\n> ")
        os.write(main, b"\x04")
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0 and b"Traceback" not in stderr, stderr
    finally:
        process.kill()
        os.close(main)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
def test_prompts_from_a_pipe_end_with_control_c(best):
    process = subprocess.Popen(
        [sys.executable, "generate.py", "--checkpoint", str(best), "--interactive", "--ignore-eot",
         "--max-new-tokens", "100000000"],
        cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdin.write(b"one\ntwo\n")
    process.stdin.flush()
    assert process.stdout.read(100).startswith(b"one")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.endswith(b"\nStopped.\n"), errors


@pytest.mark.parametrize("as_json", [False, True])
def test_control_c_leaves_no_empty_line_among_lines_of_json(monkeypatch, capsys, as_json):
    """Prompts are typed, and the output goes to a file."""

    class Keyboard(io.TextIOWrapper):
        def isatty(self):
            return True

    def answer(prompt):
        if prompt == "one":
            raise KeyboardInterrupt
        print(prompt)

    monkeypatch.setattr(sys, "stdin", Keyboard(io.BytesIO(b"one\ntwo\n")))
    generate.interact(types.SimpleNamespace(cfg=GenerateConfig(json=as_json), answer=answer))
    assert capsys.readouterr().out == ("two\n" if as_json else "\ntwo\n")


def test_a_closed_pipe_ends_quietly(best):
    process = subprocess.Popen(
        [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best), "--ignore-eot",
         "--max-new-tokens", "100000000"],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.read(100)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    errors = process.stderr.read().decode()
    assert len(errors.splitlines()) == 3 and "rror" not in errors, errors  # the model, the device and the seed
    process.stderr.close()


@pytest.mark.parametrize("flags", [[], ["--json"], ["--no-stream"]])
def test_a_page_is_written_whether_or_not_somebody_reads_the_text(best, tmp_path, flags):
    page = tmp_path / "page.html"
    options = ["--ignore-eot", "--max-new-tokens", "40", "--num-samples", "2", "--html", str(page), *flags]
    process = subprocess.Popen(
        [sys.executable, "generate.py", "--checkpoint", str(best), *options],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 0 and f"Open this page in a browser: {page}" in errors, errors
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])
    assert [len(view["passage"]["text"]) for view in data["views"]] == [41, 41]  # after <|endoftext|>


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
@pytest.mark.parametrize("flags", [[], ["--interactive"]])
def test_a_full_disk_is_told(best, flags):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best), *flags],
            cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True, input="one\n",
        )  # fmt: skip
    assert_user_error(process, "could not be written")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a shell, and a disk that is always full")
@pytest.mark.parametrize("ending", ["2>&-", "2>/dev/full", "2>&- <&-", "2>/dev/null | head -c 2"])
def test_the_text_does_not_need_a_reader_of_stderr(best, ending):
    command = [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best)]
    line = f"{shlex.join([*command, '--prompt', 'abc', '--max-new-tokens', '5'])} {ending}"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=REPO, stdout=subprocess.PIPE)
    assert run.returncode == 0 and run.stdout.startswith(b"ab")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a shell, and a disk that is always full")
@pytest.mark.parametrize(
    ("ending", "status"),
    [(">/dev/full", 2), (">/dev/full 2>/dev/full", 2), (">&-", 0), (">&- 2>&-", 0), ("<&-", 0)],
)
def test_closed_and_full_streams_never_end_in_a_traceback(best, ending, status):
    command = [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best)]
    line = f"{shlex.join([*command, '--prompt', '-', '--max-new-tokens', '5'])} {ending}"
    run = subprocess.run(["bash", "-c", line], cwd=REPO, capture_output=True, input=b"abc")
    assert run.returncode == status and b"Traceback" not in run.stderr, run.stderr


ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}, ASCII_LOCALE], ids=["ascii", "cp1252", "C"]
)  # fmt: skip
@pytest.mark.parametrize("way", ["--prompt", "stdin", "--interactive"])
def test_text_is_utf8_whatever_the_environment_says(best, environment, way):
    text = "Größe 日本 👍🏽"
    prompt = {"--prompt": ["--prompt", text], "stdin": ["--prompt", "-"], "--interactive": ["--interactive"]}[way]
    run = command(
        best, *prompt, "--max-new-tokens", 5, "--stop", "ß", input=text, encoding="utf-8", env=os.environ | environment
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(text)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows passes text, not bytes")
@pytest.mark.parametrize("flag", ["--prompt", "--stop", "--checkpoint"])
def test_bytes_that_are_not_utf8_on_the_command_line(best, flag):
    run = command(best, flag, os.fsdecode(b"a\xff"))
    assert_user_error(run, "no such file" if flag == "--checkpoint" else f"{flag}: not UTF-8 text")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory")])
@pytest.mark.parametrize("where", ["open_model", "pack_weights"])
def test_a_model_too_large_for_the_memory(best, monkeypatch, error, where):
    def fail(model):
        raise error

    monkeypatch.setattr(generate, where, fail)
    with pytest.raises(UserError, match=r"--checkpoint .*: does not fit into memory; .* or use a smaller model"):
        generate.main(GenerateConfig(checkpoint=str(best), device="cpu"))


@pytest.mark.parametrize("where", ["__init__", "write"])
def test_a_page_too_large_for_the_memory(best, tmp_path, monkeypatch, where):
    def fail(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(generate.TextPage, where, fail)
    with pytest.raises(UserError, match=r"--html .*page\.html: does not fit into memory; "):
        generate.main(GenerateConfig(checkpoint=str(best), device="cpu", html=str(tmp_path / "page.html")))


def test_the_page_of_a_model_with_nan_weights_is_an_error(tmp_path):
    """The model then reads the prompt, but generates nothing."""
    model, page = random_model(vocab_size=257, block_size=32), tmp_path / "page.html"
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    path = save_checkpoint(tmp_path / "nan.pt", model=model.state_dict())
    with pytest.raises(UserError, match="infinite or NaN"):
        generate.main(
            GenerateConfig(checkpoint=str(path), prompt="abc", max_new_tokens=0, device="cpu", html=str(page))
        )
    assert not page.exists()


def test_help_and_mistakes_need_no_pytorch_and_generating_needs_no_compiler(best):
    command = [sys.executable, "-X", "importtime", "generate.py"]
    run = subprocess.run([*command, "--help"], cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 0 and "--stop" in run.stdout
    assert " torch\n" not in run.stderr and "tyro" in run.stderr
    run = subprocess.run(
        [*command, "--device", "cpu", "--checkpoint", str(best)], cwd=REPO, capture_output=True, text=True
    )
    assert run.returncode == 0 and " torch\n" in run.stderr
    for module in ("torch._dynamo", "torch._inductor", "sympy", "datasets", "transformers", "matplotlib"):
        assert f" {module}\n" not in run.stderr, module


@pytest.mark.parametrize(
    "args, words",
    [
        (["--top-k", "0"], ["--top-k 0", "at least 1"]),
        (["--top-p", "2"], ["--top-p 2", "at most 1"]),
        (["--top-p", "0"], ["--top-p 0", "above 0"]),
        (["--max-new-tokens", "-1"], ["--max-new-tokens -1", "0 or more"]),
        (["--temperature", "-1"], ["--temperature -1", "from 0"]),
        (["--temperature", "nan"], ["--temperature nan"]),
        (["--num-samples", "0"], ["--num-samples 0", "at least 1"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--seed", "99999999999999999999"], ["--seed 99999999999999999999", "below"]),
        (["--stop", ""], ["--stop", "empty"]),
        (["--interactive", "--prompt", "x"], ["--interactive", "--prompt"]),
        (["--topk", "3"], ["--topk"]),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_clear_message(args, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(GenerateConfig, "", args)
    told = unboxed(capsys.readouterr().err)
    assert ended.value.code == 2 and all(word in told for word in words), told


def test_invalid_utf8_on_stdin_is_one_clear_message(best):
    run = subprocess.run(
        [sys.executable, "generate.py", "--checkpoint", str(best), "--prompt", "-"], cwd=REPO, capture_output=True, input=b"ab\xff"
    )  # fmt: skip
    assert run.returncode == 2 and run.stdout == b""
    assert run.stderr.decode().splitlines() == [
        "error: --prompt -: stdin is not UTF-8 text (at byte 2); convert it first"
    ]


def test_more_samples_than_the_memory_holds(best, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(generate, "TextStream", fail)
    with pytest.raises(UserError, match="--num-samples 8: do not fit into memory; use fewer"):
        generate.main(GenerateConfig(checkpoint=str(best), num_samples=8, device="cpu"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_one_clear_message(best, monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        raise error
        yield

    monkeypatch.setattr(generate, "generate", fail)
    with pytest.raises(UserError, match="--num-samples 8: do not fit into memory; use fewer"):
        generate.main(GenerateConfig(checkpoint=str(best), num_samples=8, device="cpu"))
    with pytest.raises(UserError, match=r"^the text does not fit into memory; "):
        generate.main(GenerateConfig(checkpoint=str(best), device="cpu"))
    monkeypatch.setattr(generate, "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug stays a bug
        generate.main(GenerateConfig(checkpoint=str(best), num_samples=8, device="cpu"))


def test_a_tokenizer_that_is_not_at_hand_is_one_clear_message(tmp_path):
    environment = without_network_settings()
    environment |= {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}  # nobody listens there
    path = save_checkpoint(tmp_path / "gpt2.pt", tokenizer="gpt2")
    assert_user_error(command(path, env=environment), "gpt2", "TIKTOKEN_CACHE_DIR")


def test_a_long_run_of_blanks_is_a_prompt():
    """In one call, so many blanks are more than the tokenizer's stack holds, and end in a panic of its own."""
    text = "a" + 1_000_000 * " " + "b"
    assert generate.encode(load_tokenizer("bytes"), text)[0] == ord("a")
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        gpt2 = load_tokenizer("gpt2")
        assert gpt2.decode(generate.encode(gpt2, text)) == text


def test_each_prompt_of_a_session_has_a_seed_that_makes_its_text(best):
    command = ("generate.py", "--checkpoint", best, "--device", "cpu", "--json", "--max-new-tokens", 20, "--ignore-eot")
    session = run_script(*command, "--interactive", "--seed", 7, input="one\ntwo\nthree\n")
    rows = [json.loads(line) for line in session.stdout.splitlines() if line.startswith("{")]
    assert [row["seed"] for row in rows] == [7, 8, 9], session.stderr
    again = run_script(*command, "--prompt", "three", "--seed", 9)
    assert json.loads(again.stdout)["text"] == rows[2]["text"]


def test_json_leaves_no_control_character_for_a_terminal(capsys):
    stream = TextStream(BYTES, (), False)
    for byte in "\x9b31m\x7f".encode():
        stream.push(byte)
    stream.end()
    print_json("\x9b", 1, iter([[stream]]))
    line = capsys.readouterr().out
    assert not re.search("[\x7f-\x9f]", line) and json.loads(line)["text"] == "\x9b31m\x7f"
    assert json.loads(line)["prompt"] == "\x9b"
