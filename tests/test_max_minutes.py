"""`--max-minutes`: a run chooses its number of iterations once, and is then like any other.

Nothing here depends on the speed of the machine: where a number is expected, the speed is made up.
"""

import dataclasses
import json
import os
import signal
import time

import pytest
import torch
from conftest import assert_user_error, run_script
from runs import assert_same_end, flags, metrics, run_command, stop_at, tiny
from two_processes import flags as two_flags
from two_processes import run_both, with_fault

import train
from config import PRESETS, TrainConfig
from internals import checkpoint, max_minutes, report, start
from internals.preflight import Loop, Timing
from internals.resume import resume_settings
from internals.run_length import resolve_auto
from internals.settings import differences
from internals.start import UserError

TIMING = Timing(iteration=0.5, evaluation=3.0, building=1.0, telling=2.0, saving=1.0, row=0.25)


@pytest.fixture(autouse=True)
def begun(quick, monkeypatch):
    """A command that began 5 seconds ago."""
    monkeypatch.setattr(start, "seconds_passed", lambda: 5.0)


@pytest.fixture
def speed(monkeypatch):
    """A function that sets the timing that `--max-minutes` gets; it still measures, but briefly."""
    monkeypatch.setattr(max_minutes, "MEASURING", 1e-5)

    def make_up(timing: Timing) -> None:
        try_out = max_minutes.try_out
        monkeypatch.setattr(max_minutes, "try_out", lambda *args: (try_out(*args), timing)[1])

    return make_up


def max_iters(out_dir) -> int:
    return checkpoint.load(out_dir / "last.pt")["config"]["max_iters"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_run_is_the_one_with_that_many_iterations(data_dir, tmp_path, speed, capsys, optimizer):
    """With dropout, sample text and evaluations: weights, moments, random numbers and rows agree bit for bit."""
    speed(Timing(iteration=2.0, evaluation=1.0))
    train.train(tiny(data_dir, tmp_path / "minutes", optimizer=optimizer, max_minutes=1.0))
    count = max_iters(tmp_path / "minutes")
    assert count == 24  # in 0.95 x 60 - 5 = 52 s, with 4 evaluations
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert "--max-minutes 1: an iteration takes 2 s, an evaluation with its text, page" in words
    assert words.count(f"time for {count:,} iterations") == 1
    assert out.count(" 0/24  val ") == 1  # the trial is not printed
    train.train(tiny(data_dir, tmp_path / "iters", optimizer=optimizer, max_iters=count))
    assert_same_end(tmp_path / "minutes", tmp_path / "iters")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("minutes", "iters")]
    assert differences(*configs, configs[0]).keys() == {"out_dir"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iters", "minutes"]


def test_without_made_up_speed_a_run_comes_to_its_end(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(max_minutes, "MEASURING", 0.0001)
    train.train(tiny(data_dir, tmp_path, max_minutes=10.0, max_epochs=2.0, eval_interval="auto"))
    saved = checkpoint.load(tmp_path / "last.pt")
    assert (saved["iter"], saved["config"]["max_iters"], saved["config"]["eval_interval"]) == (15, 15, 1)


def test_the_seconds_of_a_run_are_those_of_its_parts():
    """Checked by a loop that adds up the work of train.py at each iteration."""
    cfg = TrainConfig(max_iters=47, eval_interval=10, checkpoint_interval=4, log_interval=3)
    seconds = TIMING.building + TIMING.evaluation + TIMING.telling  # of iteration 0
    for iter in range(1, 48):
        seconds += TIMING.iteration
        if iter % 10 == 0 or iter == 47:
            seconds += TIMING.evaluation + TIMING.telling
        else:
            seconds += (iter % 4 == 0) * TIMING.saving + (iter % 3 == 0) * TIMING.row
    assert TIMING.of_run(cfg) == pytest.approx(seconds)


@pytest.mark.parametrize("interval", ["auto", 1, 7, 500])
@pytest.mark.parametrize("seconds", [20.0, 59.0, 600.0, 86_400.0])
def test_as_many_iterations_as_fit(interval, seconds):
    cfg = TrainConfig(eval_interval=interval)
    count = max_minutes.iterations_within(seconds, cfg, 10**9, TIMING)

    def needed(iterations: int) -> float:
        return TIMING.of_run(resolve_auto(dataclasses.replace(cfg, max_iters=iterations), 10**9).cfg)

    assert needed(count) <= seconds
    assert all(needed(more) > seconds for more in range(count + 1, 2 * count + 20, max(1, count // 500)))
    assert max_minutes.iterations_within(1.0, cfg, 10**9, TIMING) == 0
    assert max_minutes.iterations_within(-1.0, cfg, 10**9, TIMING) == 0


def test_a_very_long_time_is_no_long_search():
    cfg, timing = TrainConfig(eval_interval="auto", max_epochs=2.0), Timing(iteration=1e-3, evaluation=1e-3)
    assert max_minutes.iterations_within(1e15, cfg, 65_536 * 50, timing) == 100
    unlimited = dataclasses.replace(cfg, max_epochs=None)
    assert max_minutes.iterations_within(1e5, unlimited, 10**9, timing) == pytest.approx(1e8, rel=0.001)
    for seconds in (6e21, float("inf")):
        count = max_minutes.iterations_within(seconds, unlimited, 10**9, timing)
        assert TrainConfig(max_iters=count).max_iters >= 2**61


def test_rarer_evaluations_leave_time_for_more_iterations():
    """140 iterations with an evaluation every 10 take 290 s, and 150 with one every 20 take only 240."""
    timing = Timing(iteration=1.0, evaluation=10.0)
    assert max_minutes.iterations_within(297.0, TrainConfig(eval_interval="auto"), 10**9, timing) == 187


def test_a_signal_leaves_nothing_of_the_measuring(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(max_minutes, "mean_seconds", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny(data_dir, tmp_path / "run", max_minutes=1.0))
    assert not list(tmp_path.iterdir())


def test_the_iterations_follow_from_the_clock(data_dir, tmp_path, speed, monkeypatch, capsys):
    """3 minutes, of which 30 seconds have passed: 0.95 x 180 - 30 = 141, less 1 for building, and 3 evaluations of 5."""
    speed(Timing(iteration=1.0, evaluation=3.0, building=1.0, telling=2.0))
    monkeypatch.setattr(start, "seconds_passed", lambda: 30.0)
    train.train(tiny(data_dir, tmp_path / "run", max_minutes=3.0, eval_interval=100, check=True))
    out = capsys.readouterr().out
    assert (
        "and 30 s have passed; this leaves time for 125 iterations" in " ".join(out.split())
        and "run        125 iterations" in out
    )
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".*"))


def test_a_stopped_run_resumes_and_forgets_the_minutes(data_dir, tmp_path, monkeypatch, speed):
    speed(Timing(iteration=2.0, evaluation=1.0))
    train.train(tiny(data_dir, tmp_path / "straight", max_minutes=1.0))
    count = max_iters(tmp_path / "straight")
    stop_at(monkeypatch, data_dir, tmp_path / "stopped", 6, max_minutes=1.0)
    assert max_iters(tmp_path / "stopped") == count
    monkeypatch.setattr(max_minutes, "try_out", None)  # a resumed run measures nothing
    cfg = tiny(data_dir, tmp_path / "stopped", auto_resume=True, max_minutes=1.0)
    resumed, _ = resume_settings(
        cfg, [*flags(data_dir, tmp_path / "stopped"), "--auto-resume", "--max-minutes=5", f"--max-iters={count}"]
    )
    assert (resumed.max_iters, resumed.max_minutes) == (count, None)
    train.train(dataclasses.replace(cfg, max_iters=count))
    assert_same_end(tmp_path / "stopped", tmp_path / "straight")


def test_minutes_and_epochs_as_commands(data_dir, tmp_path):
    run = tmp_path / "run"
    run_command(data_dir, run, *flags(data_dir, run)[2:], "--max-minutes=2", "--max-epochs=2")
    assert max_iters(run) == 2 * 61 * 16 // 128
    for flag in ("--max-minutes=1", "--max-epochs=1"):
        refused = run_script("train.py", "--data-dir", data_dir, "--out-dir", run, "--resume", flag)
        assert_user_error(refused, flag.split("=")[0], "is only for a new run", "15 iterations", "--max-iters")
        again = run_command(data_dir, run, "--auto-resume", flag)
        assert "is finished (15 iterations)" in " ".join(again.split())
    longer = run_command(data_dir, run, "--resume", "--max-iters=17")
    assert "max_iters 15 -> 17" in longer and max_iters(run) == 17
    assert metrics(run)[-1]["iter"] == 17


@pytest.mark.parametrize(
    "length",
    [{"max_epochs": 5.0, "max_iters": 100}, {"max_minutes": 1.0, "max_iters": 100}],
    ids=["epochs", "minutes"],
)
def test_the_same_command_for_a_scheduler_is_the_same_run(data_dir, tmp_path, monkeypatch, speed, capsys, length):
    """--auto-resume with --max-iters beside --max-epochs or --max-minutes, stopped, continued, and given once more."""
    speed(Timing(iteration=2.0, evaluation=1.0))
    train.train(tiny(data_dir, tmp_path / "straight", **length))
    count, out_dir = max_iters(tmp_path / "straight"), tmp_path / "stopped"
    assert count < 100
    stop_at(monkeypatch, data_dir, out_dir, 6, **length)
    command = [*flags(data_dir, out_dir, **length), "--auto-resume"]
    for _ in range(2):
        cfg, _ = resume_settings(tiny(data_dir, out_dir, auto_resume=True, **length), command)
        train.train(cfg)
        assert max_iters(out_dir) == count
    assert "is finished" in " ".join(capsys.readouterr().out.split())
    assert_same_end(out_dir, tmp_path / "straight")


def test_a_length_in_the_preset_does_not_keep_a_run_from_being_resumed(data_dir, tmp_path, monkeypatch, speed):
    speed(Timing(iteration=2.0, evaluation=1.0))
    train.train(tiny(data_dir, tmp_path, max_iters=3, preset="demo"))
    monkeypatch.setitem(PRESETS["demo"], "max_minutes", 60.0)
    cfg, _ = resume_settings(tiny(data_dir, tmp_path, resume=True, preset="demo"), ["--preset=demo", "--resume"])
    assert (cfg.max_iters, cfg.max_minutes) == (3, None)


def test_a_time_that_is_too_short_says_how_long_it_must_be(data_dir, tmp_path, speed):
    speed(Timing(iteration=8.0, evaluation=3.0, telling=2.0))
    with pytest.raises(UserError) as error:
        train.train(tiny(data_dir, tmp_path / "run", max_minutes=1.0))
    words = str(error.value)
    assert "An iteration takes 8 s here, an evaluation with its text, page and checkpoints 5 s" in words
    assert "and 5 s have passed; give at least --max-minutes 1.9" in words  # 100 s, 8 s for measuring, / 0.95
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".*"))


def test_the_advised_time_is_enough_although_measuring_takes_longer_then(data_dir, tmp_path, monkeypatch):
    passed = [0.0]

    def try_out(run, seconds, *args) -> Timing:  # the last iteration begins just before the end
        passed[0] = 5.0 + seconds + 3.9 + seconds / 3
        return Timing(iteration=4.0, evaluation=3.0, telling=2.0)

    monkeypatch.setattr(max_minutes, "try_out", try_out)
    monkeypatch.setattr(start, "seconds_passed", lambda: passed[0])
    for minutes in (0.1, 0.5, 0.9):
        with pytest.raises(UserError) as error:
            train.train(tiny(data_dir, tmp_path / "refused", max_minutes=minutes))
        advised = float(str(error.value).split("at least --max-minutes ")[1].split(",")[0])
        train.train(tiny(data_dir, tmp_path / str(minutes), max_minutes=advised))
        assert max_iters(tmp_path / str(minutes)) >= 10


def test_a_text_that_allows_a_few_iterations_needs_no_time_for_more(data_dir, tmp_path, speed, capsys):
    speed(Timing(iteration=8.0, evaluation=3.0, telling=2.0))
    train.train(tiny(data_dir, tmp_path, max_minutes=1.0, max_epochs=0.5))
    assert max_iters(tmp_path) == 3
    assert "; --max-epochs 0.5 allows 3 iterations, which take less" in " ".join(capsys.readouterr().out.split())


def test_an_iteration_that_takes_longer_than_the_measuring_is_timed_by_micro_steps(data_dir, tmp_path, monkeypatch):
    """The clock moves by 10 s in a micro-step of training, 4 s in an update and 1 s in an evaluation."""
    now = [0.0]
    monkeypatch.setattr(max_minutes.time, "perf_counter", lambda: now[0])
    seen = []

    def forward_backward(batch_size, forward, run, state):
        micro_steps = run.window_ids(state.tokens, batch_size)
        seen.append(len(micro_steps))
        now[0] += 10.0 * len(micro_steps)
        return torch.zeros(len(micro_steps))

    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: now.__setitem__(0, now[0] + 4.0))
    run = train.open_run(
        tiny(data_dir, tmp_path, optimizer="adamw"), train.make_machine(tiny(data_dir, tmp_path)), None
    )
    evaluate = lambda size, model, windows, machine: now.__setitem__(0, now[0] + 1.0) or 5.0  # noqa: E731
    loop = Loop(forward_backward, evaluate, lambda *args: "")
    timings = [max_minutes.try_out(run, s, loop) for s in (1.0, 100.0)]
    assert [timing.iteration for timing in timings] == [24.0, 24.0]  # two micro-steps and one update
    assert seen == [1, 1, 1] + [1, 1] + 5 * [2]
    assert timings[0].evaluation == 4.0  # 16 windows, tried on 4


@pytest.mark.parametrize(
    ("with_dropout", "without", "tried", "iterations"),
    [(2.0, 1.0, [0.1], 24), (4.0, 3.8, [0.1, 0.0], 12), (4.0, 2.0, [0.1, 0.0], 15)],
    ids=["at once", "the second time", "never"],
)
def test_the_speed_is_that_of_the_dropout_that_auto_chooses(
    data_dir, tmp_path, monkeypatch, with_dropout, without, tried, iterations
):
    """From 16 iterations on the text is read twice, so dropout slows the run down. 53.2 s are left; max_iters is 20."""
    seen = []

    def try_out(run, *args) -> Timing:
        seen.append(run.cfg.model.dropout)
        return Timing(iteration=with_dropout if seen[-1] else without, evaluation=1.0)

    monkeypatch.setattr(max_minutes, "try_out", try_out)
    cfg = tiny(data_dir, tmp_path, max_minutes=1.0, dropout="auto")
    machine = train.make_machine(cfg)
    chosen = max_minutes.fit_minutes(cfg, train.open_run(cfg, machine, None), None)
    assert (seen, chosen.max_iters, chosen.max_minutes, chosen.model.dropout) == (tried, iterations, None, "auto")
    run = train.open_run(chosen, machine, None)
    assert run.cfg.model.dropout == (0.1 if iterations >= 16 else 0.0)


def test_a_model_to_start_from(data_dir, tmp_path, speed):
    speed(Timing(iteration=2.0, evaluation=1.0))
    train.train(tiny(data_dir, tmp_path / "first", max_iters=4))
    first = {"init_from": str(tmp_path / "first"), "n_embd": 384, "n_layer": 6, "n_head": 6}
    train.train(tiny(data_dir, tmp_path / "minutes", max_minutes=1.0, **first))
    train.train(tiny(data_dir, tmp_path / "iters", max_iters=max_iters(tmp_path / "minutes"), **first))
    assert_same_end(tmp_path / "minutes", tmp_path / "iters")


def test_what_was_compiled_for_measuring_serves_the_run(data_dir, tmp_path, monkeypatch, speed):
    """Compiling takes a minute on a GPU and must happen only once."""
    speed(Timing(iteration=2.0, evaluation=1.0))
    torch._dynamo.reset()
    graphs = []
    backend = lambda graph, inputs: (graphs.append(graph), graph.forward)[1]  # noqa: E731
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend=backend, **options))
    train.train(tiny(data_dir, tmp_path / "iters", compile="on", max_iters=24))
    once = len(graphs)
    assert once > 0
    torch._dynamo.reset()
    train.train(tiny(data_dir, tmp_path / "minutes", compile="on", max_minutes=1.0))
    assert len(graphs) == 2 * once
    assert_same_end(tmp_path / "minutes", tmp_path / "iters")


def test_two_processes_agree_on_the_number(data_dir, tmp_path):
    """By its own clock, each would choose a different number."""
    clock = """
from internals import max_minutes
from internals.preflight import Timing
max_minutes.MEASURING, try_out = 1e-5, max_minutes.try_out
start.seconds_passed = lambda: 20.0 * RANK
max_minutes.try_out = lambda *args: (try_out(*args), Timing(iteration=25.0 + 15 * RANK, evaluation=5.0))[1]"""
    minutes = two_flags(data_dir, tmp_path / "minutes", max_minutes=10)
    result = run_both(*minutes, script=with_fault(tmp_path, clock))
    assert result.returncode == 0, result.stderr
    count = max_iters(tmp_path / "minutes")
    assert count == 13  # in 0.95 x 600 - 20 = 550 s, with 3 evaluations; process 0 would have time for 22
    assert " ".join(result.stdout.split()).count(f"time for {count:,} iterations") == 1
    result = run_both(*two_flags(data_dir, tmp_path / "iters", max_iters=count))
    assert result.returncode == 0, result.stderr
    assert_same_end(tmp_path / "minutes", tmp_path / "iters")


def test_the_tracker_hears_nothing_of_the_measuring(data_dir, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(report.Tracker, "open", lambda self, run, rows: opened.append((self.name, run.out_dir)))
    monkeypatch.setattr(max_minutes, "MEASURING", 1e-5)
    monkeypatch.setattr("internals.start.seconds_passed", lambda: 0.0)
    monkeypatch.setattr(max_minutes, "iterations_within", lambda *args: 10)
    train.train(tiny(data_dir, tmp_path, tracker="tensorboard", max_minutes=1.0))
    assert [name for name, out_dir in opened if out_dir != tmp_path] == ["none"]
    assert opened[-1] == ("tensorboard", tmp_path)


def test_the_time_to_build_the_model_is_measured(data_dir, tmp_path, monkeypatch):
    make_optimizer, try_out, timings = max_minutes.make_optimizer, max_minutes.try_out, []
    monkeypatch.setattr(max_minutes, "make_optimizer", lambda *args: (time.sleep(0.2), make_optimizer(*args))[1])
    monkeypatch.setattr(max_minutes, "try_out", lambda *args: (timings.append(try_out(*args)), timings[-1])[1])
    monkeypatch.setattr(max_minutes, "MEASURING", 1e-5)
    monkeypatch.setattr("internals.start.seconds_passed", lambda: 0.0)
    monkeypatch.setattr(max_minutes, "iterations_within", lambda *args: 10)
    train.train(tiny(data_dir, tmp_path, max_minutes=1.0))
    assert timings[0].building >= 0.2
