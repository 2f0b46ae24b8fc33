"""Device and precision of a command, the speed of known GPUs, and why PyTorch cannot use a card."""

import contextlib
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from internals import cpu_kernels
from internals.cores import count_cores
from internals.start import UserError, first_line

# Dense 16-bit matrix rate in FLOP/s with 32-bit accumulation, as training computes, from NVIDIA's data sheets and
# architecture papers, by PyTorch's name for the card. With 16-bit accumulation, GeForce cards are twice as fast.
# Where those give none for a GeForce card, it is cores x boost clock x 4 FLOP (RTX 3060, 4060, 4070): the ratio of the
# others of the RTX 30 and 40 series. MFU is shown for these GPUs only.
PEAK_FLOPS = {
    "NVIDIA GeForce RTX 2070": 29.9e12,
    "NVIDIA GeForce RTX 2080": 40.3e12,
    "NVIDIA GeForce RTX 2080 Ti": 53.8e12,
    "NVIDIA GeForce RTX 3060": 25.5e12,
    "NVIDIA GeForce RTX 3070": 40.6e12,
    "NVIDIA GeForce RTX 3080": 59.5e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 3090 Ti": 80e12,
    "NVIDIA GeForce RTX 4060": 30.2e12,
    "NVIDIA GeForce RTX 4070": 58.3e12,
    "NVIDIA GeForce RTX 4070 Ti": 80.2e12,
    "NVIDIA GeForce RTX 4080": 97.5e12,
    "NVIDIA GeForce RTX 4080 SUPER": 104.4e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5080": 112.6e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA RTX 6000 Ada Generation": 364.2e12,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla T4": 65e12,
    "Tesla V100-PCIE-16GB": 112e12,
    "Tesla V100-PCIE-32GB": 112e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
}


class Build(NamedTuple):
    """One of PyTorch's builds with CUDA."""

    driver: int  # the first part of the version of the oldest driver that it runs with
    cuda: int  # the CUDA version that such a driver reports: 12080 for 12.8
    card: tuple[int, int]  # the lowest compute capability that it has kernels for
    name: str  # in the address of PyTorch's package index


BUILDS = (
    Build(580, 13000, (7, 5), "cu130"),
    Build(570, 12080, (7, 5), "cu128"),
    Build(525, 12000, (5, 0), "cu126"),
)
UPDATE_DRIVER = "update the driver (nvidia.com/drivers)"
CUDA_CONTEXT = 400 * 2**20  # approximate bytes of a card that CUDA itself takes in every process


class Obstacle(NamedTuple):
    """Why PyTorch cannot compute on an NVIDIA card here."""

    found: str  # what is wrong with PyTorch, the driver or the card
    advice: str  # what to do
    driver: bool  # a driver is installed, so there should be a card


def resolve_device(name: str) -> torch.device:
    """The device for `--device`. Raises UserError if this machine, or this PyTorch, has no such device."""
    obstacle = cuda_obstacle() if name in ("auto", "cuda") else None
    if name == "cuda" and obstacle:
        raise UserError(f"--device cuda: {obstacle.found}; {obstacle.advice}")
    mps = torch.backends.mps.is_available()
    if name == "mps" and not mps:
        raise UserError(f"--device mps: PyTorch {torch.__version__} finds no such device; use --device auto")
    if name == "auto":
        name = "cuda" if not obstacle else "mps" if mps else "cpu"
    return torch.device(name)


def device_notice(name: str, device: torch.device) -> str:
    """One line if `--device auto` fell back to the CPU although there should be a card, or if this PyTorch is known to
    compute wrongly on the device; else empty."""
    if device.type == "mps" and torch.__version__ < (2, 14):
        # pytorch#193487: on M1 and M2, sums of 32,767 terms or more may be wrong, as over GPT-2's vocabulary
        found = f"PyTorch {torch.__version__} may compute attention or large products wrongly on Apple's GPUs"
        return f"{found}; pip install 'torch>=2.14'"
    obstacle = cuda_obstacle() if name == "auto" and device.type == "cpu" else None
    return f"GPU not used: {obstacle.found}; {obstacle.advice}" if obstacle and obstacle.driver else ""


def limit_threads(most: int | None = None) -> None:
    """Limit PyTorch to `most` CPU threads; None: to one for each core that it may use. Does nothing if the user or torchrun
    has chosen a number."""
    most = most or count_cores()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > most:
        torch.set_num_threads(most)


# ----------------------------------------------------------------------------------------------------------------------
# Why PyTorch cannot use a card


def cuda_obstacle() -> Obstacle | None:
    """Why PyTorch cannot compute on this machine's NVIDIA cards. None: it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's long warnings on the same subject
        if torch.cuda.is_available():
            return missing_kernels()
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
            return explain(first_line(error))
    return explain("it gives no reason")


def explain(complaint: str) -> Obstacle:
    """What PyTorch's complaint on starting CUDA means on this machine, and what to do."""
    pytorch, driver, hidden = f"PyTorch {torch.__version__}", installed_driver(), os.environ.get("CUDA_VISIBLE_DEVICES")
    get_driver = "for an NVIDIA card, install its driver (nvidia.com/drivers)"
    if "not compiled with CUDA" in complaint:
        if not driver:
            found = f"{pytorch} is a build without CUDA, and there is no NVIDIA driver"
            return Obstacle(found, f"{get_driver} and a build with CUDA: {install(BUILDS[0].name)}", False)
        version = re.search(r"driver (\d+)", driver)
        build = newest_build(lambda build: not version or int(version[1]) >= build.driver)
        return Obstacle(f"{pytorch} is a build without CUDA, but there is {driver}", build, True)
    if torch.version.cuda:
        pytorch += f", built for CUDA {torch.version.cuda},"
    if too_old := re.search(r"too old \(found version (\d+)\)", complaint):
        cuda = int(too_old[1])
        found = (
            f"{pytorch} needs a newer NVIDIA driver than this one, which is for CUDA {cuda // 1000}.{cuda % 1000 // 10}"
        )
        build = newest_build(lambda build: cuda >= build.cuda)
        return Obstacle(found, f"{UPDATE_DRIVER}, or {build}" if build != UPDATE_DRIVER else build, True)
    if "no NVIDIA driver" in complaint:
        if not driver:
            return Obstacle(f"{pytorch} finds no NVIDIA driver", get_driver, False)
        advice = "in a container, start it with --gpus all; elsewhere, reinstall the driver"
        return Obstacle(f"{pytorch} cannot reach {driver}", advice, True)
    if hidden is not None and "No CUDA GPUs" in complaint:
        advice = "unset it, or give it the number of a card (0 is the first)"
        return Obstacle(f"CUDA_VISIBLE_DEVICES={hidden!r} hides the cards from PyTorch", advice, True)
    found = f"{pytorch} cannot start on a card ({complaint})"
    if "Error 804" in complaint:  # the forward compatibility of data centre cards, on another card
        container = "in a container, remove its own libcuda (often /usr/local/cuda/compat) from LD_LIBRARY_PATH"
        return Obstacle(found, f"{container}, or update the host's driver; elsewhere restart the machine", True)
    if "Error 802" in complaint:  # several H100s or the like behind an NVSwitch
        advice = "wait a minute; if it stays, start nvidia-fabricmanager, or ask the machine's owner to"
        return Obstacle(found, advice, True)
    tool = "rocm-smi" if torch.version.hip else "nvidia-smi"
    reload = " (after a suspend this may do: sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm)"
    restart = "restart the machine" + ("" if torch.version.hip else reload)
    advice = f"{restart}; if {tool} does not list the card then, reinstall the driver"
    return Obstacle(found, advice, True)


def missing_kernels() -> Obstacle | None:
    """The card that this run would use but PyTorch was not compiled for, if there is one."""
    archs, count = torch.cuda.get_arch_list(), torch.cuda.device_count()
    if torch.version.cuda is None or not archs:  # AMD's cards go by other names
        return None
    capabilities = [torch.cuda.get_device_capability(card) for card in range(count)]
    usable = [has_kernels(capability, archs) for capability in capabilities]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes take a card each
    if all(usable[:processes]):
        return None
    card = usable.index(False)
    capability = capabilities[card]
    known = sorted(divmod(int(number), 10) for number in re.findall(r"\d+", " ".join(archs)))
    found = (
        f"PyTorch {torch.__version__} has no kernels for GPU {card}, {torch.cuda.get_device_name(card)} (compute "
        f"capability {capability[0]}.{capability[1]}; it has them from {known[0][0]}.{known[0][1]} to "
        f"{known[-1][0]}.{known[-1][1]})"
    )
    if any(usable):
        other = usable.index(True)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        advice = f"CUDA_VISIBLE_DEVICES={visible[other]} takes the {torch.cuda.get_device_name(other)}"
    elif capability > known[-1]:
        advice = f"take a newer build: {install('cu128' if capability[0] <= 12 else 'cu130')}"
    elif capability >= (5, 0):
        advice = f"take a build that has kernels for it: {install('cu126')}"
    else:
        advice = "it is too old for the PyTorch that this project needs; use --device cpu"
    return Obstacle(found, advice, True)


def has_kernels(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether a build for `archs` runs on a card. Machine code (sm_80) runs on cards of the same generation from its own
    minor version on (8.6), PTX (compute_80) is compiled for any later card. `sm_90a` is for 9.0 alone."""
    for kind, number, suffix in re.findall(r"(sm|compute)_(\d+)([a-z]?)", " ".join(archs)):
        arch = divmod(int(number), 10)
        exact, same_generation = capability == arch, capability[0] == arch[0] and capability >= arch
        if exact or (suffix != "a" and (same_generation or (kind == "compute" and capability >= arch))):
            return True
    return False


def installed_driver() -> str:
    """The card and driver by nvidia-smi: "NVIDIA GeForce RTX 4090, driver 550.54.14". Empty without a driver."""
    if nvidia_smi := shutil.which("nvidia-smi"):
        query = [nvidia_smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "an NVIDIA driver that does not answer"
        first = (answer.stdout.strip() or answer.stderr.strip() or "nothing").splitlines()[0]
        if answer.returncode:
            return f"an NVIDIA driver that fails (nvidia-smi: {first})"
        name, _, version = first.rpartition(", ")
        return f"{name}, driver {version}"
    return "an NVIDIA driver" if Path("/proc/driver/nvidia/version").exists() else ""


def newest_card() -> tuple[int, int]:
    """The highest compute capability among the cards, by nvidia-smi: (8, 9). If it does not say, higher than any."""
    if nvidia_smi := shutil.which("nvidia-smi"):
        query = [nvidia_smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
            if found := re.findall(r"^(\d+)\.(\d+)\b", answer.stdout, re.M):
                return max((int(major), int(minor)) for major, minor in found)
    return 99, 0


def newest_build(driver_runs: Callable[[Build], bool]) -> str:
    """The command to install the newest build for the driver and the card; if there is none, to update the driver."""
    card = newest_card()
    fitting = [build for build in BUILDS if driver_runs(build) and card >= build.card]
    return install(fitting[0].name) if fitting else UPDATE_DRIVER


def install(build: str) -> str:
    """Without torch's dependencies: PyTorch's index has other versions of them than the commands need."""
    index = f"https://download.pytorch.org/whl/{build}"
    return f"pip install --force-reinstall --no-deps torch --index-url {index}, then pip install -r requirements.txt"


def held_by_others(share: float) -> str:
    """A sentence on the other processes on this process's card if they hold more than `share` of its memory; else empty."""
    if not torch.cuda.is_initialized():
        return ""
    name = torch.cuda.get_device_name()
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # CUDA itself finds no room
        return f"other processes hold all memory of the {name}: nvidia-smi shows them"
    others = total - free - torch.cuda.memory_reserved() - CUDA_CONTEXT
    if others <= share * total:
        return ""
    return (
        f"other processes hold about {others / 2**30:.1f} of the {total / 2**30:.1f} GiB of the {name}: nvidia-smi shows "
        "them; end them, or choose another card with CUDA_VISIBLE_DEVICES"
    )


def attention_of_any_length() -> contextlib.AbstractContextManager:
    """Keeps PyTorch from using cuDNN's attention, which it prefers on an H100, H200 or B200: cuDNN makes a plan for each
    new length of the cache, and 64 plans took an H200 3 s (docs/experiments.md). Training, with one length, keeps it."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


# ----------------------------------------------------------------------------------------------------------------------
# Precision


def resolve_dtype(name: str, device: torch.device, generating: bool = False) -> tuple[torch.dtype, str]:
    """The dtype for `--dtype` on a device, and the reason for it.

    `auto` follows from the hardware alone, so that the same command always computes the same numbers. What counts on a
    CPU is the speed of large matrix products in training, and the speed of reading a matrix in generating.

    Raises:
        UserError: float16 on a CPU, except for generating on x86.
    """
    if name != "auto":
        reads_float16 = generating and cpu_kernels.has_float16_products()
        if name == "float16" and device.type == "cpu" and not reads_float16:
            words = "CPUs gain nothing from it, and most are many times slower; use bfloat16 or float32"
            raise UserError(f"--dtype float16: {words}")
        wrong = "; in it some versions of PyTorch let tokens attend to later ones on Apple's GPUs (pytorch#195910)"
        doubtful = device.type == "mps" and name != "float32"
        return getattr(torch, name), "as requested" + (wrong if doubtful else "")
    if device.type == "cuda":
        # is_bf16_supported() also says yes to GPUs that only emulate it: ask for the hardware's generation.
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"supported by compute capability {major}.{minor}"
        return torch.float16, f"compute capability {major}.{minor} has no bfloat16"
    if device.type == "cpu":
        cpu = cpu_kernels.capabilities()
        # Not float16, though reading is fastest in it: packing its matrices takes longer than a short text gains.
        # Without AMX, Intel's vector instructions for bfloat16 speed up large products, but not reading (not measured).
        if cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and (cpu_kernels.is_amd() or not generating)):
            return torch.bfloat16, "this CPU has instructions for it"
        return torch.float32, "this CPU is not known to be faster in bfloat16"
    return torch.float32, "the safe choice on this device"
