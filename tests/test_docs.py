"""The documentation is true to the code: commands parse, links lead somewhere, files exist, the demo runs."""

import ast
import contextlib
import dataclasses
import importlib
import io
import json
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tyro
from conftest import REPO, load_benchmark, run_script

from config import ModelConfig, TrainConfig
from internals import cli
from internals.cli import COMMANDS, parse

PAGES = [
    REPO / "README.md",
    *sorted((REPO / "docs").glob("*.md")),
    *(REPO / name / "README.md" for name in ("data", "checkpoints", "sample")),
]
TEXTS = {str(path.relative_to(REPO)): path.read_text(encoding="utf-8") for path in PAGES}
BENCHMARKS = {  # the dataclass of its flags
    "busy": "Busy",
    "copied": "Copied",
    "generate": "Generating",
    "gpu": "Gpu",
    "loss": "Loss",
    "page": "Page",
    "prepare": "Preparing",
    "race": "Race",
    "reference": "Reference",
    "strip": "Strip",
    "tokenizer": "Tokenizers",
    "train": "Comparison",
}


def code(text: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages, without the indentation that a list gives them."""
    fences = re.findall(r"^( *)```(\w+)\n(.*?)^ *```", text, re.M | re.S)
    return [re.sub(f"^{indent}", "", block, flags=re.M) for indent, language, block in fences if language in languages]


def without_fences(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)


def inline(text: str) -> list[str]:
    """The text between single backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_fences(text))]


def commands(text: str) -> list[str]:
    """Every command of a page: in fenced blocks, in indented ones and inside a sentence."""
    indented = "".join(re.findall(r"^ {4}.*\n?", without_fences(text), re.M))
    lines = "\n".join([*code(text, "sh", "bash", "powershell"), indented]).replace("\\\n", " ").splitlines()
    lines += [span for span in inline(text) if " " in span]
    return [command for line in lines if (command := line.split("  #")[0].strip())]


def ours(command: str) -> list[tuple[str, list[str]]]:
    """Our scripts in a command, however they are started, and the arguments of each."""
    found = []
    for part in re.split(r"\s(?:\|\|?|&&)\s", command):
        try:
            words = shlex.split(part)
        except ValueError:  # prose or a formula with an apostrophe
            continue
        for i, word in enumerate(words):
            if word in COMMANDS or word.startswith("benchmarks/"):
                found.append((word, words[i + 1 :]))
                break
    return found


STARTED = [
    (page, command, script, args)
    for page, text in TEXTS.items()
    for command in commands(text)
    for script, args in ours(command)
]


def test_every_script_of_a_pipe_is_found():
    found = ours("python train.py --check | tee log && X=1 python generate.py --seed 1")
    assert found == [("train.py", ["--check"]), ("generate.py", ["--seed", "1"])]


def benchmark_flags(name: str) -> type:
    return getattr(load_benchmark(name), BENCHMARKS[name])


def names_of_flags(flags: type) -> set[str]:
    return {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(flags)}


@pytest.mark.parametrize(("page", "command", "script", "args"), STARTED, ids=[f"{s[0]}: {s[1]}" for s in STARTED])
def test_a_command_parses(page, command, script, args, monkeypatch):
    monkeypatch.setattr(cli, "with_settings_of", lambda cfg, file: cfg)  # the file need not exist
    assert (REPO / script).exists(), f"{page} names {script}"
    if "--help" in args:
        return
    if script in COMMANDS:
        parse(COMMANDS[script], "", args)
    elif script == "benchmarks/overhead.py":
        parse(TrainConfig, "", args)
    elif args:
        tyro.cli(benchmark_flags(Path(script).stem), args=args)


def test_a_flag_that_is_named_in_a_sentence_exists():
    commands = (*COMMANDS.values(), ModelConfig, *map(benchmark_flags, BENCHMARKS))
    of_pip = {"--extra-index-url", "--force-reinstall"}
    flags = {"--help", "--no-stream", "--lr", *of_pip}.union(*map(names_of_flags, commands))
    for page, text in TEXTS.items():
        for span in inline(text):
            for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", span) if span.startswith("--") else []:
                assert flag in flags, f"{page}: `{span}` has {flag}, which no command takes"


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(TEXTS[page])):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (REPO / page).parent / name if name else REPO / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", without_fences(target.read_text(encoding="utf-8")), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page} links to {link}; the headings there are {sorted(anchors)}"


@pytest.mark.parametrize("page", TEXTS)
def test_files_named_in_the_text_exist(page):
    for span in inline(TEXTS[page]):
        for name in re.findall(r"(?<![\w./-])(?:[\w-]+/)*[\w-]+\.py\b", span):
            assert (REPO / name).exists(), f"{page} names {name} in `{span}`"


@pytest.mark.parametrize("page", TEXTS)
def test_python_examples_import_what_exists(page):
    for block in code(TEXTS[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (REPO / f"{node.module.replace('.', '/')}.py").exists():
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module), alias.name), f"{page}: {alias.name}"


DIFFS = [(page, block) for page, text in TEXTS.items() for block in code(text, "diff")]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize(("page", "diff"), DIFFS, ids=[f"{page} {n}" for n, (page, _) in enumerate(DIFFS)])
def test_a_diff_applies(page, diff):
    """Or has been applied. Where a line that it quotes has changed, it must be printed anew."""

    def check(*flags: str) -> subprocess.CompletedProcess:
        command = ["git", "apply", "--check", *flags, "-"]
        return subprocess.run(command, input=diff, cwd=REPO, capture_output=True, text=True, encoding="utf-8")

    assert (checked := check()).returncode == 0 or check("--reverse").returncode == 0, f"{page}: {checked.stderr}"


def exercise(stop: int) -> str:
    """What the exercise of a stop in docs/reading.md prints."""
    section = TEXTS["docs/reading.md"].split(f"\n### {stop}. ")[1].split("\n### ")[0]
    (block,) = code(section, "python")
    printed = io.StringIO()
    error = pytest.raises(ValueError, match="--n-head") if stop == 3 else contextlib.nullcontext()
    with contextlib.redirect_stdout(printed), error:
        exec(block, {})
    return printed.getvalue()


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]


def test_the_exercises_about_model_and_training_print_what_the_page_says():
    page = TEXTS["docs/reading.md"]
    assert re.findall("True|False", exercise(1)) == ["False"] * 5 + ["True"] * 3
    ours, theirs, blind = numbers(exercise(2))
    assert ours == pytest.approx(theirs, rel=1e-5) and 0 < ours - blind < 0.1 and blind == math.log(1024)
    assert exercise(3) == "[4, 2, 1, 1, 1]\n16\n" and "It prints `[4, 2, 1, 1, 1]`, then 16," in page
    gradient, difference = numbers(exercise(4))
    assert difference < 2e-6 * gradient
    rates, groups = exercise(5).splitlines()
    assert f"It prints `{rates}`" in page
    embeddings, vectors, matrices = ast.literal_eval(groups.replace(") (", "), ("))
    assert vectors[1] == 0 and embeddings[2] == vectors[2] == matrices[2] == 1
    total = embeddings[0] + vectors[0] + matrices[0]
    assert f"65 %: {embeddings[0] / 1e6:.1f} of {total / 1e6:.1f} million" in page


def test_the_exercises_about_text_and_numbers_print_what_the_page_says():
    page = TEXTS["docs/reading.md"]
    per_epoch, *tokens = map(int, numbers(exercise(6)))
    first, second = tokens[:45], tokens[45:]
    assert per_epoch == 5 and (min(first), max(first), min(second), max(second)) == (3, 43, 4, 44)
    assert "begins at token 3 and leaves out 0 to 2 and 44 to 49, the second at 4 and leaves out 0 to 3 and 45" in page
    in_float32, in_bfloat16 = exercise(8).splitlines()
    assert numbers(in_float32)[0] == pytest.approx(2, abs=1e-4) and in_bfloat16 == "tensor(1., dtype=torch.bfloat16)"
    cold, usual, hot, top_k, top_p = (numbers(line) for line in exercise(9).splitlines())
    assert f"token {cold[0]:.3f} and which {hot[0]:.3f}?" in page
    assert len(usual) == 4 and len(top_k) == 2 and top_p == [*usual[:2], 0, 0]
    assert round(sum(top_p), 2) == 0.88 and "together have 88 %" in page


@pytest.mark.parametrize("page", TEXTS)
def test_tables_are_whole(page):
    """A table's rows are adjacent and have as many cells as its header; otherwise it does not render."""
    for block in re.findall(r"(?:^\|.*\n?)+", without_fences(TEXTS[page]), re.M):
        rows = block.splitlines()
        assert len(rows) > 2 and re.fullmatch(r"[|\-: ]+", rows[1]), f"{page}: a table without a header: {rows[0]}"
        cells = [len(re.sub(r"`[^`]*`", "", row).split("|")) for row in rows]
        assert len(set(cells)) == 1, f"{page}: rows of {sorted(set(cells))} cells in the table of {rows[0]}"


def test_the_readme_is_a_front_page():
    assert len(TEXTS["README.md"].splitlines()) <= 160, "README.md: at most 160 lines; the rest belongs to docs/"
    shown = {script for page, _, script, _ in STARTED if page == "README.md"}
    assert shown >= {"prepare_data.py", "train.py", "generate.py"}
    assert {"make demo", "make test"} <= set(commands(TEXTS["README.md"]))


def test_the_layout_tables_name_every_file():
    tables = TEXTS["README.md"] + TEXTS["docs/changing.md"]
    cells = re.findall(r"^\| (`[^|]*`) \|", tables, re.M)
    named = {name for cell in cells for name in re.findall(r"`([\w/]+\.py|\w+/)`", cell)}
    files = {path.name for path in REPO.glob("*.py")}
    files |= {f"internals/{path.name}" for path in (REPO / "internals").glob("*.py")}
    folders = {"internals/", "docs/", "tests/", "benchmarks/", "sample/", "data/", "checkpoints/"}
    missing, gone = (files | folders) - named, {name for name in named if not (REPO / name).exists()}
    assert not missing and not gone, (
        f"the tables of README.md and docs/changing.md: add {missing or 'none'}, remove {gone or 'none'}"
    )


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
    short = ["--data-dir", tmp_path / "data", "--out-dir", run, "--device", "cpu", "--eval-interval", "20"]
    short += ["--tokens-per-iter", "2048", "--eval-tokens", "4096", "--max-iters", "40"]
    trained = run_script(*train, *short)
    assert trained.returncode == 0, trained.stderr
    made = (run / "last.pt").read_bytes()
    repeated = run_script(*train, *short)  # the finished run, which may be extended by now, is kept
    assert repeated.returncode == 0 and "Extend it" in repeated.stdout, repeated.stderr
    assert (run / "last.pt").read_bytes() == made
    assert {path.name for path in run.iterdir()} >= {"best.pt", "last.pt", "metrics.jsonl", "loss.png", "config.json"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert len(losses) == 3
    assert abs(losses[0] - 7.62) < 0.15  # ln 2048
    assert losses[0] > losses[1] > losses[2]

    place = ["--checkpoint", run / "best.pt", "--device", "cpu"]
    text = run_script(*generate, *place, "--seed", "1", "--max-new-tokens", "40")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith(generate[generate.index("--prompt") + 1])
    assert len(text.stdout) > 30
