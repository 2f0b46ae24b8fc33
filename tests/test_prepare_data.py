"""prepare_data.py: the contents of the shards, and flags and sources that are refused."""

import errno
import json
import os
import random
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from articles import as_text, command, config, files, make_articles, posix, texts, write_jsonl, write_parquet
from conftest import REPO, assert_user_error, needs_gpt2, needs_wikipedia, run_script

import prepare_data
from config import PRESETS, PrepareConfig
from internals import progress, reader
from internals.articles import is_held_out
from internals.cli import parse
from internals.data_folder import DOWNLOADS
from internals.files import writing
from internals.progress import Progress
from internals.shards import read_meta
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.windows import TokenStream
from prepare_data import Pipeline, make_source, prepare

# ----------------------------------------------------------------------------------------------------------------------
# Contents


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


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("rows, fraction", [(3, 0.0001), (3, 0.9999), (1, 0.001)])
def test_a_split_without_text_names_the_flag(tmp_path, rows, fraction):
    write_jsonl(tmp_path / "a.jsonl", [{"id": "1", "text": "short"}] * rows)
    with pytest.raises(UserError, match=f"--val-fraction {fraction}"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", val_fraction=fraction))


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


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "my.txt").write_text("mine")
    with pytest.raises(UserError, match=r"^--data-dir .*my\.txt: is a file; give a folder$"):
        prepare(config(tmp_path / "my.txt", "sample"))
    assert (tmp_path / "my.txt").read_text() == "mine"


@posix
def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a file")
    with pytest.raises(
        UserError, match=r"^--data-dir .*out: could not be written .*; give a folder that you can write to"
    ):
        prepare(config(tmp_path / "a.txt" / "out", "sample"))


@posix
def test_a_dangling_link_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    for folder in (tmp_path / "link", tmp_path / "link" / "out"):
        with pytest.raises(UserError, match=r"^--data-dir .*link: is a broken link; give a folder$"):
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


def test_after_a_full_disk_the_message_names_the_command_that_continues(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_articles(3000))
    monkeypatch.setattr(prepare_data, "COMMIT_SECONDS", 0.0)
    save = Progress.save

    def fill(self, cfg, source):
        if self.tokens:
            with writing(str(tmp_path / "progress.json")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, cfg, source)

    monkeypatch.setattr(Progress, "save", fill)
    with pytest.raises(UserError, match=r"No space left on device\).*is kept\. Continue: ") as error:
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    assert str(error.value).count("is kept") == 1


def test_a_value_of_the_preset_is_not_a_flag(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "demo", {**PRESETS["demo"], "language": "simple"})
    cfg = parse(PrepareConfig, "", ["--preset", "demo", "--data-dir", str(tmp_path / "out")])
    assert cfg.language == "simple" and make_source(cfg, tmp_path).files


def test_a_file_that_changes_after_its_last_article_was_read_is_named(tmp_path, monkeypatch):
    path, tokenize_source = tmp_path / "a.jsonl", Pipeline.tokenize_source
    write_jsonl(path, make_articles(60))

    def cut_at_the_end(self):
        chunks = self.source.chunks

        def then_cut(number, options):
            yield from chunks(number, options)
            os.truncate(path, 100)

        self.source.chunks = then_cut
        tokenize_source(self)

    monkeypatch.setattr(Pipeline, "tokenize_source", cut_at_the_end)
    with pytest.raises(UserError, match=r"a\.jsonl: has changed since the command began"):
        prepare(config(tmp_path / "out", path))


def test_what_a_kill_left_beside_a_finished_folder_goes(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_articles(60))
    out = tmp_path / "out"
    prepare(config(out, tmp_path / "a.jsonl"))
    before = files(out)
    shutil.copy(out / "meta.json", out / "progress.json")
    (out / DOWNLOADS).mkdir()
    (out / DOWNLOADS / "a.parquet").write_bytes(b"half")
    prepare(config(out, tmp_path / "a.jsonl"))
    assert files(out) == before and not (out / DOWNLOADS).exists()


def test_a_few_tokens_do_not_cut_an_article(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 999}] * 200)
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", max_tokens=5_050))
    meta = read_meta(tmp_path / "out")
    assert sum(split["tokens"] for split in meta["splits"].values()) == 6_000


def test_overwriting_a_folder_without_tokens_takes_other_flags(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*make_articles(3000), {"no": "text"}])
    with pytest.raises(UserError, match="line 3001"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    assert (tmp_path / "out" / "progress.json").exists()
    write_jsonl(tmp_path / "a.jsonl", make_articles(3000))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", overwrite=True, val_fraction=0.1, shard_tokens=5_000))
    assert read_meta(tmp_path / "out")["val_fraction"] == 0.1


def test_the_bar_counts_the_bytes_of_all_files(tmp_path, monkeypatch):
    positions = []
    monkeypatch.setattr(progress.Display, "update", lambda self, position: positions.append(position))
    (tmp_path / "in").mkdir()
    for n in range(3):
        write_jsonl(tmp_path / "in" / f"{n}.jsonl", make_articles(60, seed=n))
    prepare(config(tmp_path / "out", tmp_path / "in"))
    total = sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    assert positions == sorted(positions) and positions[-1] == total
