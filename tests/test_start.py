"""How commands start and end: one line for a foreseen problem, a traceback for a bug, at any time."""

import ast
import errno
import io
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPO, assert_user_error, run_script

from internals import start, text_stream
from internals.start import SPINS, UserError, first_line, run
from internals.text_stream import ReaderGone

COMMANDS = ("prepare_data", "train", "generate", "export")


def test_a_foreseen_problem_is_one_line_and_status_2(capsys):
    def main():
        raise UserError("the disk is full; make room")

    with pytest.raises(SystemExit) as exit:
        run(main)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: the disk is full; make room\n"


def test_a_path_that_the_system_refuses_is_one_line(capsys, tmp_path):
    def refuse():  # as Path.exists does where a folder may not be entered
        raise PermissionError(errno.EACCES, "Permission denied", "/home/other/run")

    def go():  # as Path.exists does on a drive of the network that has gone
        raise OSError(errno.ESTALE, "Stale file handle", "/mnt/drive/run")

    for main in (refuse, go, lambda: os.stat(tmp_path / ("x" * 300))):
        with pytest.raises(SystemExit) as exit:
            run(main)
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: /") and error.endswith(
            "; check its permissions, and that its drive is there, or give another path\n"
        )


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    with pytest.raises(FileNotFoundError):
        run(lambda: os.stat("no such file"))


def test_a_card_for_one_process_that_has_one_is_one_line(capsys):
    def main():
        raise RuntimeError(
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with TORCH_USE_CUDA_DSA"
        )

    with pytest.raises(SystemExit) as exit:
        run(main)
    assert exit.value.code == 2 and capsys.readouterr().err.startswith("error: the GPU accepts one process at a time")


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: unspecified launch failure",
        "CUDA error: unknown error",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: the launch timed out and was terminated",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDA driver error: unspecified launch failure",  # from a compiled model's kernels
        "Triton Error [CUDA]: unspecified launch failure",
        "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
    ],
)
def test_a_card_that_fails_is_one_line(capsys, said):
    def main():
        raise RuntimeError(f"{said}\nCompile with TORCH_USE_CUDA_DSA")

    with pytest.raises(SystemExit) as exit:
        run(main)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1
    assert message.startswith(f"error: the GPU stopped working ({said}): ") and "--resume" in message


def test_a_bug_on_a_card_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="illegal"):
        run(lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access was encountered")))


NOT_LOADED = "libtorch_cpu.so: failed to map segment from shared object"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 8 GiB"), "Unable to allocate 8 GiB"),
        (ImportError(NOT_LOADED), NOT_LOADED),
        (OSError(NOT_LOADED), NOT_LOADED),  # from ctypes
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
    ],
    ids=repr,
)
def test_too_little_memory_is_one_line(capsys, error, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run(main)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1
    assert message.startswith("error: too little memory (") and words in message
    assert ("noexec" in message) == (words == NOT_LOADED)


def test_too_little_memory_for_the_imports_is_one_line():
    code = f"from internals import start; start.begin(); raise ImportError({NOT_LOADED!r})"
    assert_user_error(run_script("-c", code), "too little memory", NOT_LOADED)


def test_ctrl_c_says_what_the_command_says(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        run(main, interrupted="Stopped. Nothing was written.")
    assert exit.value.code == 130
    assert capsys.readouterr().err == "Stopped. Nothing was written.\n"


def test_a_stderr_that_is_gone_does_not_change_the_exit_status():
    code = "from internals.start import UserError, run\ndef main(): raise UserError('x')\nrun(main)"
    with open(os.devnull, "rb") as unwritable:
        assert subprocess.run([sys.executable, "-c", code], cwd=REPO, stderr=unwritable).returncode == 2


def without(package: str) -> str:
    return f"import sys; sys.modules[{package!r}] = None; import runpy; sys.argv = [{{script!r}}, {{flag!r}}]; runpy.run_path({{script!r}}, run_name='__main__')"


@pytest.mark.parametrize("script", [f"{name}.py" for name in COMMANDS])
def test_a_missing_package_is_one_line(script):
    code = without("tyro").format(script=script, flag="--preset=demo")
    assert_user_error(
        run_script("-c", code), "no package tyro", "activate .venv", "make clean", "pip install -r requirements.txt"
    )


@pytest.mark.parametrize("script", ["train.py", "generate.py", "export.py"])
def test_pytorch_missing_is_one_line(script):
    code = without("torch").format(script=script, flag="--out-dir=nowhere" if script != "generate.py" else "--seed=1")
    assert_user_error(run_script("-c", code), "no package torch", "pip install -r requirements.txt")


def test_a_python_built_without_a_part_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        run(lambda: (_ for _ in ()).throw(ModuleNotFoundError("No module named '_lzma'", name="_lzma")))
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {sys.executable} was built without _lzma; set up .venv with another Python\n"
    )


def test_a_package_that_is_too_old_is_one_line(tmp_path):
    old = tmp_path / "site-packages"
    old.mkdir()
    (old / "filelock.py").touch()
    code = f"import sys; from internals import start; start.begin(); sys.path.insert(0, {str(old)!r}); from {{}} import lock"
    result = run_script("-c", code.format("filelock"))
    assert_user_error(result, "package filelock does not fit (cannot import name 'lock'", "-r requirements.txt")
    ours = run_script("-c", code.format("internals.shell"))
    assert ours.returncode == 1 and "Traceback" in ours.stderr


def test_a_python_that_is_too_old_is_one_line():
    code = "import sys; from internals import start; sys.version_info = (3, 9, 18); start.begin()"
    assert_user_error(run_script("-c", code), "this is Python 3.9, and 3.10 is needed: activate .venv")


@pytest.mark.parametrize("file", ["internals/start.py", *(f"{name}.py" for name in COMMANDS)])
def test_a_python_that_is_too_old_gets_as_far_as_the_message(file):
    ast.parse((REPO / file).read_text(encoding="utf-8"), feature_version=(3, 8))
    assert start.report_end.__annotations__["return"] == "int | None"  # not evaluated


NOTEBOOK = """
import io, runpy, sys
class Stream(io.TextIOBase):  # as in a notebook: no `reconfigure`
    def __init__(self, stream): self.stream = stream
    def write(self, text): return self.stream.write(text)
    def flush(self): self.stream.flush()
sys.stdout, sys.stderr, sys.argv = Stream(sys.stdout), Stream(sys.stderr), {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "argv",
    [
        ("prepare_data.py", "--source", "nowhere"),
        ("train.py", "--data-dir", "nowhere", "--device", "cpu"),
        ("generate.py", "--checkpoint", "nowhere"),
        ("export.py", "--checkpoint", "nowhere", "--out-dir", "nowhere"),
    ],
    ids=COMMANDS,
)
def test_a_command_works_in_a_notebook(argv):
    """`%run train.py`: its errors are the command's own."""
    assert_user_error(run_script("-c", NOTEBOOK.format(argv=list(argv))), "nowhere")


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
@pytest.mark.parametrize("script", ["train.py", "generate.py", "export.py"])
def test_ctrl_c_during_the_imports_is_one_line(script):
    flags = ["--out-dir", "nowhere"] if script != "generate.py" else []
    code = (
        "import builtins, os, runpy, signal, sys\n"
        "real = builtins.__import__\n"
        "def importing(name, *args, **kwargs):\n"
        "    if name == 'torch':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *args, **kwargs)\n"
        f"sys.argv = [{script!r}, *{flags!r}]\n"
        "builtins.__import__ = importing\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    result = run_script("-c", code)
    assert result.returncode == 130 and result.stderr.strip() == "Stopped.", result.stderr


def test_processes_beside_the_first_wait_for_it_to_speak():
    """A process that fails alone prints its message after all."""
    code = "from internals.start import UserError, run\ndef main(): raise UserError('mine alone')\nrun(main)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPO, stderr=subprocess.PIPE, text=True, env={**os.environ, "LOCAL_RANK": "1"},
    )  # fmt: skip
    begin = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stderr == "error: mine alone\n"
    assert time.monotonic() - begin > 2


WAITING = """
from internals import start
wait = start.FIRST_PROCESS_ENDED.wait
start.FIRST_PROCESS_ENDED.wait = lambda seconds: (print("waiting", flush=True), wait(60))[1]
def main():
    raise start.UserError("mine alone")
start.run(main)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends signals to a process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_ended_while_it_waits_says_nothing(number):
    """torchrun ends the others when the first has spoken."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "LOCAL_RANK": "1"},
    )  # fmt: skip
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -number and stderr == ""


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\nwhat is wrong\nand pages of it")) == "what is wrong"
    assert first_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["ours", "the user's", "the user's policy"],
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(environment, expected):
    code = "from internals import start; start.begin(); import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    assert run_script("-c", code, env={**clean, **environment}).stdout.strip() == expected


def test_the_time_of_a_command_begins_with_it_even_in_a_notebook():
    """A notebook's process has imported this module for an earlier command."""
    code = "from internals import start; start.BEGAN -= 60; start.begin(); print(start.seconds_passed() < 60)"
    assert run_script("-c", code).stdout == "True\n"


class Closed(io.StringIO):
    """Standard output whose reader has gone, as Windows reports it."""

    def write(self, text):
        raise OSError(errno.EINVAL, "Invalid argument")


def test_a_reader_that_has_gone_on_windows_is_no_message(monkeypatch, capsys):
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        windows.setattr(sys, "stdout", Closed())
        run(lambda: print("a line"))
        with pytest.raises(ReaderGone):
            text_stream.write("a line")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", Closed())
    run(lambda: print("a line"))
    assert "stdout cannot be written (" in capsys.readouterr().err  # elsewhere it is another error
    with pytest.raises(UserError, match="could not be written to stdout"):
        text_stream.write("a line")


def test_a_reader_of_the_help_that_has_gone_on_windows_is_no_traceback():
    code = (
        "from internals import start; start.begin()\nimport os; os.name = 'nt'\nraise OSError(22, 'Invalid argument')"
    )
    result = run_script("-c", code)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "error",
    [
        "OSError(22, 'The specified module could not be found. Error loading \"c10.dll\" or one of its dependencies.')",
        "ImportError('DLL load failed while importing _C: The specified module could not be found.')",
    ],
    ids=["OSError", "ImportError"],
)
def test_a_library_that_windows_cannot_load_is_one_line(error):
    code = (
        "from internals import start; start.begin()\nimport os; os.name = 'nt'\n"
        f"error = {error}\nerror.winerror = 126\nraise error"
    )
    assert_user_error(run_script("-c", code), "error: a library cannot be loaded (", "vc_redist.x64.exe")
