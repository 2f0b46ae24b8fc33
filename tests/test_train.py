"""The training loop: it resumes exactly from any stop, a fault costs nothing that was saved, every figure is true.

More kills than a test run has time for:  KILLS=50 python -m pytest tests/test_train.py -k kill
"""

import dataclasses
import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, assert_user_error, run_script, write_data

import train
from config import ModelConfig, TrainConfig
from internals import checkpoint, preflight, reference, report, samples, stopping
from internals.cli import parse
from internals.machine import Outcome, make_machine
from internals.memory import Memory
from internals.resume import resume_settings
from internals.run import Run, TrainState
from internals.run_folder import check_source_stays
from internals.settings import read_settings
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.windows import TokenStream, TrainingWindows, ValidationWindows
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


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


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


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread for models this small, and no curves: drawing them takes longer than these runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(report, "plot", lambda *of_the_curves: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(data_dir, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    out_dir = tmp_path_factory.mktemp("straight")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot", lambda *of_the_curves: None)
        train.train(tiny(data_dir, out_dir))
    return out_dir


# ----------------------------------------------------------------------------------------------------------------------
# The reference


def test_a_reference_of_the_same_run_is_shown_beside_it(data_dir, tmp_path, straight, monkeypatch, capsys):
    saved = checkpoint.load(straight / "last.pt")
    settings = {name: value for name, value in saved["config"].items() if name not in reference.NOT_LEARNING}
    run = {"settings": settings, "data_sha256": saved["data"]["sha256"], "val_loss": {"8": 1.25, "20": 1.0}}
    run |= {"bits_per_byte": {"8": 1.8, "20": 1.4}, "text": "some text"}
    run |= {"hardware": "a pocket calculator", "seed": 1, "date": "2026-01-01"}
    monkeypatch.setattr(reference, "REFERENCES", tmp_path)
    (tmp_path / "wikipedia.json").write_text(json.dumps(run))
    train.train(tiny(data_dir, tmp_path / "same", seed=2))
    out = capsys.readouterr().out
    assert "reference  a pocket calculator, seed 1" in out
    shown = {
        line.split("/")[0].strip(): line.partition("reference ")[2] for line in out.splitlines() if "  val " in line
    }
    assert shown == {"0": "", "8": "1.250", "16": "", "20": "1.000"}
    train.train(tiny(data_dir, tmp_path / "other", learning_rate=2e-2))
    out = capsys.readouterr().out
    assert "reference " not in out and "pocket calculator" not in out


# ----------------------------------------------------------------------------------------------------------------------
# Stopped anywhere


def run_in_child(cfg: TrainConfig, iteration_seconds: float) -> None:
    """Train in a process that may be killed, slowly enough for the kills to hit it."""
    report.plot = lambda *of_the_curves: None
    get_lr = train.get_lr
    train.get_lr = lambda it, cfg: (time.sleep(iteration_seconds), get_lr(it, cfg))[1]
    train.train(cfg)


def test_killed_at_random_and_resumed_equals_uninterrupted(data_dir, tmp_path, monkeypatch, capfd):
    """kill -9 at random moments: in an iteration, in an evaluation, in a save, before the first checkpoint."""
    kills = int(os.environ.get("KILLS", 4))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "matplotlib.figure"])
    long = dict(max_iters=3 * kills + 20, checkpoint_interval=1, eval_interval=4)
    cfg = tiny(data_dir, tmp_path / "killed", auto_resume=True, **long)
    rng = random.Random(0)
    hits, during_a_save = 0, 0
    for kill in range(kills):
        child = context.Process(target=run_in_child, args=(cfg, 0.002), daemon=True)
        child.start()
        last = tmp_path / "killed" / "last.pt"
        if kill > 0:  # the first kill may come before there is a checkpoint; later ones wait for progress
            written = last.stat().st_mtime_ns if last.exists() else 0
            while child.is_alive() and not (last.exists() and last.stat().st_mtime_ns > written):
                time.sleep(0.001)
            if kill % 2:  # every other one in a save, or just after it
                while child.is_alive() and not (tmp_path / "killed" / "last.pt.tmp").exists():
                    time.sleep(0.0002)
            else:
                time.sleep(rng.random() * 0.03)
        else:
            time.sleep(rng.random() * 0.5)
        child.kill()
        child.join(60)
        assert child.exitcode in (-signal.SIGKILL, 0)  # 0: on a busy machine the run may be over before the kill
        hits += child.exitcode == -signal.SIGKILL
        during_a_save += any((tmp_path / "killed").glob("*.pt.tmp"))
    child = context.Process(target=run_in_child, args=(cfg, 0), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    train.train(tiny(data_dir, tmp_path / "straight", **long))
    assert_same_end(tmp_path / "killed", tmp_path / "straight")
    assert not list((tmp_path / "killed").glob("*.tmp"))
    assert hits > 0
    with capfd.disabled():
        print(f" [{hits} kills, {during_a_save} of them during a save]", end="")


@pytest.fixture
def heeded():
    """The closing of the terminal is heeded, even if the tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(os.name != "posix", reason="a process of Windows cannot send itself signals")
@pytest.mark.parametrize(
    ("name", "it"), [*(("SIGINT", it) for it in (0, 7, 8, 13, 19)), ("SIGTERM", 8), ("SIGHUP", 13)]
)
def test_a_signal_saves_and_resuming_equals_uninterrupted(
    data_dir, tmp_path, monkeypatch, heeded, straight, capsys, name, it
):
    number = getattr(signal, name)  # Windows has no SIGHUP
    with monkeypatch.context() as patch:
        get_lr = train.get_lr
        patch.setattr(train, "get_lr", lambda i, c: (os.kill(os.getpid(), number) if i == it else 0, get_lr(i, c))[1])
        train.train(tiny(data_dir, tmp_path))
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == it + 1
    if it < 19:
        assert f"Stopped at iteration {it + 1}, all saved.\nContinue: python train.py " in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert_same_end(tmp_path, straight)


def test_a_signal_during_evaluation_saves_after_the_next_iteration(data_dir, tmp_path, monkeypatch, straight):
    with monkeypatch.context() as patch:
        evaluate = train.evaluate
        patch.setattr(train, "evaluate", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), evaluate(*args))[1])
        train.train(tiny(data_dir, tmp_path))
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == 1
    train.train(tiny(data_dir, tmp_path, auto_resume=True))
    assert_same_end(tmp_path, straight)


def test_a_second_interrupt_quits_at_once_and_one_before_the_run_leaves_no_traceback(data_dir, tmp_path):
    source = f"""
import os, signal, train
from config import TrainConfig
from internals import cli, start
if {{twice}}:
    train.get_lr = lambda it, cfg: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
else:
    train.make_optimizer = lambda *args: os.kill(os.getpid(), signal.SIGINT)
import sys
sys.argv = ["train.py", "--data-dir", {str(data_dir)!r}, "--out-dir", {str(tmp_path / "run")!r}, "--block-size", "16",
            "--n-layer", "1", "--batch-size", "4", "--tokens-per-iter", "64", "--dtype", "float32", "--n-embd", "12",
            "--device", "cpu"]
start.run(lambda: train.main(cli.parse(TrainConfig, "")), "Stopped.")
"""
    before = run_script("-c", source.format(twice=False))
    assert before.returncode == 130 and "Traceback" not in before.stderr and "Stopped" in before.stderr, before.stderr
    assert not (tmp_path / "run").exists()
    twice = run_script("-c", source.format(twice=True))
    assert twice.returncode == -signal.SIGINT and "Ctrl-C stops at once" in twice.stderr, twice.stderr
    assert checkpoint.load(tmp_path / "run" / "last.pt")["iter"] == 0


def stop_at(monkeypatch, data_dir, out_dir, it: int, **changes) -> None:
    """A run that SIGTERM stops in the iteration after `it`."""
    get_lr = train.get_lr
    with monkeypatch.context() as patch:
        patch.setattr(
            train, "get_lr", lambda i, c: (os.kill(os.getpid(), signal.SIGTERM) if i == it else 0, get_lr(i, c))[1]
        )
        train.train(tiny(data_dir, out_dir, **changes))
    assert checkpoint.load(out_dir / "last.pt")["iter"] == it + 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_scheduler_may_signal_twice(data_dir, tmp_path, monkeypatch, capfd, name):
    """It signals every process of a job, and a launcher passes its own signal on."""
    get_lr, number = train.get_lr, getattr(signal, name)
    twice = lambda it, cfg: ([os.kill(os.getpid(), number) for _ in range(2) if it == 3], get_lr(it, cfg))[1]  # noqa: E731
    monkeypatch.setattr(train, "get_lr", twice)
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup, which ignores SIGHUP
    try:
        train.train(tiny(data_dir, tmp_path))
    finally:
        signal.signal(number, before)
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == 4
    assert capfd.readouterr().err.count("Stopping after this iteration") == 1


def test_after_a_scheduler_s_signal_ctrl_c_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells ignore it
    try:
        with stopping.catch_signals(SimpleNamespace(is_main=False)) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set() and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_on_two_threads_resumes_exactly_too(data_dir, tmp_path, monkeypatch):
    """The model is large enough for both of them. All other runs here have one thread."""
    torch.set_num_threads(2)
    large = dict(n_head=4, n_embd=128, n_inner=512, block_size=64, batch_size=8, tokens_per_iter=1024, max_iters=8)
    train.train(tiny(data_dir, tmp_path / "straight", **large))
    stop_at(monkeypatch, data_dir, tmp_path / "stopped", 3, **large)
    train.train(tiny(data_dir, tmp_path / "stopped", resume=True, **large))
    assert checkpoint.load(tmp_path / "stopped" / "last.pt")["machine"]["threads"] == 2
    assert_same_end(tmp_path / "stopped", tmp_path / "straight")


def test_a_finished_run_says_so_and_more_iterations_extend_it(data_dir, tmp_path, capsys):
    train.train(tiny(data_dir, tmp_path, max_iters=6))
    before = (tmp_path / "last.pt").read_bytes()
    capsys.readouterr()
    for again in ({"resume": True}, {"auto_resume": True}):
        train.train(tiny(data_dir, tmp_path, max_iters=6, **again))
        out = capsys.readouterr().out
        assert "is finished (6 iterations). Extend it: python train.py " in " ".join(out.split())
        assert out.endswith("--resume --max-iters 12\n")
        assert (tmp_path / "last.pt").read_bytes() == before
    train.train(tiny(data_dir, tmp_path, max_iters=12, resume=True))
    out = capsys.readouterr().out
    assert "max_iters 6 -> 12" in out and "learning rate" in out and "the cosine now ends at 12" in out
    assert [row["iter"] for row in metrics(tmp_path)] == list(range(13))


def test_auto_resume_keeps_the_batch_size_that_auto_stood_for(data_dir, tmp_path, monkeypatch):
    def batch_size() -> int:
        return checkpoint.load(tmp_path / "last.pt")["config"]["batch_size"]

    train.train(tiny(data_dir, tmp_path, max_iters=6, batch_size="auto"))
    began = batch_size()
    assert began > 1
    monkeypatch.setattr("internals.batch_size.CPU_TOKENS", 1)  # as if there was less memory now
    train.train(tiny(data_dir, tmp_path, max_iters=8, batch_size="auto", auto_resume=True))
    assert batch_size() == began
    train.train(tiny(data_dir, tmp_path, max_iters=10, batch_size="auto", resume=True))
    assert batch_size() == 1


def test_a_run_cannot_end_before_the_iteration_that_it_has_reached(data_dir, tmp_path, monkeypatch):
    stop_at(monkeypatch, data_dir, tmp_path, 8)
    for fewer in (5, 9):
        with pytest.raises(UserError, match=rf"--max-iters {fewer}: the run in .* has done 9 iterations; give more"):
            train.train(tiny(data_dir, tmp_path, resume=True, max_iters=fewer))


def test_the_learning_rate_before_and_after_are_of_the_same_iteration(data_dir, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, data_dir, tmp_path, 9)
    capsys.readouterr()
    train.train(tiny(data_dir, tmp_path, resume=True, max_iters=40))
    rates = [train.get_lr(10, tiny(data_dir, tmp_path, max_iters=iters)) for iters in (20, 40)]
    words = f"learning rate {rates[0]:.2e} -> {rates[1]:.2e} here (the cosine now ends at 40)"
    assert words in " ".join(capsys.readouterr().out.split())


def test_resuming_names_what_changed_and_takes_it(data_dir, tmp_path, capsys, monkeypatch):
    train.train(tiny(data_dir, tmp_path, max_iters=5))
    groups = []
    make_optimizer = train.make_optimizer
    monkeypatch.setattr(train, "make_optimizer", lambda *args: (groups.append(make_optimizer(*args)), groups[-1])[1])
    changes = dict(max_iters=10, weight_decay=0.3, tokens_per_iter=256)
    torch.set_num_threads(2)
    train.train(tiny(data_dir, tmp_path, resume=True, **changes))
    out = " ".join(capsys.readouterr().out.split())
    for words in ("weight_decay 0.1 -> 0.3", "tokens_per_iter 128 -> 256", "threads 1 -> 2"):
        assert words in out
    assert groups[0].param_groups[0]["weight_decay"] == 0.3  # not only printed
    assert metrics(tmp_path)[-1]["tokens"] == 5 * 128 + 5 * 256


def test_a_resumed_run_keeps_its_dtype(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("internals.cpu_kernels.capabilities", lambda: {"avx512_bf16": True})
    train.train(tiny(data_dir, tmp_path, dtype="auto", max_iters=2))
    monkeypatch.setattr("internals.cpu_kernels.capabilities", lambda: {})
    train.train(tiny(data_dir, tmp_path, dtype="auto", max_iters=3, resume=True))
    assert "bfloat16 (as in the run so far)" in capsys.readouterr().out
    train.train(tiny(data_dir, tmp_path, dtype="float32", max_iters=4, resume=True))
    assert "dtype bfloat16 -> float32" in capsys.readouterr().out


def run_command(data_dir, out_dir, *args) -> str:
    """stdout of train.py as a command, which must succeed."""
    result = run_script("train.py", "--data-dir", data_dir, "--out-dir", out_dir, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_resume_takes_its_settings_from_last_pt(data_dir, tmp_path):
    """A forgotten flag changes nothing, a given one does, and each difference from config.py is printed once."""
    out_dir = tmp_path / "run"
    run_command(data_dir, out_dir, *flags(data_dir, out_dir, max_iters=4)[2:], "--muon-lr-scale=3")
    assert "is finished (4 iterations)" in " ".join(run_command(data_dir, out_dir, "--resume").split())
    out = run_command(data_dir, out_dir, "--resume", "--max-iters", "6", "--weight-decay", "0.3")
    saved = checkpoint.load(out_dir / "last.pt")
    assert saved["iter"] == 6
    for name, value in {"n_layer": 2, "block_size": 16}.items():
        assert saved["config"]["model"][name] == value
    settings = {"learning_rate": 1e-2, "muon_lr_scale": 3.0, "weight_decay": 0.3, "batch_size": 4, "max_iters": 6}
    assert {name: saved["config"][name] for name in settings} == settings
    for line in (
        "kept from last.pt: muon_lr_scale 3 (config.py: 4); --muon-lr-scale 4 changes it",
        "kept from last.pt: learning_rate 0.01 (config.py: 0.001); --learning-rate 0.001 changes it",
        "kept from last.pt: n_layer 2 (config.py: 6); a different value needs another --out-dir",
    ):
        assert out.count(line) == 1, out
    for name in ("weight_decay", "max_iters", "vocab_size", "out_dir", "seed"):
        assert f"kept from last.pt: {name}" not in out
    assert "changed: max_iters 4 -> 6, weight_decay 0.1 -> 0.3" in out
    again = " ".join(run_command(data_dir, out_dir, "--auto-resume", "--max-iters=7", "--lr", "5e-3").split())
    assert "learning_rate 0.01 -> 0.005" in again
    assert checkpoint.load(out_dir / "last.pt")["config"]["min_lr"] == 5e-4  # follows --lr


def test_a_last_pt_of_an_earlier_version_resumes(data_dir, tmp_path, monkeypatch):
    """Fields added since then get the earlier behaviour: before Muon there was only AdamW."""
    train.train(tiny(data_dir, tmp_path / "straight", optimizer="adamw"))
    stop_at(monkeypatch, data_dir, tmp_path / "old", 7, optimizer="adamw")
    for name in ("last.pt", "best.pt"):
        saved = checkpoint.load(tmp_path / "old" / name)
        for field in ("optimizer", "muon_lr_scale", "sample_prompt", "init_from", "config", "eval_tokens", "preset"):
            del saved["config"][field]
        checkpoint.save(tmp_path / "old" / name, saved)
    train.train(tiny(data_dir, tmp_path / "old", optimizer="adamw", resume=True))
    assert_same_end(tmp_path / "old", tmp_path / "straight")
    out = run_command(data_dir, tmp_path / "old", "--resume", "--max-iters", "21")
    assert "kept from last.pt: optimizer adamw (config.py: muon)" in out


def test_resuming_from_another_folder_asks_for_the_path_of_the_data(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(data_dir.parent)
    stop_at(monkeypatch, data_dir.name, tmp_path / "run", 7)
    monkeypatch.chdir(tmp_path)
    for mode in ({"resume": True}, {"auto_resume": True}):
        with pytest.raises(UserError, match=f"--data-dir {data_dir.name}: there is no such folder here.*give the path"):
            train.train(tiny(data_dir.name, "run", **mode))
    with pytest.raises(UserError, match=f"--data-dir elsewhere: .* was started with --data-dir {data_dir.name};"):
        train.train(tiny("elsewhere", "run", resume=True))
    train.train(tiny(data_dir, "run", resume=True))


def test_flags_of_a_resumed_run_are_checked_against_its_own_settings(data_dir, tmp_path):
    """Preset wikipedia has a lower learning rate and a larger context than this run."""
    train.train(tiny(data_dir, tmp_path, max_iters=2))
    out_dir = ["--out-dir", str(tmp_path)]
    config = ["--auto-resume", "--config", str(tmp_path / "config.json")]
    for how in (["--resume"], ["--auto-resume"], config):
        args = [*out_dir, *how, "--min-lr=5e-3", "--eval-tokens=64", "--tokens-per-iter=48"]
        cfg, kept = resume_settings(parse(TrainConfig, "", args), args)
        assert (cfg.learning_rate, cfg.min_lr, cfg.eval_tokens, cfg.tokens_per_iter) == (1e-2, 5e-3, 64, 48)
        assert any("learning_rate 0.01 (config.py: 0.001)" in line for line in kept) == (how != config)
    for changes, words in (
        ({"min_lr": 0.02}, "must not be above --learning-rate 0.01"),
        ({"eval_tokens": 8}, "window"),
    ):
        for mode, folder in (("resume", tmp_path), ("auto_resume", tmp_path), ("auto_resume", tmp_path / "new")):
            with pytest.raises(UserError, match=words):
                train.train(tiny(data_dir, folder, **{mode: True}, **changes))
    assert not (tmp_path / "new").exists()


def test_a_run_can_be_repeated_from_its_config_json(data_dir, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run_command(data_dir, first, *flags(data_dir, first, max_iters=5)[2:])
    run_command(data_dir, second, "--config", first / "config.json")
    assert_same_end(second, first)
    run_command(data_dir, tmp_path / "third", f"--config={first / 'config.json'}", "--seed", "7")
    changed = [json.loads((folder / "config.json").read_text()) for folder in (second, tmp_path / "third")]
    assert {name for name in changed[0] if changed[0][name] != changed[1][name]} == {"seed", "out_dir"}
    (tmp_path / "nonsense.json").write_text('{"colour": 1}')
    for file in ("nonsense.json", "missing.json"):
        result = run_script("train.py", "--config", tmp_path / file)
        assert_user_error(result, "--config", file, "not the config.json of a run")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("optimizer", "sgd", "--optimizer 'sgd': must be muon or adamw"),
        ("compile", True, "--compile True: must be auto or on or off"),
        ("max_iters", 1e4, "--max-iters 10000.0: must be a whole number"),
        ("batch_size", "all", "--batch-size 'all': must be a whole number or auto"),
        ("learning_rate", "high", "--learning-rate 'high': must be a number"),
        ("sample_prompt", 5, "--sample-prompt 5: must be a text"),
        ("init_from", None, "--init-from None: must be a text"),
        ("init_from", ["x"], "--init-from ['x']: must be a text"),
        ("learning_rate", 10**400, ""),  # more than a float holds
    ],
)
def test_an_edited_config_file_is_checked(tmp_path, name, value, words):
    (tmp_path / "config.json").write_text(json.dumps({**TrainConfig().settings(), name: value}))
    with pytest.raises(UserError, match=f"not the config.json of a run .{re.escape(words)}"):
        read_settings(str(tmp_path / "config.json"))


def test_a_config_file_of_brackets_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"not the config.json of a run"):
        read_settings(str(tmp_path / "config.json"))


def test_an_edited_config_file_may_leave_min_lr_to_the_learning_rate(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TrainConfig().settings(), "min_lr": None}))
    cfg = parse(TrainConfig, "", ["--config", str(tmp_path / "config.json"), "--learning-rate", "5e-3"])
    assert cfg.min_lr is None and cfg.final_lr == 5e-4


def test_a_best_loss_of_other_windows_is_measured_anew(data_dir, tmp_path, monkeypatch, capsys):
    train.train(tiny(data_dir, tmp_path, max_iters=8, eval_tokens=64))
    best = checkpoint.load(tmp_path / "best.pt")
    train.train(tiny(data_dir, tmp_path, max_iters=9, eval_tokens=256, resume=True))
    assert "best.pt was chosen on 64 validation tokens;\nits loss on the 256 used now is " in capsys.readouterr().out
    cfg = tiny(data_dir, tmp_path)
    windows = ValidationWindows(TokenStream.open(data_dir, "val"), 16, 256)
    measured = train.evaluate(4, checkpoint.build_model(best), windows, make_machine(cfg))
    last = checkpoint.load(tmp_path / "last.pt")
    assert last["best_val_loss"] == pytest.approx(min(measured, last["val_loss"]), abs=1e-6)
    assert last["best_val_loss"] != pytest.approx(best["val_loss"], abs=1e-4)


def test_a_best_model_that_is_gone_is_written_anew(data_dir, tmp_path, monkeypatch):
    stop_at(monkeypatch, data_dir, tmp_path, 8)
    last = checkpoint.load(tmp_path / "last.pt")
    checkpoint.save(tmp_path / "last.pt", last | {"best_val_loss": 0.0})  # so low that no later loss is better
    (tmp_path / "best.pt").unlink()
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert checkpoint.load(tmp_path / "best.pt")["iter"] == 20


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "0", "RANK": "x"}, {"LOCAL_RANK": "x"}, {"LOCAL_RANK": ""}],
)
def test_a_leftover_of_torchrun_is_one_message(data_dir, tmp_path, environment):
    result = run_script("train.py", *flags(data_dir, tmp_path / "run"), env={**os.environ, **environment})
    assert_user_error(result, "the environment has", "start several processes with torchrun, or unset")


def test_evaluating_does_not_check_what_only_training_needs(data_dir, tmp_path, straight, capsys):
    cfg = tiny(data_dir, straight, eval_only=True, batch_size=7)  # 128 tokens are not a multiple of 7 windows
    train.train(cfg)
    assert "nats per token" in capsys.readouterr().out
    short = write_data(tmp_path / "short", train_tokens=10)  # too few to train on
    train.train(tiny(short, straight, eval_only=True))


# ----------------------------------------------------------------------------------------------------------------------
# What must not be resumed, or trained over


def test_a_run_is_never_overwritten_unasked(data_dir, tmp_path, straight):
    with pytest.raises(UserError, match="there is no run in"):
        train.train(tiny(data_dir, tmp_path / "none", resume=True))
    assert not (tmp_path / "none").exists()
    train.train(tiny(data_dir, tmp_path, max_iters=1))
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"holds a run \(last.pt\).*--resume.*--overwrite"):
        train.train(tiny(data_dir, tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    (tmp_path / "last.pt").unlink()  # to save room, say
    with pytest.raises(UserError, match=r"holds a model \(best.pt\)"):
        train.train(tiny(data_dir, tmp_path))
    train.train(tiny(data_dir, tmp_path, overwrite=True))
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("fault", ["damaged shard", "nan", "out of memory"])
def test_a_run_is_overwritten_only_when_the_new_one_has_passed_an_evaluation(
    data_dir, tmp_path, monkeypatch, straight, fault
):
    def out_of_memory(*args):
        raise MemoryError

    shutil.copytree(straight, tmp_path / "run")
    data = shutil.copytree(data_dir, tmp_path / "data")
    before = files(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises((UserError, MemoryError)):
        if fault == "damaged shard":
            with open(data / "val_000000.bin", "r+b") as shard:
                shard.seek(1044)
                shard.write(b"\xff\xff")  # not a token
        else:
            patch.setattr(train, "evaluate", out_of_memory if fault == "out of memory" else lambda *args: math.nan)
        train.train(tiny(data, tmp_path / "run", overwrite=True))
    assert files(tmp_path / "run") == before
    train.train(tiny(data_dir, tmp_path / "run", overwrite=True))
    assert_same_end(tmp_path / "run", straight)
    assert metrics(tmp_path / "run") == metrics(straight)


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "."])
def test_overwriting_does_not_delete_the_model_of_init_from(data_dir, tmp_path, straight, name):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"--init-from .*: --overwrite deletes this model; copy it to another folder"):
        train.train(tiny(data_dir, tmp_path, init_from=str(tmp_path / name), overwrite=True))
    assert files(tmp_path) == before
    shutil.copy(tmp_path / "best.pt", tmp_path / "base.pt")  # this one stays
    train.train(tiny(data_dir, tmp_path, init_from=str(tmp_path / "base.pt"), overwrite=True, max_iters=1))


def test_overwriting_does_not_touch_a_model_of_the_hub_or_of_hugging_face(tmp_path, monkeypatch):
    """Its name may also be that of OUT_DIR, while there is no checkpoint."""
    monkeypatch.chdir(tmp_path)
    check_source_stays("openai-community/gpt2", Path("openai-community/gpt2"))
    Path("hf").mkdir()
    Path("hf/model.safetensors").touch()
    check_source_stays("hf", Path("hf"))
    Path("hf/last.pt").touch()
    with pytest.raises(UserError, match="--overwrite deletes this model"):
        check_source_stays("hf", Path("hf"))


def test_the_curves_of_a_run_are_never_deleted_unasked(data_dir, tmp_path, straight):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    for name in ("best.pt", "last.pt"):  # moved away, to save room
        (tmp_path / name).unlink()
    for mode in ({}, {"auto_resume": True}):
        with pytest.raises(UserError, match="holds files of a run whose checkpoints are gone"):
            train.train(tiny(data_dir, tmp_path, **mode))
    assert metrics(tmp_path) == metrics(straight)
    train.train(tiny(data_dir, tmp_path, overwrite=True))
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("samples.jsonl", None),
        ("samples.jsonl", b'{"colour": "blue"}\n'),
        ("metrics.jsonl", b"my notes\n"),
        ("run.html", None),
        ("run.html", b"my page"),
        ("loss.png", b"a picture"),
    ],
)
def test_what_was_kept_of_a_run_stays(data_dir, tmp_path, straight, name, content):
    """Beside the config.json of a run."""
    shutil.copy(straight / "config.json", tmp_path)
    (tmp_path / name).write_bytes(content or (straight / name).read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for mode in ({}, {"auto_resume": True}):
        with pytest.raises(UserError, match=rf"are gone \({name}\); move them, delete them with --overwrite"):
            train.train(tiny(data_dir, tmp_path, **mode))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    train.train(tiny(data_dir, tmp_path, overwrite=True))
    assert_same_end(tmp_path, straight)


def test_a_config_json_of_another_version_or_a_broken_one(data_dir, tmp_path, straight, capsys):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["activation"] = "relu2"  # a field that somebody added, and took back
    (tmp_path / "config.json").write_text(json.dumps(config))
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert "finished (20 iterations)" in capsys.readouterr().out
    (tmp_path / "config.json").write_text("{")
    for mode in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"its config\.json does not hold the settings of a run; delete it"):
            train.train(tiny(data_dir, tmp_path, **mode))
    assert (tmp_path / "config.json").read_text() == "{"
    (tmp_path / "config.json").unlink()
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert_same_end(tmp_path, straight)
    train.train(tiny(data_dir, tmp_path, overwrite=True, max_iters=1))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("best.pt", b"somebody's own model"),
        ("last.pt", b"somebody's own"),
        ("config.json", b'{"colour": "blue"}'),
        ("config.json", b"no JSON"),
        ("metrics.jsonl", b'{"iter": 3}\n'),
        ("loss.png", b"a picture"),
        ("last.pt.tmp", b"somebody's own, too"),
    ],
)
@pytest.mark.parametrize("mode", [{}, {"overwrite": True}, {"auto_resume": True}], ids=["new", "overwrite", "auto"])
def test_files_that_no_run_wrote_stay(data_dir, tmp_path, name, content, mode):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "thesis.tex").write_bytes(b"years of work")
    with pytest.raises(UserError, match=name):
        train.train(tiny(data_dir, tmp_path, **mode))
    assert (tmp_path / name).read_bytes() == content
    (tmp_path / name).unlink()
    train.train(tiny(data_dir, tmp_path, max_iters=1, **mode))
    train.train(tiny(data_dir, tmp_path, max_iters=1, overwrite=True))
    assert (tmp_path / "thesis.tex").read_bytes() == b"years of work"


def test_a_run_killed_before_its_first_checkpoint_starts_anew(data_dir, tmp_path, monkeypatch, straight):
    class Killed(BaseException):
        pass

    def stop(*args):
        raise Killed

    for name in ("evaluate", "save"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train, name, stop)
            train.train(tiny(data_dir, tmp_path))
    assert {"samples.jsonl", "run.html"} <= set(os.listdir(tmp_path))  # of iteration 0: written, but not to be kept
    with monkeypatch.context() as patch, pytest.raises(Killed):  # between best.pt and last.pt of iteration 0
        save = checkpoint.save
        patch.setattr(checkpoint, "save", lambda path, saved: stop() if path.name == "last.pt" else save(path, saved))
        train.train(tiny(data_dir, tmp_path))
    assert (tmp_path / "best.pt").exists() and not (tmp_path / "last.pt").exists()
    train.train(tiny(data_dir, tmp_path))
    assert_same_end(tmp_path, straight)


def test_two_trainings_do_not_share_a_folder(data_dir, tmp_path, monkeypatch):
    def another_begins(*args):
        monkeypatch.setattr(train, "evaluate", evaluate)
        with pytest.raises(UserError, match="another training run is using it"):
            train.train(tiny(data_dir, tmp_path))
        return evaluate(*args)

    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", another_begins)
    train.train(tiny(data_dir, tmp_path, max_iters=1))
    train.train(tiny(data_dir, tmp_path, max_iters=2, resume=True))  # the lock went with the run


def test_a_run_that_ended_meanwhile_is_neither_deleted_nor_set_back(data_dir, tmp_path, monkeypatch, straight):
    """Another command trains in the folder between this one's look at it and its lock."""
    initial_model = train.initial_model

    def another_trained(run: Run) -> GPT:
        shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
        return initial_model(run)

    stop_at(monkeypatch, data_dir, tmp_path, 8)
    monkeypatch.setattr(train, "initial_model", another_trained)
    with pytest.raises(UserError, match="another command has trained there meanwhile; repeat this one"):
        train.train(tiny(data_dir, tmp_path, resume=True))
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="holds a run"):
        train.train(tiny(data_dir, tmp_path))
    assert_same_end(tmp_path, straight)


def test_resuming_refuses_another_model_tokenizer_or_data(data_dir, tmp_path, straight):
    before = (straight / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"has another model \(--n-layer 2, now 3, --dropout 0.1, now 0.2\)"):
        train.train(tiny(data_dir, straight, resume=True, n_layer=3, dropout=0.2))
    other = write_data(tmp_path / "tokenizer", tokenizer="gpt2")
    with pytest.raises(UserError, match="was trained with the tokenizer bytes"):
        train.train(tiny(other, straight, resume=True))
    other = write_data(tmp_path / "text", train_tokens=1_200)
    with pytest.raises(UserError, match="was trained on other data"):
        train.train(tiny(other, straight, resume=True))
    sizes = dict(n_layer=2, n_head=2, n_embd=16, n_inner=32)
    with pytest.raises(UserError, match="did not start from 'my/gpt2'; leave --init-from out"):
        train.train(tiny(data_dir, straight, resume=True, init_from="my/gpt2", **sizes))
    with pytest.raises(UserError, match="--config: only for a new run; change a resumed run with flags"):
        resume_settings(tiny(data_dir, straight, resume=True, config=str(straight / "config.json")))
    assert (straight / "last.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_told_from_a_missing_one(data_dir, tmp_path):
    train.train(tiny(data_dir, tmp_path, max_iters=1))
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    for again in ({"resume": True}, {"auto_resume": True}):
        with pytest.raises(
            UserError, match=r"last.pt: is damaged.*; .* give --init-from .*best.pt and another --out-dir"
        ):
            train.train(tiny(data_dir, tmp_path, **again))
    (tmp_path / "last.pt").write_bytes((tmp_path / "best.pt").read_bytes())
    with pytest.raises(UserError, match=r"last.pt: cannot be resumed from \(missing: best_val_loss"):
        train.train(tiny(data_dir, tmp_path, resume=True))


# ----------------------------------------------------------------------------------------------------------------------
# Faults


def full_disk(path: Path) -> None:
    """From here on, writing to `path` fails as on a full disk."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["last.pt.tmp", "best.pt.tmp"])
def test_a_full_disk_keeps_what_was_saved(data_dir, tmp_path, monkeypatch, straight, name):
    before = []

    def evaluate_then_full(*args):
        if (tmp_path / "last.pt").exists():
            before.append((tmp_path / "last.pt").read_bytes())
            full_disk(tmp_path / name)
        return evaluate(*args)

    evaluate = train.evaluate
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=f"{name.removesuffix('.tmp')}: .*No space left"),
    ):
        patch.setattr(train, "evaluate", evaluate_then_full)
        train.train(tiny(data_dir, tmp_path))
    assert before == [(tmp_path / "last.pt").read_bytes()]
    assert checkpoint.load(tmp_path / "best.pt")["iter"] == (8 if name == "last.pt.tmp" else 0)
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert_same_end(tmp_path, straight)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("until", [9, 14, 99])  # room again before the next save, after it, never
def test_rows_that_cannot_be_written_wait_and_cost_nothing(data_dir, tmp_path, monkeypatch, straight, capsys, until):
    """The disk is full for metrics.jsonl alone, from the evaluation at iteration 8 on."""
    path, open_file = tmp_path / "metrics.jsonl", open

    def full(name, mode="r", *args, **kwargs):
        last = tmp_path / "last.pt"
        is_metrics = str(name).startswith(str(path)) and ("a" in mode or "w" in mode)
        if is_metrics and last.exists() and 8 <= now[0] < until:
            file = open_file("/dev/full", mode, *args, **kwargs)
            return file
        return open_file(name, mode, *args, **kwargs)

    get_lr, now = train.get_lr, [0]
    monkeypatch.setattr(train, "get_lr", lambda it, cfg: (now.__setitem__(0, it + 1), get_lr(it, cfg))[1])
    monkeypatch.setattr("builtins.open", full)
    train.train(tiny(data_dir, tmp_path))
    assert capsys.readouterr().out.count("metrics.jsonl could not be written") == 1  # printed once
    assert_same_checkpoints(tmp_path, straight)
    assert metrics(tmp_path) == (metrics(straight)[:8] if until == 99 else metrics(straight))


@pytest.mark.parametrize(
    "damage",
    [b"\n\n", b"a note of mine\n", b'"no object"\n', b'{"iter": "three"}\n', b'{"loss": "\xff\xc3"}\n', b"[1, 2]\n"],
    ids=["blank lines", "a note", "a text", "an odd iter", "no UTF-8", "a list"],
)
def test_lines_that_are_no_rows_stay_and_never_stop_a_resume(data_dir, tmp_path, monkeypatch, straight, damage):
    stop_at(monkeypatch, data_dir, tmp_path, 7)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], damage, *lines[3:], b'{"iter": 8, "tok']))
    train.train(tiny(data_dir, tmp_path, resume=True))
    content = path.read_bytes()
    assert damage in content and b'"tok\n' not in content
    path.write_bytes(content.replace(damage, b""))
    assert_same_end(tmp_path, straight)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_full_from_the_start(data_dir, tmp_path):
    full_disk(tmp_path / "config.json.tmp")
    with pytest.raises(UserError, match=r"config.json: could not be written \(No space left"):
        train.train(tiny(data_dir, tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out-dir .*/file: is a file; give a folder"):
        train.train(tiny(data_dir, tmp_path / "file"))


def poison(monkeypatch, where: str, call: int) -> None:
    """Make the loss or a gradient NaN in micro-step `call`, counted from 0."""
    forward, calls = GPT.forward, iter(range(10**6))

    def poisoned(self, idx, targets=None, **rest):
        loss = forward(self, idx, targets, **rest)
        if self.training and next(calls) == call:
            if where == "loss":
                return loss * math.nan
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(GPT, "forward", poisoned)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_a_number_stops_before_it_is_saved_and_names_the_batch(data_dir, tmp_path, monkeypatch, straight, where):
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        poison(patch, where, call=2 * 6 + 1)  # the second micro-step of the seventh iteration
        train.train(tiny(data_dir, tmp_path))
    windows = TrainingWindows(TokenStream.open(data_dir, "train"), 16, seed=1337)
    numbers = range(6 * 8 + 4, 6 * 8 + 8) if where == "loss" else range(6 * 8, 6 * 8 + 8)
    text = str(caught.value)
    assert "begin at token " + ", ".join(str(windows.start(n)) for n in numbers) + ". The first reads: " in text
    first = load_tokenizer("bytes").decode(windows.batch([numbers[0]])[0].tolist())
    assert f'The first reads: "{first}"' in text
    rate = f"{train.get_lr(6, tiny(data_dir, tmp_path)):.3g}"
    for words in ("iteration 7 ", f"learning rate {rate}", "gradient norm nan", f"{tmp_path}/last.pt", "--resume"):
        assert words in text
    assert ("the loss of micro-step 2 of 2" if where == "loss" else "the gradient is not finite") in text
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["iter"] == 5 and all(tensor.isfinite().all() for tensor in saved["model"].values())
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"Begin a new run with --init-from .*best\.pt"):
        poison(patch, where, call=0)  # last.pt itself leads there
        train.train(tiny(data_dir, tmp_path, resume=True))
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert_same_end(tmp_path, straight)


def test_a_large_batch_is_named_by_its_first_windows(data_dir, tmp_path):
    cfg = tiny(data_dir, tmp_path, batch_size=10, tokens_per_iter=160)
    run = train.open_run(cfg, make_machine(cfg), None)
    state = TrainState(GPT(cfg.model), None, torch.amp.GradScaler("cpu", enabled=False))
    with pytest.raises(UserError) as caught:
        train.stop_if_not_finite(Outcome([math.nan], 1.0, False), run, state, batch_size=10)
    starts = ", ".join(str(run.train_windows.start(n)) for n in range(8))
    assert f"begin at token {starts} and 2 more. The first reads: " in str(caught.value)


def test_best_is_the_best_across_a_stop(data_dir, tmp_path, monkeypatch):
    losses = {0: 5.0, 4: 3.0, 8: 4.0, 12: 3.5, 16: 2.0, 20: 2.0}
    get_lr, now = train.get_lr, []

    def stop_once(it, cfg):
        now[:] = [it + 1]
        if it == 6 and not cfg.resume:
            os.kill(os.getpid(), signal.SIGTERM)
        return get_lr(it, cfg)

    monkeypatch.setattr(train, "get_lr", stop_once)
    monkeypatch.setattr(train, "evaluate", lambda *args: losses[now[0] if now else 0])
    train.train(tiny(data_dir, tmp_path, eval_interval=4))
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == 7
    train.train(tiny(data_dir, tmp_path, eval_interval=4, max_iters=12, resume=True))
    best, last = checkpoint.load(tmp_path / "best.pt"), checkpoint.load(tmp_path / "last.pt")
    assert (best["iter"], best["val_loss"]) == (4, 3.0)
    assert (last["iter"], last["val_loss"], last["best_val_loss"]) == (12, 3.5, 3.0)
    train.train(tiny(data_dir, tmp_path, eval_interval=4, resume=True))
    assert checkpoint.load(tmp_path / "best.pt")["iter"] == 16


def test_a_validation_loss_that_is_no_number_is_not_saved(data_dir, tmp_path, monkeypatch):
    evaluations = iter([5.0, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(evaluations))
    with pytest.raises(
        UserError, match=r"validation loss at iteration 8 is nan; continue from .*/last.pt with --resume"
    ):
        train.train(tiny(data_dir, tmp_path))
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == 5
    monkeypatch.setattr(train, "evaluate", lambda *args: math.nan)
    for dtype, advice in (("float32", "start again$"), ("bfloat16", "start again, or give --dtype float32$")):
        with pytest.raises(UserError, match=f"at iteration 0 is nan; {advice}"):
            train.train(tiny(data_dir, tmp_path / dtype, dtype=dtype))


@pytest.fixture
def float16(monkeypatch):
    """Train in float16 as GPUs before Ampere do, with a scale so large that the first steps overflow."""
    monkeypatch.setattr(preflight, "cpu_flops", lambda dtype: 1e11)  # measuring a CPU in float16 takes ten seconds
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        "internals.machine.resolve_dtype", lambda name, device, generating=False: (torch.float16, "for a test")
    )
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda device, enabled: scaler(device, init_scale=2.0**22, growth_interval=4, enabled=enabled),
    )


def test_float16_skips_overflows_and_resumes_with_its_scale(data_dir, tmp_path, monkeypatch, float16):
    train.train(tiny(data_dir, tmp_path / "straight"))
    skipped = [row["iter"] for row in metrics(tmp_path / "straight")[1:] if row["grad_norm"] is None]
    assert skipped and skipped[0] == 1
    saved = checkpoint.load(tmp_path / "straight" / "last.pt")
    assert saved["scaler"]["scale"] != 2.0**22 and saved["machine"]["dtype"] == "float16"
    get_lr = train.get_lr
    for it in (0, 5, 11):  # while it overflows, and after
        with monkeypatch.context() as patch:
            patch.setattr(train, "get_lr", lambda i, c, at=it: (i == at and os.kill(os.getpid(), 15), get_lr(i, c))[1])
            train.train(tiny(data_dir, tmp_path / "stopped", auto_resume=True))
    train.train(tiny(data_dir, tmp_path / "stopped", resume=True))
    assert_same_end(tmp_path / "stopped", tmp_path / "straight")


def test_float16_gradients_that_no_scale_saves_stop_the_run(data_dir, tmp_path, monkeypatch, float16):
    forward = GPT.forward

    def poisoned(self, *args, **rest):
        loss = forward(self, *args, **rest)
        if self.training:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(GPT, "forward", poisoned)
    with pytest.raises(UserError, match=r"the gradient is not finite in iteration 23 .*gradient norm nan"):
        train.train(tiny(data_dir, tmp_path, max_iters=30))  # 22 halvings from 2^22 to 1
    initial = checkpoint.load(tmp_path / "best.pt")["model"]
    assert difference(checkpoint.load(tmp_path / "last.pt")["model"], initial) == ""


def little_memory(monkeypatch, sequences: int, training_only: bool = False) -> None:
    """A device with memory for `sequences` in a micro-step. Of the larger ones, every second fails."""
    forward, larger = GPT.forward, itertools.count()

    def limited(self, idx, targets=None, **rest):
        if len(idx) > sequences and (self.training or not training_only) and next(larger) % 2 == 1:
            torch.rand(1)  # a failed attempt has used random numbers
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(self, idx, targets, **rest)

    monkeypatch.setattr(GPT, "forward", limited)


@pytest.mark.parametrize("training_only", [True, False])
def test_out_of_memory_takes_smaller_micro_steps_and_ends_in_the_same_weights(
    data_dir, tmp_path, monkeypatch, capsys, training_only
):
    run = dict(dropout=0.0, optimizer="adamw")  # Muon amplifies rounding errors
    train.train(tiny(data_dir, tmp_path / "enough", **run))
    little_memory(monkeypatch, 1, training_only)
    capsys.readouterr()
    train.train(tiny(data_dir, tmp_path / "little", **run))
    out = capsys.readouterr().out
    assert out.count("Out of memory") == 2 and "micro-steps now have 1 sequence, not 2" in out
    enough, little = (checkpoint.load(tmp_path / name / "last.pt") for name in ("enough", "little"))
    # The biases of keys cancel in the softmax: their gradient is only rounding, which Adam blows up to 1e-5 or so.
    torch.testing.assert_close(little["model"], enough["model"], rtol=1e-4, atol=1e-4)
    for a, b in zip(metrics(tmp_path / "enough")[1:], metrics(tmp_path / "little")[1:], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5) and a["tokens"] == b["tokens"]


def test_out_of_memory_in_a_resumed_run_changes_nothing(data_dir, tmp_path, monkeypatch):
    little_memory(monkeypatch, 2)
    train.train(tiny(data_dir, tmp_path / "straight"))
    get_lr = train.get_lr
    with monkeypatch.context() as patch:
        patch.setattr(train, "get_lr", lambda i, c: (i == 9 and os.kill(os.getpid(), 15), get_lr(i, c))[1])
        train.train(tiny(data_dir, tmp_path / "stopped"))
    train.train(tiny(data_dir, tmp_path / "stopped", resume=True))
    assert_same_end(tmp_path / "stopped", tmp_path / "straight")


def test_out_of_memory_at_one_sequence_gives_up_with_advice(data_dir, tmp_path, monkeypatch):
    little_memory(monkeypatch, 0)
    with pytest.raises(UserError, match="at --batch-size 1; take a smaller --block-size"):
        train.train(tiny(data_dir, tmp_path))


def test_a_compiler_that_fails_costs_no_more_than_a_line(data_dir, tmp_path, monkeypatch, straight, capsys):
    def broken(*args, **kwargs):
        torch.rand(1)
        raise RuntimeError("no compiler\nof many lines")

    monkeypatch.setattr(torch, "compile", lambda model, **options: broken)
    train.train(tiny(data_dir, tmp_path, compile="on"))
    assert "compile    off, because compiling failed (RuntimeError: no compiler)\n" in capsys.readouterr().out
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("prompt", ["", "The history of\x1b"])
def test_samples_of_text_change_nothing(data_dir, tmp_path, monkeypatch, straight, capsys, prompt):
    train.train(tiny(data_dir, tmp_path / "with", sample_prompt=prompt))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    unwrapped = out.replace("\n    ", " ")  # a long word goes to the next line, and "of" with it
    assert unwrapped.count(" " + prompt.replace("\x1b", "\ufffd")) >= 4
    assert_same_end(tmp_path / "with", straight)

    def unavailable(name):
        raise UserError("the gpt2 tokenizer's vocabulary could not be fetched")

    monkeypatch.setattr(samples, "load_tokenizer", unavailable)
    train.train(tiny(data_dir, tmp_path / "without", sample_prompt=prompt))
    assert "No sample text: the gpt2 tokenizer's" in capsys.readouterr().out
    assert_same_end(tmp_path / "without", straight)


def test_a_compiled_model_is_the_same_run_and_saves_under_plain_names(
    data_dir, tmp_path, monkeypatch, straight, capsys
):
    compile = torch.compile  # only its front half runs: no compiler of machine code is needed
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compile(model, dynamic=dynamic, backend="eager"))
    train.train(tiny(data_dir, tmp_path, compile="on"))
    assert "compile    on\n" in capsys.readouterr().out
    assert_same_end(tmp_path, straight)
    assert all(name.startswith("transformer.") for name in checkpoint.load(tmp_path / "last.pt")["model"])


# ----------------------------------------------------------------------------------------------------------------------
# --check and --eval-only


def test_check_and_eval_only_write_nothing(data_dir, tmp_path, monkeypatch, straight, capsys):
    files = {path: path.read_bytes() for path in straight.iterdir()}
    train.train(tiny(data_dir, straight, check=True))
    out = capsys.readouterr().out
    for words in ("device", "float32", "compile    off", "parameters", "2 micro-steps", "epochs", "memory     peak",
                  "tokens/s", "for 20 iterations", "for checkpoints", "All of this fits.\n", "\nTrain: python "):  # fmt: skip
        assert words in out
    assert f"But --out-dir {straight} holds a run (last.pt); continue it with --resume" in " ".join(out.split())
    train.train(tiny(data_dir, straight, eval_only=True))
    best = min((row for row in metrics(straight) if "val_loss" in row), key=lambda row: row["val_loss"])
    out = " ".join(capsys.readouterr().out.split())  # long paths wrap its lines
    assert out.startswith("model ") and f"best.pt, iteration {best['iter']} data " in out
    assert "256 tokens of the validation split" in out and "float32 loss " in out
    assert out.endswith(f" {best['val_loss']:.4f} nats per token, {best['bits_per_byte']:.4f} bits per byte")
    longer = tiny(data_dir, straight, eval_only=True, block_size=8, eval_tokens=16)  # the checkpoint's context is 16
    train.train(longer)
    assert "16 tokens of the validation split" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="--eval-tokens 8: must hold at least one window of --block-size 16"):
        train.train(dataclasses.replace(longer, eval_tokens=8))
    assert {path: path.read_bytes() for path in straight.iterdir()} == files

    train.train(tiny(data_dir, tmp_path / "new", check=True))
    assert not (tmp_path / "new").exists()
    (tmp_path / "loss.png").write_bytes(b"somebody's own")
    train.train(tiny(data_dir, tmp_path, check=True))
    assert "holds loss.png, not written by train.py" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r"best.pt: there is no checkpoint"):
        train.train(tiny(data_dir, tmp_path / "new", eval_only=True))


def test_evaluating_a_model_that_is_no_use_says_so(data_dir, tmp_path, straight):
    best = checkpoint.load(straight / "best.pt")
    best["model"]["transformer.ln_f.weight"] *= math.nan
    tmp_path.mkdir(exist_ok=True)
    checkpoint.save(tmp_path / "best.pt", best)
    with pytest.raises(UserError, match=r"the validation loss of .*best.pt, iteration .* is nan; check its weights"):
        train.train(tiny(data_dir, tmp_path, eval_only=True))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_check_knows_the_size_of_the_checkpoints(data_dir, tmp_path, monkeypatch, optimizer):
    def size(value) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return sum(map(size, values))

    seen = []
    monkeypatch.setattr(preflight, "describe", lambda *args: seen.append(args[-1]) or "")
    train.train(tiny(data_dir, tmp_path, optimizer=optimizer, check=True))
    train.train(tiny(data_dir, tmp_path, optimizer=optimizer, max_iters=1))
    best, last = (checkpoint.load(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert seen == [size(best["model"]) + 2 * (size(last["model"]) + size(last["optimizer"]["state"]))]


def test_check_fails_where_the_run_would(data_dir, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        little_memory(patch, 2)
        train.train(tiny(data_dir, tmp_path, check=True))
        out = capsys.readouterr().out
        out = " ".join(out.split())
        assert "--batch-size 4 does not fit; training will use 2" in out
        assert os.name == "nt" or "including the attempts that did not fit" in out
        little_memory(patch, 0)
        with pytest.raises(UserError, match="out of memory"):
            train.train(tiny(data_dir, tmp_path, check=True))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"--out-dir .*: checkpoints need .* but only 1000 B"):
            train.train(tiny(data_dir, tmp_path, check=True))
    damaged = write_data(tmp_path / "damaged")
    shard = damaged / "train_000001.bin"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # the size stays right
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train_000001.bin: is damaged"):
        train.train(tiny(damaged, tmp_path, check=True))


def test_check_refuses_a_run_that_needs_more_than_the_cards_memory(data_dir, tmp_path, monkeypatch):
    """As on Windows, whose driver lends the computer's own memory, so that nothing fails."""
    monkeypatch.setattr(preflight, "peak_memory", lambda machine: Memory(30 * 2**30, 24 * 2**30))
    with pytest.raises(UserError, match=r"--batch-size 4: needs 30.0 GiB of memory, but there are only 24.0 GiB"):
        train.train(tiny(data_dir, tmp_path, check=True))


def test_check_counts_the_checkpoints_that_the_run_replaces(data_dir, tmp_path, monkeypatch, capsys):
    needed = []
    monkeypatch.setattr(preflight, "describe", lambda *args: needed.append(args[-1]) or "")
    train.train(tiny(data_dir, tmp_path, max_iters=1))
    held = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    train.train(tiny(data_dir, tmp_path, check=True))
    for lacking in (0, 1):  # bytes
        usage = SimpleNamespace(free=needed[0] - held - lacking)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if lacking:
            with pytest.raises(UserError, match=r"--out-dir .*: checkpoints need"):
                train.train(tiny(data_dir, tmp_path, check=True))
        else:
            train.train(tiny(data_dir, tmp_path, check=True))


# ----------------------------------------------------------------------------------------------------------------------
# True numbers


def test_learning_rate_warms_up_and_follows_the_cosine():
    cfg = TrainConfig(max_iters=1_000, warmup_iters=100, learning_rate=1.0, min_lr=0.1)
    assert train.get_lr(0, cfg) == pytest.approx(1 / 101)
    assert train.get_lr(100, cfg) == 1.0 == max(train.get_lr(it, cfg) for it in range(1_000))
    assert train.get_lr(550, cfg) == pytest.approx((1.0 + 0.1) / 2)
    assert train.get_lr(1_000, cfg) == pytest.approx(0.1)
    short = dataclasses.replace(cfg, max_iters=200)  # warm-up takes at most a tenth
    assert train.get_lr(20, short) == 1.0 and train.get_lr(19, short) == pytest.approx(20 / 21)


def test_rows_are_written_every_log_interval(data_dir, tmp_path, monkeypatch):
    """And after the first iteration, and at each evaluation. Iteration n takes n seconds here."""
    clock = itertools.chain.from_iterable((0.0, float(n)) for n in itertools.count(1))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=clock.__next__))
    train.train(tiny(data_dir, tmp_path, log_interval=4, max_iters=9))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    speed = {row["iter"]: row["tokens_per_second"] for row in rows}  # since the row before
    assert speed == {0: None, 1: 128, 4: round(3 * 128 / 9), 8: round(4 * 128 / 26), 9: round(128 / 9)}


def test_a_gradient_is_not_clipped_at_0(data_dir, tmp_path):
    """`--grad-clip 0` is no limit, as is one that no gradient reaches."""
    for name, limit in (("off", 0.0), ("far", 1e9), ("near", 0.01)):
        train.train(tiny(data_dir, tmp_path / name, optimizer="adamw", max_iters=4, grad_clip=limit))
    ends = {name: checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("off", "far", "near")}
    assert difference(ends["off"], ends["far"]) == "" != difference(ends["off"], ends["near"])


def test_micro_steps_make_the_gradient_of_one_large_step(data_dir, tmp_path):
    cfg = tiny(data_dir, tmp_path, dropout=0.0)
    windows = TrainingWindows(TokenStream.open(data_dir, "train"), 16, seed=1)
    run = Run(cfg, {}, make_machine(cfg), windows, None)
    model = GPT(cfg.model)
    state = TrainState(model, None, torch.amp.GradScaler("cpu", enabled=False), tokens=3 * 128)
    gradients, means = [], []
    for batch_size in (8, 2):
        assert [n for ids in run.window_ids(state.tokens, batch_size) for n in ids] == list(range(24, 32))
        means.append(train.forward_backward(batch_size, model, run, state).mean())
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    inputs = torch.from_numpy(windows.batch(range(24, 32)))
    expected = model(inputs[:, :-1], inputs[:, 1:])  # a plain step
    expected.backward()
    for got in gradients:
        torch.testing.assert_close(got, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.stack(means), expected.detach().expand(2), rtol=0, atol=1e-6)


def test_metrics_equal_a_plain_loop(data_dir, tmp_path):
    """A whole short run, against a separate loop that shares only the model and the windows."""
    cfg = tiny(data_dir, tmp_path, dropout=0.0, optimizer="adamw", max_iters=10, grad_clip=0.5, eval_tokens=10**6)
    train.train(cfg)
    torch.manual_seed(cfg.seed)
    model = GPT(cfg.model)
    decayed = [p for name, p in model.named_parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}], betas=(0.9, 0.95)
    )
    windows = TrainingWindows(TokenStream.open(data_dir, "train"), 16, cfg.seed)
    rows = metrics(tmp_path)[1:]
    for it in range(10):
        rate = 1e-3 + 9e-3 * (1 + math.cos(math.pi * (it - 1) / 9)) / 2 if it else 1e-2 / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.from_numpy(windows.batch(range(8 * it, 8 * it + 8)))
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1, 0.5 / norm.item())
        optimizer.step()
        optimizer.zero_grad()
        assert rows[it]["train_loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert rows[it]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert rows[it]["learning_rate"] == pytest.approx(rate)
        assert (rows[it]["iter"], rows[it]["tokens"]) == (it + 1, 128 * (it + 1))
    val = torch.from_numpy(TokenStream.open(data_dir, "val").read(0, 500).astype("int64"))
    with torch.no_grad():
        losses = [model(val[i : i + 16][None], val[i + 1 : i + 17][None]).item() for i in range(0, 496, 16)]
    mean = sum(losses) / len(losses)
    assert rows[-1]["val_loss"] == pytest.approx(mean, abs=1e-5)
    assert rows[-1]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert rows[-1]["bits_per_byte"] == pytest.approx(mean / math.log(2), abs=1e-4)  # a token is a byte here


def test_validation_does_not_depend_on_the_batch_size(data_dir, tmp_path):
    cfg = tiny(data_dir, tmp_path)
    machine, model = make_machine(cfg), GPT(cfg.model)
    windows = ValidationWindows(TokenStream.open(data_dir, "val"), 16, eval_tokens=400)
    losses = [train.evaluate(n, model, windows, machine) for n in (1, 4, 7, 25, 100)]
    assert losses == pytest.approx([losses[0]] * 5, abs=1e-6)
    assert model.training


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_mistakes_end_in_a_short_message(data_dir, tmp_path):
    given = ["train.py", "--data-dir", data_dir, "--out-dir", tmp_path / "run", "--block-size", 16]
    assert_user_error(run_script("train.py", "--data-dir", tmp_path / "no"), "--data-dir", "prepare_data.py")
    assert_user_error(run_script(*given, "--tokens-per-iter", 1000, "--batch-size", 4), "multiple of 16")
    assert_user_error(run_script(*given, "--resume", "--overwrite"), "--resume and --overwrite: give one of them")
    assert not (tmp_path / "run").exists()


def test_every_field_is_read():
    """Every option is read somewhere."""
    files = [*REPO.glob("*.py"), *(REPO / "internals").glob("*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for field in dataclasses.fields(TrainConfig):
        assert re.search(rf"\b(cfg|self)\.{field.name}\b", code), field.name


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("a bug")])
def test_memory_that_runs_out_outside_the_loop_is_one_line(data_dir, tmp_path, monkeypatch, capsys, error):
    def fail(cfg):
        raise error

    monkeypatch.setattr(train, "train", fail)
    bug = str(error) == "a bug"
    words = "^a bug$" if bug else r"^out of memory; take a smaller --batch-size, --block-size or model$"
    with pytest.raises(RuntimeError if bug else UserError, match=words):
        train.main(tiny(data_dir, tmp_path))


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


@pytest.mark.skipif(os.name != "posix", reason="uses a POSIX shell")
@pytest.mark.parametrize(
    "redirection",
    [
        "| head -n 1",
        "> /dev/full",
        "2> /dev/full",
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
        "2>&1 | true",
        "> /dev/full 2> /dev/full",
    ],
)
def test_a_run_outlives_its_listeners(data_dir, tmp_path, straight, redirection):
    command = shlex.join([sys.executable, "train.py", *flags(data_dir, tmp_path / "run")])
    shell = f"{{ {command}; echo $? > {shlex.quote(str(tmp_path / 'status'))}; }} {redirection}"
    result = subprocess.run(["sh", "-c", shell], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (tmp_path / "status").read_text() == "0\n", result.stderr
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr
    assert_same_end(tmp_path / "run", straight)
    if redirection == "> /dev/full":
        assert result.stderr.count("stdout cannot be written") == 1


def wait_until(done, terminal: int | None = None) -> None:
    """Wait until `done()`. Meanwhile a process writes to the terminal, and would stop when nobody reads."""
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        if terminal is not None and select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)
        elif terminal is None:
            time.sleep(0.05)


@pytest.mark.skipif(os.name != "posix", reason="uses a pseudo-terminal")
@pytest.mark.parametrize("ignored", [False, True], ids=["hangup", "nohup"])
def test_a_run_outlives_its_terminal(data_dir, tmp_path, ignored):
    """When the terminal closes, the hangup saves and ends the run. With nohup it continues, and SIGTERM still saves."""
    import pty

    slow = (
        "import time, train; real = train.get_lr; train.get_lr = lambda it, cfg: (time.sleep(0.05), real(it, cfg))[1]"
    )
    code = (
        f"import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN if {ignored} else signal.SIG_DFL)\n{slow}\n"
        "from config import TrainConfig\nfrom internals import cli, start\nstart.begin()\n"
        "start.run(lambda: train.main(cli.parse(TrainConfig, '')))"
    )
    out_dir = tmp_path / "run"
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(REPO)
        os.execv(
            sys.executable, [sys.executable, "-c", code, *flags(data_dir, out_dir, max_iters=4_000, eval_interval=5)]
        )
    try:
        wait_until((out_dir / "last.pt").exists, terminal)
        os.close(terminal)
        if ignored:
            saved = (out_dir / "last.pt").stat().st_mtime_ns
            wait_until(lambda: (out_dir / "last.pt").stat().st_mtime_ns != saved)  # it continues without its terminal
            os.kill(process, signal.SIGTERM)
        ended = []
        wait_until(lambda: ended.append(os.waitpid(process, os.WNOHANG)) or ended[-1][0] == process)
    except BaseException:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise
    assert os.waitstatus_to_exitcode(ended[-1][1]) == 0
    last = checkpoint.load(out_dir / "last.pt")
    assert 0 < last["iter"] < 4_000
    rows = metrics(out_dir)
    assert rows[-1]["iter"] == last["iter"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_backend_of_a_notebook_is_no_obstacle_to_the_curves(tmp_path, backend):
    code = (
        "import sys; from pathlib import Path; from internals.report import plot\n"
        "plot([{'iter': 0, 'tokens': 0, 'train_loss': None, 'val_loss': 5.0}], Path(sys.argv[1]), None)"
    )
    result = run_script("-c", code, tmp_path / "loss.png", env={**os.environ, "MPLBACKEND": backend})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_curves_that_cannot_be_drawn_cost_one_line(data_dir, tmp_path, monkeypatch, straight, capsys):
    def broken(*args):
        raise ValueError("Key backend: 'nonsense' is not a valid value\nand a page of others")

    monkeypatch.setattr(report, "plot", broken)
    train.train(tiny(data_dir, tmp_path))
    out = capsys.readouterr().out
    assert out.count("loss.png could not be written (Key backend: 'nonsense' is not a valid value)") == 1
    assert "Curves: " not in out and f"Page: {tmp_path / 'run.html'}" in out
    assert_same_end(tmp_path, straight)


def test_sample_text_that_fails_costs_one_line(data_dir, tmp_path, monkeypatch, straight, capsys):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "generate_text", fail)
    train.train(tiny(data_dir, tmp_path))
    assert "no sample text: CUDA out of memory." in capsys.readouterr().out
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_costs_a_warning(data_dir, tmp_path, monkeypatch, straight, capsys, number):
    def refuse(descriptor, blocking):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("internals.files.lock_descriptor", refuse)
    train.train(tiny(data_dir, tmp_path))
    assert capsys.readouterr().err.count("cannot be locked") == 1
    assert_same_end(tmp_path, straight)


def test_a_lock_file_that_cannot_be_opened_costs_a_warning(data_dir, tmp_path, straight, capsys):
    (tmp_path / ".lock").mkdir()
    train.train(tiny(data_dir, tmp_path))
    assert capsys.readouterr().err.count("cannot be locked") == 1
    assert_same_end(tmp_path, straight)


def test_metrics_that_cannot_be_read_are_moved_aside(data_dir, tmp_path, monkeypatch, straight, capsys):
    stop_at(monkeypatch, data_dir, tmp_path, 7)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert "metrics.jsonl cannot be read" in capsys.readouterr().out
    assert [row["iter"] for row in metrics(tmp_path)] == list(range(9, 21))
    assert len(list(tmp_path.glob("metrics.jsonl.unreadable-*"))) == 1
