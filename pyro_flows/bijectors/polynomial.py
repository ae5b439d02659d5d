"""Integral of a sum of squares of polynomials on [-B, B], continued by its tangents.

    y = b + ∫₀ˣ ε + (1 - ε) Σ_k p_k(t)² dt,    p_k(t) = Σ_j a_kj P_j(t / B)

in Legendre's polynomials P_j, so that Σ_kj a_kj² / (2 j + 1) is the mean over [-B, B] of the sum of squares.  Gauss's
rule on [0, x] with a node more than the degree is exact.
Sum-of-Squares Polynomial Flow (Jaini, Selby, Yu 2019, arXiv:1905.02325).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_integers, check_numbers
from .continued import Continued

FLOOR = 0.01  # ε
UNIT = 1 / 2  # steps of .003 in coefficients, whose squares are slopes, compound over layers until rows overflow


@dataclass(frozen=True)
class SumOfSquares(Continued):
    """The integral of the squares of K polynomials of degree n on [-B, B], with linear tails, inverted numerically::

        y = b + ∫₀ˣ ε + (1 - ε) Σ_k p_k(t)² dt,    p_k(t) = Σ_j a_kj P_j(t / B),    ε = 0.01

    The P_j are Legendre's polynomials.  The K (n + 1) + 1 parameters are 2 a, before the sum of squares of the a is
    bounded, and the shift b.  At zero the polynomials are distinct constants, whose squares add up to 1.

    Sum-of-Squares Polynomial Flow (Jaini, Selby, Yu 2019, arXiv:1905.02325).

    Args:
        degree: The degree n of each polynomial, at least 1.
        polynomials: The number K of polynomials, at least 1; two can be any positive polynomial.
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
    _rule: tuple[tuple[float, ...], tuple[float, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_integers("SumOfSquares", 1, degree=self.degree, polynomials=self.polynomials)
        check_numbers("SumOfSquares", above=0, bound=self.bound)
        check_numbers("SumOfSquares", above=1, max_mean_slope=self.max_mean_slope)
        object.__setattr__(self, "_rule", gauss_rule(self.degree + 1))  # compilers cannot see through it

    @property
    def num_params(self) -> int:
        return self.polynomials * (self.degree + 1) + 1

    def table(self, params: Tensor) -> tuple[Tensor, ...]:
        ones = (1,) * (params.dim() - 1)
        raw, shift = params.movedim(-1, 0).split((self.num_params - 1, 1))
        raw = UNIT * raw.unflatten(0, (self.degree + 1, self.polynomials))  # (n + 1, K, *s)
        constants = distinct(self.polynomials, params).view(-1, *ones)
        raw = torch.cat((raw[:1] + constants, raw[1:]))
        norms = torch.arange(1, 2 * self.degree + 2, 2, device=params.device).view(-1, 1, *ones)
        size, most = (raw.square() / norms).sum((0, 1)), self.max_mean_slope  # one stays one, and most is the limit
        coefficients = (raw * torch.sqrt(most / (size + (most - 1)))).unsqueeze(2)
        places, weights = self._rule
        ends = torch.tensor([*places, 1.0], dtype=params.dtype, device=params.device).view(-1, *ones)
        shares = torch.tensor(weights, dtype=params.dtype, device=params.device).view(-1, *ones)
        return shift[0], coefficients, ends / self.bound, shares

    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        shift, coefficients, ends, shares = table
        z = ends * x  # nodes between 0 and x, then x
        before, basis = torch.ones_like(z), z
        values = torch.addcmul(coefficients[0], coefficients[1], z)  # (K, n + 2, *s)
        for j in range(2, self.degree + 1):
            before, basis = basis, torch.addcmul(before * ((1 - j) / j), z, basis, value=(2 * j - 1) / j)
            values = torch.addcmul(values, coefficients[j], basis)
        slopes = FLOOR + (1 - FLOOR) * values.square().sum(0)
        return torch.addcmul(shift, x, (shares * slopes[:-1]).sum(0)), torch.log(slopes[-1])


def distinct(number: int, like: Tensor) -> Tensor:
    """Distinct constants whose squares add up to one, ``(K,)``."""
    found = torch.linspace(1.0, 2.0, number, dtype=like.dtype, device=like.device)
    return found / torch.linalg.vector_norm(found)


def gauss_rule(nodes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes in (0, 1) and weights, which add up to one, of Gauss's rule."""
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return tuple(((1 + places) / 2).tolist()), tuple((weights / 2).tolist())
