"""Rows of subsampled plates: minibatches, and shares whose log-densities add up to that of all rows.

A subsample stands for all rows by its scale, which is an estimate.  Shares that together hold each row once, at scale
one, give the exact density.  Of several plates each share of one meets each share of the others.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .sites import Site, Values

MOST = 64  # shares of several plates; more would take hours


class RowsOfPlate(NamedTuple):
    """The rows of a plate in one share.

    Attributes:
        rows: The rows that the plate takes; None for those that the model itself chooses.
        keep: True for the rows that count, ``(rows,)``, the others belong to another share; None if all count.
        share: The number of rows divided by the number of all rows.
        is_first: True for the first share of the plate.
    """

    rows: Tensor | None
    keep: Tensor | None
    share: float
    is_first: bool = True


class RowShare(Messenger):
    """Counts the rows of one share once, and the sites outside of a plate in the first share of that plate only.

    Args:
        plates: The rows of each subsampled plate, by name.
    """

    def __init__(self, plates: Mapping[str, RowsOfPlate]) -> None:
        super().__init__()
        self.plates = plates

    @property
    def rows(self) -> Values:
        """The rows that each plate takes."""
        return {name: part.rows for name, part in self.plates.items() if part.rows is not None}

    def taken(self, held: Values, sites: Mapping[str, Site]) -> Values:
        """Return the values of this share from values for all rows, ``(N, *site_shape)``."""
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


def number_of_shares(rows: Values, sizes: Mapping[str, int]) -> int:
    """Return the number of shares that hold all rows of some plates, given the rows of one and the sizes of all."""
    return math.prod(-(-size // len(rows[name])) for name, size in sizes.items())


def shares_of(rows: Values, sizes: Mapping[str, int]) -> list[RowShare]:
    """Return the shares of all rows of some plates, each as large as given rows; the last overlaps if need be."""
    of_plates = [list(_shares_of(rows[name], size)) for name, size in sizes.items()]
    return [RowShare(dict(zip(sizes, chosen, strict=True))) for chosen in itertools.product(*of_plates)]


def _shares_of(rows: Tensor, full_size: int) -> Iterator[RowsOfPlate]:
    size = len(rows)
    for start in range(0, full_size, size):
        first = min(start, full_size - size)
        taken = torch.arange(first, first + size, device=rows.device)
        yield RowsOfPlate(taken, taken >= start if first < start else None, size / full_size, start == 0)


class Shuffled(nn.Module):
    """Minibatches without replacement until all rows were seen, so that their noise cancels.

    All rows are equally likely, as in Pyro's own minibatches, which are drawn independently of each other.

    Attributes:
        sizes: The numbers of all rows and of those of a minibatch in the last call; None before.
        held: Rows that each call returns, while they are set.
    """

    order: Tensor
    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.zeros(0, dtype=torch.long), persistent=False)
        self.register_buffer("place", torch.zeros((), dtype=torch.long), persistent=False)
        self.sizes: tuple[int, int] | None = None
        self.held: Tensor | None = None
        self._known: tuple[Tensor, int, int] | None = None  # the place, its version, and its number, which is not read

    def __getstate__(self) -> dict[str, Any]:  # a copy has a place of its own
        return {**self.__dict__, "_known": None}

    def next(self, full_size: int, size: int) -> Tensor:
        """Return the next ``size`` rows out of ``full_size``."""
        self.sizes = full_size, size
        if self.held is not None:
            return self.held
        if torch._C._get_tracing_state():  # a traced program would repeat the same rows for ever
            return torch.randperm(full_size, device=self.order.device)[:size]
        known = self._known
        is_known = known is not None and known[0] is self.place and known[1] == self.place._version
        start = known[2] if known and is_known else int(self.place)
        if len(self.order) != full_size or start + size > full_size:
            start = 0
            self.order.resize_(full_size).copy_(torch.randperm(full_size))
        self.place.fill_(start + size)
        self._known = None if self.place.is_inference() else (self.place, self.place._version, start + size)
        return self.order[start : start + size].clone()  # the next shuffle is in place
