"""Resuming a run: exactly, with the settings of its last.pt; what changed is named, what must not change is refused."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import write_data
from runs import assert_same_end, flags, metrics, run_command, stop_at, tiny

import train
from config import TrainConfig
from internals import checkpoint
from internals.cli import parse
from internals.machine import make_machine
from internals.resume import resume_settings
from internals.start import UserError
from internals.windows import TokenStream, ValidationWindows

pytestmark = pytest.mark.usefixtures("quick")


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def test_a_finished_run_says_so_and_more_iterations_extend_it(data_dir, tmp_path, capsys):
    train.train(tiny(data_dir, tmp_path, max_iters=6))
    before = (tmp_path / "last.pt").read_bytes()
    capsys.readouterr()
    for again in ({"resume": True}, {"auto_resume": True}):
        train.train(tiny(data_dir, tmp_path, max_iters=6, **again))
        out = capsys.readouterr().out
        assert "is finished (6 iterations). Extend it: python train.py " in " ".join(out.split())
        assert out.endswith("--resume --max-iters 12\n")
        assert (tmp_path / "last.pt").read_bytes() == before
    train.train(tiny(data_dir, tmp_path, max_iters=12, resume=True))
    out = capsys.readouterr().out
    assert "max_iters 6 -> 12" in out and "learning rate" in out and "the cosine now ends at 12" in out
    assert [row["iter"] for row in metrics(tmp_path)] == list(range(13))


def test_auto_resume_keeps_the_batch_size_that_auto_stood_for(data_dir, tmp_path, monkeypatch):
    def batch_size() -> int:
        return checkpoint.load(tmp_path / "last.pt")["config"]["batch_size"]

    train.train(tiny(data_dir, tmp_path, max_iters=6, batch_size="auto"))
    began = batch_size()
    assert began > 1
    monkeypatch.setattr("internals.batch_size.CPU_TOKENS", 1)  # as if there was less memory now
    train.train(tiny(data_dir, tmp_path, max_iters=8, batch_size="auto", auto_resume=True))
    assert batch_size() == began
    train.train(tiny(data_dir, tmp_path, max_iters=10, batch_size="auto", resume=True))
    assert batch_size() == 1


def test_a_run_cannot_end_before_the_iteration_that_it_has_reached(data_dir, tmp_path, monkeypatch):
    stop_at(monkeypatch, data_dir, tmp_path, 8)
    for fewer in (5, 9):
        with pytest.raises(UserError, match=rf"--max-iters {fewer}: the run in .* has done 9 iterations; give more"):
            train.train(tiny(data_dir, tmp_path, resume=True, max_iters=fewer))


def test_the_learning_rate_before_and_after_are_of_the_same_iteration(data_dir, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, data_dir, tmp_path, 9)
    capsys.readouterr()
    train.train(tiny(data_dir, tmp_path, resume=True, max_iters=40))
    rates = [train.get_lr(10, tiny(data_dir, tmp_path, max_iters=iters)) for iters in (20, 40)]
    words = f"learning rate {rates[0]:.2e} -> {rates[1]:.2e} here (the cosine now ends at 40)"
    assert words in " ".join(capsys.readouterr().out.split())


def test_resuming_names_what_changed_and_takes_it(data_dir, tmp_path, capsys, monkeypatch):
    train.train(tiny(data_dir, tmp_path, max_iters=5))
    groups = []
    make_optimizer = train.make_optimizer
    monkeypatch.setattr(train, "make_optimizer", lambda *args: (groups.append(make_optimizer(*args)), groups[-1])[1])
    changes = dict(max_iters=10, weight_decay=0.3, tokens_per_iter=256)
    torch.set_num_threads(2)
    train.train(tiny(data_dir, tmp_path, resume=True, **changes))
    out = " ".join(capsys.readouterr().out.split())
    for words in ("weight_decay 0.1 -> 0.3", "tokens_per_iter 128 -> 256", "threads 1 -> 2"):
        assert words in out
    assert groups[0].param_groups[0]["weight_decay"] == 0.3  # not only printed
    assert metrics(tmp_path)[-1]["tokens"] == 5 * 128 + 5 * 256


def test_a_resumed_run_keeps_its_dtype(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("internals.cpu_kernels.capabilities", lambda: {"avx512_bf16": True})
    train.train(tiny(data_dir, tmp_path, dtype="auto", max_iters=2))
    monkeypatch.setattr("internals.cpu_kernels.capabilities", lambda: {})
    train.train(tiny(data_dir, tmp_path, dtype="auto", max_iters=3, resume=True))
    assert "bfloat16 (as in the run so far)" in capsys.readouterr().out
    train.train(tiny(data_dir, tmp_path, dtype="float32", max_iters=4, resume=True))
    assert "dtype bfloat16 -> float32" in capsys.readouterr().out


def test_resume_takes_its_settings_from_last_pt(data_dir, tmp_path):
    """A forgotten flag changes nothing, a given one does, and each difference from config.py is printed once."""
    out_dir = tmp_path / "run"
    run_command(data_dir, out_dir, *flags(data_dir, out_dir, max_iters=4)[2:], "--muon-lr-scale=3")
    assert "is finished (4 iterations)" in " ".join(run_command(data_dir, out_dir, "--resume").split())
    out = run_command(data_dir, out_dir, "--resume", "--max-iters", "6", "--weight-decay", "0.3")
    saved = checkpoint.load(out_dir / "last.pt")
    assert saved["iter"] == 6
    for name, value in {"n_layer": 2, "block_size": 16}.items():
        assert saved["config"]["model"][name] == value
    settings = {"learning_rate": 1e-2, "muon_lr_scale": 3.0, "weight_decay": 0.3, "batch_size": 4, "max_iters": 6}
    assert {name: saved["config"][name] for name in settings} == settings
    for line in (
        "kept from last.pt: muon_lr_scale 3 (config.py: 1); --muon-lr-scale 1 changes it",
        "kept from last.pt: learning_rate 0.01 (config.py: 0.004); --learning-rate 0.004 changes it",
        "kept from last.pt: n_layer 2 (config.py: 6); a different value needs another --out-dir",
    ):
        assert out.count(line) == 1, out
    for name in ("weight_decay", "max_iters", "vocab_size", "out_dir", "seed"):
        assert f"kept from last.pt: {name}" not in out
    assert "changed: max_iters 4 -> 6, weight_decay 0.1 -> 0.3" in out
    again = " ".join(run_command(data_dir, out_dir, "--auto-resume", "--max-iters=7", "--lr", "5e-3").split())
    assert "learning_rate 0.01 -> 0.005" in again
    assert checkpoint.load(out_dir / "last.pt")["config"]["min_lr"] == 5e-4  # follows --lr


def test_a_last_pt_of_an_earlier_version_resumes(data_dir, tmp_path, monkeypatch):
    """Fields added since then get the earlier behaviour: before Muon there was only AdamW."""
    train.train(tiny(data_dir, tmp_path / "straight", optimizer="adamw"))
    stop_at(monkeypatch, data_dir, tmp_path / "old", 7, optimizer="adamw")
    for name in ("last.pt", "best.pt"):
        saved = checkpoint.load(tmp_path / "old" / name)
        for field in ("optimizer", "muon_lr_scale", "sample_prompt", "init_from", "config", "eval_tokens", "preset"):
            del saved["config"][field]
        checkpoint.save(tmp_path / "old" / name, saved)
    train.train(tiny(data_dir, tmp_path / "old", optimizer="adamw", resume=True))
    assert_same_end(tmp_path / "old", tmp_path / "straight")
    out = run_command(data_dir, tmp_path / "old", "--resume", "--max-iters", "21")
    assert "kept from last.pt: optimizer adamw (config.py: muon)" in out


def test_resuming_from_another_folder_asks_for_the_path_of_the_data(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(data_dir.parent)
    stop_at(monkeypatch, data_dir.name, tmp_path / "run", 7)
    monkeypatch.chdir(tmp_path)
    for mode in ({"resume": True}, {"auto_resume": True}):
        with pytest.raises(UserError, match=f"--data-dir {data_dir.name}: there is no such folder .*give the path"):
            train.train(tiny(data_dir.name, "run", **mode))
    with pytest.raises(UserError, match=f"--data-dir elsewhere: .* was started with --data-dir {data_dir.name};"):
        train.train(tiny("elsewhere", "run", resume=True))
    train.train(tiny(data_dir, "run", resume=True))


def test_flags_of_a_resumed_run_are_checked_against_its_own_settings(data_dir, tmp_path):
    """Preset wikipedia has a lower learning rate and a larger context than this run."""
    train.train(tiny(data_dir, tmp_path, max_iters=2))
    out_dir = ["--out-dir", str(tmp_path)]
    config = ["--auto-resume", "--config", str(tmp_path / "config.json")]
    for how in (["--resume"], ["--auto-resume"], config):
        args = [*out_dir, *how, "--min-lr=5e-3", "--eval-tokens=64", "--tokens-per-iter=48"]
        cfg, kept = resume_settings(parse(TrainConfig, "", args), args)
        assert (cfg.learning_rate, cfg.min_lr, cfg.eval_tokens, cfg.tokens_per_iter) == (1e-2, 5e-3, 64, 48)
        assert any("learning_rate 0.01 (config.py: 0.004)" in line for line in kept) == (how != config)
    wider = tmp_path / "wider.json"
    settings = json.loads((tmp_path / "config.json").read_text())
    wider.write_text(json.dumps(settings | {"tokens_per_iter": 512}))
    args = [*out_dir, "--auto-resume", "--config", str(wider)]
    _, kept = resume_settings(parse(TrainConfig, "", args), args)
    assert any(f"tokens_per_iter 128 ({wider}: 512)" in line for line in kept), kept
    for changes, words in (
        ({"min_lr": 0.02}, "must not be above --learning-rate 0.01"),
        ({"eval_tokens": 8}, "window"),
    ):
        for mode, folder in (("resume", tmp_path), ("auto_resume", tmp_path), ("auto_resume", tmp_path / "new")):
            with pytest.raises(UserError, match=words):
                train.train(tiny(data_dir, folder, **{mode: True}, **changes))
    assert not (tmp_path / "new").exists()


def test_resuming_refuses_another_model_tokenizer_or_data(data_dir, tmp_path, straight):
    before = (straight / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"has another model \(--n-layer 2, now 3, --dropout 0.1, now 0.2\)"):
        train.train(tiny(data_dir, straight, resume=True, n_layer=3, dropout=0.2))
    other = write_data(tmp_path / "tokenizer", tokenizer="gpt2")
    with pytest.raises(UserError, match="was trained with the tokenizer bytes"):
        train.train(tiny(other, straight, resume=True))
    other = write_data(tmp_path / "text", train_tokens=1_200)
    with pytest.raises(UserError, match="was trained on other data"):
        train.train(tiny(other, straight, resume=True))
    sizes = dict(n_layer=2, n_head=2, n_embd=16, n_inner=32)
    with pytest.raises(UserError, match="started from random weights, not from 'my/gpt2'; leave --init-from out"):
        train.train(tiny(data_dir, straight, resume=True, init_from="my/gpt2", **sizes))
    with pytest.raises(UserError, match="--config: only for a new run; change a resumed run with flags"):
        resume_settings(tiny(data_dir, straight, resume=True, config=str(straight / "config.json")))
    assert (straight / "last.pt").read_bytes() == before


def test_resuming_refuses_another_validation_split(data_dir, tmp_path):
    """Its losses could not be compared with those of the run so far."""
    train.train(tiny(data_dir, tmp_path / "run", max_iters=2))
    data = shutil.copytree(data_dir, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    meta["splits"]["val"]["shards"][0]["sha256"] = "0" * 64
    (data / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="was trained on other data than"):
        train.train(tiny(data, tmp_path / "run", max_iters=3, resume=True))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_run_on_two_threads_resumes_exactly_too(data_dir, tmp_path, monkeypatch):
    """The model is large enough for both of them. All other runs here have one thread."""
    torch.set_num_threads(2)
    large = dict(n_head=4, n_embd=128, n_inner=512, block_size=64, batch_size=8, tokens_per_iter=1024, max_iters=8)
    train.train(tiny(data_dir, tmp_path / "straight", **large))
    stop_at(monkeypatch, data_dir, tmp_path / "stopped", 3, **large)
    train.train(tiny(data_dir, tmp_path / "stopped", resume=True, **large))
    assert checkpoint.load(tmp_path / "stopped" / "last.pt")["machine"]["threads"] == 2
    assert_same_end(tmp_path / "stopped", tmp_path / "straight")


def test_best_is_the_best_across_a_stop(data_dir, tmp_path, monkeypatch):
    losses = {0: 5.0, 4: 3.0, 8: 4.0, 12: 3.5, 16: 2.0, 20: 2.0}
    get_lr, now = train.get_lr, []

    def stop_once(it, cfg):
        now[:] = [it + 1]
        if it == 6 and not cfg.resume:
            os.kill(os.getpid(), signal.SIGTERM)
        return get_lr(it, cfg)

    monkeypatch.setattr(train, "get_lr", stop_once)
    monkeypatch.setattr(train, "evaluate", lambda *args: losses[now[0] if now else 0])
    train.train(tiny(data_dir, tmp_path, eval_interval=4))
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == 7
    train.train(tiny(data_dir, tmp_path, eval_interval=4, max_iters=12, resume=True))
    best, last = checkpoint.load(tmp_path / "best.pt"), checkpoint.load(tmp_path / "last.pt")
    assert (best["iter"], best["val_loss"]) == (4, 3.0)
    assert (last["iter"], last["val_loss"], last["best_val_loss"]) == (12, 3.5, 3.0)
    train.train(tiny(data_dir, tmp_path, eval_interval=4, resume=True))
    assert checkpoint.load(tmp_path / "best.pt")["iter"] == 16


def test_a_best_loss_of_other_windows_is_measured_anew(data_dir, tmp_path, monkeypatch, capsys):
    train.train(tiny(data_dir, tmp_path, max_iters=8, eval_tokens=64))
    best = checkpoint.load(tmp_path / "best.pt")
    train.train(tiny(data_dir, tmp_path, max_iters=9, eval_tokens=256, resume=True))
    assert "best.pt was chosen on 64 validation tokens;\nits loss on the 256 used now is " in capsys.readouterr().out
    cfg = tiny(data_dir, tmp_path)
    windows = ValidationWindows(TokenStream.open(data_dir, "val"), 16, 256)
    measured = train.evaluate(4, checkpoint.build_model(best), windows, make_machine(cfg))
    last = checkpoint.load(tmp_path / "last.pt")
    assert last["best_val_loss"] == pytest.approx(min(measured, last["val_loss"]), abs=1e-6)
    assert last["best_val_loss"] != pytest.approx(best["val_loss"], abs=1e-4)


def test_a_best_model_that_is_newer_than_last_pt_is_not_overwritten_by_a_worse(data_dir, tmp_path, capsys, monkeypatch):
    """A disk with room for only one of the two files leaves them so."""
    options = {"eval_interval": 4, "warmup_iters": 1}
    train.train(tiny(data_dir, tmp_path, max_iters=8, **options))
    best = (tmp_path / "best.pt").read_bytes()
    assert checkpoint.load(tmp_path / "best.pt")["iter"] == 8
    train.train(tiny(data_dir, tmp_path / "again", max_iters=4, **options))
    shutil.copy(tmp_path / "best.pt", tmp_path / "again" / "best.pt")
    os.truncate(tmp_path / "again" / "best.pt", 1000)
    with pytest.raises(UserError, match=r"best\.pt: is damaged.*; delete it, and the next evaluation writes a new one"):
        train.train(tiny(data_dir, tmp_path / "again", max_iters=8, resume=True, **options))
    (tmp_path / "again" / "best.pt").write_bytes(best)
    with monkeypatch.context() as patch:  # it may be whole: nobody should delete it
        patch.setattr(checkpoint, "read", lambda path, mmap: (_ for _ in ()).throw(MemoryError()))
        for load in (checkpoint.load, checkpoint.load_last):
            with pytest.raises(UserError, match=r"does not fit into memory .*with more memory$"):
                load(tmp_path / "again" / "best.pt")
    capsys.readouterr()
    hardly = {"learning_rate": 1e-6, "min_lr": 1e-6}
    train.train(tiny(data_dir, tmp_path / "again", max_iters=8, resume=True, **options, **hardly))
    out = capsys.readouterr().out
    assert "best.pt is newer than last.pt (iteration 8);" in out and "(best)" not in out
    assert (tmp_path / "again" / "best.pt").read_bytes() == best


def test_a_best_model_that_is_gone_is_written_anew(data_dir, tmp_path, monkeypatch):
    stop_at(monkeypatch, data_dir, tmp_path, 8)
    last = checkpoint.load(tmp_path / "last.pt")
    checkpoint.save(tmp_path / "last.pt", last | {"best_val_loss": 0.0})  # so low that no later loss is better
    (tmp_path / "best.pt").unlink()
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert checkpoint.load(tmp_path / "best.pt")["iter"] == 20


def test_a_damaged_checkpoint_is_told_from_a_missing_one(data_dir, tmp_path):
    train.train(tiny(data_dir, tmp_path, max_iters=1))
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    for again in ({"resume": True}, {"auto_resume": True}):
        with pytest.raises(
            UserError, match=r"last.pt: is damaged.*; .* give --init-from .*best.pt and another --out-dir"
        ):
            train.train(tiny(data_dir, tmp_path, **again))
    best = (tmp_path / "best.pt").read_bytes()
    (tmp_path / "best.pt").unlink()
    with pytest.raises(UserError, match=r"last.pt: is damaged.*; .* give another --out-dir, or --overwrite"):
        train.train(tiny(data_dir, tmp_path, resume=True))
    (tmp_path / "last.pt").write_bytes(best)
    with pytest.raises(UserError, match=r"last.pt: cannot be resumed from \(missing: best_val_loss"):
        train.train(tiny(data_dir, tmp_path, resume=True))


def test_threads_are_no_change_if_there_were_none(data_dir, tmp_path, capsys):
    """A run that a GPU began has none."""
    train.train(tiny(data_dir, tmp_path, max_iters=4))
    last = checkpoint.load(tmp_path / "last.pt")
    checkpoint.save(tmp_path / "last.pt", last | {"machine": last["machine"] | {"device": "a GPU", "threads": None}})
    train.train(tiny(data_dir, tmp_path, max_iters=6, resume=True))
    out = capsys.readouterr().out
    assert "device a GPU -> cpu" in out and "threads None" not in out
