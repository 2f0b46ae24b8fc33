"""How a command starts and ends. Every command imports this module first, so it needs only the standard library.

begin()      before the slow imports: from here on a missing package or Ctrl-C ends in one line
run(main)    the command itself: a foreseen problem ends in one line and exit status 2, a bug in a traceback
"""

from __future__ import annotations  # Python 3.9 must get as far as `begin`, which refuses it

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, TextIO

# How many turns a waiting OpenMP thread keeps its core before it sleeps. PyTorch's default is so large that one other
# busy process makes training and generating many times slower. benchmarks/busy.py measures both sides.
SPINS = "1500"

# Errors of a path that are foreseen where the code opens it, so that others of these are bugs
PATH_BUGS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)

# A kernel that reads memory which is not its own ("illegal memory access") is a bug, and not among these
CARD_FAILED = re.compile(
    "((CUDA|cuDNN)( driver)? error|Triton Error \\[CUDA\\]): "  # PyTorch's own kernels, Inductor's, Triton's
    ".*(unspecified launch failure|unknown error|uncorrectable|launch timed out|hardware (stack )?error"
    "|STATUS_EXECUTION_FAILED)"
)

# What a terminal would obey. A text from Windows has \r at the end of each line: it is dropped without a replacement
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
CONTROLS[ord("\r")] = ""

BEGAN = time.monotonic()
FIRST_PROCESS_ENDED = threading.Event()  # set in the other processes of a run (internals/processes.py)


class UserError(Exception):
    """A foreseen problem: a user's mistake, a disk, a network, damaged data.

    Its text names the flag or the file, and says in one line what is wrong and what to do. `run` prints it on stderr
    and ends the command with exit status 2. Docstrings mention it only where the reason is not obvious.
    """


def seconds_passed() -> float:
    """Seconds since the command began."""
    return time.monotonic() - BEGAN


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that some libraries add; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def begin() -> None:
    """Prepare the process. An error in the imports that follow then ends the command as it does in `run`.

    PyTorch takes seconds to import, and Ctrl-C may come meanwhile.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 (the system's own, perhaps, because .venv is not active)
        found = ".".join(map(str, sys.version_info[:2]))
        sys.stderr.write(f"error: this is Python {found}, and 3.10 is needed: activate .venv, or name another Python\n")
        sys.exit(2)

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if is_closed_pipe(error):  # the reader of --help has seen enough
            os._exit(0)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:  # --help into a file
            error = UserError("stdout cannot be written: the disk is full; make room")
        status = report_end(error, interrupted="Stopped.")
        if status is None:
            sys.__excepthook__(kind, error, traceback)
            status = 1
        os._exit(status)  # a hook cannot set the exit status; nothing has been made yet that needs closing

    def stop_at_once(number: int, frame: FrameType | None) -> None:
        report_end(KeyboardInterrupt(), interrupted="Stopped.")
        os._exit(130)

    global BEGAN
    BEGAN = time.monotonic()  # again: in a notebook, `%run` finds this module imported by an earlier cell
    sys.excepthook = hook
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # an exception may be lost in a library's import
        signal.signal(signal.SIGINT, stop_at_once)
    open_closed_streams()
    if os.environ.get("NO_COLOR"):
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")  # tyro colours --help and its errors
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # PyTorch reads it when it is imported


def open_closed_streams() -> None:
    """Give a process that was started with a closed stdin, stdout or stderr (`>&-`) a null device in its place.

    Otherwise the next file that it opens would get the free number, and text for the screen would end up in that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 (it stays open)


def reconfigure(stream: TextIO, **settings: str | None) -> None:
    """Change the encoding of a stream, or how it treats characters outside it and line ends. A notebook's has neither."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(**settings)


class Forgiving:
    """A stream that loses only its text when it fails: the terminal is gone, the reader has left, the disk is full.

    The first failure is reported on the `other` stream. From then on the text is dropped.
    """

    def __init__(self, stream: TextIO, name: str):
        self.stream, self.name = stream, name
        self.failed, self.lost = False, ""  # lost: why somebody who wanted the text lacks it
        self.other: TextIO | None = None

    def write(self, text: str) -> int:
        self._attempt(lambda: (self.stream.write(text), self.stream.flush()))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self.failed:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.failed = True
            silence(self.stream)
            if not is_closed_pipe(error):
                self.lost = f"{self.name} cannot be written ({first_line(error)})"
                if self.other is not None:
                    self.other.write(f"{self.lost}; its text is lost\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def forgiving_streams(stdout_is_output: bool) -> Iterator[None]:
    """Inside, a failure to print does not end the command.

    With `stdout_is_output`, stdout carries the command's work, so this holds for stderr only.
    """
    streams = sys.stdout, sys.stderr
    out, err = Forgiving(sys.stdout, "stdout"), Forgiving(sys.stderr, "stderr")
    out.other, err.other = err, None if stdout_is_output else out
    sys.stdout, sys.stderr = streams[0] if stdout_is_output else out, err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def require_printed() -> None:
    """Raise UserError if text for stdout was lost. For a command whose only work is what it prints."""
    if lost := getattr(sys.stdout, "lost", ""):
        raise UserError(f"{lost}; make room, or write somewhere else")


def is_closed_pipe(error: BaseException) -> bool:
    """Whether a stream failed because its reader has gone (`| head`). Windows says EINVAL then.

    It says EINVAL, with a number of its own, for a library that cannot be loaded, too.
    """
    invalid = os.name == "nt" and getattr(error, "errno", 0) == errno.EINVAL
    return isinstance(error, BrokenPipeError) or (invalid and getattr(error, "winerror", None) is None)


def silence(stream: TextIO) -> None:
    """Discard what a broken stream still holds. Python would try to write it again at the end of the process."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def run(main: Callable[[], None], interrupted: str = "Stopped.", stdout_is_output: bool = False) -> None:
    """Run a command to its end.

    Args:
        interrupted: what to say after Ctrl-C, unless KeyboardInterrupt has a text; the exit status is then 130, as
            shells have it.
        stdout_is_output: stdout takes the command's work, and a failure to write it must end the command.
    """
    sys.excepthook = sys.__excepthook__
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with forgiving_streams(stdout_is_output):
        try:
            main()
        except (UserError, ImportError, RuntimeError, OSError, MemoryError, KeyboardInterrupt) as error:
            status = report_end(error, interrupted)
            if status is None:
                raise
            sys.exit(status)


def report_end(error: BaseException, interrupted: str) -> int | None:
    """Say on stderr why the command ends. Returns its exit status, or None for a bug."""
    status = 2
    if isinstance(error, KeyboardInterrupt):
        status, text = 130, str(error) or interrupted
    elif isinstance(error, UserError):
        text = f"error: {error}"
    elif is_lack_of_memory(error):
        text = f"error: too little memory ({first_line(error)}); close other programs, or raise a limit (ulimit -v)"
        if is_unmapped(error):
            text += "; if this disk is mounted noexec, install on another"
    elif isinstance(error, ImportError | OSError) and (problem := library_problem(error)):
        text = f"error: {problem}"
    elif isinstance(error, OSError) and error.filename and error.errno not in PATH_BUGS:
        advice = "check its permissions, and that its drive is there, or give another path"
        text = f"error: {error.filename}: {error.strerror}; {advice}"
    elif "busy or unavailable" in str(error):  # CUDA's words, on a card that an administrator set to one process
        advice = "wait, or give --device cpu"
        text = f"error: the GPU accepts one process at a time, and another is using it (see nvidia-smi); {advice}"
    elif is_failed_card(error):
        text = (
            f"error: the GPU stopped working ({first_line(error)}): the card, its driver or its power failed, or the "
            "computer slept; continue a training run with --resume, and restart the computer if that fails, too "
            "('sudo dmesg | grep -i xid' says more)"
        )
    else:
        return None
    if not first_process_has_spoken():
        with contextlib.suppress(OSError, ValueError):  # stderr may be gone; the exit status still tells
            print(text.translate(CONTROLS), file=sys.stderr, flush=True)
    return status


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether this machine's memory (not a GPU's) ran out, for example while a library was loaded."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or is_unmapped(error)


def is_unmapped(error: BaseException) -> bool:
    """Whether the system refused to map a library into memory: there is none left, or the disk may hold no programs."""
    return isinstance(error, ImportError | OSError) and "failed to map segment" in str(error)


def is_failed_card(error: BaseException) -> bool:
    """Whether a GPU failed while it computed. Nothing more can be computed on it in this process."""
    return isinstance(error, RuntimeError) and bool(CARD_FAILED.search(str(error)))


def library_problem(error: ImportError | OSError) -> str:
    """Why a package or a library cannot be loaded, and what to do. Empty for other errors, and for our own modules."""
    said, name = first_line(error), getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and name in sys.stdlib_module_names:
        return f"{sys.executable} was built without {name}; set up .venv with another Python"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{sys.executable} has no package {name}: activate .venv (if this folder was moved, or Python replaced: make "
            "clean, then make demo), or pip install -r requirements.txt"
        )
    of_others = "-packages" in str(getattr(error, "path", ""))  # in site-packages, or Debian's dist-packages
    if "cannot import name" in said and of_others:
        return f"package {name} does not fit ({said}); pip install -r requirements.txt, or add -c constraints.txt, too"
    if "one of its dependencies" in said or "DLL load failed" in said:  # Windows
        return (
            f"a library cannot be loaded ({said}); install https://aka.ms/vs/17/release/vc_redist.x64.exe, or close other "
            "programs"
        )
    return ""


def first_process_has_spoken(seconds: float = 3) -> bool:
    """Let process 0 of a machine speak for all. If all fail alike, it ends while the others wait here, or torchrun ends
    them. If only this process failed, it speaks after some seconds."""
    if os.environ.get("LOCAL_RANK", "0") in ("0", ""):
        return False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    return FIRST_PROCESS_ENDED.wait(seconds)
