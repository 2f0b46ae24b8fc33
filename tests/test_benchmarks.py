"""benchmarks/: a mistake is a message and not minutes of waiting, and no figure is of something else than it says."""

import multiprocessing
import os
from types import SimpleNamespace

import pytest
from conftest import assert_user_error, load_benchmark, run_script

import train
from internals.start import UserError


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["race.py", "--data-dir", "nowhere"], "--run: give one at least"),
        (["prepare.py", "--source", "nowhere"], "--source nowhere: holds no .parquet files"),
        (["busy.py", "--rounds", "0"], "--rounds 0: give at least 1"),
        (["tokenizer.py", "--text", "nowhere"], "--text nowhere: give LANGUAGE=SOURCE"),
        (["scaling.py", "--cards", "3"], "--cards"),
        (["train.py", "--preset", "none"], "invalid choice 'none'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_a_message(command, words):
    assert_user_error(run_script(f"benchmarks/{command[0]}", *command[1:]), words)


def test_a_child_that_fails_ends_the_wait_for_all(monkeypatch):
    """The other waits for it at a barrier."""
    context = multiprocessing.get_context("spawn")
    waiting = context.Process(target=context.Event().wait)
    processes = [context.Process(target=os._exit, args=(1,)), waiting]
    for process in processes:
        process.start()
    with pytest.raises(UserError, match="a process failed"):
        load_benchmark("prepare").answers(processes, context.Queue())
    waiting.join(30)
    assert waiting.exitcode not in (None, 0)


def test_a_model_that_was_not_compiled_is_not_measured(monkeypatch):
    common = load_benchmark("common")
    cfg = SimpleNamespace(compile="auto")
    monkeypatch.setattr(train, "training_model", lambda model, *_: (model, "off, since it failed here"))
    with pytest.raises(UserError, match="--compile auto: off, since it failed here"):
        common.training_model("model", cfg, None)
    monkeypatch.setattr(train, "training_model", lambda model, *_: (model, "off"))
    assert common.training_model("model", cfg, None) == "model"
