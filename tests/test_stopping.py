"""A run that is stopped anywhere, by kill -9, a signal or a closed terminal, resumes and ends as an undisturbed one.

More kills than a test run has time for:  KILLS=50 python -m pytest tests/test_stopping.py -k kill
"""

import json
import os
import random
import select
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import warm
from conftest import REPO, run_script
from runs import assert_same_end, flags, metrics, tiny

import train
from config import TrainConfig
from internals import checkpoint, report, stopping

pytestmark = pytest.mark.usefixtures("quick")


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
    context = warm.server()
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


def test_the_rows_of_an_evaluation_are_in_their_files_before_its_checkpoint(data_dir, tmp_path, monkeypatch):
    """A run that is killed after the save does not repeat the iteration, so it would never write them."""
    last, save = [], train.save

    def look(run, state, best):
        lines = (tmp_path / "samples.jsonl").read_text().splitlines()
        last.append((state.iter, json.loads(lines[-1])["iter"]))
        save(run, state, best)

    monkeypatch.setattr(train, "save", look)
    train.train(tiny(data_dir, tmp_path, checkpoint_interval=100))
    assert last == [(0, 0), (8, 8), (16, 16), (20, 20)]


@pytest.fixture
def heeded():
    """The closing of the terminal is heeded, even if the tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


# ----------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.skipif(os.name != "posix", reason="a process of Windows cannot send itself signals")
@pytest.mark.parametrize(
    ("name", "it"), [*(("SIGINT", it) for it in (0, 7, 8, 13, 19)), ("SIGTERM", 8), ("SIGHUP", 13), ("SIGUSR1", 6)]
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


def test_a_stop_before_the_first_evaluation_has_ended_keeps_the_earlier_run(data_dir, tmp_path, monkeypatch):
    train.train(tiny(data_dir, tmp_path, max_iters=6))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), evaluate(*args))[1])
    with pytest.raises(KeyboardInterrupt, match=r"^Stopped before anything was saved; an earlier run in .* is kept$"):
        train.train(tiny(data_dir, tmp_path, overwrite=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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


def test_under_torchrun_no_second_ctrl_c_is_promised(monkeypatch, capfd):
    """torchrun passes on only the first."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with stopping.catch_signals(SimpleNamespace(is_main=True)) as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.is_set()
    assert capfd.readouterr().err == "\nStopping after this iteration.\n"


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


# ----------------------------------------------------------------------------------------------------------------------
# Terminals


@pytest.mark.skipif(os.name != "posix", reason="uses a POSIX shell")
@pytest.mark.parametrize(
    "redirection",
    [
        "| head -n 1",
        "> /dev/full",
        "2> /dev/full",
        "<&- >&- 2>&-",
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
