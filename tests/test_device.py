"""Which device and which precision a command gets on which machine."""

import os

import pytest
import torch

from internals import cpu_kernels, device
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
    with pytest.raises(UserError, match="--dtype float16: CPUs are"):
        device.resolve_dtype("float16", cpu)
    assert device.resolve_dtype("bfloat16", cpu) == (torch.bfloat16, "as asked")


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs Linux's own description of the processor")
def test_an_older_pytorch_tells_the_same_processors_apart(monkeypatch):
    cpu_kernels.capabilities.cache_clear()
    newer = [device.resolve_dtype("auto", torch.device("cpu"), generating=generating) for generating in (False, True)]
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    cpu_kernels.capabilities.cache_clear()
    older = [device.resolve_dtype("auto", torch.device("cpu"), generating=generating) for generating in (False, True)]
    cpu_kernels.capabilities.cache_clear()
    assert older == newer


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.resolve_device("auto") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name}: PyTorch .* finds none here"):
            device.resolve_device(name)
