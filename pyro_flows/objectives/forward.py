"""The inclusive divergence KL(p ‖ q) = -E_p [log q(z)] + const, which covers all of the posterior p that is found.

Expectations under p are those of the guide's own past draws, weighed by w = p(z, x) / q_old(z).  Old draws cost
nothing, so they are kept for replay: a step trains on draws that are picked from the buffer in proportion to their
weights, which stay right whatever the guide becomes.  Cut off at √n times their mean, their noise is bounded.

Flow Annealed Importance Sampling Bootstrap (Midgley, Stimper, Simm, Schölkopf, Hernández-Lobato 2022,
arXiv:2208.01893), without the annealing and, since it is p and not p²/q that weights aim at, without a correction for
the guide's age; Truncated Importance Sampling (Ionides 2008).
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..arguments import check_integers
from ..programs.latents import check_drawn
from .particles import ParticleObjective


class ForwardKL(ParticleObjective):
    """The inclusive divergence KL(p ‖ q), which covers all of the posterior that is found, by weighed, replayed draws.

    The loss, in nats, is a mean over draws z of the guide, past and present, by their weights::

        loss ≈ E_p [log p(z, x) - log q(z)],    w = p(z, x) / q_old(z), at most √n times their mean

    It is never below the log-evidence, and equal to it where the guide is the posterior.  As long as draws do not reach
    all of the posterior it comes out too low, so losses of different steps are not comparable.  After Midgley, Stimper,
    Simm, Schölkopf, Hernández-Lobato 2022, arXiv:2208.01893.

    Draws are kept as long as model, guide and data are the same objects.  Only the guide is trained, not the model's
    parameters.  The guide need not be reparameterised, but what it draws must be scored by densities alone: a
    ``Delta`` whose place depends on parameters is refused.

    Args:
        num_particles: How many draws are taken and how many are replayed in each step, at least 2.
        buffer_size: How many draws are kept, at least ``num_particles``.
        max_plate_nesting: How many dimensions the plates of the model take; by default that is found out.

    Raises:
        ValueError: If a number is out of its range; and in use, naming the plate or site, if the model subsamples, a
            latent is not in the guide or moves with its parameters, or the model's density is finite at no draw.

    Example::

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> def model():
        ...     pyro.sample("x", dist.Normal(2.0, 1.0))
        >>> guide = AutoFlow(model, init_scale=1.0).setup()  # it starts at the posterior, about
        >>> abs(ForwardKL().loss(model, guide)) < 0.1  # from the log-evidence, which is 0 without data
        True
    """

    least_particles = 2
    settled = False

    def __init__(
        self, num_particles: int = 128, buffer_size: int = 10_000, max_plate_nesting: float = float("inf")
    ) -> None:
        super().__init__(num_particles, max_plate_nesting)
        check_integers("ForwardKL", buffer_size=buffer_size)
        if buffer_size < num_particles:
            raise ValueError(f"ForwardKL: buffer_size must be at least num_particles, got {buffer_size}.")
        self.buffer_size = buffer_size
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._posterior: tuple[Any, ...] = ()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._forget_others((model, guide, *args, *kwargs, *kwargs.values()))
        if torch.is_grad_enabled() or not self._kept:
            self._draw(model, guide, args, kwargs)
        scores = self._kept["scores"]
        picked = torch.multinomial(_truncated(scores["log_p"] - scores["log_q"]), self.num_particles, replacement=True)
        held = {name: value[picked] for name, value in self._kept["draws"].items()}
        trace = self._score(guide, held, args, kwargs)
        _check_held(trace)
        return (scores["log_p"][picked] - self._log_density(trace)).mean()

    def _forget_others(self, posterior: tuple[Any, ...]) -> None:
        """Keep no draws of another guide, or that were weighed for another model or other data."""
        same = len(posterior) == len(self._posterior) and all(map(_is_same, posterior, self._posterior))
        if self._posterior and not same:
            self._kept = {}
        self._posterior = posterior

    @torch.no_grad()
    def _draw(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """Put new draws of the guide, with the log-densities of model and guide, in front of those kept."""
        ((model_trace, guide_trace),) = self._traces(model, guide, args, kwargs)
        check_drawn("ForwardKL: ", model_trace, guide_trace)
        _check_whole(model_trace)
        scores = {"log_p": self._log_density(model_trace), "log_q": self._log_density(guide_trace)}
        new = {"draws": self._draws_of(guide_trace), "scores": scores}
        self._kept = {
            kind: {
                name: torch.cat((tensor, self._kept[kind][name]))[: self.buffer_size] if self._kept else tensor
                for name, tensor in tensors.items()
            }
            for kind, tensors in new.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The draws that are kept."""
        return {kind: dict(tensors) for kind, tensors in self._kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the draws of a :meth:`state_dict`, whatever they were weighed for."""
        self._kept = {kind: dict(tensors) for kind, tensors in state.items()}
        self._posterior = ()


def _is_same(left: Any, right: Any) -> bool:
    """Whether two arguments are one: tensors by the memory that they show, methods and plain values by equality."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        views = [(x.data_ptr(), x.dtype, x.shape, x.stride(), x._version) for x in (left, right)]
        return left is right or views[0] == views[1]
    return left is right or (isinstance(left, MethodType | int | float | str) and left == right)


def _truncated(log_weights: Tensor) -> Tensor:
    """Weights up to a factor, ``(n,)``, none above √n times their mean; draws whose density is not finite have none."""
    usable = log_weights.isfinite()
    if not usable.any():
        raise ValueError("ForwardKL: the model's log-density is finite at no draw of the guide; start it elsewhere.")
    log_weights = log_weights.where(usable, -math.inf)
    log_mean = torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
    return (log_weights - log_mean).clamp_max(math.log(len(log_weights)) / 2).exp()


def _check_whole(trace: Trace) -> None:
    """Refuse subsamples, against which draws would be weighed anew each time."""
    for name, site in trace.nodes.items():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size is not None and frame.size < frame.full_size:
                raise ValueError(
                    f"ForwardKL: site {name!r} lies in plate {frame.name!r}, which is subsampled ({frame.size} of "
                    f"{frame.full_size} rows); draws are weighed once and for all.  Let the plate run over all rows."
                )


def _check_held(trace: Trace) -> None:
    """Refuse sites that still move with the parameters when all draws are held."""
    for name, site in trace.iter_stochastic_nodes():
        if isinstance(site["value"], Tensor) and site["value"].requires_grad:
            raise ValueError(
                f"ForwardKL: site {name!r} of the guide moves with its parameters for given draws, so its density is "
                "not known there; use a guide that draws from densities, such as AutoFlow."
            )
