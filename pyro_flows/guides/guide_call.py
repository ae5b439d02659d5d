"""Calls of guides as values, and looks at a model: its latents, its data, and the rows of a plate."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple

import torch
from pyro import poutine, validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..programs.error_text import explained
from ..programs.traces import arguments_of, outside_plates, trace_at


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
        plate: The plate whose rows have a flow, or None.
    """

    owner: str
    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prototype: Any = None
    plate: str | None = None

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
        return torch.random.fork_rng({v.device.index for v in self.start.values() if v.device.type == "cuda"})

    def look(self, *, until: Collection[str] | None = None, indices: Tensor | None = None) -> Found:
        """Run the model, hidden from outer handlers, and return its sites; random number generators are restored.

        Args:
            until: The run may end once these latents and the plate were found; None runs all of the model.
            indices: The rows for the plate to take, if the model subsamples it.

        Raises:
            ValueError: If the model does not enter the plate.
        """
        found = Found(self.plate, until, indices)
        hidden, quietly = poutine.block(), suppress(Reached)
        run = explained("model", arguments_of(self.model, self.args, self.kwargs))(self.model)
        with hidden, torch.no_grad(), outside_plates(), validation_enabled(False), self.same_draws(), quietly, found:
            run(*self.args, **self.kwargs)
        if self.plate is not None and found.rows is None:
            found.rows = found.rows_in_frame(self.plate)
        return found


class Reached(BaseException):
    """Signal that ends a run of a model.  ``except Exception`` in the model does not catch a ``BaseException``."""


class Found(Messenger):
    """The sites and plates of a run of a model.

    Args:
        plate: The plate whose rows to find.
        until: The sites, drawn or observed, after which the run may end; None to go on to the end.
        indices: The rows for the plate to take, if the model subsamples it.

    Attributes:
        latents: The latent sites, by name.
        observed: The observed sites, by name.
        frames: The frames of the plates around these sites, by name.
        given: The plates to which the model gives rows, ``subsample=``.
        rows: The rows of the plate; None until the model enters it.
    """

    def __init__(self, plate: str | None, until: Collection[str] | None, indices: Tensor | None) -> None:
        super().__init__()
        self.plate, self.indices = plate, indices
        self._until = None if until is None else set(until)
        self.latents: dict[str, dict[str, Any]] = {}
        self.observed: dict[str, dict[str, Any]] = {}
        self.frames: dict[str, Any] = {}
        self.given: list[str] = []
        self.rows: Rows | None = None

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, fn, chosen = msg["name"], msg["fn"], msg["value"]
        if not isinstance(fn, _Subsample):
            return
        if chosen is not None:
            self.given.append(name)
        if name == self.plate:
            size = fn.size if fn.subsample_size is None else fn.subsample_size
            if chosen is not None:
                chosen = torch.as_tensor(chosen)
                size = len(chosen)
            elif self.indices is not None:
                msg["value"] = self.indices
            self.rows = Rows(fn.size, min(size, fn.size), chosen)
            self._stop(msg)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not isinstance(msg["fn"], _Subsample):
            self.frames.update((frame.name, frame) for frame in msg["cond_indep_stack"])
            kind = self.observed if msg["is_observed"] else self.latents
            kind[msg["name"]] = msg.copy()
            self._stop(msg)

    def _stop(self, msg: Any) -> None:
        placed = self.plate is None or self.rows or self.plate in self.frames
        if self._until is not None and placed and self._until <= self.latents.keys() | self.observed.keys():
            self._until = None  # a model that catches the exception runs to its end
            raise Reached

    def rows_in_frame(self, plate: str) -> Rows:
        """Return the rows of a plate that is hidden, was made outside of the model, or has no size."""
        frame = self.frames.get(plate)
        if frame is None or not frame.vectorized:
            has = ", ".join(sorted(self.frames)) or "none"
            raise ValueError(f"AutoPlateFlow: the model enters no plate {plate!r} of known size; it has {has}.")
        if frame.size > 0:
            return Rows(frame.full_size or frame.size, frame.size)
        inside = {name: site for name, site in self.latents.items() if frame_of(site, plate)}
        number = max((rows_in(site, frame.dim) for site in inside.values()), default=1)
        if not number:
            fault = f"latent site {next(iter(inside))!r} has no dimension for the rows of plate {plate!r}"
            raise ValueError(f"AutoPlateFlow: {fault}. Give the number of its rows: pyro.plate({plate!r}, len(x)).")
        return Rows(number, number)


def frame_of(site: dict[str, Any], plate: str | None) -> Any:
    """Return the frame of a plate around a site, or None."""
    return next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)


def rows_in(site: dict[str, Any], dim: int) -> int:
    """Return the size of a site in the (negative) dimension of a plate, or 0 if it lacks that dimension."""
    shape = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return int(shape[dim]) if len(shape) >= -dim else 0
