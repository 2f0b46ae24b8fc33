"""Training on several processes under torchrun (gloo, on the CPU): the run of one process, and all end together."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO
from test_train import assert_same_end, metrics, tiny

import train
from config import PRESETS, ModelConfig, TrainConfig
from internals import checkpoint, max_minutes
from internals.cli import with_preset
from internals.machine import Machine
from internals.preflight import Timing
from internals.processes import (
    LOST_PROCESS,
    WRITING,
    Watch,
    connect_to_first,
    is_failed_exchange,
    join_processes,
    why_exchange_failed,
)
from internals.run import Run, open_run
from internals.run_length import resolve_auto
from internals.start import UserError

FLAGS = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "n_inner": 32, "block_size": 16, "dropout": 0.0, "device": "cpu",
    "dtype": "float32", "max_iters": 20, "batch_size": 2, "tokens_per_iter": 128, "learning_rate": 1e-2, "min_lr": 1e-3,
    "log_interval": 1, "eval_interval": 8, "eval_tokens": 256, "checkpoint_interval": 5,
}  # fmt: skip


def flags(data_dir, out_dir, /, **changes) -> list[str]:
    values = {**FLAGS, "data_dir": data_dir, "out_dir": out_dir, **changes}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def torchrun(*args, script: str | Path = "train.py") -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *args]


def with_fault(tmp_path: Path, fault: str) -> Path:
    """train.py with a few extra lines that make something go wrong."""
    script = tmp_path / "faulty.py"
    script.write_text(
        f"import os, signal, sys, time\nsys.path.insert(0, {str(REPO)!r})\nimport torch, train\nfrom config import TrainConfig\nfrom internals import cli, start\n"
        f"from model import GPT\nRANK = int(os.environ['RANK'])\nget_lr, forward = train.get_lr, GPT.forward\n{fault}\n"
        "start.run(lambda: train.main(cli.parse(TrainConfig, '')))\n"
    )
    return script


def run(command: list[str]) -> subprocess.CompletedProcess:
    """The finished command. Its limit is far below the 30 minutes after which a collective gives up."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def two(data_dir, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a run on two processes."""
    out_dir = tmp_path_factory.mktemp("two")
    # Muon amplifies rounding errors: it moves the smallest directions of a gradient as far as the largest
    result = run(torchrun(*flags(data_dir, out_dir, optimizer="adamw")))
    assert result.returncode == 0, result.stderr
    return out_dir, result.stdout + result.stderr


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_make_the_run_of_one(data_dir, tmp_path, two, one_thread):
    out_dir, output = two
    assert "2 sequences x 16 tokens x 2 micro-steps x 2 processes" in output
    assert output.count("parameters:") == output.count(" 8/20  val ") == output.count("Done in ") == 1
    train.train(tiny(data_dir, tmp_path, dropout=0.0, batch_size=2, optimizer="adamw"))
    assert len(metrics(out_dir)) == 21
    for one, both in zip(metrics(tmp_path), metrics(out_dir), strict=True):
        assert one.keys() == both.keys() and (one["iter"], one["tokens"]) == (both["iter"], both["tokens"])
        for name in ("train_loss", "val_loss"):
            if one.get(name) is not None:
                assert both[name] == pytest.approx(one[name], abs=1e-5)
    losses = [row["train_loss"] for row in metrics(tmp_path)[1:]]
    assert losses[0] - losses[-1] > 1  # the learning rate is large enough to matter
    first, second = checkpoint.load(out_dir / "last.pt")["rng"]
    assert not torch.equal(first["cpu"], second["cpu"])  # or both would drop the same activations


def test_a_run_resumes_on_another_number_of_processes(data_dir, tmp_path, two, one_thread):
    """From 2 to 1 and to 2 again, compared with one process that resumes at the same iterations."""
    changing, alone = tmp_path / "changing", tmp_path / "alone"
    shutil.copytree(two[0], changing)
    one = dict(dropout=0.0, batch_size=2, optimizer="adamw")
    train.train(tiny(data_dir, changing, max_iters=24, resume=True, **one))
    result = run(torchrun(*flags(data_dir, changing, optimizer="adamw", max_iters=28), "--resume"))
    assert result.returncode == 0, result.stderr
    assert "changed: " in result.stdout and "processes 1 -> 2" in " ".join(result.stdout.split())
    for max_iters in (20, 24, 28):
        train.train(tiny(data_dir, alone, max_iters=max_iters, auto_resume=True, **one))
    for a, b in zip(metrics(changing)[21:], metrics(alone)[21:], strict=True):
        assert (a["iter"], a["tokens"]) == (b["iter"], b["tokens"])
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    assert len(metrics(changing)) == 29


DIFFERENT = """
import hashlib
from internals import cpu_kernels
cpu_kernels.capabilities = lambda: {"avx512_bf16": RANK == 0}
initial_model, ending = train.initial_model, train.ending
def other_weights(run):
    model = initial_model(run)
    model.transformer.wpe.weight.data += 1e-3 * RANK
    return model
def tell_weights(run, state):
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in state.model.parameters())
    os.write(1, f"weights: {hashlib.sha256(weights).hexdigest()}\\n".encode())
    return ending(run, state)
train.initial_model, train.ending = other_weights, tell_weights"""


def test_machines_may_have_other_processors(data_dir, tmp_path):
    """They may be fastest in another dtype, and draw first weights that differ in a bit."""
    short = flags(data_dir, tmp_path / "run", dtype="auto", max_iters=2)
    result = run(torchrun(*short, script=with_fault(tmp_path, DIFFERENT)))
    assert result.returncode == 0, result.stderr
    assert "float32 (the processes' devices have different fastest dtypes)" in " ".join(result.stdout.split())
    weights = re.findall(r"weights: ([0-9a-f]{64})", result.stdout)
    assert len(weights) == 2 and len(set(weights)) == 1


def test_machines_must_share_the_folder_of_the_run(data_dir, tmp_path, two):
    shutil.copytree(two[0], tmp_path / "run")
    elsewhere = f"sys.argv += ['--out-dir={tmp_path / 'other'}'] * RANK"
    result = run(torchrun(*flags(data_dir, tmp_path / "run"), "--auto-resume", script=with_fault(tmp_path, elsewhere)))
    assert result.returncode != 0
    assert result.stderr.count("the processes see different files there; all machines must share it") == 1


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 2 of this machine has no GPU, there are only 1; give at most"):
        join_processes(torch.device("cuda"))


def test_several_gpus_without_nccl_are_one_line(monkeypatch):
    """PyTorch for Windows."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match=r"several GPUs need NCCL, .* on Windows, use WSL"):
        join_processes(torch.device("cuda"))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_processes_connect_by_ipv4_and_by_ipv6(monkeypatch, address):
    """Process 0 listens, and tells its port to process 1, which connects at once."""
    if ":" in address:
        try:
            socket.create_server((address, 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("needs IPv6")
    others = []
    tell = lambda port: others.append(socket.create_connection((address, port[0]), timeout=10))  # noqa: E731
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", tell)
    monkeypatch.setenv("MASTER_ADDR", address)
    (here,), (there,) = connect_to_first(), others
    with here, there:
        there.sendall(b"here")
        assert here.recv(4) == b"here"


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's list of a process's threads")
def test_no_thread_of_the_process_group_outlives_a_run(data_dir, tmp_path):
    """A leftover thread may free a tensor while Python shuts down, which aborts the process (about one run in 60)."""
    count = """
import atexit
def threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            names.append(open(f"/proc/self/task/{task}/comm").read().strip())
        except OSError:  # the thread has just ended
            pass
    os.write(1, f"threads: {RANK} {[name for name in names if 'gloo' in name]}\\n".encode())
atexit.register(threads)"""
    result = run(torchrun(*flags(data_dir, tmp_path / "run", max_iters=2), script=with_fault(tmp_path, count)))
    assert result.returncode == 0, result.stderr
    # The processes may write at the same time, so lines may run together
    assert sorted(re.findall(r"threads: (\d) (\[[^]]*\])", result.stdout)) == [("0", "[]"), ("1", "[]")], result.stdout


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("epoch_tokens", [80_000, 10**9])
def test_the_processes_share_out_the_windows_of_one(preset, epoch_tokens):
    for processes in (1, 2, 4, 8, 16):
        cfg = resolve_auto(with_preset(TrainConfig, preset), epoch_tokens, processes).cfg
        windows = cfg.tokens_per_iter // cfg.model.block_size
        machines = [Machine(torch.device("cpu"), torch.float32, "", rank, processes) for rank in range(processes)]
        runs = [Run(cfg, {}, machine, None, None) for machine in machines]
        for batch_size in (runs[0].batch_size, 1):
            shares = [run.window_ids(3 * cfg.tokens_per_iter, batch_size) for run in runs]
            assert {len(share) for share in shares} == {windows // processes // batch_size}
            seen = [n for share in shares for window_ids in share for n in window_ids]
            assert sorted(seen) == list(range(3 * windows, 4 * windows))  # none twice, none left out


@pytest.mark.parametrize(
    "processes, block_size, tokens", [(1, 16, 2_048), (16, 16, 2_048), (16, 256, 4_096), (3, 256, 1_536)]
)
def test_auto_gives_whole_sequences_for_every_process(data_dir, tmp_path, monkeypatch, processes, block_size, tokens):
    """For a small text `auto` is 2,048 tokens. --max-minutes chooses them, too, and the run after it the same."""
    monkeypatch.setattr("internals.run.check_same_everywhere", lambda *of_all_processes: None)
    monkeypatch.setattr(Machine, "gather", lambda self, value: value)
    seen = []

    def try_out(run, *args) -> Timing:
        seen.append(run.cfg.tokens_per_iter)
        return Timing(iteration=1.0, evaluation=1.0)

    monkeypatch.setattr(max_minutes, "try_out", try_out)
    machine = Machine(torch.device("cpu"), torch.float32, "", 0, processes)
    model = ModelConfig(n_layer=1, n_head=2, n_embd=16, n_inner=32, block_size=block_size)
    cfg = TrainConfig(
        data_dir=str(data_dir), out_dir=str(tmp_path), tokens_per_iter="auto", max_epochs=40.0, model=model
    )
    run = open_run(cfg, machine, None)
    assert run.cfg.tokens_per_iter == tokens
    most = 40 * run.train_windows.per_epoch * block_size // tokens
    assert run.cfg.max_iters == most
    chosen = max_minutes.fit_minutes(dataclasses.replace(cfg, max_minutes=60.0), run, None, None, None)
    assert (seen, chosen.tokens_per_iter, chosen.max_iters) == ([tokens], "auto", most)
    assert open_run(chosen, machine, None).cfg == run.cfg


def test_out_of_memory_in_one_process_halves_the_batch_of_all(data_dir, tmp_path, two):
    """Once in an evaluation, which has no gradients, and once after a micro-step, whose gradients must be discarded."""
    short = """
larger = iter(range(1000))
def limited(self, idx, targets=None, **rest):
    if RANK == 1 and len(idx) > 1 and next(larger) in (9, 12):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(self, idx, targets, **rest)
GPT.forward = limited"""
    command = flags(data_dir, tmp_path / "run", optimizer="adamw", batch_size=4)
    result = run(torchrun(*command, script=with_fault(tmp_path, short)))
    assert result.returncode == 0, result.stderr
    for size, count in ((2, "2 sequences"), (1, "1 sequence")):
        assert result.stdout.count(f"micro-steps now have {count}, not {2 * size}, of the same text") == 1
    for enough, little in zip(metrics(two[0]), metrics(tmp_path / "run"), strict=True):
        for name in ("train_loss", "val_loss"):
            assert little.get(name) == pytest.approx(enough.get(name), abs=1e-5)


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


def test_stopped_by_a_signal_two_processes_resume_exactly(data_dir, tmp_path, two):
    """SIGTERM to the launcher. With dropout, each process has its own random state."""
    slow = with_fault(tmp_path, "train.get_lr = lambda it, cfg: (time.sleep(1), get_lr(it, cfg))[1]")
    out_dir, straight = tmp_path / "stopped", tmp_path / "straight"
    command = torchrun(*flags(data_dir, out_dir, dropout=0.1), script=slow)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 100
        while not (out_dir / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        output = launcher.communicate(timeout=60)[0].decode()
    finally:
        launcher.kill()
    assert output.count("Stopped at iteration") == output.count("Stopping after") == 1, output
    (again,) = re.findall("Continue: (.*)", output)
    assert again.startswith("torchrun --standalone --nproc-per-node 2 ") and again.endswith("--resume"), again
    assert 0 < checkpoint.load(out_dir / "last.pt")["iter"] < 20
    result = run(torchrun(*flags(data_dir, out_dir, dropout=0.1), "--resume"))
    assert result.returncode == 0, result.stderr
    result = run(torchrun(*flags(data_dir, straight, dropout=0.1)))
    assert result.returncode == 0, result.stderr
    assert_same_end(out_dir, straight)


def test_a_signal_to_one_process_stops_all(data_dir, tmp_path):
    one = "train.get_lr = lambda it, cfg: (os.kill(os.getpid(), 15) if (RANK, it) == (1, 3) else 0, get_lr(it, cfg))[1]"
    result = run(torchrun(*flags(data_dir, tmp_path / "run"), script=with_fault(tmp_path, one)))
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
    "settings": "sys.argv += ['--learning-rate=5e-3'] * RANK",
    "batch": "sys.argv += ['--batch-size=auto'] * RANK",
    "minutes": "sys.argv += ['--max-minutes=1'] * RANK",
    "check": "sys.argv += ['--check'] * RANK",
    "epochs": "sys.argv += ['--max-epochs=2'] * RANK",
    "nan": """
calls = iter(range(1000))
def poisoned(self, idx, targets=None, **rest):
    loss = forward(self, idx, targets, **rest)
    return loss * float("nan") if self.training and next(calls) == 6 and RANK == 1 else loss
GPT.forward = poisoned""",
}
SAYS = {
    "killed": ["error: another process of this run ended"],
    "memory": ["error: out of memory at --batch-size 1; take a smaller --block-size or a smaller model"],
    "settings": ["error: the processes differ (learning_rate: 0.01 and 0.005); give all machines the same command"],
    "batch": ["error: the processes differ (batch_size: 2 and auto)"],
    "minutes": ["error: the processes differ (max_minutes: None and 1)"],
    "check": ["error: the processes differ (check: False and True)"],
    "epochs": ["error: the processes differ (max_epochs: None and 2)"],
    "nan": ["error: the loss of micro-step 2 of 4 is not finite in iteration 4"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_process_that_fails_ends_the_run_at_once(data_dir, tmp_path, fault):
    result = run(torchrun(*flags(data_dir, tmp_path / "run"), script=with_fault(tmp_path, FAULTS[fault])))
    assert result.returncode != 0
    assert result.stderr.count("Traceback (most recent call last)") == 1, result.stderr  # the launcher's own
    messages = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    # There may be no time for the message that another process ended.
    assert len(SAYS[fault]) >= len(messages) >= (fault != "killed"), result.stderr
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
    result = run(torchrun(*flags(tmp_path / "nowhere", tmp_path)))
    assert result.returncode != 0
    assert result.stderr.count("there is no such folder") == 1
