"""The optimizer: which parameters each part updates, and one object for two optimizers."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import ModelConfig, TrainConfig
from internals.cpu_kernels import capabilities
from internals.muon import Muon
from internals.optimizer import make_optimizer, moment_bytes
from model import GPT

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=16, n_inner=32, block_size=8, vocab_size=101)
CPU = torch.device("cpu")
GPU = torch.device("cuda")  # only an argument of make_optimizer: the weights of these tests stay on the CPU


def make(
    optimizer: str = "muon", device: torch.device = CPU, dtype: torch.dtype = torch.bfloat16, **fields
) -> tuple[GPT, TrainConfig, torch.optim.Optimizer]:
    cfg = TrainConfig(optimizer=optimizer, model=TINY, batch_size=2, tokens_per_iter=16, **fields)
    torch.manual_seed(0)
    model = GPT(TINY)
    return model, cfg, make_optimizer(model, cfg, device, dtype)


def step(model: GPT, optimizer: torch.optim.Optimizer, it: int) -> None:
    idx = torch.randint(101, (2, 8), generator=torch.Generator().manual_seed(it))
    model(idx, idx.roll(-1, 1)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(name):
    model, _, optimizer = make(name, weight_decay=0.3)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert {group["weight_decay"]} == {0.3 if p.dim() == 2 else 0.0 for p in group["params"]}


def test_muon_moves_the_matrices_of_the_blocks_and_no_other():
    model, _, optimizer = make(muon_lr_scale=5.0)
    (group,) = [group for group in optimizer.param_groups if "ns_steps" in group]
    names = {name for name, p in model.named_parameters() if any(p is q for q in group["params"])}
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"transformer.h.{layer}.{matrix}.weight" for layer in (0, 1) for matrix in matrices}
    assert group["lr_scale"] == 5
    assert all(other["lr_scale"] == 1 for other in optimizer.param_groups if other is not group)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_adamws_betas_are_those_of_the_settings(name):
    _, _, optimizer = make(name, beta1=0.8, beta2=0.99)
    assert {group["betas"] for group in optimizer.param_groups if "betas" in group} == {(0.8, 0.99)}


def test_muons_momentum_is_that_of_the_settings():
    _, _, optimizer = make(muon_momentum=0.8)
    assert [group["momentum"] for group in optimizer.param_groups if "ns_steps" in group] == [0.8]


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_size_of_the_moments_is_known_before_the_first_step(name):
    """`--check` needs it: in float16 the first steps may be skipped."""
    model, _, optimizer = make(name)
    before = moment_bytes(optimizer)
    step(model, optimizer, 0)
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert before == moment_bytes(optimizer) == sum(value.nbytes for value in kept)


def apart(parameter: torch.nn.Parameter) -> list[torch.nn.Parameter]:
    """The three matrices of `c_attn.weight` as parameters of their own, which share its memory."""
    return [torch.nn.Parameter(matrix) for matrix in parameter.detach().chunk(3)]


def test_two_in_one_do_what_the_two_do():
    model, _, optimizer = make(muon_lr_scale=1.0)
    twin = copy.deepcopy(model)
    hidden = [p for p in twin.transformer.h.parameters() if p.dim() == 2]
    in_three = {block.attn.c_attn.weight: apart(block.attn.c_attn.weight) for block in twin.transformer.h}
    matrices = [twin.transformer.wte.weight, twin.transformer.wpe.weight]
    vectors = [p for p in twin.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    single = [matrix for p in hidden for matrix in in_three.get(p, [p])]
    muon = torch.optim.Muon(single, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for it in range(5):
        for group in [*optimizer.param_groups, *adamw.param_groups, *muon.param_groups]:
            group["lr"] = 1e-3 / (it + 1)
        step(model, optimizer, it)
        idx = torch.randint(101, (2, 8), generator=torch.Generator().manual_seed(it))
        twin(idx, idx.roll(-1, 1)).backward()
        for whole, parts in in_three.items():
            for part, gradient in zip(parts, whole.grad.chunk(3), strict=True):
                part.grad = gradient
        for other in (adamw, muon):
            other.step()
        twin.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_the_state_is_that_of_pytorchs_muon():
    """Runs that began with torch.optim.Muon go on."""
    model, cfg, _ = make()
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    theirs = torch.optim.Muon(hidden, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for p in hidden:
        p.grad = torch.randn_like(p)
    theirs.step()
    _, ours = make_optimizer(model, cfg, CPU, torch.bfloat16).optimizers
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    ours.step()
    for p in hidden:
        assert ours.state[p].keys() == theirs.state[p].keys() == {"momentum_buffer"}
        expected = theirs.state[p]["momentum_buffer"].lerp(p.grad, 0.05)
        torch.testing.assert_close(ours.state[p]["momentum_buffer"], expected)


@pytest.mark.parametrize("shape", [(384, 384), (1152, 384), (384, 1536)])
def test_a_stack_of_the_default_models_matrices_moves_as_they_do_one_by_one(shape):
    torch.manual_seed(0)
    alone = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    stacked = [torch.nn.Parameter(p.detach().clone()) for p in alone]
    muons = [
        torch.optim.Muon([{"params": alone}], adjust_lr_fn="match_rms_adamw"),
        Muon([{"params": stacked}]),
    ]
    for _ in range(2):
        for a, b in zip(alone, stacked, strict=True):
            a.grad = torch.randn(shape)
            b.grad = a.grad.clone()
        for muon in muons:
            muon.step()
    # Two steps of 1e-3, in bfloat16. Where no instruction computes in it, a stack may be rounded differently.
    exact = any(capabilities().get(flag) for flag in ("avx512_bf16", "amx_bf16"))
    for a, b in zip(alone, stacked, strict=True):
        torch.testing.assert_close(a, b, atol=0.0 if exact else 2 * 1e-3 * 2**-8, rtol=0.0)


class Products(TorchDispatchMode):
    """Records the dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "matmul"):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_muon_computes_in_bfloat16_only_if_the_run_does(dtype, device):
    """On hardware without bfloat16 it is emulated: an hour's run on a CPU would take several."""
    _, _, optimizer = make(device=device, dtype=dtype)
    muon = optimizer.optimizers[1]
    for parameter in muon.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    with Products() as products:
        muon.step()
    assert products.dtypes == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_in_float32_muon_moves_as_the_published_method_does(shape):
    """Newton-Schulz and Nesterov as Jordan et al. give them, in float64."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for _ in range(2)]
    expected, momentum = [p.detach().double() for p in weights], [torch.zeros(shape).double() for _ in weights]
    rate, decay = 0.8, 0.3  # of the momentum and the weights
    muon = Muon([{"params": weights, "lr": 0.01, "weight_decay": decay}], (), torch.float32, rate)
    for _ in range(3):
        for n, parameter in enumerate(weights):
            parameter.grad = torch.randn(shape)
            gradient = parameter.grad.double()
            momentum[n] = rate * momentum[n] + (1 - rate) * gradient
            x = (1 - rate) * gradient + rate * momentum[n]
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            expected[n] = expected[n] * (1 - 0.01 * decay) - 0.01 * 0.2 * max(shape) ** 0.5 * x
        muon.step()
    for parameter, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value.float(), atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_saved_and_loaded_it_goes_on_exactly(name, tmp_path):
    straight, _, optimizer = make(name)
    for it in range(6):
        step(straight, optimizer, it)
    first, _, optimizer = make(name)
    for it in range(3):
        step(first, optimizer, it)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second, _, optimizer = make(name)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for it in range(3, 6):
        step(second, optimizer, it)
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert (a == b).all()


def test_the_gradient_scaler_skips_an_overflow_of_all_parts():
    model, _, optimizer = make()
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    idx = torch.zeros(2, 8, dtype=torch.int64)
    scaler.scale(model(idx, idx)).backward()
    model.transformer.ln_f.bias.grad[0] = torch.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all((before[name] == value).all() for name, value in model.state_dict().items())


def test_muon_does_nothing_where_the_gradient_is_zero():
    weight = torch.nn.Parameter(torch.ones(4, 8))
    weight.grad = torch.zeros(4, 8)
    Muon([{"params": [weight], "lr": 0.01, "weight_decay": 0.0}], (), torch.float32).step()
    assert torch.equal(weight, torch.ones(4, 8))
