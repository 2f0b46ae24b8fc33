"""generate.py in terminals and pipes: Ctrl-C, readers that leave, full disks and any encoding."""

import io
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import types

import pytest
from conftest import REPO, assert_user_error
from generating import command

import generate
from config import GenerateConfig
from internals.cli import utf8_argument

# ----------------------------------------------------------------------------------------------------------------------
# Terminals and Ctrl-C


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_no_control_characters_and_a_pipe_the_exact_text(best):
    import pty

    prompt = "a\x1b[31m\x9bz\u00a0é"
    args = ["--prompt", prompt, "--max-new-tokens", 0]
    piped = command(best, *args, encoding="utf-8")
    assert piped.stdout == f"{prompt}\n" and "--seed" not in piped.stderr
    main, side = pty.openpty()
    line = [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best), *map(str, args)]
    process = subprocess.run(line, cwd=REPO, stdout=side, stderr=subprocess.PIPE)
    assert process.returncode == 0, process.stderr
    assert os.read(main, 65536).decode() == "a\ufffd[31m\ufffdz\u00a0é\r\n"
    os.close(side)  # only now: macOS may discard unread text when the last writer has closed
    os.close(main)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_terminal_control_c_stops_the_text_and_control_d_leaves(best):
    import pty

    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best), "--interactive", "--ignore-eot",
         "--max-new-tokens", "100000000"],
        cwd=REPO, stdin=side, stdout=side, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(side)

    def read_until(what: bytes, more: int = 0) -> None:
        seen, deadline = b"", time.monotonic() + 60
        while what not in seen or len(seen) < more:
            assert time.monotonic() < deadline, seen[-500:]
            if select.select([main], [], [], 1)[0]:
                seen += os.read(main, 65536)

    try:
        read_until(b"> ")
        os.write(main, b"hello\r")
        read_until(b"hello", more=500)  # the text is under way
        os.write(main, b"\x03")
        read_until(b"\n> ")
        os.write(main, b"\x04")
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0 and b"Traceback" not in stderr, stderr
    finally:
        process.kill()
        os.close(main)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
def test_prompts_from_a_pipe_end_with_control_c(best):
    process = subprocess.Popen(
        [sys.executable, "generate.py", "--checkpoint", str(best), "--interactive", "--ignore-eot",
         "--max-new-tokens", "100000000"],
        cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdin.write(b"one\ntwo\n")
    process.stdin.flush()
    assert process.stdout.read(100).startswith(b"one")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.endswith(b"\nStopped.\n"), errors


@pytest.mark.parametrize("as_json", [False, True])
def test_control_c_leaves_no_empty_line_among_lines_of_json(monkeypatch, capsys, as_json):
    """Prompts are typed, and the output goes to a file."""

    class Keyboard(io.TextIOWrapper):
        def isatty(self):
            return True

    def answer(prompt):
        if prompt == "one":
            raise KeyboardInterrupt
        print(prompt)

    monkeypatch.setattr(sys, "stdin", Keyboard(io.BytesIO(b"one\ntwo\n")))
    generate.interact(types.SimpleNamespace(cfg=GenerateConfig(json=as_json), answer=answer))
    assert capsys.readouterr().out == ("two\n" if as_json else "\ntwo\n")


# ----------------------------------------------------------------------------------------------------------------------
# Closed and full streams


def test_a_closed_pipe_ends_quietly(best):
    process = subprocess.Popen(
        [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best), "--ignore-eot",
         "--max-new-tokens", "100000000"],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.read(100)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    errors = process.stderr.read().decode()
    assert len(errors.splitlines()) == 3 and "rror" not in errors, errors  # the model, the device and the seed
    process.stderr.close()


@pytest.mark.parametrize("flags", [[], ["--json"], ["--no-stream"]])
def test_a_page_is_written_whether_or_not_somebody_reads_the_text(best, tmp_path, flags):
    page = tmp_path / "page.html"
    options = ["--ignore-eot", "--max-new-tokens", "40", "--num-samples", "2", "--html", str(page), *flags]
    process = subprocess.Popen(
        [sys.executable, "generate.py", "--checkpoint", str(best), *options],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 0 and f"Open this page in a browser: {page}" in errors, errors
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])
    assert [len(view["passage"]["text"]) for view in data["views"]] == [41, 41]  # after <|endoftext|>


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
@pytest.mark.parametrize("flags", [[], ["--interactive"]])
def test_a_full_disk_is_told(best, flags):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best), *flags],
            cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True, input="one\n",
        )  # fmt: skip
    assert_user_error(process, "could not be written")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a shell, and a disk that is always full")
@pytest.mark.parametrize("ending", ["2>&-", "2>/dev/full", "2>&- <&-", "2>/dev/null | head -c 2"])
def test_the_text_does_not_need_a_reader_of_stderr(best, ending):
    command = [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best)]
    line = f"{shlex.join([*command, '--prompt', 'abc', '--max-new-tokens', '5'])} {ending}"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=REPO, stdout=subprocess.PIPE)
    assert run.returncode == 0 and run.stdout.startswith(b"ab")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a shell, and a disk that is always full")
@pytest.mark.parametrize(
    ("ending", "status"),
    [(">/dev/full", 2), (">/dev/full 2>/dev/full", 2), (">&-", 0), (">&- 2>&-", 0), ("<&-", 0)],
)
def test_closed_and_full_streams_never_end_in_a_traceback(best, ending, status):
    command = [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best)]
    line = f"{shlex.join([*command, '--prompt', '-', '--max-new-tokens', '5'])} {ending}"
    run = subprocess.run(["bash", "-c", line], cwd=REPO, capture_output=True, input=b"abc")
    assert run.returncode == status and b"Traceback" not in run.stderr, run.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a shell")
@pytest.mark.parametrize("flags", [["--interactive"], ["--prompt", "-"]])
def test_a_stdin_that_cannot_be_read_is_told(best, flags):
    """As nohup gives it in place of a terminal."""
    command = [sys.executable, "generate.py", "--device", "cpu", "--checkpoint", str(best), *flags]
    run = subprocess.run(["bash", "-c", f"{shlex.join(command)} 0>/dev/null"], cwd=REPO, capture_output=True, text=True)
    assert_user_error(run, f"{' '.join(flags)}: stdin cannot be read")


# ----------------------------------------------------------------------------------------------------------------------
# Encodings


ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "cp1252"}, ASCII_LOCALE], ids=["cp1252", "C"])
@pytest.mark.parametrize("way", ["--prompt", "stdin", "--interactive"])
def test_text_is_utf8_whatever_the_environment_says(best, environment, way):
    text = "Größe 日本 👍🏽"
    prompt = {"--prompt": ["--prompt", text], "stdin": ["--prompt", "-"], "--interactive": ["--interactive"]}[way]
    run = command(
        best, *prompt, "--max-new-tokens", 5, "--stop", "ß", input=text, encoding="utf-8", env=os.environ | environment
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(text)


def test_line_ends_of_windows_are_not_part_of_a_prompt(monkeypatch):
    prompts = []
    stdin = io.TextIOWrapper(io.BytesIO(b"one\r\n\r\ntwo\r\n"), newline="\n")  # as Python opens it on Linux and macOS
    monkeypatch.setattr(sys, "stdin", stdin)
    generate.interact(types.SimpleNamespace(cfg=GenerateConfig(), answer=prompts.append))
    assert prompts == ["one", "", "two"]


def test_blanks_around_a_prompt_are_part_of_it(monkeypatch):
    prompts = []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"  one \ntwo\t\n"), newline="\n"))
    generate.interact(types.SimpleNamespace(cfg=GenerateConfig(), answer=prompts.append))
    assert prompts == ["  one ", "two\t"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows passes text, not bytes")
def test_an_argument_is_utf8_also_where_the_locale_is_latin_1(monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("latin-1", "surrogateescape"))
    decoded = "Größe".encode().decode("latin-1")  # as Python hands over UTF-8 there
    assert utf8_argument("--prompt", decoded) == "Größe"
    assert utf8_argument("--prompt", "Größe") == "Größe"  # typed in a terminal that writes Latin-1
    assert utf8_argument("--prompt", "日本") == "日本"  # from a program, not from the command line


@pytest.mark.skipif(sys.platform == "win32", reason="Windows passes text, not bytes")
@pytest.mark.parametrize("flag", ["--prompt", "--stop", "--checkpoint"])
def test_bytes_that_are_not_utf8_on_the_command_line(best, flag):
    run = command(best, flag, os.fsdecode(b"a\xff"))
    assert_user_error(run, "no such file" if flag == "--checkpoint" else f"{flag}: not UTF-8 text")


def test_invalid_utf8_on_stdin_is_one_clear_message(best):
    run = subprocess.run(
        [sys.executable, "generate.py", "--checkpoint", str(best), "--prompt", "-"], cwd=REPO, capture_output=True, input=b"ab\xff"
    )  # fmt: skip
    assert run.returncode == 2 and run.stdout == b""
    assert run.stderr.decode().splitlines() == [
        "error: --prompt -: stdin is not UTF-8 text (at byte 2); convert it first"
    ]


def test_line_ends_are_the_texts_own(monkeypatch):
    """Windows' stdout would write each \\n as \\r\\n."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", newline="\r\n"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
    generate.prepare_streams()
    print("één\r\nzwei\ndrei", end="", flush=True)
    assert written.getvalue() == "één\r\nzwei\ndrei".encode()
