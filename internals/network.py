"""Network requests: in the background, with a time limit, and with retries."""

import errno
import itertools
import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from tqdm import tqdm

from internals.files import DISK_FULL, system_error
from internals.start import UserError, first_line

T = TypeVar("T")

LONGEST_PAUSE, LONGEST_ASKED_PAUSE = 60, 300  # seconds between two tries: usually, and where the server asks for it


def patiently(
    what: str, action: Callable[[], T], attempts: int, advice: str, give_up: Callable[[Exception], None]
) -> T:
    """The result of `action`, tried several times with longer and longer pauses while the network fails.

    `give_up(error)` raises if asking again cannot help; a failure of this machine's disk is never tried again.
    """
    for attempt in itertools.count(1):
        try:
            return action()
        except UserError:
            raise
        except Exception as raised:  # the errors of the libraries, and of their libraries, have no common base
            refuse_local_failure(what, raised)
            if isinstance(raised, ImportError):  # a package that is missing stays missing
                raise
            error = origin(raised)
            give_up(error)
            if attempt == attempts:
                raise UserError(
                    f"{what}: could not be fetched ({first_line(error)}), tried {attempts} times; "
                    f"{remedy(error) or advice}"
                ) from error
            pause = max(min(2 ** (attempt - 1), LONGEST_PAUSE), min(retry_after(error), LONGEST_ASKED_PAUSE))
            message = f"{what}: {first_line(error)}; trying again in {pause} s\n"
            tqdm.write(message, file=sys.stderr, end="")  # in one piece: several threads may print
            time.sleep(pause)


def remedy(error: Exception) -> str:
    """What helps against an error of the network that waiting does not mend; empty for others."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "if a proxy reads along, point SSL_CERT_FILE and REQUESTS_CA_BUNDLE to its certificate"
    if isinstance(error, json.JSONDecodeError):
        return "the answer is not the hub's: does this network have a login page? Open one page in a browser"
    return ""


def retry_after(error: Exception) -> int:
    """How many seconds the server wants us to wait before the next try; 0 if it says nothing."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return int(asked) if asked.isdecimal() else 0


def origin(error: Exception) -> Exception:
    """The server's answer, or else the first error, from which libraries raised others: huggingface_hub says only
    "due to the above error"."""
    while getattr(error, "response", None) is None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def refuse_local_failure(what: str, error: Exception) -> None:
    """Raise if the error comes from this machine: a full disk, a folder that cannot be written, or a SOCKS proxy for which
    packages are missing."""
    if re.search("SOCKS proxy, but|dependencies for SOCKS", str(error)):  # the words of httpx and requests
        raise UserError(
            f"{what}: ALL_PROXY, HTTPS_PROXY or HTTP_PROXY names a SOCKS proxy; pip install socksio pysocks, or name an HTTP "
            "proxy"
        ) from error
    # pathlib's words: in a container, a user may have neither HOME nor a name
    if "determine home directory" in str(error):
        advice = "set HF_HOME to a folder that you can write to"
        raise UserError(f"{what}: this user has no home folder; {advice}") from error
    cause = system_error(error)
    if cause is None or cause.errno is None:
        return
    if cause.errno in DISK_FULL and cause.filename is None:
        raise error
    if cause.filename is not None and cause.errno != errno.ENOENT:
        raise UserError(
            f"{what}: {cause.filename}: {cause.strerror}; make room or make it writable, or point HF_HOME (for the "
            "vocabulary: TIKTOKEN_CACHE_DIR) to another folder"
        ) from error


def in_background(action: Callable[[], T]) -> Future:
    """Run `action` in a daemon thread. At exit, Python would wait for the thread of a pool, and so for the network."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # any error: whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def answer_within(seconds: float, action: Callable[[], T]) -> T:
    """The result of `action`. Raises OSError if it takes longer."""
    return wait_for(in_background(action), seconds)


def wait_for(future: Future[T], seconds: float = math.inf) -> T:
    """The result of `future`. Raises OSError if it takes longer.

    Waits in short steps: on Windows, before Python 3.14, Ctrl-C has to wait until such a step ends.
    """
    deadline = time.monotonic() + seconds
    while not future.done():
        left = deadline - time.monotonic()
        if left <= 0:
            raise OSError(f"no answer in {seconds:g} s")
        wait([future], timeout=min(left, 0.2))
    return future.result()
