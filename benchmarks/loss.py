"""The output head and its loss, forward and backward: model.py's chunked way against the plain way, time and memory.

    python benchmarks/loss.py                              the default model's head on 4,096 tokens
    python benchmarks/loss.py --vocab-size 257 --n-embd 128 --repeats 50

Interleaved, medians; memory is how far the process's peak rises above what it held before.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from config import ModelConfig


@dataclass(frozen=True)
class Loss:
    rows: int = 4096  # tokens
    n_embd: int = 384
    vocab_size: int = 50257
    logits_at_once: tuple[int, ...] = (2**24, 2**25, 2**26, 2**27)  # chunk sizes to try
    repeats: int = 5


def plain(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """All logits at once, padded columns at probability 0."""
    padding = torch.zeros(len(weight))
    padding[vocab_size:] = -torch.inf
    return F.cross_entropy(F.linear(x, weight, padding).float(), targets)


def peak_mib(reset: bool = False) -> float:
    """Largest resident size of this process since it was last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(chunk: int | None, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, vocab_size: int):
    """Seconds and MiB of one forward and backward pass; `chunk` None is the plain way."""
    x.grad = weight.grad = None
    before = peak_mib(reset=True)
    begin = time.perf_counter()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        if chunk is None:
            loss = plain(x, weight, targets, vocab_size)
        else:
            model.LOGITS_AT_ONCE["cpu"] = chunk
            loss = model.linear_cross_entropy(x, weight, targets, vocab_size)
    loss.backward()
    return time.perf_counter() - begin, peak_mib() - before


def main() -> None:
    args = tyro.cli(Loss, description=__doc__)
    torch.manual_seed(0)
    padded = ModelConfig(vocab_size=args.vocab_size).padded_vocab_size
    x = torch.randn(args.rows, args.n_embd).requires_grad_()
    weight = (torch.randn(padded, args.n_embd) * 0.05).requires_grad_()
    targets = torch.randint(args.vocab_size, (args.rows,))
    ways = [None, *args.logits_at_once]
    print(f"{args.rows:,} tokens, {args.n_embd} dimensions, {args.vocab_size:,} tokens in the vocabulary")
    print(f"{'dtype':10}{'logits at once':>16}{'ms':>10}{'of plain':>10}{'MiB':>8}{'of plain':>10}")
    for dtype in (torch.bfloat16, torch.float32):
        for way in ways:
            measure(way, x, weight, targets, dtype, args.vocab_size)  # to warm up
        runs = [[measure(way, x, weight, targets, dtype, args.vocab_size) for way in ways] for _ in range(args.repeats)]
        figures = [[statistics.median(run[n][what] for run in runs) for what in (0, 1)] for n in range(len(ways))]
        for way, (seconds, mib) in zip(ways, figures, strict=True):
            name = "plain" if way is None else f"2^{way.bit_length() - 1}"
            ratios = seconds / figures[0][0], mib / max(figures[0][1], 1)
            print(f"{str(dtype)[6:]:10}{name:>16}{seconds * 1e3:10.1f}{ratios[0]:10.2f}{mib:8.0f}{ratios[1]:10.2f}")


if __name__ == "__main__":
    main()
