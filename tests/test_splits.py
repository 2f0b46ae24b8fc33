"""prepare_data.py: the share held out of few or unequal documents, and where --max-tokens ends."""

import hashlib
import json
import random

import numpy as np
import pytest
from articles import command, config, files, make_articles, texts, write_jsonl
from conftest import assert_user_error, run_script

from internals.articles import is_held_out
from internals.progress import Progress
from internals.shards import ShardWriter, read_meta
from internals.start import UserError
from internals.windows import TokenStream
from prepare_data import Pipeline, prepare

WORDS = ["the", "river", "is", "long", "and", "the", "city", "is", "old", "because"]


def prose(characters, seed=0):
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=characters // 4))[:characters]


def tokens_of(folder):
    streams = [TokenStream.open(folder, split) for split in ("train", "val")]
    return [stream.read(0, len(stream)) for stream in streams]


def share(folder):
    train, val = tokens_of(folder)
    return len(val) / (len(train) + len(val))


@pytest.mark.parametrize("fraction", [0.005, 0.1, 0.5])
@pytest.mark.parametrize("documents", [1, 2, 3, 10, 49])
def test_a_few_files_give_their_share(tmp_path, documents, fraction):
    (tmp_path / "in").mkdir()
    want = [prose(120_000 // documents * (1 + n % 3), seed=n) for n in range(documents)]
    for n, text in enumerate(want):
        (tmp_path / "in" / f"{n:02d}.txt").write_text(text)
    prepare(config(tmp_path / "out", tmp_path / "in", val_fraction=fraction))
    assert abs(share(tmp_path / "out") - fraction) < 0.001
    train, val = tokens_of(tmp_path / "out")
    data = b"".join(text.encode() + b"\0" for text in want)
    assert (
        bytes(np.where(np.concatenate([train, val]) == 256, 0, np.concatenate([train, val])).astype(np.uint8)) == data
    )
    splits = read_meta(tmp_path / "out")["splits"]
    assert sum(split["articles"] for split in splits.values()) == documents
    assert sum(split["bytes"] for split in splits.values()) == len(data) - documents
    assert splits["val"]["bytes"] == int((val != 256).sum())


@pytest.mark.parametrize("kind", ["equal", "one giant", "growing"])
@pytest.mark.parametrize("documents", [60, 100, 200])
def test_documents_of_any_lengths_give_their_share(tmp_path, documents, kind):
    lengths = {
        "equal": lambda n: 3000,
        "one giant": lambda n: 900_000 if n == 7 else 500,
        "growing": lambda n: 40 * n + 100,
    }
    write_jsonl(tmp_path / "a.jsonl", [{"id": n, "text": prose(lengths[kind](n), n)} for n in range(documents)])
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", val_fraction=0.05))
    assert 0.025 <= share(tmp_path / "out") <= 0.075
    prepare(config(tmp_path / "one", tmp_path / "a.jsonl", val_fraction=0.05, workers=1))
    assert files(tmp_path / "one") == files(tmp_path / "out")


@pytest.mark.parametrize("ids", [["same"], [7], ["a", "b"]])
def test_ids_that_are_the_same_for_all_are_named(tmp_path, ids):
    rows = [{"id": ids[n % len(ids)], "text": prose(500, n)} for n in range(300)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    result = run_script(*command(tmp_path / "out", tmp_path / "a.jsonl"))
    assert result.returncode == 0, result.stderr
    words = "the same id or text: " if len(ids) == 1 else "one of 2 ids or texts: "
    assert words + ", ".join(map(str, ids)) in result.stdout
    assert "held out 20% of the tokens (--val-fraction 0.2)" in result.stdout


def test_texts_without_ids_that_are_the_same_are_named_by_the_beginning_of_their_digest(tmp_path):
    (tmp_path / "texts").mkdir()
    for n in range(60):
        (tmp_path / "texts" / f"{n}.txt").write_text(prose(2000, 0))
    result = run_script(*command(tmp_path / "out", tmp_path / "texts"))
    digest = hashlib.sha256(prose(2000, 0).encode()).hexdigest()
    assert f"because all 60 have the same id or text: {digest[:8]}; " in result.stdout, result.stdout


def test_ids_that_begin_alike_are_not_called_the_same(tmp_path):
    rows = [{"id": "x" * 40 + str(n), "text": prose(1_000_000 if n == 7 else 500, n)} for n in range(60)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    result = run_script(*command(tmp_path / "out", tmp_path / "a.jsonl"))
    assert "choosing whole documents" in result.stdout and "the same id" not in result.stdout


def test_a_split_by_documents_that_is_good_is_not_touched(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_articles(1000))
    result = run_script(*command(tmp_path / "out", tmp_path / "a.jsonl"))
    assert "whole documents" not in result.stdout
    assert len(texts(tmp_path / "out", "val")) > 150  # texts() checks that it ends with a whole article


@pytest.mark.parametrize("characters, preset", [(2000, "wikipedia"), (20_000, "wikipedia"), (90_000, "wikipedia-150m")])
def test_a_text_that_is_too_short_is_a_message_whose_advice_works(tmp_path, characters, preset):
    (tmp_path / "a.txt").write_text(prose(characters))
    flags = ["--preset", preset, "--source", tmp_path / "a.txt", "--data-dir", tmp_path / "out", "--tokenizer", "bytes"]
    result = run_script("prepare_data.py", *flags)
    assert_user_error(result, "--val-fraction 0.005", f"--preset {preset}", "such as")
    assert not files(tmp_path / "out")
    better = result.stderr.split("such as ")[1].split(",")[0]
    assert run_script("prepare_data.py", *flags, "--val-fraction", better).returncode == 0
    before = files(tmp_path / "out")
    (tmp_path / "a.txt").write_text("Only this.")
    assert_user_error(run_script("prepare_data.py", *flags, "--overwrite"), "more text")
    assert files(tmp_path / "out") == before


def test_that_advice_works_where_whole_documents_would_be_too_few(tmp_path):
    """Of 80 documents, 4.08 are to be held out. 3 are near enough, but have 189 tokens, and 257 are needed."""
    held_out = [is_held_out(str(n).encode(), 0.051) for n in range(2000)]
    first = next(n for n in range(1920) if sum(held_out[n : n + 80]) == 3)
    write_jsonl(tmp_path / "a.jsonl", [{"id": n, "text": f"{n:062}"} for n in range(first, first + 80)])
    with pytest.raises(UserError, match=r"such as 0\.051"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", val_fraction=0.005))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", val_fraction=0.051))
    assert len(tokens_of(tmp_path / "out")[1]) == 257


def test_a_share_that_turns_out_too_small_costs_no_second_pass_and_no_work(tmp_path, monkeypatch):
    """As with a Wikipedia from the hub, whose size is not known before."""
    write_jsonl(tmp_path / "a.jsonl", make_articles(200))
    monkeypatch.setattr("prepare_data.enough_tokens", lambda cfg, source, tokenizer: (10**12, 0))
    monkeypatch.setattr(Pipeline, "start_again_with_tail", None)
    with pytest.raises(
        UserError, match=r"--val-fraction 1e-06: leaves 0 of .*such as 0\.0.*changed ones need --overwrite"
    ):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", val_fraction=1e-6))
    assert (tmp_path / "out" / "train_000000.bin.partial").stat().st_size > 100_000


def test_a_cut_between_two_documents_is_counted_as_one(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(999, n)} for n in range(4)])
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", val_fraction=0.5))
    splits = read_meta(tmp_path / "out")["splits"]
    assert [(split["tokens"], split["articles"]) for split in splits.values()] == [(2000, 2), (2000, 2)]


def test_no_text_at_all_is_a_message(tmp_path):
    for name, data in (
        ("a.txt", ""),
        ("b.jsonl", ""),
        ("c.txt", " \n\n"),
        ("d.jsonl", '{"text": ""}\n'),
        ("e.json", "[]"),
    ):
        (tmp_path / name).write_text(data)
        result = run_script(*command(tmp_path / name[0], tmp_path / name))
        assert_user_error(result, "holds no text")
        assert not files(tmp_path / name[0])


@pytest.mark.parametrize("characters", [30_000, 3_000_000])
@pytest.mark.parametrize("limit", [10_000, 20_000])
def test_max_tokens_cuts_a_large_document(tmp_path, characters, limit):
    (tmp_path / "a.txt").write_text("é" + prose(characters))
    result = run_script(*command(tmp_path / "out", tmp_path / "a.txt", "--max-tokens", limit))
    assert result.returncode == 0, result.stderr
    assert f"stopped at --max-tokens {limit:,} inside a document of a.txt" in result.stdout
    train, val = tokens_of(tmp_path / "out")
    assert len(train) + len(val) == limit and val[-1] == 256
    assert read_meta(tmp_path / "out")["end"] == "max_tokens"
    assert bytes(np.concatenate([train, val])[:-1].tolist()).decode() == ("é" + prose(characters))[: limit - 2]


def test_max_tokens_never_cuts_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("東京" * 20_000)
    for limit in (9_000, 9_001, 9_002):
        prepare(config(tmp_path / f"{limit}", tmp_path / "a.txt", max_tokens=limit))
        train, val = tokens_of(tmp_path / f"{limit}")
        bytes(np.concatenate([train, val])[:-1].tolist()).decode()
        assert limit - 3 < len(train) + len(val) <= limit


def test_max_tokens_counts_only_what_comes_before_the_cut(tmp_path):
    """All in one chunk. An empty article and invalid characters before the cut, more of them behind it."""
    texts = [b"a" * 3000, b"", b"caf\xe9 " + "café ".encode() * 500, b"b" * 3000, b"", b"caf\xe9 " * 60 + b"c" * 3000]
    (tmp_path / "a.txt").write_bytes(b"----".join(texts))
    result = run_script(*command(tmp_path / "out", tmp_path / "a.txt", "--separator", "----", "--max-tokens", "8000"))
    assert result.returncode == 0, result.stderr
    assert "left out 1 article without text" in result.stdout
    meta = read_meta(tmp_path / "out")
    assert meta["end"] == "max_tokens" and meta["empty"] == 1
    [[replaced, characters]] = meta["repaired_files"].values()
    held = sum(split["bytes"] for split in meta["splits"].values())
    assert replaced == 1 and characters == held - 2 - 500  # U+FFFD has three bytes, é two


def test_a_cut_before_the_first_whole_character_of_a_text(tmp_path):
    """All of the text's replaced bytes are behind the cut."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"a" * 19_998)
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff\xff" + b"b" * 18_000)
    for limit in (20_000, 20_001, 20_003):
        prepare(config(tmp_path / f"{limit}", tmp_path / "in", max_tokens=limit))
        counts = read_meta(tmp_path / f"{limit}")["repaired_files"].values()
        assert all(replaced <= characters for replaced, characters in counts)


def test_max_tokens_above_the_whole_source_says_nothing_false(tmp_path):
    text = prose(9_000)
    (tmp_path / "a.txt").write_text(text)
    for limit in (8_500, 9_001, 9_002, 10_000):
        result = run_script(*command(tmp_path / f"{limit}", tmp_path / "a.txt", "--max-tokens", limit))
        assert result.returncode == 0 and "stopped" not in result.stdout
        assert read_meta(tmp_path / f"{limit}")["end"] == "source"


@pytest.mark.parametrize(("second", "end"), [("", "source"), (prose(100), "max_tokens")], ids=["empty", "text"])
def test_empty_files_after_the_limit_leave_nothing_out(tmp_path, second, end):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text(prose(9_000))
    (source / "b.txt").write_text(second)
    prepare(config(tmp_path / "out", source, max_tokens=9_001))
    assert read_meta(tmp_path / "out")["end"] == end


def test_a_kill_between_the_last_two_saves(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_articles(200))
    prepare(config(tmp_path / "once", tmp_path / "a.jsonl"))

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="Stopped"):
        patch.setattr(Pipeline, "finish", stop)
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    path = tmp_path / "out" / "progress.json"
    noted = json.loads(path.read_text())
    assert (noted["file"], noted["end"]) == (1, "source")
    path.write_text(json.dumps({**noted, "end": ""}))  # everything is read, but not recorded yet
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    assert files(tmp_path / "out") == files(tmp_path / "once")


def test_no_shard_stays_open(tmp_path, monkeypatch):
    writers = []

    class Recorded(ShardWriter):
        def __init__(self, *args):
            super().__init__(*args)
            writers.append(self)

    monkeypatch.setattr("prepare_data.ShardWriter", Recorded)
    (tmp_path / "a.txt").write_text(prose(20_000))
    prepare(config(tmp_path / "out", tmp_path / "a.txt"))
    assert len(writers) == 4  # two splits, opened again when the end is held out
    assert [writer._file for writer in writers] == [None] * 4


def test_a_flag_that_was_wrong_can_be_corrected(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"body": prose(500, n)} for n in range(60)])
    wrong = run_script(*command(tmp_path / "out", tmp_path / "a.jsonl"))
    assert_user_error(wrong, "--text-column", "body")
    assert not files(tmp_path / "out")
    assert run_script(*command(tmp_path / "out", tmp_path / "a.jsonl", "--text-column", "body")).returncode == 0


@pytest.mark.parametrize(
    "owner, method, call",
    [
        (Pipeline, "tokenize_source", 2), (Pipeline, "open_shards", 2), (Pipeline, "open_shards", 3),
        (Pipeline, "hold_out_tail", 1), (Pipeline, "commit", 3),
        (ShardWriter, "finish", 1),  # the training split has been cut
    ],
)  # fmt: skip
def test_a_stop_while_the_split_changes(tmp_path, monkeypatch, owner, method, call):
    write_jsonl(tmp_path / "a.jsonl", [{"id": "same", "text": prose(900, n)} for n in range(300)])
    prepare(config(tmp_path / "once", tmp_path / "a.jsonl", shard_tokens=50_000))
    original, calls = getattr(owner, method), []

    def stop(self):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, stop)
        with pytest.raises(KeyboardInterrupt, match="Stopped"):
            prepare(config(tmp_path / "out", tmp_path / "a.jsonl", shard_tokens=50_000))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", shard_tokens=50_000))
    assert files(tmp_path / "out") == files(tmp_path / "once")


def test_starting_again_keeps_the_commit_and_the_tokenizers():
    noted = Progress(file=3, resolved={"commit": "c"}, tokenizers=["t"])
    noted.start_again()
    assert noted == Progress(tail=True, resolved={"commit": "c"}, tokenizers=["t"])
