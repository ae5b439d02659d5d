"""The space in which a guide draws, and the densities of guide and model there.

A guide's own draws are its sites but those that only place others' draws, ``Delta``: one packed vector for Pyro's
``AutoContinuous``, a site for each latent in ``AutoNormal`` or a guide written by hand.  Unconstrained and packed they
are a vector z, over which both guide and model have a density: what samplers and searches need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.utils import _sum_rightmost
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from .alongside import log_prob_of_draws, room_of, side_by_side
from .draws import check_guide, check_side_by_side, check_trained, single_trace
from .log_density import is_breakdown
from .noise import warn_of_noise
from .quantities import Quantities, innermost


class Scored(NamedTuple):
    """Draws of a guide.

    Attributes:
        z: The vectors, ``(N, D)``.
        log_p: The model's log-density over z, ``(N,)`` in nats.
        log_q: The guide's.
        quantities: All numbers that the model's latents and deterministic sites hold, ``(N, K)``.
    """

    z: Tensor
    log_p: Tensor
    log_q: Tensor
    quantities: Tensor


class Space:
    """The unconstrained space of a guide's own draws.

    Args:
        model: A Pyro model.
        guide: A Pyro guide of the same latents, all continuous.
        args: The model's arguments.
        kwargs: Its keyword arguments.

    Attributes:
        dim: The number D of coordinates.
        read: What a person reads off the model: the K quantities.

    Raises:
        ValueError: If the model has no latents, or a site of the guide is discrete.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        single, trace, self.nesting = single_trace(model, guide, args, kwargs)
        self._single = prune_subsample_sites(single)
        self._latents = [name for name, _ in self._single.iter_stochastic_nodes()]
        if not self._latents:
            raise ValueError("the model has no latent sites; there is nothing to judge.")
        self._own: dict[str, _Own] = {}
        for name, site in prune_subsample_sites(trace).iter_stochastic_nodes():
            if isinstance(site["fn"], dist.Delta):
                continue
            if site["fn"].support.is_discrete:
                raise ValueError(f"site {name!r} of the guide is discrete; sum it out of model and guide.")
            transform = biject_to(site["fn"].support)
            self._own[name] = _Own(transform, transform.inv(site["value"]).shape, room_of(site, self.nesting))
        self.dim = sum(own.shape.numel() for own in self._own.values())
        self.read = Quantities(model, self._single, args, kwargs)

    @torch.no_grad()
    def verify(self) -> None:
        """Refuse guides whose density over z is not what it seems.

        Raises:
            ValueError: If a support of the guide depends on its other draws, or it draws noise that places no latent.
        """
        with poutine.block():
            first, second = (poutine.trace(self.guide).get_trace(*self.args, **self.kwargs) for _ in range(2))
        for name, own in self._own.items():
            value = first.nodes[name]["value"]
            there = biject_to(second.nodes[name]["fn"].support)(own.transform.inv(value))
            if there.shape != value.shape or not torch.allclose(there, value, rtol=1e-4, atol=1e-6):
                raise ValueError(f"the support of the guide's site {name!r} depends on its other draws.")
        sites = [self._single.nodes[name] for name in self._latents]
        free = sum(biject_to(site["fn"].support).inv(site["value"]).numel() for site in sites)
        if free != self.dim:
            raise ValueError(
                f"the guide draws {self.dim} numbers for latents of {free}; with auxiliary draws it has no density."
            )

    @torch.no_grad()
    def draw(self, number: int, batch_size: int = 1000) -> Scored:
        """Draws of the guide and what is known of them, ``batch_size`` at a time."""
        batches = []
        for size in [batch_size] * (number // batch_size) + [number % batch_size] * (number % batch_size > 0):
            with poutine.block():
                placed = poutine.trace(self._beside(self.guide, size)).get_trace(*self.args, **self.kwargs)
            parts = {n: own.transform.inv(placed.nodes[n]["value"]) for n, own in self._own.items()}
            rows = [part.reshape(-1, self._own[n].shape.numel()).expand(size, -1) for n, part in parts.items()]
            change = self._change(parts, placed, size)
            scored = self._follow(placed, size)
            log_q = log_prob_of_draws(placed, size, self.nesting, self._own.__contains__) + change
            log_p = self._log_p(placed, scored, change)
            batches.append(Scored(torch.cat(rows, -1), log_p, log_q, self.read.numbers(scored, size)))
        return Scored(*(torch.cat(column) for column in zip(*batches, strict=True)))

    def log_p(self, z: Tensor) -> Tensor:
        """The model's log-density over z, ``(N, D) -> (N,)`` in nats."""
        placed, change = self._place(z)
        return self._log_p(placed, self._follow(placed, len(z)), change)

    def log_q(self, z: Tensor) -> Tensor:
        """The guide's log-density over z, ``(N, D) -> (N,)`` in nats."""
        placed, change = self._place(z)
        return log_prob_of_draws(placed, len(z), self.nesting, self._own.__contains__) + change

    @torch.no_grad()
    def values(self, z: Tensor) -> dict[str, Tensor]:
        """The model's latents and deterministic sites at z: for each ``(N, *shape)``."""
        return self.read.values(self._follow(self._place(z)[0], len(z)), len(z))

    @torch.no_grad()
    def quantities(self, z: Tensor) -> Tensor:
        """All numbers that :meth:`values` holds, ``(N, K)``."""
        return self.read.numbers(self._follow(self._place(z)[0], len(z)), len(z))

    @torch.no_grad()
    def prior(self, z: Tensor) -> Tensor | None:
        """Draws of the prior, as many as there are vectors z; latents with flat priors, which cannot be drawn, stay.

        None for guides that place their draws in ways unknown, and where the model breaks down at one.
        """
        size, held = len(z), {}
        try:
            for name, value in self.values(z).items():
                site = self._single.nodes[name]
                if name in self._latents and isinstance(innermost(site["fn"]), dist.ImproperUniform):
                    held[name] = value.reshape(size, *room_of(site, self.nesting), *site["value"].shape)
            with poutine.block():
                model = poutine.condition(self._beside(self.model, size), data=held)
                trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        except (ValueError, LinAlgError) as error:
            if not is_breakdown(error):
                raise
            return None
        values = self.read.values(trace, size)
        return self._locate({name: values[name] for name in self._latents})

    def _beside(self, program: Callable[..., Any], size: int) -> Callable[..., Any]:
        return side_by_side(program, size, self.nesting)

    def _place(self, z: Tensor) -> tuple[Trace, Tensor]:
        """The guide's trace with its draws held at z, and the log-determinant of constraining these."""
        size, start, parts, held = len(z), 0, {}, {}
        for name, own in self._own.items():
            stop = start + own.shape.numel()
            parts[name] = z[:, start:stop].reshape(size, *own.room, *own.shape)
            held[name] = own.transform(parts[name])
            start = stop
        with poutine.block():
            guide = poutine.condition(self._beside(self.guide, size), data=held)
            placed = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        return placed, self._change(parts, placed, size)

    def _change(self, parts: dict[str, Tensor], placed: Trace, size: int) -> Tensor:
        total = torch.zeros(())
        for name, part in parts.items():
            log_det = self._own[name].transform.log_abs_det_jacobian(part, placed.nodes[name]["value"])
            total = total + _sum_rightmost(log_det.expand(size, *log_det.shape[1:]), log_det.dim() - 1)
        return total

    def _follow(self, placed: Trace, size: int) -> Trace:
        """The model's trace where the guide has placed its latents."""
        latents = {name: placed.nodes[name]["value"] for name in self._latents}
        with poutine.block():
            model = poutine.condition(self._beside(self.model, size), data=latents)
            return poutine.trace(model).get_trace(*self.args, **self.kwargs)

    def _log_p(self, placed: Trace, scored: Trace, change: Tensor) -> Tensor:
        size = max(change.shape, default=1)
        rest = log_prob_of_draws(placed, size, self.nesting, lambda name: name not in self._own)  # changes of variables
        return log_prob_of_draws(scored, size, self.nesting) - rest + change

    def _locate(self, values: dict[str, Tensor]) -> Tensor | None:
        """The vectors at which the latents take values ``(N, *shape)``: the way back of :meth:`values`."""
        groups: dict[str, list[Tensor]] = {name: [] for name in self._own}
        prototype = getattr(self.guide, "prototype_trace", None)
        for name, value in values.items():
            if name in groups:  # the guide draws the latent itself
                groups[name].append(self._own[name].transform.inv(value))
            elif prototype is None or "fn" not in prototype.nodes.get(name, ()):
                return None
            else:
                free = biject_to(prototype.nodes[name]["fn"].support).inv(value)
                own = f"{name}_unconstrained"  # AutoNormal's
                if isinstance(self.guide, AutoContinuous):
                    (own,) = groups  # all are packed into one
                if own not in groups:
                    return None
                groups[own].append(free)
        z = torch.cat([part.reshape(len(part), -1) for group in groups.values() for part in group], -1)
        return z if z.shape[1] == self.dim else None


def sound_space(
    caller: str, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Space:
    """The space of a guide that was trained, is one of the model, and has a density; others are refused."""
    check_trained(caller, guide)
    check_guide(model, guide, args, kwargs)
    space = Space(model, guide, args, kwargs)
    warn_of_noise(check_side_by_side(model, guide, args, kwargs))
    space.verify()
    return space


class _Own(NamedTuple):
    """A site that a guide draws: how to constrain it, its unconstrained shape, and room for plates it lies not in."""

    transform: Transform
    shape: torch.Size
    room: tuple[int, ...]
