"""The processor's cores that a command may use."""

import contextlib
import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # Linux's control groups, as a container sees its own
OWN_CGROUP = Path("/proc/self/cgroup")
VERSION_1, VERSION_2 = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"), ("cpu.max",)


def count_cores() -> int:
    """Cores that this process may use. With `docker --cpus 1.5` on a machine of 64 cores: 2."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return min(cores, max(1, math.ceil(quota))) if quota else cores


def cpu_quota() -> float | None:
    """The limit of a container or a service, in seconds of CPU time per second; None without one."""
    quotas = []
    for folder, files in ((CGROUP, VERSION_1), *((folder, VERSION_2) for folder in own_groups())):
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            quota, period = map(int, " ".join((folder / name).read_text() for name in files).split())
            quotas += [quota / period] if quota > 0 else []
    return min(quotas, default=None)


def own_groups() -> list[Path]:
    """The folders of this process's control group of version 2, and of all groups above it. In a container it is CGROUP
    alone. A service has its own: JupyterHub can limit each user's."""
    own = CGROUP
    with contextlib.suppress(OSError):
        for line in OWN_CGROUP.read_text().splitlines():
            if line.startswith("0::/"):
                own = CGROUP / line.removeprefix("0::/")
    return [folder for folder in (own, *own.parents) if folder.is_relative_to(CGROUP)]
