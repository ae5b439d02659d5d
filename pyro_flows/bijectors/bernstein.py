"""Bernstein polynomials with increasing coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_integers, check_numbers
from .base import as_column, bounded
from .continued import Continued


@dataclass(frozen=True)
class Bernstein(Continued):
    """An increasing Bernstein polynomial of degree n on [-B, B] with linear tails, inverted numerically::

        y = Σ_j β_j B_{j,n}(u),    u = (x + B) / 2B,    B_{j,n}(u) = C(n, j) u^j (1 - u)^{n-j}

        dy/dx = Σ_j s_j B_{j,n-1}(u),    s_j = n (β_{j+1} - β_j) / 2B

    The n + 1 parameters are the logarithms of the n slopes s and the shift of y.  The slope of y is a weighted mean of
    the s_j, so it stays within their bounds.

    Deep Transformation Models (Sick, Hothorn, Dürr 2020, arXiv:2004.00464).

    Args:
        degree: The degree n, at least 2.
        bound: The half-width B of the interval that is bent.
        max_log_slope: The bound on the log-slope, in nats.

    Raises:
        ValueError: If ``degree`` is below 2, or ``bound`` or ``max_log_slope`` is not positive and finite.

    Example::

        >>> import torch
        >>> bernstein = Bernstein(degree=8)
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, bernstein.num_params)
        >>> y, log_det = bernstein.forward_and_log_det(x, params)
        >>> torch.allclose(bernstein.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    degree: int = 32
    bound: float = 5.0
    max_log_slope: float = 5.0

    def __post_init__(self) -> None:
        check_integers("Bernstein", 2, degree=self.degree)
        check_numbers("Bernstein", above=0, bound=self.bound, max_log_slope=self.max_log_slope)

    @property
    def num_params(self) -> int:
        return self.degree + 1

    def table(self, params: Tensor) -> tuple[Tensor, ...]:
        raw, shift = params.movedim(-1, 0).split((self.degree, 1))
        slopes = bounded(raw, self.max_log_slope).exp()
        steps = slopes * (2 * self.bound / self.degree)
        ends = steps.cumsum(0)  # β_1 … β_n, relative to β_0
        first = shift - ends[-1:] / 2  # so that steeper slopes raise the right end as much as they lower the left one
        binomials = as_column([float(math.comb(self.degree - 1, j)) for j in range(self.degree)], params)
        return binomials, slopes, steps, first + ends - steps

    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        binomials, slopes, steps, starts = table
        u, v = (self.bound + x) / (2 * self.bound), (self.bound - x) / (2 * self.bound)
        basis = binomials * powers(u, self.degree) * powers(v, self.degree).flip(0)
        basis = basis / basis.sum(0).detach()  # removes the round-off of u + v to the power n - 1
        # B_{j,n} = u B_{j-1,n-1} + (1 - u) B_{j,n-1}, so the basis of degree n - 1 gives both results.
        return (basis * torch.addcmul(starts, steps, u)).sum(0), torch.log((basis * slopes).sum(0))


def powers(x: Tensor, number: int) -> Tensor:
    """Return 1, x, x², … as products, whose derivatives are right at zero too, ``(*s) -> (number, *s)``."""
    found = torch.ones_like(x).unsqueeze(0)
    while len(found) < number:
        found = torch.cat((found, found * (found[-1] * x)))
    return found[:number]
