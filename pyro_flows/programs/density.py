"""The log-densities of a model and of its guide over unconstrained vectors z, which samplers, searches and checks need.

A guide draws its sites except those of type ``Delta``, which only place the values of other sites.  These are one
packed vector for Pyro's ``AutoContinuous``, and one site per latent in ``AutoNormal`` or in a guide written by hand.
Unconstrained and packed they are z.  What a mask hides in a site of the guide's own counts in no density over z: there
it is standard normal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable
from itertools import compress
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import Transform, biject_to

from ..vjp import LogDensity
from . import sites
from .discrete import Sequential
from .engines import View, in_batches
from .log_density import in_parts, is_breakdown, or_nan
from .model_and_guide import Task
from .runner import TOTAL, Runner
from .sites import Site, Values

MOST = 1000  # numbers of a deterministic site; larger ones are left out
OWN = "log q of own sites"  # not the name of a site
CHANGE = "change of "  # prefix of a site's name
PRIOR = "log-density of latents"  # not the name of a site


class Quantities:
    """The K numbers to read off draws of a model.

    Args:
        nodes: The model's sites, by name.
        latents: The names of its latents.
        enumerated: The discrete latents that are summed out.

    Attributes:
        names: The names of the K quantities; angles count as their cosine and sine, and complex
            numbers as their real and imaginary parts.
        sites: The site of each.
        derived: The deterministic sites among them.  They are left out if discrete latents are summed out, since they
            may depend on these latents.
        angles: The latents that are angles, along which densities are periodic.
        plain_angles: The angles whose values are in radians.
    """

    def __init__(self, nodes: dict[str, Site], latents: list[str], enumerated: Collection[str] = ()) -> None:
        small = [name for name, site in nodes.items() if sites.is_deterministic(site) and site["value"].numel() <= MOST]
        self.derived = [] if enumerated else small
        read = [name for name in nodes if name in latents or name in self.derived]
        self._turns = {name: _turn_of(nodes[name]) for name in read}
        self.names, self.sites = [], []
        for name, turn in self._turns.items():
            labels = sites.labels_of(name, nodes[name]["value"].shape)
            found = [part + label for part in _parts(nodes[name]["value"], turn) for label in labels]
            self.names += found
            self.sites += [name] * len(found)
        self.angles = {name for name in latents if self._turns[name] is not None}
        self.plain_angles = {
            name for name in self.angles if isinstance(sites.innermost(nodes[name]["fn"]), dist.VonMises)
        }
        self._kept = torch.arange(len(self.names))

    def keep(self, used: Tensor) -> None:
        """Leave out the quantities for which ``used``, ``(K,)`` of bool, is False."""
        self._kept = self._kept[used.cpu()]
        self.names, self.sites = (list(compress(of, used.tolist())) for of in (self.names, self.sites))

    def numbers(self, values: Values) -> Tensor:
        """Return all quantities as columns, ``(N, K)``, given the values of their sites, ``(N, *shape)``."""
        parts = [part for name, turn in self._turns.items() for part in _parts(values[name], turn).values()]
        return torch.cat([part.reshape(len(part), -1) for part in parts], -1)[:, self._kept]


def _parts(value: Tensor, turn: Tensor | None) -> Values:
    """Return a site's values as real numbers that do not jump, by the first words of their names."""
    if value.is_complex():
        return {"re ": value.real, "im ": value.imag}
    return {"": value} if turn is None else {"cos ": (value * turn).cos(), "sin ": (value * turn).sin()}


def _turn_of(site: dict[str, Any]) -> Tensor | None:
    """Return the factor that turns an angle's values into radians, or None if a site is no angle."""
    fn = sites.innermost(site["fn"])
    if isinstance(fn, dist.VonMises):
        return torch.ones(())
    if site["infer"].get("periodic"):
        return 2 * math.pi / torch.as_tensor(fn.support.upper_bound - fn.support.lower_bound)
    return None


class Slot(NamedTuple):
    """The place of a site in vectors.

    Attributes:
        shape: The shape of its unconstrained values.
        transform: Its constraint.
        mask: True for the numbers in the vector, of the site's batch shape; None if all are.  Others are at the origin.
    """

    shape: torch.Size
    transform: Transform
    mask: Tensor | None = None

    @classmethod
    def of(cls, value: Tensor, support: Any) -> Slot:
        """Return the place of a site with a value in a support."""
        transform = biject_to(support)
        return cls(transform.inv(value).shape, transform)

    @property
    def counts(self) -> Tensor | None:
        """True for the numbers in the vector, flattened; None if all are."""
        if self.mask is None:
            return None
        room = (1,) * (len(self.shape) - self.mask.dim())
        return self.mask.reshape(self.mask.shape + room).expand(self.shape).flatten()

    @property
    def size(self) -> int:
        """The number of numbers in the vector."""
        return self.shape.numel() if self.counts is None else int(self.counts.sum())

    def unmasked(self, site: Site) -> Slot:
        """Return the slot without the numbers that the mask of a guide's site hides."""
        mask = sites.mask_of(site)
        if not mask.hides:
            return self
        batch = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
        return self._replace(mask=torch.as_tensor(mask.every).bool().expand(batch))


Slots = dict[str, Slot]  # the sites in a vector, by name


class Placed(NamedTuple):
    """The model's latents at N vectors.

    Attributes:
        latents: The values of each, ``(N, *site_shape)``.
        changes: The terms of the log-determinant of placing them, by site, ``(N,)`` each.
    """

    latents: Values
    changes: Values

    @property
    def log_det(self) -> Tensor:
        """The log-determinant, ``(N,)``."""
        return total(self.changes.values())


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


class Scored(NamedTuple):
    """Vectors of draws of a guide, ``(N, D)``, and the guide's log-density over them, ``(N,)`` in nats."""

    z: Tensor
    log_q: Tensor


class Density:
    """The log-densities of a model and its guide over the unconstrained vectors of the guide.

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
        self._nodes, self._guide_nodes = task.model.single.nodes, task.guide.single.nodes
        self.read = Quantities(self._nodes, task.latents, task.model.enumerated)
        own = {name: self._guide_nodes[name] for name in task.own}
        if discrete := [name for name, site in own.items() if site["fn"].support.is_discrete]:
            raise ValueError(f"site {discrete[0]!r} of the guide is discrete; leave it out, and it is summed out.")
        self._own = {name: Slot.of(site["value"], site["fn"].support) for name, site in own.items()}
        self.dim = sum(slot.size for slot in self._own.values())
        counts = {name: slot.unmasked(own[name]).counts for name, slot in self._own.items()}
        hidden = [torch.zeros(self._own[name].size).bool() if c is None else ~c for name, c in counts.items()]
        self._hidden = torch.cat([torch.zeros(0).bool(), *hidden])
        self._hides = bool(self._hidden.any())

    @classmethod
    @torch.no_grad()
    def sound(cls, task: Task) -> Density:
        """Return a density, or raise ValueError if the guide's draws cannot be weighed or have no density."""
        found = cls(task.check())
        found.verify()
        return found

    @torch.no_grad()
    def verify(self) -> None:
        """Raise ValueError for guides without a density over z.

        Raises:
            ValueError: If a support of the guide depends on its other draws, or the guide has auxiliary draws.
        """
        values = {name: self._guide_nodes[name]["value"] for name in self._own}

        def moved(view: View) -> Values:
            constraints = {name: biject_to(view.trace.nodes[name]["fn"].support) for name in values}
            return {name: constraints[name](slot.transform.inv(values[name])) for name, slot in self._own.items()}

        for name, (there,) in self.task.guide.alone(moved, 1).items():
            value = values[name]
            if there.shape != value.shape or not torch.allclose(there, value, rtol=1e-4, atol=1e-6):
                raise ValueError(f"the support of the guide's site {name!r} depends on its other draws.")
        free, drawn = 0, int((~self._hidden).sum())
        for name in self.task.latents:
            site, support = self._guide_nodes[name], sites.support_of(self._nodes[name]["fn"])
            free += Slot.of(site["value"], support).unmasked(site).size
        if free != drawn:
            fault = f"the guide draws {drawn} numbers for latents of {free}"
            raise ValueError(f"{fault}; with auxiliary draws it has no density.")

    @torch.no_grad()
    def draw(self, number: int, batch_size: int = 1000) -> Drawn:
        """Return draws of the guide with their densities and quantities, found ``batch_size`` at a time."""

        def read(view: View) -> Values:
            own = {name: view.read(name) for name in self._own}
            return {**own, **self._placing(view), OWN: view.log_prob(self._own.__contains__)}

        def step(_: Values, size: int) -> Values:
            found = self.task.guide.sample(read, {}, size)
            z = self.noised(_packed(found, self._own))
            own, of_hidden = _unpacked(z, self._own).changes, self.of_hidden(z)
            placed = self._placed(found, own)
            scores = self._score(placed.latents, size)
            log_q = found[OWN] + total(own.values()) + of_hidden
            log_p = scores[TOTAL] + placed.log_det + of_hidden
            return {
                "z": z,
                "log_p": log_p,
                "log_q": log_q,
                "quantities": self.read.numbers({**placed.latents, **scores}),
            }

        return Drawn(**in_batches(step, {}, number, batch_size))

    @torch.no_grad()
    def vectors(self, number: int, batch_size: int) -> Tensor:
        """Return the vectors of draws alone, ``(number, D)``."""

        def step(_: Values, size: int) -> Values:
            found = self.task.guide.sample(lambda view: {name: view.read(name) for name in self._own}, {}, size)
            return {"z": self.noised(_packed(found, self._own))}

        return in_batches(step, {}, number, batch_size)["z"]

    @torch.no_grad()
    def scored_vectors(self, number: int, batch_size: int) -> Scored:
        """Return the vectors of draws with the guide's log-density."""

        def read(view: View) -> Values:
            own = {name: view.read(name) for name in self._own}
            return {**own, OWN: view.log_prob(self._own.__contains__)}

        def step(_: Values, size: int) -> Values:
            found = self.task.guide.sample(read, {}, size)
            z = self.noised(_packed(found, self._own))
            return {"z": z, "log_q": found[OWN] + _unpacked(z, self._own).log_det + self.of_hidden(z)}

        return Scored(**in_batches(step, {}, number, batch_size))

    def noised(self, z: Tensor) -> Tensor:
        """Return vectors with standard normal draws in what masks hide."""
        return z.where(~self._hidden.to(z.device), torch.randn_like(z)) if self._hides else z

    def of_hidden(self, z: Tensor) -> Tensor:
        """Return the standard normal log-density of what masks hide in vectors, ``(N,)``, or 0."""
        if not self._hides:
            return torch.zeros(())
        return dist.Normal(0.0, 1.0).log_prob(z[:, self._hidden.to(z.device)]).sum(-1)

    def log_q(self, z: Tensor) -> Tensor:
        """Return the guide's log-density over z, ``(N, D) -> (N,)`` in nats, NaN where the guide breaks down."""
        return self._log_q_in_parts(z)

    @functools.cached_property
    def _log_q_in_parts(self) -> LogDensity:
        guide = self.task.guide
        return or_nan(in_parts([self._log_q], guide.chunk, guide.threads))

    def _log_q(self, z: Tensor) -> Tensor:
        held = _unpacked(z, self._own)
        found = self.task.guide.run(lambda view: {OWN: view.log_prob(self._own.__contains__)}, held.latents, len(z))
        return found[OWN] + held.log_det + self.of_hidden(z)

    @functools.cached_property
    def has_log_q(self) -> bool:
        """True if the guide has a density at vectors that it did not draw."""
        with torch.no_grad():
            z = self.vectors(2, 2)
            try:
                return bool(self.log_q(z.flip(0)).isfinite().all())
            except (NotImplementedError, KeyError):  # its transform has no inverse
                return False

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

        Its gradient has no second derivatives.
        """
        return self._in_parts(z)

    @functools.cached_property
    def _in_parts(self) -> LogDensity:
        return or_nan(self.in_parts(self._log_prob))

    def in_parts(self, density: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a log-density that runs the model, and finds its gradient part by part, by graphs where possible."""
        return in_parts([density], self.task.model.chunk, self.task.model.threads)

    def _log_prob(self, z: Tensor) -> Tensor:
        placed = self.place(z)
        return self.task.model.log_prob(placed.latents, len(z)) + placed.log_det + self.of_hidden(z)

    def log_prior_and_prob(self, z: Tensor, prior: Runner | None = None) -> tuple[Tensor, Tensor]:
        """Return the log-densities over z, each ``(N,)`` in nats, of the prior and of the model.

        The prior leaves out the latents whose priors are flat.

        Args:
            z: The vectors.
            prior: The model without its data, if discrete latents are summed out; None to read both off one run.
        """
        placed, names = self.place(z), {*self.task.latents} - {*self.flat}

        def read(view: View) -> Values:
            return {TOTAL: view.log_prob(), PRIOR: view.log_prob(names.__contains__)}

        if prior is None:
            found = self.task.model.sum_of_rows(read, placed.latents, len(z))
        else:
            programs = {TOTAL: self.task.model, PRIOR: prior}
            found = {name: program.log_prob(placed.latents, len(z)) for name, program in programs.items()}
        proper = total(change for name, change in placed.changes.items() if name not in self.flat)
        of_hidden = self.of_hidden(z)
        return found[PRIOR] + proper + of_hidden, found[TOTAL] + placed.log_det + of_hidden

    def constrain(self, z: Tensor) -> Values:
        """Return the model's latents at z: each ``(N, *shape)``."""
        return self.place(z).latents

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
        return torch.tensor([name in turning for name in self.coordinates])

    def wrapped(self, z: Tensor, loc: Tensor) -> Tensor:
        """Return vectors z with angles within half a turn of ``loc``: angles are the same after a whole turn."""
        turned = (z - loc + math.pi).remainder(2 * math.pi) - math.pi + loc
        return z.where(~self._angles.to(z.device), turned)

    @functools.cached_property
    def flat(self) -> list[str]:
        """The latents with improper priors, and with priors whose density is scaled or masked."""
        return [n for n in self.task.latents if _is_flat(self._nodes[n], sites.mask_of(self._guide_nodes[n]))]

    @torch.no_grad()
    def prior(self, z: Tensor) -> Tensor:
        """Return draws of the prior, as many as there are vectors z; latents with flat priors stay.

        Draws are NaN where the model breaks down, and all of them if the vectors of latents are unknown for this guide.
        """
        model = self.task.model
        if model.enumerated and model.engine == "plate" and isinstance(model.enumeration, Sequential):
            model = model.by("vmap")  # it broadcasts only if all draws have the same discrete values

        def drawn(z: Tensor) -> Tensor:
            latents = self.constrain(z)
            held = {name: latents[name] for name in self.flat}
            found = model.sample(lambda view: {name: view.read(name) for name in latents}, held, len(z))
            located = self.located(found)
            return z * math.nan if located is None else self.noised(located)

        return or_nan(drawn, self.dim)(z)

    def place(self, z: Tensor) -> Placed:
        """Return the model's latents at N vectors z."""
        return _unpacked(z, self._slots) if self._slots else self._place_by_run(z)

    def _place_by_run(self, z: Tensor) -> Placed:
        held = _unpacked(z, self._own)
        return self._placed(self.task.guide.run(self._placing, held.latents, len(z)), held.changes)

    def _placing(self, view: View) -> Values:
        """Read the latents that a run of the guide places, and the changes of variables at all sites but its own."""
        others = [name for name, site in view.trace.nodes.items() if site["type"] == "sample" and name not in self._own]
        changes = {CHANGE + name: -view.log_prob(name.__eq__) for name in others}
        return {**{name: view.read(name) for name in self.task.latents}, **changes}

    def _placed(self, found: Values, changes: Values) -> Placed:
        """Return the latents that :meth:`_placing` has read, and its changes of variables after those of own sites."""
        more = {key.removeprefix(CHANGE): value for key, value in found.items() if key.startswith(CHANGE)}
        return Placed({name: found[name] for name in self.task.latents}, {**changes, **more})

    @functools.cached_property
    def coordinates(self) -> list[str]:
        """The latent that each of the coordinates belongs to, or the guide's own site if the latent is unknown."""
        guide, names = self.task.guide.call, list[str]()
        packings = {f"_{getattr(guide, '_pyro_name', '')}_{n}": p for n, p in getattr(guide, "packings", {}).items()}
        for name, slot in self._layout.items():
            inside = packings[name].coordinates if name in packings else [name]  # of each row
            names += inside * (slot.size // len(inside))
        return names

    @functools.cached_property
    def _layout(self) -> Slots:
        """The latents in vectors, or the guide's own sites if the latents are unknown."""
        guide: Any = self.task.guide.call
        prototype = getattr(guide, "prototype_trace", None)
        nodes = prototype.nodes if prototype else {}
        of_latents = {name: nodes[name] for name in self.task.latents if "fn" in nodes.get(name, ())}
        constraints = {name: biject_to(sites.support_of(site["fn"])) for name, site in of_latents.items()}
        constraints.update({name: slot.transform for name, slot in self._own.items()})
        if isinstance(guide, AutoContinuous):
            shapes = guide._unconstrained_shapes.items()
            return {name: Slot(shape, constraints[name]).unmasked(self._guide_nodes[name]) for name, shape in shapes}
        latents = {f"{name}_unconstrained": name for name in constraints}
        of_own = {latents.get(name, name): slot.shape for name, slot in self._own.items()}
        return {name: Slot(shape, constraints[name]) for name, shape in of_own.items()}

    @functools.cached_property
    def _slots(self) -> Slots:
        """The latents in vectors, if constraining them gives the same as a run of the guide, or else empty."""
        if {*self._layout} != {*self.task.latents}:
            return {}
        z = _packed({name: self._guide_nodes[name]["value"].unsqueeze(0) for name in self._own}, self._own)
        # Cosines in place of a draw use no random numbers.
        z = torch.cat((z, z + torch.arange(1.0, 1 + self.dim).to(z).cos() / 10))
        with torch.no_grad():
            known = self._place_by_run(z)
            try:
                found = _unpacked(z, self._layout)
            except RuntimeError:
                return {}
        pairs = [(found.log_det, known.log_det), *((v, known.latents[name]) for name, v in found.latents.items())]
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


def _is_flat(site: Site, drawn: sites.Mask) -> bool:
    """True if a latent's prior is improper, or its density is scaled, or masked where that of its guide is not."""
    scaled = site["scale"] is not None and bool((torch.as_tensor(site["scale"]) != 1).any())
    masked = sites.mask_of(site).hides and not sites.are_equal(sites.mask_of(site), drawn)
    return scaled or isinstance(sites.innermost(site["fn"]), dist.ImproperUniform) or masked


def _packed(values: Values, slots: Slots) -> Tensor:
    """Return vectors, ``(N, D)``, of constrained values."""
    found = []
    for name, slot in slots.items():
        free = slot.transform.inv(values[name]).reshape(len(values[name]), -1)
        found.append(sites.present_of(free, slot.counts))
    return torch.cat(found, -1)


def _unpacked(z: Tensor, slots: Slots) -> Placed:
    """Return the constrained values in vectors, and the log-determinants of their constraints."""
    values, changes = {}, {}
    chunks = z.split([slot.size for slot in slots.values()], -1)
    for (name, slot), chunk in zip(slots.items(), chunks, strict=True):
        free = sites.among_absent(chunk, slot.counts).reshape(len(z), *slot.shape)
        values[name] = slot.transform(free)
        change = slot.transform.log_abs_det_jacobian(free, values[name])
        if slot.mask is not None:
            mask = slot.mask.to(z.device)
            change = change.where(mask.reshape(mask.shape + (1,) * (change.dim() - 1 - mask.dim())), 0.0)
        changes[name] = change.reshape(len(z), -1).sum(-1)
    return Placed(values, changes)


def total(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of log-densities or log-determinants, 0 if there are none."""
    return sum(parts, torch.zeros(()))
