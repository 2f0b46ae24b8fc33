"""internals/show.py: the text around a token, and the article that it is part of, from the data folder alone."""

from articles import config, make_articles, texts, write_jsonl
from conftest import assert_user_error, run_script

from internals.windows import TokenStream
from prepare_data import prepare


def test_show(tmp_path):
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
            result = run_script("prepare_data.py", "--data-dir", tmp_path / "out", "--show", number)
            assert result.returncode == 0, result.stderr
            title = want[article].split("\n")[0]
            assert f"training token {number:,} of {len(stream):,}, in article {article + 1}: {title}\n" in result.stdout
    several = run_script("prepare_data.py", "--data-dir", tmp_path / "out", "--show", "1", "2", "--show", "3")
    assert several.stdout.count("training token") == 3
    for bad in (len(stream), -1, 10**12):
        assert_user_error(
            run_script("prepare_data.py", "--data-dir", tmp_path / "out", f"--show={bad}"), f"--show {bad}"
        )
    for bad in ("x", "1.5"):
        assert_user_error(run_script("prepare_data.py", "--data-dir", tmp_path / "out", "--show", bad), "--show")
    assert_user_error(run_script("prepare_data.py", "--data-dir", tmp_path / "none", "--show", "1"), "no such folder")
