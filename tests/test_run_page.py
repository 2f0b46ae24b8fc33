"""run.html: what it shows is true, complete after a kill, and harmless."""

import base64
import dataclasses
import hashlib
import html
import itertools
import json
import os
import re
import shutil
import types

import pytest
import torch
from conftest import run_script
from pages import PROMPT, Parsed, parsed, rows
from runs import assert_same_end, full_disk, stop_at, tiny

import train
from internals import html_page, report, run_page

pytestmark = pytest.mark.usefixtures("quick")


# ----------------------------------------------------------------------------------------------------------------------
# Contents


def test_the_page_shows_every_evaluation(run):
    data, samples = parsed(run / "run.html").data, rows(run)
    assert [row["iter"] for row in samples] == [0, 8, 16, 20]
    assert [{name: view[name] for name in samples[0]} for view in data["views"]] == samples
    assert all(
        view["sample"].startswith(PROMPT) and view["label"].endswith(f" {view['iter']}") for view in data["views"]
    )
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, key in (("training", "train_loss"), ("validation", "val_loss")):
        expected = [[row["iter"], round(row[key], 4)] for row in metrics if row.get(key) is not None]
        assert data["curve"][name] == expected
    assert data["curve"]["rate"] == [[row["iter"], row["learning_rate"]] for row in metrics if row["iter"]]
    assert data["due"] is None


def test_its_settings_are_those_that_differ_from_the_presets_what_auto_chose_among_them(data_dir, tmp_path):
    cfg = tiny(data_dir, tmp_path, preset="laptop", dropout=0.25, eval_interval=8)
    for max_iters in (8, 9):
        train.train(dataclasses.replace(cfg, max_iters=max_iters, resume=max_iters > 8))
        page = (tmp_path / "run.html").read_text(encoding="utf-8")
        settings = re.search(r"<dt>settings</dt><dd>preset laptop, with (.*?)</dd>", page)[1].split(", ")
        for part in ("dropout 0.25", "eval_interval 8", f"n_inner {cfg.model.n_inner}", f"max_iters {max_iters}"):
            assert part in settings
        assert not [part for part in settings if part.startswith(("resume", "out_dir", "model", "vocab_size"))]


def test_a_long_training_curve_is_thinned():
    steps = [{"iter": n, "train_loss": 2.0, "learning_rate": 0.1} for n in range(1, 5_001)]
    evaluations = [{"iter": n, "val_loss": 3.0} for n in range(3_000)]
    drawn = run_page.curve([*evaluations, *steps], None)
    assert [iter for iter, _ in drawn["training"]] == [*range(1, 5_001, 3), 5_000]  # at most 2,000 points
    assert len(drawn["rate"]) == len(drawn["training"]) and len(drawn["validation"]) == 3_000


def test_one_more_evaluation_moves_none_of_those_shown():
    for count in range(201, 399):
        shown, then = (run_page.thinned(list(range(n)), 200) for n in (count, count + 1))
        assert then[:-1][: len(shown) - 1] == shown[:-1] and (shown[0], then[-1]) == (0, count) and len(then) <= 200
    assert [run_page.thinned(list(range(n)), 200) for n in (0, 1, 200)] == [[], [0], list(range(200))]


def test_the_head_names_what_is_not_the_presets(run):
    text = parsed(run / "run.html").text
    assert "finished iteration 20 of 20" in text
    for words in ("n_layer 2", "max_iters 20", "learning_rate 0.01", "2 layers, 2 heads, 16 dimensions", "float32"):
        assert words in text
    assert "vocab_size" not in text and "out_dir" not in text
    assert "(temperature 0.8, the 200 likeliest)" in text


def test_a_learning_rate_that_stays_is_not_said_to_fall(text_data, tmp_path, run):
    assert "and then falls, so that the model settles" in parsed(run / "run.html").text
    train.train(tiny(text_data, tmp_path, max_iters=1, min_lr=1e-2))
    assert "settles" not in parsed(tmp_path / "run.html").text


def test_texts_are_not_said_to_be_english(run, tmp_path):
    """A prompt from right to left must not turn the sentence around it."""
    page = (run / "run.html").read_text(encoding="utf-8")
    assert f'after the prompt “<bdi lang="" translate="no">{html.escape(PROMPT)}</bdi>”.' in page
    texts = [a for _, a in Parsed(page).tags if a.get("id") in ("sample", "passage")]
    assert [(a["lang"], a["translate"]) for a in texts] == [("", "no")] * 2


def test_a_page_that_cannot_run_its_script_says_so_first(run):
    page = (run / "run.html").read_text(encoding="utf-8")
    assert page.index("<body>") < page.index("<noscript>") < page.index("<h1>")


def test_after_a_change_of_the_prompt_each_sample_is_said_to_have_its_own(text_data, tmp_path):
    train.train(tiny(text_data, tmp_path, max_iters=8, sample_prompt=PROMPT))
    train.train(tiny(text_data, tmp_path, max_iters=12, sample_prompt="Another", resume=True))
    assert "after its prompt, which is marked" in parsed(tmp_path / "run.html").text


def test_the_page_of_a_stopped_run_names_the_iteration_that_it_reached(text_data, tmp_path, monkeypatch):
    stop_at(monkeypatch, text_data, tmp_path, 6, log_interval=100)  # the last row is of an earlier iteration
    assert "stopped iteration 7 of 20" in parsed(tmp_path / "run.html").text


def test_while_it_runs_the_page_says_when_the_next_is_due(text_data, tmp_path, monkeypatch):
    """After an hour, or after three times the seconds since the last page: 200 and 5,000 here."""
    clock = itertools.accumulate([1_000_000, 200, 5_000, 5_000, 5_000])  # the run begins; each page
    monkeypatch.setattr(report, "time", types.SimpleNamespace(time=lambda: next(clock)))
    pages, write = [], report.run_page
    monkeypatch.setattr(report, "run_page", lambda *args: (pages.append(Parsed(page := write(*args))), page)[1])
    train.train(tiny(text_data, tmp_path, max_iters=9))
    # The last two are of the finished run: its last evaluation, and RunLog.close
    assert [page.data["due"] for page in pages] == [1_000_200 + 3_600, 1_005_200 + 15_000, None, None]
    assert "running iteration 8 of 9" in pages[1].text and " left, not counting evaluations" in pages[1].text
    assert "finished" in pages[-1].text and " left" not in pages[-1].text.split("The run")[0]


# ----------------------------------------------------------------------------------------------------------------------
# Harmless


@pytest.mark.parametrize("kind", ["run", "text"])
def test_foreign_text_stays_text(run, tmp_path, kind):
    """Script tags in the validation text and in the prompt reach the page as data alone."""
    path = run / "run.html"
    if kind == "text":
        path = tmp_path / "text.html"
        result = run_script(
            "generate.py", "--checkpoint", run, f"--prompt={PROMPT}</script>", "--max-new-tokens", 9, "--html", path
        )
        assert result.returncode == 0, result.stderr
    page = parsed(path)
    scripts = [block for block in page.blocks if block[0] == "script"]
    shown = [
        SCRIPTS
        for SCRIPTS in (html_page.SCRIPT, html_page.HEADS)
        if "attention" in page.data or SCRIPTS != html_page.HEADS
    ]
    assert [text for _, attributes, text in scripts if not attributes] == shown
    assert len(scripts) == len(shown) + 1
    assert not {tag for tag, _ in page.tags} & {"img", "iframe", "link", "object", "base"}
    assert all(not name.startswith("on") and name not in ("style", "href", "src") for _, a in page.tags for name in a)
    assert "<img src=x onerror=alert(2)>" in "".join(
        page.data["views"][0].get("sample", "") or page.data["views"][0]["passage"]["text"]
    )
    assert "<script>" not in path.read_text().split('id="data">')[1].split("</script>")[0]

    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed["default-src"] == allowed["base-uri"] == allowed["form-action"] == "'none'"
    hashes = {kind: [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
              for tag, a, text in page.blocks if tag == kind and not a] for kind in ("script", "style")}  # fmt: skip
    assert {kind: allowed[f"{kind}-src"].split() for kind in hashes} == hashes
    assert "unsafe" not in policy and "http" not in policy


def test_the_scripts_never_write_html_and_stay_short():
    for script in (html_page.SCRIPT, html_page.HEADS):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|fetch|import", script)
    assert len(html_page.SCRIPT.splitlines()) < 190


def test_half_a_character_of_the_command_line_is_no_obstacle(text_data, tmp_path):
    train.train(tiny(text_data, tmp_path, max_iters=1, sample_prompt="caf\udcc3"))
    assert "finished" in parsed(tmp_path / "run.html").text


# ----------------------------------------------------------------------------------------------------------------------
# It costs the run nothing


def test_a_page_that_fails_costs_one_line(text_data, tmp_path, monkeypatch, run, capsys):
    def broken(*args):
        raise ValueError("no page today\nand why")

    monkeypatch.setattr(report, "run_page", broken)
    train.train(tiny(text_data, tmp_path, sample_prompt=PROMPT))
    assert capsys.readouterr().out.count("run.html could not be written (no page today); training continues") == 1
    assert_same_end(tmp_path, run)
    assert rows(tmp_path) == rows(run)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_a_row_that_is_not_finite_costs_no_page(text_data, tmp_path, run, value):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    strange = f'{{"iter": 5, "tokens": 5, "seconds": 1, "train_loss": {value}, "learning_rate": 0.1}}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_text(strange + path.read_text())
    (tmp_path / "run.html").unlink()
    train.train(tiny(text_data, tmp_path, resume=True, sample_prompt=PROMPT, max_iters=22))
    assert "finished" in parsed(tmp_path / "run.html").text
    assert path.read_text().startswith(strange)  # it stays where it is


def test_surprises_that_fail_cost_one_line(text_data, tmp_path, monkeypatch, run, capsys):
    def broken(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(report, "sample_row", broken)
    train.train(tiny(text_data, tmp_path, sample_prompt=PROMPT))
    assert capsys.readouterr().out.count("no row for it in samples.jsonl (CUDA out of memory.)") == 1
    assert_same_end(tmp_path, run)
    assert parsed(tmp_path / "run.html").data["views"] == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_one_line(text_data, tmp_path, monkeypatch, run, capsys):
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: (full_disk(tmp_path / "run.html.tmp"), evaluate(*args))[1])
    train.train(tiny(text_data, tmp_path, sample_prompt=PROMPT))
    assert capsys.readouterr().out.count("run.html: could not be written") == 1
    assert_same_end(tmp_path, run)


# ----------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


def without_times(page: Parsed) -> tuple:
    status = re.sub(r"(iteration [\d,]+ of [\d,]+).*", r"\1", page.text)
    return page.data, status


@pytest.mark.parametrize("name", ["save", "after save"])
@pytest.mark.parametrize("at", [8, 16])
def test_killed_and_resumed_gives_the_same_page(text_data, tmp_path, monkeypatch, run, name, at):
    """The kill comes before last.pt is written, or between last.pt and the page."""

    class Killed(BaseException):
        pass

    save = train.save

    def kill(run, state, best):
        if name == "after save":
            save(run, state, best)
        if state.iter == at:
            raise Killed
        if name == "save":
            save(run, state, best)

    out_dir = tmp_path / run.name
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save", kill)
        patch.setattr(report.RunLog, "close", lambda self: None)  # a killed run closes nothing
        train.train(tiny(text_data, out_dir, sample_prompt=PROMPT))
    with open(out_dir / "samples.jsonl", "a") as file:
        file.write('{"iter": 16, "pro')  # half a row
    train.train(tiny(text_data, out_dir, sample_prompt=PROMPT, resume=True))
    assert (out_dir / "samples.jsonl").read_bytes() == (run / "samples.jsonl").read_bytes()
    assert without_times(parsed(out_dir / "run.html")) == without_times(parsed(run / "run.html"))


def test_a_new_run_begins_with_an_empty_page(text_data, tmp_path):
    train.train(tiny(text_data, tmp_path, max_iters=8))
    train.train(tiny(text_data, tmp_path, max_iters=1, overwrite=True))
    assert [view["iter"] for view in parsed(tmp_path / "run.html").data["views"]] == [0, 1]


def test_a_folders_name_cannot_change_the_page(data_dir, tmp_path):
    train.train(tiny(data_dir, tmp_path / "a<img src=x>b", max_iters=1))
    page = parsed(tmp_path / "a<img src=x>b" / "run.html")
    assert "img" not in {tag for tag, _ in page.tags} and "a<img src=x>b" in page.text
