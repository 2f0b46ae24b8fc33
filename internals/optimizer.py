"""The learning-rate schedule, and Muon and AdamW as one optimizer."""

import math
from typing import Any

import torch

from config import TrainConfig
from internals.muon import Muon


def get_lr(it: int, cfg: TrainConfig) -> float:
    """The learning rate of iteration `it`: linear warm-up from near zero to `learning_rate`, then a cosine down to
    `min_lr` at `max_iters` (Loshchilov and Hutter, 2017; as GPT-3 and nanoGPT use it)."""
    if it < cfg.warmup:
        return cfg.learning_rate * (it + 1) / (cfg.warmup + 1)
    progress = (it - cfg.warmup) / (cfg.max_iters - cfg.warmup)  # 0 to 1
    return cfg.final_lr + (cfg.learning_rate - cfg.final_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def make_optimizer(
    model: torch.nn.Module, cfg: TrainConfig, device: torch.device, dtype: torch.dtype
) -> torch.optim.Optimizer:
    """Muon for the matrices in the blocks, AdamW for the rest; or AdamW for all (`--optimizer adamw`).

    Muon is Jordan et al., 2024, its steps scaled to the size of AdamW's (Liu et al., 2025). AdamW is Loshchilov and
    Hutter, 2019. Only matrices decay, as in nanoGPT. The learning rate of a parameter group is `get_lr` times the group's
    `lr_scale`. Muon's matrix products are in bfloat16 if the model's are (`dtype`), else in float32: hardware without
    bfloat16 emulates it very slowly or refuses.
    """
    muon = [p for p in model.transformer.h.parameters() if p.dim() == 2 and cfg.optimizer == "muon"]
    others = [p for p in model.parameters() if p not in set(muon)]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": cfg.weight_decay, "lr_scale": 1.0},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    fused = device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=fused)
    if not muon:
        return adamw
    group = {"params": muon, "lr_scale": cfg.muon_lr_scale, "weight_decay": cfg.weight_decay}
    in_three = [block.attn.c_attn.weight for block in model.transformer.h]
    dtype = dtype if dtype == torch.bfloat16 else torch.float32
    return JoinedOptimizer(adamw, Muon([group], in_three, dtype, cfg.muon_momentum))


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The size of what exists from the first step on: AdamW's two moments and step number (4 bytes) for each parameter,
    Muon's one moment."""
    return sum(
        2 * parameter.nbytes + 4 if "betas" in group else parameter.nbytes
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one, which has the parameter groups and the state of all."""

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
