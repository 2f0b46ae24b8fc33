"""The training loop: every figure is true, evaluating changes nothing, and mistakes end in a message."""

import dataclasses
import itertools
import json
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, assert_user_error, run_script, write_data
from runs import difference, flags, metrics, tiny

import train
from config import TrainConfig
from internals import checkpoint
from internals.machine import make_machine
from internals.processes import place_among_processes
from internals.run import Run, TrainState
from internals.start import UserError
from internals.windows import TokenStream, TrainingWindows, ValidationWindows
from model import GPT

pytestmark = pytest.mark.usefixtures("quick")


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


def test_the_seconds_of_a_run_are_those_of_all_its_iterations(data_dir, tmp_path, monkeypatch):
    """Before and after a stop. Each iteration takes two seconds here."""
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=itertools.count(0.0, 2.0).__next__))
    train.train(tiny(data_dir, tmp_path, max_iters=2))
    train.train(tiny(data_dir, tmp_path, max_iters=4, resume=True))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["seconds"] for row in rows] == [0, 2, 4, 6, 8]
    assert checkpoint.load(tmp_path / "last.pt")["seconds"] == 8


def test_muon_lr_scale_reaches_the_matrices(data_dir, tmp_path, monkeypatch):
    """The loop sets each group's learning rate to its own multiple of the schedule's."""
    made, make_optimizer = [], train.make_optimizer
    monkeypatch.setattr(train, "make_optimizer", lambda *args: (made.append(make_optimizer(*args)), made[-1])[1])
    cfg = tiny(data_dir, tmp_path, max_iters=3, muon_lr_scale=4.0)
    train.train(cfg)
    rates = [group["lr"] / train.get_lr(2, cfg) for group in made[0].param_groups]
    assert rates == pytest.approx([1, 1, 4])


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


@pytest.mark.parametrize(("dtype", "expected"), [("float32", None), ("bfloat16", torch.bfloat16)])
def test_training_and_evaluation_compute_in_the_dtype_of_the_run(data_dir, tmp_path, monkeypatch, dtype, expected):
    seen, forward = set(), GPT.forward

    def watched(self, idx, targets=None, cache=None):
        if targets is not None:
            seen.add((self.training, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None))
        return forward(self, idx, targets, cache)

    monkeypatch.setattr(GPT, "forward", watched)
    train.train(tiny(data_dir, tmp_path, dtype=dtype, max_iters=1))
    assert seen == {(True, expected), (False, expected)}


def test_metrics_equal_a_plain_loop(data_dir, tmp_path):
    """A whole short run, against a separate loop that shares only the model and the windows."""
    settings = {
        "dropout": 0.0,
        "optimizer": "adamw",
        "max_iters": 10,
        "grad_clip": 0.5,
        "eval_tokens": 10**6,
        "seed": 5,
    }
    cfg = tiny(data_dir, tmp_path, **settings)
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


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_validation_does_not_depend_on_the_batch_size(data_dir, tmp_path):
    cfg = tiny(data_dir, tmp_path)
    machine, model = make_machine(cfg), GPT(cfg.model)
    windows = ValidationWindows(TokenStream.open(data_dir, "val"), 16, eval_tokens=400)
    losses = [train.evaluate(n, model, windows, machine) for n in (1, 4, 7, 25, 100)]
    assert losses == pytest.approx([losses[0]] * 5, abs=1e-6)
    assert model.training


def test_an_evaluation_computes_no_gradients(data_dir, tmp_path, monkeypatch):
    """They would take its time and memory several times over."""
    cfg, enabled, forward = tiny(data_dir, tmp_path), [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args: (enabled.append(torch.is_grad_enabled()), forward(*args))[1])
    train.evaluate(4, GPT(cfg.model), ValidationWindows(TokenStream.open(data_dir, "val"), 16, 64), make_machine(cfg))
    assert enabled == [False]


def test_evaluating_does_not_check_what_only_training_needs(data_dir, tmp_path, straight, capsys):
    cfg = tiny(data_dir, straight, eval_only=True, batch_size=7)  # 128 tokens are not a multiple of 7 windows
    train.train(cfg)
    assert "nats per token" in capsys.readouterr().out
    short = write_data(tmp_path / "short", train_tokens=10)  # too few to train on
    train.train(tiny(short, straight, eval_only=True))


def test_evaluating_a_model_that_is_no_use_says_so(data_dir, tmp_path, straight):
    best = checkpoint.load(straight / "best.pt")
    best["model"]["transformer.ln_f.weight"] *= math.nan
    tmp_path.mkdir(exist_ok=True)
    checkpoint.save(tmp_path / "best.pt", best)
    with pytest.raises(UserError, match=r"the validation loss of .*best.pt, iteration .* is nan; check its weights"):
        train.train(tiny(data_dir, tmp_path, eval_only=True))


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_mistakes_end_in_a_short_message(data_dir, tmp_path):
    given = ["train.py", "--data-dir", data_dir, "--out-dir", tmp_path / "run", "--block-size", 16]
    assert_user_error(run_script("train.py", "--data-dir", tmp_path / "no"), "--data-dir", "prepare_data.py")
    assert_user_error(run_script(*given, "--tokens-per-iter", 1000, "--batch-size", 4), "multiple of 16")
    assert_user_error(run_script(*given, "--resume", "--overwrite"), "--resume and --overwrite: give one of them")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "0", "RANK": "x"}, {"LOCAL_RANK": "x"}, {"LOCAL_RANK": ""}],
)
def test_a_leftover_of_torchrun_is_one_message(data_dir, tmp_path, environment):
    result = run_script("train.py", *flags(data_dir, tmp_path / "run"), env={**os.environ, **environment})
    assert_user_error(result, "the environment has", "start several processes with torchrun, or unset")


WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29998"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"MASTER_PORT": "abc"}, "but MASTER_PORT is not a number; start"),
        ({"MASTER_PORT": "99999"}, "but MASTER_PORT is above 65535; start"),
        ({"MASTER_PORT": "", "MASTER_ADDR": ""}, "but no MASTER_PORT and no MASTER_ADDR; start"),
        ({"WORLD_SIZE": "0"}, "but RANK is not below WORLD_SIZE; start"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "but RANK is not below WORLD_SIZE; start"),
    ],
)
def test_places_that_cannot_be_are_a_message(monkeypatch, changed, words):
    for name, value in (WHOLE | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        place_among_processes()
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert place_among_processes() == (0, 2)


def test_every_field_is_read():
    """Every option is read somewhere."""
    files = [*REPO.glob("*.py"), *(REPO / "internals").glob("*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for field in dataclasses.fields(TrainConfig):
        assert re.search(rf"\b(cfg|self)\.{field.name}\b", code), field.name


def test_the_text_of_each_evaluation_has_a_seed_of_its_own(data_dir, tmp_path, monkeypatch):
    seeds = []

    def spy(*args, generator, **options):
        seeds.append(generator.initial_seed())
        return [""]

    monkeypatch.setattr(train, "generate_text", spy)
    train.train(tiny(data_dir, tmp_path, max_iters=8, seed=5))
    assert seeds == [5, 13]
