"""The structure of a posterior, read from its log-density: independent rows of plates, nestings, and sequences.

Two latents are independent given all others if and only if the mixed second derivative of the log-density vanishes
everywhere.  It is found by differences of scores at two random points, for all latents that one group of latents
touches at once.  So couplings that no graph of sites shows are seen too, such as a ``factor`` of neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pyro import validation_enabled
from torch import Tensor

from ..programs.log_density import or_nan, score_of
from .discrete import summed
from .guide_call import Call, Key, Rows, frames_of
from .packing import Packing

FEW = 64  # the largest number of latents that one flow takes whatever their structure
SHORT = 8  # the smallest number of steps of a sequence
LOCAL = 8  # a sequence couples steps at most 1 / LOCAL of its length apart
POINTS = 2  # at which couplings are looked for
SHIFT = 0.1  # by which latents are moved, in the unconstrained space
FAINT = 1e-4  # a coupling this small, relative to the largest one, is round-off
NUMBERED = re.compile(r"(.*?)(\d+)$")


class Sequence(NamedTuple):
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
        nestings: The nestings of plates by an index, at most one for each plate.
    """

    plates: tuple[str, ...] = ()
    sequences: tuple[Sequence, ...] = ()
    nestings: tuple[Nesting, ...] = ()

    @classmethod
    def of(cls, parts: Iterable[Any]) -> Structure:
        """Return a structure from nested tuples of its parts, in their order."""
        plates, sequences, nestings = (*map(tuple, parts), (), (), ())[:3]
        return cls(plates, tuple(Sequence(*part) for part in sequences), tuple(Nesting(*part) for part in nestings))

    def parts(self) -> tuple[Any, ...]:
        """Return the structure as nested tuples, for :meth:`of`."""
        return self.plates, *(tuple(tuple(part) for part in parts) for parts in (self.sequences, self.nestings))

    def outside(self, plate: str) -> tuple[Nesting, ...]:
        """Return the nestings of a plate in all plates around it by an index, the next one first."""
        found, at = list[Nesting](), plate
        while step := next((nesting for nesting in self.nestings if nesting.plate == at), None):
            rows = step.rows[found[-1].rows] if found else step.rows
            found.append(Nesting(plate, step.outer, rows))
            at = step.outer
        return tuple(found)

    def group(self, name: str) -> int:
        """Return the index of the sequence that a site belongs to, or -1."""
        return next((i for i, sequence in enumerate(self.sequences) if name in sequence.sites), -1)


def read_structure(call: Call, encoded: Collection[str] = ()) -> Structure:
    """Return the structure of the posterior of a model's latents.

    Subsampled plates and those with an encoder always have rows.  Few latents are left to one flow, and so are plates
    whose rows are few.

    Args:
        call: The call of the guide.
        encoded: The plates with an encoder.
    """
    frames = [frame for site in call.latents.values() for frame in _plates(site)]
    subsampled = {frame.name for frame in frames if _is_subsampled(frame) or frame.name in encoded}
    if not subsampled and sum(site["value"].numel() for site in call.latents.values()) <= FEW:
        return Structure()
    look = _Look(call)
    plates = look.independent_plates(subsampled)
    sequences = [found for sites in look.blocks(plates).values() for found in look.sequences(sites, plates)]
    return Structure(tuple(plates), tuple(sequences), tuple(look.nestings(plates, subsampled)))


def check_nestings(owner: str, structure: Structure, rows: Mapping[str, Rows]) -> None:
    """Raise ValueError if nestings do not fit the plates of a model, given their rows in a run."""
    for plate, outer, index in structure.nestings:
        for name in (plate, outer):
            if name not in structure.plates or name not in rows:
                has = ", ".join(name for name in structure.plates if name in rows) or "none"
                raise ValueError(f"{owner}: structure has a nesting of {plate!r} in {outer!r}. Its plates are {has}.")
            if rows[name].size < rows[name].full_size or rows[name].chosen is not None:
                fault = f"plate {name!r} takes some of its rows, so that no index can nest {plate!r} in {outer!r}"
                raise ValueError(f"{owner}: {fault}. Let it take all rows, or leave the nesting out of structure=.")
        size, number = rows[plate].full_size, rows[outer].full_size
        if index.shape != (size,) or not bool(((index >= 0) & (index < number)).all()):
            wanted = f"one index of {outer!r} for each row of {plate!r}, ({size},), from 0 to {number - 1}"
            raise ValueError(f"{owner}: the rows of a nesting must be {wanted}, got shape {tuple(index.shape)}.")


def _plates(site: dict[str, Any]) -> list[Any]:
    """Return the frames of the plates that are dimensions of a site with several rows."""
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized and frame.size != 1]


def _is_subsampled(frame: Any) -> bool:
    return frame.full_size is not None and frame.size < frame.full_size


class _Track(NamedTuple):
    """Sites that may be a sequence: the number of steps, and the step of each of their numbers, by site."""

    steps: int
    of: dict[str, Tensor]


class _Look:
    """A look at the couplings between the packed, unconstrained latents of a model.

    Attributes:
        places: For each site the places of its numbers in the vector, of the shape of its unconstrained value.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        packing = Packing(call.owner, call.latents.values())
        program, size = summed(call), packing.size
        order, self.places = (
            torch.arange(size).split([part.size for part in packing.parts.values()]),
            dict[str, Tensor](),
        )
        for (name, part), chunk in zip(packing.parts.items(), order, strict=True):
            self.places[name] = chunk.reshape(part.batch + part.event)
        self._depths = {name: len(part.batch) for name, part in packing.parts.items()}

        def density(z: Tensor) -> Tensor:
            changes = (log_det for *_, log_det in packing.unpack(z.reshape(len(z), *ones, size)))
            total = program.log_prob(packing.values(z), len(z))
            return sum((change.reshape(len(z), -1).sum(-1) for change in changes), total)

        ones = (1,) * max(self._depths.values())
        self._density, self._start = or_nan(density), packing.start

    @torch.no_grad()
    def coupled(self, moved: Tensor) -> Tensor:
        """Return True for the latents whose scores change if others, at some places, are moved, ``(D,)``."""
        found = torch.zeros(len(self._start), dtype=torch.bool)
        with self.call.same_draws(), validation_enabled(False):
            torch.manual_seed(0)
            for _ in range(POINTS):
                point = self._start + 0.5 * torch.randn_like(self._start)
                step = torch.zeros_like(point)
                step[moved] = SHIFT * (1 + torch.rand(len(moved))).to(point)
                back, forth = score_of(self._density, torch.stack((point - step, point + step))).cpu()
                change = (forth - back).abs().nan_to_num(0.0)
                noise = 64 * torch.finfo(change.dtype).eps * torch.maximum(back.abs(), forth.abs())
                found |= change > torch.maximum(noise, FAINT * change.max())
        return found

    def blocks(self, plates: Iterable[str]) -> dict[Key, list[str]]:
        """Return the sites of each set of some plates."""
        found: dict[Key, list[str]] = {}
        for name, site in self.call.latents.items():
            found.setdefault(tuple(frame.name for frame in frames_of(site, {*plates})), []).append(name)
        return found

    def independent_plates(self, subsampled: set[str]) -> list[str]:
        """Return the plates whose rows are independent given the rest, and that have more than a few latents."""
        frames = [frame for site in self.call.latents.values() for frame in _plates(site)]
        plates = list(dict.fromkeys(frame.name for frame in frames))
        while True:
            blocks = self.blocks(plates)
            tied = {plate for key, sites in blocks.items() for plate in self._tied(key, sites)} - subsampled
            if not tied:
                break
            plates = [plate for plate in plates if plate not in tied]
        large = {key for key, sites in blocks.items() if sum(self.places[name].numel() for name in sites) > FEW}
        kept = subsampled.union(*large)
        return [plate for plate in plates if plate in kept]

    def _tied(self, key: Key, sites: list[str]) -> Iterator[str]:
        """Yield the plates of a block whose rows depend on each other."""
        rows = {name: self._rows(name, key) for name in sites}
        middle = {plate: max(int(rows[sites[0]][plate].max()), 0) // 2 for plate in key}
        moved = [
            self.places[name][torch.stack([rows[name][plate] == middle[plate] for plate in key]).all(0)]
            for name in sites
            if key
        ]
        if not moved:
            return
        coupled = self.coupled(torch.cat(moved))
        for plate in key:
            if any(bool((coupled[self.places[name]] & (rows[name][plate] != middle[plate])).any()) for name in sites):
                yield plate

    def _rows(self, name: str, key: Key) -> dict[str, Tensor]:
        """Return the row in each plate of each number of a site."""
        frames = frames_of(self.call.latents[name], key)
        return {frame.name: self._along(name, self._depths[name] + frame.dim) for frame in frames}

    def _along(self, name: str, axis: int) -> Tensor:
        """Return the index along an axis of each number of a site."""
        shape = self.places[name].shape
        return torch.arange(shape[axis]).reshape(-1, *(1,) * (len(shape) - axis - 1)).expand(shape)

    def nestings(self, plates: Iterable[str], subsampled: Collection[str]) -> list[Nesting]:
        """Return for each plate the one whose rows its own belong to by an index, if there is one.

        Of several it is the one with most rows.  Subsampled plates have none.
        """
        single = {key[0]: sites for key, sites in self.blocks(plates).items() if len(key) == 1}
        blocks = {plate: sites for plate, sites in single.items() if plate not in subsampled}
        found = Structure()
        sizes = {plate: 1 + int(self._rows(sites[0], (plate,))[plate].max()) for plate, sites in blocks.items()}
        for outer in sorted(blocks, key=lambda plate: -sizes[plate]) if len(blocks) > 1 else ():
            responses = self._responses(outer, blocks[outer], sizes[outer])
            for plate in blocks:
                circular = plate == outer or any(nesting.outer == plate for nesting in found.outside(outer))
                if circular or found.outside(plate):
                    continue
                rows = self._outer_rows(plate, blocks[plate], sizes[plate], responses)
                if rows is not None:
                    found = found._replace(nestings=(*found.nestings, Nesting(plate, outer, rows)))
        return list(found.nestings)

    def _responses(self, outer: str, sites: list[str], size: int) -> list[tuple[Tensor, Tensor]]:
        """Return what is coupled to the rows of a plate with a zero, and with a one, in each binary digit of a row."""
        found = []
        for digit in range((size - 1).bit_length()):
            ones = {name: self._rows(name, (outer,))[outer] >> digit & 1 for name in sites}
            zero, one = (
                self.coupled(torch.cat([self.places[name][ones[name] == value] for name in sites])) for value in (0, 1)
            )
            found.append((zero, one))
        return found

    def _outer_rows(
        self, plate: str, sites: list[str], size: int, responses: list[tuple[Tensor, Tensor]]
    ) -> Tensor | None:
        """Return the row of another plate to which each row of a plate is coupled; None if some have several.

        Rows that are coupled to none belong to the first.
        """

        def any_in_row(coupled: Tensor) -> Tensor:
            found = torch.zeros(size, dtype=torch.long)
            for name in sites:
                row = self._rows(name, (plate,))[plate].flatten()
                found = found.index_add(0, row, coupled[self.places[name]].flatten().long())
            return found > 0

        pairs = [(any_in_row(zero), any_in_row(one)) for zero, one in responses]
        seen = torch.stack([zero | one for zero, one in pairs])
        if not seen.any() or (seen != seen[:1]).any() or any((zero & one).any() for zero, one in pairs):
            return None
        return sum((one.long() << digit for digit, (_, one) in enumerate(pairs)), torch.zeros(size, dtype=torch.long))

    def sequences(self, sites: list[str], plates: Iterable[str]) -> list[Sequence]:
        """Return the sequences among sites with the same rows: those of one length together, if they are local."""
        tracks: dict[int, list[_Track]] = {}
        for track in self._tracks(sites, plates):
            tracks.setdefault(track.steps, []).append(track)
        found: list[Sequence] = []
        for steps, parts in tracks.items():
            whole = _Track(steps, {name: step for part in parts for name, step in part.of.items()})
            for track in [whole] if self._is_local(whole, plates) else parts:
                if sum(self.places[name].numel() for name in track.of) > FEW:
                    found.append(self._sequence(track, plates))
        return found

    def _sequence(self, track: _Track, plates: Iterable[str]) -> Sequence:
        """Return a sequence, in which steps are put together so that each is coupled to the next one alone."""
        reach = self._reach(track, plates)
        size = next((size for size in range(max(1, reach), 4 * reach + 1) if track.steps % size == 0), 1)
        of = tuple((step[self._first_row(name, plates)] // size).flatten() for name, step in track.of.items())
        return Sequence(tuple(track.of), track.steps // size, of)

    def _tracks(self, sites: list[str], plates: Iterable[str]) -> Iterator[_Track]:
        """Yield the local sequences of sites that are numbered, and of single sites."""
        families: dict[str, list[str]] = {}
        for name in sites:
            if matched := NUMBERED.match(name):
                families.setdefault(matched[1], []).append(name)
        taken = set[str]()
        for names in families.values():
            if len(names) >= SHORT and len({self.places[name].shape for name in names}) == 1:
                of = {name: torch.full_like(self.places[name], step) for step, name in enumerate(names)}
                if self._is_local(track := _Track(len(names), of), plates):
                    taken |= {*names}
                    yield track
        for name in (name for name in sites if name not in taken):
            yield from self._best_axis(name, plates)

    def _best_axis(self, name: str, plates: Iterable[str]) -> list[_Track]:
        """Return the axis of a site along which it is a local sequence, with the fewest coupled numbers; or none."""
        shape, found = self.places[name].shape, []
        rows = {self._depths[name] + frame.dim for frame in frames_of(self.call.latents[name], {*plates})}
        for axis in range(len(shape)):
            if axis not in rows and shape[axis] >= SHORT:
                track = _Track(shape[axis], {name: self._along(name, axis)})
                if self._is_local(track, plates):
                    found.append((max(1, self._reach(track, plates)) / shape[axis], track))
        return [min(found, key=lambda pair: pair[0])[1]] if found else []

    def _is_local(self, track: _Track, plates: Iterable[str]) -> bool:
        return self._reach(track, plates) <= track.steps // LOCAL

    def _reach(self, track: _Track, plates: Iterable[str]) -> int:
        """Return the largest number of steps between coupled latents of a sequence, seen from a few steps."""
        places = torch.cat([self.places[name][self._first_row(name, plates)].flatten() for name in track.of])
        steps = torch.cat([step[self._first_row(name, plates)].flatten() for name, step in track.of.items()])
        farthest = 0
        for step in {track.steps // 2, track.steps // 3, track.steps - 1 - track.steps // 5}:
            coupled = self.coupled(places[steps == step])[places]
            farthest = max(farthest, int((steps[coupled] - step).abs().max()) if coupled.any() else 0)
        return farthest

    def _first_row(self, name: str, plates: Iterable[str]) -> tuple[slice | int, ...]:
        """Return the index of a site's numbers in the first row of each plate."""
        index: list[slice | int] = [slice(None)] * self.places[name].dim()
        for frame in frames_of(self.call.latents[name], {*plates}):
            index[self._depths[name] + frame.dim] = 0
        return tuple(index)
