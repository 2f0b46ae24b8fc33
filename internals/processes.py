"""Several processes as one run: this process's place among those that torchrun started."""

import importlib
import os

import torch
import torch.distributed as dist

from internals.start import UserError


def place_among_processes() -> tuple[int, int]:
    """(rank, number of processes), as torchrun tells them by the environment; (0, 1) without torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in os.environ]
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(given):
        return 0, 1
    missing = [name for name in names if name not in given]
    numbers = [os.environ.get(name, "") for name in names[:3]]
    if missing or not all(number.isdecimal() for number in numbers):
        raise UserError(
            f"the environment has {' '.join(f'{name}={os.environ[name]}' for name in given)}"
            + (f", but no {' and no '.join(missing)}" if missing else "")
            + "; start several processes with torchrun, or unset these for one"
        )
    return int(numbers[0]), int(numbers[1])


def join_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun started. Returns this process's own device."""
    if device.type == "mps":
        raise UserError("--device mps: several processes need cuda or cpu")
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc-per-node: process {local_rank + 1} of this machine finds no GPU of its own, there "
                f"are {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # The functions of this module have the process group as a default argument from the moment of import. PyTorch
    # imports it later by itself. The group would then live as long as the module, and so would the group's threads,
    # which may abort the process while Python goes down. Imported before there is a group, it holds none.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def is_lost_process(error: RuntimeError) -> bool:
    """NCCL and the store have exceptions of their own for it. Gloo raises a RuntimeError that names its source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
