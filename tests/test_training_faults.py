"""A fault during training costs nothing that was saved: full disks, and files that cannot be read or written."""

import math
import os

import pytest
import torch
from conftest import run_script
from runs import assert_same_checkpoints, assert_same_end, full_disk, metrics, stop_at, tiny

import train
from internals import checkpoint, report, samples
from internals.machine import make_machine
from internals.run import Run, TrainState
from internals.start import UserError

pytestmark = pytest.mark.usefixtures("quick")


# ----------------------------------------------------------------------------------------------------------------------
# The disk is full


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["last.pt.tmp", "best.pt.tmp"])
def test_a_full_disk_keeps_what_was_saved(data_dir, tmp_path, monkeypatch, straight, name):
    before = []

    def evaluate_then_full(*args):
        if (tmp_path / "last.pt").exists():
            before.append((tmp_path / "last.pt").read_bytes())
            full_disk(tmp_path / name)
        return evaluate(*args)

    evaluate = train.evaluate
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=f"{name.removesuffix('.tmp')}: .*No space left"),
    ):
        patch.setattr(train, "evaluate", evaluate_then_full)
        train.train(tiny(data_dir, tmp_path))
    assert before == [(tmp_path / "last.pt").read_bytes()]
    assert checkpoint.load(tmp_path / "best.pt")["iter"] == (8 if name == "last.pt.tmp" else 0)
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert_same_end(tmp_path, straight)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("until", [9, 14, 99])  # room again before the next save, after it, never
def test_rows_that_cannot_be_written_wait_and_cost_nothing(data_dir, tmp_path, monkeypatch, straight, capsys, until):
    """The disk is full for metrics.jsonl alone, from the evaluation at iteration 8 on."""
    path, open_file = tmp_path / "metrics.jsonl", open

    def full(name, mode="r", *args, **kwargs):
        last = tmp_path / "last.pt"
        is_metrics = str(name).startswith(str(path)) and ("a" in mode or "w" in mode)
        if is_metrics and last.exists() and 8 <= now[0] < until:
            file = open_file("/dev/full", mode, *args, **kwargs)
            return file
        return open_file(name, mode, *args, **kwargs)

    get_lr, now = train.get_lr, [0]
    monkeypatch.setattr(train, "get_lr", lambda it, cfg: (now.__setitem__(0, it + 1), get_lr(it, cfg))[1])
    monkeypatch.setattr("builtins.open", full)
    train.train(tiny(data_dir, tmp_path))
    assert capsys.readouterr().out.count("metrics.jsonl: could not be written") == 1  # printed once
    assert_same_checkpoints(tmp_path, straight)
    assert metrics(tmp_path) == (metrics(straight)[:8] if until == 99 else metrics(straight))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_full_from_the_start(data_dir, tmp_path):
    full_disk(tmp_path / "config.json.tmp")
    with pytest.raises(UserError, match=r"config.json: could not be written \(No space left"):
        train.train(tiny(data_dir, tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out-dir .*/file: is a file; give a folder"):
        train.train(tiny(data_dir, tmp_path / "file"))


# ----------------------------------------------------------------------------------------------------------------------
# metrics.jsonl


@pytest.mark.parametrize(
    "damage",
    [b"\n\n", b"a note of mine\n", b'"no object"\n', b'{"iter": "three"}\n', b'{"loss": "\xff\xc3"}\n', b"[1, 2]\n"],
    ids=["blank lines", "a note", "a text", "an odd iter", "no UTF-8", "a list"],
)
def test_lines_that_are_no_rows_stay_and_never_stop_a_resume(data_dir, tmp_path, monkeypatch, straight, damage):
    stop_at(monkeypatch, data_dir, tmp_path, 7)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], damage, *lines[3:], b'{"iter": 8, "tok']))
    train.train(tiny(data_dir, tmp_path, resume=True))
    content = path.read_bytes()
    assert damage in content and b'"tok\n' not in content
    path.write_bytes(content.replace(damage, b""))
    assert_same_end(tmp_path, straight)


def test_metrics_that_cannot_be_read_are_moved_aside(data_dir, tmp_path, monkeypatch, straight, capsys):
    stop_at(monkeypatch, data_dir, tmp_path, 7)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert "metrics.jsonl: cannot be read" in capsys.readouterr().out
    assert [row["iter"] for row in metrics(tmp_path)] == list(range(9, 21))
    assert len(list(tmp_path.glob("metrics.jsonl.unreadable-*"))) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Curves and sample text


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_backend_of_a_notebook_is_no_obstacle_to_the_curves(tmp_path, backend):
    code = (
        "import sys; from pathlib import Path; from internals.report import plot\n"
        "plot([{'iter': 0, 'tokens': 0, 'train_loss': None, 'val_loss': 5.0}], Path(sys.argv[1]), None)"
    )
    result = run_script("-c", code, tmp_path / "loss.png", env={**os.environ, "MPLBACKEND": backend})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_curves_that_cannot_be_drawn_cost_one_line(data_dir, tmp_path, monkeypatch, straight, capsys):
    def broken(*args):
        raise ValueError("Key backend: 'nonsense' is not a valid value\nand a page of others")

    monkeypatch.setattr(report, "plot", broken)
    train.train(tiny(data_dir, tmp_path))
    out = capsys.readouterr().out
    assert out.count("loss.png could not be written (Key backend: 'nonsense' is not a valid value)") == 1
    assert "Curves: " not in out and f"Page: {tmp_path / 'run.html'}" in out
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("prompt", ["", "The history of\x1b"])
def test_samples_of_text_change_nothing(data_dir, tmp_path, monkeypatch, straight, capsys, prompt):
    train.train(tiny(data_dir, tmp_path / "with", sample_prompt=prompt))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    unwrapped = out.replace("\n    ", " ")  # a long word goes to the next line, and "of" with it
    assert unwrapped.count(" " + prompt.replace("\x1b", "\ufffd")) >= 4
    assert_same_end(tmp_path / "with", straight)

    def unavailable(name):
        raise UserError("the gpt2 tokenizer's vocabulary could not be fetched")

    monkeypatch.setattr(samples, "load_tokenizer", unavailable)
    train.train(tiny(data_dir, tmp_path / "without", sample_prompt=prompt))
    assert "No sample text: the gpt2 tokenizer's" in capsys.readouterr().out
    assert_same_end(tmp_path / "without", straight)


def test_sample_text_that_fails_costs_one_line(data_dir, tmp_path, monkeypatch, straight, capsys):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "generate_text", fail)
    train.train(tiny(data_dir, tmp_path))
    assert "no sample text: CUDA out of memory." in capsys.readouterr().out
    assert_same_end(tmp_path, straight)


def test_out_of_memory_names_the_processes_that_hold_the_card(data_dir, tmp_path, monkeypatch):
    def fail(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(train, "held_by_others", lambda share: "others hold 23 of 24 GiB")
    with pytest.raises(UserError, match=r"^out of memory; others hold 23 of 24 GiB$"):
        train.main(tiny(data_dir, tmp_path))


def test_a_loss_that_is_nan_from_the_start_blames_the_model_that_the_run_started_from(data_dir, tmp_path):
    cfg = tiny(data_dir, tmp_path, init_from="gpt2")
    run = Run(cfg, {}, make_machine(cfg), None, None)
    with pytest.raises(UserError, match=r"at iteration 0 is nan; check the weights of gpt2$"):
        train.record_validation(math.nan, run, TrainState(None, None, None))
