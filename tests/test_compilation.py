"""internals/compilation.py: a compiled run is the same; one whose compiler fails continues without it and says why."""

import logging
import subprocess
import sys

import pytest
import torch
from runs import assert_same_end, tiny

import train
from config import ModelConfig, TrainConfig
from internals import checkpoint
from internals.compilation import compile_problem, training_model
from internals.machine import Machine
from model import GPT

pytestmark = pytest.mark.usefixtures("quick")

COMPILER = f"Python's headers (Ubuntu: sudo apt install build-essential python3.{sys.version_info.minor}-dev)"


# Errors of Inductor and Triton, as seen with PyTorch 2.13 and 2.14
NO_COMPILER = "RuntimeError: Failed to find C compiler. Please specify via CC environment variable"
NO_CXX = "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')"
NO_CL = "InvalidCxxCompiler: Compiler: cl is not found."  # on Windows, as PyTorch's source has it
NO_HEADER = "header.hpp:9:10: fatal error: Python.h: No such file or directory"
NO_TRITON = "Cannot find a working triton installation. Either the package is not installed or it is too old."
PAGES = "\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace"


@pytest.mark.parametrize(
    "error, said, advice",
    [
        (RuntimeError(NO_COMPILER + PAGES), NO_COMPILER, COMPILER),
        (RuntimeError(NO_CXX + PAGES), NO_CXX, COMPILER),
        (RuntimeError(NO_CL + PAGES), NO_CL, "it needs Visual Studio's Build Tools"),
        (RuntimeError(f"C++ compile error\n\nCommand:\ng++ x\n\nOutput:\n{NO_HEADER}\n{PAGES}"), NO_HEADER, COMPILER),
        (
            subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]),
            "Command '['/usr/bin/gcc', 'main.c']'",
            COMPILER,
        ),
        (ValueError(NO_TRITON + PAGES), NO_TRITON, "it needs triton: pip install triton, on Windows triton-windows"),
        (KeyError("a bug"), "'a bug'", ""),
    ],
    ids=["C", "C++", "cl", "header", "gcc", "triton", "bug"],
)
def test_a_failed_compiler_is_named_with_what_to_install(error, said, advice):
    problem = compile_problem(error)
    assert problem.startswith(f"{type(error).__name__}: {said}") and "\n" not in problem
    assert advice in problem and ("; it needs" in problem) == bool(advice)


def test_a_card_without_bfloat16_gets_no_compiled_model_in_it(monkeypatch):
    """Inductor refuses such a model with a warning, and runs it uncompiled without an error."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch, "compile", lambda *args, **options: pytest.fail("it is compiled"))
    machine, model = Machine(torch.device("cuda"), torch.bfloat16, "", rank=0, processes=1), torch.nn.Linear(1, 1)
    forward, said = training_model(model, TrainConfig(), machine)
    assert forward is model and said.startswith("off, because this card only emulates bfloat16; --dtype auto")


@pytest.fixture
def compiled_where(monkeypatch):
    """A model, and a function that compiles it where torch.compile says this."""
    sizes = ModelConfig(n_layer=1, n_head=1, n_embd=16, n_inner=16, block_size=8, vocab_size=64)
    model, cpu = GPT(sizes), Machine(torch.device("cpu"), torch.float32, "", rank=0, processes=1)

    def compile_model(complaint: str):
        def refuse(*args, **options):
            raise RuntimeError(complaint)

        monkeypatch.setattr(torch, "compile", refuse)
        return training_model(model, TrainConfig(model=sizes, compile="on"), cpu)

    return model, compile_model


def test_a_run_does_without_a_compiler_that_does_not_know_this_python(compiled_where):
    """Unlike other failures, this one comes before the first forward pass."""
    model, compile_model = compiled_where
    forward, compiling = compile_model("torch.compile is not supported on Python 3.15+")
    assert forward is model
    assert compiling == "off, because compiling failed (RuntimeError: torch.compile is not supported on Python 3.15+)"


def test_a_disk_from_which_no_program_runs_is_named(compiled_where):
    complaint = "/tmp/torchinductor_ann/c7/main.so: failed to map segment from shared object"
    assert "set TORCHINDUCTOR_CACHE_DIR to a folder" in compiled_where[1](complaint)[1]


def test_a_card_that_fails_meanwhile_is_no_failure_of_the_compiler(compiled_where):
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        compiled_where[1]("CUDA error: unspecified launch failure")


def test_a_compiler_that_fails_costs_no_more_than_a_line(data_dir, tmp_path, monkeypatch, straight, capsys):
    def broken(*args, **kwargs):
        torch.rand(1)
        raise RuntimeError("no compiler\nof many lines")

    monkeypatch.setattr(torch, "compile", lambda model, **options: broken)
    train.train(tiny(data_dir, tmp_path, compile="on"))
    assert "compile    off, because compiling failed (RuntimeError: no compiler)\n" in capsys.readouterr().out
    assert_same_end(tmp_path, straight)


def test_a_compiled_model_is_the_same_run_and_saves_under_plain_names(
    data_dir, tmp_path, monkeypatch, straight, capsys
):
    compile = torch.compile  # only its front half runs: no compiler of machine code is needed
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compile(model, dynamic=dynamic, backend="eager"))
    train.train(tiny(data_dir, tmp_path, compile="on"))
    out = capsys.readouterr().out
    assert "compile    on\n" in out and out.count("Compiling the model: the first time this may take a minute\n") == 1
    # On cards of fewer than 68 multiprocessors Inductor warns about a mode that nobody asked for
    assert not logging.getLogger("torch._inductor.utils").isEnabledFor(logging.WARNING)
    assert_same_end(tmp_path, straight)
    assert all(name.startswith("transformer.") for name in checkpoint.load(tmp_path / "last.pt")["model"])
