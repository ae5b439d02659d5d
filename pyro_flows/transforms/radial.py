"""A radial transform stretches space around one point: y = x + β (x - x₀) / (α + r), with r = |x - x₀|.

In units of α the radius is ρ = r / α.  With h = 1 / (1 + ρ) and s = β / α the Jacobian has the eigenvalue 1 + s h
across, D - 1 times, and 1 + s h² along x - x₀.  The map is a bijection if s > -1; here log(1 + s) = B tanh(raw / B):
zero is the identity, and no layer stretches or squeezes space by more than exp(B).

The way back is a quadratic equation of the radius, ρ² + (1 + s - ρ') ρ - ρ' = 0 with ρ' = |y - x₀| / α.

Variational Inference with Normalizing Flows (Rezende, Mohamed 2015, arXiv:1505.05770, section 4.1 and appendix A).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bijectors.base import bounded
from ..conditioners import Conditioner
from .base import Scored
from .conditional import Tabled
from .ridge import MAX_LOG_SLOPE, bounded_slope


class Radial(Tabled):
    """A radial transform of a vector ``(*batch, D)``, which stretches space around x₀, the identity at the start::

        y = x + β (x - x₀) / (α + r),    r = |x - x₀|
        log|det dy/dx| = (D - 1) log(1 + s h) + log(1 + s h²),    s = β / α > -1,    h = α / (α + r)

    The way back is a quadratic equation, so any value can be scored.

    Its D + 2 parameters (x₀, log(α / √D), s), of which the last two are bounded smoothly, are a table, in which only s
    starts at zero: x₀ and α are random, so that no two layers are alike.  A conditioner adds to the table what depends
    on the context.

    Variational Inference with Normalizing Flows (Rezende, Mohamed 2015, arXiv:1505.05770).

    Args:
        input_dim: The number D of features.
        conditioner: A network from contexts to parameters, with ``input_dim = context_dim``, ``output_dim = 1`` and
            ``num_params = D + 2``; by default there is no context.

    Raises:
        ValueError: If ``input_dim`` is not positive or the conditioner's sizes do not fit it.  In use, if there is a
            conditioner and no context is given.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MLP
        >>> radial = Radial(3, MLP(4, 1, num_params=5))
        >>> _ = torch.nn.init.normal_(radial.params)  # as if trained
        >>> y, context = torch.randn(5, 3), torch.randn(4)
        >>> x, log_det = radial.inverse_and_log_det(y, context)
        >>> torch.allclose(radial.forward_and_log_det(x, context)[0], y, atol=1e-3), log_det.shape
        (True, torch.Size([5]))
    """

    def __init__(self, input_dim: int, conditioner: Conditioner | None = None) -> None:
        super().__init__(input_dim, conditioner)
        self._set_table(torch.cat((torch.randn(input_dim + 1), torch.zeros(1))))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, s = self._ball(context)
        away = x - centre
        h = 1 / (1 + _length(away) / alpha)
        return x + s * h * away, self._log_det(s, h)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, s = self._ball(context)
        away = y - centre
        radius = _length(away) / alpha
        # The sign of p picks the form of the positive root that does not cancel.
        p = 1 + s - radius
        half = ((p * p + 4 * radius).sqrt() + p.abs()) / 2
        h = 1 / (1 + torch.where(p < 0, half, radius / half))
        return y - s * h / (1 + s * h) * away, -self._log_det(s, h)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        # The inverse of a multiple of the identity plus a matrix of rank one: no way back is needed.
        centre, alpha, s = self._ball(context)
        away = x - centre
        radius = _length(away)
        h, direction = 1 / (1 + radius / alpha), away / radius
        across, along = 1 + s * h, 1 + s * h * h
        pull = s * h * h / alpha * ((self.input_dim - 1) / across + 2 * h / along)  # minus the slope of the log-det
        turn = (direction * score).sum(-1, keepdim=True) * s * h * (1 - h) / across
        return x + s * h * away, self._log_det(s, h), (score / across + (turn + pull) / along * direction).detach()

    def _log_det(self, s: Tensor, h: Tensor) -> Tensor:
        return ((self.input_dim - 1) * torch.log1p(s * h) + torch.log1p(s * h * h)).squeeze(-1)

    def _ball(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The point x₀, ``(*batch, D)``, and the numbers α > 0 and s > -1, ``(*batch, 1)``."""
        params = self._params(context)
        centre, size, raw = params.split((self.input_dim, 1, 1), -1)
        # Distances between draws of a standard normal grow like √D.
        return centre, self.input_dim**0.5 * bounded(size, MAX_LOG_SLOPE).exp(), bounded_slope(raw)


def _length(vector: Tensor) -> Tensor:
    """|vector|, ``(*batch, 1)``, positive and with finite gradients at zero too."""
    return vector.square().sum(-1, keepdim=True).clamp_min(torch.finfo(vector.dtype).tiny).sqrt()
