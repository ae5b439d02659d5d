"""The integral of a positive network, by the trapezoid rule.

The network is evaluated at fixed nodes, and its output is interpolated linearly between them.  So the rule is exact:
whatever the weights, the map increases, its log-determinant is exact, and its inverse is the root of a quadratic.
Gauss's rule on [0, x] would need more nodes before every such network gave an increasing map, and a search for the
inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_integers, check_numbers
from .base import Bijector, bounded, evenly_spaced
from .spline import bin_of

MAX_LOG_RATE = 1.5  # the bound on w


@dataclass(frozen=True)
class Integral(Bijector):
    """The integral of a positive network with H hidden units, by the trapezoid rule, with linear tails::

        y = b + ∫₀ˣ g(t) dt,    log g(t) = M tanh(n(t) / M),    n(t) = c + Σ_k v_k tanh(3 e^{w_k} (t - t_k - u_k))

    The units start at t_k = 0 … H - 1, spread over [-B, B], and t is in units of their distance.  The network is
    evaluated at fixed nodes, and g is linear between them.  So the rule is exact, and the inverse is the root of a
    quadratic.

    The 3 H + 2 parameters are H weights v of the units, their H log-rates w and H shifts u, the bias c and the shift b.
    At zero the units have no weight.

    Unconstrained Monotonic Neural Networks (Wehenkel, Louppe 2019, arXiv:1908.05164).

    Args:
        hidden: The number H of hidden units, at least 2.
        panels: The number of panels between nodes on either side of zero, at least 1.
        bound: The half-width B of the interval that is bent.
        max_log_slope: The bound M on the log-slope, in nats.

    Raises:
        ValueError: If ``hidden`` is below 2, ``panels`` below 1, or ``bound`` or ``max_log_slope`` not positive and
            finite.

    Example::

        >>> import torch
        >>> integral = Integral(hidden=4)
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, integral.num_params)
        >>> y, log_det = integral.forward_and_log_det(x, params)
        >>> torch.allclose(integral.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    hidden: int = 8
    panels: int = 8
    bound: float = 5.0
    max_log_slope: float = 3.0

    def __post_init__(self) -> None:
        check_integers("Integral", 2, hidden=self.hidden)
        check_integers("Integral", 1, panels=self.panels)
        check_numbers("Integral", above=0, bound=self.bound, max_log_slope=self.max_log_slope)

    @property
    def num_params(self) -> int:
        return 3 * self.hidden + 2

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        within = x.clamp(-self.bound, self.bound)
        x0, x1, y0, y1, g0, g1 = bin_of(within, self._table(params), axis=0)
        u = (within - x0) / (x1 - x0)
        slope = torch.lerp(g0, g1, u)
        share = u * (g0 + slope) / (g0 + g1)  # of the panel's area
        y = torch.addcmul(y0, y1 - y0, share)
        return torch.addcmul(y, x - within, slope), torch.log(slope)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        table = self._table(params)
        within = torch.maximum(torch.minimum(y, table[1, -1]), table[1, 0])
        x0, x1, y0, y1, g0, g1 = bin_of(within, table, axis=1)
        share = (within - y0) / (y1 - y0)
        slope = torch.sqrt(torch.lerp(g0 * g0, g1 * g1, share))  # the square of a linear slope is linear in the area
        u = share * (g0 + g1) / (g0 + slope)
        x = torch.addcmul(x0, x1 - x0, u)
        return x + (y - within) / slope, -torch.log(slope)

    def _table(self, params: Tensor) -> Tensor:
        """Return the nodes along x, their images along y and the slopes there, ``(3, N, *s)``."""
        v, w, u, (c, b) = params.movedim(-1, 0).split((*(self.hidden,) * 3, 2))
        nodes = evenly_spaced(-self.bound, self.bound, 2 * self.panels + 1, params)
        t = (nodes + self.bound) * ((self.hidden - 1) / (2 * self.bound))
        rates = 6 * bounded(w, MAX_LOG_RATE).exp()  # tanh(z) = 2 σ(2 z) - 1, and a sigmoid is faster
        net = c - v.sum(0)
        for k in range(self.hidden):
            bend = torch.sigmoid(torch.addcmul(-rates[k] * (u[k] + k), rates[k], t))
            net = torch.addcmul(net, v[k], bend, value=2)
        slopes = bounded(net, self.max_log_slope).exp()
        extra = (slopes[1:] + slopes[:-1] - 2) * (self.bound / (2 * self.panels))  # areas beyond the identity's
        left, right = extra.split(self.panels)
        left = -left.flip(0).cumsum(0).flip(0)
        images = nodes + torch.cat((left, torch.zeros_like(slopes[:1]), right.cumsum(0)))
        return torch.stack((nodes.expand_as(slopes), images + b, slopes))
