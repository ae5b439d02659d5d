"""The search for posterior mass where a guide has none.

Weights and chains see only what lies where the guide draws, or next to it.  So a population is annealed from the prior
to the posterior, and climbs start from far around the guide.  Where they end at places of more density than the guide
allows for, a law is fitted around each mode.  Guide and laws together then estimate the posterior, each draw weighed
against the mixture of all (Veach, Guibas 1995, Optimally combining sampling techniques for Monte Carlo rendering): what
it has where the guide has less than a twentieth of that is mass that the guide misses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Chi2

from ..guides import AutoFlow
from ..programs.latent_space import LatentSpace, Scored
from ..programs.log_density import LogDensity, or_nan
from ..programs.task import Task
from ..sampling.coordinates import White
from ..sampling.gaussian import match_top
from ..sampling.modes import ascend, climb, components, far, ways_up
from ..sampling.population import Effort, anneal
from ..sampling.start_distribution import Reference
from .drift import Drift

PARTICLES, FEW = 256, 64  # of a population, and where the model runs one draw at a time
STARTS = 64  # climbs
EFFORT = Effort(kept=0.3, forgotten=0.5, moves=(1, 4), max_steps=6, gradients=150)
SURPRISE = 3.0  # by how many nats the posterior must exceed the guide at a place where the guide has too little
FAINT = 20.0  # by how many nats per coordinate a mode may be lower, and be the wider by that
LEAST = 8.0  # how many nats of evidence below the guide's a Gaussian that was matched may have to count
MOST = 32  # modes that laws are fitted to
MATCHED = 3  # of these, how many that most places belong to Gaussians are matched to, and how many of the highest
ENOUGH = 4  # particles a dimension, to fit a law to them
TRIED = 200  # draws of the prior that tell whether a guide's support is smaller
PROBES = 4000  # draws of all laws
DF = 5.0  # degrees of freedom of the laws


class Missing(NamedTuple):
    """The mass that a search has found where a guide has too little.

    Attributes:
        share: The share of the posterior's mass, as far as it was found, where the guide has too little.
        share_se: Its standard error.
        place: Where it is densest, a vector ``(D,)``; None where nothing was found.
        error: What the mass that was found does to the guide's moments: an error of each of K quantities, or None.
        is_blind: Whether hardly a draw of the prior has a density, so that modes elsewhere could not be looked for.
    """

    share: float
    share_se: float
    place: Tensor | None = None
    error: Drift | None = None
    is_blind: bool = False


def search(space: LatentSpace, white: White, draws: Scored, judged: Tensor) -> Missing:
    """Look for mass that a guide misses.

    Args:
        space: The guide's space.
        white: Coordinates in which the guide's draws have mean 0 and the identity as covariance.
        draws: Draws of the guide.
        judged: The quantities that are looked at, ``(K,)``.
    """
    if (outside := _outside(space)) is not None:
        return outside
    density = or_nan(space.log_p)
    evidence = log_mean(draws.log_p - draws.log_q)
    lacking, is_blind = _lacking(space, white, density, draws, evidence)
    laws = _laws(density, lacking, white, evidence) if len(lacking) else []
    found = _missed(space, density, draws, laws, judged) if laws else Missing(0.0, 0.0)
    return found._replace(is_blind=is_blind)


def _outside(space: LatentSpace) -> Missing | None:
    """The mass where a guide cannot draw that has a support of its own, smaller than the model's; None if it has not.

    In its own coordinates nothing outside is seen, so the population is annealed in those of an ``AutoFlow``.
    """
    model = space.task.model
    own = [name for name in space.task.latents if name in space.task.own]
    if all(len({repr(p.single.nodes[n]["fn"].support) for p in (model, space.task.guide)}) == 1 for n in own):
        return None
    try:
        guide = AutoFlow(model.call).setup(*model.args, **model.kwargs)
    except ValueError:  # models that it refuses, for want of a density at the start above all
        return None
    other = LatentSpace(Task(model.call, guide, model.args, model.kwargs, model.engine))
    drawn = other.prior(guide.start[0].expand(TRIED, -1))
    if drawn is None or not bool(space.outside(other.values(drawn)).any()):
        return None
    number, effort = FEW if space.task.runs_one_by_one else PARTICLES, EFFORT._replace(gradients=10 * EFFORT.gradients)
    population = anneal(Reference(other, guide.start[0]), number, effort)
    if population is None or not population.has_arrived:
        return None
    outside = space.outside(other.values(population.z))
    return Missing(*population.share(outside)) if bool(outside.any()) else None


def _lacking(
    space: LatentSpace, white: White, density: LogDensity, draws: Scored, evidence: float
) -> tuple[Tensor, bool]:
    """Places where the guide has too little, ``(n, D)``, of a population and of climbs; also whether that was blind."""
    alone = space.task.runs_one_by_one
    reference = Reference(space, white.loc, white.scale_tril)
    population = anneal(reference, FEW if alone else PARTICLES, EFFORT)
    number = STARTS // (8 if alone else 2)
    drawn = reference.draw(FEW if alone else PARTICLES)
    # Climbs that end on their way lie where the density, next to none, still exceeds that of the guide.
    faint = float(draws.log_p.max()) - FAINT * (1 + space.dim)
    beyond = white.forward(far(white.inverse(draws.z[:number])))[0]
    starts = torch.cat((beyond, ways_up(density, drawn, faint)))
    found = []
    if population is not None and population.has_arrived:
        found = [population.z]
    elif population is not None:  # its particles are where the posterior is none yet
        starts = torch.cat((starts, population.z))
    ends = climb(density, white, starts, least=faint)
    places = space.wrapped(torch.cat([*found, ends]), white.loc)
    with torch.no_grad():
        heights = density(places)
    surprise = (heights - log_q(space, places) - evidence).nan_to_num(-math.inf, math.inf, -math.inf)
    return places[(surprise > SURPRISE) & (heights > faint)], population is None


class MultivariateT(NamedTuple):
    """Multivariate Student's t distribution of ``DF`` degrees of freedom over vectors ``(D,)``.

    ``MultivariateStudentT`` of Pyro solves one linear system per vector, and imports sympy.
    """

    loc: Tensor
    scale_tril: Tensor

    def sample(self, number: int) -> Tensor:
        """Sample vectors, ``(number, D)``."""
        normal = torch.randn(number, len(self.loc)).to(self.loc) @ self.scale_tril.T
        return self.loc + normal / (Chi2(DF).sample((number, 1)).to(self.loc) / DF).sqrt()

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density over vectors, ``(N, D) -> (N,)``."""
        dim, log_det = len(self.loc), self.scale_tril.diagonal().log().sum()
        size = torch.linalg.solve_triangular(self.scale_tril, (z - self.loc).T, upper=False).square().sum(0)
        scale = math.lgamma((DF + dim) / 2) - math.lgamma(DF / 2) - dim / 2 * math.log(DF * math.pi)
        return scale - log_det - (DF + dim) / 2 * (size / DF).log1p()


def _laws(density: LogDensity, places: Tensor, white: White, evidence: float) -> list[MultivariateT]:
    """A law around each of the modes that places belong to."""
    around = White(places) if len(places) > places.shape[1] else white
    ends = ascend(density, around, places)
    with torch.no_grad():
        heights = density(ends).nan_to_num(-math.inf, -math.inf, -math.inf)
    labels, dim = components(density, around, ends), places.shape[1]
    modes = [places[labels == label] for label in range(int(labels.max()) + 1)]
    within = torch.cat([mode - mode.mean(0) for mode in modes if len(mode) > 1] or [places[:0]])
    pooled = White(within) if len(within) > ENOUGH * dim else None  # where single modes have too few particles
    tops = [int(heights.where(labels == label, -math.inf).argmax()) for label in range(len(modes[:MOST]))]
    highest = sorted(range(len(tops)), key=lambda label: -float(heights[tops[label]]))[:MATCHED]
    laws = []
    for label, mode in enumerate(modes[:MOST]):
        fit = White(mode) if len(mode) > ENOUGH * dim else pooled
        if fit is not None:
            laws.append(MultivariateT(mode.mean(0), fit.scale_tril))
        if label < MATCHED or label in highest:  # particles that were annealed in haste say what is too wide
            found = match_top(density, ends[tops[label]], white.scale_tril)
            if found is not None and found.elbo > evidence - LEAST:
                laws.append(MultivariateT(found.loc, found.scale_tril))
    return laws


@torch.no_grad()
def _missed(
    space: LatentSpace, density: LogDensity, draws: Scored, laws: Sequence[MultivariateT], judged: Tensor
) -> Missing:
    """The share of the posterior's mass where the guide has too little, and what it does to the guide's moments."""
    probes = [law.sample(PROBES // len(laws)) for law in laws]
    places = torch.cat((draws.z, *probes))
    log_p = torch.cat((draws.log_p, *map(density, probes)))
    own = torch.cat((draws.log_q, *(log_q(space, probe) for probe in probes)))
    sizes = torch.tensor([len(draws.z), *map(len, probes)]) / len(places)
    log_laws = torch.stack([own, *(law.log_prob(places) for law in laws)])
    log_weights = log_p - torch.logsumexp(log_laws + sizes.log().to(log_laws).unsqueeze(-1), 0)
    evidence = log_mean(log_weights)
    lacking = (log_p - own - evidence).nan_to_num(-math.inf, math.inf, -math.inf) > SURPRISE
    weights = (log_weights - evidence).nan_to_num(-math.inf, -math.inf, -math.inf).exp() / len(places)
    share = float(weights[lacking].sum())
    noise = float((weights * (lacking.to(weights) - share)).norm())
    if not share:
        return Missing(0.0, 0.0)
    quantities = space.quantities(places[lacking])[:, judged].double()
    inside = weights[lacking].double().unsqueeze(-1) / share
    place = places[lacking][log_p[lacking].argmax()]
    return Missing(share, noise, place, _moved(draws.quantities[:, judged].double(), quantities, inside, share, noise))


def _moved(own: Tensor, found: Tensor, weights: Tensor, share: float, noise: float) -> Drift:
    """The errors of a guide whose mass is the posterior's but for a share, which lies elsewhere.

    Args:
        own: The quantities at draws of the guide, ``(M, K)``.
        found: Those at places where the guide lacks mass, ``(n, K)``.
        weights: The share of that mass at each, ``(n, 1)``.
        share: The share of all mass.
        noise: Its standard error.
    """
    usable = found.isfinite()
    found = found.where(usable, own.mean(0))
    mean, variance = own.mean(0), own.var(0)
    there = (weights * found).sum(0)
    apart = there - mean
    spread = (weights * (found - there).square()).sum(0)
    total = (1 - share) * variance + share * spread + share * (1 - share) * apart.square()
    of_share = spread - variance + (1 - 2 * share) * apart.square()
    total = total.clamp_min(1e-12)
    return Drift(
        -share * apart / total.sqrt(),
        noise * apart.abs() / total.sqrt(),
        total / variance,
        noise * of_share.abs() / variance,
    )


@torch.no_grad()
def log_q(space: LatentSpace, z: Tensor) -> Tensor:
    """The guide's log-density; where it breaks down, far out, the guide has none."""
    return space.log_q(z).nan_to_num(-math.inf, math.inf, -math.inf)


def log_mean(log_weights: Tensor) -> float:
    """The logarithm of the mean of weights; what is no number weighs nothing."""
    return float(log_weights.nan_to_num(-math.inf, -math.inf, -math.inf).logsumexp(0)) - math.log(len(log_weights))
