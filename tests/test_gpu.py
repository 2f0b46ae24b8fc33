"""One process on a GPU: the commands with PyTorch's CUDA build on stand-ins for NVIDIA's libraries.

Nothing is computed there: losses are garbage. Devices, memory, copies and waits are real.
"""

import json
import os
import re
import textwrap
from pathlib import Path

import pytest
from conftest import REPO, assert_user_error, needs_fake_gpu, run_on_fake_gpu, write_data

from internals import checkpoint

pytestmark = needs_fake_gpu
# The minimum for the driver, CUDA and the libraries, in MiB. On top of it the demo needs 150 for 32 sequences.
CONTEXT = 450


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> list[str]:
    """The command line of a demo run on a little text, without its --out-dir. No tokenizer: the text is garbage."""
    data = write_data(tmp_path_factory.mktemp("gpu") / "data", "none", train_tokens=50_000, val_tokens=4_000)
    shape = ["--preset", "demo", "--data-dir", data, "--compile", "off", "--eval-interval", 2]
    return ["python", "train.py", *map(str, shape)]


def assert_no_pages(stderr: str) -> None:
    """PyTorch's own warnings about a card that it cannot use are not printed next to ours."""
    assert "UserWarning" not in stderr and "Traceback" not in stderr, stderr


def test_a_run_and_its_resume(demo, tmp_path):
    begun = run_on_fake_gpu(*demo, "--out-dir", tmp_path, "--max-iters", 2)
    assert begun.returncode == 0, begun.stderr
    assert "device NVIDIA GeForce RTX 4090, bfloat16 (supported by compute capability 8.9)" in " ".join(
        begun.stdout.split()
    )
    resumed = run_on_fake_gpu(*demo, "--out-dir", tmp_path, "--max-iters", 4, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "at iteration 2; changed: max_iters 2 -> 4" in resumed.stdout
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["iter"] == 4 and saved["machine"]["device"] == "NVIDIA GeForce RTX 4090"
    assert saved["rng"][0].keys() == {"cpu", "cuda"}  # cuda: dropout draws there


def test_a_run_waits_for_the_card_once_an_iteration_and_never_in_a_micro_step(demo, tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(
        textwrap.dedent("""
            import json
            import sys
            from collections import Counter

            import counts
            import train
            from config import TrainConfig
            from internals.cli import parse

            waits = Counter()

            def note(what):
                frame, names = sys._getframe(), []
                while frame and frame.f_code is not train.train.__code__:
                    names.append(frame.f_code.co_name)
                    frame = frame.f_back
                if frame and "learning_rate" in frame.f_locals:  # the iterations have begun
                    waits[names[-1] if "forward_backward" not in names else "forward_backward"] += 1

            cfg = parse(TrainConfig, "")
            counts.on_sync(note)
            train.train(cfg)
            print("waits", json.dumps(waits))
        """)
    )
    steps = ["--batch-size", 8, "--max-iters", 3, "--log-interval", 1, "--eval-interval", 3]  # of 4 micro-steps
    paths = os.pathsep.join([os.environ["FAKE_GPU_DIR"], str(REPO)])
    result = run_on_fake_gpu("python", script, *demo[2:-2], *steps, "--out-dir", tmp_path / "out", PYTHONPATH=paths)
    assert result.returncode == 0, result.stderr
    waits = json.loads(re.search(r"waits ({.*})", result.stdout)[1])
    assert waits.pop("wait") == 3
    assert waits.keys() <= {"retry_smaller", "save"}  # the last evaluation and the save after it


def test_out_of_memory_halves_the_batch_and_check_reports_the_peak_of_what_fits(demo, tmp_path):
    little = run_on_fake_gpu(*demo, "--check", "--out-dir", tmp_path, FAKEGPU_MIB=CONTEXT + 110)
    assert little.returncode == 0, little.stderr
    assert "Out of memory: micro-steps now have 16 sequences, not 32, of the same text." in little.stdout
    assert "--batch-size 32 does not fit; training will use 16" in " ".join(little.stdout.split())
    enough = run_on_fake_gpu(*demo, "--check", "--out-dir", tmp_path, "--batch-size", 16)
    peaks = [int(re.search(r"memory +peak (\d+) MiB", run.stdout)[1]) for run in (little, enough)]
    assert peaks[0] == peaks[1]


def test_a_card_that_others_fill_is_named(demo, tmp_path):
    result = run_on_fake_gpu(*demo, "--out-dir", tmp_path, FAKEGPU_BUSY_MIB=23_600)
    words = "other processes hold about 23.1 of the 23.5 GiB of the NVIDIA GeForce RTX 4090: nvidia-smi shows them"
    assert result.returncode == 2 and f"error: out of memory: {words}" in result.stderr, result.stderr
    assert f"advice {words}" in " ".join(result.stdout.split())  # before the run begins
    assert "Out of memory: micro-steps" not in result.stdout


def test_an_old_driver_ends_a_long_run_and_costs_a_short_one_a_line(demo, tmp_path):
    words = "needs a newer NVIDIA driver than this one, which is for CUDA 12.4; update the driver"
    long = run_on_fake_gpu(*demo, "--out-dir", tmp_path, "--max-iters", 1_000_000, FAKEGPU_DRIVER=12040)
    assert_user_error(
        long, "--device auto: no GPU", words, "whl/cu126", "To train on this CPU anyway, give --device cpu"
    )
    assert not list(tmp_path.iterdir())
    short = run_on_fake_gpu(*demo, "--out-dir", tmp_path, "--max-iters", 1, FAKEGPU_DRIVER=12040)
    assert short.returncode == 0 and "device     cpu" in short.stdout, short.stderr
    assert " ".join(short.stdout.split()).count(words) == 1
    for run in (long, short):
        assert_no_pages(run.stderr)


@pytest.mark.parametrize(
    "card, words",
    [
        ({"FAKEGPU_CC": 6.1}, ["no kernels for GPU 0", "compute capability 6.1; it has them from", "whl/cu126"]),
        ({"FAKEGPU_COUNT": 0}, ["No CUDA GPUs are available", "nvidia-smi"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["CUDA_VISIBLE_DEVICES='' hides the cards from PyTorch; unset it"]),
    ],
    ids=["old", "none", "hidden"],
)
def test_device_cuda_says_why_there_is_no_card(demo, tmp_path, card, words):
    result = run_on_fake_gpu(*demo, "--device", "cuda", "--out-dir", tmp_path, **card)
    assert_user_error(result, "--device cuda: ", *words)
    assert "--device auto" not in result.stderr
    assert_no_pages(result.stderr)


def test_without_a_c_compiler_a_run_says_so_and_continues(demo, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "env", "ldconfig"):
        found = next(path for folder in ("/bin", "/usr/bin", "/sbin") if (path := Path(folder, tool)).exists())
        (tools / tool).symlink_to(found)
    caches = {name: tmp_path / name for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    options = ["--compile", "on", "--max-iters", 1, "--out-dir", tmp_path / "out"]
    result = run_on_fake_gpu(*demo, *options, PATH=tools, **caches)
    assert result.returncode == 0, result.stderr
    (line,) = re.findall(r"compile (off, because .*?) model \d", " ".join(result.stdout.split()))
    assert "Failed to find C compiler" in line and "it needs a C compiler and Python's headers" in line
