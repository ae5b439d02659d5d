"""Muon: steps of matrices whose singular values are one.

Muon (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982) replaces the momentum of a matrix by the nearest matrix
with orthonormal rows or columns, so that all directions of a layer learn at one pace, those with small gradients too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """The steps of ``torch.optim.Muon`` (torch 2.9 and newer) without weight decay, on stacks of matrices of one shape.

    Flows have many small matrices.  The settings are those of torch: the same momentum, coefficients and steps.
    """

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        settings = {"lr": lr, "momentum": 0.95, "ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5}
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                direction = gradient.lerp(momentum, group["momentum"])
                alike.setdefault(parameter.shape, []).append((parameter, direction))
            for (rows, columns), pairs in alike.items():
                parameters, directions = zip(*pairs, strict=True)
                moves = _orthonormal(torch.stack(directions), group["ns_coefficients"], group["ns_steps"])
                for parameter, move in zip(parameters, moves, strict=True):
                    parameter.add_(move, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def _orthonormal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Matrices ``(N, rows, columns)`` with their singular values brought to about one, by Newton-Schulz steps."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).float()  # an approximation anyway
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
