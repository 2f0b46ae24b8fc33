"""`--check`: it writes nothing, as `--eval-only`, knows what the run needs, and fails where the run would."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, write_data
from runs import little_memory, metrics, tiny

import train
from config import TrainConfig
from internals import checkpoint, preflight, start
from internals.cli import parse
from internals.memory import Memory
from internals.resume import resume_settings
from internals.start import UserError

pytestmark = pytest.mark.usefixtures("quick")


def test_check_and_eval_only_write_nothing(data_dir, tmp_path, monkeypatch, straight, capsys):
    files = {path: path.read_bytes() for path in straight.iterdir()}
    train.train(tiny(data_dir, straight, check=True))
    out = capsys.readouterr().out
    for words in ("device", "float32", "compile    off", "parameters", "2 micro-steps", "epochs", "memory     peak",
                  "tokens/s", "for 20 iterations", "for checkpoints", "All of this fits.\n", "\nTrain: python "):  # fmt: skip
        assert words in out
    assert f"But --out-dir {straight} holds a run (last.pt); continue it with --resume" in " ".join(out.split())
    train.train(tiny(data_dir, straight, eval_only=True))
    best = min((row for row in metrics(straight) if "val_loss" in row), key=lambda row: row["val_loss"])
    out = " ".join(capsys.readouterr().out.split())  # long paths wrap its lines
    assert out.startswith("model ") and f"best.pt, iteration {best['iter']} data " in out
    assert "256 tokens of the validation split" in out and "float32 loss " in out
    assert out.endswith(f" {best['val_loss']:.4f} nats per token, {best['bits_per_byte']:.4f} bits per byte")
    longer = tiny(data_dir, straight, eval_only=True, block_size=8, eval_tokens=16)  # the checkpoint's context is 16
    train.train(longer)
    assert "16 tokens of the validation split" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="--eval-tokens 8: must hold at least one window of --block-size 16"):
        train.train(dataclasses.replace(longer, eval_tokens=8))
    assert {path: path.read_bytes() for path in straight.iterdir()} == files

    train.train(tiny(data_dir, tmp_path / "new", check=True))
    assert not (tmp_path / "new").exists()
    for name in ("last.pt", "loss.png"):
        (tmp_path / name).write_bytes(b"somebody's own")
    train.train(tiny(data_dir, tmp_path, check=True))
    assert "holds last.pt, loss.png, not written by train.py" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r"best.pt: there is no checkpoint"):
        train.train(tiny(data_dir, tmp_path / "new", eval_only=True))


def test_eval_only_takes_the_text_of_the_run_unless_a_flag_names_another(data_dir, straight, tmp_path, monkeypatch):
    def chosen(*args):
        args = ["--eval-only", "--out-dir", str(straight), *args]
        monkeypatch.setattr(sys, "argv", ["train.py", *args])
        cfg, _ = resume_settings(parse(TrainConfig, "", args))
        return cfg.data_dir, cfg.eval_tokens

    defaults = TrainConfig().data_dir, TrainConfig().eval_tokens
    assert chosen() == (str(data_dir), 256) != defaults
    assert chosen("--data_dir", "elsewhere") == ("elsewhere", 256)
    assert chosen("--eval-tokens=64") == (str(data_dir), 64)
    assert chosen("--init-from", "gpt2") == defaults  # without a best.pt of this run
    with pytest.raises(UserError, match=r"best.pt: there is no checkpoint"):
        chosen("--out-dir", str(tmp_path))


def test_eval_only_asks_for_the_folder_of_the_run_if_that_was_moved(data_dir, straight, tmp_path, monkeypatch):
    saved = checkpoint.load(straight / "best.pt")
    saved["config"]["data_dir"] = "gone/data"
    checkpoint.save(tmp_path / "best.pt", saved)
    args = ["--eval-only", "--out-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(
        UserError, match=r"with --data-dir gone/data, and there is no such folder \(.+\); give the path"
    ):
        resume_settings(parse(TrainConfig, "", args))
    args += ["--data-dir", str(data_dir)]
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    assert resume_settings(parse(TrainConfig, "", args)).cfg.data_dir == str(data_dir)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_command_that_only_prints_fails_if_its_text_is_lost(data_dir, straight):
    show = ["prepare_data.py", "--data-dir", str(data_dir), "--show", "5"]
    for command in (["train.py", "--eval-only", "--out-dir", str(straight)], show, ["train.py", "--help"]):
        with open("/dev/full", "w") as full:
            run = subprocess.run(
                [sys.executable, *command], cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100
            )
        last = run.stderr.splitlines()[-1]
        assert run.returncode == 2 and last.startswith("error: stdout cannot be written") and "make room" in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="a run that would be refused without a GPU")
def test_check_tells_of_a_run_that_would_be_refused(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "UNASKED_FLOPS", 0)
    monkeypatch.setattr(start, "seconds_passed", lambda: 0.0)
    for minutes in (None, 1.0):
        train.train(tiny(data_dir, tmp_path / "run", device="auto", check=True, max_minutes=minutes))
        out = " ".join(capsys.readouterr().out.split())
        assert "All of this fits. But --device auto: no GPU, and" in out and "give --device cpu Train: " in out


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_check_knows_the_size_of_the_checkpoints(data_dir, tmp_path, monkeypatch, optimizer):
    def size(value) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return sum(map(size, values))

    seen = []
    monkeypatch.setattr(preflight, "describe", lambda *args: seen.append(args[-1]) or "")
    train.train(tiny(data_dir, tmp_path, optimizer=optimizer, check=True))
    train.train(tiny(data_dir, tmp_path, optimizer=optimizer, max_iters=1))
    best, last = (checkpoint.load(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert seen == [size(best["model"]) + 2 * (size(last["model"]) + size(last["optimizer"]["state"]))]


def test_check_fails_where_the_run_would(data_dir, tmp_path, monkeypatch, capsys):
    def out_of_memory(self, closure=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with monkeypatch.context() as patch:
        little_memory(patch, 2)
        train.train(tiny(data_dir, tmp_path, check=True))
        out = capsys.readouterr().out
        out = " ".join(out.split())
        assert "--batch-size 4 does not fit; training will use 2" in out
        assert os.name == "nt" or "including the attempts that did not fit" in out
        little_memory(patch, 0)
        with pytest.raises(UserError, match="out of memory"):
            train.train(tiny(data_dir, tmp_path, check=True))
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", out_of_memory)
        with pytest.raises(
            UserError, match=r"the optimizer's state does not fit .*; take a smaller model \(CUDA out of"
        ):
            train.train(tiny(data_dir, tmp_path, check=True))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"--out-dir .*: checkpoints need .* but only 1000 B"):
            train.train(tiny(data_dir, tmp_path, check=True))
    damaged = write_data(tmp_path / "damaged")
    shard = damaged / "train_000001.bin"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # the size stays right
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train_000001.bin: is damaged"):
        train.train(tiny(damaged, tmp_path, check=True))


def test_check_refuses_a_run_that_needs_more_than_the_cards_memory(data_dir, tmp_path, monkeypatch):
    """As on Windows, whose driver lends the computer's own memory, so that nothing fails."""
    monkeypatch.setattr(preflight, "peak_memory", lambda machine: Memory(30 * 2**30, 24 * 2**30))
    with pytest.raises(
        UserError, match=r"--batch-size 4: needs 30.0 GiB of memory, but this machine has only 24.0 GiB"
    ):
        train.train(tiny(data_dir, tmp_path, check=True))


def test_check_counts_the_checkpoints_that_the_run_replaces(data_dir, tmp_path, monkeypatch, capsys):
    needed = []
    monkeypatch.setattr(preflight, "describe", lambda *args: needed.append(args[-1]) or "")
    train.train(tiny(data_dir, tmp_path, max_iters=1))
    held = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    train.train(tiny(data_dir, tmp_path, check=True))
    for lacking in (0, 1):  # bytes
        usage = SimpleNamespace(free=needed[0] - held - lacking)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if lacking:
            with pytest.raises(UserError, match=r"--out-dir .*: checkpoints need"):
                train.train(tiny(data_dir, tmp_path, check=True))
        else:
            train.train(tiny(data_dir, tmp_path, check=True))


def test_eval_only_refuses_data_with_another_tokenizer(tmp_path, straight):
    other = write_data(tmp_path / "other", tokenizer="gpt2")
    with pytest.raises(UserError, match=r"^--eval-only: .*best\.pt was trained with the tokenizer bytes, but .* gpt2"):
        train.train(tiny(other, straight, eval_only=True))


def test_eval_only_with_a_config_takes_its_settings(straight, tmp_path, monkeypatch):
    settings = json.loads((straight / "config.json").read_text()) | {"eval_tokens": 64}
    (tmp_path / "other.json").write_text(json.dumps(settings))
    args = ["--eval-only", "--out-dir", str(straight), "--config", str(tmp_path / "other.json")]
    monkeypatch.setattr("sys.argv", ["train.py", *args])
    cfg, _ = resume_settings(parse(TrainConfig, "", args))
    assert (cfg.data_dir, cfg.eval_tokens) == (TrainConfig().data_dir, 64)
