"""Logits of mixtures of sigmoids, in layers or scaled and shifted.

A mixture of K sigmoids at distinct places is not the identity, but zero parameters must be.  So the logit y of a
mixture is completed to

    (1 - ε) (y + ρ (x - y₀)) + ε x

where y₀ is the logit of the mixture with equal weights and slopes, at places spread over [-3, 3].  At the start y = y₀
and ρ = 1.  With all sigmoids at one place, first-order changes would be affine, and hundreds of steps would pass
before the sigmoids separate.  The completed map increases, since the slopes of y₀ are at most one.  Plateaus between
sigmoids would lose all digits without ε.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..arguments import check_integers, check_numbers
from .base import bounded, evenly_spaced
from .numerical_inverse import Continued

FLOOR = 0.01  # ε
SPREAD = 3.0
FAR = 30.0  # where x - y₀ is constant to the last bit


@dataclass(frozen=True)
class Sigmoidal(Continued):
    """The map of neural autoregressive flows: layers of logits of mixtures of K sigmoids, with linear tails.

    With weights w on the simplex and slopes a > 0, a layer maps x to ::

        (1 - ε) (y + ρ (x - y₀)) + ε x,    y = logit Σ_k w_k σ(a_k x + b_k),    ε = 0.01

    where y₀ is y with equal weights and slopes.  At zero parameters y = y₀ and ρ = 1: the map is the identity, although
    the sigmoids start at distinct places.

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
        shifts = b - evenly_spaced(-SPREAD, SPREAD, self.components, b[0])
        return bounded(a / 2, self.max_log_slope), shifts, torch.log_softmax(w, 1), rest[:, 0]

    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x)
        for log_slopes, shifts, log_weights, rest in zip(*(part.unbind(0) for part in table), strict=True):
            x, slope = completed_logit(x, log_slopes, shifts, log_weights, rest)
            total = total + torch.log(slope)
        return x, total


@dataclass(frozen=True)
class LogisticMixture(Continued):
    """The map of Flow++, the logit of a mixture of K logistics, scaled and shifted, with linear tails::

        y = e^a logit Σ_k π_k σ((x - μ_k) e^{-s_k}) + b

    The 3 K + 3 parameters are K logits of weights π, K means μ, K log-scales s, the log-scale a, the shift b, and one
    number that completes the logit as in :class:`Sigmoidal`.  So zero parameters are the identity, although the means
    start at distinct places.  The inverse is found numerically.

    Flow++: Improving Flow-Based Generative Models (Ho, Chen, Srinivas, Duan, Abbeel 2019, arXiv:1902.00275).

    Args:
        components: The number K of logistics, at least 2.
        bound: The half-width B of the interval that is bent.
        max_log_scale: The bound on each log-scale, in nats.

    Raises:
        ValueError: If ``components`` is below 2, or ``bound`` or ``max_log_scale`` is not positive and finite.

    Example::

        >>> import torch
        >>> mixture = LogisticMixture(components=4)
        >>> x, params = torch.linspace(-20.0, 20.0, 5), torch.randn(5, mixture.num_params)
        >>> y, log_det = mixture.forward_and_log_det(x, params)
        >>> torch.allclose(mixture.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    components: int = 8
    bound: float = 10.0
    max_log_scale: float = 3.0

    def __post_init__(self) -> None:
        check_integers("LogisticMixture", 2, components=self.components)
        check_numbers("LogisticMixture", above=0, bound=self.bound, max_log_scale=self.max_log_scale)

    @property
    def num_params(self) -> int:
        return 3 * self.components + 3

    def table(self, params: Tensor) -> tuple[Tensor, ...]:
        weights, means, scales, others = params.movedim(-1, 0).split((*(self.components,) * 3, 3))
        log_slopes = -bounded(scales, self.max_log_scale)
        shifts = -(means + evenly_spaced(-SPREAD, SPREAD, self.components, means)) * log_slopes.exp()
        a, b, rest = others.unbind(0)
        return log_slopes, shifts, torch.log_softmax(weights, 0), rest, bounded(a / 4, self.max_log_scale), b

    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        *mixture, a, b = table
        y, slope = completed_logit(x, *mixture)
        return torch.addcmul(b, a.exp(), y), a + torch.log(slope)


def completed_logit(
    x: Tensor, log_slopes: Tensor, shifts: Tensor, log_weights: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (1 - ε) (y + ρ (x - y₀)) + ε x and its slope, ``(*s)``, with ρ = 1 + tanh(rest) and the logit y.

    Args:
        x: Values, ``(*s)``.
        log_slopes: Log-slopes of the sigmoids, ``(K, *s)``.
        shifts: Their shifts, ``(K, *s)``.
        log_weights: Their log-weights, normalised, ``(K, *s)``.
        rest: ``(*s)``.
    """
    y, slope = mixture_logit(torch.addcmul(shifts, log_slopes.exp(), x), log_slopes, log_weights)
    near = x.clamp(-FAR, FAR)
    u = near - evenly_spaced(-SPREAD, SPREAD, len(log_slopes), near.unsqueeze(0))
    below, above = torch.sigmoid(u), torch.sigmoid(-u)
    share, left = below.mean(0), above.mean(0)
    rest = 1 + torch.tanh(rest)
    lacking, of_lacking = near - torch.log(share / left), 1 - (below * above).mean(0) / (share * left)
    y, slope = torch.addcmul(y, rest, lacking), torch.addcmul(slope, rest, of_lacking)
    return (1 - FLOOR) * y + FLOOR * x, (1 - FLOOR) * slope + FLOOR


def mixture_logit(u: Tensor, log_slope: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logit of the mixture Σ_k w_k σ(u_k), and its derivative in x if du_k/dx = exp(log_slope_k).

    Args:
        u: The arguments of the sigmoids, ``(K, *s)``.
        log_slope: ``(K, *s)``.
        log_weight: Log-weights, normalised, ``(K, *s)``.

    Returns:
        The logit ``(*s)``, exact far out in both tails, and its derivative ``(*s)``, at most the largest slope.
    """
    below, above = log_weight + logsigmoid(u), log_weight + logsigmoid(-u)
    # With S the mixture: the shares w_k σ_k / S below and w_k (1 - σ_k) / (1 - S) above, over w_k, in one exponential,
    # since a share may vanish and 1 / w_k overflow where their product is near one.
    shares = torch.log_softmax(below, 0) + torch.log_softmax(above, 0)
    return below.logsumexp(0) - above.logsumexp(0), torch.exp(shares + (log_slope - log_weight)).sum(0)
