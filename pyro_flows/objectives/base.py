"""The base of objectives over many draws, which need the log-densities of model and guide for each draw."""

from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from ..arguments import check_flags, check_integers
from ..programs.program import trace_of
from ..programs.sites import is_point


class ParticleObjective(Trace_ELBO):
    """A loss over K draws, as a Pyro ELBO; subclasses define ``differentiable_loss``.

    Args:
        num_particles: The number K of draws.
        max_plate_nesting: The number of dimensions that the model's plates take; found by a run by default.
        vectorize_particles: Whether all draws run at once under an outer plate, or one after the other.  The model must
            then broadcast to the left of its plates.
        least: The smallest K that makes sense.
    """

    def __init__(
        self, num_particles: int, max_plate_nesting: float, vectorize_particles: bool = True, *, least: int = 1
    ) -> None:
        check_integers(type(self).__name__, least, num_particles=num_particles)
        check_flags(type(self).__name__, vectorize_particles=vectorize_particles)
        if max_plate_nesting != float("inf"):
            check_integers(type(self).__name__, 0, max_plate_nesting=max_plate_nesting)
        super().__init__(num_particles, max_plate_nesting, vectorize_particles=vectorize_particles)

    @abstractmethod
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss in nats, with its gradient."""

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the loss in nats, without a gradient."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the loss in nats, and add its gradient to that of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    @property
    def _rows(self) -> int:
        """The number of draws in one trace."""
        return self.num_particles if self.vectorize_particles else 1

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        """Run guide and model, and refuse latents that the guide lacks.

        The model's trace has its own copies of the latents, so that hooks on them see the model's gradient alone.
        """
        with _Apart():
            model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for name, site in model_trace.iter_stochastic_nodes():
            if name not in guide_trace.nodes and not is_point(site["fn"]):
                fault = f"latent site {name!r} of the model is not in the guide"
                way = "If it is discrete, sum it out with PathEnumELBO or in the model itself"
                raise ValueError(f"{type(self).__name__}: {fault}. {way}.")
        return model_trace, guide_trace

    def _check_reparameterised(self, guide_trace: Trace) -> None:
        for name, site in guide_trace.iter_stochastic_nodes():
            if not site["fn"].has_rsample:
                fault = f"site {name!r} of the guide has no reparameterised draws"
                way = "If it is discrete, sum it out with PathEnumELBO; else use Pyro's Trace_ELBO or RenyiELBO"
                raise ValueError(f"{type(self).__name__}: {fault}. {way}.")

    @staticmethod
    def _draws_of(guide_trace: Trace) -> dict[str, Tensor]:
        """Return the values of a guide's sites, except ``Delta`` sites, which only transform other draws."""
        sites = guide_trace.iter_stochastic_nodes()
        return {name: site["value"].detach() for name, site in sites if not isinstance(site["fn"], dist.Delta)}

    def _score(self, guide: Any, draws: dict[str, Tensor], args: Any, kwargs: Any) -> Trace:
        """Return the guide's trace at fixed draws, where its densities have the full gradient of its parameters."""
        held = poutine.condition(guide, data=draws)
        if self.vectorize_particles:
            held = self._vectorized_num_particles(held)
        trace = prune_subsample_sites(trace_of(held, args, kwargs))
        trace.compute_log_prob()
        return trace

    def _log_density(self, trace: Trace, sites: type | tuple[type, ...] = object) -> Tensor:
        """Return the log-density of each draw over the sites with a distribution of some classes, ``(rows,)``."""
        parts = [
            site["log_prob"].reshape(self._rows, -1).sum(-1)
            for site in trace.nodes.values()
            if site["type"] == "sample" and isinstance(site["fn"], sites)
        ]
        return sum(parts, torch.zeros(()))


class _Apart(Messenger):
    """Handler that gives the model copies of the guide's draws."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["done"] and not msg["is_observed"] and msg["value"].requires_grad:  # done by a replay of the guide
            msg["value"] = msg["value"].view_as(msg["value"])
