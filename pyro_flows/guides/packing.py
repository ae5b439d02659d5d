"""Latent sites packed into one vector: all sites outside of a plate, or the sites in one row of the plate.

A row's vector holds all numbers of a site in that row, with dimensions of other plates.  So the plate's dimension
belongs to the batch of vectors, and all other dimensions of a site to the vector.

Supports that depend on other latents, such as that of Uniform(0, theta), are known once these have values.  Then
latents are constrained one by one in a run of the model.  That map is triangular, and its log-determinant is the sum
over the sites.  The Stan Math Library (Carpenter et al. 2015, arXiv:1509.07164) constrains parameters in the order of
their declarations likewise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.utils import _sum_rightmost

from ..programs.engines import Site, Values, View, value_of
from ..programs.latents import KEEPS_MASK
from ..programs.nesting import nesting_of
from ..programs.program import Program
from .circles import is_circular
from .guide_call import Call, rows_in

Absent = Mapping[str, Tensor]  # for each site that is absent in part, a mask of its present parts
NONE: Absent = MappingProxyType({})


class Part(NamedTuple):
    """A site in the vector: its batch shape with 1 for the plate's rows, and the shape of an unconstrained event."""

    support: constraints.Constraint
    transform: Transform
    batch: torch.Size
    event: torch.Size
    event_dim: int
    plates: tuple[Any, ...]
    start: Tensor

    @property
    def size(self) -> int:
        """The number of unconstrained numbers."""
        return self.batch.numel() * self.event.numel()

    def inner_value(self, at: float = 0.0) -> Tensor:
        """Return the value inside of the support that a constant of the unconstrained space has."""
        return self.transform(self.start.new_full(self.event, at))


Unpacked = Iterator[tuple[str, Part, Tensor, Tensor]]


class Packing:
    """The layout of sites in a vector.

    Args:
        owner: The class of the guide, for errors.
        sites: Latent sites of a prototype trace.
        dim: The (negative) dimension of the plate that has one vector for each row; None for a single vector.

    Attributes:
        size: The length of the vector.

    Raises:
        ValueError: If the support of a site differs from row to row.
    """

    def __init__(self, owner: str, sites: Iterable[dict[str, Any]], dim: int | None = None) -> None:
        self.parts: dict[str, Part] = {}
        self.owner, self.dim = owner, dim
        for site in sites:
            name, fn, value, support = site["name"], site["fn"], site["value"], site["fn"].support
            if dim is not None:
                support = _of_one_row(name, support, dim - fn.event_dim, rows_in(site, dim))
            transform = biject_to(support)
            free = transform.inv(value).shape
            batch = list(free[: value.dim() - fn.event_dim])
            if dim is not None:
                batch[dim] = 1
            event, plates = free[len(batch) :], tuple(site["cond_indep_stack"])
            self.parts[name] = Part(support, transform, torch.Size(batch), event, fn.event_dim, plates, value.detach())
        self._sizes = [part.size for part in self.parts.values()]
        self.size = sum(self._sizes)

    @property
    def trailing(self) -> int:
        """The number of dimensions of plates to the right of the rows'."""
        return 0 if self.dim is None else -1 - self.dim

    @property
    def start(self) -> Tensor:
        """The prototype's vectors, ``([rows,] size)``."""
        return self.pack({name: part.start for name, part in self.parts.items()})[0]

    @property
    def coordinates(self) -> list[str]:
        """The site of each number in the vector."""
        return [name for name, part in self.parts.items() for _ in range(part.size)]

    def _split(self, latent: Tensor) -> Iterator[tuple[str, Part, Tensor]]:
        for (name, part), chunk in zip(self.parts.items(), latent.split(self._sizes, -1), strict=True):
            yield name, part, chunk

    def _free(self, part: Part, chunk: Tensor, sample: Sequence[int]) -> Tensor:
        """Return the unconstrained values of a site, ``(*sample, *batch, *event)``, from its numbers in vectors."""
        if self.dim is None:
            return chunk.reshape((*sample, *part.batch, *part.event))
        place = len(part.batch) + self.dim
        rest = part.batch[:place] + part.batch[place + 1 :] + part.event
        return chunk.reshape(*sample, -1, *rest).movedim(len(sample), len(sample) + place)

    def free(self, latent: Tensor) -> dict[str, Tensor]:
        """Map vectors ``(*batch, [rows,] size)`` to unconstrained values of the sites, ``(*batch, *shape)``."""
        sample = latent.shape[: latent.dim() - 1 - (self.dim is not None)]
        return {name: self._free(part, chunk, sample) for name, part, chunk in self._split(latent)}

    def values(self, latent: Tensor) -> dict[str, Tensor]:
        """Map vectors ``(*batch, [rows,] size)`` to values of the sites, ``(*batch, *site_shape)``."""
        return {name: self.parts[name].transform(free) for name, free in self.free(latent).items()}

    def unpack(self, latent: Tensor, absent: Absent = NONE) -> Unpacked:
        """Yield the sites in vectors inside of plates: names, parts, values and log|det| of the constraining map.

        For an absent part the last is the log-density of a standard normal: see ``masked.py``.

        Args:
            latent: The vectors, ``(*sample, *plates, size)``.  Of the plates only that of the rows has a size above 1.
            absent: The masks of sites that are absent in part.
        """
        for name, part, chunk in self._split(latent):
            sample = latent.shape[: max(0, latent.dim() - 1 - len(part.batch))]
            depth = len(sample) + len(part.batch)
            free = self._free(part, chunk, sample)
            value = part.transform(free)
            change = part.transform.log_abs_det_jacobian(free, value)
            change = _sum_rightmost(change, change.dim() - depth)
            if name in absent:  # the model's gradient there is 0, or not finite, and must not reach the guide
                change = change.where(absent[name], _normal(free, depth))
                value = value.where(absent[name].reshape(absent[name].shape + (1,) * part.event_dim), value.detach())
            yield name, part, value, change

    def pack(self, values: dict[str, Tensor], absent: Absent = NONE) -> tuple[Tensor, Tensor]:
        """Pack values ``(*sample, *site_shape)`` into ``(*sample, [rows,] size)``, and return log|det| of that map too.

        The log-determinant, in nats and of the shape of the batch, is -inf outside of the support.
        """
        packed, changes = [], []
        for name, part in self.parts.items():
            if name not in values:
                raise ValueError(f"{self.owner}.log_prob: values lack the latent site {name!r}.")
            value, plates = values[name], len(part.batch)
            sample = value.dim() - plates - part.event_dim
            if self.dim is None and value.shape[max(sample, 0) :] != part.start.shape:
                wanted = f"values[{name!r}] must have shape (*batch, *{tuple(part.start.shape)})"
                raise ValueError(f"{self.owner}.log_prob: {wanted}, got {tuple(value.shape)}.")
            inside = part.support.check(value)
            if is_circular(part.support):  # an angle may be given modulo 2π
                inside = torch.ones_like(inside)
            whole = inside.reshape(inside.shape + (1,) * (value.dim() - inside.dim()))
            held = value.where(whole, part.inner_value())
            free = part.transform.inv(held)
            change = -part.transform.log_abs_det_jacobian(free, held)
            inside = inside.reshape(*value.shape[: sample + plates], -1).all(-1)
            change = _sum_rightmost(change, change.dim() - sample - plates).where(inside, -torch.inf)
            if name in absent:
                change = change.where(absent[name], -_normal(free, sample + plates))
            if self.dim is not None:
                axis = sample + plates + self.dim
                free, change = free.movedim(axis, sample), change.movedim(axis, sample)
            batch = sample + (self.dim is not None)
            packed.append(free.reshape(*free.shape[:batch], -1))
            changes.append(_sum_rightmost(change, change.dim() - batch))
        return torch.cat(packed, -1), sum(changes[1:], changes[0])

    def check_same(self, owner: str, other: Packing) -> None:
        """Raise ValueError if the sites have other supports in another packing, built with other arguments."""
        for name, part in self.parts.items():
            there = other.parts.get(name)
            if there is None or not all(_alike(part.inner_value(at), there.inner_value(at)) for at in (0.0, 1.0)):
                supports = f"({there and there.support}) than the guide was built for ({part.support})"
                fault = f"with these arguments latent site {name!r} has another support {supports}"
                raise ValueError(f"{owner}: {fault}. {_stretched(name)}")


def place(sites: Unpacked, plates: dict[str, Any], absent: Absent = NONE) -> dict[str, Tensor]:
    """Put unpacked latents at their sites, in their plates, and return the values."""
    placed = {}
    for name, part, value, log_det in sites:
        with ExitStack() as stack:
            for frame in part.plates:
                stack.enter_context(plates[frame.name])
            fn = dist.Delta(value, log_density=-log_det, event_dim=part.event_dim)
            placed[name] = pyro.sample(name, fn, infer={KEEPS_MASK: name in absent})
    return placed


def _normal(free: Tensor, batch_dim: int) -> Tensor:
    """Return the log-density of a standard normal over the dimensions beyond those of a batch."""
    return _sum_rightmost(dist.Normal(0.0, 1.0).log_prob(free), free.dim() - batch_dim)


def _alike(one: Tensor, other: Tensor) -> bool:
    """True if two tensors have one shape and, nearly, the same values."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def _of_one_row(name: str, support: Any, axis: int, rows: int) -> Any:
    """Return a support with one row in place of all, since plates expand bounds and other data have other rows."""
    one = copy.copy(support)
    for key, bound in vars(support).items():
        if isinstance(bound, constraints.Constraint):
            setattr(one, key, _of_one_row(name, bound, axis, rows))
        elif isinstance(bound, Tensor) and bound.dim() >= -axis and bound.shape[axis] == rows:
            first = bound.narrow(axis, 0, 1)
            if not (bound == first).all():
                what = f"the support of latent site {name!r}, {support}, differs from row to row"
                raise ValueError(f"AutoPlateFlow: {what}. {_stretched(name)}")
            setattr(one, key, first)
    return one


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
        self._program = Program(model, call.args, call.kwargs, call.prototype, nesting_of(call.prototype))
        self._packing = packing
        self.engine = self._program.engine = engine or self._fastest()

    def unpack(self, latent: Tensor) -> Unpacked:
        """Yield the sites in vectors ``(*sample, *1s, D)`` inside of plates, as :meth:`Packing.unpack` does."""
        found = self._constrained(latent.reshape(-1, self._packing.size))
        for name, part in self._packing.parts.items():
            sample = latent.shape[: max(0, latent.dim() - 1 - len(part.batch))]
            value, log_det = (found[key].reshape((*sample, *found[key].shape[1:])) for key in (name, f"log det {name}"))
            yield name, part, value, log_det

    def values(self, latent: Tensor) -> Values:
        """Map vectors ``(N, D)`` to values of the sites, ``(N, *site_shape)``."""
        found = self._constrained(latent)
        return {name: found[name] for name in self._packing.parts}

    def pack(self, values: Values) -> tuple[Tensor, Tensor]:
        """Pack values ``(*batch, *site_shape)`` into ``(*batch, D)``, and return log|det| of that map too, in nats.

        The log-determinant is -inf outside of the support, and the vectors are arbitrary there.
        """
        name, part = next(iter(self._packing.parts.items()))
        batch = values[name].shape[: values[name].dim() - part.start.dim()]
        held = {name: values[name].reshape(-1, *part.start.shape) for name, part in self._packing.parts.items()}
        found = self._program.run(self._read(_free), held, batch.numel())
        total = sum(found[f"log det {name}"].reshape(batch.numel(), -1).sum(-1) for name in held)
        log_det = torch.as_tensor(total).neg()
        vectors = torch.cat([found[name].reshape(*batch, -1) for name in held], -1)
        return vectors.nan_to_num(0.0, 0.0, 0.0), log_det.where(log_det.isfinite(), -torch.inf).reshape(batch)

    def _constrained(self, latent: Tensor) -> Values:
        # The handler lies outside of the model's own, which may change its distributions.
        free, read = self._packing.free(latent), self._read(value_of)
        return self._program.run(read, free, len(latent), place=lambda model, data: _Constrained(data)(model))

    def _read(self, value: Callable[[Site], Tensor]) -> Callable[[View], Values]:
        def read(view: View) -> Values:
            values = {name: view.read(name, value) for name in self._packing.parts}
            return {**values, **{f"log det {name}": view.read(name, _log_det) for name in self._packing.parts}}

        return read

    @torch.no_grad()
    def _fastest(self) -> str:
        start = self._packing.start
        two = torch.stack((start, start + 0.5))
        alone = self._constrained(two)
        self._program.engine = "vmap"  # a guide may itself run in the plate of draws of engine "plate"
        try:
            found = self._constrained(two)
        except Exception:  # a user's program may raise anything
            return "loop"
        agree = all(torch.allclose(found[name], alone[name], rtol=1e-4, atol=1e-5) for name in alone)
        return "vmap" if agree else "loop"


def moving_supports(call: Call, scale: float) -> list[str]:
    """Return the latents whose supports change if all latents move by ``scale`` in the unconstrained space."""
    packing = Packing(call.owner, call.latents.values())
    sites, free = call.trace_at(packing.values(packing.start + scale)).nodes, packing.free(packing.start)
    here = packing.values(packing.start)
    return [n for n in free if n in sites and not _alike(biject_to(sites[n]["fn"].support)(free[n]), here[n])]


def _stretched(name: str) -> str:
    """Return the advice on latents whose support is not fixed."""
    drawn = f"{name} = pyro.deterministic({name!r}, low + (high - low) * u)"
    return f"Draw it on a fixed scale and stretch it: u ~ Uniform(0, 1), {drawn}."


def check_supports(call: Call, moving: list[str]) -> None:
    """Refuse latents whose supports depend on another latent."""
    if moving:
        name, support = moving[0], call.latents[moving[0]]["fn"].support
        fault = f"the support of latent site {name!r}, {support}, depends on another latent"
        raise ValueError(f"{call.owner}: {fault}. {_stretched(name)}")


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
