"""Which device and which precision a command computes with, and what is known of GPUs."""

import torch

from internals import cpu_kernels
from internals.start import UserError

# Dense 16-bit matrix rate in FLOP/s with 32-bit accumulation, from NVIDIA's data sheets, by the name PyTorch gives.
# MFU is shown for these GPUs and no other.
PEAK_FLOPS = {
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla T4": 65e12,
}


def resolve_device(name: str) -> torch.device:
    """The device for `--device`. Raises UserError if this machine, or this PyTorch, has no such device."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch {torch.__version__} finds none here; take --device auto")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device, generating: bool = False) -> tuple[torch.dtype, str]:
    """The dtype for `--dtype` on a device, and the reason for it.

    `auto` follows from the hardware alone, so that the same command always computes the same numbers. What counts on a
    CPU is the speed of large matrix products in training, and the speed of reading a matrix in generating.

    Raises:
        UserError: float16 on a CPU, which is a hundred times slower than float32.
    """
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            raise UserError("--dtype float16: CPUs are a hundred times slower in it; take bfloat16 or float32")
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        # is_bf16_supported() also says yes to GPUs that only emulate it: ask for the hardware's generation.
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor} has it"
        return torch.float16, f"compute capability {major}.{minor} has no bfloat16"
    if device.type == "cpu":
        cpu = cpu_kernels.capabilities()
        # Without AMX, Intel's vector instructions for bfloat16 speed up large products, but not reading (not measured).
        if cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and (cpu_kernels.is_amd() or not generating)):
            return torch.bfloat16, "this CPU has instructions for it"
        return torch.float32, "this CPU is not known to be faster in bfloat16"
    return torch.float32, "the safe choice on this device"
