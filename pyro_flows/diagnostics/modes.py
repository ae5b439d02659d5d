"""The search for posterior mass where a guide has none.

Weights and chains see only what lies where the guide draws, or next to it.  So climbs start far and wide, from draws of
the prior and from draws of the guide that are spread out; where one ends at a place of more density than the guide
allows for, a Gaussian is matched to the posterior around it.  Guide and Gaussians together then estimate the posterior,
each draw weighed against the mixture of all (Veach, Guibas 1995, Optimally combining sampling techniques for Monte
Carlo rendering): what it has where the guide has less than a twentieth of that is mass that the guide misses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..programs.log_density import LogDensity, or_nan, score_of
from ..programs.space import Scored, Space
from ..sampling.charts import White
from ..sampling.gaussian import match

STARTS = 64  # climbs, half of them from the prior
CLIMB = 60  # steps of a climb
SURPRISE = 3.0  # by how many nats the posterior must exceed the guide at a place where the guide has too little
DEEP = 3.0  # how many nats a latent, and three more, a place may lie below the guide's draws
LEAST = 4.0  # how many nats of evidence below the guide's a Gaussian may have to count
PLACES = 3  # how many places are looked at
LOST = 0.05  # the share of the posterior's mass that must not be missed
PROBES = 2000  # draws of a Gaussian


class Missing(NamedTuple):
    """What a search has found.

    Attributes:
        share: The share of the posterior's mass, as far as it was found, where the guide has too little.
        share_se: Its standard error.
        place: Where that mass lies, a vector ``(D,)``; None where nothing was found.
    """

    share: float
    share_se: float
    place: Tensor | None

    @property
    def is_grave(self) -> bool:
        """Whether it is there for sure, and too much to be missed."""
        return self.share > max(LOST, 3 * self.share_se)


def search(space: Space, chart: White, draws: Scored) -> Missing:
    """Look for mass that a guide misses.

    Args:
        space: The guide's space.
        chart: Coordinates in which the guide's draws have mean 0 and the identity as covariance.
        draws: Draws of the guide.
    """
    density, z = or_nan(space.log_p), draws.z
    evidence = _log_mean(draws.log_p - draws.log_q)
    factor = 2 * 4 ** torch.rand(len(z[:STARTS]), 1, dtype=z.dtype, device=z.device)
    starts, _ = chart.forward(factor * chart.inverse(z[:STARTS]))  # draws, moved outwards by factors from 2 to 8
    prior = space.prior(starts[: STARTS // 2])
    ends = _climb(density, chart, starts if prior is None else torch.cat((prior, starts[STARTS // 2 :])))
    with torch.no_grad():
        heights = density(ends)
        surprise = (heights - _log_q(space, ends) - evidence).nan_to_num(-math.inf, math.inf, -math.inf) > SURPRISE
        surprise &= heights > float(draws.log_p.mean()) - DEEP * (3 + space.dim)
    narrow = chart.scale_tril / 3
    found = [match(density, place, narrow, rounds=60) for place in _apart(chart, ends[surprise], heights[surprise])]
    best = sorted((g for g in found if g is not None and g.elbo > evidence - LEAST), key=lambda g: -g.elbo)
    if not best:
        return Missing(0.0, 0.0, None)
    laws = [MultivariateNormal(g.loc, scale_tril=g.scale_tril) for g in best]
    share, share_se = _missed(space, density, draws, laws)
    return Missing(share, share_se, best[0].loc)


def _climb(density: LogDensity, chart: White, z: Tensor) -> Tensor:
    """Steps uphill in a chart, each coordinate at its own pace: Adam, with a step size that falls."""
    x = chart.inverse(z)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, CLIMB + 1):
        score = score_of(lambda x: density(chart.forward(x)[0]), x).nan_to_num(0, 0, 0)
        first, second = 0.8 * first + 0.2 * score, 0.9 * second + 0.1 * score.square()
        ahead = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
        x = x + 0.5 * (1 - step / (CLIMB + 1)) * ahead
    return chart.forward(x)[0]


def _apart(chart: White, ends: Tensor, heights: Tensor) -> list[Tensor]:
    """The highest of places, the highest of those that lie apart from it, and so on."""
    x = chart.inverse(ends)
    found: list[int] = []
    for index in heights.argsort(descending=True).tolist():
        if len(found) < PLACES and all((x[index] - x[other]).norm() > 0.5 * x.shape[1] ** 0.5 for other in found):
            found.append(index)
    return [ends[index] for index in found]


@torch.no_grad()
def _missed(space: Space, density: LogDensity, draws: Scored, laws: list[MultivariateNormal]) -> tuple[float, float]:
    """The share of the posterior's mass where the guide has too little, and its standard error."""
    probes = [law.sample(torch.Size((PROBES,))) for law in laws]
    places = torch.cat((draws.z, *probes))
    log_p = torch.cat((draws.log_p, *map(density, probes)))
    log_q = torch.cat((draws.log_q, *(_log_q(space, probe) for probe in probes)))
    sizes = torch.tensor([len(draws.z), *map(len, probes)]) / len(places)
    log_laws = torch.stack([log_q, *(law.log_prob(places) for law in laws)])
    log_weights = log_p - torch.logsumexp(log_laws + sizes.log().to(log_laws).unsqueeze(-1), 0)
    evidence = _log_mean(log_weights)
    lacking = (log_p - log_q - evidence).nan_to_num(-math.inf, math.inf, -math.inf) > SURPRISE
    weights = (log_weights - evidence).nan_to_num(-math.inf, -math.inf, -math.inf).exp() / len(places)
    share = float(weights[lacking].sum())
    return share, float((weights * (lacking.to(weights) - share)).norm())


def _log_q(space: Space, z: Tensor) -> Tensor:
    """The guide's log-density; where it breaks down, far out, the guide has none."""
    return space.log_q(z).nan_to_num(-math.inf, math.inf, -math.inf)


def _log_mean(log_weights: Tensor) -> float:
    """The logarithm of the mean of weights; what is no number weighs nothing."""
    return float(log_weights.nan_to_num(-math.inf, -math.inf, -math.inf).logsumexp(0)) - math.log(len(log_weights))
