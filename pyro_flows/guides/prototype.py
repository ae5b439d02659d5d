"""A look at a model for some arguments: its latents, and the rows of a plate, run no farther than needed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from pyro import poutine, validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from ..programs.traces import outside_plates
from .guide_call import Call


class Rows(NamedTuple):
    """A plate's full size, how many of its rows are looked at, and which, where the model says that itself."""

    full_size: int
    size: int
    chosen: Tensor | None = None


class Found(Messenger):
    """The sites and plates that a run of a model has shown so far.

    Args:
        plate: The plate whose rows are to be found.
        until: The latents after which nothing more is of interest; None for all of the model.
        indices: The rows that the plate shall take, where the model subsamples it.

    Attributes:
        latents: The latent sites, by name.
        observed: The observed sites, by name.
        frames: The plates that some of these lie in, by name.
        given: The full size of plates that the model gives a ``subsample=``, and what it gives them, by name.
        rows: The rows of the plate that is looked for, once the model has entered it.
    """

    def __init__(self, plate: str | None, until: Collection[str] | None, indices: Tensor | None) -> None:
        super().__init__()
        self.plate, self.indices = plate, indices
        self.until = None if until is None else set(until)
        self.latents: dict[str, dict[str, Any]] = {}
        self.observed: dict[str, dict[str, Any]] = {}
        self.frames: dict[str, Any] = {}
        self.given: dict[str, tuple[int, Tensor]] = {}
        self.rows: Rows | None = None

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, fn, chosen = msg["name"], msg["fn"], msg["value"]
        if not isinstance(fn, _Subsample):
            return
        if isinstance(chosen, Tensor):
            self.given[name] = fn.size, chosen
        if name == self.plate:
            size = fn.size if fn.subsample_size is None else fn.subsample_size
            if chosen is not None:
                chosen = torch.as_tensor(chosen)
                size = len(chosen)
            elif self.indices is not None:
                msg["value"] = self.indices
            self.rows = Rows(fn.size, min(size, fn.size), chosen)
            self._stop()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        self.frames.update((frame.name, frame) for frame in msg["cond_indep_stack"])
        kind = self.observed if msg["is_observed"] else self.latents
        kind[msg["name"]] = msg.copy()
        self._stop()

    def _stop(self) -> None:
        placed = self.plate is None or self.rows or self.plate in self.frames
        if self.until is not None and placed and self.until <= self.latents.keys():
            raise _Reached

    def rows_of_frame(self, plate: str) -> Rows:
        """Return the rows of a plate that is hidden, was made before, or has no size, as latents in it tell."""
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


class _Reached(BaseException):
    """All was seen; no handler of the model's own for errors shall catch it."""


def look(call: Call, *, until: Collection[str] | None = None, indices: Tensor | None = None) -> Found:
    """Run the model of a call, unseen by the handlers outside, up to the last of some latents and to the plate.

    Args:
        call: The call.
        until: The latents after which nothing more is of interest; None to run all of the model.
        indices: The rows that the plate shall take, where the model subsamples it.

    Raises:
        ValueError: If the model does not enter the plate.
    """
    found = Found(call.plate, until, indices)
    with poutine.block(), torch.no_grad(), outside_plates(), validation_enabled(False):
        try:
            with found:
                call.model(*call.args, **call.kwargs)
        except _Reached:
            pass
    if call.plate is not None and found.rows is None:
        found.rows = found.rows_of_frame(call.plate)
    return found


def frame_of(site: dict[str, Any], plate: str | None) -> Any:
    """Return the frame of a plate that a site lies in, None if it does not."""
    return next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)


def rows_in(site: dict[str, Any], dim: int) -> int:
    """Return how many rows a site has in the dimension of a plate, a negative one; 0 if it has not that dimension."""
    shape = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return int(shape[dim]) if len(shape) >= -dim else 0
