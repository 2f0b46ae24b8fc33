"""A tiny model with the interface of nanoGPT's model.py, which is not part of this project, and a run of its size."""

from pathlib import Path

SHAPE = (
    "--device cpu --dtype float32 --n-layer 1 --n-head 2 --n-embd 16 --n-inner 32 --block-size 16 --batch-size 4 "
    "--tokens-per-iter 64 --max-iters 6 --eval-tokens 256"
)

NANOGPT = """
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
"""


def write_nanogpt(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.py").write_text(NANOGPT)
    return folder
