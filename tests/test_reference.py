"""The reference run beside yours: when it is shown, in which unit, and under which name."""

import dataclasses
import json
import math

import pytest
from conftest import load_benchmark, run_script
from pages import parsed
from runs import tiny
from test_report import META, run_log, state, write_row

import prepare_data
import train
from config import PRESETS, PrepareConfig, TrainConfig
from internals import checkpoint, reference, run_page
from internals.cli import with_preset
from internals.reference import find_reference
from internals.run import describe_data
from internals.shards import read_meta
from internals.start import UserError

SHA256 = describe_data(META)["sha256"]
BYTES = 3  # per token in the other text's validation split
OTHER = {**META, "splits": {**META["splits"], "val": {**META["splits"]["val"], "bytes": 100 * BYTES, "shards": [{"sha256": "x"}]}}}  # fmt: skip


def ship(monkeypatch, folder, cfg: TrainConfig, **changes) -> None:
    """A reference for this configuration's preset, in its own folder."""
    settings = {name: value for name, value in cfg.settings().items() if name not in reference.NOT_LEARNING}
    run = {"settings": settings, "data_sha256": SHA256, "text": "some Wikipedia", "hardware": "a pocket calculator"}
    run |= {"seed": 1, "date": "2026-01-01", "val_loss": {"0": 5.6, "10": 5.1}, "bits_per_byte": {"0": 2.0, "10": 1.8}}
    monkeypatch.setattr(reference, "REFERENCES", folder)
    (folder / f"{cfg.preset}.json").write_text(json.dumps({k: v for k, v in (run | changes).items() if v is not None}))


def test_the_same_text_is_compared_in_nats_and_bits(tmp_path, monkeypatch):
    cfg = with_preset(TrainConfig, "demo")
    ship(monkeypatch, tmp_path, cfg)
    found = find_reference(cfg, META)
    assert found.losses == {0: 5.6, 10: 5.1} and found.label == "reference"
    assert found.beside(10) == "reference 5.100" and found.beside(5) == ""
    assert found.summary == "a pocket calculator, seed 1, 2026-01-01; its losses are printed next to yours"


def test_another_text_is_compared_in_bits_per_byte_alone(tmp_path, monkeypatch):
    cfg = with_preset(TrainConfig, "demo")
    ship(monkeypatch, tmp_path, cfg)
    found = find_reference(cfg, OTHER)
    assert found.beside(10) == "reference, other articles 1.80" and found.beside(5) == ""
    assert found.bits_per_byte == {0: 2.0, 10: 1.8}
    # Drawn at the loss that has the same bits per byte on this text
    assert found.losses == pytest.approx({0: 2.0 * math.log(2) * BYTES, 10: 1.8 * math.log(2) * BYTES})
    assert "some Wikipedia" in found.summary and "bits per byte" in found.summary and "other articles" in found.summary


def test_settings_that_decide_how_the_loss_falls_must_be_the_same(tmp_path, monkeypatch):
    cfg = with_preset(TrainConfig, "demo")
    ship(monkeypatch, tmp_path, cfg)
    same = dataclasses.replace(cfg, seed=2, batch_size=16, out_dir="elsewhere", dtype="float32", eval_interval=7)
    assert find_reference(same, META) and find_reference(same, OTHER)
    for change in (
        {"learning_rate": 5e-3},
        {"max_iters": 601},
        {"optimizer": "adamw"},
        {"init_from": "gpt2"},
        {"model": dataclasses.replace(cfg.model, dropout=0.0)},
    ):
        for meta in (META, OTHER):
            assert find_reference(dataclasses.replace(cfg, **change), meta) is None, change
    assert find_reference(with_preset(TrainConfig, "wikipedia"), META) is None  # it has no reference


def test_it_stands_beside_the_evaluations_it_has(tmp_path, monkeypatch, capsys):
    ship(monkeypatch, tmp_path, run_log(tmp_path).cfg)
    log = run_log(tmp_path)
    for iter in (0, 5):
        write_row(log, state(iter), evaluated=True)
        log.tell_evaluation(best=False)
    log.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("  reference 5.600") and "reference" not in second
    data = parsed(tmp_path / "run.html").data
    assert data["names"]["reference"] == "reference" and data["units"]["reference"] == ["plain", "bits"]
    assert data["curve"]["reference"] == [[0, 5.6], [10, 5.1]]


def test_of_another_text_it_is_named_so_in_the_page_and_the_page_says_why(tmp_path, monkeypatch, capsys):
    ship(monkeypatch, tmp_path, run_log(tmp_path).cfg, data_sha256="another")
    log = run_log(tmp_path)
    write_row(log, state(0), evaluated=True)
    log.tell_evaluation(best=True)
    log.close()
    assert capsys.readouterr().out.rstrip().endswith("  reference, other articles 2.00")
    data = parsed(tmp_path / "run.html").data
    assert data["names"]["reference"] == "reference, other articles" and data["units"]["reference"] == ["bits"]
    (iter, drawn), _ = data["curve"]["reference"]
    assert iter == 0 and drawn * data["bits_per_nat"] == pytest.approx(2.0, abs=1e-3)
    assert run_page.OTHER_ARTICLES in (tmp_path / "run.html").read_text()


@pytest.mark.usefixtures("quick")
def test_a_reference_of_the_same_run_is_shown_beside_it(data_dir, tmp_path, straight, monkeypatch, capsys):
    saved = checkpoint.load(straight / "last.pt")
    settings = {name: value for name, value in saved["config"].items() if name not in reference.NOT_LEARNING}
    run = {"settings": settings, "data_sha256": saved["data"]["sha256"], "val_loss": {"8": 1.25, "20": 1.0}}
    run |= {"bits_per_byte": {"8": 1.8, "20": 1.4}, "text": "some text"}
    run |= {"hardware": "a pocket calculator", "seed": 1, "date": "2026-01-01"}
    monkeypatch.setattr(reference, "REFERENCES", tmp_path)
    (tmp_path / "wikipedia.json").write_text(json.dumps(run))
    train.train(tiny(data_dir, tmp_path / "same", seed=2))
    out = capsys.readouterr().out
    assert "reference  a pocket calculator, seed 1" in out
    shown = {
        line.split("/")[0].strip(): line.partition("reference ")[2] for line in out.splitlines() if "  val " in line
    }
    assert shown == {"0": "", "8": "1.250", "16": "", "20": "1.000"}
    train.train(tiny(data_dir, tmp_path / "other", learning_rate=2e-2))
    out = capsys.readouterr().out
    assert "reference " not in out and "pocket calculator" not in out


def test_the_reference_shipped_for_the_demo_is_of_the_demo_as_it_is(tmp_path):
    prepared = dataclasses.replace(with_preset(PrepareConfig, "demo"), data_dir=str(tmp_path), workers=1)
    prepare_data.prepare(prepared)
    cfg = with_preset(TrainConfig, "demo")
    meta = read_meta(tmp_path)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=meta["vocab_size"]))
    found = find_reference(cfg, meta)
    assert found and found.same_text, "the demo's settings or text changed: train it, and run benchmarks/reference.py"
    assert max(found.losses) == cfg.max_iters and found.losses[0] > found.losses[cfg.max_iters]
    for iter, bits in found.bits_per_byte.items():  # the file has both, rounded to four digits
        assert bits == pytest.approx(found.losses[iter] * reference.bits_per_nat(meta), abs=1e-4)


@pytest.fixture
def writer():
    return load_benchmark("reference")


def test_what_is_written_is_found_again(tmp_path, monkeypatch, writer):
    """A run with the demo's settings. To keep the test short, the preset has two iterations here."""
    monkeypatch.setitem(PRESETS["demo"], "max_iters", 2)
    cfg = dataclasses.replace(with_preset(PrepareConfig, "demo"), data_dir=str(tmp_path / "data"), workers=1)
    prepare_data.prepare(cfg)
    flags = ("--preset", "demo", "--data-dir", tmp_path / "data", "--max-iters", 2, "--device", "cpu")
    done = run_script("train.py", *flags, "--out-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    saved = writer.contents(writer.Reference(str(tmp_path / "run"), "a test"), commit="abc")
    assert saved["text"].startswith("the sample, SHA-256 ") and saved["hardware"].startswith("a test, ")
    assert list(saved["val_loss"]) == list(saved["bits_per_byte"]) == [0, 2]
    monkeypatch.setattr(reference, "REFERENCES", tmp_path)
    (tmp_path / "demo.json").write_text(json.dumps(saved))
    cfg, meta = with_preset(TrainConfig, "demo"), read_meta(tmp_path / "data")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=meta["vocab_size"]))
    found = find_reference(cfg, meta)
    assert found.same_text and found.losses == saved["val_loss"]
    for iter, bits in found.bits_per_byte.items():
        assert bits == pytest.approx(found.losses[iter] * reference.bits_per_nat(meta), abs=1e-4)
    monkeypatch.undo()
    with pytest.raises(UserError, match="does not use the settings of the preset demo \\(max_iters\\)"):
        writer.contents(writer.Reference(str(tmp_path / "run"), "a test"), commit="abc")


def test_a_default_that_the_preset_overrides_may_be_wrong_alone(tmp_path, monkeypatch):
    """config.py is there to be edited: its n_head need not divide its n_embd if the preset has others."""
    cfg = with_preset(TrainConfig, "demo")
    ship(monkeypatch, tmp_path, cfg)
    monkeypatch.setattr(TrainConfig, "__init__", refuse_defaults(TrainConfig.__init__))
    assert find_reference(cfg, META)


def refuse_defaults(init):
    def wrapped(self, *args, **values):
        if not values:
            raise ValueError("--n-head 5: must divide --n-embd 384")
        init(self, *args, **values)

    return wrapped
