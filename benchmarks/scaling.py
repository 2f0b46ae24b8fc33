"""Tokens/s of training on several GPUs, calculated from sizes and rates. Nothing is measured here.

    python benchmarks/scaling.py

docs/training.md has the table and the formulas.
"""

import common  # noqa: F401  (puts the root on the path, so it comes first)
import torch
import tyro
from torch import Tensor

from config import TrainConfig
from internals.cli import with_preset
from model import GPT

TOKENS_PER_SECOND = 330_000  # of the default model on one RTX 4090, calculated from the kernels of an H200
BANDWIDTH = {"NVLink": 200e9, "PCIe": 10e9, "Ethernet": 1.25e9}  # bytes/s in and out of a card, assumed
CARDS = (1, 2, 8, 64)


def muon_flop(matrix: Tensor) -> int:
    """Five Newton-Schulz steps of three products: X times its transpose, the square of that, and both times X."""
    small, large = sorted(matrix.shape)
    return 5 * (2 * small**2 * large + 2 * small**3 + 2 * small**2 * large)


def rows(preset: str, flops: float) -> list[str]:
    """Rows of the table. `flops` is the FLOP/s that one card reaches."""
    cfg = with_preset(TrainConfig, preset)
    with torch.device("meta"):
        model = GPT(cfg.model)
    named = [(name, p) for name, p in model.transformer.h.named_parameters() if p.dim() == 2]
    matrices = [matrix for name, p in named for matrix in p.chunk(3 if "c_attn" in name else 1)]
    gradients = 4 * sum(p.numel() for p in model.parameters())
    iteration = cfg.tokens_per_iter * model.flops_per_token() / flops
    muon = sum(map(muon_flop, matrices)) / flops
    print(f"{preset}: {gradients:,} bytes of gradients; Muon {sum(map(muon_flop, matrices)) / 1e9:,.0f} GFLOP")
    print(f"one card: {1e3 * iteration:,.0f} ms an iteration, of it Muon {1e3 * muon:.1f} ms")
    table = []
    for link, bandwidth in BANDWIDTH.items():
        exchanges, speeds, shares, gains = [], [], [], []
        for cards in CARDS:
            others = (cards - 1) / cards
            exchange = 2 * others * gradients / bandwidth
            seconds = (iteration - muon) / cards + muon + exchange
            saved = others * (muon - 2 * sum(p.numel() for p in matrices) / bandwidth)
            exchanges.append(f"{1e3 * exchange:,.0f} ms")
            speeds.append(f"{round(cfg.tokens_per_iter / seconds, -3):,.0f}")
            shares.append(f"{muon / seconds:.0%}")
            gains.append(f"{seconds / (seconds - saved) - 1:+.0%}")
        cells = [preset, link, exchanges[2], *speeds, ", ".join(shares[2:]), ", ".join(gains[2:])]
        table.append(f"| {' | '.join(cells)} |")
    return table


def main() -> None:
    with torch.device("meta"):
        default = GPT(TrainConfig().model)
    for preset in ("wikipedia", "wikipedia-150m"):
        print(*rows(preset, TOKENS_PER_SECOND * default.flops_per_token()), sep="\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
