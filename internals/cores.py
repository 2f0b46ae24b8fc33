"""The processor's cores that a command may use."""

import contextlib
import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # Linux's control groups, as a container sees its own
QUOTA_FILES = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # of version 2 and of version 1


def count_cores() -> int:
    """Cores that this process may use. With `docker --cpus 1.5` on a machine of 64 cores: 2."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return min(cores, max(1, math.ceil(quota))) if quota else cores


def cpu_quota() -> float | None:
    """The limit of a container, in seconds of CPU time per second; None without one."""
    for files in QUOTA_FILES:
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in files).split())
            return quota / period if quota > 0 else None
    return None
