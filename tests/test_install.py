"""Installing: requirements and constraints agree, an installed PyTorch stays, and make takes the build that fits."""

import os
import platform
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest
from conftest import REPO
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

INDEX = "https://download.pytorch.org/whl"
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def requirements(file: str) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (REPO / file).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-r ")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


CODE, TESTS, PINS = map(requirements, ("requirements.txt", "requirements-dev.txt", "constraints.txt"))


def pinned(name: str) -> str:
    (specifier,) = PINS[name].specifier
    assert specifier.operator == "==", f"constraints.txt: {PINS[name]} is not one version"
    return specifier.version


@pytest.mark.parametrize("name", [*CODE, *TESTS])
def test_a_requirement_has_one_version_in_the_constraints_that_satisfies_it(name):
    requirement = CODE.get(name) or TESTS[name]
    assert requirement.specifier.contains(pinned(name)), f"{requirement} and {PINS[name]}"


def test_constraints_are_single_versions():
    for name in PINS:
        assert pinned(name)


@pytest.mark.parametrize("there", ["2.9.1", "2.11.0+cu128", "2.13.0+cpu", "2.15.0"])
def test_the_requirements_keep_a_pytorch_that_is_there(there):
    assert CODE["torch"].specifier.contains(there)
    assert not CODE["torch"].specifier.contains("2.8.0"), "it has no torch.optim.Muon"


@pytest.mark.parametrize("build", ["2.13.0", "2.13.0+cpu", "2.13.0+cu126"])
def test_the_constraints_keep_every_build_of_their_pytorch(build):
    """Otherwise the next pip command would undo `TORCH=cpu` and the commands of docs/training.md."""
    assert PINS["torch"].specifier.contains(build)


def test_python_3_10_is_left_what_it_can_install():
    """numpy and others of the constraints need Python 3.11."""
    old = {**default_environment(), "python_version": "3.10", "python_full_version": "3.10.13"}
    free = {name for name, pin in PINS.items() if pin.marker and not pin.marker.evaluate(old)}
    assert "numpy" in free and "torch" not in free


MAKE_ENV = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "TORCH")}


def installs(*arguments: str) -> list[str]:
    """The pip calls of `make -n demo`, with no environment yet."""
    command = ["make", "-n", "-B", "demo", *arguments]
    made = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True, env=MAKE_ENV).stdout
    return [line.split("constraints.txt ")[1].strip() for line in made.splitlines() if "pip install" in line]


@needs_make
@pytest.mark.parametrize("build", ["cpu", "cu126"])
def test_make_takes_the_build_that_is_asked_for_and_no_other(build):
    assert installs(f"TORCH={build}") == [f"--no-deps torch --index-url {INDEX}/{build}", "-r requirements.txt"]


def without_a_driver() -> bool:
    files = (
        "/proc/driver/nvidia/version",
        "/dev/nvidiactl",
        "/usr/lib/wsl/lib/libcuda.so.1",
        "/usr/lib/wsl/drivers/nv*",
    )
    return platform.system() == "Linux" and not any(map(glob, files))


@needs_make
def test_make_without_a_driver_prefers_the_build_for_cpus():
    if not without_a_driver():
        pytest.skip("needs Linux without an NVIDIA driver")
    first, second = installs()
    assert first.startswith(f"--no-deps torch --extra-index-url {INDEX}/cpu ")  # extra: it may be unreachable
    assert second == "-r requirements.txt"


@needs_make
def test_make_with_a_driver_takes_the_ordinary_build():
    assert installs("DRIVER=/dev/nvidiactl") == ["-r requirements.txt"]


@needs_make
@pytest.mark.parametrize(
    "file, builds",
    [
        ("lib/libcuda.so.1", ["ordinary"]),
        ("drivers/nvmdi.inf_amd64_f55c/libcuda.so.1.1", ["ordinary"]),  # in a container
        ("lib/libdxcore.so", ["CPU", "ordinary"]),  # a card of another maker
    ],
)
def test_make_knows_a_driver_in_wsl(file, builds, tmp_path):
    if not without_a_driver():
        pytest.skip("needs Linux without an NVIDIA driver")
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    makefile = tmp_path / "Makefile"
    makefile.write_text((REPO / "Makefile").read_text().replace("/usr/lib/wsl", str(tmp_path)))
    assert len(installs("-f", str(makefile))) == len(builds)


def stand_in(path: Path, version: tuple[int, int]) -> None:
    """A Python that says it has this version, and makes no environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.version_info = {version}\n"
        "exec(sys.argv[2]) if sys.argv[1] == '-c' else sys.exit('called: ' + ' '.join(sys.argv[1:]))\n"
    )
    path.chmod(0o755)


def makes(folder: Path, *arguments: str) -> str:
    """What `make .venv/installed` prints before it fails, in a folder that is not the repository."""
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        shutil.copy(REPO / name, folder)
    command = ["make", ".venv/installed", *arguments]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=MAKE_ENV)
    assert made.returncode
    return made.stdout + made.stderr


@needs_make
def test_make_sets_up_nothing_with_a_python_that_is_too_old(tmp_path):
    stand_in(tmp_path / "python3.9", (3, 9))
    stand_in(tmp_path / "python3.10", (3, 10))
    assert "python3.9 is not Python 3.10 or newer." in makes(tmp_path, "PYTHON=./python3.9")
    assert "called" not in makes(tmp_path, "PYTHON=./python3.9")
    assert "python3 is not Python 3.10 or newer." in makes(tmp_path, "PYTHON=./no-such-python3")
    assert "called: -m venv .venv" in makes(tmp_path, "PYTHON=./python3.10")


@needs_make
def test_make_says_what_to_do_with_an_environment_of_an_old_python(tmp_path):
    stand_in(tmp_path / ".venv/bin/python", (3, 9))
    printed = makes(tmp_path, f"PYTHON={sys.executable}")
    assert "Delete .venv first: make clean" in printed and "called" not in printed
