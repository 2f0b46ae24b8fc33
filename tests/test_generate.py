"""generate.py: the cache against no cache and against transformers, and what programs and train.py call."""

import math
import os

import pytest
import torch
from generating import BYTES, TINY, Forced, forced_bytes, prompt_of, random_model, tokens_of
from test_model import transformers_twin

import generate
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from model import GPT, KeyValueCache


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
# From Python


def test_text_is_generated_for_programs():
    model = random_model(vocab_size=257)
    texts = generate.generate_text(
        model, BYTES, "abc", 10, num_samples=3, top_k=50, generator=torch.Generator().manual_seed(0)
    )
    assert len(texts) == 3 and len(set(texts)) == 3
    assert generate.generate_text(model, BYTES, "abc", 0) == [""]


def test_a_long_run_of_blanks_is_a_prompt():
    """In one call, so many blanks are more than the tokenizer's stack holds, and end in a panic of its own."""
    text = "a" + 1_000_000 * " " + "b"
    assert generate.encode(load_tokenizer("bytes"), text)[0] == ord("a")
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        gpt2 = load_tokenizer("gpt2")
        assert gpt2.decode(generate.encode(gpt2, text)) == text


def test_no_attention_that_plans_for_each_length_and_training_may_use_it_again():
    """cuDNN's, on Hopper and Blackwell: seconds for a text. train.py generates between iterations."""

    class Watched(Forced):
        def forward(self, *args, **kwargs):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            return super().forward(*args, **kwargs)

    seen, before = [], torch.backends.cuda.cudnn_sdp_enabled()
    generate.generate_text(Watched(forced_bytes("one")), BYTES, "x", 3, temperature=0)
    assert before and seen == [False] * 3 and torch.backends.cuda.cudnn_sdp_enabled()
