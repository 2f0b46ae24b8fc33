"""Short runs of train.py: their settings, the folder of an undisturbed one, and how two runs are compared."""

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import run_script

import train
from config import ModelConfig, TrainConfig
from internals import checkpoint, report
from model import GPT

TIMINGS = ("seconds", "tokens_per_second")


def tiny(data_dir, out_dir, **changes) -> TrainConfig:
    """A run of 20 iterations of 2 micro-steps, a few milliseconds each, with dropout, over two and a half epochs."""
    model = {f.name: changes.pop(f.name) for f in dataclasses.fields(ModelConfig) if f.name in changes}
    defaults = dict(n_layer=2, n_head=2, n_embd=16, n_inner=32, block_size=16, vocab_size=257, dropout=0.1)
    settings = dict(
        data_dir=str(data_dir), out_dir=str(out_dir), device="cpu", dtype="float32", max_iters=20, batch_size=4,
        tokens_per_iter=128, learning_rate=1e-2, min_lr=1e-3, log_interval=1, eval_interval=8, eval_tokens=256,
        checkpoint_interval=5,
    )  # fmt: skip
    return TrainConfig(**{**settings, **changes}, model=ModelConfig(**{**defaults, **model}))


def flags(data_dir, out_dir, **changes) -> list[str]:
    """The run of `tiny` as flags."""
    cfg = tiny(data_dir, out_dir, **changes)
    values = {**dataclasses.asdict(cfg), **dataclasses.asdict(cfg.model)}
    names = [f.name for f in (*dataclasses.fields(TrainConfig), *dataclasses.fields(ModelConfig))]
    switches = ("resume", "auto_resume", "overwrite", "check", "eval_only")
    given = [
        f"--{name.replace('_', '-')}={values[name]}" for name in names if name not in (*switches, "model", "vocab_size")
    ]
    return [flag for flag in given if not flag.endswith("=")]


def run_command(data_dir, out_dir, *args) -> str:
    """stdout of train.py as a command, which must succeed."""
    result = run_script("train.py", "--data-dir", data_dir, "--out-dir", out_dir, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def quick(monkeypatch):
    """One thread for models this small, and no curves: drawing them takes longer than these runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(report, "plot", lambda *of_the_curves: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def straight(data_dir, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    out_dir = tmp_path_factory.mktemp("straight")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot", lambda *of_the_curves: None)
        train.train(tiny(data_dir, out_dir))
    return out_dir


def metrics(out_dir) -> list[dict]:
    """The rows of metrics.jsonl, without the measured times."""
    rows = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def difference(a, b, where: str = "") -> str:
    """The first place where two checkpoints differ in a bit; empty if they do not."""
    if isinstance(a, torch.Tensor):
        return "" if a.dtype == b.dtype and torch.equal(a, b) else where
    if isinstance(a, dict):
        return next(
            filter(None, (difference(a[k], b.get(k), f"{where}.{k}") for k in a)), "" if len(a) == len(b) else where
        )
    if isinstance(a, list | tuple):
        pairs = enumerate(zip(a, b, strict=True))
        return next(filter(None, (difference(x, y, f"{where}[{n}]") for n, (x, y) in pairs)), "")
    return "" if a == b else where


def assert_same_checkpoints(a: Path, b: Path) -> None:
    """Two runs ended alike, bit for bit: weights, optimizer, random state."""
    for name in ("last.pt", "best.pt"):
        one, other = checkpoint.load(a / name), checkpoint.load(b / name)
        for saved in (one, other):
            saved.pop("seconds", None)  # a measured time
            saved.pop("config")  # --resume, --out-dir
        assert difference(one, other) == ""


def assert_same_end(a: Path, b: Path) -> None:
    """Two runs ended alike, bit for bit, and wrote the same metrics."""
    assert_same_checkpoints(a, b)
    assert metrics(a) == metrics(b)


def stop_at(monkeypatch, data_dir, out_dir, it: int, **changes) -> None:
    """A run that SIGTERM stops in the iteration after `it`."""
    get_lr = train.get_lr
    with monkeypatch.context() as patch:
        patch.setattr(
            train, "get_lr", lambda i, c: (os.kill(os.getpid(), signal.SIGTERM) if i == it else 0, get_lr(i, c))[1]
        )
        train.train(tiny(data_dir, out_dir, **changes))
    assert checkpoint.load(out_dir / "last.pt")["iter"] == it + 1


def full_disk(path: Path) -> None:
    """From here on, writing to `path` fails as on a full disk."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


def little_memory(monkeypatch, sequences: int, training_only: bool = False) -> None:
    """A device with memory for `sequences` in a micro-step. Of the larger ones, every second fails."""
    forward, larger = GPT.forward, itertools.count()

    def limited(self, idx, targets=None, **rest):
        if len(idx) > sequences and (self.training or not training_only) and next(larger) % 2 == 1:
            torch.rand(1)  # a failed attempt has used random numbers
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(self, idx, targets, **rest)

    monkeypatch.setattr(GPT, "forward", limited)
