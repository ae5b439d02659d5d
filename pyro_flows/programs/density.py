"""The log-density of a model over unconstrained vectors z, which samplers, searches and checks need.

The vectors are those of a guide's draws: see ``placement.py``.  Guide and model both have a density over them.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from ..vjp import LogDensity
from .engines import Site, Values, in_batches
from .latents import are_equal, innermost
from .log_density import in_parts, is_breakdown, or_nan
from .masks import Mask, mask_of
from .model_and_guide import Task
from .placement import Placement, total
from .quantities import Quantities
from .runner import TOTAL, Runner


class Drawn(NamedTuple):
    """Draws of a guide.

    Attributes:
        z: The vectors, ``(N, D)``.
        log_p: The model's log-density over z, ``(N,)`` in nats.
        log_q: The guide's log-density over z.
        quantities: All numbers in the model's latents and deterministic sites, ``(N, K)``.
    """

    z: Tensor
    log_p: Tensor
    log_q: Tensor
    quantities: Tensor


class Density:
    """The log-density of a model over the unconstrained vectors of a guide.

    Args:
        task: A model and a guide of its latents, which are continuous unless they are summed out.

    Attributes:
        placement: The guide's vectors, and the model's latents at them.
        dim: The number D of coordinates.
        read: The K quantities of the model.

    Raises:
        ValueError: If the model has no latents, or a site of the guide is discrete.
    """

    def __init__(self, task: Task) -> None:
        self.task = task.settle()
        if not task.latents:
            raise ValueError("the model has no latent sites; there is nothing to judge.")
        self._nodes = task.model.single.nodes
        self.placement = Placement(task.guide, task.own, task.latents, self._nodes)
        self.dim, self.read = self.placement.dim, Quantities(self._nodes, task.latents, task.model.enumerated)

    @classmethod
    def sound(cls, task: Task) -> Density:
        """Return a density, or raise ValueError if the guide's draws cannot be weighed or have no density."""
        found = cls(task.check())
        found.placement.verify()
        return found

    @torch.no_grad()
    def draw(self, number: int, batch_size: int = 1000) -> Drawn:
        """Return draws of the guide with their densities and quantities, found ``batch_size`` at a time."""

        def step(_: Values, size: int) -> Values:
            z, log_q, placed = self.placement.draw(size)
            scores = self._score(placed.latents, size)
            log_p = scores[TOTAL] + placed.log_det + self.placement.of_hidden(z)
            quantities = self.read.numbers({**placed.latents, **scores})
            return {"z": z, "log_p": log_p, "log_q": log_q, "quantities": quantities}

        return Drawn(**in_batches(step, {}, number, batch_size))

    def _score(self, latents: Values, size: int) -> Values:
        """Return the model's log-density of N draws, ``TOTAL``, -inf where it breaks down, and deterministic sites."""
        try:
            return self.task.model.score(latents, size, self.read.derived)
        except Exception as error:
            if not is_breakdown(error):
                raise
        if size == 1:
            derived = {name: self._nodes[name]["value"].unsqueeze(0) for name in self.read.derived}
            return {TOTAL: torch.full((1,), -math.inf).to(next(iter(latents.values()))), **derived}
        return in_batches(self._score, latents, size, (size + 1) // 2)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the model's log-density over z, ``(N, D) -> (N,)`` in nats, NaN where the model breaks down.

        Draws of a model of many data are scored in parts; the gradient then has no second derivatives.
        """
        return or_nan(self.in_parts(self._log_prob))(z)

    def in_parts(self, density: LogDensity) -> LogDensity:
        """Return a log-density that runs the model, and finds its gradient part by part."""
        return in_parts([density], self.task.model.chunk, self.task.model.threads)

    def _log_prob(self, z: Tensor) -> Tensor:
        placed = self.placement.place(z)
        return self.task.model.log_prob(placed.latents, len(z)) + placed.log_det + self.placement.of_hidden(z)

    def log_prior_and_prob(self, z: Tensor, prior: Runner | None = None) -> tuple[Tensor, Tensor]:
        """Return the log-densities over z, each ``(N,)`` in nats, of the prior and of the model.

        The prior leaves out the latents whose priors are flat.

        Args:
            z: The vectors.
            prior: The model without its data, if discrete latents are summed out; None to read both off one run.
        """
        placed, model = self.placement.place(z), self.task.model
        names = {*self.task.latents} - {*self.flat}
        if prior is None:
            both = model.run(
                lambda view: {"p": view.log_prob(), "prior": view.log_prob(names.__contains__)}, placed.latents, len(z)
            )
            log_p, log_prior = both["p"], both["prior"]
        else:
            log_p, log_prior = (program.log_prob(placed.latents, len(z)) for program in (model, prior))
        proper = total(change for name, change in placed.changes.items() if name not in self.flat)
        of_hidden = self.placement.of_hidden(z)
        return log_prior + proper + of_hidden, log_p + placed.log_det + of_hidden

    def constrain(self, z: Tensor) -> Values:
        """Return the model's latents at z: each ``(N, *shape)``."""
        return self.placement.place(z).latents

    @torch.no_grad()
    def values(self, z: Tensor) -> Values:
        """Return the model's latents and deterministic sites at z: each ``(N, *shape)``."""
        latents, derived = self.constrain(z), self.read.derived
        found = self._score(latents, len(z)) if derived else {}
        return {**latents, **{name: found[name] for name in derived}}

    @torch.no_grad()
    def complete(self, z: Tensor, batch_size: int) -> Values:
        """Return latents and all deterministic sites at z; latents that are summed out are drawn given the others."""
        latents = in_batches(lambda held, _: self.constrain(held["z"]), {"z": z}, len(z), batch_size)
        return self.task.values(latents, batch_size)

    @torch.no_grad()
    def quantities(self, z: Tensor) -> Tensor:
        """Return all numbers of :meth:`values`, ``(N, K)``."""
        return self.read.numbers(self.values(z))

    @functools.cached_property
    def _angles(self) -> Tensor:
        """True for the coordinates that are angles in radians, ``(D,)``."""
        known = getattr(self.task.guide.call, "has_circles", False)
        turning = self.read.angles if known else self.read.plain_angles
        return torch.tensor([name in turning for name in self.placement.coordinates])

    def wrapped(self, z: Tensor, loc: Tensor) -> Tensor:
        """Return vectors z with angles within half a turn of ``loc``: angles are the same after a whole turn."""
        turned = (z - loc + math.pi).remainder(2 * math.pi) - math.pi + loc
        return z.where(~self._angles.to(z.device), turned)

    @functools.cached_property
    def flat(self) -> list[str]:
        """The latents with improper priors, and with priors whose density is scaled or masked."""
        placed = self.task.guide.single.nodes
        return [name for name in self.task.latents if _is_flat(self._nodes[name], mask_of(placed[name]))]

    @torch.no_grad()
    def prior(self, z: Tensor) -> Tensor:
        """Return draws of the prior, as many as there are vectors z; latents with flat priors stay.

        Draws are NaN where the model breaks down, and all of them if the vectors of latents are unknown for this guide.
        """

        def drawn(z: Tensor) -> Tensor:
            latents = self.constrain(z)
            held = {name: latents[name] for name in self.flat}
            found = self.task.model.sample(lambda view: {name: view.read(name) for name in latents}, held, len(z))
            located = self.placement.located(found)
            return z * math.nan if located is None else self.placement.noised(located)

        return or_nan(drawn, self.dim)(z)


def _is_flat(site: Site, drawn: Mask) -> bool:
    """True if a latent's prior is improper, or its density is scaled, or masked where that of its guide is not."""
    scaled = site["scale"] is not None and bool((torch.as_tensor(site["scale"]) != 1).any())
    masked = mask_of(site).hides and not are_equal(mask_of(site), drawn)
    return scaled or isinstance(innermost(site["fn"]), dist.ImproperUniform) or masked
