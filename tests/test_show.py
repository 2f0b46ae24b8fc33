"""internals/show.py: the text around a token, and the article that it is part of, from the data folder alone."""

import pytest
from articles import config, make_articles, texts, write_jsonl
from conftest import run_script

from config import PrepareConfig
from internals.cli import parse
from internals.start import UserError
from internals.windows import TokenStream
from prepare_data import prepare


def test_show(tmp_path, capsys):
    rows = make_articles(100)
    write_jsonl(tmp_path / "a.jsonl", rows)
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", shard_tokens=5000))
    (tmp_path / "a.jsonl").unlink()
    stream, want = TokenStream.open(tmp_path / "out", "train"), texts(tmp_path / "out", "train")
    starts = [0]
    for text in want:
        starts.append(starts[-1] + len(text.encode()) + 1)
    for article in (0, 7, len(want) - 1):
        for number in (starts[article], starts[article + 1] - 1):
            prepare(config(tmp_path / "out", "sample", show=((number,),)))
            title = want[article].split("\n")[0]
            line = f"training token {number:,} of {len(stream):,}, in article {article + 1}: {title}\n"
            assert line in capsys.readouterr().out
    several = run_script("prepare_data.py", "--data-dir", tmp_path / "out", "--show", "1", "2", "--show", "3")
    assert several.returncode == 0 and several.stdout.count("training token") == 3, several.stderr


def test_a_token_that_cannot_be_shown_is_a_message(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", make_articles(100))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    for bad in (len(TokenStream.open(tmp_path / "out", "train")), -1, 10**12):
        cfg = parse(PrepareConfig, "", ["--data-dir", str(tmp_path / "out"), f"--show={bad}"])
        with pytest.raises(UserError, match=rf"^--show {bad}: "):
            prepare(cfg)
    for bad in ("x", "1.5"):
        with pytest.raises(SystemExit):
            parse(PrepareConfig, "", ["--show", bad])
        assert "--show" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such folder"):
        prepare(config(tmp_path / "none", "sample", show=((1,),)))


def test_a_damaged_shard_is_a_message(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_articles(100))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    path = tmp_path / "out" / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")
    last = len(TokenStream.open(tmp_path / "out", "train")) - 1
    with pytest.raises(UserError, match=r"--show: the shards have token 65535, .*train\.py --check"):
        prepare(config(tmp_path / "out", "sample", show=((last,),)))


def test_the_first_line_of_an_article_ends_with_the_article(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"A short row, number {number}."} for number in range(300)])
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))
    capsys.readouterr()
    prepare(config(tmp_path / "out", "sample", show=((0,),)))
    title = texts(tmp_path / "out", "train")[0]
    assert f"in article 1: {title}\n" in capsys.readouterr().out
