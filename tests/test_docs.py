"""The README's commands are those that the scripts take, and the demo does what it says."""

import json
import re
import shlex

import pytest
from conftest import REPO, run_script

from config import ExportConfig, GenerateConfig, PrepareConfig, TrainConfig
from internals.cli import parse

README = (REPO / "README.md").read_text(encoding="utf-8")
SCRIPTS = {
    "prepare_data.py": PrepareConfig,
    "train.py": TrainConfig,
    "generate.py": GenerateConfig,
    "export.py": ExportConfig,
}


def commands() -> list[str]:
    """The lines of the README's fenced shell blocks, those broken by a backslash put together."""
    blocks = re.findall(r"^```(?:sh|bash|powershell)\n(.*?)^```", README, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def ours(command: str) -> tuple[str, list[str]] | None:
    """The script of a command and its arguments, for each of the ways in which the README starts one."""
    words = shlex.split(command.split("|")[-1])
    for i, word in enumerate(words):
        if word in SCRIPTS:
            return word, words[i + 1 :]
    return None


@pytest.mark.parametrize("command", [c for c in commands() if ours(c) and "--help" not in c])
def test_a_command_of_the_readme_parses(command):
    script, args = ours(command)
    parse(SCRIPTS[script], "", args)


def test_the_readme_shows_the_three_commands():
    shown = {ours(c)[0] for c in commands() if ours(c)}
    assert shown >= {"prepare_data.py", "train.py", "generate.py"}
    assert {"make demo", "make test"} <= set(commands())


def test_every_file_that_the_readme_names_is_there():
    names = re.findall(r"^\| `([\w.]+(?:\.py|/))` \|", README, re.M)
    assert len(names) > 8
    for name in names:
        assert (REPO / name).exists(), name


def test_the_demo_runs(tmp_path):
    """The commands of `make demo`, in other folders and for a few iterations."""
    makefile = (REPO / "Makefile").read_text()
    demo = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.M)[1]
    prepare, train, generate = [shlex.split(line)[1:] for line in demo.splitlines()]

    first = run_script(*prepare, "--data-dir", tmp_path / "data")
    assert first.returncode == 0, first.stderr
    again = run_script(*prepare, "--data-dir", tmp_path / "data")
    assert again.returncode == 0, again.stderr

    run = tmp_path / "run"
    short = ["--data-dir", tmp_path / "data", "--out-dir", run, "--max-iters", "40", "--eval-interval", "20"]
    for _ in range(2):  # it can be repeated
        trained = run_script(*train, *short)
        assert trained.returncode == 0, trained.stderr
    assert {path.name for path in run.iterdir()} >= {"best.pt", "last.pt", "metrics.jsonl", "loss.png", "config.json"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert len(losses) == 3
    assert abs(losses[0] - 5.55) < 0.15  # ln 257
    assert losses[0] > losses[1] > losses[2]

    text = run_script(*generate, "--checkpoint", run / "best.pt", "--seed", "1", "--max-new-tokens", "40")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith(generate[generate.index("--prompt") + 1])
    assert len(text.stdout) > 30
