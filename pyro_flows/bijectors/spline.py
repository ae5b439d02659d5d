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
        if not self.bound > 0:
            raise ValueError(f"RationalQuadraticSpline: bound must be positive, got {self.bound}.")
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
        inside = x.abs() < self.bound
        x0, w, y0, h, d0, d1 = self._bin_of(x, params, axis=0)
        u = ((x.clamp(-self.bound, self.bound) - x0) / w).clamp(0, 1)
        s = h / w
        uv = u * (1 - u)
        denominator = s + (d0 + d1 - 2 * s) * uv
        y = y0 + h * (s * u * u + d0 * uv) / denominator
        log_det = _log_slope(u, uv, s, d0, d1, denominator)
        return torch.where(inside, y, x), torch.where(inside, log_det, 0.0)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.abs() < self.bound
        x0, w, y0, h, d0, d1 = self._bin_of(y, params, axis=1)
        v = (y.clamp(-self.bound, self.bound) - y0) / h
        s = h / w
        # v is a ratio of two quadratics in u, so (s - b) u^2 + b u - s v = 0; the sign of b picks the form of the root
        # that does not cancel.
        curvature = d0 + d1 - 2 * s
        b = d0 - v * curvature
        root = (b * b + 4 * (s - b) * s * v).clamp_min(torch.finfo(y.dtype).tiny).sqrt()
        u = torch.where(b >= 0, 2 * s * v, root - b) / torch.where(b >= 0, b + root, 2 * (s - b))
        u = u.clamp(0, 1)
        uv = u * (1 - u)
        log_det = _log_slope(u, uv, s, d0, d1, s + curvature * uv)
        return torch.where(inside, x0 + w * u, y), torch.where(inside, -log_det, 0.0)

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
        width = 2 * self.bound
        sizes = sizes * (width * (1 - self.bins * self.min_bin)) + width * self.min_bin
        knots = sizes.cumsum(1) - self.bound
        low, high = 1 / self.max_slope, self.max_slope
        slopes = torch.sigmoid(slopes + math.log((1 - low) / (high - 1))) * (high - low) + low  # zero gives one
        edge = torch.full_like(slopes[:1], self.bound)
        one = torch.ones_like(edge)
        table = torch.cat((-edge, knots[0], edge, -edge, knots[1], edge, one, slopes, one))
        return table.unflatten(0, (3, self.bins + 1))


def _log_slope(u: Tensor, uv: Tensor, s: Tensor, d0: Tensor, d1: Tensor, denominator: Tensor) -> Tensor:
    """log dy/dx at the place u of a bin."""
    ratio = s / denominator
    return torch.log(ratio * ratio * (d1 * u * u + 2 * s * uv + d0 * (1 - u) * (1 - u)))
