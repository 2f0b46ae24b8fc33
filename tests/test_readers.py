"""internals/readers.py, internals/parquet.py: every file type gives the same articles, and odd ones come back exactly."""

import bz2
import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from articles import as_text, command, config, make_articles, texts, write_jsonl, write_parquet
from conftest import assert_user_error, needs_gpt2, run_script

from internals import reader, readers
from internals.articles import tokenize
from internals.reader import ReadOptions
from internals.readers import read_chunks
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from prepare_data import prepare


def tokens_of(path, tokenizer="bytes"):
    return [tokenize(chunk, tokenizer, 0.2) for chunk in read_chunks(path, path.name, ReadOptions())]


def test_every_file_type_makes_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 10_000)  # for many chunks, and lines longer than a block
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
        parts = [tokenize(chunk, "bytes", 0.2) for chunk in read_chunks(path, path.name, ReadOptions())]
        assert len(parts) > 1
        got[path.name] = np.concatenate([part.tokens for part in parts]).tobytes()
        assert sum(len(part.lengths) for part in parts) == len(rows)
    assert len(set(got.values())) == 1


def test_each_txt_file_is_one_document(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    want = [as_text(row) for row in make_articles(60)]
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


def test_invalid_unicode_is_replaced_and_counted(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(60):
        (tmp_path / "in" / f"{n:02d}.txt").write_bytes(f"Text {n}{' more' * 20}".encode())
    (tmp_path / "in" / "latin.txt").write_bytes("Zo\xeb".encode("latin-1"))
    (tmp_path / "in" / "lone.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude00"}\n')
    table = pa.table({"text": pa.array([b"par\xffquet", "東京".encode()]).view(pa.string())})
    pq.write_table(table, tmp_path / "in" / "p.parquet")
    result = run_script(*command(tmp_path / "out", tmp_path / "in"))
    assert result.returncode == 0, result.stderr
    assert "in 3 files" in result.stdout
    got = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert {"Zo\ufffd", "a \ufffd b 😀", "par\ufffdquet", "東京"} <= set(got)
    assert len(got) == 64


def test_a_byte_order_mark_is_not_text(tmp_path):
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
        got = [a for chunk in read_chunks(tmp_path / name, name, ReadOptions()) for a in chunk.articles()]
        assert [(key, title or "", text.decode()) for key, title, text in got] == [
            (b"7", "", "a"),
            (None, "", "b"),
            (None, "T", "c"),
        ]
    assert (
        bytes(t if t < 256 else 10 for t in tokens_of(tmp_path / "c.parquet")[0].tokens.tolist()) == b"T\n\nx\nT\n\ny\n"
    )


def broken(tmp_path, name):
    """A source that cannot be read, and the words that its message must contain."""
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


@pytest.mark.parametrize("error", [MemoryError(), pa.ArrowMemoryError("malloc of size 40000064 failed")])
def test_a_file_that_does_not_fit_into_memory_is_named(error):
    with pytest.raises(UserError, match=r"^a\.json: does not fit into memory"), reader.reading("a.json"):
        raise error


def as_rows(path, options=ReadOptions()):  # noqa: B008 (it is frozen)
    return [a for chunk in read_chunks(path, path.name, options) for a in chunk.articles()]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_title_that_is_the_text_comes_once(tmp_path, ending):
    rows, path = [{"id": "1", "title": "T", "text": "x"}], tmp_path / f"a.{ending}"
    (write_parquet if ending == "parquet" else write_jsonl)(path, rows)
    assert as_rows(path, ReadOptions(text_column="title")) == [(b"1", None, b"T")]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_nan_is_not_an_id(tmp_path, ending):
    """pandas writes it for a missing id. As an id, it would send all these articles to one split."""
    rows, path = [{"id": float("nan"), "text": "x"}], tmp_path / f"a.{ending}"
    (write_parquet if ending == "parquet" else write_jsonl)(path, rows)
    assert as_rows(path) == [(None, None, b"x")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps([{"text": "x"}] * 200), "is one JSON document of more than 2 GB"),
        ("\n " + json.dumps([{"text": "x"}] * 200), "is one JSON document of more than 2 GB"),
        (json.dumps({"text": "x" * 2000}, indent=2), r"is one JSON document of more than 2 GB.* \(jq -c \.\)"),
        ('{"text": "cut\n' + '{"text": "x"}\n' * 200, "line 1: invalid JSON"),
    ],
)
@pytest.mark.parametrize("ending", [".json", ".json.gz"])
def test_a_text_too_long_for_one_json_document(tmp_path, text, words, ending, monkeypatch):
    """The limit holds for the text in memory, not for the packed file. A broken first line does not make a document."""
    monkeypatch.setattr(readers, "DOCUMENT_BYTES", 1000)
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    with pytest.raises(UserError, match=words):
        as_rows(path)


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.zst", ".jsonl.bz2"])
@pytest.mark.parametrize(
    "form", ["lines", "array", "pretty array", "pretty objects", "one object", "lines of arrays", "one line", "bom"]
)
@pytest.mark.parametrize("chunk_bytes", [reader.CHUNK_BYTES, 10_000])
def test_json_in_every_form(tmp_path, form, ending, chunk_bytes, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
    rows = make_articles(1 if form == "one object" else 300)
    text = {
        "lines": "".join(json.dumps(row) + "\n" for row in rows),
        "array": json.dumps(rows),
        "pretty array": json.dumps(rows, indent=2) + "\n",
        "pretty objects": "\n".join(json.dumps(row, indent=4) for row in rows),
        "one object": json.dumps(rows[0], indent=1),
        "lines of arrays": json.dumps(rows[:100]) + "\n" + json.dumps(rows[100:]),
        "one line": " ".join(json.dumps(row) for row in rows),
        "bom": "\ufeff" + json.dumps(rows, ensure_ascii=False, indent=0),
    }[form].encode()
    pack = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".zst": lambda data: pa.Codec("zstd").compress(data).to_pybytes(),
    }
    (tmp_path / f"a{ending}").write_bytes(pack.get(os.path.splitext(ending)[1], bytes)(text))
    got = as_rows(tmp_path / f"a{ending}")
    assert [(a.id.decode(), a.title, a.text.decode()) for a in got] == [
        (row["id"], row["title"], row["text"]) for row in rows
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        ('[{"text": "a"}, {"text": "b"', ["invalid JSON"]),
        ('[{"text": "a"}, 7]', ["record 2", "not a JSON object", "; fix or delete it"]),
        ('{\n "body": "x"\n}', ["'text'", "--text-column", "body"]),
        ('{"n": 3, "data": [{"text": "x"}]}', ["'text'", "write the list 'data'", "jq '.[\"data\"]' FILE"]),
        ('"only a string"', ["not a JSON object"]),
        ("no json at all", ["line 1", "invalid JSON"]),
        ('{"text": "a"}\n{"text": "b",\n', ["line 2: invalid JSON (", ", column 14); fix or delete it"]),
        ("[" * 100_000, ["invalid JSON"]),
    ],
)
def test_json_that_is_not_articles(tmp_path, text, words):
    for name in ("a.json", "b.jsonl"):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as error:
            prepare(config(tmp_path / "out", tmp_path / name))
        for word in (name, *words):
            assert word in str(error.value)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("form", ["doc", "doc, revisions", "json", "doc, Windows"])
@pytest.mark.parametrize("pack", ["", ".bz2"])
def test_what_wikiextractor_writes(tmp_path, form, pack, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 5000)
    rows, want = make_articles(100), []
    for folder, part in (("AA", rows[:60]), ("AB", rows[60:])):
        lines = []
        for row in part:
            title = f'{row["title"]} "A & B"'
            want.append(f"{title}\n\n{row['text']}".strip())
            address = f"https://en.wikipedia.org/wiki?curid={row['id']}"
            if form == "json":
                lines.append(
                    json.dumps({"id": row["id"], "revid": "1", "url": address, "title": title, "text": row["text"]})
                )
            else:
                revision = ' revid="1"' if "revisions" in form else ""
                head = f'<doc id="{row["id"]}"{revision} url="{address}" title="{title}">'
                lines.append(f"{head}\n{title}\n\n{row['text']}\n\n</doc>")
        (tmp_path / "in" / folder).mkdir(parents=True)
        data = "".join(line + "\n" for line in lines).encode()
        data = data.replace(b"\n", b"\r\n") if "Windows" in form else data
        (tmp_path / "in" / folder / f"wiki_00{pack}").write_bytes(bz2.compress(data) if pack else data)
    prepare(config(tmp_path / "out", tmp_path / "in"))
    got = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert sorted(text.strip() for text in got) == sorted(want)
    (tmp_path / "in" / "AA" / "wiki_01").write_text("<doc id=7>\nText\n</doc>\nloose text</doc>")
    with pytest.raises(UserError, match="wiki_01, <doc> 1"):
        prepare(config(tmp_path / "other", tmp_path / "in"))


@pytest.mark.parametrize("chunk_bytes", [5, 1 << 20])  # a mark may lie in two blocks
@pytest.mark.parametrize("pack", ["", ".bz2"])
def test_a_cut_file_of_wikiextractor_is_refused(tmp_path, pack, chunk_bytes, monkeypatch):
    whole = b'<doc id="7">\nText\n</doc>\n<doc id="8">\nMore\n</doc>'
    path = tmp_path / f"wiki_00{pack}"

    def articles(data):
        path.write_bytes(bz2.compress(data) if pack else data)
        return [article.text for article in as_rows(path)]

    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
    for end in (b"", b"\n", b"\r\n \n"):
        assert articles(whole + end) == [b"Text", b"More"]
    for cut in (-1, -9, -17, 18):
        with pytest.raises(UserError, match=rf"^wiki_00{pack}: .* cut short"):
            articles(whole[:cut])
