"""The choice of an engine: the first whose results for some draws are those of single runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..user_code import place_now, warn_user
from .engines import Site, Values, View, value_of
from .error_text import quoted
from .masks import is_deterministic
from .program import ENGINES
from .runner import Choice, Noise, Runner

WAY_OUT = (
    "Let the model broadcast to the left of its plates, for example with (x * w).sum(-1) in place of x @ w; give "
    "pf.Program(model, max_plate_nesting=...) if it has other dimensions to the left of its plates; or "
    "leave vectorize out."
)
WAYS = {"plate": "In a plate of draws", "vmap": "Under torch.func.vmap"}  # of running many draws, for warnings
DENSITY, SIZE = "log p of ", "size of "  # prefixes of a site's name; without a name, for all sites together
REPEATS = 9  # further runs at the same draw, if a density is an estimate
NOISY, USELESS = 0.1, 3.0  # nats above which weights show noise, and above which they show little else


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
            noise = alone.noise()  # it times its runs
            return Choice(engine, noise, alone.seconds, faults)
        try:
            return Choice(engine, alone.compare(program.by(engine), also), 0.0, faults)
        except _Fault as fault:
            if vectorize != "auto":
                raise ValueError(f"the {role}{fault}. {WAY_OUT}") from fault.__cause__
            faults[engine] = str(fault)
    raise AssertionError("every program runs in a loop")


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
            raise _Fault(
                f"'s log-density{line} is {float(one[row]):.4g} for one draw, but {float(many[row]):.4g} vectorised "
                "over draws"
            )
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
        return {DENSITY: program.enumeration.log_prob(partial(program.run, divides=False), held, size)}
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
        raise ValueError(
            f"the model's log-density changes from run to run, {seen}: draws cannot be weighed by it. Put networks "
            "with dropout into eval mode; draw noise once, outside of the model, or at a pyro.sample site; give "
            f"{more}."
        )
    if warns and deviation > NOISY:
        warn_user(
            f"the model's log-density is an estimate, {seen}: weights, k-hat and verdicts see that noise too. Give "
            f"{more}, or fit flow, not Dequantized(flow), to x + noise drawn once."
        )
