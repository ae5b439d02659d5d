"""Rényi's bound log p(x) ≈ 1/(1-α) log mean_k w_k^(1-α), with w = p(z, x) / q(z).

The bound tightens with the number K of draws.  α = 0 gives the importance weighted bound, α → 1 the ELBO.

The plain gradient of the guide becomes pure noise as K grows.  The doubly reparameterised gradient passes through the
draws alone.  With v_k the normalised w_k^(1-α), draw k has the weight α v_k + (1-α) v_k² for the guide and v_k for the
model's parameters.  The noise then falls with K, and vanishes at the posterior.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..arguments import check_numbers
from .base import ParticleObjective
from .path_gradient import PathGradient


class RenyiELBO(PathGradient, ParticleObjective):
    """Rényi's bound of order α, with doubly reparameterised gradients.

    The loss, in nats, is the negative bound of K draws z_k of the guide q (Li, Turner 2016, arXiv:1602.02311)::

        bound = 1/(1 - α) log 1/K Σ_k w_k^(1 - α),    w_k = p(z_k, x) / q(z_k)

    With α below 1 the guide covers more of the posterior than with the ELBO; with α above 1 it concentrates on modes.
    The gradients are those of Tucker, Lawson, Gu, Maddison 2018, arXiv:1810.04152.  Plates, ``scale``, masks and
    subsampling work as in Pyro.  Latents must be continuous and reparameterised in the guide, and its parameters must
    be Pyro's or those of modules.  Far from the posterior one draw has all the weight, so start near it: pass
    ``warm_start=True`` to ``fit_svi``, or continue from a fitted guide.

    Args:
        alpha: The order α, any number but 1.
        num_particles: The number K of draws under the logarithm.
        max_plate_nesting: The number of dimensions that the model's plates take; found by a run by default.
        vectorize_particles: Whether all draws run at once, with the same subsample.  The model must then broadcast
            to the left of its plates.

    Raises:
        ValueError: If α is 1 or ``num_particles`` is below 1.  In use, naming the site: if a latent is missing from the
            guide or not reparameterised.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))
        >>> guide = AutoFlow(model, init_scale=1.0).setup()
        >>> losses = [RenyiELBO(alpha, num_particles=1000).loss(model, guide) for alpha in (0.0, 0.5, 0.99)]
        >>> losses == sorted(losses)  # from minus the log-evidence to minus the ELBO
        True
    """

    def __init__(
        self,
        alpha: float,
        num_particles: int = 16,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        check_numbers("RenyiELBO", alpha=alpha)
        if alpha == 1:
            raise ValueError("RenyiELBO: alpha must not be 1, got 1: that bound is the ELBO. Use PathELBO.")
        super().__init__(num_particles, max_plate_nesting, vectorize_particles)
        self.alpha = alpha

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        model_traces, guide_traces = zip(*self._get_traces(model, guide, args, kwargs), strict=True)
        for trace in guide_traces:
            self._check_reparameterised(trace)
        log_p = torch.cat([self._log_density(trace) for trace in model_traces])  # (K,)
        log_q = torch.cat([self._log_density(trace) for trace in guide_traces])  # (K,)
        order = 1 - self.alpha
        powers = order * (log_p - log_q).detach()
        bound = (torch.logsumexp(powers, 0) - math.log(self.num_particles)) / order
        weight = torch.softmax(powers, 0)
        share = self.alpha + order * weight  # the guide's weight of a draw over the model's
        self._scale_draws(model_traces, guide_traces[0], share)
        surrogate = (weight * (log_p - share * log_q)).where(weight > 0, 0).sum()  # no density, no gradient
        return surrogate.detach() - bound - surrogate

    def _scale_draws(self, model_traces: tuple[Trace, ...], guide_trace: Trace, share: Tensor) -> None:
        """Multiply the model's gradient at each of the guide's K draws by its share, ``(K,)``.

        A value that all draws have in common is a parameter, for example of a ``Delta``, and keeps its gradient.
        """
        for name in [name for name, _ in model_traces[0].iter_stochastic_nodes() if name in guide_trace.nodes]:
            values = [trace.nodes[name]["value"] for trace in model_traces]
            rows = torch.cat([value.detach().reshape(self._rows, -1) for value in values])
            factors = torch.where((rows == rows[0]).all(), 1, share)
            for value, factor in zip(values, factors.split(self._rows), strict=True):
                if value.requires_grad:
                    value.register_hook(lambda grad, f=factor: (f * grad.reshape(len(f), -1).T).T.reshape(grad.shape))


class ImportanceWeightedELBO(RenyiELBO):
    """The importance weighted bound of K draws (Burda, Grosse, Salakhutdinov 2015, arXiv:1509.00519).

    The loss, in nats, is the negative bound: :class:`RenyiELBO` of order 0, with the same gradients::

        bound = log 1/K Σ_k w_k,    w_k = p(z_k, x) / q(z_k)

    With one draw it is the ELBO; with more it is closer to the evidence.  Draws far out have little weight and cost
    little, so a flow that is trained by this bound alone may widen until draws overflow.  Fit with another objective
    first, then finish in small steps:
    ``fit_svi(model, fit.guide, objective=ImportanceWeightedELBO(8), lr=3e-4, steps=1000)``.

    Args:
        num_particles: The number K of draws under the logarithm.
        max_plate_nesting: The number of dimensions that the model's plates take; found by a run by default.
        vectorize_particles: Whether all draws run at once, with the same subsample.  The model must then broadcast
            to the left of its plates.

    Raises:
        ValueError: If ``num_particles`` is below 1.  In use, naming the site: if a latent is missing from the guide or
            not reparameterised.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))
        >>> guide = AutoFlow(model, init_scale=1.0).setup()
        >>> bound = -ImportanceWeightedELBO(num_particles=4000).loss(model, guide)
        >>> abs(bound - dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0))) < 0.2  # of the log-evidence
        tensor(True)
    """

    def __init__(
        self, num_particles: int = 16, max_plate_nesting: float = float("inf"), vectorize_particles: bool = True
    ) -> None:
        super().__init__(0.0, num_particles, max_plate_nesting, vectorize_particles)
