"""prepare_data.py, stopped or out of disk space: the next start resumes, and the shards are the same, byte for byte."""

import dataclasses
import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from articles import as_text, command, config, files, make_articles, posix, start_script, write_jsonl, write_parquet
from conftest import assert_user_error, run_script

import prepare_data
from internals import progress, reader
from internals.files import locked
from internals.shards import ShardWriter, read_meta
from internals.start import UserError
from internals.text_files import LocalFiles
from internals.tokenizer_json import END_OF_TEXT
from prepare_data import Pipeline, prepare

# ----------------------------------------------------------------------------------------------------------------------
# Inside a file


ROWS = make_articles(1500, words=100)
TEXT = "\n\n".join(map(as_text, ROWS[:300]))
SEPARATED = END_OF_TEXT.join([*(as_text(row) for row in ROWS[300:310]), TEXT, *(as_text(row) for row in ROWS[310:])])
WIKI = "".join(f'<doc id="{row["id"]}" title="{row["title"]}">\n{row["text"]}\n</doc>\n' for row in ROWS)
CONTENTS = {
    "a.txt": TEXT.encode(),
    "a.txt.gz": gzip.compress(TEXT.encode()),
    "separated.txt": SEPARATED.encode(),
    "separated.txt.gz": gzip.compress(SEPARATED.encode()),
    "a.json": json.dumps(ROWS).encode(),
    "a.jsonl.gz": gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()),
    "wiki_00": WIKI.encode(),
}


def stop_after(monkeypatch, chunks):
    """Stop the next run like a kill: after it has appended so many chunks, and before it saves that."""
    append, appended = Pipeline.append, []

    def stopping(self, work):
        append(self, work)
        appended.append(work)
        if len(appended) == chunks:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "COMMIT_SECONDS", -1.0)  # after each chunk
    monkeypatch.setattr(Pipeline, "append", stopping)


@pytest.mark.parametrize("name, overwrite", [*((name, False) for name in (*CONTENTS, "a.parquet")), ("a.json", True)])
def test_a_stop_inside_a_file(tmp_path, monkeypatch, name, overwrite):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 10_000)
    path, out = tmp_path / name, tmp_path / "out"
    if name in CONTENTS:
        path.write_bytes(CONTENTS[name])
    else:
        write_parquet(path, ROWS)
    flags = {"separator": END_OF_TEXT if "separated" in name else "", "shard_tokens": 20_000}
    prepare(config(tmp_path / "once", path, **flags))
    if overwrite:  # other text, which the stopped run deletes; it is then resumed without the flag
        write_jsonl(tmp_path / "old.jsonl", make_articles(60, seed=9))
        prepare(config(out, tmp_path / "old.jsonl"))
    for chunks in (3, 2):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="finished work is kept"):
            stop_after(patched, chunks)
            prepare(config(out, path, overwrite=overwrite, **flags))
        overwrite = False
    progress = json.loads((out / "progress.json").read_text())
    assert progress["file"] == 0 and progress["row"] > 2
    prepare(config(out, path, **flags))
    assert files(out) == files(tmp_path / "once")


# ----------------------------------------------------------------------------------------------------------------------
# Half-done folders


def test_a_damaged_folder_is_not_called_finished(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_articles(50))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    os.truncate(tmp_path / "out" / "val_000000.bin", 2000)
    with pytest.raises(UserError, match=r"val_000000\.bin"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))


def test_the_shards_are_on_the_disk_before_the_progress_that_counts_them(tmp_path, monkeypatch):
    """A power cut between the two must not leave progress that the shards lack."""
    calls, sync, save = [], ShardWriter.sync, progress.Progress.save
    monkeypatch.setattr(ShardWriter, "sync", lambda self: (calls.append("sync "), sync(self)))
    monkeypatch.setattr(progress.Progress, "save", lambda self, *args: (calls.append("save "), save(self, *args)))
    monkeypatch.setattr(prepare_data, "COMMIT_SECONDS", -1.0)  # after each chunk
    write_jsonl(tmp_path / "a.jsonl", make_articles(100))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    assert re.fullmatch("(sync sync save ){2,}(sync )*", "".join(calls))  # two splits


def test_only_temporary_files_of_our_own_are_deleted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_articles(50))
    (tmp_path / "out").mkdir()
    for name, begun in (
        ("meta.json.tmp", '{\n  "format": 1,\n  "sour'),
        ("progress.json.tmp", ""),
        ("mine.json.tmp", "half"),
    ):
        (tmp_path / "out" / name).write_text(begun)
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    assert list(files(tmp_path / "out")) == ["meta.json", "mine.json.tmp", "train_000000.bin", "val_000000.bin"]


def test_a_setting_that_a_half_done_folder_lacks_had_its_default(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", make_articles(50))
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"no": "text"}])
    for _ in range(2):
        with pytest.raises(UserError, match=r"b\.jsonl, line 1"):
            prepare(config(tmp_path / "out", tmp_path / "in"))
        path = tmp_path / "out" / "progress.json"
        noted = json.loads(path.read_text(encoding="utf-8"))
        assert (noted.pop("max_tokens"), noted["file"]) == (None, 1)
        path.write_text(json.dumps(noted), encoding="utf-8")


def test_nothing_is_kept_of_a_file_that_changes_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 10_000)
    path = tmp_path / "a.jsonl"
    write_jsonl(path, make_articles(3000))
    prepare(config(tmp_path / "once", path))
    text, time = path.read_bytes(), path.stat().st_mtime_ns
    append, calls = Pipeline.append, []

    def append_and_change(self, work):
        append(self, work)
        calls.append(work)
        if len(calls) == 2:
            path.write_bytes(text.replace(b"a", b"A"))

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "append", append_and_change)
        with pytest.raises(UserError, match=r"a\.jsonl: has changed since the command began"):
            prepare(config(tmp_path / "out", path, workers=1))
    path.write_bytes(text)
    os.utime(path, ns=(time, time))
    prepare(config(tmp_path / "out", path))
    assert files(tmp_path / "out") == files(tmp_path / "once")


def test_another_command_is_refused_half_way(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*make_articles(5000), {"no": "text"}])
    # "Continue" with the same text would end here again, with another text in "another source"
    with pytest.raises(UserError, match=r"line 5001.* changed ones need --overwrite$"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    state = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert state["splits"]["train"]["tokens"] > 1_000_000  # what was done is kept
    for other in ({"val_fraction": 0.1}, {"text_column": "x"}, {"shard_tokens": 7}, {"max_tokens": 1000}):
        with pytest.raises(UserError, match="--" + next(iter(other)).replace("_", "-")):
            prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **other))
    for change in ({"ids": None}, {"splits": state["splits"] | {"val": {"tokens": 1, "bytes": None, "articles": 1}}}):
        (tmp_path / "out" / "progress.json").write_text(json.dumps(state | change))
        with pytest.raises(UserError, match=r"progress\.json.*: is damaged"):
            prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    (tmp_path / "out" / "progress.json").write_text(json.dumps(state))
    write_jsonl(tmp_path / "a.jsonl", make_articles(5000))  # fixed, but now it is another source
    with pytest.raises(UserError, match="another source"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    for damaged in ("{", "{}", "[]"):
        (tmp_path / "out" / "progress.json").write_text(damaged)
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"progress\.json.*: is damaged"):
                prepare(config(tmp_path / "out", tmp_path / "a.jsonl", overwrite=overwrite))
    for name in ("progress.json", "train_000000.bin.partial", "val_000000.bin.partial"):
        (tmp_path / "out" / name).unlink()
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    prepare(config(tmp_path / "once", tmp_path / "a.jsonl"))
    assert files(tmp_path / "out") == files(tmp_path / "once")


def stopped(tmp_path, monkeypatch, **flags):
    """Stop a run after some thousand tokens."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", 10_000)
    write_jsonl(tmp_path / "a.jsonl", make_articles(300, words=100))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after(patched, 3)
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **flags))


@pytest.mark.parametrize(("first", "then"), [(90_000, 60_000), (60_000, 90_000), (None, 60_000), (60_000, None)])
@pytest.mark.parametrize("more", [{}, {"tokenizer": "train", "vocab_size": 300}], ids=["bytes", "train"])
def test_max_tokens_may_change_while_it_has_not_been_reached(tmp_path, monkeypatch, first, then, more):
    stopped(tmp_path, monkeypatch, max_tokens=first, **more)
    with pytest.raises(UserError, match="--max-tokens"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", max_tokens=2000, **more))  # more is done
    for folder in ("out", "once"):
        prepare(config(tmp_path / folder, tmp_path / "a.jsonl", max_tokens=then, **more))
    assert files(tmp_path / "out") == files(tmp_path / "once")


def test_max_tokens_stays_where_the_end_of_the_text_is_held_out(tmp_path, monkeypatch):
    """Another number might not have led to that, and a tokenizer would have learned from another sample."""
    monkeypatch.setattr(LocalFiles, "has_few_documents", lambda self: True)
    stopped(tmp_path, monkeypatch, max_tokens=90_000)
    with pytest.raises(UserError, match="half done, with --max-tokens 90000, not 80000"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", max_tokens=80_000))


def test_a_folder_takes_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "LOCK_SECONDS", 0.1)
    write_jsonl(tmp_path / "a.jsonl", make_articles(50))
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", "--data-dir", "not here"), pytest.raises(UserError, match="another"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))


# ----------------------------------------------------------------------------------------------------------------------
# The disk is full


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 2 MB, and a function that makes it 100 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip(reason="mounting a tmpfs needs root on Linux")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
    subprocess.run(["umount", folder], check=True)


def assert_resumes_after(reason, tmp_path, folder, result):
    """The message names the reason. With room on the disk, its command makes the files of an undisturbed run."""
    assert_user_error(result, "--data-dir", f"could not be written ({reason})", "make room", "finished work is kept")
    assert not list(folder.glob("*.bin"))
    again = shlex.split(result.stderr.split("Continue: python ")[1])
    assert again == command(folder, tmp_path / "a.jsonl")
    result = run_script(*again)
    assert result.returncode == 0, result.stderr
    prepare(config(tmp_path / "once", tmp_path / "a.jsonl"))
    assert files(folder) == files(tmp_path / "once")


@posix
def test_a_file_size_limit_is_one_message_and_the_run_resumes(tmp_path):
    import resource

    write_jsonl(tmp_path / "a.jsonl", make_articles(5000))
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))}
    result = run_script(*command(tmp_path / "out", tmp_path / "a.jsonl"), **limit)
    assert_resumes_after("File too large", tmp_path, tmp_path / "out", result)


@posix
def test_a_full_disk_is_one_message_and_the_run_resumes(tmp_path, tmpfs):
    disk, make_room = tmpfs
    write_jsonl(tmp_path / "a.jsonl", make_articles(5000))
    result = run_script(*command(disk / "out", tmp_path / "a.jsonl"))
    make_room()
    assert_resumes_after("No space left on device", tmp_path, disk / "out", result)


def test_a_disk_that_is_too_small_is_noticed_early(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_articles(5000))
    monkeypatch.setattr(progress, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(progress.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"GB more, but only.*--max-tokens"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))


def display_of_downloads(folder, keep=False, bytes_on_disk=0):
    """20 million tokens are to come, 40 MB, and downloads of 1 GB. 10 million are done."""
    cfg = dataclasses.replace(config(folder, "sample"), keep_downloads=keep)
    source = SimpleNamespace(
        files=[SimpleNamespace(bytes=10**9)], peak_bytes=10**9, bytes_on_disk=bytes_on_disk, missing_bytes=10**9,
        seconds_per_byte=0.0, download_folder=folder,
    )  # fmt: skip
    noted = progress.Progress()
    noted.splits["train"].tokens = 10_000_000
    return progress.Display(cfg, source, noted)


@pytest.mark.parametrize(("here", "left"), [(0, "0.67"), (4 * 10**8, "0.27"), (10**9, "0.00")])
def test_what_has_been_downloaded_is_not_still_to_download(tmp_path, monkeypatch, capsys, here, left):
    monkeypatch.setattr(progress.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**10))
    display_of_downloads(tmp_path, bytes_on_disk=here).print_needs(1e6, position=330_000_000)
    assert f" {left} GB still to download" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("keep", [False, True])
def test_a_disk_that_the_downloads_fill_has_no_room_for_fewer_tokens(tmp_path, monkeypatch, keep):
    display = display_of_downloads(tmp_path, keep)
    for free, words in ((900_000_000, "make room"), (1_020_000_000, "make room, or start again with --overwrite")):
        monkeypatch.setattr(progress.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(UserError) as error:
            display.print_needs(1e6, position=330_000_000)
        assert str(error.value).endswith(
            f"{words}{' --max-tokens 18000000' * ('again' in words)}{', or leave --keep-downloads out' * keep}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C


@pytest.fixture(scope="module")
def many_articles(tmp_path_factory):
    """Enough for a second or more."""
    path = tmp_path_factory.mktemp("many") / "a.parquet"
    write_parquet(path, make_articles(600) * 100)
    return path


@posix
@pytest.mark.parametrize("seconds", [0, 0.02, 0.1, 0.3])  # the threads start, the threads work
def test_ctrl_c(tmp_path, many_articles, seconds):
    process = start_script(command(tmp_path / "out", many_articles))
    wait_for(tmp_path / "out" / "progress.json", process)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)  # like a terminal
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    words = shlex.join(["prepare_data.py", *map(str, command(tmp_path / "out", many_articles)[1:])])
    assert stderr.strip().splitlines() == [f"Stopped; finished work is kept. Continue: python {words}"]


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(28, "No space left on device"), UserError("a.jsonl: is damaged")], ids=repr
)
def test_the_command_that_continues_after_overwrite_keeps_the_new_work(tmp_path, monkeypatch, failure):
    write_jsonl(tmp_path / "a.jsonl", make_articles(200))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    plain = command(tmp_path / "out", tmp_path / "a.jsonl")

    def fail(self):
        self.progress.end = ""  # as if there were more text
        raise failure

    ended = pytest.raises((UserError, KeyboardInterrupt), match=r"(?i)finished work is kept")
    with monkeypatch.context() as patched, ended as error:
        patched.setattr(sys, "argv", [*plain, "--overwrite"])
        patched.setattr(Pipeline, "finish", fail)
        patched.setattr(prepare_data, "HubWikipedia", LocalFiles)  # only the hub's files are mended by waiting
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", overwrite=True))
    assert shlex.split(str(error.value).split("Continue: ")[1])[2:] == plain[1:]
    result = run_script(*plain)
    assert result.returncode == 0 and "resuming" in result.stdout, result.stderr


def test_a_text_that_proves_too_short_is_not_continued(tmp_path, monkeypatch):
    """A Wikipedia of the hub counts as long until all of it is read. The same command would end there again."""
    write_jsonl(tmp_path / "a.jsonl", [{"id": "1", "text": "Only this."}])
    monkeypatch.setattr(LocalFiles, "counts_as_long", True)
    with pytest.raises(UserError, match=r"give more text\. .*; changed ones need --overwrite$"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))


def test_the_command_that_continues_after_the_last_shard_keeps_it(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_articles(200))
    plain = command(tmp_path / "out", tmp_path / "a.jsonl")

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="Continue: ") as error:
        patched.setattr(sys, "argv", [*plain, "--overwrite"])
        patched.setattr(prepare_data.DataFolder, "delete_unfinished", stop)
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", overwrite=True))
    assert shlex.split(str(error.value).split("Continue: ")[1])[2:] == plain[1:]
    assert read_meta(tmp_path / "out")["end"] == "source"


def test_a_stop_before_the_old_shards_are_deleted_changes_nothing(tmp_path, monkeypatch):
    """No command is advised: without --overwrite it would say that the old folder is finished."""
    write_jsonl(tmp_path / "a.jsonl", make_articles(200))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    before = files(tmp_path / "out")

    def stop(self, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalFiles, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", overwrite=True))
    assert files(tmp_path / "out") == before
