"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 as a request to stop."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from internals.machine import Machine
from internals.run import Run


@contextlib.contextmanager
def catch_signals(machine: Machine) -> Iterator[threading.Event]:
    """Yields an event that SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal has gone) or SIGUSR1 (a SLURM job's time is up)
    sets. The run then saves and ends after the iteration. After any of them, Ctrl-C ends it at once. The others may come
    twice by themselves: a scheduler sends them to all processes of a job, and torchrun passes its own on. A signal that was
    ignored stays ignored (`nohup`).
    """
    stop = threading.Event()

    def handler(number: int, frame: Any) -> None:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if machine.is_main and not stop.is_set():
            with contextlib.suppress(OSError):  # os.write, since a signal may arrive in the middle of a print
                # torchrun passes on the first one only
                at_once = b"" if "TORCHELASTIC_RUN_ID" in os.environ else b" Ctrl-C stops at once."
                os.write(2, b"\nStopping after this iteration." + at_once + b"\n")
        stop.set()

    with handling(handler, "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        yield stop


def keep_earlier_run(run: Run, stop: threading.Event) -> None:
    """Before `--overwrite` deletes the earlier run: end the command if any process was asked to stop."""
    if run.cfg.overwrite and run.machine.gather(torch.tensor([stop.is_set()])).any():
        raise KeyboardInterrupt(f"Stopped before anything was saved; an earlier run in {run.out_dir} is kept")


@contextlib.contextmanager
def end_like_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end the command as Ctrl-C does, so that it removes its temporary files."""

    def handler(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with handling(handler, "SIGTERM", "SIGHUP"):
        yield


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], None], *names: str) -> Iterator[None]:
    """Inside, `handler` takes these signals, except those that are ignored (or that Windows lacks)."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
