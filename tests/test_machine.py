"""How a training process takes its memory from the system."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import REPO
from runs import tiny

from internals.machine import make_machine

FAULTS = """
import resource, sys
import torch
from config import TrainConfig
from internals.machine import make_machine
make_machine(TrainConfig(device="cpu"))
def iteration():
    return [torch.ones(2**21) for _ in range(4)]  # 32 MiB, freed afterwards
iteration()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    iteration()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**environment: str) -> int:
    """How often Linux had to find memory for 20 iterations."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=REPO, env=clean | environment, capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_unless_the_user_says_otherwise():
    """Otherwise each iteration would get its tensors from the system anew, page by page."""
    ours, users = page_faults(), page_faults(MALLOC_MMAP_THRESHOLD_="131072")  # glibc's default, which then stays
    assert ours < users / 20


def test_float32_products_use_tensor_cores(data_dir, tmp_path):
    torch.set_float32_matmul_precision("highest")
    make_machine(tiny(data_dir, tmp_path))
    assert torch.get_float32_matmul_precision() == "high"
