"""Imports run one way, commands -> internals -> model -> config, and files and functions stay short."""

import ast
import graphlib
import importlib.util
import subprocess
import sys

import pytest
from conftest import REPO

COMMANDS = {"prepare_data", "train", "generate", "export"}
FILES = {path.stem: path for path in REPO.glob("*.py")}
FILES |= {f"internals.{path.stem}": path for path in (REPO / "internals").glob("*.py")}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imports(module: str) -> set[str]:
    """Every module that this one imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write `from internals.x import y`, not a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= submodules or {node.module}
    return found


IMPORTS = {module: imports(module) for module in TREES}
OURS = {module: found & FILES.keys() for module, found in IMPORTS.items()}


def test_config_imports_nothing_of_ours():
    assert not OURS["config"], f"config.py must not import other project modules: {OURS['config']}"


def test_model_imports_config_alone():
    assert OURS["model"] <= {"config"}, f"model.py must not import {OURS['model'] - {'config'}}"


@pytest.mark.parametrize("module", sorted(FILES.keys() - COMMANDS))
def test_no_part_imports_a_command(module):
    assert not OURS[module] & COMMANDS, f"{module} must not import the command {OURS[module] & COMMANDS}"


@pytest.mark.parametrize("module", sorted(COMMANDS))
def test_only_train_imports_another_command_and_that_is_generate(module):
    others = (OURS[module] & COMMANDS) - ({"generate"} if module == "train" else set())
    assert not others, f"{module} must not import the command {others}; move what they share to internals/"


def test_imports_make_no_circle():
    try:
        graphlib.TopologicalSorter(OURS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"circular imports: {' <- '.join(error.args[1])}")


def test_start_needs_the_standard_library_alone():
    foreign = {name.split(".")[0] for name in IMPORTS["internals.start"]} - sys.stdlib_module_names
    assert not foreign, f"internals/start.py reports missing packages, so it must not import {foreign}"


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_file_is_short_enough(module):
    lines, limit = len(FILES[module].read_text(encoding="utf-8").splitlines()), 350 if module == "train" else 400
    assert lines <= limit, f"{FILES[module].name} has {lines} lines, at most {limit} are allowed; split it"


@pytest.mark.parametrize("path", sorted((REPO / "tests").glob("*.py")), ids=lambda path: path.name)
def test_a_file_of_tests_is_short_enough(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, "split it by topic"


@pytest.mark.parametrize("module", sorted(FILES))
def test_functions_fit_on_a_screen(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines, limit = node.end_lineno - node.lineno + 1, 100 if (module, node.name) == ("train", "train") else 50
            assert lines <= limit, f"{FILES[module].name}: {node.name}() has {lines} lines, at most {limit} are allowed"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    """`make lint` runs the same."""
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("needs ruff: pip install -r requirements-dev.txt")
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    result = subprocess.run(ruff, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
