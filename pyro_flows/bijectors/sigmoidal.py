"""Deep sigmoidal map: logits of mixtures of sigmoids, one after the other.

    y = logit Σ_k w_k σ(a_k x + b_k),    w on the simplex, a > 0

Each is completed to

    (1 - ε) (y + ρ (x - y₀)) + ε x,    y₀ the same of equal weights and slopes, with b spread over [-3, 3]

where y = y₀ and ρ = 1 at the start: so zero parameters are the identity though the sigmoids start apart.  Were they
alike, all changes of first order would be affine, and hundreds of steps would pass before they part.  The bracket
increases, since the slopes of y₀ are at most one.  ε is for plateaus between sigmoids, which would lose all digits.
Neural Autoregressive Flows (Huang, Krueger, Lacoste, Courville 2018, arXiv:1804.00779).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..arguments import check_integers, check_numbers
from .base import bounded
from .continued import Continued

FLOOR = 0.01  # ε
SPREAD = 3.0
FAR = 30.0  # where x - y₀ is constant to the last bit


@dataclass(frozen=True)
class Sigmoidal(Continued):
    """The map of neural autoregressive flows: layers of logits of mixtures of K sigmoids, with linear tails.

    With weights w on the simplex, slopes a > 0 and y₀ the same of equal weights and slopes, a layer makes of x ::

        (1 - ε) (y + ρ (x - y₀)) + ε x,    y = logit Σ_k w_k σ(a_k x + b_k),    ε = 0.01

    where y = y₀ and ρ = 1 at zero parameters, which so are the identity though the sigmoids start apart.

    The 3 K + 1 parameters of a layer are K log-slopes, K shifts, K logits of weights and one number for the share ρ.
    The inverse is found numerically.

    Neural Autoregressive Flows (Huang, Krueger, Lacoste, Courville 2018, arXiv:1804.00779).

    Args:
        components: The number K of sigmoids, at least 2.
        layers: The number of layers, at least 1.
        bound: The half-width B of the interval that is bent.
        max_log_slope: The bound on the log-slope of each sigmoid, in nats.

    Raises:
        ValueError: If ``components`` is below 2, ``layers`` below 1, or ``bound`` or ``max_log_slope`` not positive and
            finite.

    Example::

        >>> import torch
        >>> sigmoidal = Sigmoidal(components=4)
        >>> x, params = torch.linspace(-20.0, 20.0, 5), torch.randn(5, sigmoidal.num_params)
        >>> y, log_det = sigmoidal.forward_and_log_det(x, params)
        >>> torch.allclose(sigmoidal.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    components: int = 8
    layers: int = 1
    bound: float = 10.0
    max_log_slope: float = 3.0

    def __post_init__(self) -> None:
        check_integers("Sigmoidal", 2, components=self.components)
        check_integers("Sigmoidal", 1, layers=self.layers)
        check_numbers("Sigmoidal", above=0, bound=self.bound, max_log_slope=self.max_log_slope)

    @property
    def num_params(self) -> int:
        return (3 * self.components + 1) * self.layers

    def table(self, params: Tensor) -> tuple[Tensor, ...]:
        layers = params.movedim(-1, 0).unflatten(0, (self.layers, -1))
        a, b, w, rest = layers.split((*(self.components,) * 3, 1), 1)  # (L, K, *s) thrice and (L, 1, *s)
        shifts = b - places(self.components, b[0])
        return bounded(a / 2, self.max_log_slope), shifts, torch.log_softmax(w, 1), rest[:, 0]

    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x)
        for log_slope, shift, log_weight, rest in zip(*(part.unbind(0) for part in table), strict=True):
            u = torch.addcmul(shift, log_slope.exp(), x)
            x, slope = completed(x, *mixture_logit(u, log_slope, log_weight), rest, self.components)
            total = total + torch.log(slope)
        return x, total


def mixture_logit(u: Tensor, log_slope: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of the mixture Σ_k w_k σ(u_k), and its derivative where u_k has the slope exp(log_slope_k).

    Args:
        u: What the sigmoids are taken of, ``(K, *s)``.
        log_slope: ``(K, *s)``.
        log_weight: Log-weights, which add up to one on the scale of weights, ``(K, *s)``.

    Returns:
        The logit ``(*s)``, exact far out in both tails, and its derivative ``(*s)``, at most the largest slope.
    """
    below, above = log_weight + logsigmoid(u), log_weight + logsigmoid(-u)
    # With S the mixture: the shares w_k σ_k / S below and w_k (1 - σ_k) / (1 - S) above, over w_k, in one exponential,
    # since a share may vanish and 1 / w_k overflow where their product is near one.
    shares = torch.log_softmax(below, 0) + torch.log_softmax(above, 0)
    return below.logsumexp(0) - above.logsumexp(0), torch.exp(shares + (log_slope - log_weight)).sum(0)


def completed(x: Tensor, y: Tensor, slope: Tensor, rest: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(1 - ε) (y + ρ (x - y₀)) + ε x, where ρ = 1 + tanh(rest), and its slope, from y and the slope of y, ``(*s)``."""
    near = x.clamp(-FAR, FAR)
    u = near - places(components, near.unsqueeze(0))
    below, above = torch.sigmoid(u), torch.sigmoid(-u)
    share, left = below.mean(0), above.mean(0)
    rest = 1 + torch.tanh(rest)
    lacking, of_lacking = near - torch.log(share / left), 1 - (below * above).mean(0) / (share * left)
    y, slope = torch.addcmul(y, rest, lacking), torch.addcmul(slope, rest, of_lacking)
    return (1 - FLOOR) * y + FLOOR * x, (1 - FLOOR) * slope + FLOOR


def places(components: int, like: Tensor) -> Tensor:
    """Where K sigmoids start, spread over [-3, 3], for ``(K, *s)``."""
    spread = torch.linspace(-SPREAD, SPREAD, components, dtype=like.dtype, device=like.device)
    return spread.view(-1, *(1,) * (like.dim() - 1))
