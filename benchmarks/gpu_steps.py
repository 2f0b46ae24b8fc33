"""What gpu.py measures in a process of its own: the rate of matrix products, and a step of the optimizer."""

import dataclasses
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import seconds  # which puts the root on the path, so it comes first
from torch.utils.flop_counter import FlopCounterMode

from config import TrainConfig
from internals.cli import with_preset
from internals.optimizer import make_optimizer
from model import GPT


def matrix_rate(device: str, size: int) -> float:
    """FLOP/s of a square bf16 matrix product, best of several."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 5 * 2 * size**3 / min(seconds(lambda: [a @ a for _ in range(5)], device) for _ in range(10))


def make_step(device: str, preset: str, name: str, small: bool) -> Callable[[], None]:
    """The step of an optimizer. Its model has random gradients."""
    cfg = dataclasses.replace(with_preset(TrainConfig, preset), optimizer=name)
    model = GPT(dataclasses.replace(cfg.model, n_layer=1) if small else cfg.model).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return make_optimizer(model, cfg, torch.device(device), torch.bfloat16).step


def step_time(device: str, preset: str, name: str, small: bool) -> dict[str, float]:
    step = make_step(device, preset, name, small)
    step()
    taken = [seconds(step, device) for _ in range(3 if small else 30)]
    with FlopCounterMode(display=False) as flops:
        step()
    return {"seconds": statistics.median(taken), "flops": flops.get_total_flops()}


def step_launches(preset: str, name: str) -> int:
    step = make_step("cuda", preset, name, small=False)
    step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return launches(profile.key_averages())


def launches(calls: Sequence[Any]) -> int:
    """How many kernels were started, and copies and fills, which take as long to start. `calls` are the profiler's
    counts of CUDA's functions: each has a `key` (the name) and a `count`."""
    count = sum(call.count for call in calls if re.match("cu(da)?(LaunchKernel|Memcpy|Memset)", call.key))
    if not count:
        raise RuntimeError("the profiler saw no launches")
    return count
