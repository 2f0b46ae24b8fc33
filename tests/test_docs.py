"""The documentation is true to the code: commands parse, links lead somewhere, files exist, the demo runs."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro
from conftest import REPO, run_script

from config import ExportConfig, GenerateConfig, ModelConfig, PrepareConfig, TrainConfig
from internals import cli
from internals.cli import parse

PAGES = [
    REPO / "README.md",
    *sorted((REPO / "docs").glob("*.md")),
    *(REPO / name / "README.md" for name in ("data", "checkpoints", "sample")),
]
TEXTS = {str(path.relative_to(REPO)): path.read_text(encoding="utf-8") for path in PAGES}
SCRIPTS = {
    "prepare_data.py": PrepareConfig,
    "train.py": TrainConfig,
    "generate.py": GenerateConfig,
    "export.py": ExportConfig,
}
BENCHMARKS = {
    "copied": "Copied",
    "gpu": "Gpu",
    "loss": "Loss",
    "page": "Page",
    "race": "Race",
    "reference": "Reference",
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


def ours(command: str) -> tuple[str, list[str]] | None:
    """The script of a command and its arguments, however it is started; None if the script is not ours."""
    try:
        words = shlex.split(command.split("|")[-1])
    except ValueError:  # prose or a formula with an apostrophe
        return None
    for i, word in enumerate(words):
        if word in SCRIPTS or word.startswith("benchmarks/"):
            return word, words[i + 1 :]
    return None


STARTED = [
    (page, command, *ours(command)) for page, text in TEXTS.items() for command in commands(text) if ours(command)
]


def benchmark_arguments(script: str):
    """The dataclass of a benchmark's flags, or None if it has none of its own."""
    sys.path.append(str(REPO / "benchmarks"))  # for benchmarks/common.py; last, so that `import train` is the command
    name = Path(script).stem
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", REPO / script)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(REPO / "benchmarks"))
    return getattr(module, BENCHMARKS[name])


@pytest.mark.parametrize(("page", "command", "script", "args"), STARTED, ids=[f"{s[0]}: {s[1]}" for s in STARTED])
def test_a_command_parses(page, command, script, args, monkeypatch):
    monkeypatch.setattr(cli, "read_settings", lambda file: TrainConfig().settings())  # the file need not exist
    assert (REPO / script).exists(), f"{page} names {script}"
    if "--help" in args:
        return
    if script in SCRIPTS:
        parse(SCRIPTS[script], "", args)
    elif script == "benchmarks/overhead.py":
        parse(TrainConfig, "", args)
    elif Path(script).stem in BENCHMARKS and args:
        tyro.cli(benchmark_arguments(script), args=args)


def test_a_flag_that_is_named_in_a_sentence_exists():
    benchmarks = [benchmark_arguments(f"benchmarks/{name}.py") for name in BENCHMARKS]
    classes = (*SCRIPTS.values(), ModelConfig, *benchmarks)
    flags = {f"--{field.name.replace('_', '-')}" for cls in classes for field in dataclasses.fields(cls)}
    flags |= {"--help", "--no-stream", "--lr"}
    flags |= set(re.findall(r'"(--[\w-]+)"', (REPO / "benchmarks/prepare.py").read_text(encoding="utf-8")))
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
    named = set(re.findall(r"^\| `([\w/]+\.py|\w+/)` \|", tables, re.M))
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
    short = ["--data-dir", tmp_path / "data", "--out-dir", run, "--eval-interval", "20"]
    for count in ("1", "40"):  # it can be repeated
        trained = run_script(*train, *short, "--max-iters", count)
        assert trained.returncode == 0, trained.stderr
    assert {path.name for path in run.iterdir()} >= {"best.pt", "last.pt", "metrics.jsonl", "loss.png", "config.json"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert len(losses) == 3
    assert abs(losses[0] - 7.62) < 0.15  # ln 2048
    assert losses[0] > losses[1] > losses[2]

    text = run_script(*generate, "--checkpoint", run / "best.pt", "--seed", "1", "--max-new-tokens", "40")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith(generate[generate.index("--prompt") + 1])
    assert len(text.stdout) > 30
