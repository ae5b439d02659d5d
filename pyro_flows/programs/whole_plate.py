"""The density of a model on all rows of its subsampled plates, part by part.

A subsample stands for all rows by its scale, which is an estimate.  Parts that together hold each row once, at scale
one, give the exact density.  Of several plates each part of one meets each part of the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .engines import Site, Values

if TYPE_CHECKING:
    from .runner import Runner


MOST = 64  # parts of several plates


class RowsOfPart(NamedTuple):
    """The rows of a plate in one part.

    Attributes:
        rows: The rows that the plate takes; None for those that the model itself chooses.
        keep: True for the rows that count, ``(rows,)``, the others belong to another part; None if all count.
        share: The number of rows divided by the number of all rows.
        is_first: True for the first part of the plate.
    """

    rows: Tensor | None
    keep: Tensor | None
    share: float
    is_first: bool = True


class Part(Messenger):
    """Counts the rows of one part once, and the sites outside of a plate in the first part of that plate only.

    Args:
        plates: The rows of each subsampled plate, by name.
    """

    def __init__(self, plates: Mapping[str, RowsOfPart]) -> None:
        super().__init__()
        self.plates = plates

    @property
    def rows(self) -> Values:
        """The rows that each plate takes."""
        return {name: part.rows for name, part in self.plates.items() if part.rows is not None}

    def taken(self, held: Values, sites: Mapping[str, Site]) -> Values:
        """Return the values of this part from values for all rows, ``(N, *site_shape)``."""
        found, rows = dict(held), self.rows
        for name, value in held.items():
            for frame in sites[name]["cond_indep_stack"]:
                if frame.name in rows:
                    axis = value.dim() - sites[name]["fn"].event_dim + frame.dim
                    value = value.index_select(axis, rows[frame.name])
            found[name] = value
        return found

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):
            return
        frames = {frame.name: frame for frame in msg["cond_indep_stack"]}
        for name, part in self.plates.items():
            if name not in frames:
                if not part.is_first:
                    msg["mask"] = False
                continue
            msg["scale"] = msg["scale"] * part.share
            if part.keep is not None:
                keep = part.keep.reshape(-1, *(1,) * (-1 - frames[name].dim))
                msg["mask"] = keep if msg["mask"] is None else msg["mask"] & keep


def number_of_parts(model: Runner) -> int:
    """Return the number of parts that hold all rows of a model's subsampled plates."""
    return math.prod(-(-fn.size // len(model.rows[name])) for name, fn in model.subsamples.items())


def parts_of(model: Runner) -> list[Part]:
    """Return the parts of a model's rows, each as large as its subsample; the last overlaps if need be."""
    of_plates = [list(_parts_of(model.rows[name], fn.size)) for name, fn in model.subsamples.items()]
    return [Part(dict(zip(model.subsamples, chosen, strict=True))) for chosen in itertools.product(*of_plates)]


def _parts_of(rows: Tensor, full_size: int) -> Iterator[RowsOfPart]:
    size = len(rows)
    for start in range(0, full_size, size):
        first = min(start, full_size - size)
        taken = torch.arange(first, first + size, device=rows.device)
        yield RowsOfPart(taken, taken >= start if first < start else None, size / full_size, start == 0)


def has_parts(model: Runner, observed: list[str]) -> bool:
    """True if all subsampled plates of a model draw their rows and take data by row, so that its density has parts.

    Of several plates there may be so many parts that a density takes hours; more than ``MOST`` are too many.
    """
    if not model.subsamples or (len(model.subsamples) > 1 and number_of_parts(model) > MOST):
        return False
    stacks = {name: site.get("cond_indep_stack", ()) for name, site in model.single.nodes.items()}
    plates = {name: {frame.name for frame in stack} & model.subsamples.keys() for name, stack in stacks.items()}
    frames = [frame for stack in stacks.values() for frame in stack]
    if any(frame.name in model.subsamples and not frame.vectorized for frame in frames):
        return False  # a loop over rows has no dimension for them
    others = [frame for frame in frames if frame.name not in model.subsamples]
    if any(frame.full_size is not None and frame.size < frame.full_size for frame in others):
        return False
    if any(plates[name] != model.subsamples.keys() for name in model.enumerated):
        return False  # a sum over a latent outside of a plate does not fall into parts
    # A minibatch that the user gives has the same data at all indices.
    return all(_differ(model, name, [site for site in observed if name in plates[site]]) for name in model.subsamples)


def _differ(model: Runner, plate: str, data: list[str]) -> bool:
    """True if data have other values at other rows of a plate."""
    size, full_size = len(model.rows[plate]), model.subsamples[plate].size
    found = []
    for start in (0, full_size - size):
        rows = torch.arange(start, start + size, device=model.rows[plate].device)
        read = model.with_rows({plate: rows}).alone(lambda view: {name: view.read(name) for name in data}, 1)
        found.append([read[name] for name in data])
    return any(bool(((a != b) & ~(a.isnan() & b.isnan())).any()) for a, b in zip(*found, strict=True))
