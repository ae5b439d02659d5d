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

from ..arguments import check_integers, check_numbers
from .base import Bijector


@dataclass(frozen=True)
class Spline(Bijector):
    """A spline of K bins on [-B, B], whose knots and slopes are bounded."""

    bins: int = 8
    bound: float = 5.0
    min_bin: float = 0.01
    max_slope: float = 100.0

    def __post_init__(self) -> None:
        name, bins, min_bin = type(self).__name__, self.bins, self.min_bin
        check_integers(name, 2, bins=bins)
        check_numbers(name, above=0, bound=self.bound, min_bin=min_bin)
        if not min_bin * bins < 1:
            raise ValueError(
                f"{name}: min_bin must lie between 0 and 1 / bins = {1 / bins:.3g}, got {min_bin}. Lower it, or bins."
            )
        check_numbers(name, above=1, max_slope=self.max_slope)


@dataclass(frozen=True)
class RationalQuadraticSpline(Spline):
    """A rational-quadratic spline from [-B, B] onto itself, the identity outside.

    In the bin [x0, x0 + w] -> [y0, y0 + h] with end slopes d0 and d1, s = h / w and u = (x - x0) / w it is ::

        y = y0 + h (s u² + d0 u (1 - u)) / (s + (d0 + d1 - 2 s) u (1 - u))

    Both outer slopes are 1, so the map and its derivative are continuous on all of R.

    The 3 K - 1 parameters of a scalar are K unnormalised bin widths, K unnormalised bin heights and K - 1 unnormalised
    slopes at the inner knots.

    Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032), after Gregory and Delbourgo
    1982.

    Args:
        bins: The number K of bins, at least 2.
        bound: The half-width B of the interval that is bent.
        min_bin: The least width and height of a bin, as a fraction of 2 B; more than 0 and less than 1 / K.
        max_slope: Slopes at the knots stay between ``1 / max_slope`` and ``max_slope``, which exceeds 1.

    Raises:
        ValueError: If ``bins`` is below 2, ``bound`` not positive and finite, ``min_bin`` not between 0 and 1 / K, or
            ``max_slope`` not above 1 and finite.

    Example::

        >>> import torch
        >>> spline = RationalQuadraticSpline(bins=4)
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, spline.num_params)
        >>> y, log_det = spline.forward_and_log_det(x, params)
        >>> y[[0, 4]].tolist(), log_det[[0, 4]].tolist()  # the tails are the identity
        ([-9.0, 9.0], [0.0, 0.0])
        >>> torch.allclose(spline.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    @property
    def num_params(self) -> int:
        return 3 * self.bins - 1

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.abs() < self.bound
        y, log_det = bend(x.clamp(-self.bound, self.bound), self._table(params))
        return torch.where(inside, y, x), torch.where(inside, log_det, 0.0)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.abs() < self.bound
        x, log_det = unbend(y.clamp(-self.bound, self.bound), self._table(params))
        return torch.where(inside, x, y), torch.where(inside, log_det, 0.0)

    def _table(self, params: Tensor) -> Tensor:
        sizes, slopes = params.movedim(-1, 0).split((2 * self.bins, self.bins - 1))
        slopes = bounded_slopes(slopes, self.max_slope)
        one = torch.ones_like(slopes[:1])
        return knot_table(sizes, (one, slopes, one), self.bound, self.min_bin)


def bounded_slopes(raw: Tensor, max_slope: float) -> Tensor:
    """Slopes between 1 / max_slope and max_slope from real numbers; zero gives slope one."""
    low, high = 1 / max_slope, max_slope
    return torch.rsub(torch.sigmoid(raw + math.log((1 - low) / (high - 1))), low, alpha=low - high)


def knot_table(sizes: Tensor, rows: tuple[Tensor, ...], bound: float, min_bin: float) -> Tensor:
    """What a spline from [-B, B] onto itself is made of.

    Parameters stand first: softmax, sums and gathers then run over whole vectors of scalars.

    Args:
        sizes: K unnormalised bin widths, then K unnormalised bin heights, ``(2 K, *s)``.
        rows: Parts of ``(R, K + 1, *s)``: what else each knot has, above all its slope.
        bound: The half-width B.
        min_bin: The least width and height of a bin, as a fraction of 2 B.

    Returns:
        Knots along x, knots along y and the rows, ``(2 + R, K + 1, *s)``.
    """
    bins = len(sizes) // 2
    fractions = torch.softmax(sizes.unflatten(0, (2, bins)), 1)[:, :-1]
    least, inner = 2 * bound * min_bin, bins - 1
    even = torch.linspace(least - bound, inner * least - bound, inner, dtype=sizes.dtype, device=sizes.device)
    even = even.view(-1, *(1,) * (sizes.dim() - 1))
    knots = torch.add(even, fractions.cumsum(1), alpha=2 * bound - bins * least)
    last = torch.full_like(sizes[:1], bound)
    table = torch.cat((-last, knots[0], last, -last, knots[1], last, *rows))
    return table.unflatten(0, (-1, bins + 1))


def bend(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Map x in [-B, B] to ``(y, log dy/dx)`` by the spline of a table, ``(*s), (3, K + 1, *s) -> (*s), (*s)``."""
    x0, x1, y0, y1, d0, d1 = bin_of(x, table, axis=0)
    w, h = x1 - x0, y1 - y0
    u = (x - x0) / w  # in [0, 1]: differences and quotients are rounded monotonically
    v, s = 1 - u, h / w
    denominator = torch.addcmul(s, torch.sub(d0 + d1, s, alpha=2), u * v)
    y = torch.addcmul(y0, h, u * torch.addcmul(s * u, d0, v) / denominator)
    return y, _log_slope(u, v, s, d0, d1, denominator)


def unbend(y: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Undo :func:`bend`: map y in [-B, B] to ``(x, log dx/dy)``."""
    x0, x1, y0, y1, d0, d1 = bin_of(y, table, axis=1)
    w, h = x1 - x0, y1 - y0
    s = h / w
    # With t = (y - y0) / h, a ratio of two quadratics in u, (s - b) u^2 + b u - s t = 0; the sign of b picks
    # the form of the root that does not cancel.
    t = (y - y0) / h
    curvature = torch.sub(d0 + d1, s, alpha=2)
    b = torch.addcmul(d0, t, curvature, value=-1)
    a, c = s - b, s * t
    root = torch.addcmul(b * b, a, c, value=4).clamp_min(torch.finfo(y.dtype).tiny).sqrt()
    half = (root + b) * 0.5
    rising = b >= 0
    u = torch.where(rising, c, half - b) / torch.where(rising, half, a)
    u = u - (u - u.clamp(0, 1)).detach()  # next to a knot round-off leaves the bin; the gradient must not stop there
    v = 1 - u
    return torch.addcmul(x0, w, u), -_log_slope(u, v, s, d0, d1, torch.addcmul(s, curvature, u * v))


def bin_of(value: Tensor, table: Tensor, axis: int) -> tuple[Tensor, ...]:
    """The bin that holds each value; axis 0 finds it along x, axis 1 along y.

    Each row of the table is an entry at the bin's start, then one at its end: x0, x1, y0, y1, d0, d1 and so on.
    """
    shape = torch.broadcast_shapes(value.shape, table.shape[2:])
    table = table.reshape(*table.shape[:2], *(1,) * (len(shape) + 2 - table.dim()), *table.shape[2:])
    table = table.expand(*table.shape[:2], *shape)
    left = (value >= table[axis, 1:-1]).sum(0)  # the bin's number
    place = torch.stack((left, left + 1)).expand(len(table), 2, *shape)
    return table.gather(1, place).flatten(0, 1).unbind(0)


def _log_slope(u: Tensor, v: Tensor, s: Tensor, d0: Tensor, d1: Tensor, denominator: Tensor) -> Tensor:
    """log dy/dx at the place u = 1 - v of a bin, (s / denominator)^2 (d0 v^2 + 2 s u v + d1 u^2)."""
    ratio = s / denominator
    slope = torch.addcmul(torch.addcmul(d0 * v, s, u) * v, torch.addcmul(d1 * u, s, v), u)
    return torch.log(ratio * ratio * slope)
