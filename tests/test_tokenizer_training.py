"""Training a tokenizer: on a sample without the validation text, from source and flags alone; refusals; kills.

PREPARE_KILLS=50 python -m pytest tests/test_tokenizer_training.py -k kills     more kills than a test run has time for
"""

import gzip
import json
import os
import random
import shutil

import pytest
from articles import command, config, files, kill_until, make_articles, posix, texts, write_jsonl, write_parquet
from conftest import assert_user_error, run_script

import prepare_data
from internals import reader, text_files, tokenizer_training
from internals.articles import is_held_out
from internals.files import sha256
from internals.reader import ReadOptions
from internals.shards import read_meta
from internals.start import UserError
from internals.text_files import LocalFiles
from internals.tokenizer import given_tokenizer, load_tokenizer
from internals.tokenizer_json import own_tokenizer, to_json
from internals.tokenizer_training import learn_tokens, sample_texts, train_tokenizer
from prepare_data import prepare

# ----------------------------------------------------------------------------------------------------------------------
# The sample


def source_of(path, **flags):
    cfg = config("out", path, tokenizer="train", **flags)
    return cfg, LocalFiles(cfg.sources, ReadOptions.of(cfg))


def test_validation_articles_are_not_in_the_sample(tmp_path):
    rows = make_articles(400)
    write_jsonl(tmp_path / "a.jsonl", rows)
    got = list(sample_texts(*source_of(tmp_path / "a.jsonl"), tail=False))
    wanted = [row for row in rows if not is_held_out(row["id"].encode(), 0.2)]
    assert 250 < len(got) == len(wanted) < 390
    assert got == [f"{row['title']}\n\n{row['text']}" for row in wanted]


def test_articles_without_text_are_not_in_the_sample(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"title": "Redirect", "text": " "}, {"title": "Page", "text": "Its text."}])
    assert list(sample_texts(*source_of(tmp_path / "a.jsonl", val_fraction=0.01), tail=False)) == ["Page\n\nIts text."]


@pytest.mark.parametrize("varied", [True, False])
def test_the_sample_is_smaller_if_the_pieces_of_the_text_do_not_repeat(tmp_path, monkeypatch, varied):
    """As in Chinese, where a clause is a piece: memory grows with the different pieces."""
    random.seed(1)
    clause = lambda: "".join(chr(0x4E00 + random.randrange(20_000)) for _ in range(8 if varied else 1))  # noqa: E731
    rows = [{"text": f"{n:05} " + "，".join(clause() for _ in range(600 if varied else 2500))} for n in range(600)]
    write_jsonl(tmp_path / "a.jsonl", rows)  # 9 MB
    for name, value in (("SAMPLE_BYTES", 6 << 20), ("VARIED_SAMPLE_BYTES", 2 << 20)):
        monkeypatch.setattr(tokenizer_training, name, value)
    got = list(sample_texts(*source_of(tmp_path / "a.jsonl"), tail=False))
    low, high = (2e6, 4e6) if varied else (5e6, 8e6)
    assert low < sum(len(text.encode()) for text in got) < high
    assert int(got[0][:5]) < 100 and int(got[-1][:5]) > 450  # spread over the source


def test_the_sample_is_spread_over_the_source(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", make_articles(9000, seed=1))
    write_jsonl(tmp_path / "in" / "b.jsonl", make_articles(9000, seed=2))
    monkeypatch.setattr(tokenizer_training, "SAMPLE_BYTES", 6_000_000)
    got = list(sample_texts(*source_of(tmp_path / "in"), tail=False))
    assert 5_000_000 < sum(len(text.encode()) for text in got) < 6_000_000 + 3 * (1 << 20)
    for seed in (1, 2):
        numbers = [int(text.split("\n")[0].split("/")[1]) for text in got if text.startswith(f"Article {seed}/")]
        assert numbers[0] < 3000 and numbers[-1] > 6000


@pytest.mark.parametrize(("held_out", "sampled"), [(0.2, 0.6), (0.5, 0.25), (0.9, 0.05)])
@pytest.mark.parametrize("limit", [None, 300_000])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "txt.gz"])
def test_the_end_that_will_be_held_out_is_not_in_the_sample(tmp_path, kind, limit, held_out, sampled):
    text = " ".join(f"word{n}" for n in range(200_000))
    path = tmp_path / f"a.{kind}"
    data = (json.dumps({"text": text}) if kind == "jsonl" else text).encode()
    path.write_bytes(gzip.compress(data) if kind == "txt.gz" else data)
    cfg, source = source_of(path, max_tokens=limit, val_fraction=held_out)
    got = "".join(sample_texts(cfg, source, tail=True))
    assert text.startswith(got)
    most = sampled * min(limit or len(text), len(text))
    assert most / 2 < len(got) <= most


@pytest.mark.parametrize("giant", [0, 19])
def test_unequal_rows_do_not_change_how_much_is_sampled(tmp_path, monkeypatch, giant):
    """The place in a .parquet file is known in rows alone. A share of its text is not the same share of its rows."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", 10_000)
    rows = [{"text": " ".join(f"word{n}" for n in range(200_000 if number == giant else 3))} for number in range(20)]
    write_parquet(tmp_path / "a.parquet", rows)
    cfg, source = source_of(tmp_path / "a.parquet", val_fraction=0.2)
    got, text = "".join(sample_texts(cfg, source, tail=True)), "".join(row["text"] for row in rows)
    assert text.startswith(got) and len(got) == int(0.6 * len(text))


# ----------------------------------------------------------------------------------------------------------------------
# prepare_data.py


TRAIN = {"tokenizer": "train", "vocab_size": 300}
FLAGS = ("--tokenizer", "train", "--vocab-size", "300")


def test_threads_do_not_change_the_files(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", make_articles(1000, seed=1), row_group_size=300)
    write_jsonl(tmp_path / "in" / "b.jsonl", make_articles(500, seed=2))
    for threads in ("1", "3"):
        env = {**os.environ, "RAYON_NUM_THREADS": threads}
        result = run_script(*command(tmp_path / threads, tmp_path / "in", *FLAGS, "--workers", threads), env=env)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""  # no bars without a terminal
        assert "training a tokenizer of 300 tokens" in result.stdout
    assert files(tmp_path / "1") == files(tmp_path / "3")
    meta = read_meta(tmp_path / "1")
    assert (meta["tokenizer"], meta["vocab_size"]) == ("own", 300)
    assert meta["tokenizer_sha256"] == sha256(tmp_path / "1" / "tokenizer.json")
    rows = [*make_articles(1000, seed=1), *make_articles(500, seed=2)]
    got = texts(tmp_path / "1", "train") + texts(tmp_path / "1", "val")
    assert sorted(got) == sorted(f"{row['title']}\n\n{row['text']}" for row in rows)


def test_two_folders_share_a_tokenizer(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", make_articles(200, seed=seed))
    given = str(tmp_path / "a" / "tokenizer.json")
    prepare(config(tmp_path / "a", tmp_path / "a.jsonl", **TRAIN))
    prepare(config(tmp_path / "b", tmp_path / "b.jsonl", tokenizer=given))
    assert sha256(tmp_path / "a" / "tokenizer.json") == sha256(tmp_path / "b" / "tokenizer.json")
    before = files(tmp_path)
    prepare(config(tmp_path / "a", tmp_path / "a.jsonl", **TRAIN))  # finished
    prepare(config(tmp_path / "a", tmp_path / "a.jsonl", tokenizer=given))  # with the same tokenizer
    with pytest.raises(UserError, match=r"with a --tokenizer of SHA-256 \w+, not --tokenizer train --vocab-size 300"):
        prepare(config(tmp_path / "b", tmp_path / "b.jsonl", **TRAIN))
    with pytest.raises(UserError, match="--vocab-size 300, not --tokenizer train --vocab-size 320"):
        prepare(config(tmp_path / "a", tmp_path / "a.jsonl", tokenizer="train", vocab_size=320))
    with pytest.raises(UserError, match="--vocab-size 300, not --tokenizer bytes"):
        prepare(config(tmp_path / "a", tmp_path / "a.jsonl"))
    assert files(tmp_path) == before
    with pytest.raises(UserError, match="--overwrite deletes this file; copy it to another folder first"):
        prepare(config(tmp_path / "a", tmp_path / "a.jsonl", tokenizer=given, overwrite=True))
    assert files(tmp_path) == before
    prepare(config(tmp_path / "a", tmp_path / "a.jsonl", overwrite=True))
    assert not (tmp_path / "a" / "tokenizer.json").exists()


def test_flags():
    for flags in (("--vocab-size", "500"), ("--tokenizer", "train", "--vocab-size", "65537"), ("--tokenizer", "")):
        assert_user_error(run_script("prepare_data.py", "--source", "sample", *flags), flags[-2])


def test_a_text_too_short_for_the_vocabulary(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_articles(100, words=20))
    with pytest.raises(UserError, match=r"--vocab-size 30000: .* give --vocab-size (\d+), or more text") as error:
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", tokenizer="train", vocab_size=30_000))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    size = int(str(error.value).split("give --vocab-size ")[1].split(",")[0])
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", tokenizer="train", vocab_size=size))
    assert read_meta(tmp_path / "out")["vocab_size"] == size


def test_a_word_without_an_end_is_cut_for_training():
    """DNA without a blank is one word, and each merge would read all of it."""
    assert 100 < max(map(len, learn_tokens(["a" * 5000], 300))) <= tokenizer_training.LONGEST_PIECE


def test_ids_that_all_fall_into_the_validation_share_are_named(tmp_path):
    id = next(str(n) for n in range(100) if is_held_out(str(n).encode(), 0.2))
    write_jsonl(tmp_path / "a.jsonl", [{**row, "id": id} for row in make_articles(100)])
    with pytest.raises(UserError, match=r"^--tokenizer train: all documents fall into the validation share.*ids"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **TRAIN))


def test_a_bad_row_that_training_meets_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 10_000)  # so that the row is not in the first chunk
    write_jsonl(tmp_path / "a.jsonl", [*make_articles(300), {"no": "text"}])
    with pytest.raises(UserError, match=r"^a\.jsonl, line 301: has no 'text'"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **TRAIN))


def test_a_tokenizer_with_more_tokens_than_a_shard_can_name_is_refused(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)]
    pairs = [a + b for a in tokens for b in tokens]
    for count, fits in ((65_279, True), (65_280, False)):
        path = tmp_path / f"{count}.json"
        path.write_text(to_json(own_tokenizer("large", tokens + pairs[:count])), encoding="utf-8")
        if fits:
            assert load_tokenizer(given_tokenizer(str(path))).n_vocab == 65_536
        else:
            with pytest.raises(UserError, match=r"has 65,537 tokens; a shard can hold 65,536"):
                given_tokenizer(str(path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.json.tmp"])
def test_a_tokenizer_of_somebody_else_stays(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", make_articles(200))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=rf"{name}.*not made by this command"):
            prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **TRAIN, overwrite=overwrite))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))  # writes no tokenizer.json
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", overwrite=True))
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_tokenizer_that_is_lost_or_damaged_half_way(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", make_articles(3000))
    out = tmp_path / "out"

    def stop(self, position):
        raise UserError("stop")

    with monkeypatch.context() as patched, pytest.raises(UserError, match="stop"):
        patched.setattr(prepare_data.Display, "update", stop)
        prepare(config(out, tmp_path / "a.parquet", **TRAIN))
    assert json.loads((out / "progress.json").read_text())["splits"]["train"]["tokens"] > 0
    shutil.copy(out / "tokenizer.json", tmp_path / "kept.json")
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json.*: is damaged"):
        prepare(config(out, tmp_path / "a.parquet", **TRAIN))
    (out / "tokenizer.json").unlink()
    prepare(config(out, tmp_path / "a.parquet", **TRAIN))  # trains it again
    prepare(config(tmp_path / "once", tmp_path / "a.parquet", **TRAIN))
    assert files(out) == files(tmp_path / "once")
    assert sha256(out / "tokenizer.json") == sha256(tmp_path / "kept.json")
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not the tokenizer of the shards beside it"):
        prepare(config(out, tmp_path / "a.parquet", **TRAIN))
    (out / "tokenizer.json").unlink()
    assert_user_error(
        run_script("train.py", "--data-dir", out, "--device", "cpu", "--check"),
        "tokenizer.json",
        "is missing; restore it",
    )


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_held_out_end_with_a_trained_tokenizer(tmp_path, kind):
    """For one document, and for ids that are all the same, where the tokenizer is trained again without the end."""
    path = tmp_path / f"a.{kind}"
    rows = make_articles(300)
    if kind == "txt":
        path.write_text(" ".join(row["text"] for row in rows), encoding="utf-8")
    else:
        write_jsonl(path, [{**row, "id": "1"} for row in rows])
    prepare(config(tmp_path / "out", path, **TRAIN))
    meta = read_meta(tmp_path / "out")
    assert meta["splits"]["val"]["tokens"] == int(0.2 * sum(split["tokens"] for split in meta["splits"].values()))
    cfg, source = source_of(path)
    assert (tmp_path / "out" / "tokenizer.json").read_text("utf-8") == train_tokenizer(
        sample_texts(cfg, source, True), 300
    )
    assert not (tmp_path / "out" / "progress.json").exists()


def test_a_tokenizer_that_is_trained_again_cuts_the_documents_too(tmp_path, monkeypatch):
    """Long documents are cut where their tokens do not change, so by the tokenizer that makes the tokens."""
    write_jsonl(tmp_path / "a.jsonl", [{**row, "id": "1"} for row in make_articles(300)])
    seen, read = [], text_files.read_chunks
    monkeypatch.setattr(
        text_files,
        "read_chunks",
        lambda path, name, options: (seen.append(options.tokenizer), read(path, name, options))[1],
    )
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **TRAIN))
    _, second = dict.fromkeys(tokenizer for tokenizer in seen if tokenizer != "bytes")  # which the sample is read with
    assert second == seen[-1] == (tmp_path / "out" / "tokenizer.json").read_text("utf-8")


def test_a_tokenizer_that_is_trained_again_is_loaded_before_the_workers_begin(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{**row, "id": "1"} for row in make_articles(300)])
    loaded, load = [], prepare_data.bulk_encoder
    monkeypatch.setattr(prepare_data, "bulk_encoder", lambda tokenizer: (loaded.append(tokenizer), load(tokenizer))[1])
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **TRAIN))
    assert len(loaded) == 2 and loaded[1] == (tmp_path / "out" / "tokenizer.json").read_text("utf-8")


@posix
def test_kills_at_random_moments(tmp_path):
    kills = int(os.environ.get("PREPARE_KILLS", "2"))
    write_parquet(tmp_path / "in" / "a.parquet", make_articles(1500, seed=1), row_group_size=150)
    write_jsonl(tmp_path / "in" / "b.jsonl", [{**row, "id": "1"} for row in make_articles(1500, seed=2)])
    arguments = command(tmp_path / "out", tmp_path / "in", *FLAGS, "--shard-tokens", "100000")
    once = run_script(*command(tmp_path / "once", tmp_path / "in", *FLAGS, "--shard-tokens", "100000"))
    assert once.returncode == 0, once.stderr
    kill_until(kills, arguments, tmp_path / "out", files(tmp_path / "once"), longest=4.0)
