"""prepare_data.py and what it is made of: what ends up in the shards, whatever happens on the way.

Two tests are larger by command: PREPARE_KILLS=50 is the number of kills survived, and WIKIPEDIA_SAMPLE_DIR with
TIKTOKEN_CACHE_DIR takes real articles for them.
"""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO, assert_user_error, needs_gpt2, needs_wikipedia, run_script

import prepare_data
from config import PrepareConfig
from internals import progress, text_files
from internals.shards import read_meta
from internals.start import UserError
from internals.text_files import read_chunks
from internals.tokenizer import PIECE, encode, load_tokenizer
from internals.windows import TokenStream
from prepare_data import prepare, tokenize

posix = pytest.mark.skipif(os.name != "posix", reason="signals and file-size limits are POSIX")
WORDS = [
    "the",
    "of",
    "Nile",
    "river",
    "is",
    "a",
    "city",
    "born",
    "1887",
    "king,",
    "(also",
    "war.\n\n“Zoë”",
    "東京",
    "∑",
    "émigré",
]


def make_articles(count, seed=0, words=200):
    rng = random.Random(seed)
    return [
        {
            "id": str(seed * 1_000_000 + n),
            "title": f"Article {seed}/{n}",
            "text": " ".join(rng.choices(WORDS, k=rng.randint(1, 2 * words))),
        }
        for n in range(count)
    ]


def write_parquet(path, rows, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **kwargs)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(folder, source, **kwargs):
    kwargs = {"tokenizer": "bytes", "val_fraction": 0.2, "workers": 2, **kwargs}
    return PrepareConfig(data_dir=str(folder), source=str(source), **kwargs)


def command(folder, source, *more):
    flags = [
        "--source",
        source,
        "--data-dir",
        folder,
        "--tokenizer",
        "bytes",
        "--val-fraction",
        "0.2",
        "--workers",
        "2",
    ]
    return ["prepare_data.py", *map(str, flags), *map(str, more)]


def files(folder):
    """The folder's files and the SHA-256 of each; the lock is none of them."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def texts(folder, split):
    """The split's articles, decoded."""
    stream, tokenizer = TokenStream.open(folder, split), load_tokenizer(read_meta(folder)["tokenizer"])
    tokens = stream.read(0, len(stream))
    assert tokens[-1] == tokenizer.eot_token
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token) + 1)[:-1]
    return [tokenizer.decode_bytes(part[:-1].tolist()).decode() for part in parts]


def as_text(row):
    return f"{row['title']}\n\n{row['text']}"


# What ends up in the shards


def test_the_sample(tmp_path):
    folder = tmp_path / "demo"
    first = run_script("prepare_data.py", "--preset", "demo", "--data-dir", folder)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""  # no bars where nobody looks
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
        assert counts["tokens"] == counts["bytes"] + len(got) == sum(s["tokens"] for s in counts["shards"])
        for shard in counts["shards"]:
            assert shard["sha256"] == before[shard["file"]]
    assert (meta["tokenizer"], meta["vocab_size"], meta["source"]["kind"]) == ("bytes", 257, "sample")

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


def test_every_file_type_makes_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 10_000)  # so that there are many chunks, and lines longer than one
    zstandard = pa.Codec("zstd")
    rows = make_articles(300, words=500)
    write_parquet(tmp_path / "a.parquet", rows)
    write_jsonl(tmp_path / "b.jsonl", rows)
    data = (tmp_path / "b.jsonl").read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))  # two members
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(data).to_pybytes())
    (tmp_path / "e.jsonl").write_bytes(data.rstrip(b"\n").replace(b"\n", b"\r\n\r\n"))
    got = {}
    for path in sorted(tmp_path.iterdir()):
        parts = [tokenize(chunk, "bytes", 0.2) for chunk in read_chunks(path, path.name, "text")]
        assert len(parts) > 1
        got[path.name] = np.concatenate([part.tokens for part in parts]).tobytes()
        assert sum(len(part.lengths) for part in parts) == len(rows)
    assert len(set(got.values())) == 1


def test_a_folder_of_txt_is_a_document_a_file(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    want = [as_text(row) for row in make_articles(30)]
    for n, text in enumerate(want):
        path = tmp_path / "in" / ("sub" if n % 2 else "") / f"{n:02d}.txt"
        if n % 3:
            path.write_bytes(text.encode())
        else:
            path.with_suffix(".txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "in" / "picture.png").write_bytes(b"x")
    result = run_script(*command(tmp_path / "out", tmp_path / "in"))
    assert result.returncode == 0, result.stderr
    assert "left out 1 file " in result.stdout
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == sorted(want)


def test_a_glob_and_another_column(tmp_path):
    rows = [{"body": row["text"], "n": 1} for row in make_articles(100)]
    write_jsonl(tmp_path / "a1.jsonl", rows[:50])
    write_jsonl(tmp_path / "a2.jsonl", rows[50:])
    write_jsonl(tmp_path / "b.jsonl", make_articles(5))
    prepare(config(tmp_path / "out", tmp_path / "a*.jsonl", text_column="body"))
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == sorted(r["body"] for r in rows)


def test_the_split_depends_on_the_id_alone(tmp_path):
    rows = make_articles(400)
    changed = [{**row, "text": "Something else.", "title": f"T{row['id']}"} for row in rows[::-2]]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_parquet(tmp_path / "b.parquet", changed + changed)  # ids that repeat: nothing is merged or dropped
    prepare(config(tmp_path / "a", tmp_path / "a.jsonl"))
    prepare(config(tmp_path / "b", tmp_path / "b.parquet"))
    held_out = {text.split("\n")[0].split("/")[1] for text in texts(tmp_path / "a", "val")}
    assert 40 < len(held_out) < 120
    got = texts(tmp_path / "b", "val")
    assert sorted(got) == sorted(as_text(row) for row in changed * 2 if row["id"] in held_out)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_one_document_gives_its_end_to_validation(tmp_path, kind, monkeypatch):
    text = " ".join(row["text"] for row in make_articles(2000))
    assert len(text.encode()) > 2 * text_files.CHUNK_BYTES
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
        split = "val" if prepare_data.is_held_out(row["id"].encode(), 0.005) else "train"
        order.append((row, split, place[split]))
        place[split] += 1
    for row, split, n in random.Random(0).sample(order, 1000):
        start, end = borders[split][n : n + 2]
        assert tokenizer.decode(streams[split].read(start, end - start - 1).tolist()) == as_text(row)


# Odd articles


def tokens_of(path, tokenizer="bytes"):
    return [tokenize(chunk, tokenizer, 0.2) for chunk in read_chunks(path, path.name, "text")]


ODD = {
    "a special token's text": "one <|endoftext|> two <|fim_prefix|><|endoftext|>",
    "a million times one letter": "a" * 1_000_000,
    "a million blanks": "x" + " " * 1_000_000 + "y",
    "a million newlines": "x" + "\n" * 1_000_000 + "y",
    "a million marks": "=" * 1_000_000,
    "a line of 5 MB": "The river is long. " * 270_000,
    "no spaces": "東京は日本の首都である。" * 50_000,
    "Thai": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย" * 10_000,
    "combining marks": "e\u0301\u0300\u0302" * 100_000,
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 50_000,
    "control characters": "\0\x01\x1b[0m\x85\u2028\ufeff",
    "line ends": "a\r\nb\rc\n",
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_odd_articles_come_back_exactly(tmp_path, name, tokenizer, kind):
    text, path = ODD[name], tmp_path / f"a.{kind}"
    if kind == "parquet":
        write_parquet(path, [{"text": text}])
    elif kind == "jsonl":
        write_jsonl(path, [{"text": text}])
    else:
        path.write_bytes(text.encode())
    parts = tokens_of(path, tokenizer)
    tokens = np.concatenate([part.tokens for part in parts])
    encoding = load_tokenizer(tokenizer)
    assert encoding.decode_bytes(tokens[:-1].tolist()) == text.encode()
    assert (tokens == encoding.eot_token).nonzero()[0].tolist() == [len(tokens) - 1]
    assert sum(int(part.text_bytes.sum()) for part in parts) == len(text.encode())


@needs_gpt2
def test_cutting_long_texts_does_not_change_their_tokens():
    text = "\n\n".join(as_text(row) for row in make_articles(400)) + "  \n \n x  y\tz " * 2000
    assert len(text) > 5 * PIECE
    encoding = load_tokenizer("gpt2")
    got, lengths = encode(encoding, [text])
    assert got.tolist() == [*encoding.encode_ordinary(text), encoding.eot_token]
    assert lengths.tolist() == [len(got)]


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("odd", [None, "one <|endoftext|> two", "<|endoftext|>", "long", "<|endof"])
def test_many_texts_at_once_have_the_tokens_of_each_alone(tokenizer, odd):
    texts = ["x", " ends in blanks  \n ", "\n\nbegins so", "text|>", "'s", "東京", *(map(as_text, make_articles(20)))]
    if odd is not None:
        texts.insert(7, " word" * PIECE if odd == "long" else odd)
    encoding = load_tokenizer(tokenizer)
    want = [[*encoding.encode_ordinary(text), encoding.eot_token] for text in texts]
    tokens, lengths = encode(encoding, texts)
    assert tokens.dtype == np.uint16
    assert [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])] == want
    assert [len(array) for array in encode(encoding, [])] == [0, 0]


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


def test_what_is_no_unicode_is_replaced_and_counted(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(20):
        (tmp_path / "in" / f"{n:02d}.txt").write_bytes(f"Text {n}".encode())
    (tmp_path / "in" / "latin.txt").write_bytes("Zo\xeb".encode("latin-1"))
    (tmp_path / "in" / "lone.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude00"}\n')
    table = pa.table({"text": pa.array([b"par\xffquet", "東京".encode()]).view(pa.string())})
    pq.write_table(table, tmp_path / "in" / "p.parquet")
    result = run_script(*command(tmp_path / "out", tmp_path / "in"))
    assert result.returncode == 0, result.stderr
    assert "in 3 articles" in result.stdout
    got = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert {"Zo\ufffd", "a \ufffd b 😀", "par\ufffdquet", "東京"} <= set(got)
    assert len(got) == 24


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfText")
    assert bytes(tokens_of(tmp_path / "a.txt")[0].tokens[:-1].tolist()) == b"Text"
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "Text"}\n')
    assert bytes(tokens_of(tmp_path / "a.jsonl")[0].tokens[:-1].tolist()) == b"Text"


def test_ids_and_titles_of_other_kinds(tmp_path):
    rows = [
        {"id": 7, "title": None, "text": "a"},
        {"id": None, "title": "", "text": "b"},
        {"id": None, "title": "T", "text": "c"},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_parquet(tmp_path / "b.parquet", rows)
    table = pa.table(
        {"title": pa.array(["T", "T"]).dictionary_encode(), "text": pa.array(["x", "y"], pa.large_string())}
    )
    pq.write_table(table, tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.parquet"):
        got = [a for chunk in read_chunks(tmp_path / name, name, "text") for a in chunk.articles()]
        assert [(key, title or "", text) for key, title, text in got] == [
            (b"7", "", "a"),
            (None, "", "b"),
            (None, "T", "c"),
        ]
    assert (
        bytes(t if t < 256 else 10 for t in tokens_of(tmp_path / "c.parquet")[0].tokens.tolist()) == b"T\n\nx\nT\n\ny\n"
    )


# Mistakes


def broken(tmp_path, name):
    """(source, the words of its message)"""
    path = tmp_path / "in"
    path.mkdir()
    rows = make_articles(100)
    if name == "an empty folder":
        return path, ["--source", "in", ".parquet"]
    if name == "nothing there":
        return path / "no" / "*.txt", ["--source", "no such file"]
    if name == "another type":
        (path / "a.pdf").write_bytes(b"x")
        return path / "a.pdf", ["--source", ".jsonl"]
    if name == "no such column":
        write_parquet(path / "a.parquet", [{"body": "x", "other": "y"}] * 10)
        return path, ["a.parquet", "'text'", "--text-column", "body"]
    if name == "a column of numbers":
        write_parquet(path / "a.parquet", [{"text": 1}] * 10)
        return path, ["a.parquet", "'text'", "int64", "--text-column"]
    if name == "a truncated parquet":
        write_parquet(path / "a.parquet", rows)
        (path / "b.parquet").write_bytes((path / "a.parquet").read_bytes()[:-100])
        return path, ["b.parquet", "cut short"]
    if name == "a damaged parquet":
        write_parquet(path / "a.parquet", rows, compression="zstd")
        data = bytearray((path / "a.parquet").read_bytes())
        data[200:2000] = bytes(1800)
        (path / "a.parquet").write_bytes(bytes(data))
        return path, ["a.parquet"]
    if name == "a truncated gzip":
        write_jsonl(path / "a.jsonl", rows)
        (path / "b.jsonl.gz").write_bytes(gzip.compress((path / "a.jsonl").read_bytes())[:-2000])
        return path, ["b.jsonl.gz"]
    lines = [json.dumps(row) for row in rows]
    lines[41] = {
        "a broken line": '{"text": "cut', "a line without text": '{"title": "x"}', "a line that is a list": "[1]",
        "a line with a number": '{"text": 7}',
    }[name]  # fmt: skip
    (path / "a.jsonl").write_text("\n".join(lines))
    return path / "a.jsonl", ["a.jsonl, line 42"]


@pytest.mark.parametrize(
    "name",
    [
        "an empty folder", "nothing there", "another type", "no such column", "a column of numbers", "a truncated parquet",
        "a damaged parquet", "a truncated gzip", "a broken line", "a line without text", "a line that is a list",
        "a line with a number",
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_read(tmp_path, name):
    source, words = broken(tmp_path, name)
    with pytest.raises(UserError) as error:
        prepare(config(tmp_path / "out", source, workers=1))
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_mistake_ends_in_one_line_and_exit_status_2(tmp_path):
    source, words = broken(tmp_path, "a broken line")
    result = run_script(*command(tmp_path / "out", source))
    assert_user_error(result, *words)
    assert len(result.stderr.splitlines()) == 1


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


def test_flags():
    for flags in (
        ["--workers", "0"],
        ["--val-fraction", "1"],
        ["--max-tokens", "-5"],
        ["--no-such"],
        ["--tokenizer", "x"],
    ):
        assert_user_error(run_script("prepare_data.py", *flags), flags[0])


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


# Going on after a stop


def test_a_finished_folder_that_was_damaged_is_not_called_finished(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_articles(50))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    os.truncate(tmp_path / "out" / "val_000000.bin", 2000)
    with pytest.raises(UserError, match=r"val_000000\.bin"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))


def test_another_command_is_refused_half_way(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*make_articles(5000), {"no": "text"}])
    with pytest.raises(UserError, match="line 5001"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    state = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert state["splits"]["train"]["tokens"] > 1_000_000  # what was done is kept
    for other in ({"val_fraction": 0.1}, {"text_column": "x"}, {"shard_tokens": 7}, {"max_tokens": 10**9}):
        with pytest.raises(UserError, match="--" + next(iter(other)).replace("_", "-")):
            prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **other))
    write_jsonl(tmp_path / "a.jsonl", make_articles(5000))  # mended: but now it is another source
    with pytest.raises(UserError, match="another source"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    (tmp_path / "out" / "progress.json").write_text("{")
    with pytest.raises(UserError, match=r"progress\.json"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", overwrite=True))
    prepare(config(tmp_path / "once", tmp_path / "a.jsonl"))
    assert files(tmp_path / "out") == files(tmp_path / "once")


def test_two_at_a_time_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "LOCK_SECONDS", 0.1)
    write_jsonl(tmp_path / "a.jsonl", make_articles(50))
    (tmp_path / "out").mkdir()
    with prepare_data.filelock.FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 2 MB, and a function that makes it 100 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip(reason="mounting a tmpfs takes root on Linux")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
    subprocess.run(["umount", folder], check=True)


def assert_resumes_after(reason, tmp_path, folder, result):
    """The message names the reason. With room on the disk, the same command makes what it would have made at once."""
    assert_user_error(result, "--data-dir", f"could not be written ({reason})", "make room", "the same command resumes")
    assert not list(folder.glob("*.bin"))
    result = run_script(*command(folder, tmp_path / "a.jsonl"))
    assert result.returncode == 0, result.stderr
    prepare(config(tmp_path / "once", tmp_path / "a.jsonl"))
    assert files(folder) == files(tmp_path / "once")


@posix
def test_a_file_that_may_not_grow_is_one_message_and_then_it_goes_on(tmp_path):
    import resource

    write_jsonl(tmp_path / "a.jsonl", make_articles(5000))
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))}
    result = run_script(*command(tmp_path / "out", tmp_path / "a.jsonl"), **limit)
    assert_resumes_after("File too large", tmp_path, tmp_path / "out", result)


@posix
def test_a_full_disk_is_one_message_and_then_it_goes_on(tmp_path, tmpfs):
    disk, make_room = tmpfs
    write_jsonl(tmp_path / "a.jsonl", make_articles(5000))
    result = run_script(*command(disk / "out", tmp_path / "a.jsonl"))
    make_room()
    assert_resumes_after("No space left on device", tmp_path, disk / "out", result)


def test_a_disk_that_cannot_hold_it_is_refused_before(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_articles(5000))
    monkeypatch.setattr(progress, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(progress.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"GB more are needed.*--max-tokens"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))


@posix
@pytest.mark.parametrize("seconds", [0, 0.02, 0.1, 0.3])  # the threads start, the threads work
def test_ctrl_c(tmp_path, seconds):
    write_parquet(tmp_path / "a.parquet", make_articles(60_000))
    process = start(command(tmp_path / "out", tmp_path / "a.parquet"))
    wait_for(tmp_path / "out" / "progress.json", process)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.strip().splitlines() == [
        "error: stopped; the same command resumes here (with --overwrite, it starts again)"
    ]


def start(arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **kwargs,
    )  # fmt: skip


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


# The hub


@pytest.fixture
def hub_folder(tmp_path):
    """What the hub has: a small Wikipedia, or the real sample where the environment names one."""
    folder = tmp_path / "hub"
    config_name = "20231101.simple"
    folder.mkdir()
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config_name}\n  data_files:\n  - split: train\n    path: {config_name}/*\n---\n"
    )
    for n in range(4):
        write_parquet(folder / config_name / f"train-{n:05d}-of-00004.parquet", make_articles(1000, seed=n))
    return folder


@pytest.fixture
def serve(hub_folder, tmp_path):
    """serve(faults) -> (its handler, the environment that leads to it)"""
    servers = []

    def start_hub(faults=()):
        server = hub.serve(hub_folder, faults=faults)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        home = tmp_path / f"home{len(servers)}"
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}
        return server.RequestHandlerClass, env

    yield start_hub
    for server in servers:
        server.shutdown()
        server.server_close()


def hub_command(folder, *more):
    return command(folder, "wikipedia", "--language", "simple", *more)


def without_pauses(arguments, first=""):
    """The command with `time.sleep` gone, so that retries take no time, and behind some line of Python."""
    code = "import time; time.sleep = lambda seconds: None; from config import PrepareConfig; from internals import cli, start; import prepare_data"
    return [
        "-c",
        f"{code}\n{first}\nstart.run(lambda: prepare_data.prepare(cli.parse(PrepareConfig, '')))",
        *arguments[1:],
    ]


def test_the_hub(tmp_path, serve, hub_folder):
    handler, env = serve()
    handler.commit = "1" * 40
    result = run_script(*hub_command(tmp_path / "out"), env=env)
    assert result.returncode == 0, result.stderr
    assert "4 files" in result.stdout
    meta = read_meta(tmp_path / "out")
    assert meta["source"] == {
        "kind": "hub", "repository": "wikimedia/wikipedia", "config": "20231101.simple", "revision": "main",
        "commit": "1" * 40, "files": 4,
        "bytes": sum(path.stat().st_size for path in hub_folder.rglob("*.parquet")),
    }  # fmt: skip
    want = [as_text(row) for n in range(4) for row in make_articles(1000, seed=n)]
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == sorted(want)
    assert len(handler.downloads) == 4
    assert {revision for _, revision in handler.downloads} == {"1" * 40}
    names = [name for name, _ in handler.downloads]
    assert sorted(files(tmp_path / "out")) == ["meta.json", "train_000000.bin", "val_000000.bin"]
    again = run_script(*hub_command(tmp_path / "out"), env={**env, "HF_HUB_OFFLINE": "1"})
    assert again.returncode == 0 and "finished" in again.stdout  # without asking the hub
    assert [name for name, _ in handler.downloads] == names


def test_faults_of_the_hub_are_overcome(tmp_path, serve):
    _, env = serve()
    assert run_script(*hub_command(tmp_path / "once"), env=env).returncode == 0
    faults = ["error", "drop", "stall", "truncate", "corrupt", "ok", "corrupt"]
    faults += ["error", "stall", "drop", "truncate", "drop"]
    handler, env = serve(faults)
    handler.unanswered = 1
    code = without_pauses(
        hub_command(tmp_path / "out"), "from internals import wikipedia; wikipedia.ANSWER_SECONDS = 5"
    )
    result = run_script(*code, env={**env, "HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert result.returncode == 0, result.stderr
    assert not handler.faults and not handler.unanswered  # each one happened
    assert "no answer in 5 s; trying again" in result.stderr
    assert files(tmp_path / "out") == files(tmp_path / "once")


@pytest.mark.parametrize("fault", ["error", "corrupt"])
def test_a_hub_that_stays_broken_is_one_message_and_then_it_goes_on(tmp_path, serve, fault):
    _, env = serve()
    assert run_script(*hub_command(tmp_path / "once"), env=env).returncode == 0
    handler, env = serve(["ok", "ok"] + [fault] * 1000)
    result = run_script(*without_pauses(hub_command(tmp_path / "out")), env=env)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "tried 6 times" in errors[0] and "Traceback" not in result.stderr
    state = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert state["file"] >= 2  # what came whole is done
    handler.faults.clear()
    handler.downloads.clear()
    handler.commit = "2" * 40  # the branch has moved on; this folder has not
    result = run_script(*hub_command(tmp_path / "out"), env=env)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "out") == files(tmp_path / "once")
    assert len(handler.downloads) <= 2 and {revision for _, revision in handler.downloads} == {hub.SHA}


def test_what_the_hub_has_not(tmp_path, serve):
    _, env = serve()
    for flags, words in (
        (["--language", "xx"], ["--language", "20231101.xx"]),
        (["--dump", "20200101"], ["--dump", "20231101"]),
        (["--revision", "nowhere"], ["--revision"]),
    ):
        assert_user_error(run_script(*hub_command(tmp_path / "out", *flags), env=env), *words)
    result = run_script(*hub_command(tmp_path / "out"), env={**env, "HF_HUB_OFFLINE": "1"})
    assert_user_error(result, "HF_HUB_OFFLINE")


def test_files_in_the_hugging_face_cache_are_used_and_left_there(tmp_path, serve):
    handler, env = serve()
    code = "from huggingface_hub import snapshot_download as s; s('wikimedia/wikipedia', repo_type='dataset')"
    assert run_script("-c", code, env={**env, "HF_HUB_DISABLE_XET": "1"}).returncode == 0
    assert len(handler.downloads) == 4
    cached = files(tmp_path / "home1" / "hub")
    result = run_script(*hub_command(tmp_path / "out"), env=env)
    assert result.returncode == 0, result.stderr
    assert len(handler.downloads) == 4
    assert cached.items() <= files(tmp_path / "home1" / "hub").items()


@posix
def test_kills_at_random_moments(tmp_path, serve, hub_folder):
    kills, more, low, high = int(os.environ.get("PREPARE_KILLS", "6")), [], 0.0, 1.5
    if "PREPARE_KILLS" in os.environ and "WIKIPEDIA_SAMPLE_DIR" in os.environ and "TIKTOKEN_CACHE_DIR" in os.environ:
        for path in hub_folder.rglob("*.parquet"):
            path.unlink()
            path.symlink_to(os.path.join(os.environ["WIKIPEDIA_SAMPLE_DIR"], path.name))
        more, low, high = ["--tokenizer", "gpt2"], 0.0, 4.0
    _, env = serve()
    arguments = hub_command(tmp_path / "out", "--shard-tokens", "1000000", *more)
    once = run_script(*hub_command(tmp_path / "once", "--shard-tokens", "1000000", *more), env=env)
    assert once.returncode == 0, once.stderr
    want, rng, survived, finished = files(tmp_path / "once"), random.Random(0), 0, 0
    while survived < kills:
        process = start(arguments, env=env)
        # Counted from the moment when it works in the folder: before, there is nothing to harm.
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / ".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(low, high))
        if process.poll() is None:
            process.kill()
            survived += 1
        _, stderr = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        if process.returncode == 0:
            assert files(tmp_path / "out") == want
            finished += 1
            for path in (tmp_path / "out").iterdir():
                path.unlink()
    result = run_script(*arguments, env=env)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "out") == want
    print(f"{survived} kills survived, {finished + 1} preparations finished")
