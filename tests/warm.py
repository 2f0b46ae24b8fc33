"""Commands in processes that have PyTorch already: a fraction of a second each, instead of several.

A server imports what is slow to import, and forks itself for each command (multiprocessing's forkserver). It imports
none of the project's modules: each command does, as always, and runs as `__main__`.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

SLOW = ["torch", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "tyro", "tiktoken"]


def server() -> multiprocessing.context.BaseContext:
    """Where processes come from that have all of `SLOW`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    return context


def run(command: list[str], cwd: Path, timeout: float, **environment: str) -> subprocess.CompletedProcess:
    """What `python COMMAND` prints and its exit status, like subprocess.run with `capture_output` and `text`.

    Args:
        environment: variables beside those of this process. PyTorch has been imported before it sees them.

    Raises:
        subprocess.TimeoutExpired: it took longer; it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = server().Process(target=become, args=(command, {**os.environ, **environment}, cwd, outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, process.exitcode, *(file.read_text() for file in outputs))


def become(command: list[str], environment: dict[str, str], cwd: Path, outputs: list[Path]) -> None:
    """Turn this process into that of a command."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in enumerate((os.devnull, *outputs)):
        opened = os.open(file, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115 (they stay open)
    sys.stderr = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv, sys.path[0] = list(command), str(cwd)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
