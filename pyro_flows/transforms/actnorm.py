"""Learnable location and scale of each feature: y = loc + exp(log_scale) x.

In place of batch normalisation, whose density would depend on the other rows of a batch: the scale and location are
set once, on request, from data.  Glow (Kingma, Dhariwal 2018, arXiv:1807.03039, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import FlowTransform


class ActNorm(FlowTransform):
    """An affine map of each feature, the identity at the start.

    Args:
        input_dim: The number D of features.

    Example::

        >>> import torch
        >>> norm = ActNorm(1)
        >>> norm.initialize(torch.tensor([[2.0], [6.0]]))
        >>> norm.inverse_and_log_det(torch.tensor([[2.0], [6.0]]))[0].flatten().tolist()
        [-1.0, 1.0]
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__((input_dim,))
        self.input_dim = input_dim
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))

    @torch.no_grad()
    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Set location and scale so that the data ``(*batch, D)`` go back to mean 0 and standard deviation 1.

        A constant feature keeps the scale 1.
        """
        rows = y.reshape(-1, self.input_dim)
        scale = rows.std(0, correction=0)
        self.loc.copy_(rows.mean(0))
        self.log_scale.copy_(torch.where(scale > 0, scale, 1.0).log())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = torch.addcmul(self.loc, x, self.log_scale.exp())
        return y, self.log_scale.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = (y - self.loc) * torch.exp(-self.log_scale)
        return x, -self.log_scale.sum().expand(y.shape[:-1])
