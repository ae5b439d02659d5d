"""The space in which a guide draws, and the densities of guide and model there.

A guide's own draws are its sites but those that only place others' draws, ``Delta``: one packed vector for Pyro's
``AutoContinuous``, a site for each latent in ``AutoNormal`` or a guide written by hand.  Unconstrained and packed they
are a vector z, over which both guide and model have a density: what samplers and searches need.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.utils import _sum_rightmost
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from .engines import Read, Site, Values, View
from .latents import support_of
from .log_density import LogDensity, in_parts, is_breakdown
from .masks import mask_of
from .program import Program
from .quantities import Quantities, innermost
from .task import Task, in_batches


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


class LatentSpace:
    """The unconstrained space of a guide's own draws.

    Args:
        task: A model and a guide of its latents, all continuous but those that are summed out.

    Attributes:
        dim: The number D of coordinates.
        read: What a person reads off the model: the K quantities.

    Raises:
        ValueError: If the model has no latents, or a site of the guide is discrete.
    """

    def __init__(self, task: Task) -> None:
        self.task = task.settle()
        if not task.latents:
            raise ValueError("the model has no latent sites; there is nothing to judge.")
        self._own: dict[str, Transform] = {}  # constrains what the guide draws at a site
        self._free: Values = {}  # what it drew in its single run, unconstrained
        for name in task.own:
            site = task.guide.single.nodes[name]
            if site["fn"].support.is_discrete:
                raise ValueError(f"site {name!r} of the guide is discrete; leave it out, and it is summed out.")
            self._own[name] = biject_to(site["fn"].support)
            self._free[name] = self._own[name].inv(site["value"])
        self.dim = sum(free.numel() for free in self._free.values())
        self.read = Quantities(task)

    @torch.no_grad()
    def verify(self) -> None:
        """Refuse guides whose density over z is not what it seems.

        Raises:
            ValueError: If a support of the guide depends on its other draws, or it draws noise that places no latent.
        """
        guide, first = self.task.guide, self.task.guide.single.nodes

        def moved(view: View) -> Values:
            nodes = view.trace.nodes
            return {name: biject_to(nodes[name]["fn"].support)(free) for name, free in self._free.items()}

        for name, there in guide.alone(moved, 1).items():
            value = first[name]["value"]
            if there[0].shape != value.shape or not torch.allclose(there[0], value, rtol=1e-4, atol=1e-6):
                raise ValueError(f"the support of the guide's site {name!r} depends on its other draws.")
        sites = [self.task.model.single.nodes[name] for name in self.task.latents]
        free = sum(biject_to(support_of(site["fn"])).inv(site["value"]).numel() for site in sites)
        if free != self.dim:
            raise ValueError(
                f"the guide draws {self.dim} numbers for latents of {free}; with auxiliary draws it has no density."
            )

    @torch.no_grad()
    def draw(self, number: int, batch_size: int = 1000) -> Scored:
        """Draws of the guide and what is known of them, ``batch_size`` at a time."""

        def step(_: Values, size: int) -> Values:
            found = self.task.guide.sample(self._scored, {}, size)
            free = {name: transform.inv(found[f"own {name}"]) for name, transform in self._own.items()}
            change, latents = self._change(free, found), self._latents(found)
            log_p, derived = self._score(latents, size)
            z = torch.cat([part.reshape(size, -1) for part in free.values()], -1)
            scores = {"log_p": log_p - found["rest"] + change, "log_q": found["log_q"] + change}
            return {"z": z, **scores, "quantities": self.read.numbers({**latents, **derived})}

        return Scored(**in_batches(step, {}, number, batch_size))

    @torch.no_grad()
    def draw_alone(self, number: int, batch_size: int) -> Tensor:
        """Draws of the guide without a run of the model, ``(number, D)``."""

        def step(_: Values, size: int) -> Values:
            found = self.task.guide.sample(lambda view: {name: view.read(name) for name in self._own}, {}, size)
            free = [transform.inv(found[name]).reshape(size, -1) for name, transform in self._own.items()]
            return {"z": torch.cat(free, -1)}

        return in_batches(step, {}, number, batch_size)["z"]

    def _score(self, latents: Values, size: int) -> tuple[Tensor, Values]:
        """The model's log-density of N draws, ``(N,)``, and its deterministic sites; -inf where it breaks down."""
        try:
            return self.task.model.score(latents, size, self.read.derived)
        except (ValueError, LinAlgError, FloatingPointError) as error:
            if not is_breakdown(error):
                raise
        if size == 1:
            known = self.task.model.single.nodes
            derived = {name: known[name]["value"].unsqueeze(0) for name in self.read.derived}
            return torch.full((1,), -math.inf).to(next(iter(latents.values()))), derived
        half = size // 2
        first, first_derived = self._score({name: value[:half] for name, value in latents.items()}, half)
        second, second_derived = self._score({name: value[half:] for name, value in latents.items()}, size - half)
        derived = {name: torch.cat((first_derived[name], second_derived[name])) for name in self.read.derived}
        return torch.cat((first, second)), derived

    def log_p(self, z: Tensor) -> Tensor:
        """The model's log-density over z, ``(N, D) -> (N,)`` in nats.

        Draws of a model of much data are scored in parts, whose gradient has none of its own.
        """
        return self.in_parts(self._log_p)(z)

    def in_parts(self, density: LogDensity) -> LogDensity:
        """Return a log-density that runs the model, and finds its gradient part by part."""
        return in_parts(density, self.task.model.chunk, self.task.model.threads)

    def _log_p(self, z: Tensor) -> Tensor:
        found, change = self._place(z)
        return self.task.model.log_prob(self._latents(found), len(z)) - found["rest"] + change

    def log_prior_and_p(self, z: Tensor, prior: Program | None = None) -> tuple[Tensor, Tensor]:
        """The log-densities over z, each ``(N,)`` in nats, of the prior without latents whose priors are flat, and of
        the model.

        Args:
            z: The vectors.
            prior: The model without its data, where discrete latents are summed out; None to read both off one run.
        """
        flat, latents = self.flat, self.task.latents

        def scored(view: View) -> Values:
            return {"p": view.log_prob(), "prior": view.log_prob(lambda n: n in latents and n not in flat)}

        found, change = self._place(z)
        values, model = self._latents(found), self.task.model
        if prior is None:
            both = model.run(scored, values, len(z))
            log_p, log_prior = both["p"], both["prior"]
        else:
            log_p, log_prior = (program.log_prob(values, len(z)) for program in (model, prior))
        of_flat = found["flat change"] - found["flat"]
        return log_prior - found["rest"] + change - of_flat, log_p - found["rest"] + change

    def log_q(self, z: Tensor) -> Tensor:
        """The guide's log-density over z, ``(N, D) -> (N,)`` in nats."""
        found, change = self._place(z, self._scored)
        return found["log_q"] + change

    def latents(self, z: Tensor) -> Values:
        """The model's latents at z: for each ``(N, *shape)``."""
        return self._latents(self._place(z)[0])

    @torch.no_grad()
    def values(self, z: Tensor) -> Values:
        """The model's latents and deterministic sites at z: for each ``(N, *shape)``."""
        latents = self.latents(z)
        derived = self.task.model.score(latents, len(z), self.read.derived)[1] if self.read.derived else {}
        return {**latents, **derived}

    @torch.no_grad()
    def drawn_back(self, z: Tensor, batch_size: int) -> Values:
        """The model's latents and all its deterministic sites at z, discrete latents that are summed out drawn back."""
        parts = [self.latents(part) for part in z.split(batch_size)]
        latents = {name: torch.cat([part[name] for part in parts]) for name in self.task.latents}
        return self.task.values(latents, batch_size)

    @torch.no_grad()
    def quantities(self, z: Tensor) -> Tensor:
        """All numbers that :meth:`values` holds, ``(N, K)``."""
        return self.read.numbers(self.values(z))

    @functools.cached_property
    def coordinates(self) -> list[str]:
        """The latent that each of the coordinates belongs to; where that is not known, the guide's own site."""
        guide: Any = self.task.guide.call
        if isinstance(guide, AutoContinuous):
            return [name for name, shape in guide._unconstrained_shapes.items() for _ in range(shape.numel())]
        sites = {f"{name}_unconstrained": name for name in self.task.latents}
        return [sites.get(name, name) for name, free in self._free.items() for _ in range(free.numel())]

    @functools.cached_property
    def _angles(self) -> Tensor:
        """Which of the coordinates are angles in radians, ``(D,)``."""
        known = getattr(self.task.guide.call, "has_circles", False)
        turning = self.read.angles if known else self.read.plain_angles
        return torch.tensor([name in turning for name in self.coordinates])

    def wrapped(self, z: Tensor, loc: Tensor) -> Tensor:
        """Vectors z with angles within half a turn of ``loc``: copies a turn away are the same place."""
        turned = (z - loc + math.pi).remainder(2 * math.pi) - math.pi + loc
        return z.where(~self._angles.to(z.device), turned)

    @functools.cached_property
    def flat(self) -> list[str]:
        """The latents with priors that cannot be drawn, or that count otherwise than they are drawn."""
        sites = {name: self.task.model.single.nodes[name] for name in self.task.latents}
        return [name for name, site in sites.items() if _is_flat(site)]

    @torch.no_grad()
    def outside(self, latents: Values) -> Tensor:
        """Which of N draws of the model's latents a guide that draws these itself cannot draw, ``(N,)``."""
        number = len(next(iter(latents.values())))
        found = torch.zeros(number, dtype=torch.bool)
        for name in self._own.keys() & latents.keys():
            fn = self.task.guide.single.nodes[name]["fn"]
            found |= ~fn.support.check(latents[name]).reshape(number, -1).all(-1).cpu()
        return found

    @torch.no_grad()
    def prior(self, z: Tensor) -> Tensor | None:
        """Draws of the prior, as many as there are vectors z; latents with flat priors stay.

        None for guides that place their draws in ways unknown, and where the model breaks down at one.
        """
        model = self.task.model
        try:
            latents = self._latents(self._place(z)[0])
            held = {name: latents[name] for name in self.flat}
            drawn = model.sample(lambda view: {name: view.read(name) for name in self.task.latents}, held, len(z))
        except (ValueError, LinAlgError) as error:
            if not is_breakdown(error):
                raise
            return None
        return self._locate(drawn)

    def _placing(self, view: View) -> Values:
        """Read off a run of the guide: its own draws, the latents that they place, and all changes of variables."""
        drawn = {f"own {name}": view.read(name) for name in self._own}
        placed = {f"latent {name}": view.read(name) for name in self.task.latents}
        rest = {
            "rest": view.log_prob(lambda name: name not in self._own),
            "flat": view.log_prob(self.flat.__contains__),
        }
        return {**drawn, **placed, **rest}

    def _scored(self, view: View) -> Values:
        """Read off the log-density of the guide's own draws too."""
        return {**self._placing(view), "log_q": view.log_prob(self._own.__contains__)}

    def _latents(self, found: Values) -> Values:
        return {name: found[f"latent {name}"] for name in self.task.latents}

    def _place(self, z: Tensor, read: Read | None = None) -> tuple[Values, Tensor]:
        """Run the guide with its draws held at z; also the log-determinant of constraining these."""
        if read is None and self._packed:
            return self._unpacked(z), torch.zeros(())
        parts = zip(self._free.items(), z.split([free.numel() for free in self._free.values()], -1), strict=True)
        free = {name: part.reshape(len(z), *one.shape) for (name, one), part in parts}
        held = {name: transform(free[name]) for name, transform in self._own.items()}
        found = self.task.guide.run(read or self._placing, held, len(z))
        flat = {name: part for name, part in free.items() if name in self.flat}
        return {**found, "flat change": self._change(flat, found)}, self._change(free, found)

    @functools.cached_property
    def _packed(self) -> dict[str, tuple[torch.Size, Transform]]:
        """The shape and the constraint of each latent in the vector of an ``AutoContinuous``; empty for other guides.

        It takes no run of the guide to place latents by them, where that gives what a run does.
        """
        guide: Any = self.task.guide.call
        if not isinstance(guide, AutoContinuous) or {*guide._unconstrained_shapes} != {*self.task.latents}:
            return {}
        ((_, latent),) = self._free.items()
        nodes, z = guide.prototype_trace.nodes, latent.reshape(1, -1)
        known = {n: (shape, biject_to(nodes[n]["fn"].support)) for n, shape in guide._unconstrained_shapes.items()}
        z = torch.cat((z, z + torch.arange(1.0, 1 + self.dim).to(z).cos() / 10))  # without a draw: seeds go on
        with torch.no_grad():
            run, _ = self._place(z, self._placing)
            try:
                found = self._unpacked(z, known)
            except RuntimeError:
                return {}
        same = all(
            value.shape == run[name].shape and torch.allclose(value, run[name].to(value), 1e-4, 1e-6, equal_nan=True)
            for name, value in found.items()
            if name != "flat change"
        )
        return known if same else {}

    def _unpacked(self, z: Tensor, known: dict[str, tuple[torch.Size, Transform]] | None = None) -> Values:
        """Place the latents of an ``AutoContinuous`` at packed vectors, as :meth:`_place` does."""
        found, rest, flat = {}, z.new_zeros(len(z)), z.new_zeros(len(z))
        known = known or self._packed
        for (name, (shape, transform)), part in zip(
            known.items(), z.split([shape.numel() for shape, _ in known.values()], -1), strict=True
        ):
            free = part.reshape(len(z), *shape)
            value = transform(free)
            log_det = transform.log_abs_det_jacobian(free, value).reshape(len(z), -1).sum(-1)
            found[f"latent {name}"], rest = value, rest - log_det
            flat = flat - log_det if name in self.flat else flat
        return {**found, f"own {next(iter(self._own))}": z, "rest": rest, "flat": flat, "flat change": torch.zeros(())}

    def _change(self, free: Values, found: Values) -> Tensor:
        """The log-determinant of constraining what the guide draws at some sites."""
        total = torch.zeros(())
        for name, part in free.items():
            log_det = self._own[name].log_abs_det_jacobian(part, found[f"own {name}"])
            total = total + _sum_rightmost(log_det, log_det.dim() - 1)
        return total

    def _locate(self, values: Values) -> Tensor | None:
        """The vectors at which the latents take values ``(N, *shape)``: the way back of :meth:`values`."""
        groups: dict[str, list[Tensor]] = {name: [] for name in self._own}
        guide: Any = self.task.guide.call
        if hasattr(guide, "pack"):
            z, _ = guide.pack(values, *self.task.guide.args, **self.task.guide.kwargs)
            return z if z.shape[1:] == (self.dim,) else None
        prototype = getattr(guide, "prototype_trace", None)
        for name, value in values.items():
            if name in groups:  # the guide draws the latent itself
                own, transform = name, self._own[name]
            elif prototype is None or "fn" not in prototype.nodes.get(name, ()):
                return None
            else:  # AutoContinuous packs all latents into one site
                own = next(iter(groups)) if isinstance(guide, AutoContinuous) else f"{name}_unconstrained"
                transform = biject_to(prototype.nodes[name]["fn"].support)
            if own not in groups:
                return None
            groups[own].append(transform.inv(value))
        z = torch.cat([part.reshape(len(part), -1) for group in groups.values() for part in group], -1)
        return z if z.shape[1] == self.dim else None


def _is_flat(site: Site) -> bool:
    """Whether a latent has a prior that cannot be drawn, or that counts otherwise than it is drawn."""
    scaled = site["scale"] is not None and bool((torch.as_tensor(site["scale"]) != 1).any())
    return scaled or isinstance(innermost(site["fn"]), dist.ImproperUniform) or mask_of(site).hides


def sound_space(task: Task) -> LatentSpace:
    """The space of a guide that is one of the model and has a density; others are refused."""
    space = LatentSpace(task.check())
    space.verify()
    return space
