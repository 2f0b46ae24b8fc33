"""The command generate.py: prompts in, text or JSON out; threads; mistakes and too little memory."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import REPO, assert_user_error, run_script, unboxed, without_network_settings
from generating import BYTES, Forced, command, forced_bytes, random_model, save_checkpoint

import generate
from config import GenerateConfig
from internals.cli import parse
from internals.cpu_kernels import has_float16_products
from internals.start import UserError

# ----------------------------------------------------------------------------------------------------------------------
# Prompts and text


def test_the_flags_of_sampling_reach_it(best, monkeypatch):
    seen, sample = [], generate.sample
    spy = lambda logits, sampling: (seen.append(sampling), sample(logits, sampling))[1]  # noqa: E731
    monkeypatch.setattr(generate, "sample", spy)
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.6, "num_samples": 2}
    generate.main(GenerateConfig(checkpoint=str(best), device="cpu", max_new_tokens=1, **options))
    (sampling,) = seen
    assert {name: getattr(sampling, name) for name in options} == options


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_in_the_dtype_that_is_told(best, monkeypatch, capsys, dtype):
    seen = []
    spy = lambda model: (seen.append(model.transformer.wte.weight.dtype), model.eval())[1]  # noqa: E731
    monkeypatch.setattr(generate, "pack_weights", spy)
    generate.main(GenerateConfig(checkpoint=str(best), device="cpu", dtype=dtype, max_new_tokens=1))
    assert seen == [getattr(torch, dtype)] and f"on cpu in {dtype} (as requested)" in capsys.readouterr().err


def test_text_goes_to_stdout_and_all_else_to_stderr(best):
    first = command(best, "--prompt", "Größe", "--seed", 7, "--ignore-eot", "--max-new-tokens", 50, encoding="utf-8")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Größe") and first.stdout.endswith("\n") and len(first.stdout) > 20
    assert " parameters\n" in first.stderr and "--seed" not in first.stderr
    again = command(
        best, "--prompt", "Größe", "--seed", 7, "--ignore-eot", "--max-new-tokens", 50, "--no-stream", encoding="utf-8"
    )
    assert again.stdout == first.stdout


def test_json_lines(best):
    run = command(best, "--prompt", "abc", "--num-samples", 3, "--json", "--ignore-eot", "--max-new-tokens", 20)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert list(row) == ["prompt", "text", "tokens", "seed", "seconds", "tokens_per_second"]
        assert row["prompt"] == "abc" and row["tokens"] == 20
        assert row["tokens_per_second"] == pytest.approx(20 / row["seconds"], rel=0.05)
        assert (
            f"To get the same text again, add --seed {row['seed']}" in run.stderr
        )  # without --seed, the seed that was drawn is printed
    assert len({row["text"] for row in rows}) == 3


def test_a_megabyte_on_stdin(best):
    text = "Ein Wörterbuch. " * 65_536
    run = command(best, "--prompt", "-", "--max-new-tokens", 5, input=text + "\n", encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(text) and not run.stdout.startswith(text + "\n")
    assert run.stderr.count("the model reads the last 32 of them") == 1


def test_interactive_answers_line_by_line(best):
    greedy = ["--temperature", 0, "--max-new-tokens", 4]
    bad = "\ufeffone \udcff\ntwo\n"  # a byte-order mark is no text, a byte that is not UTF-8 does not end the session
    run = command(best, "--interactive", *greedy, input=bad, encoding="utf-8", errors="surrogateescape")
    assert run.returncode == 0, run.stderr
    single = command(best, "--prompt", "two", *greedy, encoding="utf-8")
    assert run.stdout.startswith("one \ufffd") and run.stdout.endswith(single.stdout)
    assert "--seed" not in run.stderr and "--seed" not in single.stderr  # no text here depends on it
    drawn = command(best, "--interactive", "--max-new-tokens", 4, input="one\n")
    assert "To get the same texts for the same prompts again, add --seed " in drawn.stderr


def test_each_prompt_of_a_session_has_a_seed_that_makes_its_text(best):
    command = ("generate.py", "--checkpoint", best, "--device", "cpu", "--json", "--max-new-tokens", 20, "--ignore-eot")
    session = run_script(*command, "--interactive", "--seed", 7, input="one\ntwo\nthree\n")
    rows = [json.loads(line) for line in session.stdout.splitlines() if line.startswith("{")]
    assert [row["seed"] for row in rows] == [7, 8, 9], session.stderr
    again = run_script(*command, "--prompt", "three", "--seed", 9)
    assert json.loads(again.stdout)["text"] == rows[2]["text"]


def test_seed_0_is_a_seed(best, capsys):
    generate.main(GenerateConfig(checkpoint=str(best), device="cpu", json=True, max_new_tokens=2, seed=0))
    shown = capsys.readouterr()
    assert json.loads(shown.out)["seed"] == 0 and "--seed" not in shown.err


@pytest.mark.skipif(not has_float16_products(), reason="needs x86 with AVX2")
def test_float16_on_a_cpu_writes_nearly_what_float32_writes(best, capsys):
    texts = {}
    for dtype in ("float32", "float16"):
        greedy = GenerateConfig(
            checkpoint=str(best), device="cpu", json=True, max_new_tokens=20, temperature=0, dtype=dtype
        )
        generate.main(greedy)
        shown = capsys.readouterr()
        assert f"on cpu in {dtype} (as requested)" in shown.err
        texts[dtype] = json.loads(shown.out)["text"]
    assert texts["float16"][:8] == texts["float32"][:8]


# ----------------------------------------------------------------------------------------------------------------------
# Threads and imports


@pytest.mark.parametrize(("users", "threads"), [(None, [1]), ("2", [])], ids=["ours", "the user's"])
def test_a_small_model_takes_one_thread_unless_the_user_says_otherwise(monkeypatch, users, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if users:
        monkeypatch.setenv("OMP_NUM_THREADS", users)
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(generate, "open_model", lambda source: (Forced(forced_bytes("one")), BYTES, "forced"))
    monkeypatch.setattr(generate, "pack_weights", lambda model: model)
    generate.main(GenerateConfig(temperature=0.0, device="cpu"))
    assert seen == threads


def test_a_larger_model_takes_as_many_threads_as_there_are_cores_for_it(monkeypatch):
    """Fewer than the machine has, in a container with a limit."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(generate, "ONE_THREAD", 0)
    monkeypatch.setattr("internals.device.count_cores", lambda: 2)
    monkeypatch.setattr(generate, "open_model", lambda source: (Forced(forced_bytes("one")), BYTES, "forced"))
    monkeypatch.setattr(generate, "pack_weights", lambda model: model)
    generate.main(GenerateConfig(temperature=0.0, device="cpu"))
    assert seen == [2]


def test_help_and_mistakes_need_no_pytorch_and_generating_needs_no_compiler(best):
    command = [sys.executable, "-X", "importtime", "generate.py"]
    run = subprocess.run([*command, "--help"], cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 0 and "--stop" in run.stdout
    assert " torch\n" not in run.stderr and "tyro" in run.stderr
    run = subprocess.run(
        [*command, "--device", "cpu", "--checkpoint", str(best)], cwd=REPO, capture_output=True, text=True
    )
    assert run.returncode == 0 and " torch\n" in run.stderr
    for module in ("torch._dynamo", "torch._inductor", "sympy", "datasets", "transformers", "matplotlib"):
        assert f" {module}\n" not in run.stderr, module


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "args, words",
    [
        (["--top-k", "0"], ["--top-k 0", "at least 1"]),
        (["--top-p", "2"], ["--top-p 2", "at most 1"]),
        (["--top-p", "0"], ["--top-p 0", "above 0"]),
        (["--max-new-tokens", "-1"], ["--max-new-tokens -1", "0 or more"]),
        (["--temperature", "-1"], ["--temperature -1", "from 0"]),
        (["--temperature", "nan"], ["--temperature nan"]),
        (["--num-samples", "0"], ["--num-samples 0", "from 1 to 65,536"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--seed", "99999999999999999999"], ["--seed 99999999999999999999", "below"]),
        (["--stop", ""], ["--stop", "empty"]),
        (["--interactive", "--prompt", "x"], ["--interactive", "--prompt"]),
        (["--topk", "3"], ["--topk"]),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_clear_message(args, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(GenerateConfig, "", args)
    told = unboxed(capsys.readouterr().err)
    assert ended.value.code == 2 and all(word in told for word in words), told


def test_a_tokenizer_that_is_not_at_hand_is_one_clear_message(tmp_path):
    environment = without_network_settings()
    environment |= {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}  # nobody listens there
    path = save_checkpoint(tmp_path / "gpt2.pt", tokenizer="gpt2")
    assert_user_error(command(path, env=environment), "gpt2", "TIKTOKEN_CACHE_DIR")


def test_the_page_of_a_model_with_nan_weights_is_an_error(tmp_path):
    """The model then reads the prompt, but generates nothing."""
    model, page = random_model(vocab_size=257, block_size=32), tmp_path / "page.html"
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    path = save_checkpoint(tmp_path / "nan.pt", model=model.state_dict())
    with pytest.raises(UserError, match="infinite or NaN"):
        generate.main(
            GenerateConfig(checkpoint=str(path), prompt="abc", max_new_tokens=0, device="cpu", html=str(page))
        )
    assert not page.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Too little memory


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory")])
@pytest.mark.parametrize("where", ["open_model", "pack_weights"])
def test_a_model_too_large_for_the_memory(best, monkeypatch, error, where):
    def fail(model):
        raise error

    monkeypatch.setattr(generate, where, fail)
    with pytest.raises(UserError, match=r"--checkpoint .*: does not fit into memory; .* or use a smaller model"):
        generate.main(GenerateConfig(checkpoint=str(best), device="cpu"))


@pytest.mark.parametrize("where", ["__init__", "write"])
def test_a_page_too_large_for_the_memory(best, tmp_path, monkeypatch, where):
    def fail(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(generate.TextPage, where, fail)
    with pytest.raises(UserError, match=r"--html .*page\.html: does not fit into memory; "):
        generate.main(GenerateConfig(checkpoint=str(best), device="cpu", html=str(tmp_path / "page.html")))


def test_more_samples_than_the_memory_holds(best, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(generate, "TextStream", fail)
    with pytest.raises(UserError, match="--num-samples 8: do not fit into memory; use fewer"):
        generate.main(GenerateConfig(checkpoint=str(best), num_samples=8, device="cpu"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_one_clear_message(best, monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        raise error
        yield

    monkeypatch.setattr(generate, "generate", fail)
    with pytest.raises(UserError, match="--num-samples 8: do not fit into memory; use fewer"):
        generate.main(GenerateConfig(checkpoint=str(best), num_samples=8, device="cpu"))
    with pytest.raises(UserError, match=r"^the text does not fit into memory; "):
        generate.main(GenerateConfig(checkpoint=str(best), device="cpu"))
    monkeypatch.setattr(generate, "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug stays a bug
        generate.main(GenerateConfig(checkpoint=str(best), num_samples=8, device="cpu"))


def test_a_prompt_that_is_cut_is_told_and_one_that_just_fits_is_not(best, capsys):
    for length, cut in ((32, False), (33, True)):  # the context has 32 tokens
        generate.main(GenerateConfig(checkpoint=str(best), prompt="a" * length, max_new_tokens=1, device="cpu"))
        assert ("the model reads the last 32 of them" in capsys.readouterr().err) == cut
