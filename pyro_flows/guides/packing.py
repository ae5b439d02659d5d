"""Latent sites packed into one vector: all sites outside of plates, or the sites in one row of some plates.

A row's vector holds all numbers of a site in that row, with dimensions of other plates.  So the dimensions of the
row's plates belong to the batch of vectors, and all other dimensions of a site to the vector.  Vectors are *aligned*:
their batch has the rows at the dimensions of the plates, and 1 at dimensions between and to the right of them.

Torch maps no real numbers onto circles, nor onto supports of mixtures.  Sites on circles are von Mises, or have an
interval as support and are marked ``infer={"periodic": True}``.  In the unconstrained space such a site is an angle, up
to full turns; constraining wraps it around.

Supports that depend on other latents, such as that of Uniform(0, theta), are known once these have values.  Latents are
then constrained one by one in a run of the model.  That map is triangular, and its log-determinant is the sum over the
sites.  The Stan Math Library (Carpenter et al. 2015, arXiv:1509.07164) constrains parameters in the order of their
declarations likewise.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.constraints import sphere
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.utils import _sum_rightmost

from ..compiler_state import is_traced
from ..programs.checks import KEEPS_MASK
from ..programs.engines import Run, View
from ..programs.program import nesting_of
from ..programs.runner import Runner
from ..programs.sites import Site, Values, among_absent, innermost, present_of, states_support, support_of, value_of
from .guide_call import NONE, Call, Key, frames_of, rows_in


class Circle(constraints.interval):
    """The interval [low, high) whose ends are one point."""


class Wrap(Transform):
    """The map from angles in radians, modulo 2π, onto [low, high); it takes -π to ``low``."""

    domain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, low: float | Tensor, high: float | Tensor) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.codomain = Circle(low, high)

    def _call(self, x: Tensor) -> Tensor:
        turns = (x + math.pi) / (2 * math.pi)
        y = self.low + (self.high - self.low) * (turns - turns.floor())
        return torch.where(y < self.high, y, self.low)  # just below -π the fraction is rounded to a whole turn

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.low) / (self.high - self.low) * (2 * math.pi) - math.pi

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        width = torch.as_tensor(self.high - self.low, dtype=x.dtype, device=x.device)
        return (width / (2 * math.pi)).log().expand(x.shape)


class MarkCircles(Messenger):
    """Handler that gives latents on circles the support ``Circle``, and latents without a support the real numbers.

    A flat distribution replaces the site's own, since a guide needs the support alone.
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or type(fn).__name__ == "_Subsample":
            return
        if isinstance(innermost(fn), dist.VonMises | torch.distributions.VonMises):
            support: Any = Circle(-math.pi, math.pi)
        elif msg["infer"] and msg["infer"].get("periodic"):
            interval = scalar_support(fn.support)
            if not isinstance(interval, constraints.interval):
                fault = f"{msg['name']!r} is marked periodic, but its support is {fn.support} and no interval"
                raise ValueError(f"AutoFlow: latent site {fault}.")
            support = Circle(interval.lower_bound, interval.upper_bound)
        elif states_support(fn):
            return
        else:
            support = support_of(fn)
        msg["fn"] = dist.ImproperUniform(support, fn.batch_shape, fn.event_shape)


def is_circular(support: Any) -> bool:
    """True if a support holds angles."""
    return isinstance(scalar_support(support), Circle)


def scalar_support(support: Any) -> Any:
    """Return the support of the single numbers of an event."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def bijection_onto(owner: str, name: Any, support: Any) -> Transform:
    """Return torch's bijection onto the support of a site, or raise NotImplementedError with a way out."""
    try:
        found: Transform = biject_to(support)
    except NotImplementedError as error:
        fault = f"torch maps no real vectors onto {support}, the support of latent site {name!r}"
        way = "Write the site another way, such as a covariance as scales and an LKJCholesky"
        if support is sphere:
            reparam = f"poutine.reparam(model, {{{name!r}: ProjectedNormalReparam()}})"
            way = f"Draw it from a ProjectedNormal, and use {reparam} in place of the model"
        raise NotImplementedError(f"{owner}: {fault}. {way}.") from error
    return found


@biject_to.register(Circle)  # type: ignore[untyped-decorator]
def _onto_circle(constraint: Circle) -> Wrap:
    return Wrap(constraint.lower_bound, constraint.upper_bound)


def _onto_mixture(support: Any) -> Transform:
    shared = support.base_constraint
    inner = scalar_support(shared)
    if any(isinstance(bound, Tensor) and bound.dim() for bound in vars(inner).values()):
        raise NotImplementedError(f"components may differ in their support, {inner}")
    return biject_to(shared)


if hasattr(constraints, "MixtureSameFamilyConstraint"):  # older versions use the support of the components
    biject_to.register(constraints.MixtureSameFamilyConstraint, _onto_mixture)


Absent = Mapping[str, Tensor]  # for each site that is absent in part, a mask of its present parts


class PackedSite(NamedTuple):
    """A site in the vector: its batch shape with 1 for rows, and the shape of an unconstrained event.

    The mask of its present elements, over the batch shape, is None if all are present.  The vector has the present ones
    alone, and the others lie at the origin of the unconstrained space.
    """

    support: constraints.Constraint
    transform: Transform
    batch: torch.Size
    event: torch.Size
    event_dim: int
    plates: tuple[Any, ...]
    start: Tensor
    present: Tensor | None = None

    @property
    def size(self) -> int:
        """The number of unconstrained numbers."""
        number = self.batch.numel() if self.present is None else int(self.present.sum())
        return number * self.event.numel()

    def along(self, axis: int) -> Tensor:
        """Return the index along an axis of each unconstrained number, ``batch + event``."""
        shape = self.batch + self.event
        return torch.arange(shape[axis]).reshape(-1, *(1,) * (len(shape) - axis - 1)).expand(shape)

    @property
    def rows(self) -> dict[str, Tensor]:
        """The row in each plate, by its name, of each unconstrained number, flattened."""
        frames = [frame for frame in self.plates if frame.vectorized]
        return {frame.name: self.along(len(self.batch) + frame.dim).flatten() for frame in frames}

    @property
    def counts(self) -> Tensor | None:
        """True for the unconstrained numbers in the vector, flattened; None if all are."""
        return None if self.present is None else self.present.flatten().repeat_interleave(self.event.numel())

    def gather(self, free: Tensor) -> Tensor:
        """Return the present elements, ``(*sample, size)``, of unconstrained values ``(*sample, *batch, *event)``."""
        sample = free.shape[: free.dim() - len(self.batch) - len(self.event)]
        return present_of(free.reshape(*sample, -1), self.counts)

    def scatter(self, chunk: Tensor, sample: Sequence[int]) -> Tensor:
        """Return unconstrained values ``(*sample, *batch, *event)`` from their present elements."""
        flat = among_absent(chunk.reshape((*sample, self.size)), self.counts)
        return flat.reshape((*sample, *self.batch, *self.event))

    def counted(self, log_det: Tensor) -> Tensor:
        """Return log-determinants ``(*sample, *batch)`` that are 0 for absent elements."""
        return log_det if self.present is None else log_det.where(self.present.to(log_det.device), 0.0)

    def inner_value(self, at: float = 0.0) -> Tensor:
        """Return the value inside of the support that a constant of the unconstrained space has."""
        return self.transform(self.start.new_full(self.event, at))

    def two_values(self) -> Tensor:
        """Return two values that tell supports apart, ``(2, *shape)``."""
        return torch.stack([self.inner_value(at) for at in (0.0, 1.0)])


Unpacked = Iterator[tuple[str, PackedSite, Tensor, Tensor]]


class Packing:
    """The layout of sites in a vector.

    Args:
        owner: The class of the guide, for errors.
        sites: Latent sites of a prototype trace.
        plates: The plates of all sites that have one vector for each row, the outermost first; none for one vector.
        present: For sites of one vector that are absent in part, the mask of their present elements.

    Attributes:
        size: The length of the vector.
        dims: The (negative) dimensions of the plates.
        depth: The number of dimensions of an aligned batch of rows.
        site_depth: The largest number of batch dimensions of a site.

    Raises:
        ValueError: If the support of a site differs from row to row.
    """

    def __init__(
        self, owner: str, sites: Iterable[dict[str, Any]], plates: Key = (), present: Mapping[str, Tensor] = NONE
    ) -> None:
        self.parts: dict[str, PackedSite] = {}
        sites = list(sites)
        self.owner, self.plates = owner, plates
        self.dims = tuple(frame.dim for frame in frames_of(sites[0], plates)) if plates else ()
        self.depth = -min(self.dims, default=0)
        self.site_depth = max(site["value"].dim() - site["fn"].event_dim for site in sites)
        for site in sites:
            name, value, support, event_dim = site["name"], site["value"], site["fn"].support, site["fn"].event_dim
            for dim in self.dims:
                support = _of_one_row(owner, name, support, dim - event_dim, rows_in(site, dim))
            transform, end = biject_to(support), value.dim() - event_dim
            free = transform.inv(value).shape
            batch = torch.Size(1 if place - end in self.dims else size for place, size in enumerate(free[:end]))
            layout, frames = (batch, free[end:], event_dim), tuple(site["cond_indep_stack"])
            self.parts[name] = PackedSite(support, transform, *layout, frames, value.detach(), present.get(name))
        self._sizes = [part.size for part in self.parts.values()]
        self.size = sum(self._sizes)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Packing:
        """Return the packing with its values in another dtype or on another device."""
        other = copy.copy(self)
        other.parts = {name: part._replace(start=move(part.start)) for name, part in self.parts.items()}
        return other

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return next(iter(self.parts.values())).start.dtype

    @property
    def start(self) -> Tensor:
        """The prototype's vectors, ``(*rows, size)``."""
        return self.pack({name: part.start for name, part in self.parts.items()})[0]

    @property
    def coordinates(self) -> list[str]:
        """The site of each number in the vector."""
        return [name for name, part in self.parts.items() for _ in range(part.size)]

    def _split(self, latent: Tensor, depth: int | None = None) -> Iterator[tuple[str, PackedSite, Tensor]]:
        """Yield the sites in vectors with their unconstrained values, ``(*sample, *batch, *event)``.

        Vectors have so many dimensions of rows, by default those of each site's batch.
        """
        for (name, part), chunk in zip(self.parts.items(), latent.split(self._sizes, -1), strict=True):
            sample = latent.shape[: max(0, latent.dim() - 1 - (len(part.batch) if depth is None else depth))]
            if not self.dims:
                yield name, part, part.scatter(chunk, sample)
                continue
            first, places = len(sample), [len(part.batch) + dim for dim in self.dims]
            rows = [chunk.shape[chunk.dim() - 1 + dim] for dim in self.dims]
            rest = [size for place, size in enumerate(part.batch) if place not in places]
            free = chunk.reshape((*sample, *rows, *rest, *part.event))
            front = [*range(first, first + len(rows))]
            yield name, part, free.movedim(front, [first + place for place in places])

    def free(self, latent: Tensor) -> dict[str, Tensor]:
        """Map vectors ``(*batch, *rows, size)`` to unconstrained values of the sites, ``(*batch, *shape)``."""
        return {name: free for name, _, free in self._split(latent, self.depth)}

    def values(self, latent: Tensor) -> dict[str, Tensor]:
        """Map vectors ``(*batch, *rows, size)`` to values of the sites, ``(*batch, *site_shape)``."""
        return {name: self.parts[name].transform(free) for name, free in self.free(latent).items()}

    def unpack(self, latent: Tensor, absent: Absent = NONE) -> Unpacked:
        """Yield the sites in vectors inside of plates: names, parts, values and log|det| of the constraining map.

        For an absent part the last is the log-density of a standard normal: see ``masked.py``.

        Args:
            latent: The vectors, ``(*sample, *plates, size)``.  Only the plates of the rows have sizes above 1.
            absent: The masks of sites that are absent in part.
        """
        for name, part, free in self._split(latent):
            depth, value = free.dim() - len(part.event), part.transform(free)
            change = part.transform.log_abs_det_jacobian(free, value)
            change = part.counted(_sum_rightmost(change, change.dim() - depth))
            if name in absent:  # the model's gradient there is 0, or not finite, and must not reach the guide
                change = change.where(absent[name], _normal(free, depth))
                value = value.where(absent[name].reshape(absent[name].shape + (1,) * part.event_dim), value.detach())
            yield name, part, value, change

    def pack(self, values: dict[str, Tensor], absent: Absent = NONE) -> tuple[Tensor, Tensor]:
        """Pack values ``(*sample, *site_shape)`` into ``(*sample, *rows, size)``, and return log|det| of that map too.

        The log-determinant, in nats and of the shape of the batch, is -inf outside of the support.
        """
        packed, changes = [], []
        for name, part in self.parts.items():
            if name not in values:
                raise ValueError(f"{self.owner}.log_prob: values lack the latent site {name!r}.")
            value, plates = values[name], len(part.batch)
            sample = value.dim() - plates - part.event_dim
            if not self.dims and value.shape[max(sample, 0) :] != part.start.shape:
                shape = ", ".join(["*batch", *map(str, part.start.shape)])
                wanted = f"values[{name!r}] must have shape ({shape})"
                raise ValueError(f"{self.owner}.log_prob: {wanted}, got {tuple(value.shape)}.")
            inside = part.support.check(value)
            if is_circular(part.support):  # an angle may be given modulo 2π
                inside = torch.ones_like(inside)
            whole = inside.reshape(inside.shape + (1,) * (value.dim() - inside.dim()))
            held = value.where(whole, part.inner_value())
            free = part.transform.inv(held)
            change = -part.transform.log_abs_det_jacobian(free, held)
            inside = inside.reshape(*value.shape[: sample + plates], -1).all(-1)
            change = part.counted(_sum_rightmost(change, change.dim() - sample - plates).where(inside, -torch.inf))
            if name in absent:
                change = change.where(absent[name], -_normal(free, sample + plates))
            axes = [sample + plates + dim for dim in self.dims]
            front = [*range(sample, sample + len(axes))]
            free, change = free.movedim(axes, front), change.movedim(axes, front)
            rows = dict(zip(self.dims, free.shape[sample:], strict=False))
            aligned = [rows.get(dim, 1) for dim in range(-self.depth, 0)]
            flat = free.reshape(*free.shape[:sample], *aligned, -1) if self.dims else part.gather(free)
            packed.append(flat)
            change = _sum_rightmost(change, change.dim() - sample - len(axes))
            changes.append(change.reshape((*change.shape[:sample], *aligned)))
        return torch.cat(packed, -1), sum(changes[1:], changes[0])

    def check_same(self, owner: str, other: Packing) -> None:
        """Raise ValueError if the sites have other supports in another packing, built with other arguments."""
        shared = [name for name in self.parts if name in other.parts]
        flags = [alike(self.parts[name].two_values(), other.parts[name].two_values()) for name in shared]
        same = {*itertools.compress(shared, torch.stack(flags).tolist() if flags else [])}  # one read of numbers
        for name, part in self.parts.items():
            if name not in same:
                there = other.parts.get(name)
                supports = f"({there and there.support}) than the guide was built for ({part.support})"
                fault = f"with these arguments latent site {name!r} has another support {supports}"
                raise ValueError(f"{owner}: {fault}. {stretched(name)}")


def place(sites: Unpacked, plates: dict[str, Any], absent: Absent = NONE) -> dict[str, Tensor]:
    """Put unpacked latents at their sites, in their plates, and return the values."""
    placed = {}
    for name, part, value, log_det in sites:
        with ExitStack() as stack:
            for frame in part.plates:
                stack.enter_context(plates[frame.name])
            if part.present is not None:
                stack.enter_context(poutine.mask(mask=part.present))
            value = value.clone()  # models may write into their latents, and torch forbids that for parts of one vector
            checked = False if is_traced() else None  # a graph cannot branch on numbers
            fn = dist.Delta(value, log_density=-log_det, event_dim=part.event_dim, validate_args=checked)
            placed[name] = pyro.sample(name, fn, infer={KEEPS_MASK: name in absent})
    return placed


def _normal(free: Tensor, batch_dim: int) -> Tensor:
    """Return the log-density of a standard normal over the dimensions beyond those of a batch."""
    return _sum_rightmost(dist.Normal(0.0, 1.0).log_prob(free), free.dim() - batch_dim)


def alike(one: Tensor, other: Tensor) -> Tensor:
    """Return True, as a tensor, if two tensors have one shape and, nearly, the same values."""
    if one.shape != other.shape:
        return torch.zeros((), dtype=torch.bool, device=one.device)
    return one.isclose(other.to(one), rtol=1e-4, atol=1e-6).all()


def _of_one_row(owner: str, name: str, support: Any, axis: int, rows: int) -> Any:
    """Return a support with one row in place of all, since plates expand bounds and other data have other rows."""
    one = copy.copy(support)
    for key, bound in vars(support).items():
        if isinstance(bound, constraints.Constraint):
            setattr(one, key, _of_one_row(owner, name, bound, axis, rows))
        elif isinstance(bound, Tensor) and bound.dim() >= -axis and bound.shape[axis] == rows:
            first = bound.narrow(axis, 0, 1)
            if not (bound == first).all():
                what = f"the support of latent site {name!r}, {support}, differs from row to row"
                raise ValueError(f"{owner}: {what}. {stretched(name)}")
            setattr(one, key, first)
    return one


def stretched(name: str) -> str:
    """Return the advice on latents whose support is not fixed."""
    drawn = f"{name} = pyro.deterministic({name!r}, low + (high - low) * u)"
    return f"Draw it on a fixed scale and stretch it: u ~ Uniform(0, 1), {drawn}."


class Moving:
    """The map between packed latents and a model's latents, for some arguments.

    Args:
        call: The call of a guide.
        packing: The layout of the latents.
        engine: The way to run many draws, ``"vmap"`` or ``"loop"``; by default ``"vmap"`` if it gives two draws the
            same values as single runs do.
    """

    def __init__(self, call: Call, packing: Packing, engine: str | None = None) -> None:
        _, model = call.model.args  # without the handler that initialises latents, since all are given values
        alone = Runner(model, call.args, call.kwargs, call.prototype, nesting_of(call.prototype))
        self._packing = packing
        self.engine = engine or self._fastest(alone)
        self._program = alone.by(self.engine)

    def unpack(self, latent: Tensor) -> Unpacked:
        """Yield the sites in vectors ``(*sample, *1s, D)`` inside of plates, as :meth:`Packing.unpack` does."""
        found = self._constrained(self._program.run, latent.reshape(-1, self._packing.size))
        for name, part in self._packing.parts.items():
            sample = latent.shape[: max(0, latent.dim() - 1 - len(part.batch))]
            value, log_det = (found[key].reshape((*sample, *found[key].shape[1:])) for key in (name, f"log det {name}"))
            yield name, part, value, part.counted(log_det)

    def values(self, latent: Tensor) -> Values:
        """Map vectors ``(N, D)`` to values of the sites, ``(N, *site_shape)``."""
        found = self._constrained(self._program.run, latent)
        return {name: found[name] for name in self._packing.parts}

    def pack(self, values: Values) -> tuple[Tensor, Tensor]:
        """Pack values ``(*batch, *site_shape)`` into ``(*batch, D)``, and return log|det| of that map too, in nats.

        The log-determinant is -inf outside of the support, and the vectors are arbitrary there.
        """
        name, part = next(iter(self._packing.parts.items()))
        batch = values[name].shape[: values[name].dim() - part.start.dim()]
        held = {name: values[name].reshape(-1, *part.start.shape) for name, part in self._packing.parts.items()}
        found = self._program.run(self._read(_free), held, batch.numel())
        parts = self._packing.parts
        changes = (parts[name].counted(found[f"log det {name}"]).reshape(batch.numel(), -1).sum(-1) for name in held)
        log_det = torch.as_tensor(sum(changes)).neg()
        vectors = torch.cat([parts[name].gather(found[name]) for name in held], -1).reshape(*batch, -1)
        return vectors.nan_to_num(0.0, 0.0, 0.0), log_det.where(log_det.isfinite(), -torch.inf).reshape(batch)

    def _constrained(self, run: Run, latent: Tensor) -> Values:
        # The handler lies outside of the model's own, which may change its distributions.
        free, read = self._packing.free(latent), self._read(value_of)
        return run(read, free, len(latent), place=lambda model, data: _Constrained(data)(model))

    def _read(self, value: Callable[[Site], Tensor]) -> Callable[[View], Values]:
        def read(view: View) -> Values:
            values = {name: view.read(name, value) for name in self._packing.parts}
            return {**values, **{f"log det {name}": view.read(name, _log_det) for name in self._packing.parts}}

        return read

    @torch.no_grad()
    def _fastest(self, program: Runner) -> str:
        start = self._packing.start
        two = torch.stack((start, start + 0.5))
        alone = self._constrained(program.run, two)
        try:  # not a plate, since a guide may itself run in the plate of draws
            found = self._constrained(partial(program.by("vmap").run, divides=False), two)
        except Exception:  # a user's program may raise anything
            return "loop"
        agree = all(torch.allclose(found[name], alone[name], rtol=1e-4, atol=1e-5) for name in alone)
        return "vmap" if agree else "loop"


def moving_supports(call: Call, scale: float) -> list[str]:
    """Return the latents whose supports change if all latents move by ``scale`` in the unconstrained space."""
    packing = Packing(call.owner, call.latents.values())
    sites, free = call.trace_at(packing.values(packing.start + scale)).nodes, packing.free(packing.start)
    here = packing.values(packing.start)
    return [n for n in free if n in sites and not alike(biject_to(sites[n]["fn"].support)(free[n]), here[n])]


def check_supports(call: Call, moving: list[str]) -> None:
    """Refuse latents whose supports depend on another latent."""
    if moving:
        name, support = moving[0], call.latents[moving[0]]["fn"].support
        fault = f"the support of latent site {name!r}, {support}, depends on another latent"
        raise ValueError(f"{call.owner}: {fault}. {stretched(name)}")


def _free(site: Site) -> Tensor:
    return biject_to(site["fn"].support).inv(site["value"])


def _log_det(site: Site) -> Tensor:
    """Return the log-determinant of constraining a site, of its batch shape; NaN outside of the support."""
    support, value = site["fn"].support, site["value"]
    transform = biject_to(support)
    found = transform.log_abs_det_jacobian(transform.inv(value), value)
    batch = value.dim() - site["fn"].event_dim
    inside = support.check(value)
    inside = inside.reshape(*inside.shape[:batch], -1).all(-1)
    return _sum_rightmost(found, found.dim() - batch).where(inside, torch.nan)


class _Constrained(Messenger):
    """Handler that gives sites unconstrained values, constrained to the supports in the run."""

    def __init__(self, free: Values) -> None:
        super().__init__()
        self._free = free

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._free and not msg["is_observed"]:
            msg["value"] = biject_to(msg["fn"].support)(self._free[msg["name"]])
