"""A bijector applied to each feature on its own: y_i = f(x_i; θ_i), with θ learned or computed from a context."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..arguments import BIJECTOR, check_kind, check_numbers
from ..bijectors import Bijector
from ..conditioners import Conditioner
from ..conditioners.base import Paced, power_of_2
from .conditional import Conditional, check_params


class Elementwise(Paced, Conditional):
    """Independent maps of the features of a vector ``(*batch, D)``, with parameters that are learned, or computed::

        y_i = f(x_i; θ_i(c)),    log|det dy/dx| = Σ_i log f'(x_i; θ_i)

    Args:
        bijector: The map.
        input_dim: The number D of features.
        conditioner: A network from contexts to parameters, with ``input_dim = context_dim`` and ``output_dim = D``; by
            default the parameters are a table ``params`` of shape ``(D, P)`` that starts at zero.
        pace: How far the table moves in a step of an optimiser: see :meth:`set_pace`.

    Raises:
        ValueError: If ``input_dim`` or ``pace`` is not positive, the conditioner's sizes do not fit it or the bijector,
            or there is a conditioner and a pace.  In use, if there is a conditioner and no context is given.

    Example::

        >>> import torch
        >>> from pyro_flows.bijectors import RationalQuadraticSpline
        >>> layer, x = Elementwise(RationalQuadraticSpline(), 3), torch.randn(5, 3)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> torch.allclose(y, x, atol=1e-5), log_det.shape, layer.params.shape
        (True, torch.Size([5]), torch.Size([3, 23]))
    """

    pace: float | None = None

    def __init__(
        self,
        bijector: Bijector,
        input_dim: int,
        conditioner: Conditioner | None = None,
        *,
        pace: float | None = None,
    ) -> None:
        super().__init__(input_dim, conditioner)
        check_kind("Elementwise", Bijector, BIJECTOR, bijector=bijector)
        self.bijector = bijector
        if conditioner is None:
            self.params = nn.Parameter(torch.zeros(input_dim, bijector.num_params))
        else:
            check_params("Elementwise", bijector, conditioner, input_dim)
        if pace is not None:
            self.set_pace(pace)

    @torch.no_grad()
    def set_pace(self, pace: float | None) -> None:
        """Choose how far the table moves in a step of an optimiser; the map stays as it is.

        Args:
            pace: For steps of Adam of size lr, parameters of the bijector move by about ``pace * lr``; None for lr.

        Raises:
            ValueError: If the pace is not positive and finite, or there is a conditioner, which has one of its own.
        """
        check_numbers("Elementwise", above=0, optional=True, pace=pace)
        if self.conditioner is not None:
            raise ValueError("Elementwise: a pace is for a table; set that of the conditioner.")
        before, self.pace = self.unit, pace
        self.params.mul_(before / self.unit)

    @property
    def unit(self) -> float:
        """The factor by which the stored table is multiplied."""
        return 1.0 if self.pace is None else power_of_2(self.pace)

    def _paced_names(self) -> Iterable[str]:
        return ("params",)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = self.bijector.forward_and_log_det(x, self._params(context))
        return y, log_det.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.bijector.inverse_and_log_det(y, self._params(context))
        return x, log_det.sum(-1)

    def _params(self, context: Tensor | None) -> Tensor:
        params = self._conditioned(context)
        if params is None:
            return self.params if self.unit == 1.0 else self.unit * self.params
        return params
