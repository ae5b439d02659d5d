"""A look at a model for some arguments: its latents, and the rows of a plate, run no farther than needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pyro import poutine, validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from ..programs.engines import apart


class Rows(NamedTuple):
    """A plate's full size, how many of its rows are looked at, and which, where the model says that itself."""

    full_size: int
    size: int
    chosen: Tensor | None


@dataclass
class Found:
    """The sites and plates that a run of a model has shown so far.

    Args:
        latents: The latent sites, by name.
        observed: The observed sites, by name.
        frames: The plates that some of these lie in, by name.
        given: The full size of plates that the model gives a ``subsample=``, and what it gives them, by name.
        rows: The rows of the plate that was looked for, once the model has entered it.
    """

    latents: dict[str, dict[str, Any]] = field(default_factory=dict)
    observed: dict[str, dict[str, Any]] = field(default_factory=dict)
    frames: dict[str, Any] = field(default_factory=dict)
    given: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    rows: Rows | None = None


def look(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    plate: str | None = None,
    until: Collection[str] | None = None,
    indices: Tensor | None = None,
) -> Found:
    """Run a model, unseen by the handlers outside, up to the last of some latents and to a plate.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        plate: The plate whose rows are to be found.
        until: The latents after which nothing more is of interest; None to run all of the model.
        indices: The rows that the plate shall take, where the model subsamples it.

    Raises:
        ValueError: If the model enters no plate of that name.
    """
    found = Found()
    with poutine.block(), torch.no_grad(), apart(), validation_enabled(False):
        try:
            with _Look(found, plate, until, indices):
                model(*args, **kwargs)
        except _Reached:
            pass
    if plate is not None and found.rows is None:
        found.rows = _rows_of_frame(plate, found)
    return found


def _rows_of_frame(plate: str, found: Found) -> Rows:
    """The rows of a plate that is hidden, was made before, or has no size, as latents in it tell."""
    frame = found.frames.get(plate)
    if frame is None or not frame.vectorized:
        has = ", ".join(sorted(found.frames)) or "none"
        raise ValueError(f"AutoPlateFlow: the model enters no plate {plate!r} of known size; it has {has}.")
    if frame.size > 0:
        return Rows(frame.full_size or frame.size, frame.size, None)
    inside = [s for s in found.latents.values() if plate in [other.name for other in s["cond_indep_stack"]]]
    number = max((rows_in(site, frame.dim) for site in inside), default=1)
    if not number:
        raise ValueError(
            f"AutoPlateFlow: latent site {inside[0]['name']!r} has no dimension for the rows of plate {plate!r}, which "
            f"has no size. Give the number of its rows: pyro.plate({plate!r}, len(x))."
        )
    return Rows(number, number, None)


def rows_in(site: dict[str, Any], dim: int) -> int:
    """Return how many rows a site has in the dimension of a plate, a negative one; 0 if it has not that dimension."""
    shape = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return int(shape[dim]) if len(shape) >= -dim else 0


@contextmanager
def same_draws(sites: Collection[dict[str, Any]]) -> Iterator[None]:
    """Leave the random numbers as they are, those of the devices of some sites included."""
    devices = {site["value"].device.index for site in sites if site["value"].device.type == "cuda"}
    with torch.random.fork_rng(devices):
        yield


class _Reached(BaseException):
    """All was seen; no handler of the model's own for errors shall catch it."""


class _Look(Messenger):
    def __init__(self, found: Found, plate: str | None, until: Collection[str] | None, indices: Tensor | None) -> None:
        super().__init__()
        self.found, self.plate, self.indices = found, plate, indices
        self.until = None if until is None else set(until)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample) and isinstance(msg["value"], Tensor):
            self.found.given[msg["name"]] = msg["fn"].size, msg["value"]
        if msg["name"] == self.plate and isinstance(msg["fn"], _Subsample):
            full, size, chosen = msg["fn"].size, msg["fn"].subsample_size, msg["value"]
            if chosen is not None:
                chosen = torch.as_tensor(chosen)
                size = len(chosen)
            elif self.indices is not None:
                msg["value"] = self.indices
            self.found.rows = Rows(full, full if size is None else min(size, full), chosen)
            self._stop()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        self.found.frames.update((frame.name, frame) for frame in msg["cond_indep_stack"])
        kind = self.found.observed if msg["is_observed"] else self.found.latents
        kind[msg["name"]] = msg.copy()
        self._stop()

    def _stop(self) -> None:
        placed = self.plate is None or self.found.rows or self.plate in self.found.frames
        if self.until is not None and placed and self.until <= self.found.latents.keys():
            raise _Reached
