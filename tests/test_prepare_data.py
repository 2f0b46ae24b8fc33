"""prepare_data.py: the contents of the shards, whatever happens on the way."""

import dataclasses
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from articles import (
    as_text,
    command,
    config,
    files,
    make_articles,
    posix,
    start_script,
    texts,
    write_jsonl,
    write_parquet,
)
from conftest import REPO, assert_user_error, needs_gpt2, needs_wikipedia, run_script

import prepare_data
from config import PRESETS, PrepareConfig
from internals import progress, reader
from internals.articles import is_held_out
from internals.cli import parse
from internals.files import locked
from internals.shards import read_meta
from internals.start import UserError
from internals.text_files import LocalFiles
from internals.tokenizer import load_tokenizer
from internals.windows import TokenStream
from prepare_data import Pipeline, make_source, prepare


def test_the_sample(tmp_path):
    folder = tmp_path / "demo"
    first = run_script("prepare_data.py", "--preset", "demo", "--data-dir", folder)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""  # no bars without a terminal
    meta, before = read_meta(folder), files(folder)
    rows = [json.loads(line) for line in (REPO / "sample" / "articles.jsonl").read_text(encoding="utf-8").splitlines()]
    train, val = texts(folder, "train"), texts(folder, "val")
    assert sorted(train + val) == sorted(map(as_text, rows))
    assert [as_text(row) for row in rows if as_text(row) in set(train)] == train  # in the order of the source
    assert 0.05 < len(val) / len(rows) < 0.15
    for split, got in (("train", train), ("val", val)):
        counts = meta["splits"][split]
        assert counts["articles"] == len(got)
        assert counts["bytes"] == sum(len(text.encode()) for text in got)
        assert counts["tokens"] == sum(s["tokens"] for s in counts["shards"]) < counts["bytes"] / 2.5
        for shard in counts["shards"]:
            assert shard["sha256"] == before[shard["file"]]
    assert (meta["tokenizer"], meta["vocab_size"], meta["source"]["kind"]) == ("own", 2048, "sample")

    again = run_script("prepare_data.py", "--preset", "demo", "--data-dir", folder)
    assert again.returncode == 0 and "finished" in again.stdout
    other = run_script("prepare_data.py", "--preset", "demo", "--data-dir", folder, "--val-fraction", "0.5")
    assert_user_error(other, "--val-fraction", "--overwrite")
    assert files(folder) == before
    anew = run_script(
        "prepare_data.py", "--preset", "demo", "--data-dir", folder, "--val-fraction", "0.5", "--overwrite"
    )
    assert anew.returncode == 0
    assert read_meta(folder)["val_fraction"] == 0.5


def test_any_number_of_workers_makes_the_same_files(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", make_articles(2000, seed=1), row_group_size=700)
    write_jsonl(tmp_path / "in" / "b.jsonl", make_articles(1500, seed=2))
    for workers in (1, 3):
        prepare(config(tmp_path / f"{workers}", tmp_path / "in", workers=workers, shard_tokens=1_000_000))
    assert files(tmp_path / "1") == files(tmp_path / "3")
    assert len(read_meta(tmp_path / "1")["splits"]["train"]["shards"]) > 2


def test_the_split_depends_on_the_id_alone(tmp_path):
    rows = make_articles(400)
    changed = [{**row, "text": "Something else.", "title": f"T{row['id']}"} for row in rows[::-2]]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_parquet(tmp_path / "b.parquet", changed + changed)  # repeated ids: nothing is merged or dropped
    prepare(config(tmp_path / "a", tmp_path / "a.jsonl"))
    prepare(config(tmp_path / "b", tmp_path / "b.parquet"))
    held_out = {text.split("\n")[0].split("/")[1] for text in texts(tmp_path / "a", "val")}
    assert 40 < len(held_out) < 120
    got = texts(tmp_path / "b", "val")
    assert sorted(got) == sorted(as_text(row) for row in changed * 2 if row["id"] in held_out)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_the_end_of_one_document_is_held_out(tmp_path, kind, monkeypatch):
    text = " ".join(row["text"] for row in make_articles(2000))
    assert len(text.encode()) > 2 * reader.CHUNK_BYTES
    path = tmp_path / f"book.{kind}"
    path.write_text(text if kind == "txt" else json.dumps({"text": text}), encoding="utf-8")
    prepare(config(tmp_path / "out", path, val_fraction=0.25, shard_tokens=300_000))
    train, val = (TokenStream.open(tmp_path / "out", split) for split in ("train", "val"))
    tokens = np.concatenate([train.read(0, len(train)), val.read(0, len(val))])
    assert tokens.tolist() == [*text.encode(), 256]
    assert len(val) == int(len(tokens) * 0.25)
    splits = read_meta(tmp_path / "out")["splits"]
    assert [splits[split]["bytes"] for split in splits] == [len(train), len(val) - 1]
    prepare(config(tmp_path / "one", path, val_fraction=0.25, shard_tokens=300_000, workers=1))
    assert files(tmp_path / "one") == files(tmp_path / "out")


def test_max_tokens_ends_with_a_whole_article(tmp_path):
    rows = make_articles(3000)
    write_parquet(tmp_path / "a.parquet", rows)
    prepare(config(tmp_path / "all", tmp_path / "a.parquet"))
    prepare(config(tmp_path / "some", tmp_path / "a.parquet", max_tokens=100_000))
    assert read_meta(tmp_path / "all")["end"] == "source"
    meta = read_meta(tmp_path / "some")
    assert (meta["end"], meta["max_tokens"]) == ("max_tokens", 100_000)
    got = {split: texts(tmp_path / "some", split) for split in ("train", "val")}
    for split, some in got.items():
        assert some == texts(tmp_path / "all", split)[: len(some)]
    total = sum(counts["tokens"] for counts in meta["splits"].values())
    count = len(got["train"]) + len(got["val"])
    assert sorted(got["train"] + got["val"]) == sorted(map(as_text, rows[:count]))
    assert total - len(as_text(rows[count - 1]).encode()) - 1 < 100_000 <= total


@needs_gpt2
@needs_wikipedia
def test_real_articles_come_back_exactly(tmp_path):
    source = os.environ["WIKIPEDIA_SAMPLE_DIR"]
    prepare(PrepareConfig(source=source, data_dir=str(tmp_path)))
    rows = [row for path in sorted(os.listdir(source)) if path.endswith(".parquet")
            for row in pq.read_table(os.path.join(source, path), columns=["id", "title", "text"]).to_pylist()]  # fmt: skip
    meta = read_meta(tmp_path)
    assert sum(counts["articles"] for counts in meta["splits"].values()) == len(rows) - meta["empty"]
    assert sum(counts["bytes"] for counts in meta["splits"].values()) == sum(len(as_text(r).encode()) for r in rows)
    tokenizer, borders, streams = load_tokenizer("gpt2"), {}, {}
    for split in ("train", "val"):
        streams[split] = stream = TokenStream.open(tmp_path, split)
        ends = np.flatnonzero(stream.read(0, len(stream)) == tokenizer.eot_token)
        borders[split] = np.concatenate([[0], ends + 1])
        assert len(ends) == meta["splits"][split]["articles"]
    place, order = {"train": 0, "val": 0}, []
    for row in rows:
        split = "val" if is_held_out(row["id"].encode(), 0.005) else "train"
        order.append((row, split, place[split]))
        place[split] += 1
    for row, split, n in random.Random(0).sample(order, 1000):
        start, end = borders[split][n : n + 2]
        assert tokenizer.decode(streams[split].read(start, end - start - 1).tolist()) == as_text(row)


def test_empty_articles_are_left_out_and_counted(tmp_path):
    rows = make_articles(50)
    odd = [
        {"id": "x", "title": "T", "text": ""},
        {"id": "y", "title": "T", "text": " \n\t\u3000"},
        {"id": "z", "text": None},
    ]
    write_jsonl(tmp_path / "in.jsonl", odd + rows)
    result = run_script(*command(tmp_path / "out", tmp_path / "in.jsonl"))
    assert result.returncode == 0, result.stderr
    assert "left out 3 articles without text" in result.stdout
    assert read_meta(tmp_path / "out")["empty"] == 3
    assert len(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == 50


@pytest.mark.parametrize("rows, fraction", [(3, 0.0001), (3, 0.9999), (1, 0.001)])
def test_a_split_without_text_names_the_flag(tmp_path, rows, fraction):
    write_jsonl(tmp_path / "a.jsonl", [{"id": "1", "text": "short"}] * rows)
    with pytest.raises(UserError, match=f"--val-fraction {fraction}"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", val_fraction=fraction))


def test_a_source_without_any_text(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    (tmp_path / "b.txt").write_text(" \n")
    for name in ("a.jsonl", "b.txt"):
        with pytest.raises(UserError, match="--source"):
            prepare(config(tmp_path / name[0], tmp_path / name))


def test_flags(tmp_path):
    for flags in ("--workers 0", "--workers 257", "--val-fraction 1", "--max-tokens -5", "--no-such", "--tokenizer x"):
        result = run_script("prepare_data.py", "--data-dir", tmp_path / "out", *flags.split())
        assert_user_error(result, flags.split()[0])


def test_help_names_everything_and_needs_neither_torch_nor_datasets():
    code = (
        "import sys, prepare_data\nfrom config import PrepareConfig\nfrom internals import cli\n"
        "try: prepare_data.prepare(cli.parse(PrepareConfig, ''))\n"
        "finally: print([m for m in ('torch', 'datasets', 'huggingface_hub') if m in sys.modules])"
    )
    result = run_script("-c", code, "--help")
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "[]"
    for word in ("--source", ".parquet", ".jsonl", ".txt", "--text-column", "--max-tokens", "wikipedia", "sample"):
        assert word in result.stdout


def test_a_damaged_folder_is_not_called_finished(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_articles(50))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    os.truncate(tmp_path / "out" / "val_000000.bin", 2000)
    with pytest.raises(UserError, match=r"val_000000\.bin"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))


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


def test_another_command_is_refused_half_way(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*make_articles(5000), {"no": "text"}])
    with pytest.raises(UserError, match="line 5001"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    state = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert state["splits"]["train"]["tokens"] > 1_000_000  # what was done is kept
    for other in ({"val_fraction": 0.1}, {"text_column": "x"}, {"shard_tokens": 7}, {"max_tokens": 10**9}):
        with pytest.raises(UserError, match="--" + next(iter(other)).replace("_", "-")):
            prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **other))
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


def test_a_folder_takes_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "LOCK_SECONDS", 0.1)
    write_jsonl(tmp_path / "a.jsonl", make_articles(50))
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", "--data-dir", "not here"), pytest.raises(UserError, match="another"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))


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
        raise failure

    ended = pytest.raises((UserError, KeyboardInterrupt), match=r"(?i)finished work is kept")
    with monkeypatch.context() as patched, ended as error:
        patched.setattr(sys, "argv", [*plain, "--overwrite"])
        patched.setattr(Pipeline, "finish", fail)
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", overwrite=True))
    assert shlex.split(str(error.value).split("Continue: ")[1])[2:] == plain[1:]
    result = run_script(*plain)
    assert result.returncode == 0 and "resuming" in result.stdout, result.stderr


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


@pytest.mark.parametrize("keep", [False, True])
def test_a_disk_that_the_downloads_fill_has_no_room_for_fewer_tokens(tmp_path, monkeypatch, keep):
    """20 million tokens are to come, 40 MB, and downloads of 1 GB."""
    cfg = dataclasses.replace(config(tmp_path, "sample"), keep_downloads=keep)
    source = SimpleNamespace(
        files=[SimpleNamespace(bytes=100)], peak_bytes=10**9, bytes_on_disk=0, missing_bytes=10**9, seconds_per_byte=0.0,
        download_folder=tmp_path,
    )  # fmt: skip
    noted = progress.Progress()
    noted.splits["train"].tokens = 10_000_000
    display = progress.Display(cfg, source, noted)
    for free, words in ((900_000_000, "make room"), (1_020_000_000, "make room, or start again with --overwrite")):
        monkeypatch.setattr(progress.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(UserError) as error:
            display.print_needs(1e6, position=33)
        assert str(error.value).endswith(
            f"{words}{' --max-tokens 18000000' * ('again' in words)}{', or leave --keep-downloads out' * keep}"
        )


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "my.txt").write_text("mine")
    with pytest.raises(UserError, match=r"^--data-dir .*my\.txt: is a file; give a folder$"):
        prepare(config(tmp_path / "my.txt", "sample"))
    assert (tmp_path / "my.txt").read_text() == "mine"


@posix
def test_a_dangling_link_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    for folder in (tmp_path / "link", tmp_path / "link" / "out"):
        with pytest.raises(UserError, match=r"^--data-dir .*link: is a link to something that is gone; give a folder$"):
            prepare(config(folder, "sample"))


@pytest.mark.parametrize(
    ("ending", "flag", "reason"),
    [
        ("parquet", {"encoding": "cp1252"}, "always UTF-8"),
        ("parquet", {"separator": "---"}, "no .txt file"),
        ("jsonl", {"separator": "---"}, "no .txt file"),
        ("txt", {"text_column": "body"}, "no columns"),
        ("txt", {"language": "de"}, "only for --source wikipedia, but the source is"),
        ("jsonl", {"dump": "20200101"}, "only for --source wikipedia"),
        ("parquet", {"revision": "x"}, "only for --source wikipedia"),
        ("txt", {"keep_downloads": True}, "only for --source wikipedia"),
    ],
)
def test_a_flag_that_the_source_does_not_use_is_refused(tmp_path, ending, flag, reason):
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        write_parquet(path, make_articles(100))
    else:
        write_jsonl(path, make_articles(100))
    name = next(iter(flag)).replace("_", "-")
    with pytest.raises(UserError, match=rf"^--{name}: .*{re.escape(reason)}.*; leave the flag out$"):
        prepare(config(tmp_path / "out", path, **flag))
    assert not files(tmp_path / "out")


def test_a_value_of_the_preset_is_not_a_flag(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "demo", {**PRESETS["demo"], "language": "simple"})
    cfg = parse(PrepareConfig, "", ["--preset", "demo", "--data-dir", str(tmp_path / "out")])
    assert cfg.language == "simple" and make_source(cfg, tmp_path).files
