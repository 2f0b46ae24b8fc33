"""Files on the disk: atomic writes, syncing, hashing, locks, and messages for a disk that fails."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import lock_descriptor

from internals.start import CONTROLS, UserError, first_line

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RENAME_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between the attempts to rename a file


@contextlib.contextmanager
def writing(path: str | Path, advice: str = "what was saved before is kept") -> Iterator[None]:
    """Turn a failure of the disk inside the block into a UserError: `PATH: could not be written (REASON); ADVICE`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # PyTorch's zip writer raises RuntimeError in place of the system's error
        cause = system_error(error)
        if cause is None:
            raise
        if cause.errno in DISK_FULL:
            advice = f"make room; {advice}"
        raise UserError(f"{path}: could not be written ({cause.strerror or first_line(cause)}); {advice}") from error


def system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error in an exception or in what it was raised from; None if there is none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write in place of `path`, which keeps its old content until the block ends without an error.

    The new content goes to `PATH.tmp`, is synced and renamed, so a power cut leaves the old file or the new one.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                sync_file(file)
            rename(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def sync_file(file: BinaryIO) -> None:
    """Return when the file's content is on the disk itself."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync leaves the content in the drive's cache, which a power cut empties
        with contextlib.suppress(OSError):  # a network drive or a USB stick may refuse it
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)


def rename(path: str | Path, new: str | Path) -> None:
    """Rename a file or folder. A file that is called `new` is replaced.

    Windows refuses while another program has one of them open, as a virus scanner or a backup has for a moment. So a
    refusal counts only if it lasts for three seconds. Not on Windows alone: WSL's Linux writes to Windows' drives, too.
    """
    for pause in RENAME_PAUSES:
        try:
            return os.replace(path, new)
        except PermissionError:
            time.sleep(pause)
    os.replace(path, new)


@contextlib.contextmanager
def temporary_folder(parent: str | Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, deleted after the block unless it has been renamed.

    On Windows, that of `tempfile` is private, also under its new name, and where the parent cannot be written, Python
    before 3.13 tries two billion names.
    """
    folder = Path(parent, f"{prefix}{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def beside_the_code(path: Path) -> str:
    """What to do if a relative path is not here, but beside the commands. Empty if it is not there, either."""
    root = Path(__file__).resolve().parents[1]
    return f"it is in {root}: change to that folder first" if (root / path).exists() and not path.is_absolute() else ""


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def nearest_folder(path: str | Path) -> Path:
    """The folder `path`, or the nearest one above it that exists. On Windows there may be none: Z:\\runs has no Z:."""
    path = Path(path).absolute()
    for folder in (path, *path.parents):
        if folder.is_dir():
            return folder
    raise UserError(f"{path}: there is no such drive; give a folder on another one")


def sync_folder(folder: str | Path) -> None:
    """Make a rename in this folder survive a power cut, where the file system can. Windows has no such call.

    VirtualBox's shared folders and some network drives refuse to sync a folder. By then the file is in its place,
    whole, so the write has not failed.
    """
    if os.name == "posix":
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(text: str) -> str:
    """The SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def locked(folder: str | Path, flag: str, held: str, seconds: float = 0.0) -> Iterator[None]:
    """Keep other commands out of a folder, created if missing. The system releases the lock when the process ends.

    A file system without locks (some network and container file systems) only causes a warning.

    Args:
        flag: the flag that names the folder, for messages.
        held: what to say if another process has the lock.
        seconds: how long to wait for it.
    """
    with writing(f"{flag} {folder}", "give a folder that you can write to"):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # its file name is the folder, or a part of the path to it
            reason = "is a file" if os.path.exists(error.filename) else "is a broken link"
            raise UserError(f"{flag} {error.filename}: {reason}; give a folder") from error
    descriptor = None
    try:
        try:
            descriptor = os.open(Path(folder, ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's, in a group's folder: a local disk locks a file that is only read, too
            descriptor = os.open(Path(folder, ".lock"), os.O_RDONLY)
        deadline = time.monotonic() + seconds
        while not lock_descriptor(descriptor, blocking=False):
            if time.monotonic() >= deadline:
                raise UserError(f"{flag} {folder}: {held}")
            time.sleep(0.1)
    except OSError as error:
        text = f"{folder} cannot be locked ({first_line(error)}): do not start a second command on it"
        print(f"warning: {text.translate(CONTROLS)}", file=sys.stderr)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
