"""The search for posterior mass that a guide misses.

Weights and chains test only the neighbourhood of the guide's draws.  Here a population is annealed from the prior to
the posterior, and gradient ascents start far around the guide.  If they find density that the guide lacks, a Student t
distribution is fitted around each mode.

Guide and fitted distributions are then proposals of multiple importance sampling, where each draw is weighted against
the mixture of all (Veach, Guibas 1995, Optimally combining sampling techniques for Monte Carlo rendering).  The
posterior's mass where the guide has less than a twentieth of it is the mass that the guide misses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Chi2

from ..programs.density import Density, Drawn
from ..sampling.annealed_population import Reference, anneal
from ..sampling.climbs import ascend, climb, components, far, highest_of_each, ways_up
from ..sampling.coordinates import White
from ..sampling.gaussian import match_top
from ..vjp import LogDensity
from .drift import Drift
from .guide_space import prior_of
from .narrow_modes import narrowest, peaks
from .unreached import EFFORT, Missing, unreached


@dataclass(frozen=True)
class Search:
    """Constants of the search.

    Attributes:
        particles: The particles of the population.
        few: Those of one whose model runs one draw at a time.
        gradients: The most gradients to anneal it.
        starts: Gradient ascents.
        surprise: Nats by which the posterior exceeds the guide where the guide lacks mass: a factor of 20.
        faint: Nats per coordinate by which a wide mode may be lower than the guide's.
        least: Nats of evidence by which a matched Gaussian may be below the guide.
        modes: The most modes with a fitted distribution.
        matched: Of these, the largest and the highest that get a matched Gaussian too.
        enough: Particles per dimension that suffice for a fit.
        beyond: Standard deviations of the guide's draws from which a place lies outside of them.
        along: The share of the way back along which a neck's density falls by little,
        steep: at most these nats, and one for each latent of its scale.
        probes: Draws of all fitted distributions.
    """

    particles: int = 256
    few: int = 64
    gradients: int = 150
    starts: int = 64
    surprise: float = 3.0
    faint: float = 20.0
    least: float = 8.0
    modes: int = 32
    matched: int = 3
    enough: int = 4
    beyond: float = 2.0
    along: float = 0.2
    steep: float = 3.0
    probes: int = 4000


SEARCH = Search()
DF = 5.0  # degrees of freedom of the fitted distributions


def search(space: Density, white: White, draws: Drawn, evidence: float) -> Missing:
    """Search for mass that a guide misses.

    Args:
        space: The guide's space.
        white: Coordinates in which the guide's draws have mean 0 and the identity as covariance.
        draws: Draws of the guide.
        evidence: The log evidence, as estimated by the weights of the draws.
    """
    if (beyond := unreached(space.task)).outside:
        return beyond
    reference = Reference(prior_of(space), white.loc, white.scale_tril)
    density = reference.log_p
    lacking, is_blind = _lacking(space, white, reference, draws, evidence)
    fitted = _fitted(density, lacking, white, evidence) if len(lacking) else []
    found = _missed(space, density, draws, fitted) if fitted else Missing(0.0, 0.0)
    neck = "" if found.place is None else _neck(space, white, density, draws, found.place)
    return found._replace(is_blind=is_blind, neck=neck, narrowest=narrowest(space, len(draws.z)))


@torch.no_grad()
def _neck(space: Density, white: White, density: LogDensity, draws: Drawn, place: Tensor) -> str:
    """Return the latent along which climbs from a guide's draws lead to a place far above them, and its value there.

    Such a place is the neck of a scale that goes to 0.  The string is empty if a valley lies between, as before another
    mode; if the place is not higher, as in a tail; if it lies amid the draws; or if it is as narrow along that latent
    as across it, as a spike is.
    """
    centre = draws.z.mean(0)
    scores = ((place - centre) / draws.z.std(0)).abs()
    axis = int(scores.argmax())
    nearer = place.clone()
    nearer[axis] += SEARCH.along * (centre[axis] - place[axis])
    height, along = density(torch.stack((place, nearer))).tolist()
    is_higher, is_flat = height > float(draws.log_p.max()), along > height - SEARCH.steep - space.dim
    if scores[axis] < SEARCH.beyond or not is_higher or not is_flat:
        return ""
    ends = ascend(density, white, draws.z[: SEARCH.starts])
    labels = components(density, white, torch.cat((place.unsqueeze(0), ends)))
    if not bool((labels[1:] == labels[0]).any()):
        return ""
    name = space.coordinates[axis]
    value = space.values(place.unsqueeze(0)).get(name)
    return name if value is None or value.numel() > 1 else f"{name} near {float(value):.2g}"


def _lacking(space: Density, white: White, reference: Reference, draws: Drawn, evidence: float) -> tuple[Tensor, bool]:
    """Return points where the guide lacks density, ``(n, D)``, and True if no population could be annealed."""
    alone = space.task.runs_one_by_one
    particles, number = (SEARCH.few, SEARCH.starts // 8) if alone else (SEARCH.particles, SEARCH.starts // 2)
    population = anneal(reference, particles, EFFORT._replace(gradients=SEARCH.gradients))
    drawn, density = reference.draw(particles), reference.log_p
    # Points of an unfinished ascent have almost no density, but may still exceed the guide's: leave them out.
    faint = float(draws.log_p.max()) - SEARCH.faint * (1 + space.dim)
    beyond = white.forward(far(white.inverse(draws.z[:number])))[0]
    starts = torch.cat((beyond, ways_up(density, drawn, faint)))
    arrived = population.z if population is not None and population.has_arrived else drawn[:0]
    if population is not None and not population.has_arrived:  # its particles have not reached the posterior
        starts = torch.cat((starts, population.z))
    tops = climb(density, white, starts, least=faint), peaks(space, density, white, draws)
    places = space.wrapped(torch.cat((arrived, *tops)), white.loc)
    with torch.no_grad():
        heights = density(places)
    surprise = (heights - log_q(space, places) - evidence).nan_to_num(-math.inf, math.inf, -math.inf)
    return places[(surprise > SEARCH.surprise) & (heights > faint)], population is None


class MultivariateT(NamedTuple):
    """Multivariate Student's t distribution with ``DF`` degrees of freedom over vectors ``(D,)``.

    Pyro's ``MultivariateStudentT`` is not used because it solves one linear system per vector and imports sympy.
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


def _fitted(density: LogDensity, places: Tensor, white: White, evidence: float) -> list[MultivariateT]:
    """Return a distribution around each of the modes of some points."""
    around = White(places) if len(places) > places.shape[1] else white
    ends = ascend(density, around, places)
    with torch.no_grad():
        heights = density(ends).nan_to_num(-math.inf, -math.inf, -math.inf)
    labels, dim = components(density, around, ends), places.shape[1]
    modes = [places[labels == label] for label in range(int(labels.max()) + 1)]
    within = torch.cat([mode - mode.mean(0) for mode in modes if len(mode) > 1] or [places[:0]])
    pooled = White(within) if len(within) > SEARCH.enough * dim else None  # for modes with too few particles
    tops = highest_of_each(labels, heights)[: SEARCH.modes]
    highest = heights[tops].argsort(descending=True, stable=True)[: SEARCH.matched].tolist()
    fitted = []
    for label, (mode, top) in enumerate(zip(modes, ends[tops], strict=False)):
        fit = White(mode) if len(mode) > SEARCH.enough * dim else pooled
        if fit is not None:
            fitted.append(MultivariateT(mode.mean(0), fit.scale_tril))
        if label < SEARCH.matched or label in highest:  # because quickly annealed particles spread too widely
            found = match_top(density, top, white.scale_tril)
            if found is not None and found.elbo > evidence - SEARCH.least:
                fitted.append(MultivariateT(found.loc, found.scale_tril))
    return fitted


@torch.no_grad()
def _missed(space: Density, density: LogDensity, draws: Drawn, fitted: list[MultivariateT]) -> Missing:
    """Return the posterior's mass that the guide misses, and the resulting errors of the guide's moments."""
    probes = [proposal.sample(SEARCH.probes // len(fitted)) for proposal in fitted]
    places = torch.cat((draws.z, *probes))
    log_p = torch.cat((draws.log_p, *map(density, probes)))
    own = torch.cat((draws.log_q, *(log_q(space, probe) for probe in probes)))
    sizes = torch.tensor([len(draws.z), *map(len, probes)]) / len(places)
    log_proposals = torch.stack([own, *(proposal.log_prob(places) for proposal in fitted)])
    log_weights = log_p - torch.logsumexp(log_proposals + sizes.log().to(log_proposals).unsqueeze(-1), 0)
    log_weights = log_weights.nan_to_num(-math.inf, -math.inf, -math.inf)
    evidence = float(log_weights.logsumexp(0)) - math.log(len(places))
    lacking = (log_p - own - evidence).nan_to_num(-math.inf, math.inf, -math.inf) > SEARCH.surprise
    weights = (log_weights - evidence).exp() / len(places)
    share = float(weights[lacking].sum())
    noise = float((weights * (lacking.to(weights) - share)).norm())
    if not share:
        return Missing(0.0, 0.0)
    found = space.quantities(places[lacking]).double()
    inside = weights[lacking].double().unsqueeze(-1) / share
    place = places[lacking][log_p[lacking].argmax()]
    return Missing(share, noise, place, _moved(draws.quantities.double(), found, inside, share, noise))


def _moved(own: Tensor, found: Tensor, weights: Tensor, share: float, noise: float) -> Drift:
    """Return the errors of a guide that is the posterior except for a missing share of the mass.

    Args:
        own: The quantities at draws of the guide, ``(M, K)``.
        found: The quantities at points of the missing mass, ``(n, K)``.
        weights: The weight of each of these points, ``(n, 1)``.
        share: The missing share.
        noise: The standard error of the share.
    """
    mean, variance = own.mean(0), own.var(0)
    found = found.where(found.isfinite(), mean)
    there = (weights * found).sum(0)
    apart, spread = there - mean, (weights * (found - there).square()).sum(0)
    total = ((1 - share) * variance + share * spread + share * (1 - share) * apart.square()).clamp_min(1e-12)
    of_share = spread - variance + (1 - 2 * share) * apart.square()
    error, error_se = -share * apart / total.sqrt(), noise * apart.abs() / total.sqrt()
    return Drift(error, error_se, total / variance, noise * of_share.abs() / variance)


@torch.no_grad()
def log_q(space: Density, z: Tensor) -> Tensor:
    """Return the guide's log-density, -inf where it is not finite."""
    return space.log_q(z).nan_to_num(-math.inf, math.inf, -math.inf)
