"""Files are written whole or not at all, and a disk error is one message."""

import errno
import hashlib
import json
import os
import stat
import threading
from pathlib import Path

import pytest
from articles import posix

from internals import files
from internals.files import (
    atomic_write,
    locked,
    nearest_folder,
    sha256,
    system_error,
    temporary_folder,
    write_json,
    write_text,
    writing,
)
from internals.start import UserError


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot sync a folder")
def test_a_power_cut_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    """The new content is on the disk before it gets the name, and the name is there when the block has ended."""
    calls, fsync, replace = [], os.fsync, os.replace

    def sync(descriptor):
        status = os.fstat(descriptor)
        calls.append("sync folder" if stat.S_ISDIR(status.st_mode) else f"sync {status.st_size} bytes")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
        assert calls == []
    assert calls == ["sync 3 bytes", "rename", "sync folder"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "make room; what was"), (errno.EACCES, "; what was")])
def test_what_the_disk_refuses_names_the_file(number, words):
    with pytest.raises(UserError, match=r"^some/file: could not be written") as caught, writing("some/file"):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number) in str(caught.value) and words in str(caught.value)


def test_the_systems_error_is_found_behind_a_librarys_and_a_bug_stays_a_bug():
    def library() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 (as PyTorch's zip writer does)

    with pytest.raises(UserError, match="No space left"), writing("file"):
        library()
    with pytest.raises(RuntimeError, match="no error of the system"), writing("file"):
        raise RuntimeError("no error of the system")
    assert system_error(ValueError()) is None


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_no_failed_write(tmp_path, monkeypatch, number):
    """VirtualBox's shared folders, Docker's virtiofs, network drives under WSL."""
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    for text in ("old", "new"):
        write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_json_is_written_as_people_read_it(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Zürich"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "Zürich"\n}\n'
    assert sha256(tmp_path / "a.json") == hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()


def test_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "meta.json"
    write_json(path, {"a": "東京"})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"meta\.json: could not be written"):
        write_json(path, {"a": "another"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "東京"}
    assert os.listdir(tmp_path) == ["meta.json"]


def refuse_to_rename(monkeypatch, times):
    """os.replace fails the first times, as on Windows while a virus scanner has the file open. Returns the pauses in between."""
    replace, pauses, calls = os.replace, [], []

    def refuse(*paths):
        calls.append(paths)
        if len(calls) <= times:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(*paths)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    return pauses


def test_a_file_that_another_program_holds_for_a_moment_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "last.pt").write_text("old")
    pauses = refuse_to_rename(monkeypatch, times=3)
    write_text(tmp_path / "last.pt", "new")
    assert (tmp_path / "last.pt").read_text() == "new" and os.listdir(tmp_path) == ["last.pt"]
    assert 0 < sum(pauses) < 1


def test_a_file_that_may_not_be_replaced_is_one_message_after_seconds(tmp_path, monkeypatch):
    (tmp_path / "last.pt").write_text("old")
    pauses = refuse_to_rename(monkeypatch, times=1000)
    with pytest.raises(UserError, match=r"last\.pt: could not be written \(Access is denied\)"):
        write_text(tmp_path / "last.pt", "new")
    assert (tmp_path / "last.pt").read_text() == "old" and os.listdir(tmp_path) == ["last.pt"]
    assert 2 < sum(pauses) < 5


@posix
@pytest.mark.parametrize("refused", [False, True])
def test_on_a_mac_the_drive_empties_its_cache_before_the_rename(tmp_path, monkeypatch, refused):
    import fcntl

    calls, replace = [], os.replace

    def control(descriptor, command, *rest):
        assert command == 51
        calls.append("to the drive itself")
        if refused:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    write_text(tmp_path / "file", "new")
    assert calls == ["to the drive itself", "rename"] and (tmp_path / "file").read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such rights")
def test_a_lock_file_that_another_user_made_is_heeded(tmp_path, monkeypatch):
    opened = os.open

    def without_writing(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *mode)

    with locked(tmp_path, "--out-dir", "is in use"):
        monkeypatch.setattr(os, "open", without_writing)
        with pytest.raises(UserError, match="is in use"), locked(tmp_path, "--out-dir", "is in use"):
            pass
    with locked(tmp_path, "--out-dir", "is in use"):
        pass


def test_a_lock_that_is_given_back_in_time_is_waited_for(tmp_path):
    taken = threading.Event()

    def take():
        with locked(tmp_path, "--data-dir", "held", seconds=30):
            taken.set()

    thread = threading.Thread(target=take)
    with locked(tmp_path, "--data-dir", "held"):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not taken.is_set()
    thread.join(30)
    assert taken.is_set()


def test_a_drive_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda self: False)  # as Z:\\ on a machine without it
    with pytest.raises(UserError, match=r"models.*: there is no such drive"):
        nearest_folder("models")


def test_a_temporary_folder_goes_unless_it_has_been_renamed(tmp_path, monkeypatch):
    with pytest.raises(ValueError), temporary_folder(tmp_path, ".x-") as folder:
        (folder / "file").write_bytes(b"half")
        raise ValueError
    assert not list(tmp_path.iterdir())
    with temporary_folder(tmp_path, ".x-") as folder:
        (folder / "file").write_bytes(b"whole")
        folder.rename(tmp_path / "y")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["y", "y/file"]
    tries = []

    def refuse(*args):
        tries.append(args)
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # Windows' answer, which tempfile takes for a name that is taken
    with pytest.raises(PermissionError), temporary_folder(tmp_path, ".x-"):
        pass
    assert len(tries) == 1
