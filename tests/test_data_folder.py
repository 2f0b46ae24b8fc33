"""internals/data_folder.py: a user's files stay, whatever their names, and the command says which of them is in its way."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from articles import config, files, make_articles, write_jsonl

from internals.data_folder import DOWNLOADS, DataFolder, Downloads
from internals.shards import UNFINISHED_HEADER, ShardWriter, read_meta, shard_header
from internals.start import UserError
from prepare_data import prepare

FOREIGN = {
    "train_000003.bin": b"mine",
    "train_000000.bin": shard_header(4) + bytes(8),  # llm.c writes this format, too
    "val_000000.bin.partial": b"mine",
    "train_000000.bin.partial": bytes(1024) + b"mine",
    "meta.json": b'{"mine": 1}',
    "progress.json": b'{"format": 1}',
    "meta.json.tmp": b"mine",
    "progress.json.tmp": b'{"mine": 1}',
    DOWNLOADS: b"a file",
}
HARMLESS = ("downloads/a.parquet", "downloads/b/c.txt", "val_x.bin.partial", "train_1.bin", "train_000001.bin.old", "notes.txt",
            "tokenizer.json", "my_train_000000.bin", ".cache/x")  # fmt: skip


@pytest.fixture
def source(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_articles(60))
    return tmp_path / "a.jsonl"


def put(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(names[name] if isinstance(names, dict) else name.encode())
    return files(folder)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_in_the_way_is_named_and_stays(tmp_path, source, name, overwrite):
    before = put(tmp_path / "out", {name: FOREIGN[name]})
    with pytest.raises(UserError, match=name):
        prepare(config(tmp_path / "out", source, overwrite=overwrite))
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("name", sorted(FOREIGN.keys() - {"meta.json", "train_000000.bin"}))
def test_a_foreign_file_in_a_finished_folder_stays(tmp_path, source, name):
    prepare(config(tmp_path / "out", source))
    before = put(tmp_path / "out", {name: FOREIGN[name]})
    prepare(config(tmp_path / "out", source))  # nothing to do
    with pytest.raises(UserError, match=name):
        prepare(config(tmp_path / "out", source, overwrite=True))
    assert files(tmp_path / "out") == before


def test_other_files_stay_through_everything(tmp_path, source):
    mine = put(tmp_path / "out", HARMLESS)
    for overwrite in (False, False, True):
        prepare(config(tmp_path / "out", source, overwrite=overwrite))
        assert mine.items() <= files(tmp_path / "out").items()
    assert read_meta(tmp_path / "out")["splits"]


def test_a_shard_of_ours_that_is_damaged_can_be_made_again(tmp_path, source):
    prepare(config(tmp_path / "out", source))
    before = files(tmp_path / "out")
    path = tmp_path / "out" / "train_000000.bin"
    for size in (2000, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match="--overwrite"):
            prepare(config(tmp_path / "out", source))
        prepare(config(tmp_path / "out", source, overwrite=True))
    path.unlink()
    prepare(config(tmp_path / "out", source, overwrite=True))
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("begun", [b"", UNFINISHED_HEADER[:100], UNFINISHED_HEADER + b"tokens"])
def test_an_unfinished_shard_of_a_killed_run_is_ours(tmp_path, source, begun):
    put(tmp_path / "out", {"train_000000.bin.partial": begun})
    prepare(config(tmp_path / "out", source))
    assert read_meta(tmp_path / "out")["end"] == "source"


def test_a_half_done_folder_of_another_version_can_be_made_again(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", make_articles(60))
    write_jsonl(tmp_path / "in" / "b.jsonl", [*make_articles(60, seed=1), {"no": "text"}])
    with pytest.raises(UserError, match="line 61"):
        prepare(config(tmp_path / "out", tmp_path / "in", workers=1))
    path = tmp_path / "out" / "progress.json"
    saved = json.loads(path.read_text())
    del saved["repaired_files"]
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"progress\.json: was written by another version .*give --overwrite"):
        prepare(config(tmp_path / "out", tmp_path / "in", workers=1))
    with pytest.raises(UserError, match="line 61"):
        prepare(config(tmp_path / "out", tmp_path / "in", workers=1, overwrite=True))


def test_a_link_is_deleted_and_what_it_leads_to_stays(tmp_path, source):
    prepare(config(tmp_path / "out", source))
    path = tmp_path / "out" / "train_000000.bin"
    path.rename(tmp_path / "moved.bin")
    path.symlink_to(tmp_path / "moved.bin")
    prepare(config(tmp_path / "out", source, overwrite=True))
    assert (tmp_path / "moved.bin").exists() and not path.is_symlink()


def test_downloads_behind_a_link_stay(tmp_path):
    mine = put(tmp_path / "elsewhere", ["c/a.parquet"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / DOWNLOADS).symlink_to(tmp_path / "elsewhere")
    Downloads(tmp_path / "out").delete(["c/a.parquet"])
    Downloads(tmp_path / "out").delete_all()
    assert files(tmp_path / "elsewhere") == mine


def test_a_download_that_another_program_holds_open_is_deleted_later(tmp_path, monkeypatch):
    put(tmp_path / "out" / DOWNLOADS, ["c/a.parquet"])
    unlink, held = Path.unlink, [True]

    def busy(path, missing_ok=False):
        if held:
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", busy)
    Downloads(tmp_path / "out").delete(["c/a.parquet"])
    held.clear()
    Downloads(tmp_path / "out").delete(["c/a.parquet"])  # prepare_data.py names earlier files again
    assert not files(tmp_path / "out")


@pytest.mark.parametrize("name", ["Meta.json", "PROGRESS.JSON", "Train_000000.bin"])
def test_a_foreign_file_in_the_way_may_have_capitals(tmp_path, source, monkeypatch, name):
    """On Windows and on a Mac, `Meta.json` and `meta.json` are one file."""
    put(tmp_path / "out", {name: b"mine"})
    if not (tmp_path / "out" / name.lower()).exists():
        (tmp_path / "out" / name.lower()).symlink_to(tmp_path / "out" / name)
        monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / name]))  # such a system lists one name
    with pytest.raises(UserError, match=name):
        DataFolder(tmp_path / "out").refuse_foreign(own_tokenizer=False)


def test_a_name_that_is_taken_meanwhile_is_not_overwritten(tmp_path):
    writer = ShardWriter(tmp_path, "train", 100)
    writer.write(np.zeros(10, np.uint16))
    (tmp_path / "train_000000.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"train_000000\.bin"):
        writer.finish()
    assert (tmp_path / "train_000000.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("mistake", [{"source": "nowhere.txt"}, {"text_column": "body"}, {"encoding": "utf-16-be"}])
def test_overwriting_with_a_mistake_costs_nothing(tmp_path, source, mistake):
    prepare(config(tmp_path / "out", source))
    before = files(tmp_path / "out")
    given = {"source": source, **mistake}
    with pytest.raises(UserError):
        prepare(config(tmp_path / "out", overwrite=True, **given))
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    "text, mistake",
    [
        ("", {}),
        ("Only this.", {}),
        ("word " * 8000, {"val_fraction": 0.005}),
        ("word " * 8000, {"val_fraction": 0.9999}),
        ("word " * 8000, {"max_tokens": 500}),
    ],
)
def test_overwriting_with_a_text_that_is_too_short_costs_nothing(tmp_path, source, text, mistake):
    prepare(config(tmp_path / "out", source))
    before = files(tmp_path / "out")
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError):
        prepare(config(tmp_path / "out", tmp_path / "a.txt", overwrite=True, **mistake))
    assert files(tmp_path / "out") == before


def test_a_deletion_that_is_killed_can_be_repeated(tmp_path, source, monkeypatch):
    cfg = config(tmp_path / "out", source, tokenizer="train", vocab_size=300, shard_tokens=10_000)
    prepare(cfg)
    want = files(tmp_path / "out")
    assert len(want) > 4
    unlink = Path.unlink
    for call in range(1, len(want) + 1):
        calls = []

        def stop(self, missing_ok=False, call=call, calls=calls):
            calls.append(self)
            if len(calls) == call:
                raise KeyboardInterrupt
            unlink(self, missing_ok)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "unlink", stop)
            prepare(dataclasses.replace(cfg, overwrite=True))
        assert files(tmp_path / "out").items() <= want.items()
        prepare(dataclasses.replace(cfg, overwrite=True))
        assert files(tmp_path / "out") == want


@pytest.mark.parametrize("source_entry", [{"name": "mine"}, {}, [], 7])
def test_a_meta_json_of_another_program_is_foreign(tmp_path, source, source_entry):
    mine = json.dumps({"format": 1, "tokenizer": "gpt2", "splits": {}, "source": source_entry}).encode()
    before = put(tmp_path / "out", {"meta.json": mine})
    with pytest.raises(UserError, match=r"meta\.json: is damaged, or not made by this command"):
        prepare(config(tmp_path / "out", source))
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_record_that_cannot_be_read_is_not_called_damaged(tmp_path, source, monkeypatch, overwrite):
    prepare(config(tmp_path / "out", source))

    def refuse(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"meta\.json: cannot be read \(Input/output error\); make it readable"):
        prepare(config(tmp_path / "out", source, overwrite=overwrite))


def test_a_folder_of_another_format_can_be_made_again(tmp_path, source):
    prepare(config(tmp_path / "out", source))
    path = tmp_path / "out" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(UserError, match=r"format 2, but this version reads 1; .*--overwrite"):
        prepare(config(tmp_path / "out", source))
    prepare(config(tmp_path / "out", source, overwrite=True))


def test_overwriting_an_own_tokenizer_with_a_mistake_costs_nothing(tmp_path, source):
    own = {"tokenizer": "train", "vocab_size": 300}
    prepare(config(tmp_path / "out", source, **own))
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match="pairs for"):
        prepare(config(tmp_path / "out", source, tokenizer="train", vocab_size=65_000, overwrite=True))
    assert files(tmp_path / "out") == before


def test_a_download_that_cannot_be_deleted_yet_is_named(tmp_path, monkeypatch, capsys):
    """Windows keeps the file that the background still writes."""
    put(tmp_path, [f"{DOWNLOADS}/c/a.parquet.incomplete"])

    def refuse(path, **kwargs):
        raise PermissionError(13, "The file is open in another process", path)

    with monkeypatch.context() as open_file:
        open_file.setattr(os, "unlink", refuse)
        Downloads(tmp_path).delete_all()
    assert str(tmp_path / DOWNLOADS) in (warning := capsys.readouterr().err) and "the same command" in warning
    Downloads(tmp_path).delete_all()
    assert not files(tmp_path) and capsys.readouterr().err == ""
