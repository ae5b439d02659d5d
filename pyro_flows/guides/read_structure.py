"""The structure of a posterior, read from its density: independent rows, nestings by an index, and sequences.

Two latents are independent given all others if and only if the mixed second derivative of the log-density vanishes
everywhere.  It is found by differences of scores at two random points, for all latents that one group of latents
touches at once.  So couplings that no graph of sites shows are seen too, such as a ``factor`` of neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

import torch
from pyro import validation_enabled
from torch import Tensor

from ..arguments import quoted
from ..programs.log_density import or_nan
from ..vjp import score_of
from .guide_call import Call, Key, Rows, frames_of
from .left_out import summed
from .packing import Packing


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
        return cls(tuple(plates), tuple(map(StepSequence._make, sequences)), tuple(map(Nesting._make, nestings)))

    def parts(self) -> tuple[Any, ...]:
        """Return the structure as nested tuples, for :meth:`of`."""
        return self.plates, *(tuple(tuple(part) for part in parts) for parts in (self.sequences, self.nestings))

    def without_absent(self, present: Mapping[str, Tensor]) -> Structure:
        """Return the structure without absent elements; a sequence of steps that then differ in size is none.

        Args:
            present: The masks of the present elements of sites, over their batch shapes.
        """
        kept = list[StepSequence]()
        for sequence in self.sequences:
            of = []
            for name, steps in zip(sequence.sites, sequence.of, strict=True):
                counts = present.get(name, torch.ones(1, dtype=torch.bool)).flatten()
                of.append(steps.reshape(len(counts), -1)[counts].flatten())
            met, sizes = torch.cat(of).unique(return_counts=True)
            if not present.keys() & {*sequence.sites}:
                kept.append(sequence)
            elif len(met) > 1 and bool((sizes == sizes[0]).all()):
                steps_of = tuple(torch.searchsorted(met, steps) for steps in of)
                kept.append(StepSequence(sequence.sites, len(met), steps_of))
        return self._replace(sequences=tuple(kept))

    def outside(self, plate: str) -> tuple[Nesting, ...]:
        """Return the nestings of a plate."""
        return tuple(nesting for nesting in self.nestings if nesting.plate == plate)

    def depth(self, plate: str) -> int:
        """Return the length of the longest chain of nestings from a plate outwards, counting the plate."""
        return 1 + max((self.depth(nesting.outer) for nesting in self.outside(plate)), default=0)

    def group(self, name: str) -> int:
        """Return the index of the sequence that a site belongs to, or -1."""
        return next((i for i, sequence in enumerate(self.sequences) if name in sequence.sites), -1)


def check_nestings(owner: str, structure: Structure, rows: Mapping[str, Rows]) -> None:
    """Raise ValueError if nestings do not fit the plates of a model, given their rows in a run."""
    try:
        TopologicalSorter(
            {n.plate: [own.outer for own in structure.outside(n.plate)] for n in structure.nestings}
        ).prepare()
    except CycleError as error:
        raise ValueError(f"{owner}: the nestings in structure have the cycle {', '.join(error.args[1])}.") from None
    known = [name for name in structure.plates if name in rows]
    for plate, outer, index in structure.nestings:
        for name in (plate, outer):
            if name not in known:
                has = ", ".join(known) or "none"
                raise ValueError(f"{owner}: structure has a nesting of {plate!r} in {outer!r}. Its plates are {has}.")
            if not takes_all(rows[name]):
                fault = f"plate {name!r} takes some of its rows, so that no index can nest {plate!r} in {outer!r}"
                raise ValueError(f"{owner}: {fault}. Let it take all rows, or leave the nesting out of structure=.")
        size, number = rows[plate].full_size, rows[outer].full_size
        is_index = isinstance(index, Tensor) and index.dtype == torch.long and index.shape == (size,)
        if not is_index or not bool(((index >= 0) & (index < number)).all()):
            wanted = f"one index of {outer!r} for each row of {plate!r}, ({size},), from 0 to {number - 1}"
            raise ValueError(f"{owner}: the rows of a nesting must be {wanted}, got {quoted(index)}.")


def takes_all(rows: Rows) -> bool:
    """True if a plate takes all of its rows in their order."""
    return rows.size == rows.full_size and rows.chosen is None


@dataclass(frozen=True)
class Probe:
    """The way couplings are looked for, and the sizes from which structure pays.

    Attributes:
        few: The largest number of latents that one flow takes whatever their structure.
        short: The smallest number of steps of a sequence.
        reach: The largest share of a sequence's length between coupled steps; more is no sequence.
        points: The random points at which scores are compared.  A derivative may vanish at one of them.
        shift: How far latents are moved, in the unconstrained space.
        faint: A coupling this small, relative to the largest one, is round-off.
        joined: The most shared latents, if a plate joins them on which the rows of another one depend.
        gains: The most gains of other latents in these, for memory.
    """

    few: int = 64
    short: int = 8
    reach: float = 1 / 8
    points: int = 2
    shift: float = 0.1
    faint: float = 1e-4
    joined: int = 192
    gains: int = 1_000_000


PROBE = Probe()
NUMBERED = re.compile(r"(.*?)(\d+)$")
Track = tuple[int, Tensor]  # a local sequence: its reach, and the step of each number of the vector, or -1


def read_structure(call: Call, encoded: Collection[str] = ()) -> Structure:
    """Return the structure of the posterior of a model's latents.

    Subsampled plates and those with an encoder always have rows.  Few latents are left to one flow, and so are plates
    whose rows are few.

    Args:
        call: The call of the guide.
        encoded: The plates with an encoder.
    """
    frames = [frame for site in call.latents.values() for frame in site["cond_indep_stack"]]
    frames = [frame for frame in frames if frame.vectorized and frame.size != 1]
    some = {f.name for f in frames if f.name in encoded or (f.full_size is not None and f.size < f.full_size)}
    if not some and sum(site["value"].numel() for site in call.latents.values()) <= PROBE.few:
        return Structure()
    look = _Look(call, some)
    rows = call._replace(plates=tuple(look.plates)).look(until=()).rows
    whole = [name for name in look.plates if takes_all(rows[name]) and name not in encoded]
    nestings, sequences = look.nestings(whole), tuple(look.sequences())
    kept = {plate for nesting in nestings for plate in (nesting.plate, nesting.outer)}
    along = {name for sequence in sequences for name in sequence.sites}
    kept.update(plate for key, sites in look.blocks.items() if along & {*sites} for plate in key)
    look.join_crossed([plate for plate in whole if plate not in kept])
    return Structure(tuple(look.plates), sequences, tuple(nestings))


class _Look:
    """A look at the couplings between the packed, unconstrained latents of a model.

    Args:
        call: The call of the guide.
        some: The plates that have rows in any case.

    Attributes:
        parts: The sites in the vector.
        places: For each site the places of its numbers in the vector, of the shape of its unconstrained value.
        rows: For each plate the row of each number of the vector, ``(D,)``; -1 outside of the plate.
        plates: The plates whose rows are independent given the rest, and that have more than a few latents.
        blocks: The sites of each set of these plates.
    """

    def __init__(self, call: Call, some: set[str]) -> None:
        self.call, packing = call, Packing(call.owner, call.latents.values())
        program, size, ones = summed(call), packing.size, (1,) * packing.site_depth
        self.parts, self.places, self.rows = packing.parts, dict[str, Tensor](), dict[str, Tensor]()
        order = torch.arange(size).split([part.size for part in packing.parts.values()])
        for (name, part), chunk in zip(packing.parts.items(), order, strict=True):
            self.places[name] = chunk.reshape(part.batch + part.event)
            for plate, row in part.rows.items():
                if row.any():  # with several rows
                    self.rows.setdefault(plate, torch.full((size,), -1))[chunk] = row

        def density(z: Tensor) -> Tensor:
            changes = (log_det for *_, log_det in packing.unpack(z.reshape(len(z), *ones, size)))
            total = program.log_prob(packing.values(z), len(z))
            return sum((change.reshape(len(z), -1).sum(-1) for change in changes), total)

        self._density, self._start = or_nan(density), packing.start
        self.plates, tied = [*self.rows], {""}
        while tied:
            self.blocks = self._sites_by_plates()
            tied = {plate for key, sites in self.blocks.items() for plate in self._tied(key, self._at(sites))} - some
            self.plates = [plate for plate in self.plates if plate not in tied]
        kept = some.union(*(key for key, sites in self.blocks.items() if len(self._at(sites)) > PROBE.few))
        self._keep([plate for plate in self.plates if plate in kept])

    def _keep(self, plates: list[str]) -> None:
        """Let these plates have rows; the latents of others join those outside."""
        self.plates, size = plates, len(self._start)
        self.blocks = self._sites_by_plates()
        inside = torch.zeros(1, size, dtype=torch.long), *(self.rows[plate].unsqueeze(0) for plate in self.plates)
        self._first = torch.cat(inside).max(0).values <= 0  # the numbers in the first row of each plate, or outside

    def _sites_by_plates(self) -> dict[Key, list[str]]:
        found: dict[Key, list[str]] = {}
        for name, site in self.call.latents.items():
            found.setdefault(tuple(frame.name for frame in frames_of(site, self.plates)), []).append(name)
        return found

    def _at(self, sites: Iterable[str]) -> Tensor:
        """Return the places of the numbers of some sites."""
        return torch.cat([self.places[name].flatten() for name in sites])

    def coupled(self, moved: Tensor) -> Tensor:
        """Return True for the latents whose scores change if others, at some places, are moved, ``(D,)``."""
        found = [change > noise.clamp_min(PROBE.faint * float(change.max())) for change, noise in self._changes(moved)]
        return torch.stack(found).any(0)

    @torch.no_grad()
    def _changes(self, moved: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the changes of all scores if latents at some places are moved, and their round-off, at each point."""
        found = []
        with self.call.same_draws(), validation_enabled(False):
            torch.manual_seed(0)
            for _ in range(PROBE.points):
                point = self._start + 0.5 * torch.randn_like(self._start)
                step = torch.zeros_like(point)
                step[moved] = PROBE.shift * (1 + torch.rand(len(moved))).to(point)
                back, forth = score_of(self._density, torch.stack((point - step, point + step))).cpu()
                change = (forth - back).abs().nan_to_num(0.0)
                found.append((change, 64 * torch.finfo(change.dtype).eps * torch.maximum(back.abs(), forth.abs())))
        return found

    def _tied(self, key: Key, own: Tensor) -> list[str]:
        """Return the plates of a block, with numbers at some places, whose rows depend on each other."""
        if not key:
            return []
        elsewhere = {plate: self.rows[plate][own] != int(self.rows[plate][own].max()) // 2 for plate in key}
        coupled = self.coupled(own[~torch.stack([*elsewhere.values()]).any(0)])[own]
        return [plate for plate in key if bool((coupled & elsewhere[plate]).any())]

    def nestings(self, whole: Iterable[str]) -> list[Nesting]:
        """Return the nestings of plates, which take all of their rows, by an index.

        A plate is nested in another one if each of its rows is coupled to at most one row there.
        """
        whole = [plate for plate in whole if any(plate in key for key in self.blocks)]
        outer_plates = [key[0] for key in self.blocks if len(key) == 1 and key[0] in whole]
        if len(whole) < 2 or not outer_plates:
            return []
        own = torch.zeros(PROBE.points, len(self._start))
        for plate in whole:
            inside = (self.rows[plate] >= 0).nonzero().squeeze(-1)
            own[:, inside] = torch.stack([change[inside] for change, _ in self._changes(inside)])
        whole.sort(key=lambda plate: int(self.rows[plate].max()))
        touched = {outer: self._touched(outer, PROBE.faint * own) for outer in outer_plates}
        found: dict[str, dict[str, Tensor]] = {plate: {} for plate in whole}
        for plate in whole:
            for outer in outer_plates:
                if plate != outer and (index := _outer_rows(self.rows[plate], touched[outer])) is not None:
                    found[plate][outer] = index
        chains = _chains(found).items()
        return [Nesting(plate, outer, index) for plate, chain in chains for outer, index in chain.items()]

    def join_crossed(self, plates: Collection[str]) -> None:
        """Let small plates join the latents outside if the rows of another plate depend on all of their rows.

        The rows of crossed plates are dependent, but those of the larger one are independent given the smaller one.

        Args:
            plates: The plates that may join.
        """
        alone = [key[0] for key in self.blocks if len(key) == 1 and key[0] in plates]
        for plate in sorted(alone, key=lambda plate: len(self._at(self.blocks[(plate,)]))):
            own, beside = self._at(self.blocks[(plate,)]), [key for key in self.blocks if key and plate not in key]
            joined = len(own) + sum(self.places[name].numel() for name in self.blocks.get((), []))
            few = joined <= PROBE.joined and joined * (len(self._start) - joined) <= PROBE.gains
            if few and beside:
                there = self._at(name for key in beside for name in self.blocks[key])
                if self.coupled(own)[there].any():
                    self._keep([other for other in self.plates if other != plate])

    def _touched(self, outer: str, faint: Tensor) -> list[list[Tensor]]:
        """Return what is coupled to the rows of a plate with a zero, and with a one, in each binary digit of a row.

        Args:
            outer: The plate.
            faint: The changes of scores that do not count, at each point.
        """
        places = self._at(self.blocks[(outer,)])
        row = self.rows[outer][places]

        def coupled(moved: Tensor) -> Tensor:
            pairs = zip(self._changes(moved), faint, strict=True)
            return torch.stack([change > torch.maximum(noise, least) for (change, noise), least in pairs]).any(0)

        digits = range(int(row.max()).bit_length())
        return [[coupled(places[row >> digit & 1 == value]) for value in (0, 1)] for digit in digits]

    def sequences(self) -> Iterator[StepSequence]:
        """Yield the sequences among sites with the same rows: those of one length together, if they are local."""
        for sites in self.blocks.values():
            tracks: dict[int, list[Track]] = {}
            for reach, of in self._tracks(sites):
                tracks.setdefault(int(of.max()), []).append((reach, of))
            for parts in tracks.values():
                whole = self._track(torch.stack([of for _, of in parts]).max(0).values)
                for reach, of in parts if whole is None else [whole]:
                    if int((of >= 0).sum()) > PROBE.few:
                        yield self._sequence(reach, of)

    def _sequence(self, reach: int, of: Tensor) -> StepSequence:
        """Return a sequence, in which steps are put together so that each is coupled to the next one alone."""
        steps, first = int(of.max()) + 1, self._first
        size = next((size for size in range(max(1, reach), 4 * reach + 1) if steps % size == 0), 1)
        places = {name: place.flatten() for name, place in self.places.items() if of[place].min() >= 0}
        return StepSequence(
            tuple(places), steps // size, tuple(of[place[first[place]]] // size for place in places.values())
        )

    def _tracks(self, sites: list[str]) -> Iterator[Track]:
        """Yield the local sequences of sites that are numbered, and of single sites, along the axis of least reach."""
        families: dict[str, list[str]] = {}
        for name in sites:
            if matched := NUMBERED.match(name):
                families.setdefault(matched[1], []).append(name)
        taken = set[str]()
        for names in families.values():
            if len(names) >= PROBE.short and len({self.places[name].shape for name in names}) == 1:
                of = torch.full(self._start.shape, -1)
                for step, name in enumerate(names):
                    of[self.places[name]] = step
                if track := self._track(of):
                    taken |= {*names}
                    yield track
        for name in (name for name in sites if name not in taken):
            part, place, found = self.parts[name], self.places[name], list[Track]()
            rows = {len(part.batch) + frame.dim for frame in frames_of(self.call.latents[name], self.plates)}
            for axis in (axis for axis in range(place.dim()) if axis not in rows and place.shape[axis] >= PROBE.short):
                of = torch.full(self._start.shape, -1)
                of[place] = part.along(axis)
                found += filter(None, [self._track(of)])
            if found:
                yield min(found, key=lambda track: max(1, track[0]) / int(track[1].max() + 1))

    def _track(self, of: Tensor) -> Track | None:
        """Return a sequence with its reach, or None if it is not local.

        The reach is the largest number of steps between coupled latents, seen from a few steps.
        """
        steps, places, reach = int(of.max()) + 1, ((of >= 0) & self._first).nonzero().squeeze(-1), 0
        own = of[places]
        for step in {steps // 2, steps // 3, steps - 1 - steps // 5}:
            coupled = self.coupled(places[own == step])[places]
            reach = max(reach, int((own[coupled] - step).abs().max()) if coupled.any() else 0)
        return (reach, of) if reach <= int(PROBE.reach * steps) else None


def _outer_rows(row: Tensor, touched: list[list[Tensor]]) -> Tensor | None:
    """Return the row of another plate to which each row of a plate is coupled, -1 for none.

    Return None if some are coupled to several rows, or all to none.

    Args:
        row: The row of each number of the vector, -1 outside of the plate.
        touched: The numbers that are coupled to rows of the other plate, by the binary digits of these.
    """
    inside, none = row >= 0, torch.zeros(1 + int(row.max()), dtype=torch.long)
    digits = [[none.index_add(0, row[inside], seen[inside].long()) > 0 for seen in pair] for pair in touched]
    seen = torch.stack([zero | one for zero, one in digits])
    if not seen.any() or (seen != seen[:1]).any() or any((zero & one).any() for zero, one in digits):
        return None
    return sum((one.long() << digit for digit, (_, one) in enumerate(digits)), none).where(seen[0], -1)


def _chains(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Choose the plates around each plate: those in which the index of each follows from that of the next one.

    Otherwise an outer row would be coupled to several rows of another one through the rows inside.

    Args:
        found: For each plate the rows of others that its rows are coupled to, or -1.  Of plates that map one to one,
            earlier ones are around later ones.
    """
    reached, chosen = {plate: {plate, *around} for plate, around in found.items()}, dict[str, dict[str, Tensor]]()
    for middle in found:
        for plates in reached.values():
            plates.update(reached[middle] if middle in plates else ())
    for plate in sorted(found, key=lambda plate: len(reached[plate])):  # outer plates first
        around, chains = found[plate], [dict[str, Tensor]()]
        for outer in (outer for outer in around if outer in chosen):
            rows = around[outer].clamp_min(0)
            chain = {outer: rows}
            for above, index in chosen[outer].items():
                own = around.get(above)
                if own is not None and bool(((own < 0) | (own == index[rows])).all()):
                    chain[above] = index[rows]
            chains.append(chain)
        # The longest chain; if there are several, that with most rows in use.
        chosen[plate] = max(chains, key=lambda chain: (len(chain), sum(len(rows.unique()) for rows in chain.values())))
    return chosen
