"""The model against transformers' GPT-2 and against what a language model must and must not do."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

import model
from config import ModelConfig, TrainConfig
from internals.cli import with_preset
from model import GPT

TINY = ModelConfig(n_layer=2, n_head=4, n_embd=32, n_inner=96, block_size=24, vocab_size=101)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def random_model(config: ModelConfig = TINY, seed: int = 0) -> GPT:
    """With larger weights and biases than a new model's, so that no mistake can hide behind a zero."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def transformers_twin(model: GPT):
    """The same weights in transformers' GPT-2, whose embedding has no padding rows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    twin = GPT2LMHeadModel(
        GPT2Config(
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_inner=c.n_inner, n_positions=c.block_size,
            vocab_size=c.vocab_size, activation_function="gelu_new", layer_norm_epsilon=1e-5,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    weights = {
        name: (value.T if name.endswith(TRANSPOSED) else value).clone() for name, value in model.state_dict().items()
    }
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: c.vocab_size]
    missing = twin.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]}, strict=True)
    assert not missing.missing_keys
    return twin


@pytest.mark.parametrize(
    "config",
    [
        TINY,  # 101 tokens, 128 rows
        ModelConfig(n_layer=1, n_head=1, n_embd=16, n_inner=64, block_size=8, vocab_size=64),  # no padding
        ModelConfig(n_layer=3, n_head=2, n_embd=64, n_inner=128, block_size=40, vocab_size=257),
    ],
)
def test_logits_and_loss_are_those_of_transformers_gpt2(config):
    model = random_model(config)
    twin = transformers_twin(model)
    idx = torch.randint(config.vocab_size, (3, config.block_size))
    targets = torch.randint(config.vocab_size, (3, config.block_size))
    with torch.no_grad():
        expected = twin(idx).logits
        torch.testing.assert_close(model(idx), expected, atol=1e-4, rtol=0)
        expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(model(idx, targets), expected_loss, atol=1e-5, rtol=0)


def test_gradients_are_those_of_transformers_gpt2():
    model = random_model()
    twin = transformers_twin(model)
    idx, targets = torch.randint(101, (2, 4, 24))
    model(idx, targets).backward()
    F.cross_entropy(twin(idx).logits.flatten(0, 1), targets.flatten()).backward()
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name == "transformer.wte.weight":
            assert (gradient[101:] == 0).all(), "a padded row has a gradient"
            gradient = gradient[:101]
        other = expected[name].grad
        torch.testing.assert_close(gradient, other.T if name.endswith(TRANSPOSED) else other, atol=1e-5, rtol=1e-4)


def test_padded_rows_are_unknown_to_logits_and_loss():
    model = random_model()
    idx, targets = torch.randint(101, (2, 4, 24))
    with torch.no_grad():
        logits, loss = model(idx), model(idx, targets)
        assert logits.shape == (4, 24, 101)
        model.transformer.wte.weight[101:] = 1e4
        torch.testing.assert_close(model(idx), logits)
        torch.testing.assert_close(model(idx, targets), loss)


def test_a_later_token_never_changes_an_earlier_logit():
    model = random_model()
    idx = torch.randint(101, (1, 24))
    with torch.no_grad():
        logits = model(idx)
        for place in (1, 12, 23):
            changed = idx.clone()
            changed[0, place] = (changed[0, place] + 1) % 101
            again = model(changed)
            torch.testing.assert_close(again[:, :place], logits[:, :place], atol=1e-6, rtol=0)
            assert (again[:, place] - logits[:, place]).abs().max() > 1e-3


def test_one_batch_overfits():
    torch.manual_seed(0)
    model = GPT(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    idx, targets = torch.randint(101, (2, 4, 24))
    for _ in range(120):
        loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_a_new_model_knows_nothing():
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, vocab_size=50257)
    idx, targets = torch.randint(50257, (2, 2, 64))
    with torch.no_grad():
        assert abs(GPT(config)(idx, targets).item() - math.log(50257)) < 0.15


@pytest.mark.parametrize(("preset", "low", "high"), [("wikipedia", 30.0e6, 30.1e6), ("wikipedia-150m", 145e6, 155e6)])
def test_parameters_are_counted_as_transformers_counts_them(preset, low, high):
    from transformers import GPT2Config, GPT2LMHeadModel

    c = with_preset(TrainConfig, preset).model
    with torch.device("meta"):
        counted = GPT(c).num_parameters()
        twin = GPT2LMHeadModel(
            GPT2Config(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_inner=c.n_inner, n_positions=c.block_size)
        )
    assert counted["total"] == counted["blocks"] + counted["embedding"] == twin.num_parameters()
    assert low < counted["total"] < high


def test_flops_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(TINY)
    idx, targets = torch.randint(101, (2, 2, 24))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(idx, targets).backward()
    # The two differ by the padded rows, and by the biases and norms of the blocks, which the formula counts as weights
    parts = (model.transformer.h, model.transformer.ln_f)
    vectors = sum(p.numel() for part in parts for p in part.parameters() if p.dim() == 1)
    padding = (TINY.padded_vocab_size - TINY.vocab_size) * TINY.n_embd
    assert (model.flops_per_token() + 6 * (padding - vectors)) * idx.numel() == counter.get_total_flops()


def test_the_flops_of_attention_grow_with_the_context_as_pytorch_counts_them():
    from torch.utils.flop_counter import FlopCounterMode

    counted, calculated = [], []
    for block_size in (24, 96):
        model = GPT(dataclasses.replace(TINY, block_size=block_size))
        idx = torch.randint(101, (2, block_size))
        math_alone = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, math_alone:
            model(idx, idx).backward()
        counted.append(counter.get_total_flops() / idx.numel())
        calculated.append(model.flops_per_token())
    assert calculated[1] - calculated[0] == pytest.approx(counted[1] - counted[0])


def test_the_first_weights_are_gpt2s():
    """Projections that add to the residual stream are smaller, by the root of the number of additions: 2 in a layer."""
    model = GPT(ModelConfig(n_layer=2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(4) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


@pytest.mark.parametrize("training", [True, False])
def test_every_dropout_acts_in_training_alone(monkeypatch, training):
    """On the embeddings, and in each layer on attention's weights, its output and the feed-forward network's."""
    gpt = GPT(dataclasses.replace(TINY, dropout=0.3)).train(training)
    calls = []
    dropout = model.dropout

    def watched(x, p, training=True):
        calls.extend([(x.shape, p)] if p and training else [])
        return dropout(x, p, training)

    monkeypatch.setattr(model, "dropout", watched)
    gpt(torch.randint(101, (2, 24)))
    stream, weights = ((2, 24, 32), 0.3), ((2 * 4, 24, 24), 0.3)
    assert calls == ([stream] + [weights, stream, stream] * TINY.n_layer if training else [])


def test_attention_that_a_gpu_computes_drops_its_weights_too(monkeypatch):
    """PyTorch's kernel does it there."""
    gpt = GPT(dataclasses.replace(TINY, dropout=0.3)).train()
    seen = []
    attention = F.scaled_dot_product_attention

    def watched(*args, dropout_p, **rest):
        seen.append(dropout_p)
        return attention(*args, dropout_p=dropout_p, **rest)

    monkeypatch.setattr(model, "faster_written_out", lambda q, p: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    gpt(torch.randint(101, (2, 24)))
    gpt.eval()(torch.randint(101, (2, 24)))
    assert seen == [0.3] * TINY.n_layer + [0.0] * TINY.n_layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_sets_each_element_to_zero_with_its_probability(dtype, p):
    """The mean of 300,001 masks must lie within five standard deviations, and neighbours must not be dropped together."""
    torch.manual_seed(0)
    x = torch.full((300_001,), 3.0, dtype=dtype, requires_grad=True)  # no multiple of 4
    y = model.dropout(x, p)
    y.sum().backward()
    dropped, scale = y == 0, torch.tensor(1 / (1 - p)).to(dtype)
    deviation = math.sqrt(p * (1 - p) / len(x))
    assert dropped.double().mean().item() == pytest.approx(p, abs=5 * deviation)
    assert torch.equal(y[~dropped], (3 * scale).expand(len(x))[~dropped])
    assert torch.equal(x.grad, torch.where(dropped, torch.zeros_like(scale), scale))
    for distance in range(1, 9):  # 64 random bits decide about four neighbours
        both = (dropped[distance:] & dropped[:-distance]).double().mean().item()
        assert both == pytest.approx(p * p, abs=5 * math.sqrt(p * p * (1 - p * p) / len(x)) + 2 * p * deviation), (
            distance
        )


def test_dropout_follows_the_seed_and_keeps_shapes():
    x = torch.ones(3, 5, 7).transpose(0, 2)
    torch.manual_seed(5)
    first, second = model.dropout(x, 0.4), model.dropout(x, 0.4)
    torch.manual_seed(5)
    assert torch.equal(model.dropout(x, 0.4), first) and not torch.equal(first, second)
    assert first.shape == (7, 5, 3)
    assert model.dropout(x, 0.0) is x
    assert not model.dropout(x, 1 - 1e-7)[x > 1].any()  # the largest share: nearly nothing is kept, and no overflow
    assert (model.dropout(torch.ones(10_000), 1 - 1e-7) == 0).double().mean() > 0.99


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_attention_written_out_is_pytorchs_own(dtype, tolerance):
    """Values and gradients, against PyTorch's kernel in float32."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, 17, 8, requires_grad=True) for _ in range(3)]
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    theirs = F.scaled_dot_product_attention(*exact, is_causal=True)
    y = model.written_out_attention(*ours, 0.0)
    gradient = torch.randn_like(theirs)
    theirs.backward(gradient)
    y.backward(gradient.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), theirs, rtol=tolerance, atol=tolerance)
    for mine, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.float(), other.grad, rtol=tolerance, atol=2 * tolerance)


def test_a_model_learns_the_same_with_attention_written_out(monkeypatch):
    gpt, (idx, targets), results = random_model(), torch.randint(101, (2, 2, 24)), []
    for written_out in (True, False):
        monkeypatch.setattr(model, "faster_written_out", lambda q, p, answer=written_out: answer)
        loss = gpt(idx, targets)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(gpt.parameters()))])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_attention_written_out_drops_weights_not_tokens():
    """With a value of 1 everywhere a token's output is the sum of the weights that were kept, each divided by 1 - p."""
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 400, 8)  # each token attends alike to all before it
    y = model.written_out_attention(q, k, torch.ones(1, 1, 400, 8), 0.25)[0, 0, :, 0]
    kept = y * torch.arange(1, 401) * 0.75  # of t + 1 weights
    assert torch.allclose(kept, kept.round(), atol=1e-3)
    assert 0 < kept[-1] < 400 and kept[200:].sum().item() / sum(range(201, 401)) == pytest.approx(0.75, abs=0.01)


def test_a_cpu_writes_attention_out_only_where_that_is_faster():
    """In bfloat16 or with dropout, and with gradients: not for evaluating, not for long contexts, not on a GPU."""
    q = torch.zeros(1, 1, 256, 8)
    assert model.faster_written_out(q.bfloat16(), 0.0) and model.faster_written_out(q, 0.1)
    assert not model.faster_written_out(q, 0.0)
    assert not model.faster_written_out(torch.zeros(1, 1, 1024, 8, dtype=torch.bfloat16), 0.0)
    assert not model.faster_written_out(q.to("meta"), 0.1)
    with torch.no_grad():
        assert not model.faster_written_out(q.bfloat16(), 0.1)


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=4, n_embd=32, n_inner=96, block_size=24, vocab_size=101, dropout=0.3))
    idx = torch.randint(101, (2, 24))
    with torch.no_grad():
        assert not torch.equal(model(idx), model(idx))
        model.eval()
        assert torch.equal(model(idx), model(idx))
