"""benchmarks/gpu.py: measurements are kept, training runs stop and resume, and one page shows the figures.

No figures are tested here: they need a card. nanoGPT is not part of this project, so its race runs with our own code.
"""

import dataclasses
import json
import signal
import sys

import pytest
import torch
from conftest import REPO, run_script, write_data

import train
from config import TrainConfig
from internals.batch_size import resolve_batch_size
from internals.cli import parse
from internals.start import UserError

sys.path.append(str(REPO / "benchmarks"))
import gpu as gpu_benchmark
import gpu_summary

SHAPE = (
    "--device cpu --dtype float32 --n-layer 1 --n-head 2 --n-embd 16 --n-inner 32 --block-size 16 --batch-size 4 "
    "--tokens-per-iter 64 --max-iters 6 --eval-tokens 256"
)


def gpu(out, *args):
    return run_script("benchmarks/gpu.py", "--small", "--out", out, *args)


def test_a_part_is_measured_once_and_a_run_continues_where_it_stopped(tmp_path, monkeypatch):
    data, card = write_data(tmp_path / "data", train_tokens=4_000), tmp_path / "CPU"
    first = gpu(tmp_path, "--part", "data", "matrix-rate")
    assert first.returncode == 0, first.stderr
    get_lr = train.get_lr
    with monkeypatch.context() as patch:  # the benchmark ends a piece of a run with SIGTERM, too
        patch.setattr(
            train, "get_lr", lambda it, cfg: (it == 2 and signal.raise_signal(signal.SIGTERM), get_lr(it, cfg))[1]
        )
        flags = ["--data-dir", str(data), "--out-dir", str(card / "runs" / "race-ours-third"), "--eval-interval", "1"]
        train.train(parse(TrainConfig, "", [*gpu_benchmark.SMALL_RUN.split(), "--max-iters", "5", *flags]))
    kept = (card / "matrix-rate.json").read_text()
    assert json.loads(kept)["figures"]["flops"] > 0
    assert json.loads((card / "data.json").read_text())["figures"] == {"train": 4_000, "val": 500}

    second = gpu(tmp_path, "--part", "matrix-rate", "race-ours-third")
    assert second.returncode == 0, second.stderr
    assert "at iteration 3" in second.stdout
    assert "== matrix-rate" not in second.stdout
    assert (card / "matrix-rate.json").read_text() == kept
    assert "Left: loss-eager, " in second.stdout.splitlines()[-2]
    curve = json.loads((card / "race-ours-third.json").read_text())["figures"]["curve"]
    assert [tokens for tokens, _, _ in curve] == [
        1024 * n for n in range(6)
    ]  # a third of 16 iterations, each evaluated
    summary = (card / "summary.md").read_text()
    assert f"{curve[-1][2]:.4f}" in summary and "TFLOP/s" in summary


def test_a_part_that_does_not_exist_is_named(tmp_path):
    args = gpu_benchmark.Gpu(out=str(tmp_path), small=True, part=("speed",))
    with pytest.raises(UserError, match=r"^--part speed: .*matrix-rate.*default-run"):
        gpu_benchmark.choose(args, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_competitors_that_fail_are_named_and_the_others_get_their_turn():
    result = run_script("benchmarks/train.py", "--device", "cuda", "--n-layer", 1, "--rounds", 1)
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and message.endswith(": failed, see above")
    assert all(name in message for name in ("ours", "ours, eager", "transformers GPT-2"))


def test_a_race_in_pieces_is_the_same_race(tmp_path, monkeypatch, capsys):
    import race

    data = write_data(tmp_path / "data", train_tokens=4_000)

    def output(*args):
        shape = [f"--shape={SHAPE}", "--run=", "--run=--optimizer adamw"]
        words = ["race.py", "--data-dir", data, *shape, "--evaluations", 3, *args]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        race.main()
        return capsys.readouterr().out

    output("--out", tmp_path / "whole.json")
    pieces = ("--state", tmp_path / "state.pt", "--minutes", 0, "--out", tmp_path / "pieces.json")
    assert "After 1 of 3 parts" in output(*pieces)
    assert "After 2 of 3 parts" in output(*pieces)
    for other in (["--evaluations", 4], [f"--shape={SHAPE} --max-iters 9"]):
        with pytest.raises(UserError, match="keeps this race with another length or --evaluations"):
            output(*pieces, *other)
    assert "At the end" in output(*pieces)
    whole, parted = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "pieces"))
    for name, curve in whole.items():
        assert [(tokens, loss) for tokens, _, loss in curve] == [(tokens, loss) for tokens, _, loss in parted[name]]


def part(figures, **changed):
    machine = {"card": "A", "driver": "580.1", "torch": "2.13.0", "cuda": "13.0", "python": "3.11.7", "commit": "c"}
    return {**machine, "seconds": 1.0, "date": "2026-11-25", "figures": figures, **changed}


def measured(speed, peak):
    return {"tokens_per_second": speed, "peak_bytes": peak << 20, "micro_step": 0.010, "update": 0.002}


def test_the_summary_compares_turns_and_finds_the_runs_below_nanogpts_loss():
    turns = [
        {"ours": measured(a, 900), "nanoGPT": measured(b, 2000)} for a, b in ((300_000, 100_000), (500_000, 300_000))
    ]
    rest = {"flops_per_token": 10**8, "batch_size": 64, "run_tokens": 24_000_000_000}
    compiling = [[0, 0.0, 11.0], [1000, 90.0, 6.0], [2000, 100.0, 5.0], [3000, 110.0, 4.0]]  # 100 tokens/s
    half = [[0, 0.0, 11.0], [500, 5.0, 6.0], [1000, 10.0, 4.0], [1500, 15.0, 3.9]]
    parts = {
        "matrix-rate": part({"flops": 1e14}, driver="570.0"),
        "speed-wikipedia-1": part({"results": turns[0], **rest}),
        "speed-wikipedia-2": part({"results": turns[1], **rest}),
        "race-nanogpt-6e-4": part({"curve": compiling, "bits_per_byte": 1.0}),
        "race-ours-half": part({"curve": half, "bits_per_byte": 0.9}),
        "race-ours-third": part({"curve": half[:2], "bits_per_byte": 2.0}),
    }
    page = gpu_summary.markdown(parts, part({}))
    assert "- matrix-rate: driver 570.0" in page
    assert "| ours | 300,000 / 500,000 | 1.00 | 900 | 10.0 | 2.0 |" in page
    assert "| nanoGPT | 100,000 / 300,000 | 2.00 | 2,000 |" in page
    assert "MFU 40.0%" in page and "would take 1,000 minutes" in page
    assert "At or below nanoGPT's best loss, 4.0000: race-ours-half in 0.50 of the time." in page


def test_the_summary_passes_nobody_off_as_ours():
    """Where ours failed, no ratio, MFU or duration is printed."""
    turn = {"nanoGPT": measured(100_000, 2000), "transformers GPT-2": measured(50_000, 3000)}
    figures = {"results": turn, "flops_per_token": 10**8, "batch_size": 64, "run_tokens": 24_000_000_000}
    page = gpu_summary.markdown({"matrix-rate": part({"flops": 1e14}), "speed-wikipedia-1": part(figures)}, part({}))
    assert "| nanoGPT | 100,000 |  | 2,000 |" in page and "64 sequences in a micro-step." in page
    assert "MFU" not in page and "whole run" not in page


@pytest.mark.parametrize("batch_size", ["3", "auto"])
def test_the_benchmarks_train_on_the_tokens_that_they_print(tmp_path, monkeypatch, batch_size):
    """4 sequences an iteration, which 3 does not divide."""
    import overhead
    import race

    data = str(write_data(tmp_path / "data", train_tokens=4_000))
    flags = [*SHAPE.split(), "--data-dir", data, "--batch-size", batch_size, "--max-iters", "1"]
    cfg = parse(TrainConfig, "", flags)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=257))
    seen = []

    def counting(model, cfg, machine):
        return lambda inputs, targets: (seen.append(inputs.numel()), model(inputs, targets))[1], ""

    monkeypatch.setattr(train, "training_model", counting)
    race.Ours("ours", cfg, race.read_text(data, None)).step(0)
    assert sum(seen) == cfg.tokens_per_iter
    seen.clear()
    machine = train.make_machine(cfg)
    overhead.bare_loop(resolve_batch_size(cfg, machine), machine)
    assert sum(seen) == cfg.tokens_per_iter


@pytest.mark.parametrize("parts", [{}, {"data": part({"train": 1, "val": 1})}])
def test_the_summary_of_little_is_a_page(parts):
    assert gpu_summary.markdown(parts, part({})).startswith("# Figures on A\n")
