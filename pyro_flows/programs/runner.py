"""Runs of a Pyro program with its arguments, for many draws at once by an engine: see ``engine_choice.py``."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
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
from .engines import DRAWS, NONE, Read, Values, View, in_batches, run, with_room
from .enumeration import Parallel
from .finite_supports import WithValues
from .log_density import part_size
from .plate_nesting import is_subsampled
from .program import Args, Function, Kwargs
from .sequential_sum import Sequential, sum_over
from .traces import outside_plates, trace_of
from .vmap_rules import is_refusal
from .whole_plate import MOST, RowShare, number_of_shares, shares_of

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


class Choice(NamedTuple):
    """The engine of a program, and what its choice has shown.

    Attributes:
        engine: The way to run many draws: ``"plate"``, ``"vmap"`` or ``"loop"``.
        noise: The noise of the log-density.
        seconds: The time of a run for one draw, 0 if it was not measured: it is for programs that run in a loop.
        faults: The reason why a faster engine does not run the program, in words, by the engine.
    """

    engine: str
    noise: Noise = Noise()
    seconds: float = 0.0
    faults: Mapping[str, str] = MappingProxyType({})


class Runner:
    """Runs of a Pyro program, model or guide, with its arguments.

    Args:
        call: The program.
        args: Its arguments.
        kwargs: Its keyword arguments.
        single: The trace of one run.
        nesting: The number of dimensions that its plates take.
        enumerated: The discrete latents that are summed out of its density.
        choose: The choice of an engine, made when many draws are first run; one draw at a time by default.

    Attributes:
        given: The plates whose rows the program chooses itself, ``pyro.plate(..., subsample=...)``.
        subsamples: The subsampled plates whose rows are drawn.
        rows: The rows of these plates by their names, the same in every run.
        shares: The parts of all rows whose log-densities are added up; empty to take a subsample for all rows.
    """

    def __init__(
        self,
        call: Function,
        args: Args,
        kwargs: Kwargs,
        single: Trace,
        nesting: int,
        enumerated: Names = (),
        choose: Callable[[Runner], Choice] = lambda runner: Choice("loop"),
    ) -> None:
        self.call, self.args, self.kwargs = call, args, kwargs
        self.single, self.nesting, self.enumerated = prune_subsample_sites(single), nesting, enumerated
        plates = {name: site for name, site in single.nodes.items() if site_is_subsample(site)}
        self.given = [name for name, site in plates.items() if site["infer"].get(GIVEN)]
        drawn = {n: s for n, s in plates.items() if n not in self.given and len(s["value"]) < s["fn"].size}
        self.subsamples = {name: site["fn"] for name, site in drawn.items()}
        self.rows = {name: site["value"] for name, site in drawn.items()}
        self.shares: Sequence[RowShare] = ()
        self._scaled: Trace | None = self.single  # a run at the scales of the rows
        self._sum_of_shares: Parallel | Sequential | None = None
        self._choose = choose
        self._draws_alone = False  # True once vmap has failed to draw
        self.threads, self._threads_without_gradient = Threads(), Threads()  # for a part of many draws

    @functools.cached_property
    def choice(self) -> Choice:
        """The engine, chosen when it is first needed."""
        return self._choose(self)

    @property
    def engine(self) -> str:
        """The way to run many draws.  If vmap refuses some draws, they run one by one."""
        return self.choice.engine

    @property
    def sizes(self) -> dict[str, int]:
        """The number of all rows of each subsampled plate."""
        return {name: fn.size for name, fn in self.subsamples.items()}

    @property
    def fault(self) -> str:
        """The reason why the program does not run in a plate of draws, in words that follow its role."""
        return self.choice.faults.get("plate", f' runs by vectorize="{self.engine}"')

    def with_(self, **changes: Any) -> Runner:
        """Return a copy of the program with other attributes."""
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    def by(self, engine: str) -> Runner:
        """Return a copy of the program that runs by a given engine."""
        return self.with_(choice=Choice(engine))

    @property
    def marked(self) -> Function:
        """The program with its discrete latents marked for Pyro's own enumeration."""
        return WithValues(self.enumerated)(self.call) if self.enumerated else self.call

    def run(
        self,
        read: Read,
        held: Values,
        size: int,
        *,
        place: Place = poutine.condition,
        enumerate: bool = False,
        rows: Mapping[str, Tensor] = NONE,
        divides: bool = True,
    ) -> Values:
        """Run the program for N draws and read some tensors, each ``(N, *shape)``.

        Args:
            read: The function that reads tensors off a run.
            held: Values of some sites, ``(N, *site_shape)``.
            size: The number N of draws.
            place: The handler that puts the values into the sites; by default they are conditioned on.
            enumerate: True to run discrete latents at all of their values.
            rows: Rows of subsampled plates, or values of sites, that are the same in all draws.
            divides: True to run draws that vmap refuses one by one; False to raise an error.
        """
        check_time()

        def once(values: Values, number: int | None) -> View:
            if number is not None:
                values = {n: with_room(self.single.nodes[n], v, self.nesting) for n, v in values.items()}
            trace = self._trace(place(self.call, data=values), number, enumerate, rows)
            return View(trace, self.single, number, self.nesting)

        with pyro.validation_enabled(False):  # a draw without a density has log-density -inf or NaN, and is no error
            try:
                return run(self.engine, once, read, held, size)
            except RuntimeError as error:
                if not (divides and self.engine == "vmap" and is_refusal(error)):
                    raise
        program = self.by("loop") if size == 1 else self
        again = functools.partial(program.run, read, place=place, enumerate=enumerate, rows=rows)
        # Halving finds the few draws that are refused, for example where a distribution treats values near 0 apart.
        return in_batches(again, held, size, (size + 1) // 2)

    def alone(self, read: Read, size: int, rows: Mapping[str, Tensor] = NONE) -> Values:
        """Run the program one draw at a time, with nothing held, and read some tensors: each ``(size, *shape)``."""
        return self.by("loop").run(read, {}, size, rows=rows)

    def sample(self, read: Read, held: Values, size: int, *, place: Place = poutine.condition) -> Values:
        """Run the program as :meth:`run` does, and draw the other sites: one by one if vmap cannot draw."""
        if self.engine == "vmap" and not self._draws_alone:
            try:
                return self.run(read, held, size, place=place, divides=False)
            except (RuntimeError, IndexError):  # some distributions of torch do not sample under vmap
                self._draws_alone = True
        program = self.by("loop") if self._draws_alone else self
        return program.run(read, held, size, place=place)

    def all_rows(self, observed: Sequence[str]) -> list[RowShare]:
        """Return shares that hold all rows, if all subsampled plates draw their rows and take data by row; or none.

        Args:
            observed: The observed sites.
        """
        if not self.subsamples or (len(self.sizes) > 1 and number_of_shares(self.rows, self.sizes) > MOST):
            return []
        stacks = {name: site.get("cond_indep_stack", ()) for name, site in self.single.nodes.items()}
        plates = {name: {frame.name for frame in stack} & self.sizes.keys() for name, stack in stacks.items()}
        for frame in (frame for stack in stacks.values() for frame in stack):
            # A loop over rows has no dimension for them, and the rows of other subsampled plates are not drawn.
            if not frame.vectorized if frame.name in self.sizes else is_subsampled(frame):
                return []
        if any(plates[name] != self.sizes.keys() for name in self.enumerated):
            return []  # a sum over a latent outside of a plate does not fall into shares
        # A minibatch that the user gives has the same data at all indices.
        inside = {plate: [name for name in observed if plate in plates[name]] for plate in self.sizes}
        is_drawn = all(self._differs(plate, names) for plate, names in inside.items())
        return shares_of(self.rows, self.sizes) if is_drawn else []

    def _differs(self, plate: str, data: list[str]) -> bool:
        """True if data have other values at other rows of a plate."""
        size, found = len(self.rows[plate]), []
        for start in (0, self.sizes[plate] - size):
            rows = torch.arange(start, start + size, device=self.rows[plate].device)
            found.append(self.alone(lambda view: {name: view.read(name) for name in data}, 1, {plate: rows}))
        one, other = found
        return any(bool(((one[n] != other[n]) & ~(one[n].isnan() & other[n].isnan())).any()) for n in data)

    def on_rows(self, share: RowShare) -> Runner:
        """Return the program on a share of the rows; all shares have one sum over discrete latents."""
        other = self.with_(call=share(self.call), rows={**self.rows, **share.rows}, shares=(), _scaled=None)
        if self.enumerated:
            vars(other).pop("enumeration", None)  # it has other scales
            other.enumeration = self._sum_of_shares = self._sum_of_shares or other.enumeration
        return other

    def score_rows(self, share: RowShare, held: Values, size: int, sites: Sequence[str] = ()) -> Values:
        """Return the same as :meth:`score` for a share of all rows; values that are held are those of all rows."""
        return self.on_rows(share).score(share.taken(held, self.single.nodes), size, sites)

    def log_prob(self, held: Values, size: int) -> Tensor:
        """Return the log-density of N draws, ``(N,)`` in nats, with discrete latents summed out.

        Args:
            held: Values of all latents except those that are summed out, ``(N, *site_shape)``; with ``shares`` those of
                all rows.
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

    def score(self, held: Values, size: int, sites: Sequence[str] = ()) -> Values:
        """Return the log-density of N draws under the key ``TOTAL``, and the values of some sites at the draws.

        If discrete latents are summed out, no sites can be read, as they may depend on these latents.
        """
        if self.shares:
            scores = [self.score_rows(share, held, size, sites) for share in self.shares]
            return {**scores[0], TOTAL: torch.stack([found[TOTAL] for found in scores]).sum(0)}
        if torch.is_grad_enabled() or 2 * size <= self.chunk:
            return self.score_at_once(held, size, sites)

        def step(part: Values, number: int) -> Values:
            with self._threads_without_gradient.turn(number):
                return self.score_at_once(part, number, sites)

        return in_batches(step, held, size, part_size(size, self.chunk))

    def score_at_once(self, held: Values, size: int, sites: Sequence[str] = ()) -> Values:
        """Return the same as :meth:`score`, from one run for all draws."""
        if self.enumerated:
            return {TOTAL: self.enumeration.log_prob(self.run, held, size)}
        return self.run(lambda view: {TOTAL: view.log_prob(), **{n: view.read(n) for n in sites}}, held, size)

    def discrete(self, held: Values, size: int) -> Values:
        """Draw the discrete latents that are summed out, given N draws of the others: each ``(N, *site_shape)``."""
        return self.enumeration.sample(self.run, held, size)

    @functools.cached_property
    def enumeration(self) -> Parallel | Sequential:
        """The sum over discrete latents, found by a few runs.

        Raises:
            ValueError: If the program can be summed neither at all values at once nor one after the other.
        """
        with pyro.validation_enabled(False), torch.no_grad():
            return sum_over(self._trace_at, self._scaled or self._trace_at({}), self.enumerated, self.nesting)

    def _trace_at(self, values: Values, *, enumerate: bool = False) -> Trace:
        """Return a trace at the latents of the first run, but with other values for some of them."""
        names = [name for name, _ in self.single.iter_stochastic_nodes() if not (enumerate and name in self.enumerated)]
        held = {name: self.single.nodes[name]["value"] for name in names}
        return self._trace(poutine.condition(self.call, data={**held, **values}), None, enumerate)

    def _trace(self, program: Function, size: int | None, enumerate: bool, rows: Mapping[str, Tensor] = NONE) -> Trace:
        if self.rows or rows:
            program = poutine.condition(program, data={**self.rows, **rows})
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
