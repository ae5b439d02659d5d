"""What objectives of many draws share: they need the log-densities of model and guide draw by draw.

Pyro's ELBOs run guide and model once per particle, or once for all of them under an outer plate.
"""

from __future__ import annotations

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
from ..programs.traces import trace_of


class ParticleObjective(Trace_ELBO):
    """A loss of K draws, of which subclasses define ``differentiable_loss``.  It is a Pyro ELBO, to be used as such.

    Args:
        num_particles: The number K of draws.
        max_plate_nesting: How many dimensions the plates of the model take; by default that is found out.
        vectorize_particles: Whether draws run side by side under an outer plate, for which the model must broadcast to
            the left of its plates, or one after the other.
    """

    least_particles = 1

    def __init__(
        self, num_particles: int, max_plate_nesting: float = float("inf"), vectorize_particles: bool = True
    ) -> None:
        check_integers(type(self).__name__, self.least_particles, num_particles=num_particles)
        check_flags(type(self).__name__, vectorize_particles=vectorize_particles)
        if max_plate_nesting != float("inf"):
            check_integers(type(self).__name__, 0, max_plate_nesting=max_plate_nesting)
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )

    @abstractmethod
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss in nats, with the gradient to descend along."""

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss in nats, without a gradient."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss in nats, whose gradient is added to that of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    @property
    def _rows(self) -> int:
        """How many draws one trace holds."""
        return self.num_particles if self.vectorize_particles else 1

    def _traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> list[tuple[Trace, Trace]]:
        """Traces of model and guide that hold all K draws.

        The values of latents in the model's trace are the model's own: hooks on them see no gradient but the model's.
        """
        pairs = []
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            for name, _ in model_trace.iter_stochastic_nodes():
                if name not in guide_trace.nodes:
                    raise ValueError(
                        f"{type(self).__name__}: latent site {name!r} of the model is not in the guide.  If it is "
                        "discrete, sum it out with PathEnumELBO or in the model itself."
                    )
            pairs.append((model_trace, guide_trace))
        return pairs

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        with _Apart():
            return super()._get_trace(model, guide, args, kwargs)

    def _check_reparameterised(self, guide_trace: Trace) -> None:
        for name, site in guide_trace.iter_stochastic_nodes():
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"{type(self).__name__}: site {name!r} of the guide has no reparameterised draws.  If it is "
                    "discrete, sum it out with PathEnumELBO; else use Pyro's Trace_ELBO or RenyiELBO."
                )

    @staticmethod
    def _draws_of(guide_trace: Trace) -> dict[str, Tensor]:
        """What a guide has drawn: the values of all sites but those that only place others' draws, ``Delta``."""
        sites = guide_trace.iter_stochastic_nodes()
        return {name: site["value"].detach() for name, site in sites if not isinstance(site["fn"], dist.Delta)}

    def _score(self, guide: Any, draws: dict[str, Tensor], args: Any, kwargs: Any) -> Trace:
        """The guide's trace with its draws held, so that its densities have all of their parameters' gradient."""
        held = poutine.condition(guide, data=draws)
        if self.vectorize_particles:
            held = self._vectorized_num_particles(held)
        trace = prune_subsample_sites(trace_of(held, args, kwargs))
        trace.compute_log_prob()
        return trace

    def _log_density(self, trace: Trace, sites: type | tuple[type, ...] = object) -> Tensor:
        """The log-density of each draw in a trace, over all sites whose distribution is of a class: ``(rows,)``."""
        parts = [
            site["log_prob"].reshape(self._rows, -1).sum(-1)
            for site in trace.nodes.values()
            if site["type"] == "sample" and isinstance(site["fn"], sites)
        ]
        return sum(parts, torch.zeros(()))


class _Apart(Messenger):
    """Gives the model copies of the guide's draws, each being sampled first in the guide and then in the model."""

    def __enter__(self) -> _Apart:
        self._drawn: set[str] = set()
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._drawn and not msg["is_observed"] and msg["value"].requires_grad:
            msg["value"] = msg["value"].view_as(msg["value"])
        self._drawn.add(msg["name"])
