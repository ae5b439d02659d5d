"""Quantities and directions in which a guide of many latents is most likely wrong, told by scores.

A check of many latents cannot follow all of them, and random ones miss a few that are wrong.  Scores at some draws see
all D base coordinates x of the guide at once.  Let g be the gradient of log p - log q.  By Stein's identity E[g] and
E[x ∘ g] are 0 if the guide q is the posterior p.  Otherwise they predict errors of means and of variances:

* The mean is off by H⁻¹ E[g], a Newton step with H the mean of -∇² log p.
* The variance of a coordinate is off by a factor of 1 / (1 - E[x ∘ g]), apart from correlations.

The method of Lanczos solves for the step in few products with H, and finds the directions in which the posterior is
widest and narrowest.  A chain crosses a wide direction slowly, and hardly moves any single latent meanwhile.

Predictions only say what to look at.  Chains then measure it.

Measuring Sample Quality with Stein's Method (Gorham, Mackey 2015, arXiv:1506.03039).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..programs.density import Density
from ..sampling.coordinates import Coordinates, Stretched
from ..sampling.low_rank_gaussian import lanczos
from ..vjp import LogDensity, score_of
from .guide_space import guide_coordinates, guide_density


@dataclass(frozen=True)
class Suspicion:
    """Constants of the predictions.

    Attributes:
        draws: The draws at which scores are taken.
        curved: Those of them that products with H use.
        products: Products with H.
        shift: The distance between the scores of a product.
        extremes: Directions at each end of H.
        quantities: Quantities for their means, and for their standard deviations.
        widest: The largest predicted standard deviation, in units of x.
    """

    draws: int = 64
    curved: int = 16
    products: int = 24
    shift: float = 0.5
    extremes: int = 2
    quantities: int = 16
    widest: float = 30.0


SUSPICION = Suspicion()


class Suspects(NamedTuple):
    """Quantities and directions to look at.

    Attributes:
        chart: The coordinates x of a D-vector z.
        directions: Directions of x, ``(D, A)``: the widest and the narrowest, and that of the predicted error of means.
        quantities: The places of quantities among all, ``(B,)``.
    """

    chart: Coordinates
    directions: Tensor
    quantities: Tensor


@torch.no_grad()
def suspects(space: Density, at_once: int) -> Suspects:
    """Return what scores predict to be wrong.

    Args:
        space: The guide's space, with all of its quantities.
        at_once: The largest number of draws to run at once.
    """
    z = space.vectors(SUSPICION.draws, at_once)
    (chart, *_), _ = guide_coordinates(space, z)
    x = chart.inverse(z)
    score, log_q = _score(space, chart, at_once), guide_density(space, chart)
    own = score_of(lambda x: log_q(x, *chart.forward(x)), x) if log_q else -x  # as for a normal guide
    slope = score(x) - own  # g
    usable = slope.isfinite().all(-1)
    if usable.sum() < SUSPICION.draws // 2:
        return Suspects(chart, x[:0].T, torch.zeros(0, dtype=torch.long))
    z, x, slope, own = z[usable], x[usable], slope[usable], own[usable]
    some, there = x[: SUSPICION.curved], (slope + own)[: SUSPICION.curved]
    signs = SUSPICION.shift * torch.tensor([1.0, -1.0]).to(x).repeat(SUSPICION.curved)[: len(some), None]

    def product(vector: Tensor) -> Tensor:
        change = (there - score(some + signs * vector)) / signs
        return change[change.isfinite().all(-1)].mean(0)

    off, other = slope.mean(0), torch.randn_like(slope[0])  # without which latents that have no error would be missed
    start = off / off.norm().clamp_min(1e-30) + other / other.norm()
    basis, values = lanczos(product, start, SUSPICION.products) or (x[:0].T, x[:0, 0])
    values = values.clamp_min(SUSPICION.widest**-2)
    off = off - basis @ ((1 - 1 / values) * (basis.T @ off))
    ends = [*range(len(values))]
    chosen = sorted({*ends[: SUSPICION.extremes], *ends[-SUSPICION.extremes :]})
    stretched = Stretched(chart, basis, values.rsqrt())
    directions = torch.cat((basis[:, chosen], stretched.outwards(off[None]).T), -1)
    lengths = directions.norm(dim=0)
    directions = (directions / lengths)[:, lengths > 0]
    wider = (1 - (x * slope).mean(0)).clamp(SUSPICION.widest**-2, SUSPICION.widest**2).rsqrt()
    quantities = _moved_most(space, z, chart.forward(off + wider * x)[0], at_once)
    return Suspects(stretched, directions, quantities)


def _score(space: Density, chart: Coordinates, at_once: int) -> LogDensity:
    """Return the posterior's score over the coordinates, ``(N, D) -> (N, D)``."""
    log_p = space.log_prob

    def over(x: Tensor) -> Tensor:
        z, log_det = chart.forward(x)
        return log_p(z) + log_det

    return lambda x: torch.cat([score_of(over, part) for part in x.split(at_once)])


def _moved_most(space: Density, here: Tensor, there: Tensor, at_once: int) -> Tensor:
    """Return the places of the quantities whose mean or spread differs most between vectors z, ``(N, D)``."""
    before, after = (torch.cat([space.quantities(part) for part in z.split(at_once)]) for z in (here, there))
    spread = before.std(0)
    of_mean = (after - before).mean(0).abs() / spread
    of_spread = (after.std(0) / spread).log().abs()
    worst = [off.nan_to_num(0, 0, 0).topk(min(SUSPICION.quantities, len(off))).indices for off in (of_mean, of_spread)]
    return torch.cat(worst).unique()
