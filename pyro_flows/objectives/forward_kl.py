"""The inclusive divergence KL(p ‖ q) = -E_p [log q(z)] + const.

Its minimum covers all of the posterior p that the draws reach.  Expectations under p are means over the guide's past
draws, weighted by w = p(z, x) / q_old(z).  The draws are kept in a buffer and replayed in proportion to their weights,
which remain valid when the guide changes.  Weights are truncated at √n times their mean, so that their noise is bounded
(Ionides 2008, Truncated Importance Sampling).
"""

import math
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integers
from ..programs.checks import check_drawn
from ..programs.model_and_guide import LOG_Q
from ..programs.runner import TOTAL
from ..programs.sites import subsampled_plate
from .base import ParticleObjective


class ForwardKL(ParticleObjective):
    """The inclusive divergence KL(p ‖ q), estimated by weighted, replayed draws.

    The loss, in nats, is a weighted mean over past and present draws z of the guide::

        loss ≈ E_p [log p(z, x) - log q(z)],    w = p(z, x) / q_old(z), at most √n times their mean

    The loss is at least the log-evidence, and equals it if the guide is the posterior.  While the draws do not reach
    all of the posterior the estimate is too low, so losses of different steps are not comparable.

    The method is Flow Annealed Importance Sampling Bootstrap (Midgley, Stimper, Simm, Schölkopf, Hernández-Lobato 2022,
    arXiv:2208.01893) without annealing.  Weights aim at p, not at p²/q, so they need no correction for the guide's age.

    Draws are kept as long as model, guide and data are the same objects.  Only the guide is trained, not the model's
    parameters.  The guide need not be reparameterised.  A ``Delta`` whose value depends on parameters is refused,
    because the guide then has no density at a given draw.

    Args:
        num_particles: The number of new draws, and of replayed draws, in each step; at least 2.
        buffer_size: The number of draws to keep, at least ``num_particles``.
        max_plate_nesting: The number of dimensions that the model's plates take; found by a run by default.

    Raises:
        ValueError: If a number is out of its range.  In use, naming the plate or site: if a plate is subsampled, if a
            latent is missing from the guide or depends on its parameters for a given draw, or if the model's density is
            finite at no draw.

    Example::

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> def model():
        ...     pyro.sample("x", dist.Normal(2.0, 1.0))
        >>> guide = AutoFlow(model, init_scale=1.0).setup()  # starts close to the posterior
        >>> abs(ForwardKL().loss(model, guide)) < 0.1  # the log-evidence is 0 without data
        True
    """

    settled = False

    def __init__(
        self, num_particles: int = 128, buffer_size: int = 10_000, max_plate_nesting: float = float("inf")
    ) -> None:
        super().__init__(num_particles, max_plate_nesting, least=2)
        check_integers("ForwardKL", buffer_size=buffer_size)
        if buffer_size < num_particles:
            raise ValueError(f"ForwardKL: buffer_size must be at least num_particles, got {buffer_size}.")
        self.buffer_size = buffer_size
        self._kept: dict[str, Tensor] = {}  # the draws by site, and both log-densities
        self._posterior: tuple[Any, ...] = ()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        posterior = model, guide, *args, *kwargs, *kwargs.values()
        same = len(posterior) == len(self._posterior) and all(map(_is_same, posterior, self._posterior))
        if self._posterior and not same:
            self._kept = {}
        self._posterior = posterior
        if torch.is_grad_enabled() or not self._kept:
            self._draw(model, guide, args, kwargs)
        weights = _truncated(self._kept[TOTAL] - self._kept[LOG_Q])
        picked = torch.multinomial(weights, self.num_particles, replacement=True)
        held = {name: value[picked] for name, value in self._kept.items()}
        trace = self._score(guide, held, args, kwargs)
        for name, site in trace.iter_stochastic_nodes():
            if isinstance(site["value"], Tensor) and site["value"].requires_grad:
                fault = f"site {name!r} of the guide depends on its parameters for given draws"
                way = "Use a guide that samples from densities, such as AutoFlow"
                raise ValueError(f"ForwardKL: {fault}, so its density is not known there. {way}.")
        return (held[TOTAL] - self._log_density(trace)).mean()

    @torch.no_grad()
    def _draw(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """Put new draws of the guide, and the log-densities of model and guide there, first in the buffer."""
        ((model_trace, guide_trace),) = self._get_traces(model, guide, args, kwargs)
        check_drawn("ForwardKL: ", model_trace, guide_trace)
        if subsampled := subsampled_plate(model_trace):
            way = "Let the plate run over all rows"
            raise ValueError(f"ForwardKL: {subsampled}, but each draw is weighed only once. {way}.")
        scores = {TOTAL: self._log_density(model_trace), LOG_Q: self._log_density(guide_trace)}
        new = {**self._draws_of(guide_trace), **scores}
        old = self._kept or {name: value[:0] for name, value in new.items()}
        self._kept = {name: torch.cat((value, old[name]))[: self.buffer_size] for name, value in new.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the draws in the buffer."""
        return dict(self._kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the buffer of a ``state_dict``, for whichever model and data come next."""
        self._kept, self._posterior = dict(state), ()


def _is_same(left: Any, right: Any) -> bool:
    """Return True if two arguments are the same: tensors share memory, methods and plain values are equal."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        views = [(x.data_ptr(), x.dtype, x.shape, x.stride(), x._version) for x in (left, right)]
        return left is right or views[0] == views[1]
    return left is right or (isinstance(left, MethodType | int | float | str) and left == right)


def _truncated(log_weights: Tensor) -> Tensor:
    """Return weights up to a factor, ``(n,)``, truncated at √n times their mean; 0 where a density is not finite."""
    usable = log_weights.isfinite()
    if not usable.any():
        fault = "the model's log-density is finite at no draw of the guide"
        raise ValueError(f"ForwardKL: {fault}. Start the guide elsewhere.")
    log_weights = log_weights.where(usable, -math.inf)
    log_mean = torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
    return (log_weights - log_mean).clamp_max(math.log(len(log_weights)) / 2).exp()
