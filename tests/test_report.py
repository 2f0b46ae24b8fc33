"""A run's reports are true, readable, and on the disk."""

import dataclasses
import json
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch

from config import ModelConfig, TrainConfig
from internals import report
from internals.cli import with_preset
from internals.machine import Machine
from internals.reference import Reference
from internals.run import Run, TrainState
from internals.run_folder import Rows
from model import GPT

MACHINE = Machine(torch.device("cpu"), torch.float32, "as requested", rank=0, processes=1)
META = {
    "tokenizer": "bytes",
    "source": {},
    "splits": {split: {"tokens": 100, "bytes": 100, "articles": 1, "shards": []} for split in ("train", "val")},
}


def run_log(out_dir, iter: int = 0, machine: Machine = MACHINE, **changes) -> report.RunLog:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, n_inner=8, block_size=8, vocab_size=257))
    cfg = dataclasses.replace(TrainConfig(), out_dir=str(out_dir), model=model.config, **changes)
    windows = SimpleNamespace(epoch_tokens=80), SimpleNamespace(tokens=32)
    run = Run(cfg, META, machine, *windows, resumed_at=iter or None)
    log = report.RunLog(run, TrainState(model, None, None, iter=iter))
    if iter == 0:
        log.begin()
    return log


def rows(out_dir) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def state(iter: int, seconds: float = 0.0, val_loss: float = 5.0) -> TrainState:
    return TrainState(None, None, None, iter, iter * 65_536, seconds, val_loss)


def write_row(log: report.RunLog, state: TrainState, evaluated: bool) -> None:
    log.state = state
    log.write_row(evaluated)


def test_rows_have_the_columns_of_the_format(tmp_path, capsys):
    log = run_log(tmp_path)
    write_row(log, state(0), evaluated=True)
    log.tell_evaluation(best=True)
    log.iteration(4.5, 1e-3, 0.7, seconds=0.5)
    log.iteration(4.4, 9e-4, 0.6, seconds=1.5)
    write_row(log, state(2, 2.0), evaluated=False)
    log.iteration(4.3, 8e-4, float("inf"), seconds=0.25)
    write_row(log, state(3, 2.25), evaluated=True)
    log.tell_evaluation(best=False)
    log.close()
    columns = ["iter", "tokens", "seconds", "train_loss", "learning_rate", "grad_norm", "tokens_per_second"]
    first, second, third = rows(tmp_path)
    assert list(first) == list(third) == [*columns, "val_loss", "perplexity", "bits_per_byte"]
    assert [second[name] for name in columns] == [2, 131_072, 2.0, 4.4, 9e-4, 0.6, 65_536]  # 2 iterations in 2 seconds
    assert first["train_loss"] is None and first["tokens_per_second"] is None
    assert third["tokens_per_second"] == 4 * 65_536  # this row's own iteration
    assert third["grad_norm"] is None  # float16 skipped the step; null is JSON to every reader
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "     0/16,000  val 5.000  7.21 bits/byte (best)",
        "     3/16,000  val 5.000  7.21 bits/byte         train 4.300",
    ]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "config.json").read_text())["model"]["n_embd"] == 8


def test_rows_are_on_the_disk_when_they_are_written(tmp_path, monkeypatch):
    """A power cut after a save costs no row before it."""
    path, synced, fsync = tmp_path / "metrics.jsonl", [], os.fsync
    table = Rows(path, None)
    table.cut()
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file)))
    table.add({"iter": 1})
    table.flush()
    assert synced == [path.stat().st_size] == [len('{"iter": 1}\n')]


def test_a_file_that_can_be_neither_read_nor_renamed_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    monkeypatch.setattr(os, "rename", lambda *names: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert Rows(tmp_path / "metrics.jsonl", 5, repair=True).rows == []
    assert re.search(
        r"metrics.jsonl: cannot be read \(.*\) and cannot be renamed \(Permission denied\)$", capsys.readouterr().out
    )


def test_resuming_cuts_the_rows_back(tmp_path):
    log = run_log(tmp_path)
    for iter in range(5):
        write_row(log, state(iter), evaluated=False)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iter": 5, "tok')  # killed in the middle of a row
    log = run_log(tmp_path, iter=3)
    assert [row["iter"] for row in rows(tmp_path)] == [0, 1, 2, 3]
    write_row(log, state(4), evaluated=False)
    assert [row["iter"] for row in rows(tmp_path)] == [0, 1, 2, 3, 4]


def test_rows_that_could_not_be_cut_are_cut_before_the_next_is_written(tmp_path, monkeypatch, capsys):
    """The disk is full when a run resumes, and has room later."""
    log = run_log(tmp_path)
    for iter in range(5):
        write_row(log, state(iter), evaluated=False)
    with monkeypatch.context() as full:
        full.setattr(Rows, "cut", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        log = run_log(tmp_path, iter=2)
    assert "could not be written" in capsys.readouterr().out
    write_row(log, state(3), evaluated=False)
    assert [row["iter"] for row in rows(tmp_path)] == [0, 1, 2, 3]


def test_other_processes_write_nothing(tmp_path, capsys):
    log = run_log(tmp_path, machine=dataclasses.replace(MACHINE, rank=1, processes=2))
    log.iteration(4.5, 1e-3, 0.7, seconds=0.5)
    write_row(log, state(1), evaluated=True)
    log.tell_evaluation(best=True)
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_curves_show_what_is_in_the_rows(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    step = {"train_loss": 4.0, "learning_rate": 1e-3}
    table = [{"iter": 0, "tokens": 0, "train_loss": None, "val_loss": 5.5}]
    table += [
        {"iter": i, "tokens": i * 2_000_000, **step, **({"val_loss": 5.0} if i == 10 else {})} for i in range(1, 11)
    ]
    reference = Reference({0: 5.6, 10: 5.1}, {0: 2.0, 10: 1.8}, True, "")
    report.plot(table, tmp_path / "loss.png", reference)
    (figure,) = figures
    axes, right = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["training"] == [[i, 4.0] for i in range(1, 11)]
    assert lines["validation"] == [[0, 5.5], [10, 5.0]]
    assert lines["reference"] == [[0, 5.6], [10, 5.1]]
    assert right.lines[0].get_ydata().tolist() == [1e-3] * 10
    (above,) = axes.child_axes  # iteration 10 is 20 million tokens
    assert above.get_xlabel() == "million tokens" and above.get_xlim()[1] == pytest.approx(2 * axes.get_xlim()[1])
    changed = [*table, {**table[-1], "iter": 20, "tokens": 100_000_000}]  # resumed with more tokens an iteration
    report.plot(changed, tmp_path / "loss.png", None)
    axes = figures[-1].axes[0]
    for iter, tokens in ((10, 20), (20, 100)):
        below, above = axes.transData.transform((iter, 0)), axes.child_axes[0].transData.transform((tokens, 0))
        assert above[0] == pytest.approx(below[0], abs=0.5)
    report.plot(table[:1], tmp_path / "loss.png", None)  # before the first iteration
    report.plot(table, tmp_path / "loss.png", dataclasses.replace(reference, same_text=False))
    labels = [line.get_label() for line in figures[-1].axes[0].lines]
    assert labels[-1] == "reference, other articles (at equal bits per byte)"


def test_bits_per_byte_are_those_of_the_validation_text():
    meta = {"splits": {"train": {"tokens": 100, "bytes": 700}, "val": {"tokens": 100, "bytes": 300}}}
    expected = {"val_loss": 1.5, "perplexity": math.exp(1.5), "bits_per_byte": 1.5 / math.log(2) / 3}
    assert report.validation_row(1.5, meta) == pytest.approx(expected)


def test_the_startup_counts_the_parameters_and_the_run():
    for cfg, words in (
        (TrainConfig(), ["30,044,544 parameters: 10,647,552 in the blocks", "65,536 tokens = 64 sequences x 256 tokens x 4 micro-steps x 1 process ", "1,048,576,000 tokens, 10.49 epochs; warm-up 500 iterations "]),
        (with_preset(TrainConfig, "wikipedia-150m"), ["262,144 tokens = 8 sequences x 1024 tokens x 32 micro-steps x 1 process "]),
    ):  # fmt: skip
        with torch.device("meta"):
            model = GPT(cfg.model)
        split = {"tokens": 100_000_000, "articles": 1_000, "bytes": 1, "shards": []}
        meta = {"splits": {"train": split, "val": split}, "tokenizer": "gpt2", "source": {}}
        windows = SimpleNamespace(epoch_tokens=100_000_000), SimpleNamespace(tokens=2**20)
        run = Run(cfg, meta, MACHINE, *windows)
        text = report.startup(run, TrainState(model, None, None), "off")
        assert max(map(len, text.splitlines())) <= 80, text
        for word in words:
            assert word in " ".join(text.split()), text


def test_utilisation_is_shown_for_known_gpus_only(monkeypatch):
    known = dataclasses.replace(MACHINE, device=torch.device("cuda"), dtype=torch.bfloat16, processes=2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert report.utilisation(1_000_000, 165_200_000, known) == "MFU 50%"  # of two GPUs' 165.2e12 each
    assert report.utilisation(1_000_000, 165_200_000, dataclasses.replace(known, dtype=torch.float32)) == ""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Tomorrow")
    assert report.utilisation(1_000_000, 165_200_000, known) == ""


def startup(state=None, **changes):
    cfg = dataclasses.replace(TrainConfig(), **changes)
    with torch.device("meta"):
        model = GPT(cfg.model)
    split = {"tokens": 10**8, "articles": 1_000, "bytes": 1, "shards": []}
    meta = {"splits": {"train": split, "val": split}, "tokenizer": "gpt2", "source": {}}
    run = Run(cfg, meta, MACHINE, SimpleNamespace(epoch_tokens=10**8), SimpleNamespace(tokens=2**20))
    return " ".join(report.startup(run, TrainState(model, None, None, **(state or {})), "off").split())


def test_the_tokens_of_a_resumed_run_are_those_seen_and_those_to_come():
    assert " 1,920 tokens, " in startup({"iter": 5, "tokens": 640}, max_iters=10, tokens_per_iter=256, batch_size=1)


def test_a_smaller_micro_batch_is_explained():
    assert "batch_size 48 -> 32: it must divide the 256 sequences a process" in startup(batch_size=48)
    assert "batch_size" not in startup()


def test_the_time_left_is_that_of_the_iterations_left():
    cfg = dataclasses.replace(TrainConfig(), max_iters=20)
    status = report.page_status(cfg, TrainState(None, None, None, iter=5, seconds=10.0), running=True)
    assert "about 30 s left" in status


def test_the_perplexity_of_a_diverged_run_is_a_number():
    assert math.isfinite(report.validation_row(1e4, META)["perplexity"])
