"""Runs of a Pyro program with its arguments, for many draws at once by an engine, and the choice of the engine.

The engine is the first whose results for some draws are those of single runs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..threads import Threads
from ..time_limit import check_time
from ..user_code import place_now, warn_user
from .checks import quoted
from .discrete import Parallel, Sequential, sum_over
from .engines import DRAWS, NONE, Read, View, in_batches, is_refusal, run
from .log_density import part_size
from .plate_rows import MOST, RowShare, number_of_shares, shares_of
from .program import ENGINES, Args, Function, Kwargs, outside_plates, trace_of
from .sites import Site, Values, WithValues, is_deterministic, is_subsampled, value_of

LARGEST = 2**18  # numbers in a tensor of many draws, 2 MB of them in double precision
GIVEN = "_given"  # the mark of a plate whose rows the program chooses itself
TOTAL = "the log-density"  # the key of a program's log-density, next to the names of sites
WAY_OUT = (
    "Let the model broadcast to the left of its plates, for example with (x * w).sum(-1) in place of x @ w; give "
    "pf.Program(model, max_plate_nesting=...) if it has other dimensions to the left of its plates; or "
    "leave vectorize out."
)
WAYS = {"plate": "In a plate of draws", "vmap": "Under torch.func.vmap"}  # of running many draws, for warnings
DENSITY, SIZE = "log p of ", "size of "  # prefixes of a site's name; without a name, for all sites together
REPEATS = 9  # further runs at the same draw, if a density is an estimate
NOISY, USELESS = 0.1, 3.0  # nats above which weights show noise, and above which they show little else
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
        sizes: The numbers of all rows of these plates.
        shares: The parts of all rows whose log-densities are added up; empty to take a subsample for all rows.
    """

    def __init__(
        self,
        call: Function,
        args: Args,
        kwargs: Kwargs,
        single: Trace,
        nesting: int,
        enumerated: tuple[str, ...] = (),
        choose: Callable[[Runner], Choice] = lambda runner: Choice("loop"),
    ) -> None:
        self.call, self.args, self.kwargs = call, args, kwargs
        self.single, self.nesting, self.enumerated = prune_subsample_sites(single), nesting, enumerated
        plates = {name: site for name, site in single.nodes.items() if site_is_subsample(site)}
        self.given = [name for name, site in plates.items() if site["infer"].get(GIVEN)]
        drawn = {n: s for n, s in plates.items() if n not in self.given and len(s["value"]) < s["fn"].size}
        self.subsamples = {name: site["fn"] for name, site in drawn.items()}
        self.rows = {name: site["value"] for name, site in drawn.items()}
        self.sizes = {name: fn.size for name, fn in self.subsamples.items()}
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
    def fault(self) -> str:
        """The reason why the program does not run in a plate of draws, in words that follow its role."""
        return self.choice.faults.get("plate", f' runs by vectorize="{self.engine}"')

    def with_(self, **changes: Any) -> Runner:
        """Return a copy of the program with other attributes."""
        other = copy.copy(self)
        vars(other).update(changes)
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
            if number is not None:  # a site gets a dimension of 1 for each plate that it does not lie in
                nodes = {name: self.single.nodes[name] for name in values}
                room = {n: (1,) * (self.nesting - s["value"].dim() + s["fn"].event_dim) for n, s in nodes.items()}
                values = {name: value.reshape(number, *room[name], *value.shape[1:]) for name, value in values.items()}
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
        first = torch.arange(len(self.rows[plate]), device=self.rows[plate].device)
        places = first, first + self.sizes[plate] - len(first)
        one, other = (self.alone(lambda view: {n: view.read(n) for n in data}, 1, {plate: rows}) for rows in places)
        return not all(torch.allclose(one[name], other[name], 0.0, 0.0, equal_nan=True) for name in data)

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

    def sum_of_rows(self, read: Read, held: Values, size: int) -> Values:
        """Return log-densities that are read off a run, each summed over the shares of all rows."""
        if not self.shares:
            return self.run(read, held, size)
        found = [self.on_rows(share).run(read, share.taken(held, self.single.nodes), size) for share in self.shares]
        return {name: torch.stack([one[name] for one in found]).sum(0) for name in found[0]}

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
        free = self.enumerated if enumerate else ()
        held = {name: site["value"] for name, site in self.single.iter_stochastic_nodes() if name not in free}
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


class _Fault(Exception):
    """A difference between an engine and single runs, in words that follow "the model" or "the guide"."""


@torch.no_grad()
def choose(
    program: Runner, draw: Values, vectorize: str, role: str, also: Callable[[Runner], str] = lambda runner: ""
) -> Choice:
    """Return the engine of a program, with the noise of its log-density.

    Args:
        program: The program.
        draw: A second draw next to that of the trace: ``(1, *site_shape)`` for each latent that is not summed out.
        vectorize: ``"auto"``, or the one engine that is asked for.
        role: The role of the program in errors: ``"model"`` or ``"guide"``.
        also: A further check of the program by an engine, which returns a fault in words or an empty string.

    Raises:
        ValueError: If the results of the engine that is asked for differ from those of single runs.
    """
    alone, faults = _SingleRuns(program, draw), dict[str, str]()
    for engine in ENGINES if vectorize == "auto" else (vectorize,):
        if engine == "loop":
            break
        try:
            return Choice(engine, alone.compare(program.by(engine), also), 0.0, faults)
        except _Fault as fault:
            if vectorize != "auto":
                raise ValueError(f"the {role}{fault}. {WAY_OUT}") from fault.__cause__
            faults[engine] = str(fault)
    noise = alone.noise()  # it times its runs
    return Choice("loop", noise, alone.seconds, faults)


def why_alone(role: str, choice: Choice) -> str:
    """Return words for a program that runs one draw at a time, with the reason why each faster engine failed."""
    reasons = " ".join(f"{WAYS[engine]}, the {role}{fault}." for engine, fault in choice.faults.items())
    return f"the {role} runs one draw at a time. {reasons}"


class _SingleRuns:
    """Single runs of a program, at the draw of its trace and at a second one.

    If discrete latents are summed out, runs are expensive, and only the draw of the trace is scored alone.  An engine
    then runs it between two others, whose influence would show in it.
    """

    def __init__(self, program: Runner, draw: Values) -> None:
        self.traced = {name: value_of(program.single.nodes[name]).unsqueeze(0) for name in draw}
        self.program, self.seconds = program.by("loop"), 0.0
        if program.enumerated:
            self.held, self.size = _joined(draw, self.traced, draw), 3
            self.known = {DENSITY: program.enumeration.single_log_prob}  # found once, for all copies
            return
        self.held, self.size = _joined(self.traced, draw), 2
        try:
            self.known = _read(self.program, self.held, 2)
        except (KeyError, NotImplementedError):  # some guides of Pyro cannot score a value that they did not draw
            self.known = {}

    def compare(self, program: Runner, also: Callable[[Runner], str]) -> Noise:
        """Return the noise of the log-density, or raise _Fault if the program's engine differs from single runs."""
        try:
            # Draws of a guide that cannot score given values have other densities, so the run itself is the check.
            found = _read(program, self.held, self.size) if self.known else program.run(_terms, {}, 2, divides=False)
            fault = also(program)
        except Exception as error:  # a user's program may raise anything
            raise _Fault(f" does not run vectorised over draws: {quoted(error)}") from error
        if fault:
            raise _Fault(fault)
        if program.enumerated:
            found = {name: value[1:2] for name, value in found.items()}
        compared = [key for key in self.known if not key.startswith(SIZE)]
        differ = [k for k in compared if not _alike(found[k], self.known[k], self.known.get(k.replace(DENSITY, SIZE)))]
        if not differ:
            return Noise()
        scored = [key for key in differ if key.startswith(DENSITY)]
        line = _LineOf(scored[-1].removeprefix(DENSITY) if scored else "")
        noise = self.noise(line)
        if scored and not noise.deviation:
            one, many = self.known[scored[-1]], found[scored[-1]]
            row = int((one - many).abs().argmax())
            values = f"{float(one[row]):.4g} for one draw, but {float(many[row]):.4g} vectorised over draws"
            raise _Fault(f"'s log-density{line} is {values}")
        # An estimate, for example of dequantised images, differs from run to run.
        if any(((found[key] - self.known[key]).abs() > 10 * noise.deviation).any() for key in differ):
            site = differ[-1].removeprefix(DENSITY)
            raise _Fault(" means something else vectorised over draws" + (f", as at site {site!r}" if site else ""))
        return noise

    def noise(self, line: _LineOf | None = None) -> Noise:
        """Return the noise of the log-density at the draw of the trace: one run shows a density without noise."""
        program = self.program if line is None else self.program.with_(call=line(self.program.call))
        keys, runs = [key for key in self.known if key.startswith(DENSITY)], [self.known]
        if not keys:
            return Noise()
        for _ in range(REPEATS):
            start = time.perf_counter()
            runs.append(_read(program, self.traced, 1))
            self.seconds = time.perf_counter() - start
            if all(torch.equal(runs[1][key], runs[0][key][:1]) for key in keys):
                return Noise()
        found = {key: torch.cat([run[key][:1].double() for run in runs]) for key in keys}
        site = max(keys, key=lambda key: float(found[key].std()))
        return Noise(float(sum(found.values(), torch.zeros(())).std()), site.removeprefix(DENSITY))


class _LineOf(Messenger):
    """Finds the line of a site in the user's code; as a string, the words that say where a fault is."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site, self.place = site, ""

    def __str__(self) -> str:
        return (f" at site {self.site!r}" if self.site else "") + (f" ({self.place})" if self.place else "")

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] == self.site:
            self.place = place_now()


def _read(program: Runner, held: Values, size: int) -> Values:
    """Return the tensors to compare: log-densities of draws, by site if none is summed out, and derived values."""
    if program.enumerated:
        return {DENSITY: program.enumeration.log_prob(functools.partial(program.run, divides=False), held, size)}
    return program.run(_terms, held, size, divides=False)


def _terms(view: View) -> Values:
    """Read the log-density of each site, the size of its terms, and the derived values."""
    view.check_structure()
    nodes = view.trace.nodes
    sites = {name: nodes[name] for name, site in view.single.nodes.items() if site["type"] == "sample"}
    densities = {DENSITY + name: view.log_prob(name.__eq__) for name in sites}
    sizes = {SIZE + name: view.total(site["log_prob"].abs()) for name, site in sites.items()}
    derived = [name for name, site in view.single.nodes.items() if is_deterministic(site)]
    return {**densities, **sizes, **{name: view.read(name) for name in derived}}


def _joined(*draws: Values) -> Values:
    return {name: torch.cat([values[name] for values in draws]) for name in draws[0]}


def _alike(value: Tensor, other: Tensor, size: Tensor | None) -> bool:
    """True if numbers differ by round-off at most, which grows with the sizes of the terms in their sum."""
    if not value.is_floating_point():
        return torch.equal(value, other)
    rounding = 1e4 * torch.finfo(other.dtype).eps
    gap = (value - other).abs() <= rounding * (other.abs() if size is None else size) + rounding
    return bool((gap | ~(value.isfinite() | other.isfinite())).all())


def check_noise(noise: Noise, *, is_weighed: bool, warns: bool = True) -> None:
    """Warn of a model whose log-density is an estimate, or refuse to weigh draws by it if weights would be noise.

    Raises:
        ValueError: If draws are weighed, and the noise is above ``USELESS`` nats.
    """
    deviation, site = noise
    seen = f"with a standard deviation of {deviation:.2g} nats at one and the same draw"
    seen += f", most at site {site!r}" if site else ""
    more = "more draws to the estimate, as Dequantized(flow, num_samples=...) does"
    if is_weighed and not deviation <= USELESS:
        way = "Put networks with dropout into eval mode; draw noise once, outside of the model, or at a pyro.sample"
        fault = f"the model's log-density changes from run to run, {seen}: draws cannot be weighed by it"
        raise ValueError(f"{fault}. {way} site; give {more}.")
    if warns and deviation > NOISY:
        fault = f"the model's log-density is an estimate, {seen}: weights, k-hat and verdicts see that noise too"
        warn_user(f"{fault}. Give {more}, or fit flow, not Dequantized(flow), to x + noise drawn once.")
