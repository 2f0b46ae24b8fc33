"""benchmarks/gpu.py: measurements are kept, training runs stop and resume, and one page shows the figures.

No figures are tested here: they need a card. nanoGPT is not part of this project, so a tiny model takes its place.
"""

import dataclasses
import functools
import json
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, load_benchmark, needs_fake_gpu, run_on_fake_gpu, run_script, write_data
from tiny_nanogpt import SHAPE, write_nanogpt

import train
from config import TrainConfig
from internals.batch_size import resolve_batch_size
from internals.cli import parse
from internals.start import UserError
from internals.windows import TokenStream, TrainingWindows

sys.path.append(str(REPO / "benchmarks"))
import gpu as gpu_benchmark
import gpu_steps
import gpu_summary


@pytest.fixture
def nanogpt(tmp_path):
    return write_nanogpt(tmp_path / "nanogpt")


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
        flags = ["--data-dir", str(data), "--out-dir", str(card / "runs" / "race-ours-third-5"), "--eval-interval", "1"]
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


def test_a_first_start_runs_to_its_end_with_a_text_that_is_too_short_for_the_default_run(tmp_path, monkeypatch, capsys):
    """Before the part `data`, nobody knows that the default run has no more iterations than race-ours."""
    args = gpu_benchmark.Gpu(source="wikipedia-files", out=str(tmp_path))
    monkeypatch.setattr(gpu_benchmark.tyro, "cli", lambda *_, **__: args)
    monkeypatch.setattr(gpu_benchmark, "in_a_process", lambda *_: {"card": "A"})
    monkeypatch.setattr(gpu_summary, "markdown", lambda *_: "")
    for part in ("matrix_rate", "loss", "speed", "kernels", "optimizer", "generating", "training_run"):
        monkeypatch.setattr(gpu_benchmark, part, lambda *_: {})
    monkeypatch.setattr(gpu_benchmark, "data", lambda args: {"in": str(write_data(args.data_dir, train_tokens=40_000))})
    gpu_benchmark.main()
    _, first, *_, last = capsys.readouterr().out.split("Done: ")
    assert "default-run" in first and "Left: nothing" in last and "default-run" not in last


@pytest.mark.parametrize(
    "figures, nanogpt, done",
    [
        ({}, None, True),
        ({"nanogpt": False}, None, True),
        ({"nanogpt": False}, "DIR", False),  # was measured without it
        ({"nanogpt": True}, None, True),
        ({"missing": ["transformers GPT-2"]}, None, False),
        ({"missing": [], "out_of_memory": ["nanoGPT"]}, None, True),
        ({"max_iters": 16}, None, True),
        ({"max_iters": 17}, None, False),  # other --tokens
    ],
)
def test_a_part_that_lacks_what_is_asked_for_is_measured_again(tmp_path, figures, nanogpt, done):
    args = gpu_benchmark.Gpu(out=str(tmp_path), small=True, nanogpt=nanogpt)
    (tmp_path / "race-ours.json").write_text(json.dumps({"figures": figures}))
    assert gpu_benchmark.is_done(args, tmp_path, "race-ours") is done


def test_copies_and_fills_are_launches_and_none_at_all_is_an_error():
    calls = {"cudaLaunchKernel": 60, "cuLaunchKernelEx": 40, "cudaMemcpyAsync": 40, "cudaMemsetAsync": 6}
    others = {"Memcpy DtoD (Device -> Device)": 40, "cudaStreamSynchronize": 2, "aten::baddbmm": 40}
    events = [SimpleNamespace(key=key, count=count) for key, count in (calls | others).items()]
    assert gpu_steps.launches(events) == 146
    with pytest.raises(RuntimeError, match="no launches"):
        gpu_steps.launches([])


def test_competitors_run_in_both_orders_and_say_why_they_have_no_figures(monkeypatch):
    module, order = load_benchmark("train"), []

    def measure(names, args, shape):
        order.extend(names)
        if names == ["transformers GPT-2"]:
            raise module.OutOfMemory("CUDA out of memory")
        if names == ["ours, eager"]:
            raise EOFError
        return {names[0]: module.Result(1.0, 2, 3.0, 4.0)}

    monkeypatch.setattr(module, "measure", measure)
    args = module.Comparison(device="cuda", nanogpt="DIR", reverse=True)
    results = module.compare(args)
    assert order == ["nanoGPT", "transformers GPT-2", "ours, eager", "ours"]
    assert list(results) == ["ours", "transformers GPT-2", "nanoGPT"] and results["transformers GPT-2"] is None
    with pytest.raises(UserError, match="--tokens-per-iter: must be a multiple of 24 x 256"):
        module.compare(dataclasses.replace(args, batch_size=24))


def test_what_is_measured_is_compiled_once_as_in_training(monkeypatch):
    module, sent, graphs = load_benchmark("train"), [], torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    graphs.clear()
    shape = module.ModelConfig(n_layer=1, n_head=2, n_embd=16, n_inner=32, block_size=16, vocab_size=257)
    connection = SimpleNamespace(recv=iter([True, True, None]).__next__, send=sent.append)
    args = module.Comparison(batch_size=2, tokens_per_iter=128)
    module.take_turns(connection, "ours bf16 compiled", args, shape)
    assert graphs["stats"]["unique_graphs"] == 1
    assert sent[0].iteration == 4 * sent[0].micro_step + sent[0].update


def test_every_chunk_size_of_the_loss_is_compiled(monkeypatch, capsys):
    import loss

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)  # restores it at the end
    for name in ("LOGITS_AT_ONCE", "LOGITS_AT_ONCE_COMPILED"):
        monkeypatch.setattr(loss.model, name, getattr(loss.model, name))
    monkeypatch.setattr(loss, "peak_mib", lambda *_, **__: 0)
    sizes = [str(320 * rows) for rows in (8, 12, 16, 24, 32, 64)]
    options = ["--rows", "64", "--n-embd", "16", "--vocab-size", "257", "--repeats", "1", "--compile"]
    monkeypatch.setattr(sys, "argv", ["loss.py", *options, "--logits-at-once", *sizes])
    loss.main()
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 * 7


def test_generating_is_measured_without_cudnns_attention(monkeypatch):
    pytest.importorskip("transformers")
    module, seen = load_benchmark("generate"), []
    monkeypatch.setattr(module, "generate", lambda *_: [seen.append(torch.backends.cuda.cudnn_sdp_enabled())])
    module.ours(None, None)
    assert seen == [False]


def test_the_overhead_is_measured_on_data_that_train_reads(tmp_path):
    load_benchmark("overhead").make_data(tmp_path / "data", "wikipedia", tokens=1_000)
    assert len(TrainingWindows(TokenStream.open(tmp_path / "data", "train"), block_size=256, seed=0).batch([0])) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_competitors_that_fail_are_named_and_the_others_get_their_turn():
    only = ("ours, eager", "transformers GPT-2")
    result = run_script("benchmarks/train.py", "--device", "cuda", "--n-layer", 1, "--rounds", 1, "--only", *only)
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and message.endswith(": failed, see above")
    assert all(name in message for name in only)


def test_a_race_in_pieces_is_the_same_race(tmp_path, monkeypatch, capsys, nanogpt):
    import race

    data = write_data(tmp_path / "data", train_tokens=4_000)

    def output(*args):
        shape = [f"--shape={SHAPE}", "--run=", "--run=--optimizer adamw", "--nanogpt", nanogpt, "--nanogpt-run="]
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
        "race-ours-third": part({"curve": half[:2], "bits_per_byte": 2.0}, commit="before"),
    }
    page = gpu_summary.markdown(parts, part({}))
    assert "- matrix-rate: driver 570.0" in page and "- race-ours-third: commit before" in page
    assert "| ours | 300,000 / 500,000 | 1.00 | 900 | 10.0 | 2.0 |" in page
    assert "| nanoGPT | 100,000 / 300,000 | 2.00 | 2,000 |" in page
    assert "MFU 40.0%" in page and "would take 1,000 minutes" in page
    assert "At or below nanoGPT's best loss, 4.0000: race-ours-half in 0.50 of the time." in page


def test_the_summary_passes_nobody_off_as_ours():
    """Where ours failed, no ratio, MFU or duration is printed."""
    turn = {"nanoGPT": measured(100_000, 2000), "transformers GPT-2": measured(50_000, 3000)}
    figures = {"results": turn, "flops_per_token": 10**8, "batch_size": 64, "run_tokens": 24_000_000_000}
    figures |= {"out_of_memory": ["ours"], "missing": ["ours, eager"]}
    page = gpu_summary.markdown({"matrix-rate": part({"flops": 1e14}), "speed-wikipedia-1": part(figures)}, part({}))
    assert "| nanoGPT | 100,000 |  | 2,000 |" in page and "64 sequences in a micro-step." in page
    assert "MFU" not in page and "whole run" not in page
    assert "Out of memory: ours. Missing: ours, eager." in page


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


STEPS = """
import json, sys
sys.path.insert(0, "benchmarks")
import race
import torch
from config import TrainConfig
from internals.cli import parse

make, data, folder, *flags = sys.argv[1:]
cfg, graphs = parse(TrainConfig, "", flags), torch._dynamo.utils.counters["stats"]
text = race.read_text(data, None)
runner = race.Ours("", cfg, text) if make == "ours" else race.NanoGPT(folder, "", cfg, text)
before = graphs["unique_graphs"]
runner.step(0)
runner.step(1)
runner.evaluate()
print(before, graphs["unique_graphs"])
"""


@needs_fake_gpu
@pytest.mark.parametrize("make", ["ours", "nanoGPT"])
def test_a_race_begins_with_everything_compiled(make, tmp_path, nanogpt):
    """So the time of compiling does not count as training."""
    data = write_data(tmp_path / "data", train_tokens=4_000)
    (tmp_path / "steps.py").write_text(STEPS)
    flags = [word for word in SHAPE.replace("--device cpu --dtype float32", "--device cuda").split()]
    result = run_on_fake_gpu(
        "python", tmp_path / "steps.py", make, data, nanogpt, *flags, "--data-dir", data, PYTHONPATH=REPO
    )
    assert result.returncode == 0, result.stderr
    before, after = map(int, result.stdout.split()[-2:])
    assert before == after > 0


@needs_fake_gpu
def test_a_competitor_that_does_not_fit_is_told_from_one_that_fails(tmp_path):
    flags = ["--device", "cuda", "--n-layer", 1, "--batch-size", 64, "--rounds", 1, "--only", "ours, eager"]
    for mib, fits in (8_000, True), (1_500, False):
        command = ("python", "benchmarks/train.py", *flags, "--out", tmp_path / "figures.json")
        result = run_on_fake_gpu(*command, FAKEGPU_MIB=mib, PYTHONPATH=REPO)
        assert result.returncode == 0, result.stderr
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures["missing"] == [] and bool(figures["results"]["ours, eager"]) == fits
    assert "Out of memory: ours, eager" in result.stdout


@pytest.mark.parametrize("parts", [{}, {"data": part({"train": 1, "val": 1})}])
def test_the_summary_of_little_is_a_page(parts):
    assert gpu_summary.markdown(parts, part({})).startswith("# Figures on A\n")
