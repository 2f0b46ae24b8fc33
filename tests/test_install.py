"""Installing: requirements and constraints agree, an installed PyTorch stays, and make takes the build that fits."""

import os
import platform
import shutil
import subprocess

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


def installs(*arguments: str) -> list[str]:
    """The pip calls of `make -n demo`, with no environment yet."""
    command = ["make", "-n", "-B", "demo", *arguments]
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "TORCH")}
    made = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True, env=env).stdout
    return [line.split("constraints.txt ")[1].strip() for line in made.splitlines() if "pip install" in line]


@needs_make
@pytest.mark.parametrize("build", ["cpu", "cu126"])
def test_make_takes_the_build_that_is_asked_for_and_no_other(build):
    assert installs(f"TORCH={build}") == [f"--no-deps torch --index-url {INDEX}/{build}", "-r requirements.txt"]


@needs_make
def test_make_without_a_driver_prefers_the_build_for_cpus():
    drivers = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
    if platform.system() != "Linux" or any(map(os.path.exists, drivers)):
        pytest.skip("needs Linux without an NVIDIA driver")
    first, second = installs()
    assert first.startswith(f"--no-deps torch --extra-index-url {INDEX}/cpu ")  # extra: it may be unreachable
    assert second == "-r requirements.txt"


@needs_make
def test_make_with_a_driver_takes_the_ordinary_build():
    assert installs("DRIVER=/dev/nvidiactl") == ["-r requirements.txt"]
