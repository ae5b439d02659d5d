"""A guide's side of a density: its draws as unconstrained vectors z, and the model's latents at them.

A guide draws its sites except those of type ``Delta``, which only place the values of other sites.  These are one
packed vector for Pyro's ``AutoContinuous``, and one site per latent in ``AutoNormal`` or in a guide written by hand.
Unconstrained and packed they are z.  What a mask hides in a site of the guide's own counts in no density over z: there
it is standard normal.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import Transform, biject_to

from .engines import Site, Values, View, in_batches
from .latents import support_of
from .log_density import or_nan
from .masks import among_absent, mask_of, present_of
from .runner import Runner

OWN = "log q of own sites"  # not the name of a site
CHANGE = "change of "  # prefix of a site's name


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

    def unmasked(self, site: Site) -> Slot:
        """Return the slot without the numbers that the mask of a guide's site hides."""
        mask = mask_of(site)
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


class GuideDraws(NamedTuple):
    """Vectors of a guide, ``(N, D)``, its log-density over them, ``(N,)`` in nats, and the model's latents there."""

    z: Tensor
    log_q: Tensor
    placed: Placed


class Placement:
    """The vectors of a guide's own draws, and the model's latents at them.

    Args:
        guide: The guide.
        own: The names of the sites that it draws.
        latents: The names of the model's latents.
        model: The model's sites, by name.

    Attributes:
        dim: The number D of coordinates.

    Raises:
        ValueError: If a site of the guide is discrete.
    """

    def __init__(self, guide: Runner, own: list[str], latents: list[str], model: dict[str, Site]) -> None:
        self.guide, self._latents, self._model, self._nodes = guide, latents, model, guide.single.nodes
        self._own: Slots = {}
        for name in own:
            site = self._nodes[name]
            if site["fn"].support.is_discrete:
                raise ValueError(f"site {name!r} of the guide is discrete; leave it out, and it is summed out.")
            transform = biject_to(site["fn"].support)
            self._own[name] = Slot(transform.inv(site["value"]).shape, transform)
        self.dim = sum(slot.size for slot in self._own.values())
        counts = {name: slot.unmasked(self._nodes[name]).counts for name, slot in self._own.items()}
        hidden = [torch.zeros(self._own[name].size).bool() if c is None else ~c for name, c in counts.items()]
        self._hidden = torch.cat(hidden) if hidden else torch.zeros(0).bool()
        self._hides = bool(self._hidden.any())

    @torch.no_grad()
    def verify(self) -> None:
        """Raise ValueError for guides without a density over z.

        Raises:
            ValueError: If a support of the guide depends on its other draws, or the guide has auxiliary draws.
        """
        values = {name: self._nodes[name]["value"] for name in self._own}

        def moved(view: View) -> Values:
            constraints = {name: biject_to(view.trace.nodes[name]["fn"].support) for name in values}
            return {name: constraints[name](slot.transform.inv(values[name])) for name, slot in self._own.items()}

        for name, (there,) in self.guide.alone(moved, 1).items():
            value = values[name]
            if there.shape != value.shape or not torch.allclose(there, value, rtol=1e-4, atol=1e-6):
                raise ValueError(f"the support of the guide's site {name!r} depends on its other draws.")
        free, drawn = 0, int((~self._hidden).sum())
        for name in self._latents:
            site, transform = self._nodes[name], biject_to(support_of(self._model[name]["fn"]))
            free += Slot(transform.inv(site["value"]).shape, transform).unmasked(site).size
        if free != drawn:
            raise ValueError(
                f"the guide draws {drawn} numbers for latents of {free}; with auxiliary draws it has no density."
            )

    def draw(self, size: int) -> GuideDraws:
        """Return N draws of the guide."""

        def read(view: View) -> Values:
            own = {name: view.read(name) for name in self._own}
            return {**own, **self._placing(view), OWN: view.log_prob(self._own.__contains__)}

        found = self.guide.sample(read, {}, size)
        z = self.noised(_packed(found, self._own))
        own = _unpacked(z, self._own).changes
        return GuideDraws(z, found[OWN] + total(own.values()) + self.of_hidden(z), self._placed(found, own))

    @torch.no_grad()
    def vectors(self, number: int, batch_size: int) -> Tensor:
        """Return the vectors of draws alone, ``(number, D)``."""

        def step(_: Values, size: int) -> Values:
            found = self.guide.sample(lambda view: {name: view.read(name) for name in self._own}, {}, size)
            return {"z": self.noised(_packed(found, self._own))}

        return in_batches(step, {}, number, batch_size)["z"]

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

        def density(z: Tensor) -> Tensor:
            held = _unpacked(z, self._own)
            found = self.guide.run(lambda view: {OWN: view.log_prob(self._own.__contains__)}, held.latents, len(z))
            return found[OWN] + held.log_det + self.of_hidden(z)

        return or_nan(density)(z)

    @functools.cached_property
    def has_log_q(self) -> bool:
        """True if the guide has a density at vectors that it did not draw."""
        with torch.no_grad():
            z = self.vectors(2, 2)
            try:
                return bool(self.log_q(z.flip(0)).isfinite().all())
            except (NotImplementedError, KeyError):  # its transform has no inverse
                return False

    def place(self, z: Tensor) -> Placed:
        """Return the model's latents at N vectors z."""
        return _unpacked(z, self._slots) if self._slots else self._place_by_run(z)

    def _place_by_run(self, z: Tensor) -> Placed:
        held = _unpacked(z, self._own)
        return self._placed(self.guide.run(self._placing, held.latents, len(z)), held.changes)

    def _placing(self, view: View) -> Values:
        """Read the latents that a run of the guide places, and the changes of variables at all sites but its own."""
        others = [name for name, site in view.trace.nodes.items() if site["type"] == "sample" and name not in self._own]
        changes = {CHANGE + name: -view.log_prob(name.__eq__) for name in others}
        return {**{name: view.read(name) for name in self._latents}, **changes}

    def _placed(self, found: Values, changes: Values) -> Placed:
        """Return the latents that :meth:`_placing` has read, and its changes of variables after those of own sites."""
        more = {key.removeprefix(CHANGE): value for key, value in found.items() if key.startswith(CHANGE)}
        return Placed({name: found[name] for name in self._latents}, {**changes, **more})

    @functools.cached_property
    def coordinates(self) -> list[str]:
        """The latent that each of the coordinates belongs to, or the guide's own site if the latent is unknown."""
        guide, names = self.guide.call, list[str]()
        packings = {f"_{getattr(guide, '_pyro_name', '')}_{n}": p for n, p in getattr(guide, "packings", {}).items()}
        for name, slot in self._layout.items():
            inside = packings[name].coordinates if name in packings else [name]  # of each row
            names += inside * (slot.size // len(inside))
        return names

    @functools.cached_property
    def _layout(self) -> Slots:
        """The latents in vectors, or the guide's own sites if the latents are unknown."""
        guide: Any = self.guide.call
        prototype = getattr(guide, "prototype_trace", None)
        nodes = prototype.nodes if prototype else {}
        sites = {name: nodes[name] for name in self._latents if "fn" in nodes.get(name, ())}
        constraints = {name: biject_to(support_of(site["fn"])) for name, site in sites.items()}
        constraints.update({name: slot.transform for name, slot in self._own.items()})
        if isinstance(guide, AutoContinuous):
            shapes = guide._unconstrained_shapes.items()
            return {name: Slot(shape, constraints[name]).unmasked(self._nodes[name]) for name, shape in shapes}
        latents = {f"{name}_unconstrained": name for name in constraints}
        of_own = {latents.get(name, name): slot.shape for name, slot in self._own.items()}
        return {name: Slot(shape, constraints[name]) for name, shape in of_own.items()}

    @functools.cached_property
    def _slots(self) -> Slots:
        """The latents in vectors, if constraining them gives the same as a run of the guide, or else empty."""
        if {*self._layout} != {*self._latents}:
            return {}
        z = _packed({name: self._nodes[name]["value"].unsqueeze(0) for name in self._own}, self._own)
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
        guide: Any = self.guide.call
        if hasattr(guide, "pack"):
            z, _ = guide.pack(values, *self.guide.args, **self.guide.kwargs)
        elif {*self._layout} == values.keys():
            z = _packed(values, self._layout)
        else:
            return None
        return z if z.shape[1:] == (self.dim,) else None


def _packed(values: Values, slots: Slots) -> Tensor:
    """Return vectors, ``(N, D)``, of constrained values."""
    found = []
    for name, slot in slots.items():
        free = slot.transform.inv(values[name]).reshape(len(values[name]), -1)
        found.append(present_of(free, slot.counts))
    return torch.cat(found, -1)


def _unpacked(z: Tensor, slots: Slots) -> Placed:
    """Return the constrained values in vectors, and the log-determinants of their constraints."""
    values, changes = {}, {}
    chunks = z.split([slot.size for slot in slots.values()], -1)
    for (name, slot), chunk in zip(slots.items(), chunks, strict=True):
        free = among_absent(chunk, slot.counts).reshape(len(z), *slot.shape)
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
