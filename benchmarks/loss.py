"""Time and memory of the output head and its loss, forward and backward: model.py's chunks against the plain way.

    python benchmarks/loss.py                              the default model's head on 4,096 tokens
    python benchmarks/loss.py --vocab-size 257 --n-embd 128 --repeats 50

All ways take turns; figures are medians. Memory is the rise of the peak (of the GPU, or of the process) above what was
in use before. To see it, freed memory goes back to the system, as it does not in train.py (`keep_freed_memory`), so times
on a CPU include page faults that train.py is spared.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common  # noqa: F401  (puts the root on the path, so it comes first)
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

import model
from config import ModelConfig
from internals.device import resolve_device
from internals.start import run


@dataclass(frozen=True)
class Loss:
    rows: int = 4096  # tokens
    n_embd: int = 384
    vocab_size: int = 50257
    logits_at_once: tuple[int, ...] = (2**24, 2**25, 2**26, 2**27)  # chunk sizes to try
    repeats: int = 5
    device: str = "cpu"  # cpu or cuda
    compile: bool = False  # both ways through torch.compile


def plain(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """All logits at once, padded columns at probability 0."""
    padding = torch.zeros(len(weight), device=x.device)
    padding[vocab_size:] = -torch.inf
    return F.cross_entropy(F.linear(x, weight, padding).float(), targets)


def peak_mib(device: str, reset: bool = False) -> float:
    """Peak memory since the last reset: of tensors on a GPU, of the whole process on a CPU (Linux)."""
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(
    chunk: int | None,
    loss_function: Callable,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    vocab: int,
) -> tuple[float, float]:
    """Seconds and MiB of one forward and backward pass, with `chunk` logits at once."""
    device = x.device.type
    model.LOGITS_AT_ONCE = model.LOGITS_AT_ONCE_COMPILED = chunk
    x.grad = weight.grad = None
    before = peak_mib(device, reset=True)
    begin = time.perf_counter()
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        loss = loss_function(x, weight, targets, vocab)
    loss.backward()
    after = peak_mib(device)  # waits for a GPU
    return time.perf_counter() - begin, after - before


def main() -> None:
    args = tyro.cli(Loss, description=__doc__)
    resolve_device(args.device)  # raises if there is none
    torch.manual_seed(0)
    padded = ModelConfig(vocab_size=args.vocab_size).padded_vocab_size
    x = torch.randn(args.rows, args.n_embd).to(args.device).requires_grad_()
    weight = (torch.randn(padded, args.n_embd) * 0.05).to(args.device).requires_grad_()
    targets = torch.randint(args.vocab_size, (args.rows,)).to(args.device)
    ways = [("plain", None, plain), *((f"{n:,}", n, model.linear_cross_entropy) for n in args.logits_at_once)]
    if args.compile:  # anew for each chunk size and dtype
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # the default is to continue without compiling
        ways = [(name, n, torch.compile(function)) for name, n, function in ways]
    print(
        f"{args.rows:,} tokens, {args.n_embd} dimensions, {args.vocab_size:,} tokens in the vocabulary, {args.device}"
    )
    print(f"{'dtype':10}{'logits at once':>16}{'ms':>10}{'of plain':>10}{'MiB':>8}{'of plain':>10}")
    for dtype in (torch.bfloat16, torch.float32):
        torch.compiler.reset()  # a function is compiled at most 8 times
        arguments = (x, weight, targets, dtype, args.vocab_size)
        for _, *way in ways:
            measure(*way, *arguments)  # to warm up
        rounds = [[measure(*way, *arguments) for _, *way in ways] for _ in range(args.repeats)]
        figures = [[statistics.median(one[n][what] for one in rounds) for what in (0, 1)] for n in range(len(ways))]
        for (name, *_), (seconds, mib) in zip(ways, figures, strict=True):
            ratios = seconds / figures[0][0], mib / max(figures[0][1], 1)
            print(f"{str(dtype)[6:]:10}{name:>16}{seconds * 1e3:10.1f}{ratios[0]:10.2f}{mib:8.0f}{ratios[1]:10.2f}")


if __name__ == "__main__":
    run(main)
