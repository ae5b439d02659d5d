"""The density of a model on all rows of a subsampled plate that holds data alone, part by part.

A subsample stands for all rows by its scale, which is an estimate.  Parts that together hold each row once, at scale
one, give the exact density.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

if TYPE_CHECKING:
    from .program import Program


class Part(Messenger):
    """Counts the rows of one part once, and the sites outside the plate in the first part only.

    Args:
        plate: The name of the plate.
        rows: The rows that the plate takes.
        keep: True for the rows that count, ``(rows,)``: the others belong to another part.
        share: The number of rows divided by the number of all rows.
        is_first: True for the first part.
    """

    def __init__(self, plate: str, rows: Tensor, keep: Tensor, share: float, is_first: bool) -> None:
        super().__init__()
        self.plate, self.rows, self.keep, self.share, self.is_first = plate, rows, keep, share, is_first

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):
            return
        frame = next((frame for frame in msg["cond_indep_stack"] if frame.name == self.plate), None)
        if frame is not None:
            keep = self.keep.reshape(-1, *(1,) * (-1 - frame.dim))
            msg["scale"] = msg["scale"] * self.share
            msg["mask"] = keep if msg["mask"] is None else msg["mask"] & keep
        elif not self.is_first:
            msg["mask"] = False


def parts_of(plate: str, rows: Tensor, full_size: int) -> Iterator[Part]:
    """Yield parts of a plate, each as large as its subsample; the last one overlaps with the one before if needed."""
    size = len(rows)
    for start in range(0, full_size, size):
        first = min(start, full_size - size)
        taken = torch.arange(first, first + size, device=rows.device)
        yield Part(plate, taken, taken >= start, size / full_size, start == 0)


def can_be_whole(model: Program, latents: list[str], observed: list[str]) -> bool:
    """True if the only subsampled plate of a model draws its rows, holds none of the latents, and takes data by row."""
    if len(model.subsamples) != 1:
        return False
    ((plate, fn),) = model.subsamples.items()
    stacks = {name: site.get("cond_indep_stack", ()) for name, site in model.single.nodes.items()}
    inside = {name for name, stack in stacks.items() if plate in [frame.name for frame in stack]}
    others = [frame for stack in stacks.values() for frame in stack if frame.name != plate]
    if inside & {*latents} or any(f.full_size is not None and f.size < f.full_size for f in others):
        return False
    if {*model.enumerated} - inside:
        return False  # a sum over a latent outside the plate does not fall into parts
    # A minibatch that the user gives has the same data at all indices.
    data = [name for name in observed if name in inside]
    first, *_, last = parts_of(plate, model.rows[plate], fn.size)
    one, other = (
        model.with_rows({plate: part.rows}).alone(lambda view: {name: view.read(name) for name in data}, 1)
        for part in (first, last)
    )
    return any(not torch.equal(one[name], other[name]) for name in data)
