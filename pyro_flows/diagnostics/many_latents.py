"""The look at a guide of more than 1,000 latents.

Weights and short chains follow some quantities: all numbers of small sites, such as scales, those that scores suspect
(:mod:`.suspects`), and random ones.  Chains move along the widest and the narrowest directions of the posterior, each
with a twin that takes its noise away.  The mean square of each large site shows whether its numbers share a slow scale
(:class:`.Spreads`), and weights of single rows judge the rows of plates (:mod:`.row_weights`).

Small errors of many latents add up in the weights of all together, and in distances, so these are not judged.  There is
no search for missing mass.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..programs.density import Density, Drawn
from ..sampling.coordinates import White
from .drift import TOLERANCE, Drift, DriftMeter, Shape, ShapeMeter, SpreadMeter, Spreads, weighted_drift, weighted_shape
from .few_latents import FEW_LATENTS
from .guide_space import guide_density
from .importance import WEIGHING
from .measurements import Measurements, certainty, weighed
from .row_weights import row_weights
from .short_chains import SHORT_RUN, adapted
from .suspects import Suspects, suspects
from .unreached import unreached


@dataclass(frozen=True)
class ManyLatents:
    """Constants of a look at many latents.

    Attributes:
        small: The largest site all of whose numbers are followed.
        quantities: The quantities to follow, without suspects.
        numbers: The numbers in all chains together, about.
        chains: The fewest chains.
        held: The numbers of draws that are found at once.
        block: The sweeps between two tests of whether the chains have run for long enough; twins leave little noise.
    """

    small: int = 16
    quantities: int = 100
    numbers: int = 100_000
    chains: int = 32
    held: int = 20_000_000
    block: int = 5


MANY_LATENTS = ManyLatents()


def look(space: Density, num_samples: int | None, num_chains: int | None) -> Measurements:
    """Measure the errors of a guide of many latents.

    Args:
        space: The guide's space.
        num_samples: The number of weighted draws, or None.
        num_chains: The number of chains, or None.
    """
    numbers = max(space.dim, space.task.model.largest)  # in a draw, or in what the model computes from it
    at_once = max(1, min(FEW_LATENTS.at_once, MANY_LATENTS.held // numbers))
    usual = FEW_LATENTS.alone if space.task.runs_one_by_one else FEW_LATENTS.chains
    suspected = suspects(space, at_once)
    scope = _chosen(space, suspected)
    draws, psis = weighed(space, num_samples or WEIGHING.number(space.task, space.dim), at_once)
    weighted = weighted_drift(draws.quantities, psis.smoothed)
    began = space.draw(num_chains or min(usual, max(MANY_LATENTS.chains, MANY_LATENTS.numbers // numbers)))
    certain = certainty(psis, weighted)
    chains, directions, shape, spreads, acceptance = _followed(space, suspected, draws, began, certain)
    if psis.reliable and not space.read.angles:
        along = suspected.chart.inverse(draws.z) @ suspected.directions
        directions = directions.pooled_with(weighted_drift(along.detach(), psis.smoothed))
    shapes = shape, weighted_shape(draws.quantities, psis.smoothed)
    missing, rare = unreached(space.task), torch.zeros_like(weighted.error)
    measured = chains, directions, weighted, shapes, space.read.names
    return Measurements(psis, *measured, missing, rare, acceptance, spreads, scope, row_weights(space))


def _chosen(space: Density, suspected: Suspects) -> str:
    """Follow all quantities of small sites, suspects, and a random part of the others; return words for them."""
    sites, sizes = space.read.sites, Counter(space.read.sites)
    small = torch.tensor([sizes[site] <= MANY_LATENTS.small for site in sites])
    chosen = torch.rand(len(sites)).masked_fill(small, -1).argsort()[: max(MANY_LATENTS.quantities, int(small.sum()))]
    chosen = torch.cat((chosen, suspected.quantities.cpu()))
    space.read.keep(torch.zeros(len(sites), dtype=torch.bool).index_fill(0, chosen, True))
    kept = Counter(space.read.sites)
    whole = [f"all of {site!r}" for site, size in sizes.items() if kept[site] == size]
    parts = [f"{kept[site]} of the {size:,} numbers of {site!r}" for site, size in sizes.items() if kept[site] < size]
    seen = f"{', '.join([*whole, *parts])}, the most suspect and random ones"
    return f"Weights and chains looked at {seen}, and not for other modes."


@torch.no_grad()
def _followed(
    space: Density, suspected: Suspects, draws: Drawn, began: Drawn, certain: float
) -> tuple[Drift, Drift, Shape, Spreads, list[float]]:
    """Run chains with twins from draws of the guide until their drift is decided.

    Args:
        space: The guide's space.
        suspected: The directions to follow.
        draws: Draws of the guide.
        began: The draws that the chains start from.
        certain: The standard errors by which an error of the guide is certain.

    Returns:
        The errors of moments, those along directions, those of distribution functions, those of scales that latents
        share, and the acceptance.
    """
    chart, twin, runs = suspected.chart, guide_density(space, suspected.chart), space.task.budget(WEIGHING.seconds)
    start = began.z if twin is None else torch.cat((began.z, began.z))
    chains, _ = adapted(runs.counted(space.log_prob), [chart], start, twin)
    axes = suspected.directions[:, :0] if space.read.angles else suspected.directions  # periodic ones have no mean
    others, squares = Drawn(*(part[1::2] for part in draws)), _Squares(space, White(draws.z[::2]))
    meter = DriftMeter(draws.quantities, began.quantities)
    shape = ShapeMeter(others.quantities, began.quantities)
    compass = DriftMeter(*(chart.inverse(some.z) @ axes for some in (others, began)))
    spread = SpreadMeter(squares.names, *(squares(some.z) for some in (others, began)))
    size, calm = MANY_LATENTS.block if twin else FEW_LATENTS.block, certain > TOLERANCE.certain
    for block in range(SHORT_RUN.sweeps // size):
        for z in chains.sweeps(size, adapt=False):
            quantities = space.quantities(z)
            along = chart.inverse(z) @ axes
            for part, values in (meter, quantities), (shape, quantities), (compass, along), (spread, squares(z)):
                part.record(*values.split(len(began.z)))
        drift, wide = meter.drift(), spread.spreads()
        bent = compass.drift().unless_beyond(TOLERANCE.bent, compass.so_far())
        is_straight = bool((bent.errors + bent.noise < TOLERANCE.bent).all())
        is_right = drift.is_right(0.0 if calm else FEW_LATENTS.spare) and is_straight and bool(wide.are_clear.all())
        is_off = bool(drift.flagged(certain).any()) or bool(bent.beyond(TOLERANCE.bent).any())
        if is_right or (block > 0 and is_off) or runs.is_spent:
            break
    return drift, bent, shape.shape(), wide, chains.acceptance


class _Squares:
    """Function that returns the mean square of each large site's whitened coordinates, ``(N, D) -> (N, S)``.

    Args:
        space: The guide's space.
        white: Its whitened coordinates.

    Attributes:
        names: The names of the sites; none if some latents are angles.
    """

    def __init__(self, space: Density, white: White) -> None:
        sizes = Counter([] if space.read.angles else space.coordinates)
        self.names = [name for name, size in sizes.items() if size > MANY_LATENTS.small]
        own = [[name == site for site in space.coordinates] for name in self.names]
        self._share = torch.tensor(own).reshape(len(own), space.dim).to(white.loc)  # (S, D)
        self._share /= self._share.sum(-1, keepdim=True)
        self._white = white

    def __call__(self, z: Tensor) -> Tensor:
        return self._white.inverse(z).square() @ self._share.T if self.names else z[:, :0]
