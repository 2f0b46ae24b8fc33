"""Muon where torch.optim.Muon is slow: on a GPU, which wants few large products, and without bfloat16."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class StackedMuon(torch.optim.Muon):
    """torch.optim.Muon in 146 launches a step instead of 588 (default model). The state is the same.

    torch.optim.Muon takes the matrices one by one, which keeps a GPU waiting for the next small product. Here those of
    one shape are a stack, and each product of the Newton-Schulz iteration is one batched product for all of them. In
    bfloat16 the results have the same bits if the batched product rounds as the single one does: on a CPU, with the
    default model's shapes, it did in every trial.

    torch.optim.Muon always computes these products in bfloat16. Here they are in `dtype`, since without instructions
    for bfloat16 a CPU takes 20 times as long as in float32 (docs/experiments.md).
    """

    def __init__(self, params: list[dict[str, Any]], dtype: torch.dtype = torch.bfloat16, **settings: Any):
        super().__init__(params, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            stacks = defaultdict(list)  # shape -> its parameters
            for parameter in group["params"]:
                if parameter.grad is not None:
                    stacks[parameter.shape].append(parameter)
            for shape, parameters in stacks.items():
                update = orthogonalise(self._momentum(parameters, group).to(self.dtype), group)
                # The update's root mean square is then at most about 0.2 lr (less where the momentum has a low rank)
                step_size = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, update.float().contiguous().unbind(), alpha=-step_size)

    def _momentum(self, parameters: list[Tensor], group: dict[str, Any]) -> Tensor:
        """Update the momentum with the gradients. Returns Nesterov's look-ahead, (matrices, rows, columns)."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradients = [parameter.grad for parameter in parameters]
        momentum = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(momentum, gradients, 1 - group["momentum"])
        return torch.stack(torch._foreach_lerp(gradients, momentum, group["momentum"]))


def orthogonalise(matrices: Tensor, group: dict[str, Any]) -> Tensor:
    """Roughly the nearest (matrices, rows, columns) with orthogonal rows or columns: Newton-Schulz in their dtype."""
    a, b, c = group["ns_coefficients"]
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices  # the products are smaller with few rows
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])  # no singular value above 1
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
