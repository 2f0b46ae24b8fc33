"""The learning rate and the optimizer."""

import math
from typing import Any

import torch

from config import TrainConfig
from model import GPT


def get_lr(it: int, cfg: TrainConfig) -> float:
    """The learning rate of iteration `it`: linear warm-up from near zero to `learning_rate`, then a cosine down to
    `min_lr` at `max_iters` (Loshchilov and Hutter, 2017; as GPT-3 and nanoGPT use it)."""
    if it < cfg.warmup:
        return cfg.learning_rate * (it + 1) / (cfg.warmup + 1)
    progress = (it - cfg.warmup) / (cfg.max_iters - cfg.warmup)  # 0 to 1
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


class OneOptimizer(torch.optim.Optimizer):
    """Several optimizers, each of parameters of its own, as one: their groups and states side by side."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let each optimizer work on this one's groups and state, which loading replaces."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def make_optimizer(model: GPT, cfg: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Muon (Jordan et al., 2024) for the matrices in the blocks, its steps scaled to the size of AdamW's (Liu et al.,
    2025), and AdamW (Loshchilov and Hutter, 2019) for the rest, or for all. Weight decay is on matrices only: biases and
    norms have no size to limit. A group's learning rate is `get_lr`'s times its `lr_scale`."""
    muon = [p for p in model.transformer.h.parameters() if p.dim() == 2 and cfg.optimizer == "muon"]
    others = [p for p in model.parameters() if all(p is not q for q in muon)]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": cfg.weight_decay, "lr_scale": 1.0},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=device.type in ("cuda", "cpu")
    )
    if not muon:
        return adamw
    group = {"params": muon, "lr_scale": cfg.muon_lr_scale}
    return OneOptimizer(adamw, torch.optim.Muon([group], weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
