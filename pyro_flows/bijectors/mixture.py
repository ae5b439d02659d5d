"""Logistic mixture map: the logit of the distribution function of a mixture of logistics, then a scale and a shift.

    y = e^a logit Σ_k π_k σ((x - μ_k) e^{-s_k}) + b

The logit is completed as that of the sigmoidal map, so that the components start apart and plateaus keep their digits.
Flow++ (Ho, Chen, Srinivas, Duan, Abbeel 2019, arXiv:1902.00275).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_integers, check_numbers
from .base import bounded
from .continued import Continued
from .sigmoidal import completed, mixture_logit, places


@dataclass(frozen=True)
class LogisticMixture(Continued):
    """The map of Flow++, the logit of a mixture of K logistics, scaled and shifted, with linear tails::

        y = e^a logit Σ_k π_k σ((x - μ_k) e^{-s_k}) + b

    The 3 K + 3 parameters are K logits of weights π, K means μ, K log-scales s, the log-scale a and the shift b of the
    result, and one number for what completes the logit, as in :class:`Sigmoidal`: so zero parameters are the identity
    though the means start apart.  The inverse is found numerically.

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
        shifts = -(means + places(self.components, means)) * log_slopes.exp()
        a, b, rest = others.unbind(0)
        return log_slopes, shifts, torch.log_softmax(weights, 0), bounded(a / 4, self.max_log_scale), b, rest

    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        log_slopes, shifts, log_weights, a, b, rest = table
        u = torch.addcmul(shifts, log_slopes.exp(), x)
        y, slope = completed(x, *mixture_logit(u, log_slopes, log_weights), rest, self.components)
        return torch.addcmul(b, a.exp(), y), a + torch.log(slope)
