"""The advice before a run that makes no sense. test_check.py tests `--check` itself."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import TrainConfig
from internals import preflight
from internals.cli import with_preset
from internals.device import Obstacle
from internals.machine import Machine
from internals.run import Run, TrainState
from internals.run_length import resolve_auto
from internals.start import UserError
from internals.windows import TokenStream, ValidationWindows
from model import GPT

CPU = Machine(torch.device("cpu"), torch.float32, "as requested", rank=0, processes=1)
GPU = dataclasses.replace(CPU, device=torch.device("cuda"))


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    """Ignore the test machine's own card: the advice is about the run alone."""
    monkeypatch.setattr(preflight, "device_notice", lambda name, device: "")


def advice(
    machine=GPU, train_tokens=100_000_000, val_windows=100, preset="wikipedia", resumed_at=None, **changes
) -> list[str]:
    cfg = with_preset(TrainConfig, preset)
    shape = {name: changes.pop(name) for name in list(changes) if hasattr(cfg.model, name)}
    cfg = dataclasses.replace(cfg, **changes, model=dataclasses.replace(cfg.model, **shape))
    cfg = resolve_auto(cfg, train_tokens).cfg
    with torch.device("meta"):
        model = GPT(cfg.model)
    block_size = cfg.model.block_size
    train_windows = SimpleNamespace(epoch_tokens=train_tokens // block_size * block_size)
    split = TokenStream([np.zeros(val_windows * block_size + 1, np.uint16)])
    windows = ValidationWindows(split, block_size, cfg.eval_tokens)
    run = Run(cfg, {}, machine, train_windows, windows, resumed_at)
    return preflight.sanity_advice(run, TrainState(model, None, None))


@pytest.mark.parametrize("preset", ["wikipedia", "wikipedia-150m"])
def test_the_presets_need_no_advice_on_a_gpu(preset):
    assert advice(preset=preset) == []


def test_the_small_presets_need_no_advice_on_a_cpu(monkeypatch):
    monkeypatch.setattr(preflight, "cpu_flops", lambda dtype: 1e11)
    assert advice(CPU, train_tokens=60_000_000, val_windows=1024, preset="laptop", vocab_size=8192) == []
    assert advice(CPU, train_tokens=94_000, val_windows=76, preset="demo") == []


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (
            dict(train_tokens=75_000),
            ["14,0", "epochs", "prepare more text", "--max-epochs 20 and", "smaller --tokens-per-iter"],
        ),
        (dict(train_tokens=75_000, resumed_at=0), ["prepare more text", "--max-iters 22 and"]),
        (dict(tokens_per_iter=127 * 256), ["micro-steps have 1 sequence,", "--tokens-per-iter 32768"]),
        (dict(machine=CPU), ["days on this CPU", "use a GPU", "--preset laptop", "--max-minutes 720"]),
        (dict(machine=CPU, resumed_at=0), ["days on this CPU", "about --max-iters "]),
        (dict(val_windows=1), ["1 validation window of 256 tokens", "--val-fraction", "smaller --block-size"]),
        (dict(eval_tokens=256), ["1 validation window of 256 tokens", "give a larger --eval-tokens"]),
        (dict(val_windows=4096, eval_interval=1), ["evaluations take", "--eval-interval"]),
        (dict(n_embd=768), ["n_inner 1,536 is 2 times n_embd 768", "--n-inner 3072"]),
        (dict(n_head=8, n_embd=400, n_inner=1600), ["heads of 50 dimensions", "multiple of 8; give --n-embd 448"]),
        (dict(learning_rate=1.0, min_lr=0.1), ["--learning-rate 1 will most likely diverge"]),
    ],
    ids=str,
)
def test_an_absurd_run_is_named_with_what_would_be_right(monkeypatch, run, words):
    monkeypatch.setattr(preflight, "cpu_flops", lambda dtype: 1e11)
    (line,) = advice(**run)
    for word in words:
        assert word in line
    assert "\n" not in line


def test_a_resumed_run_gets_no_advice_that_it_would_refuse():
    assert advice(val_windows=1, resumed_at=0) == advice(n_embd=768, resumed_at=0) == []


def test_a_cpus_speed_is_half_of_a_products(monkeypatch):
    """Three products of 2 x 1024^3 operations, here in two seconds."""
    monkeypatch.setattr(preflight, "time", SimpleNamespace(perf_counter=iter([0.0, 2.0]).__next__))
    assert preflight.cpu_flops(torch.float32) == 0.5 * 3 * 2 * 1024**3 / 2


def start(machine=CPU, preset="wikipedia", resumed_at=None, **changes) -> None:
    cfg = resolve_auto(dataclasses.replace(with_preset(TrainConfig, preset), **changes), epoch_tokens=10**9).cfg
    with torch.device("meta"):
        model = GPT(cfg.model)
    preflight.refuse_long_run_on_cpu(Run(cfg, {}, machine, None, None, resumed_at), model)


def test_a_long_run_on_a_cpu_must_be_asked_for(monkeypatch):
    monkeypatch.setattr(preflight, "cpu_flops", lambda dtype: 1e11)
    obstacle = Obstacle("PyTorch finds no NVIDIA driver", "install one", driver=False)
    monkeypatch.setattr(preflight, "cuda_obstacle", lambda: obstacle)
    words = r"no GPU, .* about 2\d days \(\d\.\de\+17 .*\)\. PyTorch finds no NVIDIA driver; install one\. To train .* --device cpu"
    with pytest.raises(UserError, match=words):
        start()
    with pytest.raises(UserError, match="--device auto"):
        start(resumed_at=8_000)
    long, short = (Run(TrainConfig(max_minutes=minutes), {}, CPU, None, None) for minutes in (3_000.0, 60.0))
    with pytest.raises(UserError, match=r"the run would take about 2 days \(1\.8e\+16 "):
        preflight.refuse_long_run_on_cpu(long)  # before it measures anything
    preflight.refuse_long_run_on_cpu(short)


@pytest.mark.parametrize(
    "run",
    [
        dict(device="cpu"),
        dict(machine=GPU),
        dict(machine=dataclasses.replace(CPU, device=torch.device("mps"))),
        dict(preset="demo"),
        dict(preset="laptop"),
        dict(resumed_at=15_900),
    ],
    ids=["asked", "cuda", "mps", "demo", "laptop", "nearly finished"],
)
def test_these_runs_are_not_refused(run):
    start(**run)


def test_a_card_that_cannot_be_used_and_one_that_is_full_are_advice(monkeypatch):
    monkeypatch.setattr(preflight, "device_notice", lambda name, device: "GPU not used: PyTorch is old")
    monkeypatch.setattr(preflight, "held_by_others", lambda share: "other processes hold 13 of 24 GiB")
    assert advice() == ["GPU not used: PyTorch is old", "other processes hold 13 of 24 GiB"]
