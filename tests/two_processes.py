"""Runs on two processes under torchrun (gloo, on the CPU), and faults to put into them."""

import concurrent.futures
import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import warm
from conftest import REPO

# For this worker of pytest-xdist: gw0, gw1, ...
PORTS = iter(range(10_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), 32_000))


def flags(data_dir, out_dir, /, **changes) -> list[str]:
    """The run of `runs.tiny`, without dropout, on two processes."""
    return runs.flags(data_dir, out_dir, **{"batch_size": 2, "dropout": 0.0, **changes})


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


def run_both(*args, script: str | Path = "train.py") -> subprocess.CompletedProcess:
    """Two processes without torchrun, which takes seconds to start. Their outputs follow each other."""
    if sys.platform != "linux":
        return run(torchrun(*args, script=script))
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}

    def one(rank: int) -> subprocess.CompletedProcess:
        return warm.run([str(script), *args], REPO, timeout=300, RANK=str(rank), LOCAL_RANK=str(rank), **together)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        first, second = pool.map(one, (0, 1))
    return subprocess.CompletedProcess(
        first.args, first.returncode or second.returncode, first.stdout + second.stdout, first.stderr + second.stderr
    )


def free_port() -> int:
    """A port that no other test gets. The system gives higher ones away, so none is taken before process 0 listens."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("all ports are taken")


@pytest.fixture(scope="module")
def two(data_dir, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a run on two processes."""
    out_dir = tmp_path_factory.mktemp("two")
    # Muon amplifies rounding errors: it moves the smallest directions of a gradient as far as the largest
    result = run_both(*flags(data_dir, out_dir, optimizer="adamw"))
    assert result.returncode == 0, result.stderr
    return out_dir, result.stdout + result.stderr
