"""`--max-epochs` and `auto`: a run chooses its numbers by the text, and is then like any other."""

import dataclasses

import pytest
from conftest import write_data
from runs import assert_same_end, run_command, tiny

import train
from config import ModelConfig, TrainConfig
from internals import checkpoint
from internals.cli import with_preset
from internals.run_length import DROPOUT, ITERATION, WIDTH, resolve_auto, tenth
from internals.settings import differences
from model import GPT

pytestmark = pytest.mark.usefixtures("quick")


def test_what_auto_chooses():
    assert [tenth(n) for n in (1, 9, 10, 19, 85, 314, 999, 3_600, 16_384)] == [1, 1, 1, 1, 8, 30, 100, 360, 1_600]
    auto = TrainConfig(max_iters=100, tokens_per_iter=256, eval_interval="auto", model=ModelConfig(dropout="auto"))

    def chosen(epochs: float) -> TrainConfig:
        return resolve_auto(auto, round(100 * 256 / epochs)).cfg

    assert [chosen(n).model.dropout for n in (0.1, 1.9, 2, 7.9, 8, 400)] == [0, 0, 0.1, 0.1, 0.2, 0.2]
    assert list(DROPOUT) == sorted(DROPOUT)
    assert chosen(1).eval_interval == 10 and chosen(1).max_iters == 100
    limited = dataclasses.replace(auto, max_epochs=2.5)
    assert resolve_auto(limited, 2_560).cfg.max_iters == 25
    assert resolve_auto(limited, 25).cfg.max_iters == 1
    assert resolve_auto(limited, 10**9).cfg.max_iters == 100
    assert resolve_auto(dataclasses.replace(limited, max_epochs=1e305), 10**9).cfg.max_iters == 100
    plain = TrainConfig()
    assert resolve_auto(plain, 10) == (plain, ())


def test_the_width_follows_from_the_text():
    def shape(tokens: int, **sizes) -> tuple[int, int]:
        model = ModelConfig(**{"n_head": 4, "n_embd": "auto", "n_inner": "auto", **sizes})
        chosen = resolve_auto(TrainConfig(model=model), tokens).cfg.model
        return chosen.n_embd, chosen.n_inner

    assert list(WIDTH) == sorted(WIDTH) and 0 in WIDTH
    assert [shape(n) for n in (1, 499_999, 500_000, 10**9)] == [(128, 512), (128, 512), (256, 1024), (256, 1024)]
    assert shape(10**9, n_inner=300) == (256, 300)
    assert shape(1, n_embd=96) == (96, 384)
    assert shape(1, n_head=12) == (132, 528)  # a multiple of the heads
    chosen = resolve_auto(with_preset(TrainConfig, "laptop"), 93_000).chosen
    assert "128 dimensions, 512 in the feed-forward layers" in chosen


def test_the_tokens_of_an_iteration_follow_from_the_text():
    laptop = with_preset(TrainConfig, "laptop")
    assert list(ITERATION) == sorted(ITERATION) and 0 in ITERATION
    sizes = [resolve_auto(laptop, n).cfg.tokens_per_iter for n in (1, 499_999, 500_000, 10**9)]
    assert sizes == [2048, 2048, 8192, 8192]
    small, chosen = resolve_auto(laptop, 93_000)
    assert (small.max_iters, chosen[0]) == (30 * 93_000 // 2048, "2,048 tokens an iteration")
    odd = dataclasses.replace(laptop, model=dataclasses.replace(laptop.model, block_size=384))
    assert resolve_auto(odd, 93_000).cfg.tokens_per_iter == 5 * 384
    long = dataclasses.replace(laptop, model=dataclasses.replace(laptop.model, block_size=4096))
    assert resolve_auto(long, 93_000).cfg.tokens_per_iter == 4096
    given, chosen = resolve_auto(dataclasses.replace(laptop, tokens_per_iter=4096), 93_000)
    assert given.max_iters == 30 * 93_000 // 4096 and "an iteration" not in " ".join(chosen)


@pytest.mark.parametrize(
    "field", [{"max_minutes": 0.0}, {"max_minutes": float("inf")}, {"max_epochs": -1.0}, {"eval_interval": 0}]
)
def test_a_limit_must_be_a_positive_number(field):
    with pytest.raises(ValueError, match=f"--{next(iter(field)).replace('_', '-')}"):
        TrainConfig(**field)


def test_a_run_stores_the_numbers_and_resumes_with_them(data_dir, tmp_path, monkeypatch, capsys):
    """With limits as in a preset: 5 epochs of 976 tokens are 38 iterations of 128, fewer than 100."""
    auto = {"max_iters": 100, "max_epochs": 5.0, "eval_interval": "auto", "dropout": "auto", "n_inner": "auto"}
    seen = []
    init = GPT.__init__
    monkeypatch.setattr(GPT, "__init__", lambda self, config: (seen.append(config.dropout), init(self, config))[1])
    train.train(tiny(data_dir, tmp_path / "auto", **auto))
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "chosen 38 iterations (--max-epochs 5); an evaluation every 3 (a tenth of the run); 16 dimensions, 64 in the "
        "feed-forward layers; dropout 0.1 (the text is read 5 times)"
    ) in out
    saved = checkpoint.load(tmp_path / "auto" / "last.pt")["config"]
    assert (saved["max_iters"], saved["eval_interval"], saved["model"]["dropout"]) == (38, 3, 0.1)
    numbers = {"max_iters": 38, "eval_interval": 3, "dropout": 0.1, "n_inner": 64}
    train.train(tiny(data_dir, tmp_path / "numbers", **numbers))
    assert_same_end(tmp_path / "auto", tmp_path / "numbers")
    train.train(tiny(data_dir, tmp_path / "auto", **{**auto, "max_iters": 40}, resume=True))
    assert "max_iters 38 -> 40" in capsys.readouterr().out
    saved = checkpoint.load(tmp_path / "auto" / "last.pt")["config"]
    assert (saved["eval_interval"], saved["model"]["dropout"]) == (3, 0.1)
    assert "auto" not in seen and set(seen) == {0.1}


@pytest.mark.parametrize("train_tokens", [1_000, 10_000])
def test_the_preset_for_your_own_text_needs_no_flag(tmp_path, train_tokens):
    """When it resumes, the run says nothing about the numbers that it chose itself."""
    data = write_data(tmp_path / "data", train_tokens=train_tokens, val_tokens=500)
    small = ["--preset", "laptop", "--n-layer=1", "--n-embd=8", "--n-head=1", "--n-inner=8", "--max-iters=6"]
    out = run_command(data, tmp_path / "run", *small, "--block-size=16", "--tokens-per-iter=512")
    saved = checkpoint.load(tmp_path / "run" / "last.pt")["config"]
    epochs = 6 * 512 / train_tokens
    assert saved["model"]["dropout"] == (0.1 if epochs >= 2 else 0.0) and saved["eval_interval"] == 1
    assert f"dropout {saved['model']['dropout']:g}" in out
    again = run_command(data, tmp_path / "run", "--resume", "--max-iters=7")
    for name in ("dropout", "eval_interval", "max_iters", "max_epochs", "max_minutes"):
        assert f"kept from last.pt: {name}" not in again
    assert "kept from last.pt: n_layer 1 (config.py: 4)" in again


def test_a_chosen_number_is_no_difference_from_auto_and_another_word_is():
    preset = with_preset(TrainConfig, "laptop")
    run = resolve_auto(preset, 100_000_000).cfg
    assert isinstance(run.eval_interval, int) and run.model.dropout == 0.0
    assert differences(preset.settings(), run.settings(), preset.settings()) == {}
    other = dataclasses.replace(run, device="cpu", dtype="bfloat16", learning_rate=1.0)
    assert differences(run.settings(), other.settings(), run.settings()) == {
        "device": ("auto", "cpu"), "dtype": ("auto", "bfloat16"), "learning_rate": (run.learning_rate, 1.0), "min_lr": (run.final_lr, 0.1),
    }  # fmt: skip
    less = resolve_auto(preset, 1_500_000).cfg  # 26 epochs
    assert differences(run.settings(), less.settings(), run.settings()) == {"dropout": (0.0, 0.2)}


def test_evaluating_alone_needs_no_number(data_dir, tmp_path):
    train.train(tiny(data_dir, tmp_path, max_iters=2))
    auto = {
        "eval_only": True,
        "dropout": "auto",
        "eval_interval": "auto",
        "max_minutes": 1.0,
        "tokens_per_iter": "auto",
    }
    train.train(tiny(data_dir, tmp_path, **auto))
    train.train(tiny(data_dir, tmp_path, init_from=str(tmp_path / "best.pt"), **auto))
