"""A dense linear map with its scales in front: y = t + exp(s) ∘ (L U x), L unit lower and U unit upper triangular.

A step of an optimiser moves each feature by a share of its own scale, however much those of the others differ, and not
by more in many dimensions than in few.  In stochastic gradient descent with one draw both matter: the loss stays above
its minimum by what the noise of each trained number adds.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import check_numbers
from ..conditioners.base import Paced, power_of_2
from .base import Scored
from .linear import Factored


class ScaledLinear(Paced, Factored):
    """An invertible dense matrix and a shift, of vectors ``(*batch, D)``, the identity at the start::

        y = t + exp(s) ∘ (L U x),    log|det dy/dx| = Σ_i s_i,    s_i = b tanh(a_i / b)

    with L unit lower and U unit upper triangular.  Both directions cost O(D²) per vector, and no parameters make it
    singular.

    Args:
        input_dim: The number D of features.
        max_log_scale: The bound b on each log-scale, in nats.
        pace: How far a feature moves in a step of an optimiser: see :meth:`set_pace`.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``max_log_scale`` or ``pace`` not positive and finite.

    Example::

        >>> import torch
        >>> layer = ScaledLinear(3)
        >>> layer.set_scale(2.0)
        >>> y, log_det = layer.forward_and_log_det(torch.ones(3))
        >>> round(y[0].item(), 4), round(log_det.item(), 4)  # nats: 3 log 2
        (2.0, 2.0794)
    """

    pace: float | None = None

    def __init__(self, input_dim: int, *, max_log_scale: float = 8.0, pace: float | None = None) -> None:
        super().__init__(input_dim, max_log_scale)
        self.set_pace(pace)

    @torch.no_grad()
    def set_pace(self, pace: float | None) -> None:
        """Choose how far a feature moves in a step of an optimiser; the map stays as it is, bit for bit.

        Args:
            pace: For steps of Adam of size lr, L and U move a feature by about ``pace * lr`` of its scale, whatever D;
                None for L and U as they are, where it moves by D times as much.
        """
        check_numbers("ScaledLinear", above=0, optional=True, pace=pace)
        before, self.pace = self.unit, pace
        self.factors.copy_(self._rescaled(self.factors, before / self.unit))

    @property
    def unit(self) -> float:
        """The factor of L and U, as they are stored, in use."""
        return 1.0 if self.pace is None else power_of_2(self.pace / self.input_dim)

    def _paced_names(self) -> Iterable[str]:
        return ("factors",)

    def _rescaled(self, stored: Tensor, ratio: float) -> Tensor:
        diagonal = torch.diag(stored.diagonal())
        return (stored - diagonal) * ratio + diagonal

    def _below_and_above(self) -> tuple[Tensor, Tensor]:
        """L and U without their diagonals of ones."""
        factors = self.factors if self.unit == 1.0 else self.unit * self.factors
        return factors.tril(-1), factors.triu(1)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, (below, above) = self._log_scale(), self._below_and_above()
        x = x + F.linear(x, above)
        y = torch.addcmul(self.shift, x + F.linear(x, below), log_scale.exp())
        return y, log_scale.sum().expand(x.shape[:-1])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        with torch.no_grad():  # log|det dy/dx| is the same for all x, so a score is multiplied by the inverse transpose
            below, above = self._below_and_above()
            rows = score.reshape(-1, self.input_dim)
            for factor, upper in ((above, True), (below, False)):
                rows = torch.linalg.solve_triangular(factor, rows, upper=upper, left=False, unitriangular=True)
            score = (rows * torch.exp(-self._log_scale())).reshape(score.shape)
        return *self.forward_and_log_det(x), score

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, (below, above) = self._log_scale(), self._below_and_above()
        columns = ((y - self.shift) * torch.exp(-log_scale)).reshape(-1, self.input_dim).T  # (D, N)
        columns = torch.linalg.solve_triangular(below, columns, upper=False, unitriangular=True)
        columns = torch.linalg.solve_triangular(above, columns, upper=True, unitriangular=True)
        return columns.T.reshape(y.shape), -log_scale.sum().expand(y.shape[:-1])
