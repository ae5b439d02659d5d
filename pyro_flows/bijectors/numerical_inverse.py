"""Bijectors without an inverse in closed form: bent on [-B, B], linear outside, and inverted by Newton's method.

The linear continuation makes f and its derivative continuous on R, and f unbounded.  Values far out cannot overflow
the bent part.  The root of f(x) = y has a bracket in closed form: between -B and B if y lies in [g(-B), g(B)], and on a
tangent otherwise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .base import Bijector

Curve = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> (f(x), log f'(x))
STEPS = 16  # With the two ends, two differentiable steps and the log-determinant, an inverse costs 21 evaluations.


class Continued(Bijector):
    """A bijector that is bent inside [-B, B], continued by its tangents outside, and inverted numerically::

        f(x) = g(c) + g'(c) (x - c),    c = x clamped to [-B, B]

    It is the abstract base class of maps g without an inverse in closed form.  Subclasses are frozen dataclasses that
    define ``bound``, which is B, ``num_params``, :meth:`table` and :meth:`bend`.  Both directions follow.  The inverse
    costs 21 evaluations of :meth:`bend`, whatever the data.  It has first and second derivatives, those of the implicit
    function.

    Attributes:
        bound: The half-width B of the interval that is bent, positive and finite.

    Example::

        >>> import torch
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Wave(Continued):
        ...     bound: float = 3.0
        ...     num_params = 1
        ...     def table(self, params):
        ...         return (torch.tanh(params.movedim(-1, 0)[0]) / 2,)  # of size 1/2 at most
        ...     def bend(self, x, table):
        ...         (s,) = table
        ...         return x + s * torch.sin(x), torch.log1p(s * torch.cos(x))
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, 1)
        >>> y, log_det = Wave().forward_and_log_det(x, params)
        >>> torch.allclose(Wave().inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    bound: float

    @abstractmethod
    def table(self, params: Tensor) -> tuple[Tensor, ...]:
        """Return the constrained parameters, computed once for all evaluations of ``bend``.

        Args:
            params: Parameters of shape ``(*s, P)``.

        Returns:
            Tensors of shape ``(..., *s)``, with parameters first, so that they broadcast with the values.
        """

    @abstractmethod
    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Map x in [-B, B] by g, whose slopes lie between two positive bounds.

        Args:
            x: Values in [-B, B], ``(*s)``.
            table: The result of ``table``.

        Returns:
            ``(g(x), log g'(x))``, each of shape ``(*s)``, the log-slope in nats.
        """

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._continue(*self._aligned(x, params))

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, table = self._aligned(y, params)
        x = self._root(y.detach(), tuple(part.detach() for part in table))
        x = implicit_root(lambda value: self._continue(value, table), x, y)
        return x, -self._continue(x, table)[1]

    def _aligned(self, value: Tensor, params: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return values of the batch shape of both arguments, and the table, which broadcasts with them."""
        value = value.expand(torch.broadcast_shapes(value.shape, params.shape[:-1]))
        return value, self.table(params.reshape((1,) * (value.dim() + 1 - params.dim()) + params.shape))

    def _continue(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        inside = x.clamp(-self.bound, self.bound)
        y, log_slope = self.bend(inside, table)
        return torch.addcmul(y, x - inside, log_slope.exp()), log_slope

    def _root(self, y: Tensor, table: tuple[Tensor, ...]) -> Tensor:
        edge = torch.full_like(y, self.bound)
        low, high = self.bend(-edge, table), self.bend(edge, table)
        inside = torch.maximum(torch.minimum(y, high[0]), low[0])
        x = bracketed_root(lambda value: self.bend(value, table), inside, (-edge, *low), (edge, *high))
        return x + (y - inside) * torch.exp(-torch.where(y < low[0], low[1], high[1]))


def bracketed_root(
    f: Curve, y: Tensor, low: tuple[Tensor, Tensor, Tensor], high: tuple[Tensor, Tensor, Tensor], steps: int = STEPS
) -> Tensor:
    """Return the root of f(x) = y for an increasing f, by Newton's method inside a bracket that shrinks.

    A step follows the tangent at the better end of the bracket.  It is rejected if it leaves the bracket, or if the
    step before has not halved the residual.  Then the linear-rational curve through both ends, with their slopes, is
    solved instead, and its root is moved into the middle half of the bracket.  The number of steps is fixed, so that
    no branch depends on data.  (After Press et al. 2007, Numerical Recipes, section 9.4.)

    Args:
        f: The map, elementwise.
        y: The values, ``(*s)``.
        low: Points where f is at most y, with the values and log-slopes of f there, each ``(*s)``.
        high: The same where f is at least y.
        steps: The number of evaluations of f.
    """
    (a, of_a, slope_a), (b, of_b, slope_b) = low, high
    slow, tiny = torch.ones_like(y, dtype=torch.bool), torch.finfo(y.dtype).tiny
    for _ in range(steps):
        over, under = y - of_a, of_b - y
        ahead = over < under
        x = torch.where(ahead, torch.addcmul(a, over, torch.exp(-slope_a)), b - under * torch.exp(-slope_b))
        share = over * torch.exp((slope_b - slope_a) / 2)
        share = (share + tiny) / (share + under + 2 * tiny)
        x = torch.where((a < x) & (x < b) & ~slow, x, torch.lerp(a, b, 0.25 + 0.5 * share))
        of_x, slope_x = f(x)
        slow = (of_x - y).abs() > torch.minimum(over, under) / 2
        below = of_x <= y
        a, of_a, slope_a = (torch.where(below, *p) for p in ((x, a), (of_x, of_a), (slope_x, slope_a)))
        b, of_b, slope_b = (torch.where(below, *p) for p in ((b, x), (of_b, of_x), (slope_b, slope_x)))
    return torch.where(y - of_a < of_b - y, a, b)


def implicit_root(f: Curve, x: Tensor, y: Tensor) -> Tensor:
    """Return a root x of f(x) = y, found without gradients, with its first and second derivatives.

    Each Newton step at a root doubles the order of the derivatives that are right.
    """
    for _ in range(2):
        value, log_slope = f(x)
        x = x - (value - y) * torch.exp(-log_slope)
    return x
