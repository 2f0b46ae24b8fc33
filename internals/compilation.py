"""Compile the model for the training loop."""

import logging
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import TrainConfig
from internals.machine import Machine
from internals.memory import is_out_of_memory
from internals.start import first_line, is_failed_card
from model import GPT


def training_model(model: GPT, cfg: TrainConfig, machine: Machine) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """The model for the iterations, compiled if `--compile` says so, and `on` or `off` (with a reason if it failed).

    `model` itself does not change: evaluating, sampling and saving use it. The compiled one is tried in a forward and a
    backward pass. If that fails in any process, the run loses only the speed-up.
    """
    if cfg.compile == "off" or (cfg.compile == "auto" and machine.device.type != "cuda"):
        return model, "off"
    lacks_bfloat16 = machine.device.type == "cuda" and torch.cuda.get_device_capability(machine.device)[0] < 8
    if machine.dtype == torch.bfloat16 and lacks_bfloat16:  # Inductor would warn, and leave the model as it is
        return model, "off, because this card only emulates bfloat16; --dtype auto takes float16"
    machine.print("Compiling the model: the first time this may take a minute")
    # Inductor warns on cards of fewer than 68 multiprocessors (RTX 3060, T4) about a mode that nobody asked for
    logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)
    compiled: Any = model
    reason = ""
    try:
        compiled = torch.compile(model, dynamic=False)  # refuses a Python that is too new for it
        batch_size = cfg.micro_batch_size(machine.processes)
        # In the layout of a real batch: another one would be compiled again
        inputs, targets = machine.to_device(np.zeros((batch_size, cfg.model.block_size + 1), dtype=np.int64))
        with machine.autocast():
            loss = compiled(inputs, targets)
        loss.backward()
    except Exception as error:  # the many parts of a compiler have no common base class for their errors
        if is_failed_card(error):
            raise
        if not is_out_of_memory(error):  # that happens again in the iterations, where MicroBatch handles it
            reason = compile_problem(error)
    model.zero_grad()
    failed = machine.gather(torch.tensor([bool(reason)])).any().item()
    return (model, f"off, because compiling failed ({reason or 'in another process'})") if failed else (compiled, "on")


def compile_problem(error: Exception) -> str:
    """Why compiling failed, in a line, and what to install if a part of the compiler is missing.

    Inductor generates C++ for a CPU and, through Triton, machine code for a GPU. Both call the system's C compiler.
    """
    text = str(error)
    said = next((line for line in text.splitlines() if "fatal error" in line), first_line(error))
    reason = f"{type(error).__name__}: {textwrap.shorten(said, 160)}"
    if "failed to map segment" in text:  # /tmp is mounted noexec
        reason += "; set TORCHINDUCTOR_CACHE_DIR to a folder on a disk from which programs may run"
    elif re.search(r"C(\+\+)? compiler|No such file|Command '\['\S*(gcc|clang)", text):
        headers = f"python3.{sys.version_info.minor}-dev"
        reason += f"; it needs a C compiler and Python's headers (Ubuntu: sudo apt install build-essential {headers})"
    elif re.search(r"Compiler: .+ is not found", text):  # Inductor on Windows
        reason += "; it needs Visual Studio's Build Tools: run train.py in their x64 Native Tools Command Prompt"
    elif "working triton installation" in text:
        reason += "; it needs triton: pip install triton, on Windows triton-windows"
    return reason
