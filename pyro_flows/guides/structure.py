"""The structure of a posterior: independent rows of plates, nestings of plates by an index, and sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .guide_call import Rows


class StepSequence(NamedTuple):
    """Latents along the steps of a sequence, each coupled to its neighbours alone.

    Attributes:
        sites: Their names.
        steps: The number T of steps.
        of: For each site, the step of each of its unconstrained numbers in a row, flattened.
    """

    sites: tuple[str, ...]
    steps: int
    of: tuple[Tensor, ...]

    def order(self, sites: Iterable[str]) -> Tensor:
        """Return the places, in a row's vector of some sites, of the numbers of each step, ``(T, d)``."""
        steps = torch.cat([self.of[self.sites.index(name)] for name in sites])
        return torch.argsort(steps, stable=True).reshape(self.steps, -1)


class Nesting(NamedTuple):
    """Rows of a plate that each belong to a row of another plate by an index, such as ``h[hospital_of_doctor]``.

    Attributes:
        plate: The plate.
        outer: The other plate.
        rows: The row of the other plate that each row belongs to, ``(rows,)``.
    """

    plate: str
    outer: str
    rows: Tensor


class Structure(NamedTuple):
    """The structure of a posterior.

    Attributes:
        plates: The plates whose rows are independent given the latents outside.
        sequences: The sequences among latents that share their rows.
        nestings: The nestings of plates by an index.  Of several plates around one, each must be nested in the next.
    """

    plates: tuple[str, ...] = ()
    sequences: tuple[StepSequence, ...] = ()
    nestings: tuple[Nesting, ...] = ()

    @classmethod
    def of(cls, parts: Iterable[Any]) -> Structure:
        """Return a structure from nested tuples of its parts, in their order."""
        plates, sequences, nestings = parts
        return cls(
            tuple(plates), tuple(StepSequence(*part) for part in sequences), tuple(Nesting(*part) for part in nestings)
        )

    def parts(self) -> tuple[Any, ...]:
        """Return the structure as nested tuples, for :meth:`of`."""
        return self.plates, *(tuple(tuple(part) for part in parts) for parts in (self.sequences, self.nestings))

    def without_absent(self, present: Mapping[str, Tensor]) -> Structure:
        """Return the structure without absent elements; a sequence of steps that then differ in size is none.

        Args:
            present: The masks of the present elements of sites, over their batch shapes.
        """
        kept = (_without_absent(sequence, present) for sequence in self.sequences)
        return self._replace(sequences=tuple(sequence for sequence in kept if sequence))

    def outside(self, plate: str) -> tuple[Nesting, ...]:
        """Return the nestings of a plate."""
        return tuple(nesting for nesting in self.nestings if nesting.plate == plate)

    def depth(self, plate: str) -> int:
        """Return the length of the longest chain of nestings from a plate outwards, counting the plate."""
        return 1 + max((self.depth(nesting.outer) for nesting in self.outside(plate)), default=0)

    def group(self, name: str) -> int:
        """Return the index of the sequence that a site belongs to, or -1."""
        return next((i for i, sequence in enumerate(self.sequences) if name in sequence.sites), -1)


def _without_absent(sequence: StepSequence, present: Mapping[str, Tensor]) -> StepSequence | None:
    """Return a sequence without absent elements, or None if its steps then differ in size."""
    if not present.keys() & {*sequence.sites}:
        return sequence
    of = []
    for name, steps in zip(sequence.sites, sequence.of, strict=True):
        counts = present.get(name, torch.ones(1, dtype=torch.bool)).flatten()
        of.append(steps.reshape(len(counts), -1)[counts].flatten())
    met, sizes = torch.cat(of).unique(return_counts=True)
    if len(met) < 2 or bool((sizes != sizes[0]).any()):
        return None
    return StepSequence(sequence.sites, len(met), tuple(torch.searchsorted(met, steps) for steps in of))


def check_nestings(owner: str, structure: Structure, rows: Mapping[str, Rows]) -> None:
    """Raise ValueError if nestings do not fit the plates of a model, given their rows in a run."""
    outer_plates = {n.plate: [own.outer for own in structure.outside(n.plate)] for n in structure.nestings}
    try:
        TopologicalSorter(outer_plates).prepare()
    except CycleError as error:
        raise ValueError(f"{owner}: the nestings in structure have the cycle {', '.join(error.args[1])}.") from None
    for plate, outer, index in structure.nestings:
        for name in (plate, outer):
            if name not in structure.plates or name not in rows:
                has = ", ".join(name for name in structure.plates if name in rows) or "none"
                raise ValueError(f"{owner}: structure has a nesting of {plate!r} in {outer!r}. Its plates are {has}.")
            if not takes_all(rows[name]):
                fault = f"plate {name!r} takes some of its rows, so that no index can nest {plate!r} in {outer!r}"
                raise ValueError(f"{owner}: {fault}. Let it take all rows, or leave the nesting out of structure=.")
        size, number = rows[plate].full_size, rows[outer].full_size
        is_index = isinstance(index, Tensor) and index.dtype == torch.long and index.shape == (size,)
        if not is_index or not bool(((index >= 0) & (index < number)).all()):
            got = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            wanted = f"one index of {outer!r} for each row of {plate!r}, ({size},), from 0 to {number - 1}"
            raise ValueError(f"{owner}: the rows of a nesting must be {wanted}, got {got}.")


def takes_all(rows: Rows) -> bool:
    """True if a plate takes all of its rows in their order."""
    return rows.size == rows.full_size and rows.chosen is None
