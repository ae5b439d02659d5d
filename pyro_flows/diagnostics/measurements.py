"""The measurements of a look at a guide's draws, before they are judged, and the parts that both looks share.

There are two looks.  With up to 1,000 latents (:mod:`.few_latents`) all quantities are followed, and there is a search
for mass that the guide misses.  With more (:mod:`.many_latents`) the most suspect quantities are followed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from ..programs.density import Density, Drawn
from ..sampling.chains import MOVES, Chains
from ..sampling.coordinates import Coordinates, GuideDensity, White
from .drift import TOLERANCE, Drift, DriftMeter, Shape, ShapeMeter, SpreadMeter, Spreads
from .importance import Psis, weigh
from .row_weights import RowWeights
from .unreached import Missing

CALM = 0.5  # k-hat below which weights that show no error count for more


@dataclass(frozen=True)
class ShortRun:
    """Constants of a run of short chains.

    Attributes:
        chains: The usual number of chains.
        alone: The chains of a model that runs one draw at a time.
        seconds: The time that these may take.
        adapt: The sweeps that adapt the step sizes.
        tries: The most such sweeps, if steps are far too long.
        sweeps: The most sweeps afterwards.
        block: The sweeps between two tests of whether the chains have run for long enough.
        spare: The standard errors by which an error must be right, unless weights and chains agree.
    """

    chains: int = 256
    alone: int = 16
    seconds: float = 20.0
    adapt: int = 4
    tries: int = 16
    sweeps: int = 50
    block: int = 5
    spare: float = 1.5


SHORT_RUN = ShortRun()


@dataclass(frozen=True)
class Measurements:
    """The measurements of a look at a guide's draws.  :class:`~pyro_flows.Check` describes the attributes."""

    psis: Psis
    chains: Drift
    directions: Drift
    weighted: Drift
    shapes: tuple[Shape, Shape]
    names: list[str]
    missing: Missing
    outliers: Tensor
    acceptance: list[float]
    spreads: Spreads | None = None
    scope: str = ""
    rows: tuple[RowWeights, ...] = ()

    @property
    def moments(self) -> Drift:
        """The errors shown by chains, pooled with those of the weights if these are reliable."""
        return self.chains.pooled_with(self.weighted) if self.psis.reliable else self.chains


def weighed(space: Density, number: int, at_once: int) -> tuple[Drawn, Psis]:
    """Return weighted draws of a guide, without the quantities that are constant or not finite.

    Args:
        space: The guide's space, which then leaves out these quantities.
        number: The number of draws.
        at_once: The number of draws that run at once.

    Raises:
        ValueError: If the guide is a point in some site.
    """
    draws = space.draw(number, at_once)
    psis = weigh(draws.log_p - draws.log_q, "check", space.task, lambda index: space.constrain(draws.z[index]))
    quantities = draws.quantities.double()
    varies = quantities.std(0) > 1e-6 * quantities.mean(0).abs().clamp_min(1e-12)
    for name in space.task.latents:
        if name not in compress(space.read.sites, varies.tolist()):
            raise ValueError(f"the guide's site {name!r} is a point: it has the same value in all draws.")
    used = varies & quantities.isfinite().all(0)
    space.read.keep(used)
    return draws._replace(quantities=draws.quantities[:, used]), psis


def certainty(psis: Psis, weighted: Drift) -> float:
    """Return the standard errors that chains must show: more of them if reliable weights show no error."""
    is_calm = (psis.khat < CALM or psis.even) and bool((weighted.errors + 2 * weighted.noise < TOLERANCE.sure).all())
    return TOLERANCE.certain + TOLERANCE.contrary * is_calm


@torch.no_grad()
def follow(
    space: Density,
    charts: Sequence[Coordinates],
    draws: Drawn,
    began: Drawn,
    certain: float,
    shaped: Callable[[Tensor, Tensor], Tensor],
    axes: Tensor | None = None,
    large: list[str] | None = None,
    twin: GuideDensity | None = None,
) -> tuple[Drift, Drift, Shape, list[float], Spreads | None]:
    """Run short chains from draws of a guide until their drift is decided.

    Args:
        space: The guide's space.
        charts: The coordinates of the chains; directions are those of the last.
        draws: Draws of the guide.
        began: The draws that the chains start from.
        certain: The standard errors by which an error of the guide is certain.
        shaped: Returns what has a distribution function, given quantities and z.
        axes: The directions to follow, ``(D, A)``; by default all coordinates, and the two in which the chains spread
            least and most while their steps adapt.
        large: The sites whose numbers may share a scale; then directions and spreads must be right too.
        twin: The guide's density, for a twin of each chain; None without twins.

    Returns:
        The errors of moments, those along directions, those of distribution functions, the acceptance, and the errors
        of scales that latents share.
    """
    budget, chart, start = space.task.budget(SHORT_RUN.seconds), charts[-1], (began.z, began.z) if twin else (began.z,)
    chains = Chains(budget.counted(space.log_prob), charts, torch.cat(start), twin=twin)
    places = list[Tensor]()
    for place in chains.sweeps(SHORT_RUN.tries, adapt=True):
        places.append(place)
        if budget.is_spent() or (len(places) >= SHORT_RUN.adapt and max(chains.acceptance) > MOVES.frozen):
            break
    axes = _axes(chart.inverse(torch.cat(places))) if axes is None else axes
    axes = axes[:, :0] if space.read.angles else axes  # because periodic coordinates have neither mean nor variance
    others, squares = Drawn(*(part[1::2] for part in draws)), _squares(space, draws, large or [])
    meter = DriftMeter(draws.quantities, began.quantities)
    shape = ShapeMeter(*(shaped(some.quantities, some.z) for some in (others, began)))
    compass = DriftMeter(*(chart.inverse(some.z) @ axes for some in (others, began)))
    spread = SpreadMeter(large or [], *(squares(some.z) for some in (others, began)))
    size, spare = SHORT_RUN.block, SHORT_RUN.spare * (certain <= TOLERANCE.certain)
    for block in range(SHORT_RUN.sweeps // size):
        for z in chains.sweeps(size, adapt=False):
            quantities = space.quantities(z)
            values = quantities, shaped(quantities, z), chart.inverse(z) @ axes, squares(z)
            for part, value in zip((meter, shape, compass, spread), values, strict=True):
                part.record(*value.split(len(began.z)))
            if budget.is_spent():
                break
        drift, wide = meter.drift(), spread.spreads()
        bent = compass.drift().unless_beyond(TOLERANCE.bent, compass.so_far())
        is_right, is_off = bool((drift.errors + spare * drift.noise < TOLERANCE.right).all()), drift.flagged(certain)
        if large is not None:
            is_right &= bool((bent.errors + bent.noise < TOLERANCE.bent).all()) and bool(wide.are_clear.all())
            is_off = torch.cat((is_off, bent.beyond(TOLERANCE.bent)), -1)
        if is_right or (block > 0 and bool(is_off.any())) or budget.is_spent():
            break
    return drift, bent, shape.shape(), chains.acceptance, None if large is None else wide


def _squares(space: Density, draws: Drawn, large: list[str]) -> Callable[[Tensor], Tensor]:
    """Return a function of z, ``(N, D) -> (N, S)``: the mean squares of the whitened coordinates of S sites."""
    if not large:
        return lambda z: z[:, :0]
    white = White(draws.z[::2])
    share = torch.tensor([[name == site for site in space.coordinates] for name in large]).to(white.loc)
    share /= share.sum(-1, keepdim=True)  # (S, D)
    return lambda z: white.inverse(z).square() @ share.T


def _axes(x: Tensor) -> Tensor:
    """Return all directions of whitened places ``(N, D)``, and the two in which they spread least and most."""
    covariance = torch.cov(x.T).reshape(x.shape[1], x.shape[1])
    extremes = torch.linalg.eigh(covariance).eigenvectors[:, [0, -1]]
    return torch.cat((torch.eye(len(covariance)).to(extremes), extremes), -1)
