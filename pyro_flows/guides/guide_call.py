"""Calls of guides: looks at a model, the masks of its latents, and the check of each call.

A look finds the latents of a model, its data, and the rows of plates.

A guide draws the latents that it was built for, whatever the model draws with other arguments.  If the model lacks one,
or a mask removes it, the guide's entropy counts without the model's density, and grows without bound.

A mask takes elements out of the model's density, so it must take them out of the guide's.  An element that a mask hides
is *absent* if no visible site depends on it: the steps that pad a series, or the rows that ``obs_mask`` observes.  A
vector outside of rows lacks its absent elements, which have a fixed value.  Rows that have a flow take the mask of the
model.  An absent part of a row has a standard normal distribution in the unconstrained space, which is taken off the
guide's density.  A latent that one number masks as a whole, and on which data depend, has a flat prior.  The guide
draws and scores it as any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
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
from torch.utils._pytree import tree_flatten, tree_leaves

from ..programs.checks import explained
from ..programs.program import arguments_of, outside_plates, signature_of, trace_at
from ..programs.sites import Site, is_masked, is_observation, is_reparametrised, mask_of, named

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
            if chosen is None and name in self.indices:
                msg["value"] = self.indices[name]
            chosen = None if chosen is None else torch.as_tensor(chosen)
            size = (fn.subsample_size or fn.size) if chosen is None else len(chosen)
            self.rows[name] = Rows(fn.size, min(size, fn.size), chosen)
            if msg["value"] is None and self._until == set():  # a run for the plates alone draws no numbers
                msg["value"] = torch.arange(min(size, fn.size), device=getattr(fn, "device", None))
            self._stop()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not isinstance(msg["fn"], _Subsample):
            self.frames.update((frame.name, frame) for frame in msg["cond_indep_stack"])
            kind = self.observed if msg["is_observed"] else self.latents
            kind[msg["name"]] = msg.copy()
            self._stop()

    def _stop(self) -> None:
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


def batch_of(site: Site) -> torch.Size:
    """Return the batch shape of the value of a site."""
    shape: torch.Size = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return shape


def rows_in(site: Site, dim: int) -> int:
    """Return the size of a site in the (negative) dimension of a plate, or 0 if it lacks that dimension."""
    batch = batch_of(site)
    return batch[dim] if len(batch) >= -dim else 0


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

    def patterns(self, key: Key, found: Found) -> set[tuple[Key, Key, bytes]]:
        """Return the patterns of hidden parts: the plates of the rows, the latents, and the bytes of a row."""
        columns, names = [], tuple(sorted(self.hidden))
        for name in names:
            dims = [frame.dim for frame in frames_of(found.latents[name], key)]
            whole = self.hidden[name].movedim(dims, [*range(len(dims))])
            columns.append(whole.reshape(whole.shape[: len(dims)].numel(), -1))
        return {(key, names, bytes(row)) for row in torch.cat(columns, -1).tolist()} if columns else set()


def masks_of(found: Found) -> dict[Key, RowMasks]:
    """Return the masks of the latents that masks hide in part, by the plates of their rows; ``()`` outside of rows.

    Raises:
        ValueError: Naming the site, if a mask divides an event, or does not broadcast to a latent outside of rows.
    """
    blocks: dict[Key, dict[str, Site]] = {}
    for name, site in found.latents.items():
        blocks.setdefault(tuple(frame.name for frame in frames_of(site, found.plates)), {})[name] = site
    result = {}
    for key, inside in blocks.items() if any(map(is_masked, found.latents.values())) else ():
        masks = {name: _mask_over_batch(found.owner, name, site, key) for name, site in inside.items()}
        hidden = {name: mask for name, mask in masks.items() if not mask.all()}
        if not hidden or (key and _are_flat(found, hidden)):
            continue
        result[key] = RowMasks(hidden=hidden)
        if key:
            rows = torch.stack([_reduced(masks[name], site, key) for name, site in inside.items()]).any(0)
            parts = {n: mask for n, mask in masks.items() if not torch.equal(*torch.broadcast_tensors(mask, rows))}
            result[key] = RowMasks(bool(rows.all()) or rows, parts, hidden)
    return result


def _are_flat(found: Found, hidden: Mapping[str, Tensor]) -> bool:
    """True if masks only leave flat priors: a single number hides each latent, and no data are hidden."""
    hides_data = any(mask_of(site).hides for site in found.observed.values() if is_observation(site))
    return not hides_data and all(mask_of(found.latents[name]).is_scalar for name in hidden)


def _mask_over_batch(owner: str, name: str, site: Site, key: Key) -> Tensor:
    """Return the mask of a latent over its batch shape."""
    batch = batch_of(site)
    some, every = (torch.as_tensor(part, device=site["value"].device) for part in mask_of(site))
    if not torch.equal(some, every):
        fault = f"the mask of latent site {name!r} divides an event"
        raise ValueError(f"{owner}: {fault}. Mask whole events, or the observed sites only.")
    while every.dim() > len(batch) and every.shape[0] == 1:
        every = every[0]
    shape = torch.broadcast_shapes(every.shape, batch)
    if not (key or shape == batch or every.all()):
        shapes = f"by shape {tuple(shape)}, but its batch shape is {tuple(batch)}"
        way = "Give a mask that broadcasts to the latent, or mask the observed sites only"
        raise ValueError(f"{owner}: latent site {name!r} is masked {shapes}. {way}.")
    return every.bool().expand(shape)


def _reduced(mask: Tensor, site: Site, key: Key) -> Tensor:
    """Return a mask of the rows of some plates, aligned: True for rows with a part that counts."""
    sizes = {frame.dim: frame.size if frame.size > 0 else rows_in(site, frame.dim) for frame in frames_of(site, key)}
    depth = -min(sizes)
    whole = mask.reshape((1,) * (depth - mask.dim()) + mask.shape)
    others = [dim for dim in range(-whole.dim(), 0) if dim not in sizes]
    reduced = whole.any(others, keepdim=True) if others else whole
    return reduced.reshape(reduced.shape[-depth:]).expand([sizes.get(dim, 1) for dim in range(-depth, 0)])


def masks_of_all(found: Found) -> dict[Key, RowMasks]:
    """Return the masks of the latents of all rows.

    Raises:
        ValueError: As :func:`masks_of`, or if a plate is subsampled, which leaves other rows' masks unknown.
    """
    for name, site in found.latents.items():
        for frame in frames_of(site, found.plates) if is_masked(site) else ():
            rows = found.rows[frame.name]
            if rows.size < rows.full_size:
                subsampled = f"plate {frame.name!r} is subsampled ({rows.size} of {rows.full_size} rows)"
                fault = f"latent site {name!r} is masked, and {subsampled}"
                raise ValueError(f"{found.owner}.log_prob: {fault}. Let the plate run over all rows.")
    return masks_of(found)


def _absent_of(call: Call, hidden: dict[str, Tensor], found: Found, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        return hidden
    absent = {}
    for name, mask in hidden.items():
        site = _dependent(call, {name: mask}, found, rows)
        if not site:
            absent[name] = mask
        elif mask.any() or frames_of(found.latents[name], call.plates):
            fault = f"hides a part of it that the rest of the model depends on, as site {site!r}"
            way = "Mask both alike, or the observed sites only"
            raise ValueError(f"{call.owner}: the mask of latent site {name!r} {fault}. {way}. {FLAT}")
    return absent


def _dependent(call: Call, hidden: Mapping[str, Tensor], found: Found, rows: Mapping[str, Tensor]) -> str:
    """Return the site whose density changes if hidden parts of latents move, or an empty string.

    Other latents are at the start and then elsewhere, since a product of latents may not change at its zero.  All runs
    have the same random numbers.  A model with numbers of its own shows them in the first two runs at a place.
    """
    here, away, generator = {}, {}, torch.Generator().manual_seed(0)
    for name, site in found.latents.items():
        here[name] = away[name] = site["value"].detach()
        if name in call.start:
            noise = torch.randn(biject_to(site["fn"].support).inv(here[name]).shape, generator=generator)
            away[name] = _shifted(site, here[name], noise.to(here[name]))
    for values in (here, away):
        known, apart_by_chance = dict[str, Tensor](), dict[str, Tensor]()
        for run, shift in enumerate((0.0, 0.0, -3.0, -1.0, 1.0, 3.0)):
            moved = {}
            for name, mask in hidden.items():
                site = found.latents[name]
                counts = mask.reshape(mask.shape + (1,) * site["fn"].event_dim)
                moved[name] = torch.where(counts, values[name], _shifted(site, values[name], shift))
            with call.same_draws(), validation_enabled(False):
                torch.manual_seed(0)
                trace = call.trace_at({**rows, **values, **moved})
                trace.compute_log_prob()
            for key, site in trace.nodes.items():
                if site["type"] != "sample" or not site["log_prob"].numel():
                    continue
                now, before = site["log_prob"], known.setdefault(key, site["log_prob"])
                apart = (now - before).abs().nan_to_num(0.0, torch.inf)
                if run == 1:
                    apart_by_chance[key] = 10 * apart.max()
                slack = ROUND_OFF * torch.finfo(now.dtype).eps * before.abs().nan_to_num(0.0, 0.0, 0.0)
                if run and ((apart > apart_by_chance[key] + slack).any() or (now.isnan() != before.isnan()).any()):
                    return key
    return ""


def _shifted(site: Site, value: Tensor, by: Tensor | float) -> Tensor:
    """Return a value that is moved in the unconstrained space."""
    bijection = biject_to(site["fn"].support)
    return bijection(bijection.inv(value) + by)


PLAIN = bool | int | float | complex | str | bytes | None | torch.Size | torch.dtype | torch.device


class Calls:
    """The calls of one guide.  The model is not run again for the very arguments of the call before.

    Attributes:
        reparametrised: The sites that ``poutine.reparam`` replaced.
        masked: True if some latents have a mask.
        present: The masks of the present elements of latents outside of rows that are absent in part.
    """

    def __init__(self) -> None:
        self._observed: frozenset[str] = frozenset()  # the sites that were data when the guide was built
        self.reparametrised: tuple[str, ...] = ()
        self.masked = False
        self.present: dict[str, Tensor] = {}
        self._hidden: dict[str, Tensor] = {}  # the masks of latents outside of rows
        self._absent: set[tuple[Key, Key, bytes]] = set()  # patterns of hidden parts of rows that change nothing else
        self._last: list[object] | None = None  # the keys of the last arguments

    def begin(self, call: Call, *, varies: bool = False) -> Found:
        """Look at all of a model with the arguments that the guide is built for.

        Args:
            call: The call of the guide.
            varies: True for a guide of any dataset, whose vectors cannot lack what one dataset hides.

        Raises:
            ValueError: Naming the site, if a mask hides what the rest of the model depends on.  If all latents are
                absent.
        """
        found = call.look()
        self._observed, self._hidden = frozenset(found.observed), masks_of(found).get((), RowMasks()).hidden
        self.present = {} if _are_flat(found, self._hidden) else _absent_of(call, self._hidden, found, {})
        outside = [name for name, site in found.latents.items() if not frames_of(site, call.plates)]
        if self.present and all(name in self.present and not self.present[name].any() for name in outside):
            where = f" outside of plate {named(call.plates)}" if call.plates else ""
            fault = f"masks hide all latents{where}, {named(outside)}"
            raise ValueError(f"{call.owner}: {fault}. Mask the observed sites only.")
        if varies and self.present:
            fault = f"latent site {next(iter(self.present))!r} is masked, and other datasets may have other masks"
            raise ValueError(f"{call.owner}: {fault}. Mask the observed sites only, or fit each dataset by fit_svi.")
        self.reparametrised = tuple(name for name, site in found.observed.items() if is_reparametrised(site))
        self._settle(call, found)
        if call.plates and all(rows.size == rows.full_size for rows in found.rows.values()):
            self._checked(call, found, {})
        return found

    def rows(self, call: Call, *, needed: bool) -> dict[str, Rows]:
        """Check new arguments, and return the rows of the plates if they are needed.

        Raises:
            ValueError: Naming the site, if the model lacks a latent of the guide, has a further one or another shape,
                or masks latents that the guide cannot leave out.
        """
        known = self._knows(call)
        if call.model is None or (known and not needed):
            return {}
        found = call.look(until=() if known else call.latents)
        if not known:
            self.check(call, found)
            for name, site in found.latents.items():
                if name not in call.prototype.nodes and name not in self._observed:  # missing data are predicted
                    fault = f"the model has the latent site {name!r} of shape {tuple(site['value'].shape)}"
                    way = "Build another guide, or let the model draw the same sites for all data"
                    raise ValueError(f"{call.owner}: {fault}, which it had not when the guide was built. {way}.")
            self._settle(call, found)
        return found.rows

    def masks(self, call: Call, indices: Mapping[str, Tensor]) -> dict[Key, RowMasks]:
        """Return the masks of the latents at some rows of the plates."""
        if not self.masked or call.model is None or not call.plates:
            return {}
        return self._checked(call, call.look(indices=indices), indices)

    def _checked(self, call: Call, found: Found, rows: Mapping[str, Tensor]) -> dict[Key, RowMasks]:
        """Return the masks of the latents; new patterns must not hide what the rest of the model depends on."""
        found_masks = masks_of(found)
        for key, masks in found_masks.items():
            if key and (new := masks.patterns(key, found) - self._absent):
                _absent_of(call, masks.hidden, found, rows)
                self._absent |= new
        return found_masks

    def _settle(self, call: Call, found: Found) -> None:
        """Remember the arguments of a call whose model was looked at."""
        self.masked, self._last = any(map(is_masked, found.latents.values())), _keys(call)

    def check(self, call: Call, found: Found) -> None:
        """Raise ValueError, naming the site, if latents have other shapes than at setup, or outside of rows masks.

        The numbers of rows may differ.
        """
        for name, site in call.latents.items():
            shape, own = list(site["value"].shape), found.latents.get(name)
            for frame in frames_of(site, call.plates):
                shape[frame.dim - site["fn"].event_dim] = found.rows[frame.name].size
            if own is not None and own["value"].shape == tuple(shape):
                continue
            if own is not None:
                there = f"has shape {tuple(own['value'].shape)}, but the guide was built for {tuple(shape)}"
            else:
                others = f"is not in the model, which has {named(list(found.latents)) if found.latents else 'none'}"
                there = "is observed" if name in found.observed else others
                there += f", but the guide was built for one of shape {tuple(shape)}"
            way = "Build another guide, pad series to one length and mask the observed sites only, or use AutoPlateFlow"
            if not call.latents.keys() & found.latents.keys():
                way = "Give the model that the guide was built for"
            raise ValueError(f"{call.owner}: with these arguments latent site {name!r} {there}. {way}.")
        now, built = masks_of(found).get((), RowMasks()).hidden, self._hidden
        for name in {**built, **now}:
            if not (name in now and name in built and torch.equal(now[name], built[name])):
                fault = f"the mask of latent site {name!r} differs from that which the guide was built with"
                way = "Build another guide, or use AutoPlateFlow(model, plate), whose rows take a new mask in each call"
                raise ValueError(f"{call.owner}: {fault}. {way}.")

    def _knows(self, call: Call) -> bool:
        """True if the model need not be run for the arguments of a call.

        Without arguments the guide draws again, as Pyro's guides do.  A traced program has one structure.  Iterators
        are for the model alone, which would find them used up.  A mask may change unseen.
        """
        if any(isinstance(leaf, Iterator) for leaf in tree_leaves((call.args, call.kwargs))):
            return True
        if self.masked and call.plates:
            return False
        return not (call.args or call.kwargs) or bool(torch._C._get_tracing_state()) or self._last == _keys(call)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles hold no data
        return {**self.__dict__, "_last": None}


def _keys(call: Call) -> list[object]:
    """Return keys that two calls share only if their arguments are the same, unchanged objects."""

    def key(leaf: Any) -> object:
        if isinstance(leaf, PLAIN):
            return type(leaf), leaf
        # The key holds the object, so that no other one takes its identity.
        if isinstance(leaf, Tensor) and not leaf.is_inference():  # inference tensors could have changed unseen
            return id(leaf), leaf._version, leaf
        return (id(leaf), leaf) if callable(leaf) else object()

    leaves, spec = tree_flatten((call.args, call.kwargs))
    return [spec, *map(key, leaves)]
