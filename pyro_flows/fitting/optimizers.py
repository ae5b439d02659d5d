"""What takes the steps: Muon for the weight matrices of a flow's networks, Adam for all else.

Muon (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982) replaces the momentum of a matrix by the nearest matrix
with orthonormal rows or columns, so that all directions of a layer learn at one pace, those with small gradients too:
in funnels of many dimensions this halves what is lost in the same time.  In few dimensions Adam (Kingma, Ba 2014,
arXiv:1412.6980) costs less and leaves lighter tails of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..guides import AutoFlow

FEW = 32  # up to how many latents Adam trains all


def matrices(guide: Any) -> list[Tensor]:
    """The weight matrices that Muon trains, those of a flow over many latents; circular splines keep to Adam."""
    if not isinstance(guide, AutoFlow) or guide.has_circles or guide.latent_dim <= FEW:
        return []
    return [layer.weight for layer in guide.flow.modules() if isinstance(layer, nn.Linear)]


def optimizers(parameters: list[Tensor], lr: float, matrices: list[Tensor]) -> list[torch.optim.Optimizer]:
    """Optimizers that together train all parameters."""
    special = {id(matrix) for matrix in matrices}
    by_muon = [parameter for parameter in parameters if id(parameter) in special]
    by_adam = [parameter for parameter in parameters if id(parameter) not in special]
    found: list[torch.optim.Optimizer] = []
    if by_adam:
        found.append(torch.optim.Adam(by_adam, lr=lr, foreach=True))
    if by_muon:
        found.append(torch.optim.Muon(by_muon, lr=lr, weight_decay=0.0))
    return found
