"""The unconstrained space of a guide's draws, and the densities of guide and model over it.

A guide draws its sites except those of type ``Delta``, which only place the values of other sites.  These are one
packed vector for Pyro's ``AutoContinuous``, and one site per latent in ``AutoNormal`` or in a guide written by hand.
Unconstrained and packed they are a vector z, over which guide and model both have a density.  Samplers and searches
need that.  What a mask hides in a site of the guide's own counts in neither density: there both are standard normal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import Transform, biject_to

from ..vjp import LogDensity
from .engines import Site, Values, View, in_batches
from .latents import are_equal, innermost, support_of
from .log_density import in_parts, is_breakdown, or_nan
from .masks import Mask, among_absent, mask_of, present_of
from .model_and_guide import Task
from .quantities import Quantities
from .runner import TOTAL, Runner

OWN = "log q of own sites"  # not the name of a site
CHANGE = "change of "  # prefix of a site's name


class Part(NamedTuple):
    """A site in a packed vector.

    Attributes:
        shape: The shape of its unconstrained values.
        transform: Its constraint.
        mask: True for the numbers in the vector, of the site's batch shape; None if all are.  Others are at the origin.
    """

    shape: torch.Size
    transform: Transform
    mask: Tensor | None = None

    @property
    def counts(self) -> Tensor | None:
        """True for the numbers in the vector, flattened; None if all are."""
        if self.mask is None:
            return None
        return (
            self.mask.reshape(self.mask.shape + (1,) * (len(self.shape) - self.mask.dim())).expand(self.shape).flatten()
        )

    @property
    def size(self) -> int:
        """The number of numbers in the vector."""
        return self.shape.numel() if self.counts is None else int(self.counts.sum())


Packing = dict[str, Part]  # the sites in a packed vector, by name


class Scored(NamedTuple):
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


class LatentSpace:
    """The unconstrained space of a guide's own draws.

    Args:
        task: A model and a guide of its latents, which are continuous unless they are summed out.

    Attributes:
        dim: The number D of coordinates.
        read: The K quantities of the model.

    Raises:
        ValueError: If the model has no latents, or a site of the guide is discrete.
    """

    def __init__(self, task: Task) -> None:
        self.task = task.settle()
        if not task.latents:
            raise ValueError("the model has no latent sites; there is nothing to judge.")
        self._own: Packing = {}  # the guide's own sites
        for name in task.own:
            site = task.guide.single.nodes[name]
            if site["fn"].support.is_discrete:
                raise ValueError(f"site {name!r} of the guide is discrete; leave it out, and it is summed out.")
            transform = biject_to(site["fn"].support)
            self._own[name] = Part(transform.inv(site["value"]).shape, transform)
        self.dim = sum(part.size for part in self._own.values())
        counts = (_part_of(task.guide.single.nodes[name], part).counts for name, part in self._own.items())
        sizes = (part.size for part in self._own.values())
        self._hidden = torch.cat(
            [torch.zeros(n).bool() if c is None else ~c for n, c in zip(sizes, counts, strict=True)]
        )
        self._hides = bool(self._hidden.any())
        self.read = Quantities(task)

    @torch.no_grad()
    def verify(self) -> None:
        """Raise ValueError for guides without a density over z.

        Raises:
            ValueError: If a support of the guide depends on its other draws, or the guide has auxiliary draws.
        """
        values = {name: self.task.guide.single.nodes[name]["value"] for name in self._own}

        def moved(view: View) -> Values:
            constraints = {name: biject_to(view.trace.nodes[name]["fn"].support) for name in values}
            return {name: constraints[name](part.transform.inv(values[name])) for name, part in self._own.items()}

        for name, (there,) in self.task.guide.alone(moved, 1).items():
            value = values[name]
            if there.shape != value.shape or not torch.allclose(there, value, rtol=1e-4, atol=1e-6):
                raise ValueError(f"the support of the guide's site {name!r} depends on its other draws.")
        free, drawn = 0, int((~self._hidden).sum())
        for name in self.task.latents:
            site, transform = self.task.guide.single.nodes[name], biject_to(support_of(self._site(name)["fn"]))
            free += _part_of(site, Part(transform.inv(site["value"]).shape, transform)).size
        if free != drawn:
            raise ValueError(
                f"the guide draws {drawn} numbers for latents of {free}; with auxiliary draws it has no density."
            )

    def _site(self, name: str) -> Site:
        return self.task.model.single.nodes[name]

    @torch.no_grad()
    def draw(self, number: int, batch_size: int = 1000) -> Scored:
        """Return draws of the guide with their densities and quantities, found ``batch_size`` at a time."""

        def read(view: View) -> Values:
            own = {name: view.read(name) for name in self._own}
            return {**own, **self._placing(view), OWN: view.log_prob(self._own.__contains__)}

        def step(_: Values, size: int) -> Values:
            found = self.task.guide.sample(read, {}, size)
            z = self._noised(_packed(found, self._own))
            _, own = _unpacked(z, self._own)
            latents, changes = self._placed(found, own)
            scores, of_hidden = self._score(latents, size), self._normal(z)
            return {
                "z": z,
                "log_p": scores[TOTAL] + _total(changes.values()) + of_hidden,
                "log_q": found[OWN] + _total(own.values()) + of_hidden,
                "quantities": self.read.numbers({**latents, **scores}),
            }

        return Scored(**in_batches(step, {}, number, batch_size))

    @torch.no_grad()
    def draw_alone(self, number: int, batch_size: int) -> Tensor:
        """Return draws of the guide without running the model, ``(number, D)``."""

        def step(_: Values, size: int) -> Values:
            found = self.task.guide.sample(lambda view: {name: view.read(name) for name in self._own}, {}, size)
            return {"z": self._noised(_packed(found, self._own))}

        return in_batches(step, {}, number, batch_size)["z"]

    def _noised(self, z: Tensor) -> Tensor:
        """Return vectors with standard normal draws in what masks hide."""
        return z.where(~self._hidden.to(z.device), torch.randn_like(z)) if self._hides else z

    def _normal(self, z: Tensor) -> Tensor:
        """Return the standard normal log-density of what masks hide in vectors, ``(N,)``, or 0."""
        if not self._hides:
            return torch.zeros(())
        return dist.Normal(0.0, 1.0).log_prob(z[:, self._hidden.to(z.device)]).sum(-1)

    def _score(self, latents: Values, size: int) -> Values:
        """Return the model's log-density of N draws, ``TOTAL``, -inf where it breaks down, and deterministic sites."""
        try:
            return self.task.model.score(latents, size, self.read.derived)
        except Exception as error:
            if not is_breakdown(error):
                raise
        if size == 1:
            known, like = self.task.model.single.nodes, next(iter(latents.values()))
            derived = {name: known[name]["value"].unsqueeze(0) for name in self.read.derived}
            return {TOTAL: torch.full((1,), -math.inf).to(like), **derived}
        return in_batches(self._score, latents, size, (size + 1) // 2)

    def log_p(self, z: Tensor) -> Tensor:
        """Return the model's log-density over z, ``(N, D) -> (N,)`` in nats.

        Draws of a model of many data are scored in parts; the gradient then has no second derivatives.
        """
        return self.in_parts(self._log_p)(z)

    def in_parts(self, density: LogDensity) -> LogDensity:
        """Return a log-density that runs the model, and finds its gradient part by part."""
        return in_parts(density, self.task.model.chunk, self.task.model.threads)

    def _log_p(self, z: Tensor) -> Tensor:
        latents, changes = self._place(z)
        return self.task.model.log_prob(latents, len(z)) + _total(changes.values()) + self._normal(z)

    def log_prior_and_p(self, z: Tensor, prior: Runner | None = None) -> tuple[Tensor, Tensor]:
        """Return the log-densities over z, each ``(N,)`` in nats, of the prior and of the model.

        The prior leaves out the latents whose priors are flat.

        Args:
            z: The vectors.
            prior: The model without its data, if discrete latents are summed out; None to read both off one run.
        """
        (latents, changes), model = self._place(z), self.task.model
        names = {*self.task.latents} - {*self.flat}
        if prior is None:
            both = model.run(
                lambda view: {"p": view.log_prob(), "prior": view.log_prob(names.__contains__)}, latents, len(z)
            )
            log_p, log_prior = both["p"], both["prior"]
        else:
            log_p, log_prior = (program.log_prob(latents, len(z)) for program in (model, prior))
        proper = _total(change for name, change in changes.items() if name not in self.flat)
        of_hidden = self._normal(z)
        return log_prior + proper + of_hidden, log_p + _total(changes.values()) + of_hidden

    def log_q(self, z: Tensor) -> Tensor:
        """Return the guide's log-density over z, ``(N, D) -> (N,)`` in nats."""
        held, changes = _unpacked(z, self._own)
        found = self.task.guide.run(lambda view: {OWN: view.log_prob(self._own.__contains__)}, held, len(z))
        return found[OWN] + _total(changes.values()) + self._normal(z)

    @functools.cached_property
    def has_log_q(self) -> bool:
        """True if the guide has a density at vectors that it did not draw."""
        with torch.no_grad():
            z = self.draw_alone(2, 2)
            try:
                return bool(self.log_q(z.flip(0)).isfinite().all())
            except (NotImplementedError, KeyError):  # its transform has no inverse
                return False

    def latents(self, z: Tensor) -> Values:
        """Return the model's latents at z: each ``(N, *shape)``."""
        return self._place(z)[0]

    @torch.no_grad()
    def values(self, z: Tensor) -> Values:
        """Return the model's latents and deterministic sites at z: each ``(N, *shape)``."""
        latents, derived = self.latents(z), self.read.derived
        found = self._score(latents, len(z)) if derived else {}
        return {**latents, **{name: found[name] for name in derived}}

    @torch.no_grad()
    def drawn_back(self, z: Tensor, batch_size: int) -> Values:
        """Return latents and all deterministic sites at z; latents that are summed out are drawn given the others."""
        latents = in_batches(lambda held, _: self.latents(held["z"]), {"z": z}, len(z), batch_size)
        return self.task.values(latents, batch_size)

    @torch.no_grad()
    def quantities(self, z: Tensor) -> Tensor:
        """Return all numbers of :meth:`values`, ``(N, K)``."""
        return self.read.numbers(self.values(z))

    @functools.cached_property
    def coordinates(self) -> list[str]:
        """The latent that each of the coordinates belongs to, or the guide's own site if the latent is unknown."""
        guide, names = self.task.guide.call, list[str]()
        packings = {f"_{getattr(guide, '_pyro_name', '')}_{n}": p for n, p in getattr(guide, "packings", {}).items()}
        for name, part in self._layout.items():
            inside = packings[name].coordinates if name in packings else [name]  # of each row
            names += inside * (part.size // len(inside))
        return names

    @functools.cached_property
    def _layout(self) -> Packing:
        """The latents in a packed vector, or the guide's own sites if the latents are unknown."""
        guide: Any = self.task.guide.call
        prototype = getattr(guide, "prototype_trace", None)
        nodes = prototype.nodes if prototype else {}
        sites = {name: nodes[name] for name in self.task.latents if "fn" in nodes.get(name, ())}
        constraints = {name: biject_to(support_of(site["fn"])) for name, site in sites.items()}
        constraints.update({name: part.transform for name, part in self._own.items()})
        if isinstance(guide, AutoContinuous):
            shapes, placed = guide._unconstrained_shapes, self.task.guide.single.nodes
            return {name: _part_of(placed[name], Part(shape, constraints[name])) for name, shape in shapes.items()}
        latents = {f"{name}_unconstrained": name for name in constraints}
        shapes = {latents.get(name, name): part.shape for name, part in self._own.items()}
        return {name: Part(shape, constraints[name]) for name, shape in shapes.items()}

    @functools.cached_property
    def _angles(self) -> Tensor:
        """True for the coordinates that are angles in radians, ``(D,)``."""
        known = getattr(self.task.guide.call, "has_circles", False)
        turning = self.read.angles if known else self.read.plain_angles
        return torch.tensor([name in turning for name in self.coordinates])

    def wrapped(self, z: Tensor, loc: Tensor) -> Tensor:
        """Return vectors z with angles within half a turn of ``loc``: angles are the same after a whole turn."""
        turned = (z - loc + math.pi).remainder(2 * math.pi) - math.pi + loc
        return z.where(~self._angles.to(z.device), turned)

    @functools.cached_property
    def flat(self) -> list[str]:
        """The latents with improper priors, and with priors whose density is scaled or masked."""
        placed = self.task.guide.single.nodes
        return [name for name in self.task.latents if _is_flat(self._site(name), mask_of(placed[name]))]

    @torch.no_grad()
    def prior(self, z: Tensor) -> Tensor:
        """Return draws of the prior, as many as there are vectors z; latents with flat priors stay.

        Draws are NaN where the model breaks down, and all of them if the vectors of latents are unknown for this guide.
        """

        def drawn(z: Tensor) -> Tensor:
            latents = self.latents(z)
            held = {name: latents[name] for name in self.flat}
            found = self.task.model.sample(lambda view: {name: view.read(name) for name in latents}, held, len(z))
            located = self.located(found)
            return z * math.nan if located is None else self._noised(located)

        return or_nan(drawn, self.dim)(z)

    def _place(self, z: Tensor) -> tuple[Values, Values]:
        """Return the model's latents θ at N vectors z, and by site the terms of log |dθ/dz|, ``(N,)`` each."""
        return _unpacked(z, self._packing) if self._packing else self._place_by_run(z)

    def _place_by_run(self, z: Tensor) -> tuple[Values, Values]:
        held, changes = _unpacked(z, self._own)
        return self._placed(self.task.guide.run(self._placing, held, len(z)), changes)

    def _placing(self, view: View) -> Values:
        """Read the latents that a run of the guide places, and the changes of variables at all sites but its own."""
        others = [name for name, site in view.trace.nodes.items() if site["type"] == "sample" and name not in self._own]
        changes = {CHANGE + name: -view.log_prob(name.__eq__) for name in others}
        return {**{name: view.read(name) for name in self.task.latents}, **changes}

    def _placed(self, found: Values, changes: Values) -> tuple[Values, Values]:
        """Return the latents that :meth:`_placing` has read, and its changes of variables after those of own sites."""
        placed = {key.removeprefix(CHANGE): value for key, value in found.items() if key.startswith(CHANGE)}
        return {name: found[name] for name in self.task.latents}, {**changes, **placed}

    @functools.cached_property
    def _packing(self) -> Packing:
        """The latents in a packed vector, if constraining them gives the same as a run of the guide, or else empty."""
        if {*self._layout} != {*self.task.latents}:
            return {}
        nodes = self.task.guide.single.nodes
        z = _packed({name: nodes[name]["value"].unsqueeze(0) for name in self._own}, self._own)
        # Cosines in place of a draw use no random numbers.
        z = torch.cat((z, z + torch.arange(1.0, 1 + self.dim).to(z).cos() / 10))
        with torch.no_grad():
            known, known_changes = self._place_by_run(z)
            try:
                latents, changes = _unpacked(z, self._layout)
            except RuntimeError:
                return {}
        pairs = [(_total(changes.values()), _total(known_changes.values()))]
        pairs += [(value, known[name]) for name, value in latents.items()]
        same = all(a.shape == b.shape and torch.allclose(a, b.to(a), 1e-4, 1e-6, equal_nan=True) for a, b in pairs)
        return self._layout if same else {}

    def located(self, values: Values) -> Tensor | None:
        """Return the vectors at which the latents take values ``(N, *shape)``, or None if they are unknown."""
        guide: Any = self.task.guide.call
        if hasattr(guide, "pack"):
            z, _ = guide.pack(values, *self.task.guide.args, **self.task.guide.kwargs)
        elif {*self._layout} == values.keys():
            z = _packed(values, self._layout)
        else:
            return None
        return z if z.shape[1:] == (self.dim,) else None


def _packed(values: Values, packing: Packing) -> Tensor:
    """Return packed vectors, ``(N, D)``, of constrained values."""
    found = []
    for name, part in packing.items():
        free = part.transform.inv(values[name]).reshape(len(values[name]), -1)
        found.append(present_of(free, part.counts))
    return torch.cat(found, -1)


def _unpacked(z: Tensor, packing: Packing) -> tuple[Values, Values]:
    """Return the constrained values in packed vectors, and the log-determinants of their constraints, ``(N,)`` each."""
    values, changes = {}, {}
    chunks = z.split([part.size for part in packing.values()], -1)
    for (name, part), chunk in zip(packing.items(), chunks, strict=True):
        free = among_absent(chunk, part.counts).reshape(len(z), *part.shape)
        values[name] = part.transform(free)
        change = part.transform.log_abs_det_jacobian(free, values[name])
        if part.mask is not None:
            mask = part.mask.to(z.device)
            change = change.where(mask.reshape(mask.shape + (1,) * (change.dim() - 1 - mask.dim())), 0.0)
        changes[name] = change.reshape(len(z), -1).sum(-1)
    return values, changes


def _part_of(site: Site, part: Part) -> Part:
    """Return a site of a guide as a part of a vector without the numbers that a mask hides."""
    mask = mask_of(site)
    if not mask.hides:
        return part
    batch = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return part._replace(mask=torch.as_tensor(mask.every).bool().expand(batch))


def _total(parts: Iterable[Tensor]) -> Tensor:
    return sum(parts, torch.zeros(()))


def _is_flat(site: Site, drawn: Mask) -> bool:
    """True if a latent's prior is improper, or its density is scaled, or masked where that of its guide is not."""
    scaled = site["scale"] is not None and bool((torch.as_tensor(site["scale"]) != 1).any())
    masked = mask_of(site).hides and not are_equal(mask_of(site), drawn)
    return scaled or isinstance(innermost(site["fn"]), dist.ImproperUniform) or masked


def sound_space(task: Task) -> LatentSpace:
    """Return the latent space of a guide, or raise ValueError if its draws cannot be weighed or have no density."""
    space = LatentSpace(task.check())
    space.verify()
    return space
