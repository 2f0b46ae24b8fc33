"""Which device and which precision a command gets on which machine."""

import dataclasses
import functools
import os
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_script
from runs import tiny
from torch.overrides import TorchFunctionMode

import train
from config import TrainConfig
from internals import cores, cpu_kernels, device, machine
from internals.memory import is_out_of_memory
from internals.start import UserError


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_auto_dtype_on_a_gpu_goes_by_its_generation(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # as a T4 answers
    assert device.resolve_dtype("auto", torch.device("cuda"))[0] == dtype


@pytest.mark.parametrize(
    "processor, training, generating",
    [
        ({"cpu_name": "AMD EPYC 9R14", "avx512_bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"cpu_name": "AMD Ryzen 7 5800X", "avx512_bf16": False}, torch.float32, torch.float32),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16, torch.float32),
        ({"architecture": "arm64"}, torch.float32, torch.float32),
    ],
)
def test_auto_dtype_on_a_cpu_follows_from_its_instructions(monkeypatch, processor, training, generating):
    monkeypatch.setattr(cpu_kernels, "capabilities", lambda: processor)
    cpu = torch.device("cpu")
    assert device.resolve_dtype("auto", cpu)[0] == training
    assert device.resolve_dtype("auto", cpu, generating=True)[0] == generating
    with pytest.raises(UserError, match="--dtype float16: CPUs gain nothing from it, and most are many times slower;"):
        device.resolve_dtype("float16", cpu)
    assert device.resolve_dtype("bfloat16", cpu) == (torch.bfloat16, "as requested")


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs /proc/cpuinfo")
def test_an_older_pytorch_tells_the_same_processors_apart(monkeypatch):
    cpu_kernels.capabilities.cache_clear()
    newer = [device.resolve_dtype("auto", torch.device("cpu"), generating=generating) for generating in (False, True)]
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    cpu_kernels.capabilities.cache_clear()
    older = [device.resolve_dtype("auto", torch.device("cpu"), generating=generating) for generating in (False, True)]
    cpu_kernels.capabilities.cache_clear()
    assert older == newer


CPU_BUILD = "Torch not compiled with CUDA enabled"
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version {}). Please update your GPU driver"
CARD = "NVIDIA GeForce RTX 4090, driver {}"


def hide_cards(monkeypatch, complaint: str, driver: str = "") -> None:
    """A machine on which CUDA does not start."""

    def init():
        raise AssertionError(complaint) if complaint == CPU_BUILD else RuntimeError(complaint)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(device, "installed_driver", lambda: driver)
    monkeypatch.setattr(device, "newest_card", lambda: (8, 9))


@pytest.mark.parametrize(
    "complaint, driver, words",
    [
        (CPU_BUILD, CARD.format("580.65"), ["build without CUDA, but there is NVIDIA GeForce RTX 4090", "whl/cu130"]),
        (CPU_BUILD, CARD.format("570.86"), ["--no-deps torch", "whl/cu128, then pip install -r requirements.txt"]),
        (CPU_BUILD, CARD.format("550.54.14"), ["build without CUDA", "driver 550.54.14", "whl/cu126"]),
        (CPU_BUILD, CARD.format("470.1"), ["build without CUDA", "; update the driver (nvidia.com/drivers)"]),
        (OLD_DRIVER.format(12040), "", ["CUDA 12.4; update the driver (nvidia.com/drivers), or pip", "whl/cu126"]),
        (OLD_DRIVER.format(12080), "", ["is for CUDA 12.8", "whl/cu128"]),
        (OLD_DRIVER.format(11070), "", ["is for CUDA 11.7; update the driver (nvidia.com/drivers)"]),
        (NO_DRIVER, "an NVIDIA driver", ["cannot reach an NVIDIA driver", "--gpus all"]),
        ("Error 804: forward compatibility was attempted on non supported HW", "", ["libcuda", "the host's driver"]),
        ("Error 802: system not yet initialized", "", ["(Error 802: system", "start nvidia-fabricmanager"]),
        ("CUDA unknown error - this may be due", "", ["(CUDA unknown error", "nvidia-smi", "(after a suspend"]),
    ],
)
def test_a_card_that_pytorch_cannot_use_is_one_line(monkeypatch, complaint, driver, words):
    hide_cards(monkeypatch, complaint, driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cpu = device.resolve_device("auto")
    assert cpu == torch.device("cpu")
    line = device.device_notice("auto", cpu)
    assert line.startswith("GPU not used: PyTorch ") and "\n" not in line
    for word in words:
        assert word in line
    assert ("pip install" in line) == any("whl" in word for word in words)
    assert device.device_notice("cpu", cpu) == ""  # the user asked for the CPU
    with pytest.raises(UserError) as error:
        device.resolve_device("cuda")
    assert str(error.value) == line.replace("GPU not used", "--device cuda")


@pytest.mark.parametrize("complaint", [CPU_BUILD, NO_DRIVER])
def test_a_machine_without_a_card_is_told_only_when_it_asks(monkeypatch, complaint):
    hide_cards(monkeypatch, complaint)
    assert device.device_notice("auto", device.resolve_device("auto")) == ""
    with pytest.raises(UserError, match=r"--device cuda: PyTorch .*for an NVIDIA card, install its driver"):
        device.resolve_device("cuda")
    with pytest.raises(UserError, match=r"--device mps: PyTorch .* finds no such device"):
        device.resolve_device("mps")


def test_auto_takes_apples_gpu_and_float32_there(monkeypatch):
    hide_cards(monkeypatch, CPU_BUILD)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    mps = device.resolve_device("auto")
    assert mps == torch.device("mps") and device.resolve_dtype("auto", mps)[0] == torch.float32


def test_hidden_cards(monkeypatch):
    hide_cards(monkeypatch, "No CUDA GPUs are available")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES='7' hides the cards from PyTorch; unset it"):
        device.resolve_device("cuda")


@pytest.mark.parametrize(
    "capability, archs, runs",
    [
        ((8, 9), "sm_75 sm_80 sm_86 sm_90", True),
        ((8, 0), "sm_75 sm_86", False),  # code for a later card of the same generation
        ((6, 1), "sm_75 sm_80", False),
        ((6, 1), "sm_50 sm_60 sm_70", True),
        ((7, 0), "sm_60 sm_75", False),
        ((12, 0), "sm_80 sm_90", False),
        ((12, 0), "sm_80 sm_90 compute_90", True),
        ((9, 0), "sm_90a", True),
        ((10, 0), "sm_90a compute_90a", False),
        ((12, 1), "sm_100 sm_120", True),
    ],
)
def test_which_cards_a_build_has_kernels_for(capability, archs, runs):
    assert device.has_kernels(capability, archs.split()) == runs


def put_cards(monkeypatch, *cards: tuple[str, tuple[int, int]]) -> None:
    """A machine with these cards, by name and compute capability, and a PyTorch build for 7.5 to 12.0."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: cards[card][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: cards[card][1])


OLD, NEW, FUTURE = ("NVIDIA GeForce GTX 1080 Ti", (6, 1)), ("NVIDIA GeForce RTX 4090", (8, 9)), ("NVIDIA X", (13, 0))


@pytest.mark.parametrize(
    "cards, visible, words",
    [
        (
            [OLD],
            None,
            ["GPU 0, NVIDIA GeForce GTX 1080 Ti (compute capability 6.1; it has them from 7.5 to 12.0)", "cu126"],
        ),
        ([OLD, NEW], None, ["GPU 0, NVIDIA GeForce GTX", "; CUDA_VISIBLE_DEVICES=1 takes the NVIDIA GeForce RTX 4090"]),
        ([OLD, NEW], "3,5", ["; CUDA_VISIBLE_DEVICES=5 takes the NVIDIA GeForce RTX 4090"]),
        ([("NVIDIA Tesla K80", (3, 7))], None, ["too old for the PyTorch that this project needs; use --device cpu"]),
        ([FUTURE], None, ["take a newer build: pip install", "whl/cu130"]),
    ],
)
def test_a_card_without_kernels_counts_as_none(monkeypatch, cards, visible, words):
    put_cards(monkeypatch, *cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.resolve_device("auto").type != "cuda"
    with pytest.raises(UserError, match=r"--device cuda: PyTorch .* has no kernels for GPU 0") as error:
        device.resolve_device("cuda")
    for word in words:
        assert word in str(error.value)


def test_only_the_cards_that_the_processes_take_need_kernels(monkeypatch):
    put_cards(monkeypatch, NEW, OLD)
    assert device.resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="no kernels for GPU 1, NVIDIA GeForce GTX 1080 Ti"):
        device.resolve_device("cuda")


def put_nvidia_smi(monkeypatch, folder, script: str) -> None:
    """A machine whose nvidia-smi is this script."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


no_shell_scripts = pytest.mark.skipif(os.name == "nt", reason="needs a shell script as nvidia-smi")


@no_shell_scripts
@pytest.mark.parametrize(
    "script, answer",
    [
        ("echo 'NVIDIA L4, 580.65.06'; echo 'NVIDIA L4, 580.65.06'", "NVIDIA L4, driver 580.65.06"),
        ("echo 'Driver/library version mismatch'; exit 18", "an NVIDIA driver that fails (nvidia-smi: Driver/library"),
    ],
)
def test_what_the_driver_says(monkeypatch, tmp_path, script, answer):
    put_nvidia_smi(monkeypatch, tmp_path / "bin", script)
    assert device.installed_driver().startswith(answer)


@no_shell_scripts
@pytest.mark.parametrize(
    "script, build",
    [
        ("echo 6.1", "cu126"),  # driver 580 is the last for a GTX 1080 Ti, but CUDA 13 has no kernels for it
        ("echo 6.1; echo 8.9", "cu130"),
        ("echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2", "cu130"),
    ],
)
def test_the_build_that_is_advised_has_kernels_for_the_card(monkeypatch, tmp_path, script, build):
    put_nvidia_smi(monkeypatch, tmp_path / "bin", script)
    monkeypatch.setattr(device, "installed_driver", lambda: CARD.format("580.65"))
    assert f"whl/{build}" in device.explain(CPU_BUILD).advice


def test_a_driver_that_does_not_answer_and_one_without_nvidia_smi(monkeypatch):
    def hang(*args, **options):
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(device.subprocess, "run", hang)
    monkeypatch.setattr(device.shutil, "which", lambda name: name)
    assert device.installed_driver() == "an NVIDIA driver that does not answer"
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    for loaded, answer in ((True, "an NVIDIA driver"), (False, "")):
        monkeypatch.setattr(device, "Path", lambda path, loaded=loaded: SimpleNamespace(exists=lambda: loaded))
        assert device.installed_driver() == answer


def test_a_card_that_others_fill(monkeypatch):
    assert device.held_by_others(0) == ""  # this process uses no card
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 6 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib, 24 * gib))
    assert device.held_by_others(0.75) == ""  # 24 - 1 free - 6 of our own = 17
    assert "other processes hold about 16.6 of the 24.0 GiB of the NVIDIA L4" in device.held_by_others(0.5)

    def full():
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    assert device.held_by_others(0.9) == "other processes hold all memory of the NVIDIA L4: nvidia-smi shows them"


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Storage size calculation overflowed with sizes=[4000000000000000000, 128]",  # --n-inner 4e18, on any device
    ],
)
def test_what_the_libraries_of_a_full_card_say(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"))


@no_shell_scripts
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's card can be used")
def test_the_commands_say_in_a_line_that_a_card_is_not_used(data_dir, tmp_path, monkeypatch, capsys):
    put_nvidia_smi(monkeypatch, tmp_path / "bin", "echo 'NVIDIA L4, 580.65.06'")
    monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: False))  # PyTorch 2.15 unwraps it
    run = tiny(data_dir, tmp_path / "run", device="auto", max_iters=2)
    with pytest.raises(UserError, match=r"--device auto: no GPU.*NVIDIA L4, driver 580.65.06.*To train on this CPU"):
        train.train(dataclasses.replace(run, max_iters=10**10))
    assert not (tmp_path / "run").exists()
    line = "GPU not used: PyTorch "
    for mode in ("check", "overwrite", "eval_only"):
        train.train(dataclasses.replace(run, **{mode: True}))
        assert capsys.readouterr().out.count(line) == 1
    generated = run_script("generate.py", "--checkpoint", tmp_path / "run", "--max-new-tokens", 1)
    assert generated.returncode == 0 and generated.stderr.count(line) == 1, generated.stderr


@pytest.mark.parametrize(("version", "told"), [("2.12.1", True), ("2.13.0", True), ("2.14.0", False)])
def test_a_pytorch_that_computes_wrongly_on_apples_gpus_is_one_line(monkeypatch, version, told):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    line = device.device_notice("auto", torch.device("mps"))
    assert (f"PyTorch {version} may" in line and "torch>=2.14" in line) if told else line == ""


class Copies(TorchFunctionMode):
    """Inside, tensors stay where they are; `asynchronous` says of each copy whether it would have been."""

    def __init__(self):
        super().__init__()
        self.asynchronous = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.Tensor.to:
            return function(*args, **(kwargs or {}))
        self.asynchronous.append((kwargs or {}).get("non_blocking", False))
        return args[0]


def test_a_batch_is_on_apples_gpu_before_its_memory_is_freed():
    """An asynchronous copy might read the next batch, which gets the same memory."""
    mps = machine.Machine(torch.device("mps"), torch.float32, "", rank=0, processes=1)
    with Copies() as copies:
        mps.to_device(np.zeros((2, 5), dtype=np.int64))
    assert copies.asynchronous == [False]


@pytest.mark.parametrize(
    ("system", "release", "limits"),
    [
        ("Windows", "11", [0.75]),
        ("Linux", "5.15.167.4-microsoft-standard-WSL2", [0.75]),
        ("Linux", "6.8.0-45-generic", []),
    ],
)
def test_on_windows_pytorch_gets_no_more_than_the_card_has(monkeypatch, system, release, limits):
    seen = []

    def limit(share, device=None):
        torch.cuda._utils._get_device_index(
            device, optional=True
        )  # as PyTorch does: "cuda" without a number is refused
        seen.append(share)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(machine, "platform", SimpleNamespace(system=lambda: system, release=lambda: release))
    monkeypatch.setattr(machine, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(machine, "resolve_dtype", lambda name, device: (torch.bfloat16, ""))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (18 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    machine.make_machine(TrainConfig())
    assert seen == limits


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "9000000 100000"}, 64),
        ({"cpu.max": "max 100000", "user/cpu.max": "300000 100000", "user/job/cpu.max": "max 100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
    ],
)
@pytest.mark.parametrize("users", [None, "64"], ids=["ours", "the user's"])
def test_threads_are_as_many_as_a_container_may_use_cores(monkeypatch, tmp_path, files, expected, users):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text("0::/user/job\n")
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(cores, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    threads = [64]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if users:
        monkeypatch.setenv("OMP_NUM_THREADS", users)
    made = machine.make_machine(TrainConfig(device="cpu"))
    assert cores.count_cores() == expected
    assert made.name == f"cpu ({64 if users else expected} thread{'' if expected == 1 and not users else 's'})"


@pytest.mark.parametrize("name, warned", [("float16", True), ("bfloat16", True), ("float32", False)])
def test_sixteen_bits_on_apples_gpus_come_with_a_warning(name, warned):
    dtype, reason = device.resolve_dtype(name, torch.device("mps"))
    assert dtype == getattr(torch, name) and ("pytorch#195910" in reason) == warned
    assert device.resolve_dtype("bfloat16", torch.device("cpu"))[1] == "as requested"
