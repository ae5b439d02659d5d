"""A Pyro program with its arguments, run for many draws at once by an engine: see ``engine_choice.py``."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from ..threads import Threads
from .engines import Read, Values, View, apart, beside, run, value_of, with_room
from .enumeration import Parallel, Run, check_masks, check_rows
from .error_text import quoted
from .events import WithValues
from .largest import Largest
from .log_density import number_of_parts
from .noisy_density import Noise
from .one_by_one import Sequential
from .row_parts import Part, parts_of
from .traces import trace_of

LARGEST = 2**18  # numbers in a tensor of many draws, 2 MB of them in double precision
TOTAL = "the log-density"  # read beside values of sites
Place = Callable[..., Any]  # a handler that puts values into a program's sites: place(program, data=values)


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
        self.threads, self._threads_without_gradient = Threads(), Threads()  # for a part of many draws

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

    @functools.cached_property
    def chunk(self) -> int:
        """The number of draws at which the largest tensor that depends on them fits into the cache."""
        if self.engine == "loop":
            return LARGEST
        latents = {name: value_of(site) for name, site in self.single.nodes.items() if _is_latent(site)}
        held = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in latents.items()}
        largest, quiet = Largest(), contextlib.suppress(Exception)  # it may not run where gradients are kept
        with torch.random.fork_rng([]), pyro.validation_enabled(False), torch.enable_grad(), quiet, largest:
            self._trace(poutine.condition(self.call, data=held), None, False).compute_log_prob()
        return max(1, LARGEST // largest.size)

    def score(self, held: Values, size: int, sites: list[str]) -> tuple[Tensor, Values]:
        """Return the log-density of N draws, as :meth:`log_prob` does, and the values of some sites at them.

        Where discrete latents are summed out no site can be read that follows from them.
        """
        if self._parts:
            scores = [self._take(part).score(held, size, sites) for part in self._parts]
            return torch.stack([log_prob for log_prob, _ in scores]).sum(0), scores[0][1]
        if torch.is_grad_enabled() or 2 * size <= self.chunk:
            return self.score_at_once(held, size, sites)
        parts = []
        for part, number in _split(held, number_of_parts(size, self.chunk)):
            with self._threads_without_gradient.turn(number):
                parts.append(self.score_at_once(part, number, sites))
        values = {name: torch.cat([part[name] for _, part in parts]) for name in parts[0][1]}
        return torch.cat([log_prob for log_prob, _ in parts]), values

    def score_at_once(self, held: Values, size: int, sites: list[str]) -> tuple[Tensor, Values]:
        """Return what :meth:`score` does, of all draws in one run."""
        if self.enumerated:
            return self.enumeration.log_prob(self._at(held, size)), {}
        found = self.run(lambda view: {TOTAL: view.log_prob(), **{n: view.read(n) for n in sites}}, held, size)
        return found.pop(TOTAL), found

    def log_prob_of_trace(self, held: Values) -> Tensor:
        """Return the log-density of the trace's latents ``held``, ``(1,)``, where a sum has shown it without a run."""
        if not self._parts and self.enumeration and self._summed is not None:
            return self._summed
        return self.log_prob(held, 1)

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


def _split(held: Values, number: int) -> Iterator[tuple[Values, int]]:
    """Yield values of some draws at a time, in a number of parts, and how many they are."""
    for part in zip(*(value.tensor_split(number) for value in held.values()), strict=True):
        yield dict(zip(held, part, strict=True)), len(part[0])


def _is_latent(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"]
