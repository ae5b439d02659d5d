"""From the real line onto an interval: y = low + (high - low) (σ(x) - α) / (1 - 2 α); its inverse is the logit.

With a small α > 0 the ends of the interval lie at finite x, so that data there, as black pixels, do no harm: the logit
preprocessing of Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803, section 4.1) with its Jacobian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from ..arguments import as_shape, check_numbers
from .base import FlowTransform


class Sigmoid(FlowTransform):
    """The fixed elementwise map from R onto an interval that is slightly wider than ``[low, high]``::

        y = low + (high - low) (σ(x) - α) / (1 - 2 α)

    It ends a flow, whose events then lie in the interval; what lies outside has no logit, and its inverse is NaN.

    Density Estimation Using Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803, section 4.1).

    Args:
        event_shape: The shape of an event.
        low: The lower end.
        high: The upper end.
        alpha: The share α by which the interval is wider, from 0 up to but below 1/2: its ends lie
            ``α (high - low) / (1 - 2 α)`` beyond ``low`` and ``high``.

    Raises:
        ValueError: If a size is not positive, the interval is empty or infinite, or α is out of its range.

    Example::

        >>> import torch
        >>> pixels = Sigmoid((1, 2, 2), high=256.0)
        >>> pixels(torch.zeros(1, 2, 2)).unique().item()
        128.0
    """

    def __init__(self, event_shape: Sequence[int], *, low: float = 0.0, high: float = 1.0, alpha: float = 0.05) -> None:
        super().__init__(as_shape("Sigmoid", "event_shape", event_shape))
        check_numbers("Sigmoid", low=low, high=high)
        check_numbers("Sigmoid", least=0, below=0.5, alpha=alpha)
        if not low < high:
            raise ValueError(f"Sigmoid: low must lie below high, both finite, got low={low} and high={high}.")
        self.low, self.high, self.alpha = low, high, alpha
        self._stretch = (high - low) / (1 - 2 * alpha)
        ends = constraints.interval(low - alpha * self._stretch, high + alpha * self._stretch)
        self.codomain = constraints.independent(ends, len(self.event_shape))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.low + self._stretch * (torch.sigmoid(x) - self.alpha)
        return y, self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        share = self.alpha + (y - self.low) / self._stretch
        x = torch.log(share) - torch.log1p(-share)
        return x, -self._log_det(x)

    def _log_det(self, x: Tensor) -> Tensor:
        return self._sum_event(F.logsigmoid(x) + F.logsigmoid(-x) + math.log(self._stretch))
