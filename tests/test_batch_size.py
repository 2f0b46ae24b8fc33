"""`--batch-size auto`: a number that divides the iteration and fits into the card's memory."""

import dataclasses

import pytest
import torch
from conftest import REPO, assert_user_error, needs_fake_gpu, run_on_fake_gpu, run_script

from config import ModelConfig, TrainConfig
from internals import checkpoint
from internals.batch_size import resolve_batch_size, training_bytes
from internals.cli import with_preset
from internals.machine import Machine
from internals.optimizer import make_optimizer, moment_bytes
from internals.run_length import resolve_auto
from model import GPT

GIB = 2**30


def batch_size(device: str, preset: str = "wikipedia", processes: int = 1, **fields) -> int:
    cfg = resolve_auto(with_preset(TrainConfig, preset), epoch_tokens=10**9).cfg
    cfg = dataclasses.replace(cfg, batch_size="auto", **fields)
    machine = Machine(torch.device(device), torch.bfloat16, "", 0, processes)
    return resolve_batch_size(cfg, machine).batch_size


@pytest.fixture
def card(monkeypatch):
    """A function that sets the free memory of a card, the same for all processes."""
    monkeypatch.setattr(Machine, "gather", lambda self, values: values[None])
    return lambda gib: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gib * GIB), 0))


def test_a_number_stays_and_auto_is_stored_as_a_number():
    cfg = TrainConfig(batch_size=8)
    machine = Machine(torch.device("cpu"), torch.float32, "", 0, 1)
    assert resolve_batch_size(cfg, machine) is cfg
    assert isinstance(resolve_batch_size(TrainConfig(batch_size="auto"), machine).settings()["batch_size"], int)


@pytest.mark.parametrize(
    ("preset", "expected"), [("wikipedia", 16), ("wikipedia-150m", 4), ("laptop", 16), ("demo", 32)]
)
def test_on_a_cpu_a_micro_step_has_4096_tokens(preset, expected):
    assert batch_size("cpu", preset) == expected


def test_it_divides_the_iteration(card):
    card(7)
    sequences = 3 * 5 * 7
    assert batch_size("cuda", tokens_per_iter=sequences * 256) == 105
    card(3.5)
    assert batch_size("cuda", tokens_per_iter=sequences * 256) == 35
    assert batch_size("cuda", tokens_per_iter=128 * 256, processes=8) == 16


def test_more_memory_never_holds_fewer_and_the_least_is_one(card):
    sizes = []
    for gib in (0.1, 2, 3, 4, 6, 8, 12, 16, 24, 80):
        card(gib)
        sizes.append(batch_size("cuda"))
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] == 256


def test_an_iteration_that_no_batch_divides_is_refused():
    assert_user_error(run_script("train.py", "--batch-size", "auto", "--tokens-per-iter", 1000), "--tokens-per-iter")


def test_a_run_stores_the_number_and_resumes_with_it(data_dir, tmp_path):
    shape = ("--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--n-inner", 32, "--block-size", 16, "--eval-tokens", 64)
    run = ("train.py", "--data-dir", data_dir, "--out-dir", tmp_path, "--device", "cpu", "--tokens-per-iter", 96)
    first = run_script(*run, *shape, "--batch-size", "auto", "--max-iters", 2)
    assert first.returncode == 0 and "96 tokens = 6 sequences x 16 tokens x 1 micro-step" in first.stdout, first.stderr
    assert checkpoint.load(tmp_path / "last.pt")["config"]["batch_size"] == 6
    resumed = run_script("train.py", "--out-dir", tmp_path, "--resume", "--max-iters", 3)
    assert resumed.returncode == 0, resumed.stderr
    assert checkpoint.load(tmp_path / "last.pt")["config"]["batch_size"] == 6


def test_the_weights_are_counted_with_their_gradients_and_moments():
    cfg = dataclasses.replace(with_preset(TrainConfig, "wikipedia"), optimizer="adamw", compile="off")
    with torch.device("meta"):
        model = GPT(cfg.model)
    optimizer = make_optimizer(model, cfg, torch.device("cpu"), torch.bfloat16)
    needed = 2 * sum(p.nbytes for p in model.parameters()) + moment_bytes(optimizer)
    constant, _ = training_bytes(dataclasses.replace(cfg, tokens_per_iter=256), torch.bfloat16)
    assert needed < constant < 2 * needed


def test_a_sequence_is_counted_with_what_its_backward_pass_keeps():
    """In the blocks, and without the weights."""
    model = GPT(ModelConfig(n_layer=3, n_head=2, n_embd=64, n_inner=256, block_size=32, vocab_size=64))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # storages by their address; each is held, so that no other gets its address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(8, 32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for block in model.transformer.h:
            x = block(x)
    cfg = TrainConfig(model=model.config, tokens_per_iter=256, batch_size=8, compile="off")
    _, sequence = training_bytes(cfg, torch.float32)
    measured = sum(storage.nbytes() for storage in kept.values()) / 8
    assert measured < sequence < 1.2 * measured  # a CPU's attention needs no copy of its output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_is_counted_with_its_masks_and_results(dtype):
    """On a GPU a mask takes a byte for each element. A block has two of them, after its two halves."""
    cfg = with_preset(TrainConfig, "wikipedia")
    without, dropping = (
        training_bytes(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dropout=p)), dtype)[1]
        for p in (0.0, 0.1)
    )
    c = cfg.model
    assert dropping - without == c.n_layer * 2 * c.block_size * c.n_embd * (1 + dtype.itemsize)


STEPS = """
import dataclasses, sys
import torch
from config import TrainConfig
from internals.batch_size import resolve_batch_size
from internals.cli import with_preset
from internals.machine import make_machine
from internals.optimizer import make_optimizer
from model import GPT

cfg = dataclasses.replace(with_preset(TrainConfig, sys.argv[1]), batch_size="auto", compile=sys.argv[2])
machine = make_machine(cfg)
cfg = resolve_batch_size(cfg, machine)
model = GPT(cfg.model).to(machine.device)
optimizer = make_optimizer(model, cfg, machine.device, machine.dtype)
forward = torch.compile(model, dynamic=False) if cfg.compile == "on" else model
tokens = torch.zeros(cfg.batch_size, cfg.model.block_size, dtype=torch.int64, device=machine.device)
for iteration in range(2):
    for micro_step in range(2):
        with machine.autocast():
            loss = forward(tokens, tokens)
        loss.backward()
        del loss
    optimizer.step()
    optimizer.zero_grad()
free, total = torch.cuda.mem_get_info()
print(cfg.batch_size, round(torch.cuda.max_memory_reserved() / 2**20), round(torch.cuda.max_memory_allocated() / 2**20))
"""


@needs_fake_gpu
@pytest.mark.parametrize(
    ("preset", "mib", "compile", "expected"),
    [
        ("wikipedia", 8188, "off", 128), ("wikipedia", 12282, "off", 256), ("wikipedia", 12282, "on", 256),
        ("wikipedia-150m", 8188, "off", 4), ("wikipedia-150m", 12282, "off", 8), ("wikipedia-150m", 24080, "off", 32),
        ("wikipedia-150m", 8188, "on", 4), ("wikipedia-150m", 24080, "on", 32),
    ],
)  # fmt: skip
def test_what_is_calculated_fits_the_card(preset, mib, compile, expected, tmp_path):
    (tmp_path / "steps.py").write_text(STEPS)
    result = run_on_fake_gpu("python", tmp_path / "steps.py", preset, compile, FAKEGPU_MIB=mib, PYTHONPATH=REPO)
    assert result.returncode == 0, result.stderr
    print(preset, mib, compile, result.stdout)
    assert int(result.stdout.split()[0]) == expected, result.stdout
