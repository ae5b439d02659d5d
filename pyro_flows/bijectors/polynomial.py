"""Monotone polynomials: Bernstein polynomials with increasing coefficients, and integrals of sums of squares."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_integers, check_numbers
from .base import as_column, bounded, evenly_spaced
from .numerical_inverse import Continued

FLOOR = 0.01  # ε of SumOfSquares
UNIT = 1 / 2  # with 1, steps of .003 in coefficients compound over layers until rows overflow: slopes are squares


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


@dataclass(frozen=True)
class SumOfSquares(Continued):
    """The integral of the squares of K polynomials of degree n on [-B, B], with linear tails, inverted numerically::

        y = b + ∫₀ˣ ε + (1 - ε) Σ_k p_k(t)² dt,    p_k(t) = Σ_j a_kj P_j(t / B),    ε = 0.01

    The P_j are Legendre's polynomials, so the mean over [-B, B] of the sum of squares is Σ_kj a_kj² / (2 j + 1).
    Gauss's rule on [0, x] with n + 1 nodes is exact.

    The K (n + 1) + 1 parameters are 2 a, before the mean is bounded, and the shift b.  At zero the polynomials are
    distinct constants, whose squares add up to 1.

    Sum-of-Squares Polynomial Flow (Jaini, Selby, Yu 2019, arXiv:1905.02325).

    Args:
        degree: The degree n of each polynomial, at least 1.
        polynomials: The number K of polynomials, at least 1.  Two represent any positive polynomial.
        bound: The half-width B of the interval that is bent.
        max_mean_slope: The bound on the mean slope over [-B, B], more than 1.

    Raises:
        ValueError: If ``degree`` or ``polynomials`` is below 1, ``bound`` not positive and finite, or
            ``max_mean_slope`` not above 1 and finite.

    Example::

        >>> import torch
        >>> squares = SumOfSquares(degree=3)
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, squares.num_params)
        >>> y, log_det = squares.forward_and_log_det(x, params)
        >>> torch.allclose(squares.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    degree: int = 8
    polynomials: int = 2
    bound: float = 5.0
    max_mean_slope: float = 10.0
    _rule: tuple[list[float], list[float]] = field(init=False, repr=False, compare=False)  # Gauss's, on (0, 1)

    def __post_init__(self) -> None:
        check_integers("SumOfSquares", 1, degree=self.degree, polynomials=self.polynomials)
        check_numbers("SumOfSquares", above=0, bound=self.bound)
        check_numbers("SumOfSquares", above=1, max_mean_slope=self.max_mean_slope)
        nodes, weights = np.polynomial.legendre.leggauss(self.degree + 1)  # here, since compilers cannot trace it
        object.__setattr__(self, "_rule", (((1 + nodes) / 2).tolist(), (weights / 2).tolist()))

    @property
    def num_params(self) -> int:
        return self.polynomials * (self.degree + 1) + 1

    def table(self, params: Tensor) -> tuple[Tensor, ...]:
        raw, shift = params.movedim(-1, 0).split((self.num_params - 1, 1))
        raw = UNIT * raw.unflatten(0, (self.degree + 1, self.polynomials))  # (n + 1, K, *s)
        constants = evenly_spaced(1, 2, self.polynomials, params)
        raw = torch.cat((raw[:1] + constants / torch.linalg.vector_norm(constants), raw[1:]))
        norms = as_column(torch.arange(1, 2 * self.degree + 2, 2, device=params.device), raw)
        mean, limit = (raw.square() / norms).sum((0, 1)), self.max_mean_slope
        coefficients = (raw * torch.sqrt(limit / (mean + (limit - 1)))).unsqueeze(2)  # a mean of one stays one
        nodes, weights = self._rule
        return shift[0], coefficients, as_column([*nodes, 1.0], params) / self.bound, as_column(weights, params)

    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        shift, coefficients, ends, weights = table
        z = ends * x  # nodes between 0 and x, then x
        before, basis = torch.ones_like(z), z
        values = torch.addcmul(coefficients[0], coefficients[1], z)  # (K, n + 2, *s)
        for j in range(2, self.degree + 1):
            before, basis = basis, torch.addcmul(before * ((1 - j) / j), z, basis, value=(2 * j - 1) / j)
            values = torch.addcmul(values, coefficients[j], basis)
        slopes = FLOOR + (1 - FLOOR) * values.square().sum(0)
        return torch.addcmul(shift, x, (weights * slopes[:-1]).sum(0)), torch.log(slopes[-1])
