"""Shared by the tests: run scripts as a user does, write small data folders, skip what this machine lacks."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import warm

from internals.cli import COMMANDS
from internals.files import write_json
from internals.shards import META_FORMAT, ShardWriter

REPO = Path(__file__).resolve().parent.parent

# The modules beside this one whose fixtures several test files use; runs first, because others import it
pytest_plugins = ["runs", "exports", "generating", "hub_commands", "pages", "two_processes"]

# The test models are so small that a second thread costs more time than it saves, above all on a busy machine. And sums
# of several threads may differ in their last bit.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)  # in this process, too, which imported PyTorch before

# tyro draws boxes around its messages. CI often asks for colours in them, and a small terminal breaks their lines.
os.environ.pop("FORCE_COLOR", None)
os.environ["COLUMNS"] = "80"

# A shell script's background job (`make test &`) ignores Ctrl-C, and so would every process started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="needs the GPT-2 vocabulary: set TIKTOKEN_CACHE_DIR to a folder that holds it",
)
needs_wikipedia = pytest.mark.skipif(
    "WIKIPEDIA_SAMPLE_DIR" not in os.environ,
    reason="needs real Wikipedia text: set WIKIPEDIA_SAMPLE_DIR to a folder of its parquet files",
)

needs_fake_gpu = pytest.mark.skipif(
    "FAKE_GPU_DIR" not in os.environ,
    reason="needs stand-ins for NVIDIA's libraries: set FAKE_GPU_DIR to the folder that holds their run.sh",
)


def run_on_fake_gpu(*args, timeout=300, **variables) -> subprocess.CompletedProcess:
    """Run `COMMAND ARGS` in the repository's root, with PyTorch's CUDA build on a card that computes nothing.

    `variables` describe the card: `FAKEGPU_MIB=8192`. Kernels return garbage; everything around them is real.
    """
    command = [f"{os.environ['FAKE_GPU_DIR']}/run.sh", *map(str, args)]
    env = {
        **os.environ,
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **{name: str(value) for name, value in variables.items()},
    }
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=timeout, env=env)


def without_network_settings() -> dict[str, str]:
    """This process's environment, but with the usual settings of the network and of the Hugging Face hub."""
    prefixes = ("HF_", "HUGGING", "TRANSFORMERS_")
    return {
        name: value
        for name, value in os.environ.items()
        if "proxy" not in name.lower() and not name.upper().startswith(prefixes)
    }


def run_script(*args, timeout=300, **kwargs) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ARGS` in the repository's root, as a user would; stdout and stderr are captured as text.

    A command that takes the environment as it is gets a process that has PyTorch and more (tests/warm.py).
    """
    if sys.platform == "linux" and args[0] in COMMANDS and not kwargs:
        return warm.run([str(arg) for arg in args], REPO, timeout)
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=timeout, **kwargs)


def load_benchmark(name: str) -> ModuleType:
    """The module benchmarks/NAME.py. Its name is not NAME, because some benchmarks are called like commands."""
    known = f"benchmark_{name}"
    if known in sys.modules:
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, REPO / "benchmarks" / f"{name}.py")
    sys.modules[known] = module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.path.append(str(REPO / "benchmarks"))  # for the modules beside it; last, so that `import train` is the command
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


def unboxed(text: str) -> str:
    """tyro's output without its box and without the line breaks inside the box."""
    return " ".join(re.sub(r"[│╭╮╰╯─]|^\||\|$", " ", text, flags=re.M).split())


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """A foreseen problem: exit status 2, a short message on stderr with these words, no traceback."""
    assert result.returncode == 2, f"exit status {result.returncode}\n{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    assert 0 < len(result.stderr.strip().splitlines()) <= 12, result.stderr
    for word in words:
        assert word in unboxed(result.stderr), f"{word!r} is not in:\n{result.stderr}"


def random_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**16, count).astype(np.uint16)


def write_splits(
    folder: Path, splits: dict[str, np.ndarray], tokenizer: str = "bytes", shard_tokens: int = 700
) -> Path:
    """A finished data folder with these tokens, made without prepare_data.py."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"format": META_FORMAT, "tokenizer": tokenizer, "vocab_size": 257, "source": {"kind": "files"}, "splits": {}}
    for split, tokens in splits.items():
        writer = ShardWriter(folder, split, shard_tokens)
        writer.write(tokens)
        counts = {"tokens": len(tokens), "bytes": len(tokens), "articles": 10}
        meta["splits"][split] = {**counts, "shards": writer.finish()}
    write_json(folder / "meta.json", meta)
    return folder


def write_data(folder: Path, tokenizer: str = "bytes", train_tokens: int = 1_000, val_tokens: int = 500) -> Path:
    """A finished data folder of random tokens with a pattern to learn."""
    rng = np.random.default_rng(0)
    counts = {"train": train_tokens, "val": val_tokens}
    splits = {name: (np.cumsum(rng.integers(0, 3, n)) % 64 + 32).astype(np.uint16) for name, n in counts.items()}
    return write_splits(folder, splits, tokenizer)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random inputs do not depend on the tests that ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """61 training windows of 16 tokens per epoch, and 31 validation windows."""
    return write_data(tmp_path_factory.mktemp("data") / "tiny")
