"""internals/encodings.py: text in any encoding is read correctly, or the file and the place are named."""

import codecs
import gzip
import json

import pyarrow as pa
import pytest
from articles import command, config, files, texts
from conftest import run_script

from internals import reader
from internals.shards import read_meta
from internals.start import UserError
from internals.windows import TokenStream
from prepare_data import prepare

FRENCH = "Les élèves déjà arrivés à l’école étaient très contents. Voilà l’été, où naît l’espoir.\n" * 60
MARKED = {
    "utf-8-sig": FRENCH.encode("utf-8-sig"),
    "utf-16-le": codecs.BOM_UTF16_LE + FRENCH.encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + FRENCH.encode("utf-16-be"),
    "utf-32-le": codecs.BOM_UTF32_LE + FRENCH.encode("utf-32-le"),
    "utf-32-be": codecs.BOM_UTF32_BE + FRENCH.encode("utf-32-be"),
}
PACK = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: pa.Codec("zstd").compress(data).to_pybytes()}


def whole_text(folder):
    """A source that is one document: its end is held out."""
    streams = [TokenStream.open(folder, split) for split in ("train", "val")]
    return bytes(t for s in streams for t in s.read(0, len(s)).tolist() if t < 256).decode()


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("encoding", MARKED)
def test_a_byte_order_mark_decides(tmp_path, encoding, ending, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1001)  # chunks end inside characters
    (tmp_path / f"a.txt{ending}").write_bytes(PACK[ending](MARKED[encoding]))
    prepare(config(tmp_path / "out", tmp_path / f"a.txt{ending}"))
    assert whole_text(tmp_path / "out") == FRENCH
    other = config(tmp_path / "other", tmp_path / f"a.txt{ending}", encoding="cp1252")  # the mark wins
    prepare(other)
    assert whole_text(tmp_path / "other") == FRENCH


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-be", "latin-1", "shift_jis"])
def test_json_lines_in_another_encoding(tmp_path, encoding):
    rows = [{"title": f"Nº {n}", "text": ("été " if encoding != "shift_jis" else "東京 ") * 50} for n in range(60)]
    if encoding == "shift_jis":
        rows = [{**row, "title": "題"} for row in rows]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = codecs.BOM_UTF32_BE + data.encode(encoding) if encoding == "utf-32-be" else data.encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(data)
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", encoding="utf-8" if "utf" in encoding else encoding))
    got = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert sorted(got) == sorted(f"{row['title']}\n\n{row['text']}" for row in rows)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "utf-16-be", "utf-32-le", "koi8-r", "gbk"])
@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".jsonl"])
def test_another_encoding_is_refused_and_the_advice_works(tmp_path, encoding, ending):
    text = {"koi8-r": "Всё хорошо, все довольны. ", "gbk": "東京是日本的首都。", "latin-1": "Les élèves déjà là. "}
    text = plain = text.get(encoding, "“L’été” déjà. ") * 200
    if ending == ".jsonl":
        text = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    data = text.encode(encoding)
    source = tmp_path / f"a{ending}"
    source.write_bytes(gzip.compress(data) if ending == ".txt.gz" else data)
    with pytest.raises(UserError) as error:
        prepare(config(tmp_path / "out", source))
    for word in (f"a{ending}", "--encoding", "NUL" if "utf" in encoding else "byte"):
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not files(tmp_path / "out")
    prepare(config(tmp_path / "out", source, encoding=encoding))
    assert plain.strip() in whole_text(tmp_path / "out")


@pytest.mark.parametrize("data", [bytes(5000), b"Some text. " * 900 + bytes(100), b"%PDF-1.4 \xff\xfe\x9c\xe2" * 300])
def test_what_is_not_text_is_refused(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.txt: .*--encoding"):
        prepare(config(tmp_path / "out", tmp_path / "a.txt"))


def test_the_place_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 10 + "Zoë\n".encode("latin-1") * 100)
    with pytest.raises(UserError, match=r"first at byte 52, in line 11"):
        prepare(config(tmp_path / "out", tmp_path / "a.txt"))


def test_the_likely_encoding_is_suggested(tmp_path):
    for encoding, suggested in (
        ("latin-1", "cp1252"),
        ("cp1252", "cp1252"),
        ("utf-16-be", "utf-16-be"),
        ("utf-32-le", "utf-32-le"),
    ):
        text = FRENCH.replace("’", "'") if encoding == "latin-1" else FRENCH
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=rf"--encoding \(perhaps {suggested}"):
            prepare(config(tmp_path / "out", tmp_path / "a.txt"))


def test_a_utf8_file_under_another_encoding_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(FRENCH, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt: is UTF-8, but --encoding is cp1252"):
        prepare(config(tmp_path / "out", tmp_path / "a.txt", encoding="cp1252"))


@pytest.mark.parametrize("name", ["nonsense", "base64", "rot13", "idna", "punycode", "undefined"])
def test_an_unknown_encoding_is_a_message(tmp_path, name):
    with pytest.raises(UserError, match=rf"--encoding {name}"):
        prepare(config(tmp_path / "out", tmp_path, encoding=name))


@pytest.mark.parametrize(("encoding", "half"), [("unicode_escape", r"\ud83d"), ("utf-7", "+2D0-")])
def test_half_a_character_that_a_text_spells_out_is_replaced(tmp_path, encoding, half):
    (tmp_path / "a.txt").write_text("A long enough text. " * 1000 + half + " and more." * 100)
    prepare(config(tmp_path / "out", tmp_path / "a.txt", encoding=encoding))
    assert whole_text(tmp_path / "out") == "A long enough text. " * 1000 + "\ufffd" + " and more." * 100
    assert read_meta(tmp_path / "out")["repaired_files"]["a.txt"][0] == 1


def test_repaired_files_are_listed_with_their_share(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(60):
        data = ("é " * 500).encode()
        (tmp_path / "in" / f"{number:02d}.txt").write_bytes(data + (b"\xff\xff" if number < 12 else b"xx"))
    result = run_script(*command(tmp_path / "out", tmp_path / "in"))
    assert result.returncode == 0, result.stderr
    shown = " ".join(result.stdout.split())  # without its line breaks
    assert "in 12 files" in shown and "00.txt (0.2%)" in shown and "and 2 more" in shown


def test_a_long_document_is_one_repaired_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1000)  # for many pieces
    (tmp_path / "a.txt").write_bytes((("é " * 300).encode() + b"\xff") * 30)
    prepare(config(tmp_path / "out", tmp_path / "a.txt"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "replaced invalid Unicode with U+FFFD in 1 file (share of the characters): a.txt (0.17%)" in shown
    assert read_meta(tmp_path / "out")["repaired_files"] == {"a.txt": [30, 30 * 601]}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "UTF16", "U16"])
def test_utf16_means_little_endian_where_there_is_no_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(FRENCH.encode("utf-32-le" if "32" in encoding else "utf-16-le"))
    prepare(config(tmp_path / "out", tmp_path / "a.txt", encoding=encoding))
    assert whole_text(tmp_path / "out") == FRENCH
