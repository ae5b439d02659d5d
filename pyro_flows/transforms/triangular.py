"""A triangular affine map: y = t + exp(s) ∘ (L x), with L unit lower triangular and s = b tanh(a / b).

It takes N(0, I) to any N(t, Σ), with half as many numbers to train as a full matrix.  The scales stand in front: a step
of an optimiser moves each feature by a share of its own scale, however much those of the others differ.  In stochastic
gradient descent with one draw both matter: the loss stays above its minimum by what noise each trained number adds.
Automatic Differentiation Variational Inference (Kucukelbir et al. 2017, arXiv:1603.00788).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_integers, check_numbers
from .base import FlowTransform


class Triangular(FlowTransform):
    """A triangular matrix and a shift, of vectors ``(*batch, D)``, the identity at the start::

        y = t + exp(s) ∘ (L x),    log|det dy/dx| = Σ_i s_i,    s_i = b tanh(a_i / b)

    with L unit lower triangular.  Both directions cost O(D²) per vector, and no parameters make it singular.

    Args:
        input_dim: The number D of features.
        max_log_scale: The bound b on each log-scale, in nats.
        pace: How far a feature moves in a step of an optimiser: see :meth:`set_pace`.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``max_log_scale`` or ``pace`` not positive and finite.

    Example::

        >>> import torch
        >>> layer = Triangular(3)
        >>> layer.set_scale(2.0)
        >>> y, log_det = layer.forward_and_log_det(torch.ones(3))
        >>> round(y[0].item(), 4), round(log_det.item(), 4)  # nats: 3 log 2
        (2.0, 2.0794)
    """

    def __init__(self, input_dim: int, *, max_log_scale: float = 8.0, pace: float | None = None) -> None:
        check_integers("Triangular", input_dim=input_dim)
        super().__init__((input_dim,))
        check_numbers("Triangular", above=0, max_log_scale=max_log_scale)
        self.input_dim, self.max_log_scale = input_dim, max_log_scale
        self.factors = nn.Parameter(torch.zeros(input_dim, input_dim))  # L below the diagonal, a on it
        self.shift = nn.Parameter(torch.zeros(input_dim))
        self._unit = 1.0  # what L below the diagonal is stored in
        self.set_pace(pace)

    @torch.no_grad()
    def set_pace(self, pace: float | None) -> None:
        """Choose how far a feature moves in a step of an optimiser; the map stays as it is, bit for bit.

        Args:
            pace: For steps of Adam of size lr, L moves a feature by about ``pace * lr`` of its scale, whatever D; None
                for L as it is, where it moves by D times as much.
        """
        check_numbers("Triangular", above=0, optional=True, pace=pace)
        unit = 1.0 if pace is None else 2.0 ** round(math.log2(pace / self.input_dim))
        self.factors.copy_(self.factors.tril(-1) * (self._unit / unit) + self.factors.triu())
        self._unit, self.pace = unit, pace

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Become a multiple of the identity.

        Args:
            scale: The factor, whose logarithm lies within ``max_log_scale``.

        Raises:
            ValueError: If it does not, or the factor is not positive.
        """
        check_numbers("Triangular.set_scale", above=0, scale=scale)
        if not abs(math.log(scale)) < self.max_log_scale:
            raise ValueError(
                f"Triangular.set_scale: scale must have a logarithm within ±{self.max_log_scale}, got {scale}. Raise "
                "max_log_scale."
            )
        self.factors.copy_(
            torch.eye(self.input_dim) * (self.max_log_scale * math.atanh(math.log(scale) / self.max_log_scale))
        )

    def _below(self) -> Tensor:
        below = self.factors.tril(-1)
        return below if self._unit == 1.0 else self._unit * below

    def _log_scale(self) -> Tensor:
        return self.max_log_scale * torch.tanh(self.factors.diagonal() / self.max_log_scale)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale = self._log_scale()
        y = torch.addcmul(self.shift, x + F.linear(x, self._below()), log_scale.exp())
        return y, log_scale.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale = self._log_scale()
        columns = ((y - self.shift) * torch.exp(-log_scale)).reshape(-1, self.input_dim).T  # (D, N)
        x = torch.linalg.solve_triangular(self._below(), columns, upper=False, unitriangular=True)
        return x.T.reshape(y.shape), -log_scale.sum().expand(y.shape[:-1])
