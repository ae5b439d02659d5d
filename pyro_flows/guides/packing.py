"""Latent sites side by side in one vector: all those outside of a plate, or those of one row of the plate.

A row's vector holds whatever of a site lies in the row, dimensions of other plates included.  So the plate's dimension
belongs to the batch of vectors, and all other dimensions of a site to the vector itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.utils import _sum_rightmost

from ..programs.latents import KEEPS_MASK
from .circles import is_circular
from .guide_call import Call
from .nonfinite import Sites
from .prototype import look
from .refusals import check_shapes, other_support, stretched

Absent = Mapping[str, Tensor]  # for each site that is absent in part, a mask of what counts
NONE: Absent = MappingProxyType({})


class Part(NamedTuple):
    """A site in the vector: its batch shape with 1 for the plate's rows, and what an event is, unconstrained."""

    support: constraints.Constraint
    transform: Transform
    batch: torch.Size
    event: torch.Size
    event_dim: int
    plates: tuple[Any, ...]
    start: Tensor


class Packing:
    """How sites lie in a vector.

    Args:
        owner: The class of the guide, for errors.
        sites: Latent sites of a prototype trace.
        dim: The dimension, negative, of the plate whose rows have a vector each; None where there is one vector.
        rows: How many of the plate's rows the prototype has.

    Attributes:
        size: The length of the vector.

    Raises:
        ValueError: If the support of a site differs from row to row.
    """

    def __init__(self, owner: str, sites: Iterable[dict[str, Any]], dim: int | None = None, rows: int = 1) -> None:
        self.parts: dict[str, Part] = {}
        self.owner, self.dim = owner, dim
        for site in sites:
            name, fn, value = site["name"], site["fn"], site["value"]
            support = fn.support if dim is None else _of_one_row(name, fn.support, dim - fn.event_dim, rows)
            transform = biject_to(support)
            free = transform.inv(value).shape
            batch = list(free[: value.dim() - fn.event_dim])
            if dim is not None:
                batch[dim] = 1
            event, plates = free[len(batch) :], tuple(site["cond_indep_stack"])
            start = value.detach()
            self.parts[name] = Part(support, transform, torch.Size(batch), event, fn.event_dim, plates, start)
        self.size = sum(self._sizes())

    @property
    def trailing(self) -> int:
        """How many dimensions of plates lie to the right of that of the rows."""
        return -1 - (-1 if self.dim is None else self.dim)

    @property
    def depth(self) -> int:
        """How many dimensions the plates of the sites take."""
        return max((len(part.batch) for part in self.parts.values()), default=0)

    @property
    def start(self) -> Tensor:
        """The prototype's vectors, ``([rows,] size)``."""
        return self.pack({name: part.start for name, part in self.parts.items()})[0]

    def _sizes(self) -> list[int]:
        return [part.batch.numel() * part.event.numel() for part in self.parts.values()]

    def unpack(self, latent: Tensor, absent: Absent = NONE) -> Iterator[tuple[str, Part, Tensor, Tensor]]:
        """Vectors ``(*batch, size)`` as sites: their names, parts, values and log|det| of the constraining map.

        Where a part of a site is absent the last is the log-density of a standard normal: see ``masked.py``.

        The batch may have dimensions to the left of all plates; those of plates must be 1 but for the plate of rows.
        """
        lead = latent.shape[:-1]
        for (name, part), chunk in zip(self.parts.items(), latent.split(self._sizes(), -1), strict=True):
            depth = max(len(lead), len(part.batch))
            outer, inner = (torch.Size((1,) * (depth - len(shape)) + tuple(shape)) for shape in (lead, part.batch))
            # Of each dimension either the batch or the site has 1, so that interleaved they merge.
            free = chunk.reshape(outer + inner + part.event)
            order = [place for i in range(depth) for place in (i, depth + i)]
            free = free.permute(order + list(range(2 * depth, free.dim())))
            free = free.reshape([a * b for a, b in zip(outer, inner, strict=True)] + list(part.event))
            value = part.transform(free)
            change = part.transform.log_abs_det_jacobian(free, value)
            change = _sum_rightmost(change, change.dim() - depth)
            if name in absent:  # no gradient of the model's leads there: it is 0, or else not finite
                change = change.where(absent[name], _normal(free, depth))
                value = value.where(absent[name].reshape(absent[name].shape + (1,) * part.event_dim), value.detach())
            yield name, part, value, change

    def place(self, latent: Tensor, plates: dict[str, Any], absent: Absent) -> Iterator[tuple[str, Tensor]]:
        """Put packed latents at their sites, in their plates: each site's name and value.

        Args:
            latent: The vectors.
            plates: The plates, by name.
            absent: What counts of sites that are absent in part.
        """
        for name, part, value, log_det in self.unpack(latent, absent):
            frames = [plates[frame.name] for frame in part.plates]
            yield name, put(name, value, log_det, part.event_dim, frames, name in absent)

    def sites(self, rows: Tensor | None = None) -> Sites:
        """The sites of a packed draw, of some rows of the plate."""
        return Sites(self._coordinates, lambda z: {name: value for name, _, value, _ in self.unpack(z)}, self.dim, rows)

    def _coordinates(self) -> list[str]:
        return [name for name, size in zip(self.parts, self._sizes(), strict=True) for _ in range(size)]

    def values(self, latent: Tensor, size: int) -> Iterator[tuple[str, Tensor]]:
        """Draws ``(size, ..., size of a vector)``: each site's name and values, ``(size, *site_shape)``."""
        for name, part, value, _ in self.unpack(latent):
            yield name, value.reshape(size, *value.shape[value.dim() - len(part.batch) - part.event_dim :])

    def pack(self, values: dict[str, Tensor], absent: Absent = NONE) -> tuple[Tensor, Tensor]:
        """The way back: ``(*sample, [rows,] size)``, and log|det| of it, for values ``(*sample, *site_shape)``.

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
            if is_circular(part.support):  # any representative of an angle
                inside = torch.ones_like(inside)
            held = value.where(inside.reshape(inside.shape + (1,) * (value.dim() - inside.dim())), _anywhere(part))
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

    def check_same(self, other: Packing) -> None:
        """Refuse sites whose supports are other ones, as they may be with other arguments."""
        for name, part in self.parts.items():
            there = other.parts.get(name)
            if there is None or not all(_alike(part, there, at) for at in (0.0, 1.0)):
                raise other_support(self.owner, name, None if there is None else there.support, part.support)


def check_same(call: Call) -> None:
    """Refuse arguments with which the latents have other shapes or supports than those that a guide was built for."""
    if call.model is not None:  # which saved guides are without
        found = look(call)
        check_shapes(call, found)
        there = Packing(call.owner, [found.latents[name] for name in call.latents])
        Packing(call.owner, call.latents.values()).check_same(there)


def put(name: str, value: Tensor, log_det: Tensor, event_dim: int, plates: list[Any], masked: bool = False) -> Tensor:
    """Put a value that was drawn elsewhere at its site, in its plates; it was constrained with that log|det|."""
    with ExitStack() as stack:
        for plate in plates:
            stack.enter_context(plate)
        fn = dist.Delta(value, log_density=-log_det, event_dim=event_dim)
        return pyro.sample(name, fn, infer={KEEPS_MASK: masked})


def _normal(free: Tensor, batch_dim: int) -> Tensor:
    """The log-density of a standard normal over the dimensions beyond those of a batch."""
    log_prob = -0.5 * (free.square() + math.log(2 * math.pi))
    return _sum_rightmost(log_prob, log_prob.dim() - batch_dim)


def _anywhere(part: Part, at: float = 0.0) -> Tensor:
    """A value inside of the support."""
    return part.transform(torch.full(part.event, at, dtype=part.start.dtype, device=part.start.device))


def _alike(one: Part, other: Part, at: float) -> bool:
    here, there = _anywhere(one, at), _anywhere(other, at)
    return here.shape == there.shape and torch.allclose(here, there, rtol=1e-4, atol=1e-6)


def _of_one_row(name: str, support: Any, axis: int, rows: int) -> Any:
    """A support with one row in place of all: plates expand bounds to their rows, and other data have other rows."""
    one = copy.copy(support)
    for key, bound in vars(support).items():
        if isinstance(bound, constraints.Constraint):
            setattr(one, key, _of_one_row(name, bound, axis, rows))
        elif isinstance(bound, Tensor) and bound.dim() >= -axis and bound.shape[axis] == rows:
            first = bound.narrow(axis, 0, 1)
            if not (bound == first).all():
                what = f"the support of latent site {name!r}, {support}, differs from row to row"
                raise ValueError(f"AutoPlateFlow: {what}. {stretched(name)}")
            setattr(one, key, first)
    return one
