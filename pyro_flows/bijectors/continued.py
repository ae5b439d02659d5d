"""Maps without a closed inverse: increasing on [-B, B], continued by their tangents, and inverted by Newton's method.

    f(x) = g(c) + g'(c) (x - c),   c = x clamped to [-B, B]

So f and its derivative are continuous and unbounded on R whatever g is, values far out cannot overflow it, and the root
of f(x) = y is bracketed in closed form: outside of [g(-B), g(B)] it lies on a tangent, inside between -B and B.
The derivatives of the inverse are those of the implicit function.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .base import Bijector

Slope = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> (f(x), log f'(x))
STEPS = 16  # With the two ends, two differentiable steps and the log-determinant, an inverse costs 21 evaluations.


class Continued(Bijector):
    """A bijector that is bent inside [-B, B], goes on along its tangents outside, and is inverted numerically::

        f(x) = g(c) + g'(c) (x - c),    c = x clamped to [-B, B]

    It is the abstract base class of maps g without an inverse in closed form.  Subclasses are frozen dataclasses that
    define ``bound``, which is B, ``num_params``, :meth:`table` and :meth:`bend`; both verbs follow.  The inverse
    costs 21 evaluations of :meth:`bend`, whatever the data, and has first and second derivatives.

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
        """What :meth:`bend` needs of the parameters, computed once for all of its evaluations.

        Args:
            params: Parameters of shape ``(*s, P)``.

        Returns:
            Tensors of shape ``(..., *s)``, with parameters first, so that they broadcast with the values.
        """

    @abstractmethod
    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Map x in [-B, B] by g, with slopes that are bounded from below, above zero, and from above.

        Args:
            x: Values in [-B, B], ``(*s)``.
            table: What :meth:`table` has made of the parameters.

        Returns:
            ``(g(x), log g'(x))``, each of shape ``(*s)``, the log-slope in nats.
        """

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = x.expand(torch.broadcast_shapes(x.shape, params.shape[:-1]))
        return self._continue(x, self._aligned(params, x.dim()))

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y = y.expand(torch.broadcast_shapes(y.shape, params.shape[:-1]))
        table = self._aligned(params, y.dim())
        with torch.no_grad():
            x = self._root(y.detach(), tuple(part.detach() for part in table))
        x = implicit_root(lambda value: self._continue(value, table), x, y)
        return x, -self._continue(x, table)[1]

    def _aligned(self, params: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The table of parameters that broadcast with values of so many dimensions though parameters stand first."""
        return self.table(params.reshape((1,) * (dim + 1 - params.dim()) + params.shape))

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
    f: Slope, y: Tensor, low: tuple[Tensor, Tensor, Tensor], high: tuple[Tensor, Tensor, Tensor], steps: int = STEPS
) -> Tensor:
    """The root of f(x) = y for an increasing f, by Newton's method inside a bracket that shrinks.

    A step goes along the tangent at the better end of the bracket.  Where that leaves the bracket, or where the step
    before has not halved the residual, it goes instead to where the linear-rational curve through both ends, with their
    slopes, has the value y, drawn into the middle half of the bracket, so that this shrinks.  The number of steps is
    fixed: nothing depends on the data.  (After Press et al. 2007, Numerical Recipes, section 9.4.)

    Args:
        f: The map, elementwise.
        y: The values, ``(*s)``.
        low: Places where f is at most y, with the values and log-slopes of f there, each ``(*s)``.
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


def implicit_root(f: Slope, x: Tensor, y: Tensor) -> Tensor:
    """A root x of f(x) = y that was found without gradients, with the first and second derivatives of the implicit
    function: each Newton step at a root doubles the order of those that are right."""
    for _ in range(2):
        value, log_slope = f(x)
        x = x - (value - y) * torch.exp(-log_slope)
    return x
