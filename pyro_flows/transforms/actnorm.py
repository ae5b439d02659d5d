"""Learnable location and scale of each feature: y = loc + exp(log_scale) x.

In place of batch normalisation, whose density would depend on the other rows of a batch: the scale and location are
set once, on request, from data.  Glow (Kingma, Dhariwal 2018, arXiv:1807.03039, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..arguments import as_flags
from .base import VectorTransform


class ActNorm(VectorTransform):
    """An affine map of each feature of a vector ``(*batch, D)``, the identity at the start::

        y = loc + exp(log_scale) x,    log|det dy/dx| = Σ_i log_scale_i

    It stands in place of batch normalisation: data set it once, by :meth:`initialize`, and training does the rest.

    Glow: Generative Flow with Invertible 1×1 Convolutions (Kingma, Dhariwal 2018, arXiv:1807.03039, section 3.1).

    Args:
        input_dim: The number D of features.
        fixed: For each feature, whether it is left as it is; by default none is.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``fixed`` does not hold D values.

    Example::

        >>> import torch
        >>> norm = ActNorm(1)
        >>> norm.initialize(torch.tensor([[2.0], [6.0]]))
        >>> norm.inverse_and_log_det(torch.tensor([[2.0], [6.0]]))[0].flatten().tolist()
        [-1.0, 1.0]
    """

    free: Tensor | None

    def __init__(self, input_dim: int, *, fixed: Sequence[bool] | Tensor | None = None) -> None:
        super().__init__(input_dim)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))
        free = None if fixed is None else 1.0 - as_flags("ActNorm", "fixed", fixed, input_dim).float()
        self.register_buffer("free", free)

    @property
    def fixed(self) -> list[bool] | None:
        """For each feature, whether it is left as it is; None where none is."""
        return None if self.free is None else (self.free == 0).tolist()

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
        loc, log_scale = self._loc_and_log_scale()
        return torch.addcmul(loc, x, log_scale.exp()), log_scale.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, log_scale = self._loc_and_log_scale()
        return (y - loc) * torch.exp(-log_scale), -log_scale.sum().expand(y.shape[:-1])

    def _loc_and_log_scale(self) -> tuple[Tensor, Tensor]:
        if self.free is None:
            return self.loc, self.log_scale
        return self.loc * self.free, self.log_scale * self.free
