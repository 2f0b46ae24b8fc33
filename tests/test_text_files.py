"""internals/text_files.py: several sources are one text; odd names and files; separators."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest
from articles import command, config, files, make_articles, posix, texts, write_jsonl
from conftest import REPO, assert_user_error, run_script

from config import PrepareConfig
from internals import reader, text_files
from internals.cli import parse
from internals.shards import read_meta
from internals.start import UserError
from internals.text_files import LocalFiles
from internals.tokenizer_json import END_OF_TEXT
from prepare_data import Pipeline, prepare


@pytest.mark.parametrize("preset", [[], ["--preset", "demo"], ["--preset=wikipedia-150m"], ["--preset", "laptop"]])
def test_several_sources_in_both_forms(preset):
    def sources(*flags):
        return parse(PrepareConfig, "", [*preset, *flags]).sources

    assert sources() == (("sample",) if "demo" in preset else ("wikipedia",))
    assert sources("--source", "a") == ("a",)
    assert sources("--source", "a", "b") == sources("--source", "a", "--source", "b") == ("a", "b")
    assert sources("--source", "b", "a", "--source", "c", "b") == ("b", "a", "c")


@pytest.mark.parametrize("flags", [["--source"], ["--source", ""], ["--source", "wikipedia", "a.txt"],
                                   ["--source", "a", "--source", "wikipedia"], ["--source", "sample", "wikipedia"]])  # fmt: skip
def test_sources_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(PrepareConfig, "", flags)
    assert ended.value.code == 2 and "--source" in capsys.readouterr().err


def test_several_sources_are_one_text(tmp_path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", make_articles(100, seed=ord(name)))
    both = make_articles(100, seed=ord("b")) + make_articles(100, seed=ord("a"))
    write_jsonl(tmp_path / "both.jsonl", both)
    flags = ["--source", tmp_path / "a.jsonl", "--source", tmp_path / "b.jsonl"]
    again = run_script(*command(tmp_path / "out", tmp_path / "b.jsonl", *flags))
    assert again.returncode == 0, again.stderr
    prepare(config(tmp_path / "one", tmp_path / "both.jsonl"))
    for name in ("train_000000.bin", "val_000000.bin"):
        assert files(tmp_path / "out")[name] == files(tmp_path / "one")[name]
    same = run_script(*command(tmp_path / "out", tmp_path / "b.jsonl", "--source", tmp_path / "a.jsonl"))
    assert same.returncode == 0 and "finished" in same.stdout
    other = run_script(*command(tmp_path / "out", tmp_path / "a.jsonl", "--source", tmp_path / "b.jsonl"))
    assert_user_error(other, "another source")
    twice = run_script(*command(tmp_path / "two", tmp_path / "a.jsonl", "--source", tmp_path / "a.*"))
    assert twice.returncode == 0 and "already taken" in twice.stdout
    with_sample = run_script(*command(tmp_path / "three", "sample", "--source", tmp_path / "a.jsonl"))
    assert with_sample.returncode == 0 and "2 files" in with_sample.stdout


@pytest.mark.parametrize("separator, between", [(END_OF_TEXT, f"\n{END_OF_TEXT}\n"), (END_OF_TEXT, END_OF_TEXT), (r"\n\n\n", "\n\n\n"),
                                                (r"\n---\n", "\n---\n"), (r"\n\n\n", "\r\n\r\n\r\n"), ("☃", "☃\n"), (r"\\n", r"\n")])  # fmt: skip
@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_a_separator_makes_documents(tmp_path, separator, between, ending, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1000)
    rng = random.Random(0)
    stories = [
        " ".join(rng.choices(["Zoë", "a city.", "river\n\nand", "東京"], k=rng.choice([3, 30, 300, 1500])))
        for _ in range(400)
    ]
    data = (between + between.join(stories) + between).encode()
    (tmp_path / f"a{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    got = {}
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        prepare(config(folder, tmp_path / f"a{ending}", separator=separator, workers=workers, val_fraction=0.3))
        got[workers] = files(folder)
    assert got[1] == got[3]
    assert sorted(texts(folder, "train") + texts(folder, "val")) == sorted(stories)
    assert sum(split["articles"] for split in read_meta(folder)["splits"].values()) == len(stories)


def test_end_of_text_without_the_flag_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text(END_OF_TEXT.join(row["text"] for row in make_articles(60)))
    (tmp_path / "b.txt").write_text("word " * 300_000 + END_OF_TEXT)
    (tmp_path / "c.txt").write_text("word " * 3000)
    result = run_script(*command(tmp_path / "out", tmp_path))
    assert result.returncode == 0, result.stderr
    notes = [line for line in result.stdout.splitlines() if "--separator" in line]
    assert notes == [
        f"note: {END_OF_TEXT} is taken as ordinary text in a.txt, b.txt; "
        f"if it separates documents there, give --separator '{END_OF_TEXT}'"
    ]
    result = run_script(*command(tmp_path / "out", tmp_path, "--separator", END_OF_TEXT))
    assert_user_error(result, "--separator")  # the finished folder has another setting


def test_a_separator_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("one <|end|> two " * 3000)
    (tmp_path / "b.txt").write_text("word " * 3000)
    result = run_script(*command(tmp_path / "out", tmp_path, "--separator", "<|end|>"))
    assert "note: the --separator does not occur in b.txt; each file without it is one document" in result.stdout


def test_another_separator_is_named_in_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n\n".join(row["text"] for row in make_articles(60)))
    prepare(config(tmp_path / "lines", tmp_path / "a.txt", separator=r"\n\n\n"))
    prepare(config(tmp_path / "none", tmp_path / "a.txt"))
    for folder, separator, words in (
        ("lines", "", r"was prepared with --separator '\n\n\n'; give"),
        ("lines", "---", r"was prepared with --separator '\n\n\n', not ---; give"),
        ("none", r"\n\n\n", "was prepared without --separator; give"),
    ):
        with pytest.raises(UserError) as error:
            prepare(config(tmp_path / folder, tmp_path / "a.txt", separator=separator))
        assert words in str(error.value)


@posix
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_odd_file_names_and_narrow_outputs(tmp_path, encoding):
    folder = os.path.join(os.fsencode(tmp_path), "in 東京\udcff".encode("utf-8", "surrogateescape"))
    os.mkdir(folder)
    rows = make_articles(60)
    write_jsonl(tmp_path / "a.jsonl", rows)
    os.rename(tmp_path / "a.jsonl", os.path.join(folder, b"a\xfe.jsonl"))
    with open(os.path.join(folder, b"b\xfe.txt"), "wb") as file:
        file.write(("Zoë " * 100).encode() + END_OF_TEXT.encode() + b"\xff")
    arguments = command(tmp_path / "out", os.fsdecode(folder))
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, *arguments], cwd=REPO, capture_output=True, env=env)
    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr and b"replaced invalid" in result.stdout
    os.rename(os.path.join(folder, b"a\xfe.jsonl"), os.path.join(folder, b"a\xfe.parquet"))
    result = subprocess.run([sys.executable, *arguments], cwd=REPO, capture_output=True, env=env)
    assert result.returncode == 2 and b"Traceback" not in result.stderr and b".parquet: cannot be read" in result.stderr


@posix
def test_control_characters_in_file_names_do_not_reach_the_terminal(tmp_path):
    name = "a\x1b[2J.txt"
    (tmp_path / name).write_text(f"word {END_OF_TEXT} " * 3000)
    (tmp_path / "b.\x1b[2J").write_text("left out")
    result = run_script(*command(tmp_path / "out", tmp_path, "--max-tokens", "20_000"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("a\ufffd[2J.txt") == 2  # the note on end-of-text, the document that was cut
    assert "1 .\ufffd[2j)" in result.stdout  # left out
    alone = run_script(*command(tmp_path / "alone", tmp_path / name, "--max-tokens", "20_000"))
    assert "a\ufffd[2J.txt: 1 file of" in alone.stdout and "\x1b" not in alone.stdout
    (tmp_path / name).write_bytes(bytes(1000))
    damaged = run_script(*command(tmp_path / "out", tmp_path, "--overwrite"))
    assert_user_error(damaged, "a\ufffd[2J.txt")
    assert "\x1b" not in result.stdout + damaged.stderr


def test_an_lfs_pointer_is_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("a.txt", "a.jsonl", "a.parquet", "a.txt.gz", "a.json"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer"):
            prepare(config(tmp_path / "out", tmp_path / name))


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2"])
def test_an_empty_file_is_not_a_compressed_one(tmp_path, ending):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", make_articles(100))
    (tmp_path / "in" / f"b.txt.{ending}").touch()
    with pytest.raises(
        UserError, match=rf"^b\.txt\.{ending}: is empty, so it is not a (gzip|zstd|bz2) file; leave it out"
    ):
        prepare(config(tmp_path / "out", tmp_path / "in"))


def test_a_source_without_text_counts_its_empty_articles(tmp_path):
    for count, words in ((1, "1 empty article"), (2, "2 empty articles")):
        write_jsonl(tmp_path / "a.jsonl", [{"text": " "}] * count)
        with pytest.raises(UserError, match=rf"holds no text \({words}\)"):
            prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))


def test_many_small_files(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3000):
        (tmp_path / "in" / f"{number}.txt").write_text(f"Text {number} and more")
    prepare(config(tmp_path / "out", tmp_path / "in"))
    assert len(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == 3000


def test_a_data_folder_inside_its_source_of_json_is_no_text(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(json.dumps(make_articles(100)))
    prepare(config(tmp_path / "in" / "out", tmp_path / "in", tokenizer="train", vocab_size=300))
    before = files(tmp_path / "in" / "out")
    prepare(config(tmp_path / "in" / "out", tmp_path / "in", tokenizer="train", vocab_size=300))  # finished
    prepare(config(tmp_path / "in" / "out", tmp_path / "in", tokenizer="train", vocab_size=300, overwrite=True))
    assert files(tmp_path / "in" / "out") == before


def test_a_file_that_grows_while_it_is_prepared_is_named(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_articles(100))

    def grow(self):
        with open(tmp_path / "a.jsonl", "a") as file:
            file.write('{"text": "more"}\n')
        tokenize_source(self)

    tokenize_source = Pipeline.tokenize_source
    monkeypatch.setattr(Pipeline, "tokenize_source", grow)
    with pytest.raises(UserError, match=r"a\.jsonl: has changed since the command began"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))


def test_a_file_that_another_of_its_size_replaces_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one text")
    source = LocalFiles((str(path),), reader.ReadOptions())
    path.write_text("two text")
    os.utime(path, ns=(0, 0))  # the clocks of some file systems tick slowly
    with pytest.raises(UserError, match=r"a\.txt: has changed since the command began"):
        source.fetch(0)


def test_a_file_that_grows_while_it_is_read_is_named(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_articles(3000))
    assert (tmp_path / "a.jsonl").stat().st_size > 2 * reader.CHUNK_BYTES
    read = text_files.read_chunks

    def read_and_grow(path, name, options):
        for number, chunk in enumerate(read(path, name, options)):
            if number == 1:
                with open(path, "a") as file:
                    file.write('{"text": "more"}\n')
            yield chunk

    monkeypatch.setattr(text_files, "read_chunks", read_and_grow)
    with pytest.raises(UserError, match=r"a\.jsonl: has changed since the command began"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    assert not (tmp_path / "out" / "meta.json").exists()
