"""Translation: y = x + t.

NICE: Non-linear Independent Components Estimation (Dinh, Krueger, Bengio 2014, arXiv:1410.8516).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Bijector


@dataclass(frozen=True)
class Shift(Bijector):
    """The map of NICE, a translation y = x + t, with one parameter t and log-determinant zero.

    NICE: Non-linear Independent Components Estimation (Dinh, Krueger, Bengio 2014, arXiv:1410.8516).

    Example::

        >>> import torch
        >>> y, log_det = Shift().forward_and_log_det(torch.tensor(1.0), torch.tensor([0.5]))
        >>> y.item(), log_det.item()
        (1.5, 0.0)
    """

    num_params = 1

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y = x + params[..., 0]
        return y, torch.zeros_like(y)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = y - params[..., 0]
        return x, torch.zeros_like(x)
