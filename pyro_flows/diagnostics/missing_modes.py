"""The search for posterior mass that a guide misses.

Weights and chains test only the neighbourhood of the guide's draws.  Here a population is annealed from the prior to
the posterior, and gradient ascents start far around the guide.  If they find density that the guide lacks, a Student t
distribution is fitted around each mode.

Guide and fitted distributions are then proposals of multiple importance sampling, where each draw is weighted against
the mixture of all (Veach, Guibas 1995, Optimally combining sampling techniques for Monte Carlo rendering).  The
posterior's mass where the guide has less than a twentieth of it is the mass that the guide misses.

*Narrow modes.*  A population of few particles does not meet a mode that is much narrower than the guide, and gradient
ascents of log p end in the broad mode that surrounds it.  The ratio h = log p - log q tells more: it is nearly constant
where the guide q is right, so nothing hides the slope of a narrow mode.  Here h is computed at many draws of the guide
and at draws spread more widely.  The largest values at each distance from the centre start ascents of h.

A narrow mode is a normal distribution with a share w of the mass and s times the guide's standard deviations in D
dimensions.  At its centre c, in coordinates where the guide is standard normal, it exceeds the guide by

    L = log(w / (1 - w)) - D log s + |c|² / 2

nats.  Its excess at a distance r is L - r² / (2 s²), and is visible up to the radius R = s √(2 (L + V)).  If h varies
by itself, as that of a trained guide does, V is about 0.  If the guide is exact apart from the mode, only rounding
limits it, and V is about 34 nats in double precision, 14 in single.  So N draws contain about

    N (2 π)^(-D/2) exp(-|c|² / 2) π^(D/2) / Γ(D/2 + 1) R^D

that show the mode.  No method that evaluates h at N draws finds a mode where this number is far below 1.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Chi2

from ..programs.density import Density, Drawn, Scored
from ..programs.log_density import GRADIENT, RunBudget
from ..sampling.annealed_population import Reference, anneal
from ..sampling.coordinates import White
from ..sampling.gaussian import Watch, match_top
from ..sampling.modes import Ends, ascend, climb, components, far, highest_of_each, ways_up
from ..vjp import LogDensity, value_and_score
from .drift import Drift
from .guide_space import prior_of
from .importance import WEIGHING
from .unreached import EFFORT, REACH, Missing, unreached

DF = 5.0  # degrees of freedom of the fitted distributions


@dataclass(frozen=True)
class Search:
    """Constants of the search, for modes anywhere and for narrow ones.

    Attributes:
        gradients: The most gradients to anneal the population.
        seconds: The time to search; half of it to anneal.
        starts: Gradient ascents.
        surprise: Nats by which the posterior exceeds the guide where the guide lacks mass: a factor of 20.
        digits: Rounding errors by which a place is moved to see whether its density is resolved.
        faint: Nats per coordinate by which a wide mode may be lower than the guide's.
        least: Nats of evidence by which a matched Gaussian may be below the guide.
        modes: The most modes with a fitted distribution.
        matched: Of these, the largest and the highest that get a matched Gaussian too.
        enough: Particles per dimension that suffice for a fit.
        beyond: Standard deviations of the guide's draws from which a place lies outside of them.
        along: The share of the way back along which a neck's density falls by little,
        steep: at most these nats, and one for each latent of its scale.
        probes: Draws of all fitted distributions.
        few: Points that the guide lacks, if the model runs one draw at a time.
        places: The places to look at for narrow modes.
        at_once: The places that run at once.
        wide: The share of places that are spread more widely.
        widest: The largest factor by which they are.
        dims: The dimensions beyond which places lie too far apart.
        shells: Ranges of distances from the centre.
        tops: Ascents from each.
        steps: Steps of an ascent.
        halved: The steps after which the better half of the ascents from each range goes on.
        leap: The effective share of particles that the weights must keep if the last temperatures are left out.
        rest: The share of their weight that may lie where the guide lacks density.
        longest: The length of the first step, in whitened units.
        shortest: That of the last.
        share: The share of the mass of a mode that ``narrowest`` is about.
        shown: The draws that must show it, for a chance of 95 %.
    """

    gradients: int = 150
    seconds: float = 20.0
    starts: int = 64
    surprise: float = 3.0
    digits: tuple[float, ...] = (-16.0, -7.0, 5.0, 12.0)
    faint: float = 20.0
    least: float = 8.0
    modes: int = 32
    matched: int = 3
    enough: int = 4
    beyond: float = 2.0
    along: float = 0.2
    steep: float = 3.0
    probes: int = 4000
    few: int = 32
    places: int = 100_000
    at_once: int = 4096
    wide: float = 0.4
    widest: float = 4.0
    dims: int = 16
    shells: int = 16
    tops: int = 6
    steps: int = 40
    halved: int = 10
    leap: float = 0.05
    rest: float = 0.001
    longest: float = 0.15
    shortest: float = 0.003
    share: float = 0.1
    shown: float = 3.0


SEARCH = Search()


def search(space: Density, white: White, draws: Drawn, others: Scored, evidence: float) -> Missing:
    """Search for mass that a guide misses.

    Args:
        space: The guide's space.
        white: Coordinates in which the guide's draws have mean 0 and the identity as covariance.
        draws: Draws of the guide.
        others: Further draws, from which to look for narrow modes.
        evidence: The log evidence, as estimated by the weights of the draws.
    """
    if (beyond := unreached(space.task)).outside:
        return beyond
    reference = Reference(prior_of(space), white.loc, white.scale_tril)
    budget = space.task.budget(SEARCH.seconds, by_clock=True)
    density = budget.counted(reference.log_p)
    lacking, is_blind = _lacking(space, white, reference, draws, others, evidence, budget)
    fitted = _fitted(density, lacking, white, evidence, budget) if len(lacking) else []
    found = _missed(space, density, draws, fitted) if fitted else Missing()
    neck = "" if found.place is None or budget.is_spent() else _neck(space, white, density, draws, found.place)
    places = len(others.z)
    narrowest = narrowest_shown(space.dim, len(draws.z) + places - int(SEARCH.wide * places)) if places else 1.0
    cut = budget.words if budget.is_spent() else ""
    return found._replace(is_blind=is_blind, neck=neck, narrowest=narrowest, cut=cut)


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


def _lacking(
    space: Density,
    white: White,
    reference: Reference,
    draws: Drawn,
    others: Scored,
    evidence: float,
    budget: RunBudget,
) -> tuple[Tensor, bool]:
    """Return points where the guide lacks density, ``(n, D)``, and True if no population could be annealed.

    Half of the budget is for the population.  If the model runs one draw at a time, the points are few.
    """
    alone, starts = space.task.runs_one_by_one, SEARCH.starts
    particles, number = (REACH.few, starts // 8) if alone else (REACH.particles, starts // 2)
    gradients = int(min(SEARCH.gradients, budget.number / (2 * GRADIENT * particles)))
    covered = Covered(space, evidence, float(draws.log_q.median()))
    half = space.task.budget(SEARCH.seconds / 2, by_clock=True)
    effort = EFFORT._replace(gradients=gradients)
    population = anneal(reference, particles, effort, is_enough=lambda *it: covered.holds(*it) or half.is_spent())
    drawn, density = reference.draw(particles), budget.counted(reference.log_p)
    # Points of an unfinished ascent have almost no density, but may still exceed the guide's: leave them out.
    faint = float(draws.log_p.max()) - SEARCH.faint * (1 + space.dim)
    ends = Ends(faint, budget.is_spent, covered.includes)
    places = [white.forward(far(white.inverse(draws.z[:number])))[0], ways_up(density, drawn, ends)]
    arrived = drawn[:0]
    if population is not None and population.has_arrived:
        arrived = population.z
    elif population is not None:  # its particles have not reached the posterior
        places.append(population.z)
    tops = climb(density, white, torch.cat(places), ends=ends)
    narrow = peaks(space, density, white, draws, others, budget.is_spent)
    found = space.wrapped(torch.cat((arrived, tops, narrow)), white.loc)
    with torch.no_grad():
        heights = density(found)
    lacking = found[covered.lacks(found, heights) & (heights > faint)]
    lacking = lacking[is_resolved(density, lacking)]
    return lacking[torch.randperm(len(lacking))[: SEARCH.few]] if alone else lacking, population is None


@torch.no_grad()
def is_resolved(density: LogDensity, z: Tensor) -> Tensor:
    """Return True for the places whose log-density hardly changes with their last digits, ``(n,)``.

    Elsewhere it is a difference of numbers that are too large, such as those of a beta distribution whose
    concentration is 1e20.  Such noise may exceed the posterior by many nats, and no mode is that narrow.
    """
    if not len(z):
        return torch.ones(0, dtype=torch.bool, device=z.device)
    moves = torch.tensor(SEARCH.digits).to(z).view(-1, 1, 1) * torch.finfo(z.dtype).eps
    nearby = z * (1 + moves)
    change = density(nearby.flatten(0, 1)).view(len(moves), -1) - density(z)
    return (change.abs() < SEARCH.surprise).all(0)


class Covered(NamedTuple):
    """The places where a guide has the density that it should have.

    Attributes:
        space: The guide's space.
        evidence: The log evidence.
        bulk: The guide's log-density that half of its draws exceed.
    """

    space: Density
    evidence: float
    bulk: float

    @torch.no_grad()
    def lacks(self, z: Tensor, log_p: Tensor) -> Tensor:
        """Return True for the places, with log-densities there, where the guide lacks density, ``(N,)``."""
        return _known(log_p - log_q(self.space, z) - self.evidence, math.inf) > SEARCH.surprise

    @torch.no_grad()
    def includes(self, z: Tensor, log_p: Tensor) -> Tensor:
        """Return True for places amid the guide's draws, from where climbs find nothing new, ``(N,)``."""
        own = log_q(self.space, z)
        return (own > self.bulk) & (log_p - own - self.evidence < SEARCH.surprise)

    def holds(self, z: Tensor, log_p: Tensor, log_weights: Tensor) -> bool:
        """Return True if weighted places show that the guide covers the posterior, apart from narrow modes."""
        weights = _known(log_weights).softmax(0)
        is_near = float(weights.square().sum()) * SEARCH.leap * len(z) < 1
        return is_near and float(weights[self.lacks(z, log_p)].sum()) < SEARCH.rest


def further_draws(space: Density, draws: Drawn) -> Scored:
    """Return more draws, from which to look for narrow modes; none if that is hopeless or too slow."""
    if space.task.runs_one_by_one or space.dim > SEARCH.dims:
        return Scored(draws.z[:0], draws.log_q[:0])
    number = min(SEARCH.places, WEIGHING.held // (space.task.model.largest + space.task.guide.largest))
    return space.scored_vectors(max(1, number), 2 * SEARCH.at_once)


def peaks(
    space: Density,
    density: LogDensity,
    white: White,
    draws: Drawn,
    others: Scored,
    is_over: Watch = bool,
) -> Tensor:
    """Return the ends of ascents of log p - log q from the places where it is largest, ``(n, D)``.

    Args:
        space: The guide's space.
        density: The model's log-density.
        white: Coordinates in which the guide's draws have mean 0 and the identity as covariance.
        draws: Draws of the guide.
        others: Further draws; some are spread more widely.
        is_over: Returns True once the ascents have to end.
    """
    if not len(others.z) or is_over():
        return draws.z[:0]

    def ratio(x: Tensor) -> Tensor:
        z, _ = white.forward(x)
        return density(z) - space.log_q(z)

    number = int(SEARCH.wide * len(others.z))
    wide, (z, log_q) = white.inverse(others.z[:number]), (part[number:] for part in others)
    wide *= SEARCH.widest ** torch.rand(number, 1).to(wide)
    with torch.no_grad():
        heights = torch.cat([density(part) for part in z.split(SEARCH.at_once)])
        of_wide = [ratio(part) for part in wide.split(SEARCH.at_once) if len(part)]
        found = _known(torch.cat([draws.log_p - draws.log_q, heights - log_q, *of_wide]))
    x = torch.cat((white.inverse(draws.z), white.inverse(z), wide))
    # In each shell by itself, because the ratio of a good guide may be largest in its tails.
    shells = x.norm(dim=-1).argsort().tensor_split(SEARCH.shells)
    tops = [shell[found[shell].topk(min(SEARCH.tops, len(shell))).indices] for shell in shells]
    x = x[torch.cat(tops)]
    groups = [*torch.arange(len(x)).split([len(top) for top in tops])]
    left, ends, highest = torch.arange(len(x)), x.clone(), torch.full_like(x[:, 0], -math.inf)
    for step in range(SEARCH.steps):  # of given lengths, since slopes differ by many magnitudes
        if step and step % SEARCH.halved == 0:
            groups = [group[highest[group].argsort(descending=True)[: (len(group) + 1) // 2]] for group in groups]
            x, left = ends[torch.cat(groups)], torch.cat(groups)
        height, slope = value_and_score(ratio, x)
        is_higher = height.to(x) > highest[left]
        higher = left[is_higher]
        ends[higher], highest[higher] = x[is_higher], height.to(x)[is_higher]
        slope = slope.nan_to_num(0, 0, 0)
        length = SEARCH.longest * (SEARCH.shortest / SEARCH.longest) ** (step / (SEARCH.steps - 1))
        x = x + length * slope / slope.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        if is_over():
            break
    return white.forward(ends)[0]


def narrowest_shown(dim: int, number: int) -> float:
    """Return the scale of the narrowest mode that a number of draws shows with a chance of 95 %.

    It is relative to the guide's standard deviations.  The mode has a tenth of the mass, and lies where the guide has
    its mean log-density.  Guides whose ratio to the posterior is exactly constant elsewhere show narrower ones.
    """

    def shown(scale: float) -> float:
        excess = math.log(SEARCH.share / (1 - SEARCH.share)) - dim * math.log(scale) + dim / 2
        radius = scale * math.sqrt(2 * max(excess, 0.0))
        return number * math.exp(-dim / 2) * (radius / math.sqrt(2)) ** dim / math.gamma(dim / 2 + 1)

    scales = [0.001 * 1.05**step for step in range(142)]  # up to about 1
    return next((scale for scale in scales if shown(scale) > SEARCH.shown), 1.0)


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


def _fitted(
    density: LogDensity, places: Tensor, white: White, evidence: float, budget: RunBudget
) -> list[MultivariateT]:
    """Return a distribution around each of the modes of some points."""
    around = White(places) if len(places) > places.shape[1] else white
    ends = ascend(density, around, places, budget.is_spent)
    kept = is_resolved(density, ends)
    if not kept.any():
        return []
    places, ends = places[kept], ends[kept]
    with torch.no_grad():
        heights = _known(density(ends))
    labels, dim = components(density, around, ends), places.shape[1]
    modes = [places[labels == label] for label in range(int(labels.max()) + 1)]
    within = torch.cat([mode - mode.mean(0) for mode in modes if len(mode) > 1] or [places[:0]])
    pooled = White(within) if len(within) > SEARCH.enough * dim else None  # for modes with too few particles
    tops = highest_of_each(labels, heights)[: SEARCH.modes]
    matched = 1 if budget.is_spent() else SEARCH.matched
    highest = heights[tops].argsort(descending=True, stable=True)[:matched].tolist()
    fitted = []
    for label, (mode, top) in enumerate(zip(modes, ends[tops], strict=False)):
        fit = White(mode) if len(mode) > SEARCH.enough * dim else pooled
        if fit is not None:
            fitted.append(MultivariateT(mode.mean(0), fit.scale_tril))
        if label < matched or label in highest:  # because quickly annealed particles spread too widely
            found = match_top(density, top, white.scale_tril, budget.is_spent)
            if found is not None and found.elbo > evidence - SEARCH.least:
                fitted.append(MultivariateT(found.loc, found.scale_tril))
    return fitted


@torch.no_grad()
def _missed(space: Density, density: LogDensity, draws: Drawn, fitted: list[MultivariateT]) -> Missing:
    """Return the posterior's mass that the guide misses, and the resulting errors of the guide's moments."""
    number = WEIGHING.alone if space.task.runs_one_by_one else SEARCH.probes
    probes = [proposal.sample(number // len(fitted)) for proposal in fitted]
    places = torch.cat((draws.z, *probes))
    log_p = torch.cat((draws.log_p, *map(density, probes)))
    own = torch.cat((draws.log_q, *(log_q(space, probe) for probe in probes)))
    suspect = (log_p > draws.log_p.max()).nonzero().flatten()
    log_p[suspect[~is_resolved(density, places[suspect])]] = -math.inf
    sizes = torch.tensor([len(draws.z), *map(len, probes)]) / len(places)
    log_proposals = torch.stack([own, *(proposal.log_prob(places) for proposal in fitted)])
    log_weights = _known(log_p - torch.logsumexp(log_proposals + sizes.log().to(log_proposals).unsqueeze(-1), 0))
    evidence = float(log_weights.logsumexp(0)) - math.log(len(places))
    lacking = _known(log_p - own - evidence, math.inf) > SEARCH.surprise
    weights = (log_weights - evidence).exp() / len(places)
    share = float(weights[lacking].sum())
    noise = float((weights * (lacking.to(weights) - share)).norm())
    if not share:
        return Missing()
    inside = weights[lacking].double().unsqueeze(-1) / share  # (n, 1)
    place = places[lacking][log_p[lacking].argmax()]
    # The errors of a guide that is the posterior except for the missing share.
    own, found = draws.quantities.double(), space.quantities(places[lacking]).double()  # (M, K), (n, K)
    mean, variance = own.mean(0), own.var(0)
    found = found.where(found.isfinite(), mean)
    there = (inside * found).sum(0)
    apart, spread = there - mean, (inside * (found - there).square()).sum(0)
    total = ((1 - share) * variance + share * spread + share * (1 - share) * apart.square()).clamp_min(1e-12)
    of_share = spread - variance + (1 - 2 * share) * apart.square()
    error, error_se = -share * apart / total.sqrt(), noise * apart.abs() / total.sqrt()
    moved = Drift(error, error_se, total / variance, noise * of_share.abs() / variance)
    return Missing(share, noise, place, moved)


def _known(value: Tensor, highest: float = -math.inf) -> Tensor:
    """Return log-densities, -inf where they are NaN, and ``highest`` where they are infinite."""
    return value.nan_to_num(-math.inf, highest, -math.inf)


@torch.no_grad()
def log_q(space: Density, z: Tensor) -> Tensor:
    """Return the guide's log-density, -inf where it is not finite."""
    return _known(space.log_q(z), math.inf)
