"""Runs of a Pyro program with its arguments, for many draws at once by an engine: see ``engine_choice.py``."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..threads import Threads
from ..time_limit import check_time
from .engines import DRAWS, Read, Values, View, in_batches, run, with_room
from .enumeration import Parallel
from .finite_supports import WithValues
from .log_density import part_size
from .program import Args, Function, Kwargs
from .sequential_sum import Sequential, sum_over
from .traces import outside_plates, trace_of
from .vmap_rules import is_refusal
from .whole_plate import Part, parts_of

LARGEST = 2**18  # numbers in a tensor of many draws, 2 MB of them in double precision
GIVEN = "_given"  # the mark of a plate whose rows the program chooses itself
TOTAL = "the log-density"  # the key of a program's log-density, next to the names of sites
Names = tuple[str, ...]
Place = Function  # a handler that puts values into a program's sites: place(program, data=values)


class Noise(NamedTuple):
    """The noise of a log-density at one and the same draw.

    Attributes:
        deviation: Its standard deviation in nats: 0 unless the density is an estimate.
        site: The site where it is largest, or an empty string.
    """

    deviation: float = 0.0
    site: str = ""


class Runner:
    """Runs of a Pyro program, model or guide, with its arguments.

    Args:
        call: The program.
        args: Its arguments.
        kwargs: Its keyword arguments.
        single: The trace of one run.
        nesting: The number of dimensions that its plates take.
        enumerated: The discrete latents that are summed out of its density.

    Attributes:
        given: The plates whose rows the program chooses itself, ``pyro.plate(..., subsample=...)``.
        subsamples: The subsampled plates whose rows are drawn.
        rows: The rows of these plates by their names, the same in every run.
        engine: The way to run many draws: one of ``ENGINES``.
        noise: The noise of the log-density.
        is_settled: True once the engine is chosen.  If vmap refuses some draws later, they run one by one.
        seconds: The time of a run for one draw, 0 if it was not measured: it is for programs that run in a loop.
        faults: The reason why a faster engine does not run the program, in words, by the engine.
    """

    def __init__(
        self,
        call: Function,
        args: Args,
        kwargs: Kwargs,
        single: Trace,
        nesting: int,
        enumerated: Names = (),
    ) -> None:
        self.call, self.args, self.kwargs = call, args, kwargs
        self.single, self.nesting, self.enumerated = prune_subsample_sites(single), nesting, enumerated
        plates = {name: site for name, site in single.nodes.items() if site_is_subsample(site)}
        self.given = [name for name, site in plates.items() if site["infer"].get(GIVEN)]
        drawn = {n: s for n, s in plates.items() if n not in self.given and len(s["value"]) < s["fn"].size}
        self.subsamples = {name: site["fn"] for name, site in drawn.items()}
        self.rows = {name: site["value"] for name, site in drawn.items()}
        self.engine, self.noise, self.is_settled = "loop", Noise(), False
        self.seconds = 0.0
        self.faults: dict[str, str] = {}
        self._sum: Parallel | Sequential | None = None
        self._draws_alone = False
        self._parts: list[Part] = []
        self._is_part = False
        self._sum_of_parts: Parallel | Sequential | None = None
        self.threads, self._threads_without_gradient = Threads(), Threads()  # for a part of many draws

    def run(
        self, read: Read, held: Values, size: int, *, place: Place = poutine.condition, enumerate: bool = False
    ) -> Values:
        """Run the program for N draws and read some tensors, each ``(N, *shape)``.

        Args:
            read: The function that reads tensors off a run.
            held: Values of some sites, ``(N, *site_shape)``.
            size: The number N of draws.
            place: The handler that puts the values into the sites; by default they are conditioned on.
            enumerate: True to run discrete latents at all of their values.
        """

        check_time()

        def once(values: Values, number: int | None) -> View:
            if number is not None:
                values = {n: with_room(self.single.nodes[n], v, self.nesting) for n, v in values.items()}
            trace = self._trace(place(self.call, data=values), number, enumerate)
            return View(trace, self.single, number, self.nesting)

        with pyro.validation_enabled(False):  # a draw without a density has log-density -inf or NaN, and is no error
            try:
                return run(self.engine, once, read, held, size)
            except RuntimeError as error:
                if not (self.engine == "vmap" and self.is_settled and is_refusal(error)):
                    raise
        if size == 1:
            return self.with_(engine="loop").run(read, held, size, place=place, enumerate=enumerate)
        # Halving finds the few draws that are refused, for example where a distribution treats values near 0 apart.
        half = functools.partial(self.run, read, place=place, enumerate=enumerate)
        return in_batches(half, held, size, (size + 1) // 2)

    @property
    def fault(self) -> str:
        """The reason why the program does not run in a plate of draws, in words that follow its role."""
        return self.faults.get("plate", f' runs by vectorize="{self.engine}"')

    def with_(self, **changes: Any) -> Runner:
        """Return a copy of the program with other attributes, for example another ``engine``."""
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    def with_rows(self, rows: Values) -> Runner:
        """Return a copy of the program whose runs hold some subsampled plates at given rows, or sites at values."""
        return self.with_(rows={**self.rows, **rows})

    @property
    def marked(self) -> Function:
        """The program with its discrete latents marked for Pyro's own enumeration."""
        return WithValues(self.enumerated)(self.call) if self.enumerated else self.call

    def whole(self) -> None:
        """Score all rows of the subsampled plates, part by part, instead of a subsample.

        Values that are held must be those of all rows.
        """
        self._parts = parts_of(self)

    def score_part(self, part: Part, held: Values, size: int, sites: list[str] | None = None) -> Values:
        """Return the same as :meth:`score` for one part of all rows; values that are held are those of all rows."""
        return self.on_part(part).score(part.taken(held, self.single.nodes), size, sites)

    def on_part(self, part: Part) -> Runner:
        """Return the program on one part of the rows; all parts share one sum over discrete latents."""
        rows = {**self.rows, **part.rows}
        other = self.with_(call=part(self.call), rows=rows, _parts=[], _is_part=True, _sum=self._sum_of_parts)
        if self.enumerated:
            self._sum_of_parts = other.enumeration
        return other

    def alone(self, read: Read, size: int) -> Values:
        """Run the program one draw at a time, with nothing held, and read some tensors: each ``(size, *shape)``."""
        return self.with_(engine="loop").run(read, {}, size)

    def sample(self, read: Read, held: Values, size: int, *, place: Place = poutine.condition) -> Values:
        """Run the program as :meth:`run` does, and draw the other sites: one by one if vmap cannot draw."""
        if self.engine == "vmap" and not self._draws_alone:
            try:
                return self.with_(is_settled=False).run(read, held, size, place=place)
            except (RuntimeError, IndexError):  # some distributions of torch do not sample under vmap
                self._draws_alone = True
        program = self.with_(engine="loop") if self._draws_alone else self
        return program.run(read, held, size, place=place)

    def log_prob(self, held: Values, size: int) -> Tensor:
        """Return the log-density of N draws, ``(N,)`` in nats, with discrete latents summed out.

        Args:
            held: Values of all latents except those that are summed out, ``(N, *site_shape)``.
            size: The number N of draws.
        """
        return self.score(held, size)[TOTAL]

    @functools.cached_property
    def largest(self) -> int:
        """The size of the largest tensor in a run for one draw that depends on the draw; at least 1."""
        latents = {name: torch.as_tensor(site["value"]) for name, site in self.single.iter_stochastic_nodes()}
        held = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in latents.items()}
        largest, quiet = _Largest(), contextlib.suppress(Exception)  # it may not run where gradients are kept
        with torch.random.fork_rng([]), pyro.validation_enabled(False), torch.enable_grad(), quiet, largest:
            self._trace_at(held).compute_log_prob()
        return largest.size

    @property
    def chunk(self) -> int:
        """The number of draws at which the largest tensor that depends on them fits into the cache."""
        return LARGEST if self.engine == "loop" else max(1, LARGEST // self.largest)

    def score(self, held: Values, size: int, sites: list[str] | None = None) -> Values:
        """Return the log-density of N draws under the key ``TOTAL``, and the values of some sites at the draws.

        If discrete latents are summed out, no sites can be read, as they may depend on these latents.
        """
        if self._parts:
            scores = [self.score_part(part, held, size, sites) for part in self._parts]
            return {**scores[0], TOTAL: torch.stack([found[TOTAL] for found in scores]).sum(0)}
        if torch.is_grad_enabled() or 2 * size <= self.chunk:
            return self.score_at_once(held, size, sites)

        def step(part: Values, number: int) -> Values:
            with self._threads_without_gradient.turn(number):
                return self.score_at_once(part, number, sites)

        return in_batches(step, held, size, part_size(size, self.chunk))

    def score_at_once(self, held: Values, size: int, sites: list[str] | None = None) -> Values:
        """Return the same as :meth:`score`, from one run for all draws."""
        if self.enumerated:
            return {TOTAL: self.enumeration.log_prob(self, held, size)}
        return self.run(lambda view: {TOTAL: view.log_prob(), **{n: view.read(n) for n in sites or ()}}, held, size)

    def discrete(self, held: Values, size: int) -> Values:
        """Draw the discrete latents that are summed out, given N draws of the others: each ``(N, *site_shape)``."""
        return self.enumeration.sample(self, held, size)

    @property
    def enumeration(self) -> Parallel | Sequential:
        """The sum over discrete latents, found by a few runs.

        Raises:
            ValueError: If the program can be summed neither at all values at once nor one after the other.
        """
        if self._sum is None:
            with pyro.validation_enabled(False), torch.no_grad():
                single = self._trace_at({}) if self._is_part else self.single  # a part has other scales
                self._sum = sum_over(self._trace_at, single, self.enumerated, self.nesting)
        return self._sum

    def _trace_at(self, values: Values, *, enumerate: bool = False) -> Trace:
        """Return a trace at the latents of the first run, but with other values for some of them."""
        names = [name for name, _ in self.single.iter_stochastic_nodes() if not (enumerate and name in self.enumerated)]
        held = {name: self.single.nodes[name]["value"] for name in names}
        return self._trace(poutine.condition(self.call, data={**held, **values}), None, enumerate)

    def _trace(self, program: Function, size: int | None, enumerate: bool) -> Trace:
        if self.rows:
            program = poutine.condition(program, data=self.rows)
        with poutine.block(expose_types=["param"]), outside_plates():  # those who train see parameters
            if size is not None:
                program = pyro.plate(DRAWS, size, dim=-1 - self.nesting)(program)
            if self.enumerated:
                program = WithValues(self.enumerated, marked=enumerate)(program)
            if enumerate:
                program = EnumMessenger(first_available_dim=-1 - self.nesting - (size is not None))(program)
            return prune_subsample_sites(trace_of(program, self.args, self.kwargs))


class _Largest(TorchFunctionMode):
    """Observes the sizes of tensors in a run whose latents require gradients.

    Attributes:
        size: The number of elements of the largest tensor that depends on a latent; at least 1.  Elements that an
            expanded tensor repeats count once, because they take no memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, tuple) else (found,):
            if isinstance(part, Tensor) and part.requires_grad and part.layout == torch.strided:
                shape = zip(part.shape, part.stride(), strict=True)
                self.size = max(self.size, math.prod(length for length, stride in shape if stride))
        return found
