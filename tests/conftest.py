"""What the tests share: running the scripts as a user does, and the two things that only some machines have."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# The tests' models are so small that a second thread costs more than it brings, above all beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="needs the GPT-2 vocabulary: set TIKTOKEN_CACHE_DIR to a folder that holds it",
)
needs_wikipedia = pytest.mark.skipif(
    "WIKIPEDIA_SAMPLE_DIR" not in os.environ,
    reason="needs real Wikipedia text: set WIKIPEDIA_SAMPLE_DIR to a folder of its parquet files",
)


def run_script(*args, timeout=300, **kwargs) -> subprocess.CompletedProcess:
    """`python SCRIPT ARGS` in the repository's root, as a user types it; stdout and stderr are kept as text."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=timeout, **kwargs)


def unboxed(text: str) -> str:
    """What tyro printed, without the box that it draws around it and the line breaks inside the box."""
    return " ".join(re.sub(r"[│╭╮╰╯─]|^\||\|$", " ", text, flags=re.M).split())


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """A foreseen problem: exit status 2, a short message on stderr with these words, no traceback."""
    assert result.returncode == 2, f"exit status {result.returncode}\n{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    assert 0 < len(result.stderr.strip().splitlines()) <= 12, result.stderr
    for word in words:
        assert word in unboxed(result.stderr), f"{word!r} is not in:\n{result.stderr}"
