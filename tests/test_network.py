"""internals/network.py and the vocabulary's download: bounded, announced, and not retried if that cannot help."""

import contextlib
import hashlib
import json
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import requests
from articles import command, posix
from conftest import assert_user_error, run_script, without_network_settings

from internals import network, tokenizer
from internals.network import patiently
from internals.start import UserError
from internals.text_files import SourceFile
from internals.wikipedia import HubWikipedia


@pytest.fixture
def silent():
    """A server that accepts connections and sends nothing."""
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def accept():
        try:
            while True:
                held.append(server.accept()[0])
        except OSError:
            pass

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()
    for connection in held:
        connection.close()


def fetch_vocabulary(tmp_path, proxy, seconds):
    (tmp_path / "a.txt").write_text("word " * 100)
    env = {
        **without_network_settings(),
        "HTTPS_PROXY": proxy,
        "https_proxy": proxy,
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"),
    }
    code = (
        f"from internals import tokenizer; tokenizer.SILENT_SECONDS = {seconds}\n"
        "from config import PrepareConfig; from internals import cli, start; import prepare_data\n"
        "start.run(lambda: prepare_data.prepare(cli.parse(PrepareConfig, '')))"
    )
    arguments = command(tmp_path / "out", tmp_path / "a.txt")[1:]
    arguments[arguments.index("bytes")] = "gpt2"
    return run_script("-c", code, *arguments, env=env, timeout=60)


def test_a_silent_network_is_bounded_and_announced(tmp_path, silent):
    result = fetch_vocabulary(tmp_path, silent, 0.5)
    assert "fetching the gpt2 tokenizer's vocabulary" in result.stderr and "trying again" in result.stderr
    assert_user_error(result, "tried 3 times", "TIKTOKEN_CACHE_DIR", "--tokenizer bytes")
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_vocabulary_may_arrive_slowly(monkeypatch):
    """Only a silence is limited to a few seconds."""

    def get(url, timeout):
        assert timeout == 0.1
        time.sleep(0.3)
        return SimpleNamespace(content=b"text", raise_for_status=lambda: None)

    monkeypatch.setattr("requests.get", get)
    monkeypatch.setattr(tokenizer, "SILENT_SECONDS", 0.1)
    assert tokenizer.fetch("http://127.0.0.1/vocabulary") == b"text"


def test_no_network_at_all(tmp_path):
    assert_user_error(fetch_vocabulary(tmp_path, "http://127.0.0.1:9", 5), "vocabulary", "tried 3 times")


def test_a_cache_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "cache").mkdir()
    url = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    (tmp_path / "cache" / hashlib.sha1(url.encode()).hexdigest()).mkdir()  # where the file would be
    result = fetch_vocabulary(tmp_path, "http://127.0.0.1:9", 5)
    assert_user_error(result, "vocabulary", "TIKTOKEN_CACHE_DIR")
    assert "trying again" not in result.stderr


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/cache/x"), NotADirectoryError(20, "Not a directory", "/cache/x"),
                                   OSError(28, "No space left on device"), OSError(30, "Read-only file system", "/cache/x")])  # fmt: skip
def test_what_is_no_fault_of_the_network_is_not_retried(monkeypatch, error):
    monkeypatch.setattr(network.time, "sleep", lambda seconds: pytest.fail("it is tried again"))

    def action():
        raise RuntimeError("from a library") from error

    with pytest.raises((UserError, RuntimeError)) as raised:
        patiently("the file", action, 6, "advice", lambda error: None)
    if error.filename:
        assert "/cache/x" in str(raised.value)


def test_a_missing_package_is_not_retried(monkeypatch):
    monkeypatch.setattr(network.time, "sleep", lambda seconds: pytest.fail("it is tried again"))

    def action():
        import no_such_package  # noqa: F401

    with pytest.raises(ModuleNotFoundError):
        patiently("the file", action, 6, "advice", lambda error: None)


@pytest.mark.parametrize(
    "error",  # of httpx and of requests
    [ImportError("Using SOCKS proxy, but the 'socksio' package is not installed. Make sure to install httpx using `...`."),
     ValueError("Missing dependencies for SOCKS support.")],
)  # fmt: skip
def test_a_socks_proxy_without_its_packages_is_named_and_not_retried(monkeypatch, error):
    monkeypatch.setattr(network.time, "sleep", lambda seconds: pytest.fail("it is tried again"))

    def action():
        raise error

    with pytest.raises(UserError, match=r"^the file: ALL_PROXY.* SOCKS proxy; pip install socksio pysocks, or "):
        patiently("the file", action, 6, "advice", lambda error: None)


def test_a_user_without_a_home_folder_is_told_so_and_nothing_is_retried(monkeypatch):
    """In a container, under a number that no user has: pathlib raises RuntimeError."""
    monkeypatch.setattr(network.time, "sleep", lambda seconds: pytest.fail("it is tried again"))

    def action():
        raise RuntimeError("Could not determine home directory.")

    with pytest.raises(UserError, match=r"^the file: this user has no home folder; set HF_HOME"):
        patiently("the file", action, 6, "advice", lambda error: None)


def test_a_download_that_failed_ahead_of_time_is_tried_again(tmp_path, monkeypatch):
    source = HubWikipedia("simple", "20231101", "main", tmp_path, False, None)
    source.files = [SourceFile(name, 1, None) for name in ("a", "b")]
    failing = {"b"}

    def fetch(file):
        if file.name in failing:
            raise UserError("no network")
        return tmp_path / file.name

    monkeypatch.setattr(source, "_fetch", fetch)
    assert source.fetch(0).name == "a"
    while not source._futures[1].done():
        time.sleep(0.01)
    with pytest.raises(UserError, match="no network"):
        source.fetch(1)
    failing.clear()  # the network is back
    assert source.fetch(1).name == "b"


def test_what_the_network_may_mend_is_retried_after_longer_and_longer_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(network.time, "sleep", pauses.append)
    answers = [ConnectionResetError(104, "Connection reset"), TimeoutError(), OSError("no answer"), "text"]

    def action():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently("the file", action, 4, "advice", lambda error: None) == "text"
    assert pauses == [1, 2, 4]


@pytest.mark.parametrize(
    ("error", "advice"),
    [(OSError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), "SSL_CERT_FILE and REQUESTS_CA_BUNDLE"),
     (json.JSONDecodeError("Expecting value", "<html>", 0), "login page"),
     (OSError("Connection refused"), "times; advice")],
)  # fmt: skip
def test_the_advice_fits_the_error(error, advice):
    def action():
        raise error

    with pytest.raises(UserError, match=advice):
        patiently("the file", action, 1, "advice", lambda error: None)


@pytest.mark.parametrize(
    ("asked", "pauses"),
    [({}, [1, 2, 4, 8, 16, 32, 60, 60]), ({"Retry-After": "50"}, [50] * 6 + [60] * 2), ({"Retry-After": "9999"}, [300] * 8),
     ({"Retry-After": "Fri, 27 Nov 2026 21:00:00 GMT"}, [1, 2, 4, 8, 16, 32, 60, 60])],
)  # fmt: skip
def test_a_pause_is_at_most_a_minute_unless_the_server_asks_for_more(monkeypatch, asked, pauses):
    slept, error = [], OSError("429 Too Many Requests")
    error.response = SimpleNamespace(headers=asked)
    monkeypatch.setattr(network.time, "sleep", slept.append)

    def action():
        raise error

    with pytest.raises(UserError, match=r"\(429 Too Many Requests\), tried 9 times; advice"):
        patiently("the file", action, 9, "advice", lambda error: None)
    assert slept == pauses


@contextlib.contextmanager
def late_ctrl_c():
    """Ctrl-C after a moment, as on Windows: a wait of the main thread for another one hears of it when it is over."""

    def press():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        time.sleep(0.3)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # so no system call of this thread ends early
    thread = threading.Thread(target=press)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@posix
@pytest.mark.parametrize("way", ["an answer", "a file of Wikipedia"])
def test_on_windows_ctrl_c_need_not_wait_for_the_network(tmp_path, monkeypatch, way):
    over = threading.Event()
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # HubWikipedia sets it
    source = HubWikipedia("simple", "20231101", "main", tmp_path)
    source.files = [SourceFile("a.parquet", 1, None)]
    monkeypatch.setattr(source, "_fetch", lambda file: over.wait(10))
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), late_ctrl_c():
        if way == "an answer":
            network.answer_within(60, lambda: over.wait(10))
        else:
            source.fetch(0)
    assert time.monotonic() - begin < 5
    over.set()


def test_an_answer_that_is_late_is_told_from_an_error_of_the_network():
    over = threading.Event()
    with pytest.raises(OSError, match=r"no answer in 0\.3 s"):
        network.answer_within(0.3, over.wait)
    over.set()

    def time_out():
        raise TimeoutError("the handshake timed out")

    with pytest.raises(TimeoutError, match="handshake"):
        network.answer_within(60, time_out)
    assert network.answer_within(60, lambda: "text") == "text"


def test_the_vocabulary_is_asked_for_again_when_the_server_is_busy(monkeypatch):
    answers = [(503, b"busy"), (200, b"text")]

    def get(url, timeout):
        answer = requests.Response()
        answer.status_code, answer._content = answers.pop(0)
        return answer

    monkeypatch.setattr("requests.get", get)
    monkeypatch.setattr(network.time, "sleep", lambda seconds: None)
    assert tokenizer.fetch("http://127.0.0.1/vocabulary") == b"text" and not answers
