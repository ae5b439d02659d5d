"""Monotone rational-quadratic spline inside [-B, B], the identity outside.

In the bin [x0, x0 + w] -> [y0, y0 + h] with end slopes d0 and d1, mean slope s = h / w and u = (x - x0) / w:

    y = y0 + h (s u^2 + d0 u (1 - u)) / (s + (d0 + d1 - 2 s) u (1 - u))

Both outer slopes are one, so the map and its derivative are continuous on all of R.
Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032), after Gregory and Delbourgo 1982.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Bijector


@dataclass(frozen=True)
class RationalQuadraticSpline(Bijector):
    """A rational-quadratic spline with linear tails.

    The 3 K - 1 parameters of a scalar are K unnormalised bin widths, K unnormalised bin heights and K - 1 unnormalised
    slopes at the inner knots.

    Args:
        bins: The number K of bins, at least 2.
        bound: The half-width B of the interval that is bent.
        min_bin: The least width and height of a bin, as a fraction of 2 B; less than 1 / K.
        max_slope: Slopes at the knots stay between ``1 / max_slope`` and ``max_slope``.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> import torch
        >>> spline = RationalQuadraticSpline(bins=4)
        >>> x = torch.linspace(-9.0, 9.0, 5)
        >>> y, log_det = spline.forward_and_log_det(x, torch.randn(5, spline.num_params))
        >>> torch.allclose(spline.inverse_and_log_det(y, torch.zeros(5, 11))[0], y, atol=1e-5)
        True
    """

    bins: int = 8
    bound: float = 5.0
    min_bin: float = 0.01
    max_slope: float = 100.0

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"RationalQuadraticSpline: bins must be at least 2, got {self.bins}.")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"RationalQuadraticSpline: bound must be positive and finite, got {self.bound}.")
        if not 0 < self.min_bin * self.bins < 1:
            raise ValueError(
                f"RationalQuadraticSpline: min_bin must lie between 0 and 1 / bins = {1 / self.bins:.3g}, "
                f"got {self.min_bin}; use fewer bins or a smaller min_bin."
            )
        if not self.max_slope > 1:
            raise ValueError(f"RationalQuadraticSpline: max_slope must exceed 1, got {self.max_slope}.")

    @property
    def num_params(self) -> int:
        return 3 * self.bins - 1

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        clamped = x.clamp(-self.bound, self.bound)
        inside = x.abs() < self.bound
        x0, w, y0, h, d0, d1 = self._bin_of(clamped, params, axis=0)
        u = ((clamped - x0) / w).clamp(0, 1)
        v, s = 1 - u, h / w
        denominator = torch.addcmul(s, torch.sub(d0 + d1, s, alpha=2), u * v)
        y = torch.addcmul(y0, h, u * torch.addcmul(s * u, d0, v) / denominator)
        log_det = _log_slope(u, v, s, d0, d1, denominator)
        return torch.where(inside, y, x), torch.where(inside, log_det, 0.0)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        clamped = y.clamp(-self.bound, self.bound)
        inside = y.abs() < self.bound
        x0, w, y0, h, d0, d1 = self._bin_of(clamped, params, axis=1)
        s = h / w
        # With t = (y - y0) / h, a ratio of two quadratics in u, (s - b) u^2 + b u - s t = 0; the sign of b picks
        # the form of the root that does not cancel.
        t = (clamped - y0) / h
        curvature = torch.sub(d0 + d1, s, alpha=2)
        b = torch.addcmul(d0, t, curvature, value=-1)
        a, c = s - b, s * t
        root = torch.addcmul(b * b, a, c, value=4).clamp_min(torch.finfo(y.dtype).tiny).sqrt()
        half = (root + b) * 0.5
        rising = b >= 0
        u = (torch.where(rising, c, half - b) / torch.where(rising, half, a)).clamp(0, 1)
        v = 1 - u
        log_det = _log_slope(u, v, s, d0, d1, torch.addcmul(s, curvature, u * v))
        return torch.where(inside, torch.addcmul(x0, w, u), y), torch.where(inside, -log_det, 0.0)

    def _bin_of(self, value: Tensor, params: Tensor, axis: int) -> tuple[Tensor, ...]:
        """The bin (x0, w, y0, h, d0, d1) that holds each value; axis 0 finds it along x, axis 1 along y."""
        table = self._table(params)  # (3, K + 1, *s)
        shape = torch.broadcast_shapes(value.shape, params.shape[:-1])
        table = table.reshape(*table.shape[:2], *(1,) * (len(shape) + 2 - table.dim()), *table.shape[2:])
        table = table.expand(3, self.bins + 1, *shape)
        left = (value >= table[axis, 1:-1]).sum(0)  # the bin's number
        place = torch.stack((left, left + 1)).expand(3, 2, *shape)
        start, stop = table.gather(1, place).unbind(1)
        x0, y0, d0 = start.unbind(0)
        w, h, _ = (stop - start).unbind(0)
        return x0, w, y0, h, d0, stop[2]

    def _table(self, params: Tensor) -> Tensor:
        """Knots along x, knots along y and slopes, of shape (3, K + 1, *s)."""
        # Parameters stand first: softmax, sums and gathers then run over whole vectors of scalars.
        sizes, slopes = params.movedim(-1, 0).split((2 * self.bins, self.bins - 1))
        sizes = torch.softmax(sizes.unflatten(0, (2, self.bins)), 1)[:, :-1]
        bound, least, inner = self.bound, 2 * self.bound * self.min_bin, self.bins - 1
        even = torch.linspace(least - bound, inner * least - bound, inner, dtype=params.dtype, device=params.device)
        even = even.view(-1, *(1,) * (params.dim() - 1))
        knots = torch.add(even, sizes.cumsum(1), alpha=2 * bound - self.bins * least)
        low, high = 1 / self.max_slope, self.max_slope
        slopes = torch.sigmoid(slopes + math.log((1 - low) / (high - 1)))  # zero gives slope one
        slopes = torch.rsub(slopes, low, alpha=low - high)
        last = torch.full_like(slopes[:1], bound)
        first, one = -last, torch.ones_like(last)
        table = torch.cat((first, knots[0], last, first, knots[1], last, one, slopes, one))
        return table.unflatten(0, (3, self.bins + 1))


def _log_slope(u: Tensor, v: Tensor, s: Tensor, d0: Tensor, d1: Tensor, denominator: Tensor) -> Tensor:
    """log dy/dx at the place u = 1 - v of a bin, (s / denominator)^2 (d0 v^2 + 2 s u v + d1 u^2)."""
    ratio = s / denominator
    slope = torch.addcmul(torch.addcmul(d0 * v, s, u) * v, torch.addcmul(d1 * u, s, v), u)
    return torch.log(ratio * ratio * slope)
