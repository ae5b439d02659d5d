"""The look at a guide of more than 1,000 latents.

Weights and short chains follow some quantities: all numbers of small sites, such as scales, those that scores suspect,
and random ones.  Chains move along the widest and the narrowest directions of the posterior, each with a twin that
takes its noise away.  The mean square of each large site shows whether its numbers share a slow scale
(:class:`.Spreads`), and weights of single rows judge the rows of plates (:mod:`.row_weights`).

Small errors of many latents add up in the weights of all together, and in distances, so these are not judged.  There is
no search for missing mass.

*Suspects.*  Random quantities miss a few that are wrong.  Scores at some draws see all D base coordinates x of the
guide at once.  Let g be the gradient of log p - log q.  By Stein's identity E[g] and E[x ∘ g] are 0 if the guide q is
the posterior p.  Otherwise they predict errors of means and of variances:

* The mean is off by H⁻¹ E[g], a Newton step with H the mean of -∇² log p.
* The variance of a coordinate is off by a factor of 1 / (1 - E[x ∘ g]), apart from correlations.

The method of Lanczos solves for the step in few products with H, and finds the directions in which the posterior is
widest and narrowest.  A chain crosses a wide direction slowly, and hardly moves any single latent meanwhile.

Predictions only say what to look at.  Chains then measure it.

Measuring Sample Quality with Stein's Method (Gorham, Mackey 2015, arXiv:1506.03039).
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..programs.density import Density
from ..sampling.coordinates import Coordinates, Stretched
from ..sampling.gaussian import lanczos
from ..vjp import score_of
from .drift import weighted_drift, weighted_shape
from .guide_space import guide_coordinates, guide_density
from .importance import WEIGHING
from .measurements import SHORT_RUN, Measurements, certainty, follow, weighed
from .row_weights import row_weights
from .unreached import unreached


@dataclass(frozen=True)
class ManyLatents:
    """Constants of a look at many latents.

    Attributes:
        small: The largest site all of whose numbers are followed.
        quantities: The quantities to follow, without suspects.
        numbers: The numbers in all chains together, about.
        chains: The fewest chains.
        draws: The draws at which scores are taken.
        curved: Those of them that products with H use.
        products: Products with H.
        shift: The distance between the scores of a product.
        extremes: Directions at each end of H.
        suspects: Quantities for their means, and for their standard deviations.
        widest: The largest predicted standard deviation, in units of x.
    """

    small: int = 16
    quantities: int = 100
    numbers: int = 100_000
    chains: int = 32
    draws: int = 64
    curved: int = 16
    products: int = 24
    shift: float = 0.5
    extremes: int = 2
    suspects: int = 16
    widest: float = 30.0


MANY_LATENTS = ManyLatents()


def look(space: Density, num_samples: int | None, num_chains: int | None) -> Measurements:
    """Measure the errors of a guide of many latents.

    Args:
        space: The guide's space.
        num_samples: The number of weighted draws, or None.
        num_chains: The number of chains, or None.
    """
    numbers = max(space.dim, space.task.model.largest)  # in a draw, or in what the model computes from it
    at_once = max(1, min(WEIGHING.batch, WEIGHING.held // numbers))
    chart, directions, suspected = suspects(space, at_once)
    scope = _chosen(space, suspected)
    draws, psis = weighed(space, num_samples or WEIGHING.number(space.task, space.dim), at_once)
    weighted = weighted_drift(draws.quantities, psis.smoothed)
    usual = SHORT_RUN.alone if space.task.runs_one_by_one else SHORT_RUN.chains
    began = space.draw(num_chains or min(usual, max(MANY_LATENTS.chains, MANY_LATENTS.numbers // numbers)))
    sizes = Counter([] if space.read.angles else space.coordinates)
    large = [name for name, size in sizes.items() if size > MANY_LATENTS.small]
    twin, certain = guide_density(space, chart), certainty(psis, weighted)
    chains, along, shape, acceptance, spreads = follow(
        space, [chart], draws, began, certain, lambda quantities, _: quantities, directions, large, twin
    )
    if psis.reliable and not space.read.angles:
        values = (chart.inverse(draws.z) @ directions).detach()
        along = along.pooled_with(weighted_drift(values, psis.smoothed))
    shapes = shape, weighted_shape(draws.quantities, psis.smoothed)
    missing, rare = unreached(space.task), torch.zeros_like(weighted.error)
    measured = psis, chains, along, weighted, shapes, space.read.names, missing, rare, acceptance
    return Measurements(*measured, spreads, scope, row_weights(space))


def _chosen(space: Density, suspected: Tensor) -> str:
    """Follow all quantities of small sites, suspects, and a random part of the others; return words for them."""
    sites, sizes = space.read.sites, Counter(space.read.sites)
    small = torch.tensor([sizes[site] <= MANY_LATENTS.small for site in sites])
    chosen = torch.rand(len(sites)).masked_fill(small, -1).argsort()[: max(MANY_LATENTS.quantities, int(small.sum()))]
    chosen = torch.cat((chosen, suspected.cpu()))
    space.read.keep(torch.zeros(len(sites), dtype=torch.bool).index_fill(0, chosen, True))
    kept = Counter(space.read.sites)
    whole = [f"all of {site!r}" for site, size in sizes.items() if kept[site] == size]
    parts = [f"{kept[site]} of the {size:,} numbers of {site!r}" for site, size in sizes.items() if kept[site] < size]
    seen = f"{', '.join([*whole, *parts])}, the most suspect and random ones"
    return f"Weights and chains looked at {seen}, and not for other modes."


@torch.no_grad()
def suspects(space: Density, at_once: int) -> tuple[Coordinates, Tensor, Tensor]:
    """Return what scores predict to be wrong.

    Args:
        space: The guide's space, with all of its quantities.
        at_once: The largest number of draws to run at once.

    Returns:
        The coordinates x of a D-vector z.  Directions of x, ``(D, A)``: the widest and the narrowest, and that of the
        predicted error of means.  The places of quantities among all, ``(B,)``.
    """
    z = space.vectors(MANY_LATENTS.draws, at_once)
    (chart, *_), _ = guide_coordinates(space, z)
    x, log_p = chart.inverse(z), space.log_prob

    def over(x: Tensor) -> Tensor:
        z, log_det = chart.forward(x)
        return log_p(z) + log_det

    def score(x: Tensor) -> Tensor:
        return torch.cat([score_of(over, part) for part in x.split(at_once)])

    log_q = guide_density(space, chart)
    own = score_of(lambda x: log_q(x, *chart.forward(x)), x) if log_q else -x  # as for a normal guide
    slope = score(x) - own  # g
    usable = slope.isfinite().all(-1)
    if usable.sum() < MANY_LATENTS.draws // 2:
        return chart, x[:0].T, torch.zeros(0, dtype=torch.long)
    z, x, slope, own = z[usable], x[usable], slope[usable], own[usable]
    some, there = x[: MANY_LATENTS.curved], (slope + own)[: MANY_LATENTS.curved]
    signs = MANY_LATENTS.shift * torch.tensor([1.0, -1.0]).to(x).repeat(MANY_LATENTS.curved)[: len(some), None]

    def product(vector: Tensor) -> Tensor:
        change = (there - score(some + signs * vector)) / signs
        return change[change.isfinite().all(-1)].mean(0)

    off, other = slope.mean(0), torch.randn_like(slope[0])  # without which latents that have no error would be missed
    start = off / off.norm().clamp_min(1e-30) + other / other.norm()
    basis, values = lanczos(product, start, MANY_LATENTS.products) or (x[:0].T, x[:0, 0])
    values = values.clamp_min(MANY_LATENTS.widest**-2)
    off = off - basis @ ((1 - 1 / values) * (basis.T @ off))
    ends = [*range(len(values))]
    chosen = sorted({*ends[: MANY_LATENTS.extremes], *ends[-MANY_LATENTS.extremes :]})
    stretched = Stretched(chart, basis, values.rsqrt())
    directions = torch.cat((basis[:, chosen], stretched.outwards(off[None]).T), -1)
    lengths = directions.norm(dim=0)
    wider = (1 - (x * slope).mean(0)).clamp(MANY_LATENTS.widest**-2, MANY_LATENTS.widest**2).rsqrt()
    moved = _moved_most(space, z, chart.forward(off + wider * x)[0], at_once)
    return stretched, (directions / lengths)[:, lengths > 0], moved


def _moved_most(space: Density, here: Tensor, there: Tensor, at_once: int) -> Tensor:
    """Return the places of the quantities whose mean or spread differs most between vectors z, ``(N, D)``."""
    before, after = (torch.cat([space.quantities(part) for part in z.split(at_once)]) for z in (here, there))
    spread = before.std(0)
    errors = (after - before).mean(0).abs() / spread, (after.std(0) / spread).log().abs()
    worst = [off.nan_to_num(0, 0, 0).topk(min(MANY_LATENTS.suspects, len(off))).indices for off in errors]
    return torch.cat(worst).unique()
