"""Calls of guides as values, looks at a model, and the masks of its latents.

A look finds the latents of a model, its data, and the rows of plates.

A mask takes elements out of the model's density, so it must take them out of the guide's.  An element that a mask hides
is *absent* if no visible site depends on it: the steps that pad a series, or the rows that ``obs_mask`` observes.  A
vector outside of rows lacks its absent elements, which have a fixed value.  Rows that have a flow take the mask of the
model.  An absent part of a row has a standard normal distribution in the unconstrained space, which is taken off the
guide's density.  A latent that one number masks as a whole, and on which data depend, has a flat prior.  The guide
draws and scores it as any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from pyro import poutine, validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from ..programs.engines import Site
from ..programs.error_text import explained
from ..programs.latents import named
from ..programs.masks import is_masked, is_observation, mask_of
from ..programs.program import arguments_of, signature_of
from ..programs.traces import outside_plates, trace_at

Key = tuple[str, ...]  # the plates of rows that have a flow, the outermost first
NONE: Mapping[str, Tensor] = MappingProxyType({})


class Rows(NamedTuple):
    """Rows of a plate in one run of a model.

    Attributes:
        full_size: The number of all rows of the plate.
        size: The number of rows in the run.
        chosen: The ``subsample=`` that the model gives the plate, or None.
    """

    full_size: int
    size: int
    chosen: Tensor | None = None


class Call(NamedTuple):
    """The call of a guide.

    Attributes:
        owner: The name for errors: the class of the guide, or the function that calls it.
        model: The model; None for a guide that was loaded from a file.
        args: The model's arguments.
        kwargs: Its keyword arguments.
        prototype: The trace of the model that the guide was built from.
        plates: The plates whose rows have flows.
        outline: The names and kinds of the model's arguments, for a guide without a model; None if they are unknown.
    """

    owner: str
    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prototype: Any = None
    plates: tuple[str, ...] = ()
    outline: inspect.Signature | None = None

    @property
    def signature(self) -> inspect.Signature | None:
        """The signature of the model, as far as it is known."""
        return self.outline if self.model is None else signature_of(self.model)

    @property
    def latents(self) -> dict[str, dict[str, Any]]:
        """The latent sites of the prototype, by name."""
        return dict(self.prototype.iter_stochastic_nodes())

    @property
    def start(self) -> dict[str, Tensor]:
        """The values of the prototype's latents."""
        return {name: site["value"].detach() for name, site in self.latents.items()}

    def is_outside(self, site: dict[str, Any]) -> bool:
        """True if a site lies outside of the plates whose rows have flows."""
        return not frames_of(site, self.plates)

    def trace_at(self, values: dict[str, Tensor]) -> Trace:
        """Return the trace of a run of the model with some sites held at values."""
        return trace_at(self.model, values, self.args, self.kwargs)

    def same_draws(self) -> AbstractContextManager[None]:
        """Restore the random number generators after a block, on the CPU and on the latents' devices."""
        return torch.random.fork_rng(sorted({v.device.index for v in self.start.values() if v.device.type == "cuda"}))

    def look(self, *, until: Collection[str] | None = None, indices: Mapping[str, Tensor] = NONE) -> Found:
        """Run the model, hidden from outer handlers, and return its sites; random number generators are restored.

        Args:
            until: The run may end once these latents and the plates were found; None runs all of the model.
            indices: The rows for each plate to take, if the model subsamples it.

        Raises:
            ValueError: If the model does not enter a plate.
        """
        found = Found(self.owner, self.plates, until, indices)
        hidden, quietly = poutine.block(), suppress(Reached)
        run = explained("model", arguments_of(self.model, self.args, self.kwargs))(self.model)
        with hidden, torch.no_grad(), outside_plates(), validation_enabled(False), self.same_draws(), quietly, found:
            run(*self.args, **self.kwargs)
        for plate in self.plates:
            if plate not in found.rows:
                found.rows[plate] = found.rows_in_frame(plate)
        return found


class Reached(BaseException):
    """Signal that ends a run of a model.  ``except Exception`` in the model does not catch a ``BaseException``."""


class Found(Messenger):
    """The sites and plates of a run of a model.

    Args:
        owner: The name for errors.
        plates: The plates whose rows to find.
        until: The sites, drawn or observed, after which the run may end; None to go on to the end.
        indices: The rows for each plate to take, if the model subsamples it.

    Attributes:
        latents: The latent sites, by name.
        observed: The observed sites, by name.
        frames: The frames of the plates around these sites, by name.
        given: The plates to which the model gives rows, ``subsample=``.
        rows: The rows of each of the plates that the model has entered.
    """

    def __init__(
        self, owner: str, plates: tuple[str, ...], until: Collection[str] | None, indices: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.owner, self.plates, self.indices = owner, plates, indices
        self._until = None if until is None else set(until)
        self.latents: dict[str, dict[str, Any]] = {}
        self.observed: dict[str, dict[str, Any]] = {}
        self.frames: dict[str, Any] = {}
        self.given: list[str] = []
        self.rows: dict[str, Rows] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, fn, chosen = msg["name"], msg["fn"], msg["value"]
        if not isinstance(fn, _Subsample):
            return
        if chosen is not None:
            self.given.append(name)
        if name in self.plates:
            size = fn.size if fn.subsample_size is None else fn.subsample_size
            if chosen is not None:
                chosen = torch.as_tensor(chosen)
                size = len(chosen)
            elif name in self.indices:
                msg["value"] = self.indices[name]
            self.rows[name] = Rows(fn.size, min(size, fn.size), chosen)
            self._stop(msg)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not isinstance(msg["fn"], _Subsample):
            self.frames.update((frame.name, frame) for frame in msg["cond_indep_stack"])
            kind = self.observed if msg["is_observed"] else self.latents
            kind[msg["name"]] = msg.copy()
            self._stop(msg)

    def _stop(self, msg: Any) -> None:
        placed = {*self.plates} <= self.rows.keys() | self.frames.keys()
        if self._until is not None and placed and self._until <= self.latents.keys() | self.observed.keys():
            self._until = None  # a model that catches the exception runs to its end
            raise Reached

    def rows_in_frame(self, plate: str) -> Rows:
        """Return the rows of a plate that is hidden, was made outside of the model, or has no size."""
        frame = self.frames.get(plate)
        if frame is None or not frame.vectorized:
            has = ", ".join(sorted(self.frames)) or "none"
            raise ValueError(f"{self.owner}: the model enters no plate {plate!r} of known size; it has {has}.")
        if frame.size > 0:
            return Rows(frame.full_size or frame.size, frame.size)
        inside = {name: site for name, site in self.latents.items() if frame_of(site, plate)}
        number = max((rows_in(site, frame.dim) for site in inside.values()), default=1)
        if not number:
            fault = f"latent site {next(iter(inside))!r} has no dimension for the rows of plate {plate!r}"
            raise ValueError(f"{self.owner}: {fault}. Give the number of its rows: pyro.plate({plate!r}, len(x)).")
        return Rows(number, number)


def frames_of(site: dict[str, Any], plates: Collection[str]) -> list[Any]:
    """Return the frames of some plates around a site, the outermost (leftmost) first."""
    found = [frame for frame in site["cond_indep_stack"] if frame.name in plates]
    return sorted(found, key=lambda frame: frame.dim)


def frame_of(site: dict[str, Any], plate: str) -> Any:
    """Return the frame of a plate around a site, or None."""
    return next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)


def rows_in(site: dict[str, Any], dim: int) -> int:
    """Return the size of a site in the (negative) dimension of a plate, or 0 if it lacks that dimension."""
    shape = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return int(shape[dim]) if len(shape) >= -dim else 0


FLAT = "For a flat prior write dist.ImproperUniform."
ROUND_OFF = 4.0  # of a log-density that does not depend on what moves, in units of its rounding error


class RowMasks(NamedTuple):
    """Masks of the latents in the rows of some plates.

    Attributes:
        rows: True for the rows that count, aligned with the plates' dimensions; True itself if all do.
        parts: For each latent that is absent in part, a mask of its present parts, over its batch shape.
        hidden: For each latent that is masked, the same mask, whether it hides whole rows or parts.
    """

    rows: Tensor | bool = True
    parts: dict[str, Tensor] = {}
    hidden: dict[str, Tensor] = {}

    def filled(self, z: Tensor) -> Tensor:
        """Return vectors of rows, aligned, ``(*batch, *rows, size)``, with the origin in place of hidden rows."""
        return z if isinstance(self.rows, bool) else z.where(self.rows.to(z.device).unsqueeze(-1), 0.0)


def hidden_outside(call: Call, found: Found) -> dict[str, Tensor]:
    """Return the masks of the latents outside of rows that are hidden in part, over their batch shapes.

    Raises:
        ValueError: Naming the site, if a mask divides an event.
    """
    outside = {name: site for name, site in found.latents.items() if call.is_outside(site)}
    masks = _masks_of(call.owner, {name: site for name, site in outside.items() if mask_of(site).hides})
    for name, mask in masks.items():
        batch = outside[name]["value"].shape[: outside[name]["value"].dim() - outside[name]["fn"].event_dim]
        if mask.shape != batch:
            shapes = f"by shape {tuple(mask.shape)}, but its batch shape is {tuple(batch)}"
            way = "Give a mask that broadcasts to the latent, or mask the observed sites only"
            raise ValueError(f"{call.owner}: latent site {name!r} is masked {shapes}. {way}.")
    return masks


def present_outside(call: Call, hidden: Mapping[str, Tensor], found: Found) -> dict[str, Tensor]:
    """Return the masks of the present elements of the latents outside of rows that are absent in part.

    Args:
        call: The call of the guide at setup.
        hidden: The masks of the latents that are hidden in part.
        found: All sites of the model.

    Raises:
        ValueError: Naming the site, if a mask hides what the rest of the model depends on.  If all latents are absent.
    """
    if _are_flat(found, hidden):
        return {}
    absent = absent_of(call, hidden, found, {})
    outside = [name for name, site in found.latents.items() if call.is_outside(site)]
    if absent and all(name in absent and not absent[name].any() for name in outside):
        where = f" outside of plate {named(call.plates)}" if call.plates else ""
        fault = f"masks hide all latents{where}, {named(outside)}"
        raise ValueError(f"{call.owner}: {fault}. Mask the observed sites only.")
    return absent


def _are_flat(found: Found, hidden: Mapping[str, Tensor]) -> bool:
    """True if masks only leave flat priors: a single number hides each latent, and no data are hidden."""
    hides_data = any(mask_of(site).hides for site in found.observed.values() if is_observation(site))
    return not hides_data and all(mask_of(found.latents[name]).is_scalar for name in hidden)


def _masks_of(owner: str, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Return the masks of latents over their batch shapes, or raise ValueError if one divides an event."""
    masks = {}
    for name, site in sites.items():
        some, every = (torch.as_tensor(part, device=site["value"].device) for part in mask_of(site))
        if not torch.equal(some, every):
            fault = f"the mask of latent site {name!r} divides an event"
            raise ValueError(f"{owner}: {fault}. Mask whole events, or the observed sites only.")
        batch = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
        while every.dim() > len(batch) and every.shape[0] == 1:
            every = every[0]
        masks[name] = every.bool().expand(torch.broadcast_shapes(every.shape, batch))
    return masks


def masks_of_rows(found: Found) -> dict[Key, RowMasks]:
    """Return the masks of the latents in rows, by the plates of the rows.

    Raises:
        ValueError: Naming the site, if a mask divides an event.
    """
    blocks: dict[Key, dict[str, Site]] = {}
    for name, site in found.latents.items():
        if key := tuple(frame.name for frame in frames_of(site, found.plates)):
            blocks.setdefault(key, {})[name] = site
    return {key: _masks_of_block(key, inside, found) for key, inside in blocks.items()}


def _masks_of_block(key: Key, inside: dict[str, Site], found: Found) -> RowMasks:
    masks = _masks_of(found.owner, inside)
    hidden = {name: mask for name, mask in masks.items() if not mask.all()}
    if not hidden or _are_flat(found, hidden):
        return RowMasks()
    rows = torch.stack([_reduced(masks[name], site, key) for name, site in inside.items()]).any(0)
    parts = {n: mask for n, mask in masks.items() if not torch.equal(*torch.broadcast_tensors(mask, rows))}
    return RowMasks(bool(rows.all()) or rows, parts, hidden)


def patterns_of(key: Key, masks: RowMasks, found: Found) -> set[tuple[Key, Key, bytes]]:
    """Return the patterns of hidden parts in the rows of some plates: plates, latents and the bytes of a row."""
    columns, names = [], tuple(sorted(masks.hidden))
    for name in names:
        dims = [frame.dim for frame in frames_of(found.latents[name], key)]
        whole = masks.hidden[name].movedim(dims, [*range(len(dims))])
        columns.append(whole.reshape(whole.shape[: len(dims)].numel(), -1))
    return {(key, names, bytes(row)) for row in torch.cat(columns, -1).tolist()} if columns else set()


def absent_of(call: Call, hidden: Mapping[str, Tensor], found: Found, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of those latents whose hidden parts change nothing else in the model.

    Outside of rows, a mask that hides all of a latent leaves a flat prior if the model depends on the latent.

    Args:
        call: The call of the guide.
        hidden: The masks of latents that are hidden in part, over their batch shapes.
        found: The sites of the model.
        rows: The rows of subsampled plates, by their names.

    Raises:
        ValueError: Naming the site, if another mask hides a part on which the rest of the model depends.
    """
    if not hidden or not _dependent(call, hidden, found, rows):
        return dict(hidden)
    absent = {}
    for name, mask in hidden.items():
        site = _dependent(call, {name: mask}, found, rows)
        if not site:
            absent[name] = mask
        elif mask.any() or not call.is_outside(found.latents[name]):
            fault = f"hides a part of it that the rest of the model depends on, as site {site!r}"
            way = "Mask both alike, or the observed sites only"
            raise ValueError(f"{call.owner}: the mask of latent site {name!r} {fault}. {way}. {FLAT}")
    return absent


def _dependent(call: Call, hidden: Mapping[str, Tensor], found: Found, rows: Mapping[str, Tensor]) -> str:
    """Return the site whose density changes if hidden parts of latents move, or an empty string.

    Other latents are at the start and then elsewhere, since a product of latents may not change at its zero.
    """
    places = [{name: site["value"].detach() for name, site in found.latents.items()}]
    maps = {name: biject_to(site["fn"].support) for name, site in found.latents.items() if name in call.start}
    generator = torch.Generator().manual_seed(0)
    free = {name: known.inv(places[0][name]) for name, known in maps.items()}
    away = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in free.items()}
    places.append({**places[0], **{name: known(free[name] + away[name]) for name, known in maps.items()}})
    changed = (_changed(call, hidden, found, {**rows, **values}) for values in places)
    return next(filter(None, changed), "")


def _changed(call: Call, hidden: Mapping[str, Tensor], found: Found, values: dict[str, Tensor]) -> str:
    """Return the site whose density changes if hidden parts of latents move from some values, or an empty string.

    All runs have the same random numbers.  A model with numbers of its own shows them in its first two runs.
    """
    known: dict[str, Tensor] = {}
    noise: dict[str, Tensor] = {}
    for shift in (0.0, 0.0, -3.0, -1.0, 1.0, 3.0):
        moved = {}
        for name, mask in hidden.items():
            fn, here = found.latents[name]["fn"], values[name]
            bijection, counts = biject_to(fn.support), mask.reshape(mask.shape + (1,) * fn.event_dim)
            moved[name] = torch.where(counts, here, bijection(bijection.inv(here) + shift))
        with call.same_draws(), validation_enabled(False):
            torch.manual_seed(0)
            trace = call.trace_at({**values, **moved})
            trace.compute_log_prob()
        sites = {key: site for key, site in trace.nodes.items() if site["type"] == "sample"}
        densities = {key: site["log_prob"] for key, site in sites.items() if site["log_prob"].numel()}
        known = known or densities
        apart = {key: (value - known[key]).abs().nan_to_num(0.0, torch.inf) for key, value in densities.items()}
        if known is not densities and not noise:
            noise = {key: 10 * value.max() for key, value in apart.items()}
        for key, value in densities.items() if noise else ():
            slack = noise[key] + ROUND_OFF * torch.finfo(value.dtype).eps * known[key].abs().nan_to_num(0.0, 0.0, 0.0)
            if bool((apart[key] > slack).any()) or not torch.equal(value.isnan(), known[key].isnan()):
                return key
    return ""


def masks_of_all(found: Found) -> dict[Key, RowMasks]:
    """Return the masks of the latents of all rows.

    Raises:
        ValueError: As :func:`masks_of_rows`, or if a plate is subsampled, which leaves other rows' masks unknown.
    """
    for name, site in found.latents.items():
        for frame in frames_of(site, found.plates):
            rows = found.rows[frame.name]
            if is_masked(site) and rows.size < rows.full_size:
                subsampled = f"plate {frame.name!r} is subsampled ({rows.size} of {rows.full_size} rows)"
                fault = f"latent site {name!r} is masked, and {subsampled}"
                raise ValueError(f"{found.owner}.log_prob: {fault}. Let the plate run over all rows.")
    return masks_of_rows(found)


def _reduced(mask: Tensor, site: Site, key: Key) -> Tensor:
    """Return a mask of the rows of some plates, aligned: True for rows with a part that counts."""
    frames = frames_of(site, key)
    sizes = {frame.dim: frame.size if frame.size > 0 else rows_in(site, frame.dim) for frame in frames}
    depth = -min(sizes)
    whole = mask.reshape((1,) * (depth - mask.dim()) + mask.shape)
    others = [dim for dim in range(-whole.dim(), 0) if dim not in sizes]
    reduced = whole.any(others, keepdim=True) if others else whole
    aligned = [sizes.get(dim, 1) for dim in range(-depth, 0)]
    return reduced.reshape(reduced.shape[reduced.dim() - depth :]).expand(aligned)
