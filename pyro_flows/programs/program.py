"""A Pyro program with its arguments, run for many draws at once by an engine that was tried on two of them first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from .engines import ENGINES, Read, Values, View, apart, beside, is_deterministic, run, value_of, with_room
from .enumeration import Parallel, Run, check_masks, check_rows
from .events import WithValues
from .noise import Noise
from .one_by_one import Sequential
from .quoting import quoted
from .traces import trace_of
from .whole import Part, parts_of

Place = Callable[..., Any]  # a handler that puts values into a program's sites: place(program, data=values)
WAY_OUT = (
    "Let the model broadcast to the left of its plates, with (x * w).sum(-1) in place of x @ w, say; give "
    "max_plate_nesting where it has dimensions of its own to the left of its plates; or leave vectorize out."
)
DENSITY, SIZE = "log p", "size of"  # what is read beside values of sites
REPEATS = 9  # runs more at one and the same draw, where a density is an estimate


class Trial(NamedTuple):
    """Outcome of an engine on two draws: its fault in words, or an empty string, and the density's noise."""

    fault: str
    noise: Noise = Noise()
    cause: Exception | None = None


class Program:
    """A Pyro program, model or guide, with its arguments.

    Args:
        call: The program.
        args: Its arguments.
        kwargs: Its keyword arguments.
        single: The trace of one run.
        nesting: The number of dimensions that its plates take.
        enumerated: The discrete latents that are summed out of its density.
        given: The plates whose rows the program chooses itself, ``pyro.plate(..., subsample=...)``.

    Attributes:
        subsamples: The subsampled plates whose rows are drawn.
        rows: The rows of these, by their names: every run takes them.
        engine: The way to run many draws: one of ``ENGINES``.
        noise: That of the log-density at one and the same draw.
        fault: Why no faster engine runs the program, in words.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        single: Trace,
        nesting: int,
        enumerated: tuple[str, ...] = (),
        given: tuple[str, ...] = (),
    ) -> None:
        self.call, self.args, self.kwargs = call, args, kwargs
        self.single, self.nesting, self.enumerated = prune_subsample_sites(single), nesting, enumerated
        self.given = given
        plates = {name: site for name, site in single.nodes.items() if site_is_subsample(site)}
        parts = {n: s for n, s in plates.items() if n not in given and len(s["value"]) < s["fn"].size}
        self.subsamples = {name: site["fn"] for name, site in parts.items()}
        self.rows = {name: site["value"] for name, site in parts.items()}
        self.engine, self.noise, self.fault = "loop", Noise(), ""
        self._enumeration: Parallel | Sequential | None = None
        self._summed: Tensor | None = None  # the log-density of the single run, with discrete latents summed out
        self._draws_alone = False
        self._parts: list[Part] = []
        self._part: Part | None = None
        self._sum_of_parts: Parallel | Sequential | None = None

    def run(
        self, read: Read, held: Values, size: int, *, place: Place = poutine.condition, enumerate: bool = False
    ) -> Values:
        """Run the program for N draws and read some tensors off, each ``(N, *shape)``.

        Args:
            read: What to read.
            held: Values of some sites, ``(N, *site_shape)``.
            size: The number N of draws.
            place: The handler that puts the values into the sites; by default they are conditioned on.
            enumerate: True to run discrete latents at all of their values.
        """

        def once(values: Values, number: int | None) -> View:
            if number is not None:
                values = {n: with_room(self.single.nodes[n], v, self.nesting) for n, v in values.items()}
            trace = self._trace(place(self.call, data=values), number, enumerate)
            return View(trace, self.single, number, self.nesting)

        with pyro.validation_enabled(False):  # a draw of no density is for the caller to see
            return run(self.engine, once, read, held, size)

    def with_(self, **changes: Any) -> Program:
        """Return the program with other attributes: another ``engine``, or other ``rows`` of its subsampled plates."""
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    @property
    def marked(self) -> Callable[..., Any]:
        """The program with its discrete latents marked for Pyro's own enumeration."""
        if not self.enumerated:
            return self.call
        return poutine.infer_config(WithValues(self.enumerated)(self.call), self._mark)

    def whole(self) -> None:
        """Score all rows of the one plate that is subsampled, part by part, in place of a subsample."""
        ((plate, fn),) = self.subsamples.items()
        self._parts = list(parts_of(plate, self.rows[plate], fn.size))

    def _take(self, part: Part) -> Program:
        """The program on one part of the rows; its sum over discrete latents has the parts' scale."""
        rows = {**self.rows, part.plate: part.rows}
        other = self.with_(rows=rows, _parts=[], _part=part, _enumeration=self._sum_of_parts)
        if self.enumerated and self._sum_of_parts is None:
            self._sum_of_parts = other.enumeration
        return other

    @property
    def at_values(self) -> Program:
        """The program where discrete latents have values: by vmap, as a plate that fits sums need not fit values."""
        return self.with_(engine="vmap") if self.enumerated and self.engine != "loop" else self

    def alone(self, read: Read, size: int) -> Values:
        """Run the program one draw at a time, with nothing held, and read some tensors off: each ``(size, *shape)``."""
        return self.with_(engine="loop").run(read, {}, size)

    def sample(self, read: Read, held: Values, size: int, *, place: Place = poutine.condition) -> Values:
        """Run the program as :meth:`run` does, with sites that are drawn: one by one where vmap cannot draw."""
        if self.engine == "vmap" and not self._draws_alone:
            try:
                return self.run(read, held, size, place=place)
            except (RuntimeError, IndexError):  # some distributions of torch do not sample under vmap
                self._draws_alone = True
        program = self.with_(engine="loop") if self._draws_alone else self
        return program.run(read, held, size, place=place)

    def log_prob(self, held: Values, size: int) -> Tensor:
        """Return the log-density of N draws, ``(N,)`` in nats, with discrete latents summed out.

        Args:
            held: Values of all latents, but those that are summed out, ``(N, *site_shape)``.
            size: The number N of draws.
        """
        return self.score(held, size, [])[0]

    def score(self, held: Values, size: int, sites: list[str]) -> tuple[Tensor, Values]:
        """Return the log-density of N draws, as :meth:`log_prob` does, and the values of some sites at them.

        Where discrete latents are summed out no site can be read that follows from them.
        """
        if self._parts:
            scores = [self._take(part).score(held, size, sites) for part in self._parts]
            return torch.stack([log_prob for log_prob, _ in scores]).sum(0), scores[0][1]
        if self.enumerated:
            return self.enumeration.log_prob(self._at(held, size)), {}
        found = self.run(lambda view: {DENSITY: view.log_prob(), **{n: view.read(n) for n in sites}}, held, size)
        return found.pop(DENSITY), found

    def discrete(self, held: Values, size: int) -> Values:
        """Draw the discrete latents that are summed out, given N draws of the others: each ``(N, *site_shape)``."""
        if not self.enumerated:
            return {}
        return self.enumeration.sample(self._at(held, size))

    def _at(self, held: Values, size: int) -> Run:
        def run(read: Read, *, enumerate: bool = False, discrete: Values | None = None) -> Values:
            program = self.with_(rows={**self.rows, **discrete}) if discrete else self
            return program.run(read, held, size, enumerate=enumerate)

        return run

    @property
    def enumeration(self) -> Parallel | Sequential:
        """The sum over discrete latents, which one run shows: of all values at once, or of one after the other.

        Raises:
            ValueError: If the program runs at all values at once no more than at each.
        """
        if self._enumeration is None:
            for name in self.enumerated:
                check_rows(name, self.single)
            held = {name: site["value"] for name, site in self.single.nodes.items() if _is_latent(site)}
            values = {name: value for name, value in held.items() if name not in self.enumerated}
            with pyro.validation_enabled(False), torch.no_grad():
                plain = self._trace(poutine.condition(self.call, data=held), None, False) if self._part else self.single
                try:
                    self._enumeration = self._at_once(plain, values)
                except Exception as error:  # a user's program may raise anything
                    self._enumeration = self._one_by_one(plain, values, error)
        return self._enumeration

    def _at_once(self, plain: Trace, values: Values) -> Parallel:
        trace = self._trace(poutine.condition(self.call, data=values), None, True)
        found = Parallel(trace, {name: plain.nodes[name]["value"].shape for name in self.enumerated})
        terms = {n: v.unsqueeze(0) for n, v in found.read(View(trace, trace, None, self.nesting)).items()}
        ends = ({**values, **found.ends(last)} for last in (False, True))  # where .any() and .max() show
        for single in (plain, *(self._trace(poutine.condition(self.call, data=held), None, False) for held in ends)):
            found.check(terms, View(single, single, None, self.nesting))
        check_masks(plain, trace, list(values))
        self._summed = found.total(terms)
        return found

    def _one_by_one(self, plain: Trace, values: Values, error: Exception) -> Sequential:
        def trace(discrete: Values) -> Trace:
            return self._trace(poutine.condition(self.call, data={**values, **discrete}), None, False)

        try:
            found, alone = Sequential(plain, self.enumerated), self.with_(engine="loop")
            found.check(alone._at({n: v.unsqueeze(0) for n, v in values.items()}, 1), trace, list(values))
        except ValueError as more:
            names = ", ".join(map(repr, self.enumerated))
            raise ValueError(
                f"discrete latents {names} cannot be summed out: the model does not run at all of their values at once "
                f"({quoted(error)}), and {more}. Let it broadcast over dimensions to the left of its plates, as for "
                "Pyro's TraceEnum_ELBO: no .item() and no branches on discrete values."
            ) from error
        return found

    def _trace(self, program: Callable[..., Any], size: int | None, enumerate: bool) -> Trace:
        if self.rows:
            program = poutine.condition(program, data=self.rows)
        if self._part is not None:
            program = self._part(program)
        if size is not None:
            program = beside(program, size, self.nesting)
        if self.enumerated:
            program = WithValues(self.enumerated)(program)
        if enumerate:
            program = poutine.infer_config(program, self._mark)
            program = EnumMessenger(first_available_dim=-1 - self.nesting - (size is not None))(program)
        with poutine.block(expose_types=["param"]), apart():  # parameters are for those to see who train
            trace = trace_of(program, self.args, self.kwargs)
        return prune_subsample_sites(trace)

    def _mark(self, site: dict[str, Any]) -> dict[str, Any]:
        marks = {"enumerate": "parallel", "expand": False, "num_samples": None}
        return marks if site["name"] in self.enumerated else {}

    # The choice of an engine.

    @torch.no_grad()
    def settle(self, draw: Values, vectorize: str, role: str, also: Callable[[], str] = str) -> None:
        """Choose the first engine that does to draws, to that of the trace and another, what single runs do to each.

        Where discrete latents are summed out, and runs are dear, the one of the trace is compared, amid two others.

        Args:
            draw: The other, values ``(1, *site_shape)`` of all latents but those that are summed out.
            vectorize: ``"auto"``, or the one engine that is asked for.
            role: What the program is, for errors: ``"model"`` or ``"guide"``.
            also: A further look at what an engine does, which returns what is wrong in words.

        Raises:
            ValueError: If the engine that is asked for does something else.
        """
        self.engine = "loop"
        try:
            alone = self._traced(draw)
            if not self.enumerated:
                alone = _joined(alone, self._known(draw, 1))
        except (KeyError, NotImplementedError):  # some guides of Pyro cannot score a value that they did not draw
            alone = {}
        traced = self._values_of_trace(draw)
        held = _joined(draw, traced, draw) if self.enumerated else _joined(traced, draw)
        for engine in ENGINES if vectorize == "auto" else (vectorize,):
            self.engine = engine
            trial = self._try(alone, held, also)
            if not trial.fault:
                self.noise = trial.noise
                return
            if vectorize != "auto":
                raise ValueError(f"the {role}{trial.fault}. {WAY_OUT}") from trial.cause
            self.fault = self.fault or trial.fault

    def _values_of_trace(self, names: Iterable[str]) -> Values:
        return {name: value_of(self.single.nodes[name]).unsqueeze(0) for name in names}

    def _traced(self, names: Iterable[str]) -> Values:
        """Return what :meth:`_known` returns, for the values that the latents have in the trace."""
        if not self.enumerated:
            with pyro.validation_enabled(False):
                found = _terms(View(self.single.copy(), self.single, None, self.nesting))
            return {name: value.unsqueeze(0) for name, value in found.items()}
        if not self._parts and self.enumeration and self._summed is not None:
            return {DENSITY: self._summed}
        return self._known(self._values_of_trace(names), 1)

    def _known(self, held: Values, size: int) -> Values:
        """Return what is compared: the log-densities of draws, by site if none is summed out, and derived values."""
        return {DENSITY: self.log_prob(held, size)} if self.enumerated else self.run(_terms, held, size)

    def _try(self, alone: Values, held: Values, also: Callable[[], str]) -> Trial:
        if self.engine == "loop":
            return Trial("", self._noise(held, alone) if alone else Noise())
        try:
            size = 3 if self.enumerated else 2
            found, fault = self._known(held, size) if alone else self._drawn(), also()
            if self.enumerated:
                found = {name: value[1:2] for name, value in found.items()}
        except Exception as error:  # a user's program may raise anything
            return Trial(f" does not run vectorised over draws: {quoted(error)}", cause=error)
        values = {name: value for name, value in found.items() if name in alone and not name.startswith(SIZE)}
        differ = [n for n, value in values.items() if not _alike(value, alone[n], alone.get(f"{SIZE} {n}"))]
        if fault or not differ:
            return Trial(fault)
        noise = self._noise(held, alone)
        scored = [name for name in differ if name.startswith(DENSITY)]
        if scored and not noise.deviation:
            one, many = alone[scored[-1]], found[scored[-1]]
            row, where = int((one - many).abs().argmax()), scored[-1].removeprefix(f"{DENSITY} of ")
            where = "" if where == DENSITY else f" at site {where!r}"
            return Trial(
                f"'s log-density{where} is {float(one[row]):.4g} for one draw, but {float(many[row]):.4g} vectorised "
                "over draws"
            )
        # An estimate, as that of dequantised images, is another one each time.
        if any(((found[name] - alone[name]).abs() > 10 * noise.deviation).any() for name in differ):
            return Trial(f" means something else vectorised over draws, as at site {differ[-1].split()[-1]!r}")
        return Trial("", noise)

    def _drawn(self) -> Values:
        """New draws, whose densities cannot be compared."""
        return self.run(lambda view: {DENSITY: view.log_prob()}, {}, 2)

    def _noise(self, names: Iterable[str], known: Values) -> Noise:
        """Return the noise of the log-density at the trace's draw, run several times unless the second is the same."""
        draw = self._values_of_trace(names)
        found, alone = [{name: value[:1] for name, value in known.items()}], self.with_(engine="loop")
        for _ in range(REPEATS):
            found.append(alone._known(draw, 1))
            if torch.equal(found[1][DENSITY], found[0][DENSITY]):
                return Noise()
        prefix = f"{DENSITY} of "
        names = (DENSITY, *(name for name in found[0] if name.startswith(prefix)))
        noise = {name: float(torch.cat([run[name].double() for run in found]).std()) for name in names}
        site = max(names[1:], key=lambda name: noise[name], default="")
        return Noise(noise[DENSITY], site.removeprefix(prefix))


def _terms(view: View) -> Values:
    """Read off the log-density of each site and the size of its terms, those of all of them, and derived values."""
    view.check_structure()
    sites = {name: site for name, site in view.trace.nodes.items() if name in view.single.nodes and _is_sample(site)}
    found = {f"{DENSITY} of {name}": view.log_prob(name.__eq__) for name in sites}
    sizes = {f"{SIZE} {DENSITY} of {name}": view.total(site["log_prob"].abs()) for name, site in sites.items()}
    derived = {name: view.read(name) for name, site in sites.items() if is_deterministic(site)}
    total, size = (sum(parts.values(), torch.zeros(())) for parts in (found, sizes))
    return {DENSITY: total, f"{SIZE} {DENSITY}": size, **found, **sizes, **derived}


def _joined(*draws: Values) -> Values:
    return {name: torch.cat([values[name] for values in draws]) for name in draws[-1]}


def _alike(value: Tensor, other: Tensor, size: Tensor | None) -> bool:
    """True if numbers differ by round-off at most, which grows with the sizes of the terms that they are sums of."""
    if not value.is_floating_point():
        return torch.equal(value, other)
    rounding = 1e4 * torch.finfo(other.dtype).eps
    gap = (value - other).abs() <= rounding * (other.abs() if size is None else size) + rounding
    return bool((gap | ~(value.isfinite() | other.isfinite())).all())


def _is_sample(site: dict[str, Any]) -> bool:
    return bool(site["type"] == "sample")


def _is_latent(site: dict[str, Any]) -> bool:
    return _is_sample(site) and not site["is_observed"]
