"""Calls of guides as values, and looks at a model: its latents, its data, and the rows of a plate."""

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

from ..programs.error_text import explained
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
