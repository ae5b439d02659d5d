"""Circular spline: a diffeomorphism of the circle of circumference 2 B, lifted to the real line.

With g a rational-quadratic spline of [-B, B] onto itself that has one free slope at both ends, and a rotation t,

    f(x) = g(x - 2 B k) + 2 B k + t,    k the number of turns that brings x into [-B, B]

so f(x + 2 B) = f(x) + 2 B: the lift increases on all of R, and each representative of an angle is mapped to one of the
same image.  Normalizing Flows on Tori and Spheres (Rezende et al. 2020, arXiv:2002.02428).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .spline import Spline, bend, bounded_slopes, knot_table, unbend


@dataclass(frozen=True)
class CircularSpline(Spline):
    """A rational-quadratic spline of the circle of circumference 2 B, and a rotation, lifted to the real line::

        f(x) = g(x - 2 B k) + 2 B k + t,    k the number of turns that brings x into [-B, B]

    Here g is a spline of [-B, B] onto itself that has one free slope at both ends, and t the rotation.  So f(x + 2 B) =
    f(x) + 2 B: each representative of an angle is mapped to one of the same image.

    The 3 K + 1 parameters of a scalar are K unnormalised bin widths, K unnormalised bin heights, K unnormalised slopes
    at the knots (the last knot is the first) and the rotation, in the units of x.

    Normalizing Flows on Tori and Spheres (Rezende et al. 2020, arXiv:2002.02428).

    Args:
        bins: The number K of bins, at least 2.
        bound: Half the circumference B; by default x is an angle in radians.
        min_bin: The least width and height of a bin, as a fraction of 2 B; more than 0 and less than 1 / K.
        max_slope: Slopes at the knots stay between ``1 / max_slope`` and ``max_slope``, which exceeds 1.

    Raises:
        ValueError: If ``bins`` is below 2, ``bound`` not positive and finite, ``min_bin`` not between 0 and 1 / K, or
            ``max_slope`` not above 1 and finite.

    Example::

        >>> import math, torch
        >>> spline = CircularSpline(bins=4)
        >>> params = torch.randn(spline.num_params)
        >>> y, _ = spline.forward_and_log_det(torch.tensor([1.0, 1.0 + 2 * math.pi]), params)
        >>> round((y[1] - y[0]).item(), 4)  # once around is once around
        6.2832
    """

    bound: float = math.pi

    @property
    def num_params(self) -> int:
        return 3 * self.bins + 1

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        angle, turns = self._wrap(x)
        y, log_det = bend(angle, self._table(params))
        return y + turns + params[..., -1], log_det

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        angle, turns = self._wrap(y - params[..., -1])
        x, log_det = unbend(angle, self._table(params))
        return x + turns, log_det

    def _wrap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The representative in [-B, B], both ends included, which has the slope of x, and the rest, which has none."""
        angle = torch.remainder(x + self.bound, 2 * self.bound) - self.bound
        return angle, (x - angle).detach()

    def _table(self, params: Tensor) -> Tensor:
        sizes, slopes, _ = params.movedim(-1, 0).split((2 * self.bins, self.bins, 1))
        slopes = bounded_slopes(slopes, self.max_slope)
        return knot_table(sizes, (slopes, slopes[:1]), self.bound, self.min_bin)
