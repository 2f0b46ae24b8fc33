"""internals/source_size.py: preset laptop takes a text of any size without further flags."""

import gzip
import json
import re
from types import SimpleNamespace

import pytest
from articles import files, texts, write_parquet
from conftest import REPO, assert_user_error, run_script

from config import PrepareConfig
from internals.cli import parse
from internals.shards import read_meta
from internals.source_size import choose_by_size, val_fraction_for, vocab_size_for
from internals.start import UserError
from internals.text_files import LocalFiles
from internals.wikipedia import HubWikipedia
from prepare_data import Pipeline, make_source, prepare


def prose(size: int) -> str:
    """The embedded sample's articles one after another, `size` bytes of UTF-8."""
    rows = map(json.loads, (REPO / "sample" / "articles.jsonl").read_text(encoding="utf-8").splitlines())
    text = "\n\n".join(f"{row['title']}\n\n{row['text']}" for row in rows).encode("ascii", "ignore")
    return (text * (size // len(text) + 1))[:size].decode()


def numbers(count: int) -> str:
    """`count` lines of numbers, which have few different pairs of characters."""
    return "".join(f"{n * n % 99_991};{n % 1000},0.{n * 7 % 9973:04}\n" for n in range(count))


def laptop(folder, source, *more) -> list[str]:
    return ["prepare_data.py", "--preset", "laptop", "--source", str(source), "--data-dir", str(folder), *more]


def config(folder, source, *more) -> PrepareConfig:
    return parse(PrepareConfig, "", laptop(folder, source, *more)[1:])


def chosen(folder) -> tuple[int, float]:
    meta = read_meta(folder)
    return meta["vocab_size"], meta["val_fraction"]


@pytest.fixture
def novel(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text(prose(300_000), encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# The rule


@pytest.mark.parametrize(
    ("text_bytes", "vocab_size", "val_fraction"),
    [
        (0, 512, 0.1),
        (100_000, 512, 0.1),
        (204_799, 512, 0.1),
        (204_800, 1024, 0.1),
        (300_000, 1024, 0.1),
        (3_000_000, 8192, 0.1),
        (5_000_000, 8192, 0.08),
        (20_000_000, 8192, 0.02),
        (200_000_000, 8192, 0.005),
        (float("inf"), 8192, 0.005),
    ],
)
def test_the_rule(text_bytes, vocab_size, val_fraction):
    assert (vocab_size_for(text_bytes), val_fraction_for(text_bytes)) == (vocab_size, val_fraction)


def test_other_presets_and_flags_decide_themselves(novel, tmp_path, capsys):
    def after(*flags):
        cfg = parse(PrepareConfig, "", ["--source", str(novel), "--data-dir", str(tmp_path / "out"), *flags])
        return choose_by_size(cfg, make_source(cfg, tmp_path)), cfg

    for preset in ("wikipedia", "wikipedia-150m"):
        cfg, given = after("--preset", preset, "--tokenizer", "train")
        assert cfg == given and (cfg.trained_size, cfg.held_out) == (16_384, 0.005)
    cfg, given = after("--preset", "laptop", "--vocab-size", "600", "--val-fraction", "0.05")
    assert cfg == given and (cfg.trained_size, cfg.held_out) == (600, 0.05)
    assert capsys.readouterr().out == ""
    cfg, _ = after("--preset", "laptop", "--vocab-size", "600")
    assert (cfg.trained_size, cfg.held_out) == (600, 0.1)
    cfg, _ = after("--preset", "laptop", "--tokenizer", "bytes")
    assert (cfg.trained_size, cfg.held_out) == (None, 0.1)
    assert capsys.readouterr().out == "chosen by the size of the source: --val-fraction 0.1\n" * 2


@pytest.mark.parametrize(
    ("flags", "vocab_size", "val_fraction"),
    [([], 8192, 0.005), (["--max-tokens", "1e5"], 1024, 0.1), (["--max-tokens", "1e7"], 8192, 0.011)],
)
def test_max_tokens_limits_the_size(flags, vocab_size, val_fraction):
    cfg = choose_by_size(parse(PrepareConfig, "", ["--preset", "laptop", *flags]), SimpleNamespace(text_bytes=10**8))
    assert (cfg.trained_size, cfg.held_out) == (vocab_size, val_fraction)


@pytest.mark.parametrize(
    ("size", "basis", "vocab_size", "val_fraction"),
    [
        (11_700_000_000, "--max-tokens", 8192, 0.005),
        (1_600_000, "the size of the source", 8192, 0.1),
        (270_000, "the size of the source", 2048, 0.1),
    ],
)
def test_a_wikipedia_of_the_hub_is_as_large_as_its_files(
    tmp_path, monkeypatch, capsys, size, basis, vocab_size, val_fraction
):
    """The text is an estimate. A finished folder knows the size without the hub."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # HubWikipedia sets it
    cfg = parse(PrepareConfig, "", ["--preset", "laptop"])
    source = make_source(cfg, tmp_path)
    assert isinstance(source, HubWikipedia)
    source.resolve({"commit": "x", "files": [{"name": "a", "bytes": size // 2, "sha256": None}] * 2})
    chosen = choose_by_size(cfg, source)
    assert f"chosen by {basis}: --vocab-size {vocab_size}, --val-fraction" in capsys.readouterr().out
    assert (chosen.sources, chosen.data_dir) == (("wikipedia",), "data/laptop")
    assert (chosen.trained_size, chosen.held_out) == (vocab_size, val_fraction)
    finished = make_source(cfg, tmp_path)
    finished.recall(source.provenance())
    assert choose_by_size(cfg, finished) == chosen


@pytest.mark.parametrize(
    ("kind", "size"), [("folder", 400_000), ("gz", 900_000), ("parquet", 400_000), ("utf-16", 300_000)]
)
def test_sizes_of_folders_and_packed_files(tmp_path, kind, size):
    """A folder's files count together; of a packed file, the text counts, and not its size on the disk."""
    path = tmp_path / "in" / {"gz": "a.txt.gz", "utf-16": "a.txt"}.get(kind, f"a.{kind}")
    path.parent.mkdir()
    if kind == "folder":
        for number in range(4):
            (path.parent / f"{number}.txt").write_text(prose(100_000))
    elif kind == "gz":
        path.write_bytes(gzip.compress(prose(900_000).encode(), mtime=0))
    elif kind == "utf-16":
        path.write_text(prose(300_000), encoding="utf-16")
    else:
        text = prose(400_000)
        write_parquet(path, [{"id": "x" * 50 + str(n), "text": text[n : n + 4_000]} for n in range(0, 400_000, 4_000)])
    source = make_source(config(tmp_path / "out", path.parent), tmp_path)
    assert isinstance(source, LocalFiles) and size <= source.text_bytes < 1.1 * size
    prepare(config(tmp_path / "out", path.parent))
    if kind == "folder":
        assert chosen(tmp_path / "out") == (1024, 0.1)
    assert chosen(tmp_path / "out") == (vocab_size_for(source.text_bytes), val_fraction_for(source.text_bytes))


# ----------------------------------------------------------------------------------------------------------------------
# From a text to a model


def test_a_novel_needs_three_commands_and_no_flag_more(novel, tmp_path):
    data, runs = tmp_path / "data", tmp_path / "runs"
    result = run_script(*laptop(data, novel))
    assert result.returncode == 0, result.stderr
    assert "chosen by the size of the source: --vocab-size 1024, --val-fraction 0.1\n" in result.stdout
    assert chosen(data) == (1024, 0.1)
    splits = read_meta(data)["splits"]
    assert splits["train"]["bytes"] + splits["val"]["bytes"] == 300_000
    assert splits["val"]["tokens"] == int(0.1 * (splits["train"]["tokens"] + splits["val"]["tokens"]))
    assert texts(data, "val")[0] == prose(300_000)[-splits["val"]["bytes"] :]
    short = ["--max-iters", "1", "--tokens-per-iter", "512", "--eval-tokens", "512"]  # to keep the test short
    result = run_script(
        "train.py", "--preset", "laptop", "--data-dir", data, "--out-dir", runs, "--device", "cpu", *short
    )
    assert result.returncode == 0, result.stderr
    assert "1,024 tokens" in result.stdout
    result = run_script(
        "generate.py", "--preset", "laptop", "--checkpoint", runs, "--device=cpu", "--prompt=The", "--max-new-tokens=9"
    )
    assert result.returncode == 0 and result.stdout.startswith("The"), result.stderr


def test_repeating_is_nothing_to_do_and_another_command_is_named(novel, tmp_path):
    out = tmp_path / "out"
    prepare(config(out, novel))
    before = files(out)
    again = run_script(*laptop(out, novel))
    assert again.returncode == 0 and "is finished: nothing to do" in again.stdout
    for flags, message in (
        (["--vocab-size", "700"], "--tokenizer train --vocab-size 1024, not --tokenizer train --vocab-size 700;"),
        (["--val-fraction", "0.2"], "with --val-fraction 0.1, not 0.2;"),
        (["--tokenizer", "bytes"], "--tokenizer train --vocab-size 1024, not --tokenizer bytes;"),
        (["--preset", "wikipedia"], "with --tokenizer train --vocab-size 1024, not --tokenizer gpt2 and"),
        (["--preset", "wikipedia", "--val-fraction", "0.1"], "and with --max-tokens 60000000; give the same command"),
    ):
        assert_user_error(run_script(*laptop(out, novel, *flags)), message)
    with pytest.raises(UserError, match="prepared with --max-tokens 60000000, not 9000; give the same command"):
        prepare(config(out, novel, "--max-tokens", "9000"))  # the vocabulary that follows from it was not a flag
    prepare(config(out, novel, "--vocab-size", "1024", "--val-fraction", "0.1"))  # the same values, given as flags
    assert files(out) == before


def test_a_text_that_has_grown_is_another_source_and_no_other_flag(novel, tmp_path):
    """The user gave no --vocab-size, so the message must not ask about one."""
    prepare(config(tmp_path / "out", novel))
    novel.write_text(prose(700_000))
    with pytest.raises(UserError, match="from another source") as error:
        prepare(config(tmp_path / "out", novel))
    assert "--vocab-size" not in str(error.value) and "--val-fraction" not in str(error.value)
    prepare(config(tmp_path / "out", novel, "--overwrite"))
    assert chosen(tmp_path / "out") == (2048, 0.1)


def test_an_interrupted_command_resumes_with_the_same_numbers(novel, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(config(tmp_path / "once", novel))

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="finished work is kept"):
        patched.setattr(Pipeline, "finish", stop)
        prepare(config(out, novel))
    noted = json.loads((out / "progress.json").read_text())
    assert (noted["vocab_size"], noted["val_fraction"]) == (1024, 0.1)
    for flags in (["--vocab-size", "700"], ["--val-fraction", "0.2"]):
        with pytest.raises(UserError, match=f"is half done, with .*{flags[0]}"):
            prepare(config(out, novel, *flags))
    result = run_script(*laptop(out, novel))
    assert result.returncode == 0 and "resuming" in result.stdout, result.stderr
    assert files(out) == files(tmp_path / "once")


# ----------------------------------------------------------------------------------------------------------------------
# Small texts


def test_a_small_text_works_and_one_that_is_too_small_is_a_message_whose_advice_works(tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(prose(100_000))
    prepare(config(out, path))
    assert chosen(out) == (512, 0.1)
    assert read_meta(out)["splits"]["val"]["tokens"] > 10 * 256
    before = files(out)
    path.write_text(prose(5_000))
    result = run_script(*laptop(out, path, "--overwrite"))
    assert_user_error(result, "--val-fraction 0.1: leaves", "train.py --preset laptop needs 257", "such as")
    assert files(out) == before
    share = re.search(r"such as ([\d.]+),", result.stderr)[1]
    assert run_script(*laptop(out, path, "--overwrite", "--val-fraction", share)).returncode == 0
    before = files(out)
    path.write_text("Only this.")
    result = run_script(*laptop(out, path, "--overwrite", "--vocab-size", "9000"))
    assert_user_error(result, "--val-fraction 0.1: leaves 1 of 11 tokens for the val split", "257; give more text")
    path.write_text(" \n" * 500)
    assert_user_error(run_script(*laptop(out, path, "--overwrite")), "holds no text (1 empty article)")
    assert files(out) == before


def test_a_text_with_few_different_pairs_gets_a_smaller_vocabulary(tmp_path, capsys):
    """Nobody asked for 1,024 tokens. A size that was given is another matter."""
    path, out = tmp_path / "numbers.txt", tmp_path / "out"
    path.write_text(numbers(16_000))
    prepare(config(out, path))
    told = capsys.readouterr().out
    assert "--vocab-size 1024" in told and "of 257 tokens, all that the text yields, in" in told
    assert chosen(out) == (257, 0.1) and read_meta(out)["chosen_vocab_size"] == 1024
    before = files(out)
    prepare(config(out, path))
    assert "is finished: nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="--vocab-size 1024, not --tokenizer train --vocab-size 700;"):
        prepare(config(out, path, "--vocab-size", "700"))
    with pytest.raises(UserError, match=r"--vocab-size 1024: .* give --vocab-size 257, or more text"):
        prepare(config(out, path, "--vocab-size", "1024", "--overwrite"))
    assert files(out) == before


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_resuming_with_the_chosen_vocabulary_as_a_flag_is_the_same_command(tmp_path, monkeypatch, kind):
    """Also where the tokenizer is trained again: its file is lost, or the end of the text is held out after all."""
    path, out = tmp_path / f"numbers.{kind}", tmp_path / "out"
    lines = numbers(16_000).splitlines(keepends=True)
    rows = [{"id": "1", "text": "".join(lines[n : n + 100])} for n in range(0, 16_000, 100)]
    path.write_text("".join(lines) if kind == "txt" else "".join(json.dumps(row) + "\n" for row in rows))

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Pipeline, "finish", stop)
        prepare(config(out, path))
    (out / "tokenizer.json").unlink()
    vocab_size = str(json.loads((out / "progress.json").read_text())["vocab_size"])
    prepare(config(out, path, "--vocab-size", vocab_size))
    assert chosen(out) == (257, 0.1) and read_meta(out)["chosen_vocab_size"] == int(vocab_size)
