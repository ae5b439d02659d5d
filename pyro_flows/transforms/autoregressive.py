"""Autoregressive scheme: the map of each feature depends on the features before it, in the conditioner's order."""

from __future__ import annotations

from torch import Tensor

from ..arguments import BIJECTOR, check_flags, check_kind
from ..bijectors import Bijector
from ..compiler_state import is_traced
from ..conditioners import MADE, CausalTransformer
from .base import FlowTransform
from .conditional import check_params
from .inversion import invert, invert_by_passes, invert_tokens


class Autoregressive(FlowTransform):
    """An autoregressive layer over the features of a vector ``(D,)``, or over the tokens ``(T, D)`` of a sequence::

        y_i = f(x_i; θ_i(x_<i, c)),    log|det dy/dx| = Σ_i log f'(x_i; θ_i)

    where < is the conditioner's order.  Forward is one pass of the network.  The inverse finds the features one after
    the other, in about the work of one pass and not of D.  IAF samples by the forward direction; MAF scores by it, as
    ``layer.inv`` in a flow.

    Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al. 2016, arXiv:1606.04934); Masked
    Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057).

    Args:
        bijector: The map of each feature, or of each number of a token.
        conditioner: The masked network or causal transformer; its ``order`` is the order of the layer.
        fixed_point: True if the slow direction repeats passes over all features until none changes, and does not go
            feature by feature.  It takes at most D passes, and far fewer if features depend weakly on one another.
            Results are the same, to round-off.  It suits few rows of many features, and GPUs; it may be set at any
            time.

    Raises:
        TypeError: If the conditioner is neither a ``MADE`` nor a ``CausalTransformer``.
        ValueError: If bijector and conditioner do not fit, or ``fixed_point`` is not a bool or is True for tokens.  In
            use, if the conditioner takes contexts and none is given.

    Example::

        >>> import torch
        >>> from pyro_flows.bijectors import Affine
        >>> from pyro_flows.conditioners import MADE
        >>> layer = Autoregressive(Affine(), MADE(3, num_params=2))
        >>> _ = torch.nn.init.normal_(layer.conditioner.output.weight)  # as if trained
        >>> x = torch.randn(5, 3)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> torch.equal(y[:, 0], x[:, 0]), log_det.shape  # the first feature depends on no other
        (True, torch.Size([5]))
        >>> torch.allclose(layer.inverse_and_log_det(y)[0], x, atol=1e-3)
        True
    """

    def __init__(self, bijector: Bijector, conditioner: MADE | CausalTransformer, *, fixed_point: bool = False) -> None:
        known = (MADE, CausalTransformer)
        check_kind("Autoregressive", known, "a MADE or a CausalTransformer", conditioner=conditioner)
        check_kind("Autoregressive", Bijector, BIJECTOR, bijector=bijector)
        super().__init__((conditioner.input_dim, *conditioner.size), conditioner.context_dim)
        check_params("Autoregressive", bijector, conditioner, conditioner.input_dim)
        self.bijector = bijector
        self.conditioner = conditioner
        self.fixed_point = fixed_point
        check_flags("Autoregressive", fixed_point=fixed_point)
        if fixed_point and isinstance(conditioner, CausalTransformer):
            raise ValueError("Autoregressive: fixed_point=True is for a MADE, got a CausalTransformer. Use False.")

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = self.bijector.forward_and_log_det(x, self.conditioner(x, context))
        return y, self.sum_event(log_det)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, y, context = self._rows_of(y, context)
        if isinstance(self.conditioner, CausalTransformer):
            x, log_det = invert_tokens(self.bijector, self.conditioner, y, context)
        elif is_traced():
            x, log_det = invert_by_passes(self.bijector, self.conditioner, y, context)
        else:
            x, log_det = invert(self.bijector, self.conditioner, y, context, self.fixed_point)
        return x.reshape(batch + self.event_shape), log_det.reshape(batch)

    def compiles(self, inverse: bool) -> bool:
        return not inverse
