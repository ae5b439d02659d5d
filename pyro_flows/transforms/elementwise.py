"""Maps of each number on its own: a bijector with learned or conditional parameters, and fixed maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from ..arguments import BIJECTOR, as_shape, check_kind, check_numbers
from ..bijectors import Bijector
from ..conditioners import Conditioner
from ..conditioners.pace import Paced
from .base import FlowTransform, TwoWay
from .conditional import Conditional


class Elementwise(Paced, TwoWay, Conditional):
    """Independent maps of the features of a vector ``(*batch, D)``, with parameters that are learned, or computed::

        y_i = f(x_i; θ_i(c)),    log|det dy/dx| = Σ_i log f'(x_i; θ_i)

    Args:
        bijector: The map.
        input_dim: The number D of features.
        conditioner: A network from contexts to parameters, with ``input_dim = context_dim`` and ``output_dim = D``; by
            default the parameters are a table ``params`` of shape ``(D, P)`` that starts at zero.

    Raises:
        ValueError: If ``input_dim`` is not positive, or the conditioner's sizes do not fit it or the bijector.  In use,
            if there is a conditioner and no context is given.

    Example::

        >>> import torch
        >>> from pyro_flows.bijectors import RationalQuadraticSpline
        >>> layer, x = Elementwise(RationalQuadraticSpline(), 3), torch.randn(5, 3)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> torch.allclose(y, x, atol=1e-5), log_det.shape, layer.params.shape
        (True, torch.Size([5]), torch.Size([3, 23]))
    """

    def __init__(self, bijector: Bijector, input_dim: int, conditioner: Conditioner | None = None) -> None:
        check_kind("Elementwise", Bijector, BIJECTOR, bijector=bijector)
        super().__init__(input_dim, conditioner, (input_dim, bijector.num_params))
        self.bijector = bijector
        if conditioner is None:
            self.params = nn.Parameter(torch.zeros(input_dim, bijector.num_params))
            self.stored = ("params",)

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        image, log_det = self.bijector.verb(inverse)(value, self._params(context))
        return image, log_det.sum(-1)

    def _params(self, context: Tensor | None) -> Tensor:
        return self.paced(super()._params(context))


class Sigmoid(FlowTransform):
    """The fixed elementwise map from R onto an interval that is slightly wider than ``[low, high]``::

        y = low + (high - low) (σ(x) - α) / (1 - 2 α)

    It ends a flow, whose events then lie in the interval.  A value outside has no logit, and its inverse is NaN.  With
    a small α > 0 the ends of the interval lie at finite x, so that data there, such as black pixels, do no harm.

    Density Estimation Using Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803, section 4.1), where it is
    the preprocessing by a logit.

    Args:
        event_shape: The shape of an event.
        low: The lower end.
        high: The upper end.
        alpha: The share α by which the interval is wider, from 0 up to but below 1/2: its ends lie
            ``α (high - low) / (1 - 2 α)`` beyond ``low`` and ``high``.

    Raises:
        ValueError: If a size is not positive, the interval is empty or infinite, or α is out of its range.

    Example::

        >>> import torch
        >>> pixels = Sigmoid((1, 2, 2), high=256.0)
        >>> pixels(torch.zeros(1, 2, 2)).unique().item()
        128.0
    """

    def __init__(self, event_shape: Sequence[int], *, low: float = 0.0, high: float = 1.0, alpha: float = 0.05) -> None:
        super().__init__(as_shape("Sigmoid", "event_shape", event_shape))
        check_numbers("Sigmoid", low=low, high=high)
        check_numbers("Sigmoid", least=0, below=0.5, alpha=alpha)
        if not low < high:
            raise ValueError(f"Sigmoid: low must lie below high, both finite, got low={low} and high={high}.")
        self.low, self.high, self.alpha = low, high, alpha
        self._stretch = (high - low) / (1 - 2 * alpha)
        ends = constraints.interval(low - alpha * self._stretch, high + alpha * self._stretch)
        self.codomain = constraints.independent(ends, len(self.event_shape))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.low + self._stretch * (torch.sigmoid(x) - self.alpha), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = torch.logit(self.alpha + (y - self.low) / self._stretch)
        return x, -self._log_det(x)

    def _log_det(self, x: Tensor) -> Tensor:
        return self.sum_event(F.logsigmoid(x) + F.logsigmoid(-x) + math.log(self._stretch))
