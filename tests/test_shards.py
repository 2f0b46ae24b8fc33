"""internals/shards.py: the shard format, the writer, and meta.json."""

import errno
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, random_tokens, write_splits

from internals.shards import HEADER_BYTES, ShardWriter, read_meta, read_shard, read_tokenizer, shard_header, verify
from internals.start import UserError
from internals.windows import TokenStream


def write_shards(folder, split, tokens, shard_tokens=100):
    writer = ShardWriter(folder, split, shard_tokens)
    for start in range(0, len(tokens), 37):  # these pieces cross the ends of shards
        writer.write(tokens[start : start + 37])
    return writer.finish()


def test_shards_have_the_layout_of_llm_c(tmp_path):
    tokens = random_tokens(250)
    entries = write_shards(tmp_path, "train", tokens)
    assert [(e["file"], e["tokens"]) for e in entries] == [
        ("train_000000.bin", 100), ("train_000001.bin", 100), ("train_000002.bin", 50),
    ]  # fmt: skip
    got = []
    for entry in entries:
        raw = (tmp_path / entry["file"]).read_bytes()
        header = [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, 1024, 4)]
        assert header == [20240520, 1, entry["tokens"], *[0] * 253]
        got += [int.from_bytes(raw[i : i + 2], "little") for i in range(1024, len(raw), 2)]
        assert entry["sha256"] == hashlib.sha256(raw).hexdigest()
    assert got == tokens.tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == [e["file"] for e in entries]


@pytest.mark.parametrize("kept", [0, 1, 99, 100, 101, 200, 249])
def test_a_writer_resumes_from_any_length(tmp_path, kept):
    tokens = random_tokens(250)
    writer = ShardWriter(tmp_path, "train", 100)
    writer.write(tokens)
    writer.close()
    writer = ShardWriter(tmp_path, "train", 100, tokens=kept)
    writer.write(tokens[kept:])
    writer.finish()
    stream = TokenStream([read_shard(path) for path in sorted(tmp_path.glob("*.bin"))])
    assert np.array_equal(stream.read(0, 250), tokens)


def test_a_writer_resumes_after_a_stop_in_finish(tmp_path):
    tokens = random_tokens(250)
    entries = write_shards(tmp_path, "train", tokens)
    (tmp_path / "train_000001.bin").rename(tmp_path / "train_000001.bin.partial")
    assert ShardWriter(tmp_path, "train", 100, tokens=250).finish() == entries


def test_a_writer_refuses_files_that_are_too_short(tmp_path):
    writer = ShardWriter(tmp_path, "train", 100)
    writer.write(random_tokens(150))
    writer.close()
    with pytest.raises(UserError, match=r"train_000001\.bin"):
        ShardWriter(tmp_path, "train", 100, tokens=151)


def test_a_power_cut_leaves_whole_shards(tmp_path, monkeypatch):
    """Tokens and header are on the disk before a shard gets its name."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.fstat(file).st_size), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    full, last = HEADER_BYTES + 2 * 100, HEADER_BYTES + 2 * 30
    writer = ShardWriter(tmp_path, "train", 100)
    writer.write(random_tokens(130))
    assert calls == [full]  # a full shard is closed
    writer.sync()
    assert calls == [full, last]
    writer.finish()
    assert calls == [full, last, last, full, "rename", last, "rename"]


def test_the_tail_of_a_split(tmp_path):
    tokens = random_tokens(350)
    writer = ShardWriter(tmp_path, "train", 100)
    writer.write(tokens)
    for length in (1, 50, 51, 149, 150, 151, 350):
        assert np.array_equal(np.concatenate(list(writer.tail(length))), tokens[-length:])


@pytest.mark.parametrize("name", ["cut", "long", "empty", "other", "missing", "unfinished"])
def test_a_file_that_is_not_a_whole_shard_is_refused(tmp_path, name):
    path = tmp_path / "train_000000.bin"
    whole = shard_header(100) + bytes(200)
    content = {
        "cut": whole[:-1], "long": whole + b"\0\0", "empty": b"", "other": b"x" * 2000, "unfinished": bytes(1024) + bytes(200),
    }  # fmt: skip
    if name != "missing":
        path.write_bytes(content[name])
    with pytest.raises(UserError, match=r"train_000000\.bin"):
        read_shard(path)
    path.write_bytes(whole)
    assert len(read_shard(path)) == 100


def test_meta_of_a_finished_folder(tmp_path):
    write_splits(tmp_path, {"train": random_tokens(250), "val": random_tokens(30)}, shard_tokens=100)
    assert read_meta(tmp_path)["splits"]["train"]["tokens"] == 250
    assert len(TokenStream.open(tmp_path, "train")) == 250
    assert len(TokenStream.open(tmp_path, "val")) == 30


def test_the_token_files_of_other_programs_are_named(tmp_path):
    (tmp_path / "train.bin").write_bytes(random_tokens(10).tobytes())  # nanoGPT's
    with pytest.raises(
        UserError, match=r"another program \(train\.bin\).*give their text as --source, with another --data-dir"
    ):
        read_meta(tmp_path)


def test_a_folder_that_is_beside_the_commands_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=f"--data-dir sample: there is no such folder; it is in {re.escape(str(REPO))}: change"
    ):
        read_meta("sample")


def test_folders_that_are_not_finished(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_meta(tmp_path / "none")
    with pytest.raises(UserError, match="no prepared data"):
        read_meta(tmp_path)
    ShardWriter(tmp_path, "train", 100).write(random_tokens(10))
    with pytest.raises(UserError, match="not finished"):
        read_meta(tmp_path)
    for content in ("{", "[]", "{}", '{"format": 99}', '{"format": 1, "tokenizer": "bytes"}'):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(UserError, match=r"meta\.json"):
            read_meta(tmp_path)
    (tmp_path / "meta.json").write_text('{"format": "1"}')
    with pytest.raises(UserError, match="format '1', but this version reads 1"):
        read_meta(tmp_path)


@pytest.mark.parametrize(
    ("place", "name", "values"),
    [
        ([], "source", [None, {}, "files", {"kind": "hub"}, *({"kind": "hub", "bytes": n} for n in ("x", None, 0))]),
        ([], "tokenizer", [None, 5]),
        ([], "vocab_size", ["abc", -1, None, 1024.0, 10, 65_537]),
        ([], "splits", [[], {}, None]),
        (["splits"], "val", [None, {}, []]),
        (["splits", "train"], "shards", [None, {}, "x", [None], [{}]]),
        (["splits", "train"], "tokens", [None, "x", 1.5]),
        (["splits", "val"], "articles", [None]),
        (["splits", "val"], "bytes", [None, 0]),
        (["splits", "val", "shards", 0], "tokens", [None, "1"]),
        (["splits", "val", "shards", 0], "file", [None, 1]),
        (["splits", "val", "shards", 0], "sha256", [None]),
    ],
)
def test_a_damaged_meta_is_refused(tmp_path, place, name, values):
    write_splits(tmp_path, {"train": random_tokens(250), "val": random_tokens(30)})
    whole = (tmp_path / "meta.json").read_text()
    for value in values:
        meta = json.loads(whole)
        part = meta
        for key in place:
            part = part[key]
        part[name] = value
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(UserError, match=rf"meta\.json: .*{name}"):
            read_meta(tmp_path)
        if value is None:
            del part[name]
            (tmp_path / "meta.json").write_text(json.dumps(meta))
            with pytest.raises(UserError, match=rf"meta\.json: .*{name}"):
                read_meta(tmp_path)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    write_splits(tmp_path, {"train": random_tokens(250), "val": random_tokens(30)})

    def refuse(path, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    for read in (read_meta, lambda folder: read_tokenizer(folder, {"tokenizer_sha256": "0"})):
        with pytest.raises(UserError, match=r"json: cannot be read \(Permission denied\); make it readable$"):
            read(tmp_path)


def test_a_flipped_bit_in_any_shard_is_found(tmp_path):
    write_splits(tmp_path, {"train": random_tokens(250), "val": random_tokens(150)}, shard_tokens=100)
    verify(tmp_path)
    for path in sorted(tmp_path.glob("*.bin")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{path.name}: is damaged"):
            verify(tmp_path)
        path.write_bytes(whole)


def test_a_shard_of_another_length_than_meta_says_is_refused(tmp_path):
    write_splits(tmp_path, {"train": random_tokens(250), "val": random_tokens(30)}, shard_tokens=100)
    (tmp_path / "train_000001.bin").write_bytes(shard_header(99) + bytes(198))
    with pytest.raises(UserError, match=r"train_000001\.bin"):
        TokenStream.open(tmp_path, "train")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENODEV, "copy the data folder to a local disk"),  # a network drive that cannot map files
        (errno.EMFILE, r"ulimit -n 4096.*--shard-tokens"),
    ],
)
def test_a_shard_that_cannot_be_mapped_is_one_message(tmp_path, monkeypatch, number, advice):
    write_shards(tmp_path, "train", random_tokens(50))

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(UserError, match=advice) as error:
        read_shard(tmp_path / "train_000000.bin")
    assert os.strerror(number) in str(error.value) and "--overwrite" not in str(error.value)


def test_a_shard_that_another_program_holds_for_a_moment_gets_its_name(tmp_path, monkeypatch):
    """A virus scanner, on Windows. Two renames: at the end, and when a stop there is resumed."""
    replace, refused = os.replace, set()

    def refuse_once(path, new):
        if path not in refused:
            refused.add(path)
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(path, new)

    monkeypatch.setattr(os, "replace", refuse_once)
    tokens = random_tokens(50)
    entries = write_shards(tmp_path, "train", tokens)
    assert ShardWriter(tmp_path, "train", 100, tokens=50).finish() == entries
    assert len(refused) == 2 and np.array_equal(read_shard(tmp_path / "train_000000.bin"), tokens)
