"""Muon, for the matrices in the blocks."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """Muon (Jordan et al., 2024): SGD with Nesterov momentum whose steps are orthogonal matrices.

    The size of the steps follows Liu et al., 2025, so that AdamW's learning rates fit. The state is that of
    torch.optim.Muon, which does the same but for three things:

    - `c_attn.weight` is three matrices in one: those of queries, keys and values. Each is made orthogonal by itself, as
      Jordan advises. Otherwise the one with the largest gradients takes most of the step (docs/experiments.md).
    - Matrices of one shape are a stack, and each product of the Newton-Schulz iteration is one batched product for all
      of them. One by one, they keep a GPU waiting: 588 launches a step for the default model, here 109.
    - The products are in `dtype`, not always in bfloat16. Without instructions for bfloat16 a CPU takes 20 times as long
      for them as in float32.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        in_three: Iterable[Tensor] = (),
        dtype: torch.dtype = torch.bfloat16,
        momentum: float = 0.95,
    ):
        """
        Args:
            in_three: those of the parameters whose rows are three matrices of equal size.
            dtype: of the products.
            momentum: how much of the mean of gradients each step keeps.
        """
        # The name of Liu et al.'s step size in torch.optim.Muon; `step` has no other
        super().__init__(params, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self.in_three, self.dtype = set(in_three), dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            stacks = defaultdict(list)  # shape -> (weights, gradient, mean) of each matrix, views of the parameters
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
                whole = (parameter, parameter.grad, self.state[parameter]["momentum_buffer"])
                count = 3 if parameter in self.in_three else 1
                for matrix in zip(*(tensor.chunk(count) for tensor in whole), strict=True):
                    stacks[matrix[0].shape].append(matrix)
            for shape, matrices in stacks.items():
                weights, gradients, means = zip(*matrices, strict=True)
                torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
                look_ahead = torch._foreach_lerp(gradients, means, group["momentum"])  # Nesterov's
                update = orthogonalise(torch.stack(look_ahead).to(self.dtype), group)
                # The update's root mean square is then at most about 0.2 lr (less where the momentum has a low rank)
                step_size = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, update.float().contiguous().unbind(), alpha=-step_size)


def orthogonalise(matrices: Tensor, group: dict[str, Any]) -> Tensor:
    """The matrices, (matrices, rows, columns), with all singular values moved close to 1: Newton-Schulz iteration in their
    dtype. The result is roughly the nearest matrix with orthogonal rows or columns. `group` holds torch.optim.Muon's
    defaults: 5 steps, the coefficients 3.4445, -4.775 and 2.0315, eps 1e-7."""
    a, b, c = group["ns_coefficients"]
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices  # the products are smaller with few rows
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])  # no singular value above 1
    for _ in range(group["ns_steps"]):  # x <- a x + b (x x^T) x + c (x x^T)^2 x changes singular values, no directions
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
