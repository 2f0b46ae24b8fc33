"""Processes that die, fail, are stopped or differ: all of a run end together, with one message."""

import os
import re
import socket
import sys
import threading

import pytest
import torch
from two_processes import flags, run, run_both, torchrun, with_fault

from internals import checkpoint
from internals.processes import (
    LOST_PROCESS,
    WRITING,
    Watch,
    is_failed_exchange,
    join_processes,
    why_exchange_failed,
)
from internals.start import UserError


def test_a_process_that_dies_ends_one_that_nothing_else_reaches(data_dir, tmp_path):
    """For example one that waits for its GPU, which waits for the dead process: no exception or signal stops that."""
    stuck = """
def hang(it, cfg):
    if it == 3 and RANK == 1:
        os.kill(os.getpid(), 9)
    while it == 3:
        time.sleep(1)
    return get_lr(it, cfg)
train.get_lr = hang"""
    result = run(torchrun(*flags(data_dir, tmp_path / "run"), script=with_fault(tmp_path, stuck)))
    assert result.stderr.count("error: another process of this run ended") == 1, result.stderr
    ends = re.findall(r"exitcode +: (-?\d+)", result.stderr)
    assert sorted(ends) == ["-9", "2"], result.stderr  # the launcher would kill it after 30 seconds, with -9
    assert checkpoint.load(tmp_path / "run" / "last.pt")["iter"] == 0


def test_a_dead_process_waits_for_what_is_being_written(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    monkeypatch.setattr("internals.processes.GRACE", 0)
    monkeypatch.setenv("RANK", "1")
    ours, theirs = socket.socketpair()
    with WRITING:
        watch = Watch([ours])
        theirs.close()
        watch.thread.join(0.3)
        assert not ended.is_set()
    watch.thread.join(60)
    assert ended.is_set()
    ended.clear()
    ours, theirs = socket.socketpair()
    watch = Watch([ours])
    watch.over.set()  # a run that ended well
    theirs.close()
    watch.thread.join(60)
    assert not watch.thread.is_alive() and not ended.is_set()


def test_a_mistyped_flag_is_told_once(data_dir, tmp_path):
    """By process 0, even if it is the last to read the command line: torchrun ends it as soon as another one ends."""
    script = with_fault(tmp_path, "time.sleep(2 * (RANK == 0))")
    result = run(torchrun(*flags(data_dir, tmp_path / "run"), "--max-itersx", "3", script=script))
    assert result.returncode != 0 and result.stderr.count("--max-itersx") == 1, result.stderr


def test_a_signal_to_one_process_stops_all(data_dir, tmp_path):
    one = "train.get_lr = lambda it, cfg: (os.kill(os.getpid(), 15) if (RANK, it) == (1, 3) else 0, get_lr(it, cfg))[1]"
    result = run_both(*flags(data_dir, tmp_path / "run"), script=with_fault(tmp_path, one))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Stopped at iteration 4, all saved.") == 1
    assert checkpoint.load(tmp_path / "run" / "last.pt")["iter"] == 4


FAULTS = {
    "killed": "train.get_lr = lambda it, cfg: os.kill(os.getpid(), 9) if (RANK, it) == (1, 3) else get_lr(it, cfg)",
    "memory": """
def limited(self, idx, targets=None, **rest):
    if RANK == 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(self, idx, targets, **rest)
GPT.forward = limited""",
    "settings": """
sys.argv += ['--learning-rate=5e-3', '--batch-size=auto', '--max-minutes=1', '--max-epochs=2', '--check'] * RANK""",
    "nan": """
calls = iter(range(1000))
def poisoned(self, idx, targets=None, **rest):
    loss = forward(self, idx, targets, **rest)
    return loss * float("nan") if self.training and next(calls) == 6 and RANK == 1 else loss
GPT.forward = poisoned""",
}


SAYS = {
    "killed": ["error: another process of this run ended"],
    "memory": ["error: out of memory at --batch-size 1; only a run with a smaller --block-size or model would fit"],
    "settings": [
        "error: the processes differ (check: False and True, max_minutes: None and 1, max_epochs: None and 2, "
        "batch_size: 2 and auto, learning_rate: 0.01 and 0.005); give all machines the same command"
    ],
    "nan": ["error: the loss of micro-step 2 of 4 is not finite in iteration 4"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_process_that_fails_ends_the_run_at_once(data_dir, tmp_path, fault):
    result = run_both(*flags(data_dir, tmp_path / "run"), script=with_fault(tmp_path, FAULTS[fault]))
    launched = sys.platform != "linux"  # by torchrun, which ends with a traceback of its own
    assert result.returncode != 0
    assert result.stderr.count("Traceback (most recent call last)") == launched, result.stderr
    messages = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    # torchrun may leave no time for the message that another process ended
    assert len(SAYS[fault]) >= len(messages) >= (not launched or fault != "killed"), result.stderr
    assert all(message.startswith(words) for message, words in zip(messages, SAYS[fault], strict=False)), result.stderr
    if fault in ("killed", "nan"):
        assert checkpoint.load(tmp_path / "run" / "last.pt")["iter"] == 0


def test_an_exchange_fails_because_a_process_ended_or_else_with_its_own_reason(monkeypatch):
    monkeypatch.setattr(Watch, "current", None)  # of earlier tests
    monkeypatch.setattr("internals.processes.FIRST_PROCESS_ENDED", threading.Event())
    failure = RuntimeError("[enforce fail at gloo/device.cc:84] rc != -1\nUnable to find address for: eth9")
    assert is_failed_exchange(failure)
    assert "exchange data (Unable to find address for: eth9); see docs/training.md" in why_exchange_failed(failure)
    here, there = socket.socketpair()
    watch = object.__new__(Watch)
    watch.connections, watch.over, watch.one_ended = [here], threading.Event(), threading.Event()
    watch.over.set()  # so that nothing ends this process
    monkeypatch.setattr(Watch, "current", watch)
    monkeypatch.setenv("RANK", "0")
    there.close()
    watch._wait()
    assert why_exchange_failed(failure) == LOST_PROCESS


def test_a_mistake_is_said_once(tmp_path):
    result = run_both(*flags(tmp_path / "nowhere", tmp_path))
    assert result.returncode != 0
    assert result.stderr.count("there is no such folder") == 1


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 2 has no GPU: this machine has 1; start at most"):
        join_processes(torch.device("cuda"))


def test_several_gpus_without_nccl_are_one_line(monkeypatch):
    """PyTorch for Windows."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match=r"several GPUs need NCCL, .* on Windows, use WSL"):
        join_processes(torch.device("cuda"))
