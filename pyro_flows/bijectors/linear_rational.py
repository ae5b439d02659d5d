"""Monotone linear-rational spline inside [-B, B], the identity outside.

A bin is two pieces that meet, with equal slopes, at the share λ of its width.  From a knot of slope d, the left piece
measured from the left knot and the right piece from the right one, a piece of width l rises by

    d ξ / D,    D = 1 + (M - 1) ξ / l,    0 <= ξ <= l

with the slope d / D², where M = d l / r makes it reach the height r at which the two meet.  Its inverse is of the same
form, with 1 / d, 1 / M and r in place of d, M and l; so both directions are exact at the knots and nothing cancels.
Invertible Generative Modeling using Linear Rational Splines (Dolatabadi, Erfani, Leckie 2020, arXiv:2001.05168).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .spline import Spline, bin_of, bounded_slopes, knot_table

LEAST = 0.025  # of a bin's width for each of its pieces


@dataclass(frozen=True)
class LinearRationalSpline(Spline):
    """A linear-rational spline from [-B, B] onto itself, the identity outside.

    A bin is two pieces that meet, with equal slopes, at the share λ of its width.  Measured from its knot, of slope d,
    a piece of width l and height r rises by ::

        d ξ / (1 + (M - 1) ξ / l),    M = d l / r,    0 ≤ ξ ≤ l

    The 4 K - 1 parameters of a scalar are K unnormalised bin widths, K unnormalised bin heights, K - 1 unnormalised
    slopes at the inner knots and K unnormalised places in the bins where their two pieces meet.

    Where two pieces meet, the slope may be as large as the square of the bin's mean slope times ``max_slope``, so the
    bounds are tighter than those of a rational-quadratic spline.

    Invertible Generative Modeling using Linear Rational Splines (Dolatabadi, Erfani, Leckie 2020, arXiv:2001.05168).

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
        >>> spline = LinearRationalSpline(bins=4)
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, spline.num_params)
        >>> y, log_det = spline.forward_and_log_det(x, params)
        >>> torch.allclose(spline.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    min_bin: float = 0.03
    max_slope: float = 30.0

    @property
    def num_params(self) -> int:
        return 4 * self.bins - 1

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside, within = x.abs() < self.bound, x.clamp(-self.bound, self.bound)
        x_knot, y_knot, sign, slope, ratio, width, _ = _piece_of(within, self._table(params), axis=0)
        rise, log_det = _bent(sign * (within - x_knot), slope, ratio, width)
        return torch.where(inside, torch.addcmul(y_knot, sign, rise), x), torch.where(inside, log_det, 0.0)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside, within = y.abs() < self.bound, y.clamp(-self.bound, self.bound)
        x_knot, y_knot, sign, slope, ratio, _, height = _piece_of(within, self._table(params), axis=1)
        run, log_det = _bent(sign * (within - y_knot), 1 / slope, 1 / ratio, height)
        return torch.where(inside, torch.addcmul(x_knot, sign, run), y), torch.where(inside, log_det, 0.0)

    def _table(self, params: Tensor) -> Tensor:
        sizes, slopes, shares = params.movedim(-1, 0).split((2 * self.bins, self.bins - 1, self.bins))
        slopes = bounded_slopes(slopes, self.max_slope)
        shares = LEAST + (1 - 2 * LEAST) * torch.sigmoid(shares)
        one = torch.ones_like(slopes[:1])
        return knot_table(sizes, (one, slopes, one, shares, one), self.bound, self.min_bin)


def _piece_of(value: Tensor, table: Tensor, axis: int) -> tuple[Tensor, ...]:
    """The piece that holds each value: where its knot is along x and y, 1 if it goes right from there and -1 if left,
    the knot's slope d, the ratio M, and the piece's width and height."""
    x0, x1, y0, y1, d0, d1, share, _ = bin_of(value, table, axis)
    w, h = x1 - x0, y1 - y0
    root = torch.sqrt(d0 / d1)
    mean = torch.addcmul(1 - share, share, root)
    middle = share * w if axis == 0 else share * root / mean * h
    left = value - (x0, y0)[axis] <= middle
    x_knot, y_knot, slope = (torch.where(left, *pair) for pair in ((x0, x1), (y0, y1), (d0, d1)))
    share, root = torch.where(left, share, 1 - share), torch.where(left, root, 1.0)
    width, height = share * w, share * root / mean * h
    return x_knot, y_knot, torch.where(left, 1.0, -1.0).to(value), slope, slope * width / height, width, height


def _bent(offset: Tensor, slope: Tensor, ratio: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """How far a piece has come at an offset from its knot, and its log-slope there."""
    denominator = torch.addcmul(length - offset, ratio, offset) / length
    return slope * offset / denominator, torch.log(slope / (denominator * denominator))
