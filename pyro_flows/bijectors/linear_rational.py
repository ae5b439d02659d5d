"""Monotone linear-rational splines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .spline import Spline, bin_of, bounded_slopes, knot_table

LEAST = 0.025  # of a bin's width for each of its pieces


@dataclass(frozen=True)
class LinearRationalSpline(Spline):
    """A linear-rational spline from [-B, B] onto itself, the identity outside.

    A bin has two pieces.  They meet, with equal slopes, at a share λ of its width.  A piece of width l and height r
    starts at its knot, where the slope is d.  At the distance ξ from the knot it has risen by ::

        d ξ / D,    D = 1 + (M - 1) ξ / l,    M = d l / r,    0 ≤ ξ ≤ l

    with the slope d / D².  Its inverse has the same form, with 1 / d, 1 / M and r in place of d, M and l.  So both
    directions are exact at the knots, without cancellation.

    The 4 K - 1 parameters of a scalar are K unnormalised bin widths, K unnormalised bin heights, K - 1 unnormalised
    slopes at the inner knots and the K unnormalised shares λ.

    Where two pieces meet, the slope may reach the square of the bin's mean slope times ``max_slope``.  So the bounds
    are tighter than those of a rational-quadratic spline.

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

    def _table(self, params: Tensor) -> Tensor:
        sizes, slopes, shares = params.movedim(-1, 0).split((2 * self.bins, self.bins - 1, self.bins))
        slopes = bounded_slopes(slopes, self.max_slope)
        shares = LEAST + (1 - 2 * LEAST) * torch.sigmoid(shares)
        one = torch.ones_like(slopes[:1])
        return knot_table(sizes, (one, slopes, one, shares, one), self.bound, self.min_bin)

    def _curve(self, value: Tensor, table: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        x0, x1, y0, y1, d0, d1, share, _ = bin_of(value, table, axis)
        w, h = x1 - x0, y1 - y0
        root = torch.sqrt(d0 / d1)
        mean = torch.addcmul(1 - share, share, root)
        meeting = share * w if axis == 0 else share * root / mean * h
        left = value - (x0, y0)[axis] <= meeting
        x_knot, y_knot, d = (torch.where(left, *pair) for pair in ((x0, x1), (y0, y1), (d0, d1)))
        share, root = torch.where(left, share, 1 - share), torch.where(left, root, 1.0)
        width, height = share * w, share * root / mean * h  # of the piece
        sign, ratio = torch.where(left, 1.0, -1.0).to(value), d * width / height  # a piece runs away from its knot
        if axis == 0:
            start, image, length = x_knot, y_knot, width
        else:
            start, image, length, d, ratio = y_knot, x_knot, height, 1 / d, 1 / ratio
        offset = sign * (value - start)
        denominator = torch.addcmul(length - offset, ratio, offset) / length
        return torch.addcmul(image, sign, d * offset / denominator), torch.log(d / (denominator * denominator))
