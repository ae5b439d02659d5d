"""Latent sites packed into one vector: all sites outside of plates, or the sites in one row of some plates.

A row's vector holds all numbers of a site in that row, with dimensions of other plates.  So the dimensions of the
row's plates belong to the batch of vectors, and all other dimensions of a site to the vector.  Vectors are *aligned*:
their batch has the rows at the dimensions of the plates, and 1 at dimensions between and to the right of them.
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
from pyro import poutine
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.utils import _sum_rightmost

from ..compiler_state import is_traced
from ..programs.latents import KEEPS_MASK
from ..programs.masks import among_absent, present_of
from .circles import is_circular
from .guide_call import Key, frames_of, rows_in

Absent = Mapping[str, Tensor]  # for each site that is absent in part, a mask of its present parts
NONE: Absent = MappingProxyType({})


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
            name, fn, value, support = site["name"], site["fn"], site["value"], site["fn"].support
            for dim in self.dims:
                support = _of_one_row(owner, name, support, dim - fn.event_dim, rows_in(site, dim))
            transform = biject_to(support)
            free = transform.inv(value).shape
            batch = list(free[: value.dim() - fn.event_dim])
            for dim in self.dims:
                batch[dim] = 1
            event, plates, counts = free[len(batch) :], tuple(site["cond_indep_stack"]), present.get(name)
            shape, depth, start = torch.Size(batch), fn.event_dim, value.detach()
            self.parts[name] = PackedSite(support, transform, shape, event, depth, plates, start, counts)
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

    def _split(self, latent: Tensor) -> Iterator[tuple[str, PackedSite, Tensor]]:
        for (name, part), chunk in zip(self.parts.items(), latent.split(self._sizes, -1), strict=True):
            yield name, part, chunk

    def _free(self, part: PackedSite, chunk: Tensor, sample: Sequence[int]) -> Tensor:
        """Return the unconstrained values of a site, ``(*sample, *batch, *event)``, from its numbers in vectors."""
        if not self.dims:
            return part.scatter(chunk, sample)
        first, places = len(sample), [len(part.batch) + dim for dim in self.dims]
        rows = [chunk.shape[chunk.dim() - 1 + dim] for dim in self.dims]
        rest = [size for place, size in enumerate(part.batch) if place not in places]
        free = chunk.reshape((*sample, *rows, *rest, *part.event))
        return free.movedim([*range(first, first + len(rows))], [first + place for place in places])

    def free(self, latent: Tensor) -> dict[str, Tensor]:
        """Map vectors ``(*batch, *rows, size)`` to unconstrained values of the sites, ``(*batch, *shape)``."""
        sample = latent.shape[: latent.dim() - 1 - self.depth]
        return {name: self._free(part, chunk, sample) for name, part, chunk in self._split(latent)}

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
        for name, part, chunk in self._split(latent):
            sample = latent.shape[: max(0, latent.dim() - 1 - len(part.batch))]
            depth = len(sample) + len(part.batch)
            free = self._free(part, chunk, sample)
            value = part.transform(free)
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
            aligned = [1] * self.depth
            for dim, place in zip(self.dims, front, strict=True):
                aligned[dim] = free.shape[place]
            flat = free.reshape(*free.shape[:sample], *aligned, -1) if self.dims else part.gather(free)
            packed.append(flat)
            change = _sum_rightmost(change, change.dim() - sample - len(axes))
            changes.append(change.reshape((*change.shape[:sample], *aligned)))
        return torch.cat(packed, -1), sum(changes[1:], changes[0])

    def check_same(self, owner: str, other: Packing) -> None:
        """Raise ValueError if the sites have other supports in another packing, built with other arguments."""
        for name, part in self.parts.items():
            there = other.parts.get(name)
            if there is None or not all(alike(part.inner_value(at), there.inner_value(at)) for at in (0.0, 1.0)):
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


def alike(one: Tensor, other: Tensor) -> bool:
    """True if two tensors have one shape and, nearly, the same values."""
    return one.shape == other.shape and torch.allclose(one, other.to(one), rtol=1e-4, atol=1e-6)


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
