"""Installing: requirements and constraints agree, an installed PyTorch stays, and make takes the build that fits."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from glob import glob
from importlib import metadata
from pathlib import Path

import pytest
from conftest import REPO
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

INDEX = "https://download.pytorch.org/whl"
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def requirements(file: str, system: str = "linux", python: str = "3.11") -> dict[str, Requirement]:
    """What a file asks for on this system, with this Python, by name."""
    machine = {**default_environment(), "sys_platform": system, "python_version": python}
    lines = [line.split("#")[0].strip() for line in (REPO / file).read_text().splitlines()]
    asked = [Requirement(line) for line in lines if line and not line.startswith("-r ")]
    found = [requirement for requirement in asked if not requirement.marker or requirement.marker.evaluate(machine)]
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
    pins = requirements("constraints.txt", python="3.10")
    assert "numpy" not in pins and "torch" in pins


def test_what_is_pinned_for_python_3_10_runs_there():
    pins = requirements("constraints.txt", python="3.10")
    for package in metadata.distributions():
        pin = pins.get(canonicalize_name(package.name))
        if pin and pin.specifier.contains(package.version):
            needs = SpecifierSet(package.metadata["Requires-Python"] or "")
            assert needs.contains("3.10.13"), f'constraints.txt: {pin} needs ; python_version >= "3.11"'


def test_macos_gets_a_pytorch_that_computes_rightly_on_apples_gpus():
    assert requirements("constraints.txt", "darwin")["torch"].specifier.contains("2.14.1")  # see device_notice
    assert requirements("constraints.txt", "win32")["torch"] == PINS["torch"]


def test_the_makefile_knows_which_python_this_pytorch_has_builds_for():
    assert pinned("torch").startswith("2.13."), "a new PyTorch: look at Python's upper limit in the Makefile"


MAKE_ENV = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "TORCH")}


def installs(*arguments: str) -> list[str]:
    """The pip calls of `make -n demo`, with no environment yet."""
    command = ["make", "-n", "-B", "demo", *arguments]
    made = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True, env=MAKE_ENV).stdout
    calls = [line.split("pip install ")[1] for line in made.splitlines() if "pip install " in line]
    assert all("--no-user" in call for call in calls)  # a user's setting; pip refuses it in an environment
    return [call.split("constraints.txt ")[1].strip() for call in calls]


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
        f"#!/bin/sh\nexec {shlex.quote(sys.executable)} - \"$@\" <<'END'\nimport sys\nsys.version_info = {version}\n"
        "exec(sys.argv[2]) if sys.argv[1] == '-c' else sys.exit('called: ' + ' '.join(sys.argv[1:]))\nEND\n"
    )
    path.chmod(0o755)


def makes(folder: Path, *arguments: str) -> str:
    """What `make .venv/installed` says on stderr before it fails, in a folder that is not the repository."""
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        shutil.copy(REPO / name, folder)
    command = ["make", ".venv/installed", *arguments]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=MAKE_ENV)
    assert made.returncode
    return made.stderr


@needs_make
def test_make_sets_up_nothing_with_a_python_that_does_not_fit(tmp_path):
    for minor in (9, 10, 14, 15):
        stand_in(tmp_path / f"python3.{minor}", (3, minor))
    for name in ("python3.9", "python3.15", "no-such-python3"):
        printed = makes(tmp_path, f"PYTHON=./{name}")
        assert f"{name} is not Python 3.10 to 3.14. Name one" in printed and "called" not in printed
    for name in ("python3.10", "python3.14"):
        printed = makes(tmp_path, f"PYTHON=./{name}")
        assert "called: -m venv .venv" in printed and f"sudo apt install {name}-venv." in printed


@needs_make
@pytest.mark.parametrize("version", [(3, 9), (3, 12), (3, 15)])
def test_make_says_what_to_do_with_an_environment_that_does_not_fit(tmp_path, version):
    """Python 3.12 would, but the one here has no pip."""
    stand_in(tmp_path / ".venv/bin/python", version)
    printed = makes(tmp_path, f"PYTHON={sys.executable}")
    assert "delete .venv first: make clean" in printed and "called: -m venv" not in printed


@needs_make
def test_make_says_what_to_do_with_a_venv_that_is_no_folder(tmp_path):
    (tmp_path / ".venv").touch()
    assert "If .venv is there already, delete it: make clean" in makes(tmp_path, f"PYTHON={sys.executable}")
    assert (tmp_path / ".venv").is_file()


@needs_make
def test_make_keeps_an_environment_of_windows(tmp_path):
    (tmp_path / ".venv/Scripts").mkdir(parents=True)
    assert ".venv was made on Windows: rename or delete it first" in makes(tmp_path, f"PYTHON={sys.executable}")
    assert list((tmp_path / ".venv").iterdir()) == [tmp_path / ".venv/Scripts"]
