"""The choice of an engine: the first that does to some draws what single runs do to each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from .engines import ENGINES, Values, View, is_deterministic, value_of
from .error_text import quoted
from .noisy_density import Noise
from .program import Program

WAY_OUT = (
    "Let the model broadcast to the left of its plates, with (x * w).sum(-1) in place of x @ w, say; give "
    "max_plate_nesting where it has dimensions of its own to the left of its plates; or leave vectorize out."
)
DENSITY, SIZE = "log p", "size of"  # what is read beside values of sites
REPEATS = 9  # runs more at one and the same draw, where a density is an estimate


@torch.no_grad()
def settle(program: Program, draw: Values, vectorize: str, role: str, also: Callable[[], str] = str) -> None:
    """Choose the engine of a program.

    Args:
        program: The program.
        draw: A draw beside that of the trace: ``(1, *site_shape)`` for each latent that is not summed out.
        vectorize: ``"auto"``, or the one engine that is asked for.
        role: The role of the program in errors: ``"model"`` or ``"guide"``.
        also: A further look at what the engine does, which returns what is wrong in words.

    Raises:
        ValueError: If the engine that is asked for does something else.
    """
    alone = _SingleRuns(program, draw)
    for engine in ENGINES if vectorize == "auto" else (vectorize,):
        program.engine = engine
        trial = alone.compare(program, also)
        if not trial.fault:
            program.noise = trial.noise
            return
        if vectorize != "auto":
            raise ValueError(f"the {role}{trial.fault}. {WAY_OUT}") from trial.cause
        program.fault = program.fault or trial.fault


class _Trial(NamedTuple):
    """Outcome of an engine: its fault in words, or an empty string, and the density's noise."""

    fault: str
    noise: Noise = Noise()
    cause: Exception | None = None


class _SingleRuns:
    """Single runs of a program, at the draw of its trace and at another.

    Where discrete latents are summed out, and runs are dear, only the draw of the trace is known.  An engine runs it
    between two others then, which would show in it.
    """

    def __init__(self, program: Program, draw: Values) -> None:
        self.traced = {name: value_of(program.single.nodes[name]).unsqueeze(0) for name in draw}
        program.engine = "loop"
        if program.enumerated:
            self.held, self.size = _joined(draw, self.traced, draw), 3
            self.known = {DENSITY: program.log_prob_of_trace(self.traced)}
        else:
            self.held, self.size = _joined(self.traced, draw), 2
            self.known = _both(program, draw)
        self.program = program.with_()

    def compare(self, program: Program, also: Callable[[], str]) -> _Trial:
        """Compare what a program does by its engine with single runs."""
        if program.engine == "loop":
            return _Trial("", self._noise())
        try:
            # New draws have other densities, which cannot be compared.
            found = _read(program, self.held, self.size) if self.known else program.run(_terms, {}, 2)
            if program.enumerated:
                found = {name: value[1:2] for name, value in found.items()}
            fault = also()
        except Exception as error:  # a user's program may raise anything
            return _Trial(f" does not run vectorised over draws: {quoted(error)}", cause=error)
        compared = [name for name in self.known if not name.startswith(SIZE)]
        differ = [n for n in compared if not _alike(found[n], self.known[n], self.known.get(f"{SIZE} {n}"))]
        if fault or not differ:
            return _Trial(fault)
        noise = self._noise()
        scored = [name for name in differ if name.startswith(DENSITY)]
        if scored and not noise.deviation:
            one, many = self.known[scored[-1]], found[scored[-1]]
            row, site = int((one - many).abs().argmax()), scored[-1].removeprefix(f"{DENSITY} of ")
            where = "" if site == DENSITY else f" at site {site!r}"
            return _Trial(
                f"'s log-density{where} is {float(one[row]):.4g} for one draw, but {float(many[row]):.4g} vectorised "
                "over draws"
            )
        # An estimate, as that of dequantised images, is another one each time.
        if any(((found[name] - self.known[name]).abs() > 10 * noise.deviation).any() for name in differ):
            return _Trial(f" means something else vectorised over draws, as at site {differ[-1].split()[-1]!r}")
        return _Trial("", noise)

    def _noise(self) -> Noise:
        """Return the noise of the log-density at the draw of the trace: runs are many unless the second is the same."""
        if not self.known:
            return Noise()
        found = [{name: value[:1] for name, value in self.known.items()}]
        for _ in range(REPEATS):
            found.append(_read(self.program, self.traced, 1))
            if torch.equal(found[1][DENSITY], found[0][DENSITY]):
                return Noise()
        prefix = f"{DENSITY} of "
        names = [DENSITY, *(name for name in found[0] if name.startswith(prefix))]
        noise = {name: float(torch.cat([run[name].double() for run in found]).std()) for name in names}
        site = max(names[1:], key=noise.__getitem__, default="")
        return Noise(noise[DENSITY], site.removeprefix(prefix))


def _both(program: Program, draw: Values) -> Values:
    """Return what is compared of the draw of the trace and another, or nothing where a guide cannot tell it."""
    try:
        with pyro.validation_enabled(False):
            first = _terms(View(program.single.copy(), program.single, None, program.nesting))
        return _joined({name: value.unsqueeze(0) for name, value in first.items()}, _read(program, draw, 1))
    except (KeyError, NotImplementedError):  # some guides of Pyro cannot score a value that they did not draw
        return {}


def _read(program: Program, held: Values, size: int) -> Values:
    """Return what is compared: log-densities of draws, by site if none is summed out, and derived values."""
    if program.enumerated:
        return {DENSITY: program.score_at_once(held, size, [])[0]}
    return program.run(_terms, held, size)


def _terms(view: View) -> Values:
    """Read off the log-density of each site and the size of its terms, those of all of them, and derived values."""
    view.check_structure()
    nodes = view.trace.nodes
    sites = {name: nodes[name] for name, site in view.single.nodes.items() if site["type"] == "sample"}
    found = {f"{DENSITY} of {name}": view.log_prob(name.__eq__) for name in sites}
    sizes = {f"{SIZE} {DENSITY} of {name}": view.total(site["log_prob"].abs()) for name, site in sites.items()}
    derived = {name: view.read(name) for name, site in sites.items() if is_deterministic(site)}
    total, size = (sum(parts.values(), torch.zeros(())) for parts in (found, sizes))
    return {DENSITY: total, f"{SIZE} {DENSITY}": size, **found, **sizes, **derived}


def _joined(*draws: Values) -> Values:
    return {name: torch.cat([values[name] for values in draws]) for name in draws[0]}


def _alike(value: Tensor, other: Tensor, size: Tensor | None) -> bool:
    """True if numbers differ by round-off at most, which grows with the sizes of the terms that they are sums of."""
    if not value.is_floating_point():
        return torch.equal(value, other)
    rounding = 1e4 * torch.finfo(other.dtype).eps
    gap = (value - other).abs() <= rounding * (other.abs() if size is None else size) + rounding
    return bool((gap | ~(value.isfinite() | other.isfinite())).all())
