"""Training on several processes under torchrun (gloo, on the CPU): it is the run of one process."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest
import torch
from conftest import REPO, run_script
from runs import assert_same_end, metrics, tiny
from two_processes import flags, run_both, torchrun, with_fault

import train
from config import PRESETS, ModelConfig, TrainConfig
from internals import checkpoint, max_minutes
from internals.cli import with_preset
from internals.machine import Machine
from internals.preflight import Timing
from internals.processes import (
    connect_to_first,
)
from internals.run import Run, open_run
from internals.run_length import resolve_auto


def test_two_processes_make_the_run_of_one(data_dir, tmp_path, two, quick):
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


def test_a_run_resumes_on_another_number_of_processes(data_dir, tmp_path, two, quick):
    """From 2 to 1 and to 2 again, compared with one process that resumes at the same iterations."""
    changing, alone = tmp_path / "changing", tmp_path / "alone"
    shutil.copytree(two[0], changing)
    one = dict(dropout=0.0, batch_size=2, optimizer="adamw")
    train.train(tiny(data_dir, changing, max_iters=24, resume=True, **one))
    result = run_both(*flags(data_dir, changing, optimizer="adamw", max_iters=28), "--resume")
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
    result = run_both(*short, script=with_fault(tmp_path, DIFFERENT))
    assert result.returncode == 0, result.stderr
    assert "float32 (the processes' devices have different fastest dtypes)" in " ".join(result.stdout.split())
    weights = re.findall(r"weights: ([0-9a-f]{64})", result.stdout)
    assert len(weights) == 2 and len(set(weights)) == 1


@pytest.mark.parametrize("flag", ["--auto-resume", "--resume"])
def test_machines_must_share_the_folder_of_the_run(data_dir, tmp_path, two, flag):
    shutil.copytree(two[0], tmp_path / "run")
    elsewhere = f"sys.argv += ['--out-dir={tmp_path / 'other'}'] * RANK"
    result = run_both(*flags(data_dir, tmp_path / "run"), flag, script=with_fault(tmp_path, elsewhere))
    assert result.returncode != 0
    assert result.stderr.count("the processes see different files there; all machines must share it") == 1


OTHER_WEIGHTS = """
if RANK == 1:
    build_model = train.checkpoint.build_model
    def other_weights(*args):
        model = build_model(*args)
        model.transformer.wte.weight.data *= 2
        return model
    train.checkpoint.build_model = other_weights"""


def test_machines_evaluate_the_same_model_on_the_same_windows(data_dir, tmp_path, two):
    """What process 0 has: the others may hold another best.pt in a folder of the same name. All else is refused."""
    evaluate = [*flags(data_dir, two[0]), "--eval-only"]
    alone = run_script("train.py", *evaluate)
    assert alone.returncode == 0, alone.stderr
    [loss] = re.findall(r"loss .*", alone.stdout)
    together = run_both(*evaluate, script=with_fault(tmp_path, OTHER_WEIGHTS))
    assert together.returncode == 0 and loss in together.stdout, together.stderr
    for fault, words in (
        ("sys.argv += ['--eval-tokens=128'] * RANK", "eval_tokens: 256 and 128"),
        ("sys.argv = sys.argv[: len(sys.argv) - RANK]", "eval_only: True and False"),
    ):
        refused = run_both(*evaluate, script=with_fault(tmp_path, fault))
        assert refused.returncode != 0 and f"error: the processes differ ({words})" in refused.stderr, refused.stderr


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
    result = run_both(*flags(data_dir, tmp_path / "run", max_iters=2), script=with_fault(tmp_path, count))
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
        data_dir=str(data_dir), out_dir=str(tmp_path), tokens_per_iter="auto", max_epochs=40, model=model, device="cpu"
    )
    run = open_run(cfg, machine, None)
    assert run.cfg.tokens_per_iter == tokens
    most = 40 * run.train_windows.per_epoch * block_size // tokens
    assert run.cfg.max_iters == most
    chosen = max_minutes.fit_minutes(dataclasses.replace(cfg, max_minutes=60.0), run, None)
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
    result = run_both(*command, script=with_fault(tmp_path, short))
    assert result.returncode == 0, result.stderr
    for size, count in ((2, "2 sequences"), (1, "1 sequence")):
        assert result.stdout.count(f"micro-steps now have {count}, not {2 * size}, of the same text") == 1
    for enough, little in zip(metrics(two[0]), metrics(tmp_path / "run"), strict=True):
        for name in ("train_loss", "val_loss"):
            assert little.get(name) == pytest.approx(enough.get(name), abs=1e-5)


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
    result = run_both(*flags(data_dir, out_dir, dropout=0.1), "--resume")
    assert result.returncode == 0, result.stderr
    result = run_both(*flags(data_dir, straight, dropout=0.1))
    assert result.returncode == 0, result.stderr
    assert_same_end(out_dir, straight)


def test_the_processes_may_name_their_copies_of_the_data_differently(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "copy")
    elsewhere = f"sys.argv += ['--data-dir={tmp_path / 'copy'}'] * RANK"
    result = run_both(*flags(data_dir, tmp_path / "run", max_iters=1), script=with_fault(tmp_path, elsewhere))
    assert result.returncode == 0, result.stderr
