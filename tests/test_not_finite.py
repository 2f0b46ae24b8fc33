"""Losses and gradients that are not finite: the run stops before they are saved; float16 skips what overflows."""

import math

import pytest
import torch
from runs import assert_same_end, difference, metrics, stop_at, tiny

import train
from internals import checkpoint, preflight
from internals.machine import Outcome, make_machine
from internals.run import TrainState
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.windows import TokenStream, TrainingWindows
from model import GPT

pytestmark = pytest.mark.usefixtures("quick")


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
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"Start a new run with --init-from .*best\.pt"):
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


def test_a_validation_loss_that_is_no_number_is_not_saved(data_dir, tmp_path, monkeypatch):
    evaluations = iter([5.0, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(evaluations))
    with pytest.raises(
        UserError, match=r"validation loss at iteration 8 is nan; continue from .*/last.pt with --resume"
    ):
        train.train(tiny(data_dir, tmp_path))
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == 5
    monkeypatch.setattr(train, "evaluate", lambda *args: math.nan)
    for dtype, advice in (
        ("float32", "if you changed it$"),
        ("bfloat16", "if you changed it, or give --dtype float32$"),
    ):
        with pytest.raises(UserError, match=f"at iteration 0 is nan; look for a mistake in model.py {advice}"):
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
    for it in (0, 5, 11):  # while it overflows, and after
        stop_at(monkeypatch, data_dir, tmp_path / "stopped", it, auto_resume=True)
    train.train(tiny(data_dir, tmp_path / "stopped", resume=True))
    assert_same_end(tmp_path / "stopped", tmp_path / "straight")


def test_float16_gradients_are_clipped_at_their_true_size(data_dir, tmp_path, float16):
    """Not at the size that the scaler gives them, 100,000 times as large."""
    train.train(tiny(data_dir, tmp_path))
    norms = [row["grad_norm"] for row in metrics(tmp_path)[1:] if row["grad_norm"] is not None]
    assert norms and max(norms) < 100


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
