"""How a command starts and ends. Every command imports this room first, so it needs the standard library alone.

begin()      before the slow imports: from here on a missing package or Ctrl-C ends in one line
run(main)    the command itself: a foreseen problem ends in one line and exit status 2, a bug in a traceback
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import TracebackType


class UserError(Exception):
    """A foreseen problem: a user's mistake, a disk, a network, damaged data.

    Its text names the flag or the file, and says in one line what is wrong and what to do. `run` prints it on stderr and
    ends the command with exit status 2. Docstrings mention it only where the reason is not obvious.
    """


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that some libraries add; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def begin() -> None:
    """Let the imports that follow end as `run` ends. PyTorch takes seconds to import, and Ctrl-C may come meanwhile."""

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        status = report_end(error, interrupted="Stopped.")
        if status is None:
            sys.__excepthook__(kind, error, traceback)
            status = 1
        os._exit(status)  # a hook cannot set the exit status; nothing has been made yet that needs closing

    sys.excepthook = hook


def run(main: Callable[[], None], interrupted: str = "Stopped.") -> None:
    """Run a command to its end.

    Args:
        interrupted: what to say after Ctrl-C; the exit status is then 130, as shells have it.
    """
    sys.excepthook = sys.__excepthook__
    try:
        main()
    except (UserError, ImportError, KeyboardInterrupt) as error:
        status = report_end(error, interrupted)
        if status is None:
            raise
        sys.exit(status)


def report_end(error: BaseException, interrupted: str) -> int | None:
    """Say on stderr why the command ends. Returns its exit status, or None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        status, text = 130, interrupted
    elif isinstance(error, UserError):
        status, text = 2, f"error: {error}"
    elif isinstance(error, ModuleNotFoundError):
        status, text = 2, f"error: no package {error.name}: activate .venv, or pip install -r requirements.txt"
    else:
        return None
    let_first_process_speak()
    with contextlib.suppress(OSError, ValueError):  # stderr may be gone; the exit status still tells
        print(text, file=sys.stderr, flush=True)
    return status


def let_first_process_speak() -> None:
    """Let process 0 of a machine speak for all. If all fail alike, torchrun ends the others while they wait here. If not,
    the failure was this process's alone, and it speaks after three seconds."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(3)
