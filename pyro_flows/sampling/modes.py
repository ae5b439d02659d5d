"""Modes of a density: climbs to their tops, the assignment of places to modes, and a mixture of Gaussians over them.

Two places belong to one mode if the density does not fall between them.  Only the lines between each place and its
nearest neighbours are examined, so any connected region is one mode, a ring for example.  A place in a valley is
connected to several tops, and belongs to the nearest.

A population finds modes, and climbs from other starts find narrow modes without particles.  Draws of the Gaussians
around these estimate their weights.

Maximum Likelihood from Incomplete Data via the EM Algorithm (Dempster, Laird, Rubin 1977).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..vjp import LogDensity, value_and_score
from .annealed_population import Population
from .coordinates import White
from .gaussian import Gaussian, Watch, match_top

Wrapped = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Climbs:
    """Settings of climbs and of the assignment to modes.

    Attributes:
        steps: Steps of a climb.
        patience: Steps between the tests that end climbs.
        passing: One of so many climbs goes on through known places.
        top: The squared slope that leaves at most 0.001 nats to the top.
        neighbours: Neighbours of each place to which the line is examined.
        some: Starts drawn from the prior.
        narrow: The step size from there, in standard deviations of the prior.
        far: That from places far out.
        dip: Nats by which the density must fall between places of different modes.
        between: Evaluations between two places, at random fractions: at fixed ones a lattice may have further modes.
        batch: Places per evaluation.
        waypoints: Evaluations along a climb that must not cross a valley.
        sizes: The step sizes of such a climb, tried in turn.
    """

    steps: int = 60
    patience: int = 5
    passing: int = 4
    top: float = 0.002
    neighbours: int = 6
    some: int = 256
    narrow: float = 0.1
    far: float = 0.2
    dip: float = 1.0
    between: int = 6
    batch: int = 4096
    waypoints: int = 12
    sizes: tuple[float, ...] = (0.5, 0.1, 0.02)


CLIMBS = Climbs()


class Ends(NamedTuple):
    """The early ends of climbs.

    Attributes:
        least: The log-density to reach.  A climb ends if the slope at its best place is too small to reach it.
        is_over: Returns True once all climbs have to end.
        is_known: Returns True for the places, ``(N, D)``, with log-densities there, that most climbs need not leave.
            Some go on, since a neck may lie behind.
    """

    least: float = -math.inf
    is_over: Watch = bool
    is_known: Callable[[Tensor, Tensor], Tensor] = lambda z, log_p: torch.zeros_like(log_p, dtype=torch.bool)


def climb(
    density: LogDensity,
    coordinates: White,
    z: Tensor,
    size: float | Tensor = 0.5,
    ends: Ends | None = None,
) -> Tensor:
    """Climb by Adam with decreasing step sizes; return the highest place on each path, ``(N, D)``.

    Every few steps a Newton step from the best place is tried.  If the coordinates whiten the mode, it leads to the top
    and ends the climb.  In flat tails it does not.

    Args:
        density: The log-density.
        coordinates: The coordinates to climb in.
        z: The starts, ``(N, D)``.
        size: The first step of each coordinate, for all climbs or for each, ``(N, 1)``.  A climb moves at most 30 times
            as far.
        ends: Their early ends.
    """
    least, is_over, is_known = ends or Ends()
    x = coordinates.inverse(z)
    best, highest, slope = x.clone(), torch.full_like(x[:, 0], -math.inf), torch.zeros_like(x)
    first = second = torch.zeros_like(x)
    left = torch.arange(len(x), device=x.device)  # the climbs that continue
    sizes = torch.as_tensor(size).to(x).expand(len(x), 1)

    def visit(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score at the places x of the climbs, and True for each that is its climb's highest so far."""
        height, score = value_and_score(lambda x: density(coordinates.forward(x)[0]), x)
        # Data in double precision give the log-density their dtype, whatever that of the latents.
        height, score = height.to(x).nan_to_num(-math.inf, -math.inf, -math.inf), score.nan_to_num(0, 0, 0)
        is_higher = height > highest[left]
        higher = left[is_higher]
        best[higher], highest[higher], slope[higher] = x[is_higher], height[is_higher], score[is_higher]
        return score, is_higher

    for step in range(1, CLIMBS.steps + 1):
        score, _ = visit(x)
        first, second = 0.8 * first + 0.2 * score, 0.9 * second + 0.1 * score.square()
        direction = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
        x = x + sizes[left] * (1 - step / (CLIMBS.steps + 1)) * direction
        if step % CLIMBS.patience == 1:
            before = slope[left].square().sum(-1)
            score, is_higher = visit(best[left] + slope[left])
            after = score.square().sum(-1)
            goes_on = ~(is_higher & (after < before / 4) & (after < CLIMBS.top))
            reach = sizes[left] * (CLIMBS.steps - step) ** 2 / (2 * CLIMBS.steps)  # each coordinate's remaining path
            goes_on &= highest[left] + (reach * slope[left].abs()).sum(-1) >= least
            goes_on &= ~is_known(coordinates.forward(best[left])[0], highest[left]) | (left % CLIMBS.passing == 0)
            left, x, first, second = left[goes_on], x[goes_on], first[goes_on], second[goes_on]
            if not len(left) or is_over():
                break
    return coordinates.forward(best)[0]


@torch.no_grad()
def ascend(density: LogDensity, coordinates: White, z: Tensor, is_over: Watch = bool) -> Tensor:
    """Climb within modes.

    A climb that has crossed a valley is repeated with smaller steps.  Places whose last climb still crosses one stay.
    """
    ends, left = z.clone(), torch.arange(len(z), device=z.device)
    shares = torch.arange(1, CLIMBS.waypoints).to(z).view(-1, 1, 1) / CLIMBS.waypoints
    for size in CLIMBS.sizes:
        start, end = z[left], climb(density, coordinates, z[left], size, Ends(is_over=is_over))
        path = density((start + shares * (end - start)).flatten(0, 1)).view(len(shares), -1)
        lowest = path.nan_to_num(-math.inf, math.inf, -math.inf).amin(0)
        crosses = lowest < density(start).nan_to_num(-math.inf, math.inf, -math.inf) - CLIMBS.dip
        ends[left[~crosses]] = end[~crosses]
        left = left[crosses]
        if not len(left) or is_over():
            break
    return ends


def ways_up(density: LogDensity, z: Tensor, ends: Ends | None = None) -> Tensor:
    """Return places to look for modes that a population misses, given draws z of the prior.

    These are the origin, the median of the draws, places between that and some draws, and the ends of climbs from all
    draws and from places far around them.
    """
    z = z[z.isfinite().all(-1)]
    if len(z) < 3:
        return z
    middle, some = z.median(0).values, z[: len(z) // 8]
    between = middle + torch.rand(len(some), 1).to(z) * (some - middle)
    white, few = White(z), torch.stack((torch.zeros_like(middle), middle))
    beyond = white.forward(far(white.inverse(some)))[0]
    starts, sizes = torch.cat((z, beyond)), torch.tensor([CLIMBS.narrow] * len(z) + [CLIMBS.far] * len(beyond))
    return torch.cat((few, between, climb(density, white, starts, sizes.unsqueeze(-1), ends)))


def far(x: Tensor) -> Tensor:
    """Multiply each vector by a random factor from 2 to 8."""
    return 2 * 4 ** torch.rand(len(x), 1, dtype=x.dtype, device=x.device) * x


@torch.no_grad()
def components(density: LogDensity, coordinates: White, z: Tensor) -> Tensor:
    """Return the index of each place's mode, ``(N,)``; mode 0 has the most places.

    Args:
        density: The log-density.
        coordinates: Coordinates with a meaningful distance.
        z: The places, ``(N, D)``, preferably the ends of climbs.  In many dimensions the density may be higher between
            two draws than at both, whatever their modes.
    """
    x, heights = coordinates.inverse(z), density(z)
    one, near, joined = _pairs(density, z, x, heights)
    rises = heights[near] - heights[one]
    is_top = ~(joined & (rises > CLIMBS.dip)).any(-1)
    up = joined & (rises > 0)
    kept = (joined & is_top[one] & is_top[near]) | (up & (up.cumsum(-1) == 1))  # neighbours are sorted by distance
    labels = _connected(one[kept], near[kept], len(z))
    # Ends of climbs at one top may fall into several groups of nearest neighbours, which are joined by their tops.
    tops = highest_of_each(labels, heights)
    one, near, same = _pairs(density, z[tops], x[tops], heights[tops])
    found = _connected(one[same], near[same], len(tops))[labels]
    order = found.bincount().argsort(descending=True)
    return order.argsort()[found]


def highest_of_each(labels: Tensor, heights: Tensor) -> Tensor:
    """Return the index of the highest place of each mode, given labels 0, 1, …, ``(N,)``, and log-densities."""
    return torch.stack([heights.where(labels == k, -math.inf).argmax() for k in range(int(labels.max()) + 1)])


def _pairs(density: LogDensity, z: Tensor, x: Tensor, heights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each place and its nearest neighbours in x, and True if the density does not fall between: ``(N, k)``."""
    rows, parts = torch.arange(len(x), device=x.device), []
    for part in rows.split(CLIMBS.batch):
        distances = torch.cdist(x[part], x)
        distances[rows[: len(part)], part] = math.inf
        parts.append(distances.topk(min(CLIMBS.neighbours, len(x) - 1), largest=False).indices)
    near = torch.cat(parts)
    one = rows.unsqueeze(-1).expand_as(near)
    first, second = one.flatten(), near.flatten()
    least = torch.minimum(heights[first], heights[second]) - CLIMBS.dip
    joined = torch.arange(len(first), device=z.device)
    for place in range(CLIMBS.between):
        kept = [joined[:0]]
        for part in joined.split(CLIMBS.batch) if len(joined) else ():
            share = (place + torch.rand(len(part), 1).to(z)) / CLIMBS.between
            between = z[first[part]] + share * (z[second[part]] - z[first[part]])
            kept.append(part[density(between) > least[part]])
        joined = torch.cat(kept)
    return one, near, torch.zeros_like(first, dtype=torch.bool).index_fill(0, joined, True).view(one.shape)


def _connected(one: Tensor, other: Tensor, number: int) -> Tensor:
    """Return the connected component of each of some places, ``(number,)``, given joined pairs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = one.cpu().numpy(), other.cpu().numpy()
    edges = coo_array((np.ones(len(one), dtype=bool), ends), shape=(number, number))
    return torch.as_tensor(connected_components(edges, directed=False)[1], dtype=torch.long, device=one.device)


@dataclass(frozen=True)
class Mixing:
    """Settings of a mixture over modes.

    Attributes:
        fitted: Effective draws per dimension from which a component's mean and covariance are estimated.
        rounds: Rounds of expectation maximisation.
        enough: Particles per dimension from which a mode has its own covariance.
        probes: Draws that estimate the weight of a mode without particles, a multiple of the islands.
        wider: The scale of a second, wider Gaussian around each.
        share: Its weight, relative to the other.
        parts: The most Gaussians per mode; all modes together have at most twice as many, or one each.
        others: Examined modes without particles.
        little: Nats by which they may lie below the evidence.
        largest: Nats by which they may lie above the evidence before weights overflow.
        few: The share of the particles below which a mode is only a place where climbs stopped early.
    """

    fitted: int = 20
    rounds: int = 50
    enough: int = 5
    probes: int = 1024
    wider: float = 1.5
    share: float = 0.02
    parts: int = 8
    others: int = 8
    little: float = 6.0
    largest: float = 500.0
    few: float = 0.002


MIXING = Mixing()


class Mixture(NamedTuple):
    """A mixture of K Gaussians over vectors ``(D,)``.

    Attributes:
        loc: The means, ``(K, D)``.
        scale_tril: The Cholesky factors of the covariances, ``(K, D, D)``.
        weights: The weights of the components, ``(K,)``, up to a constant.
    """

    loc: Tensor
    scale_tril: Tensor
    weights: Tensor

    def log_joint(self, x: Tensor) -> Tensor:
        """Return the log of each component's weight times its density at x, ``(N, K)``."""
        components = MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
        return torch.cat([components.log_prob(part.unsqueeze(1)) + self.weights.log() for part in x.split(1000)])

    def fitted(self, x: Tensor, weights: Tensor) -> Mixture:
        """Fit the mixture by expectation maximisation to draws, ``(N, D)``, of some weights, ``(N,)``.

        Components with too few draws keep their means and covariances.  Copies of a draw count as one.
        """
        found, (x, weights) = self, _distinct(x, weights)
        for _ in range(MIXING.rounds):
            chances = weights.unsqueeze(-1) * found.log_joint(x).softmax(-1)
            total = chances.sum(0)
            effective = total.square() / chances.square().sum(0).clamp_min(1e-30)
            shares = (chances / total.clamp_min(1e-12)).T  # (K, N)
            loc = shares @ x
            scaled = shares.sqrt().unsqueeze(-1) * (x - loc.unsqueeze(1))  # (K, N, D)
            scale_tril, failed = torch.linalg.cholesky_ex(scaled.mT @ scaled)
            usable = (effective > MIXING.fitted * x.shape[1]) & (failed == 0) & scale_tril.isfinite().all((-1, -2))
            loc = torch.where(usable[:, None], loc, found.loc)
            scale_tril = torch.where(usable[:, None, None], scale_tril, found.scale_tril)
            found = Mixture(loc, scale_tril, total.clamp_min(1e-6))
        return found


def _distinct(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Merge copies of draws, ``(N, D)``, and add their weights, ``(N,)``."""
    x, place = x.unique(dim=0, return_inverse=True)
    return x, weights.new_zeros(len(x)).index_add(0, place, weights)


class ModeMixture:
    """The modes that a population has found, and others without particles, with a Gaussian around each.

    Args:
        density: The posterior's log-density, NaN where the model breaks down.
        wrapped: Turns the angles in vectors, ``(N, D)``, to within half a turn of a centre, ``(D,)``.
        population: The population.
        starts: Starts of climbs to other modes, ``(n, D)``.

    Attributes:
        population: The population, with weighted draws of the modes without particles.
        labels: The mode of each particle, ``(N,)``.
        white: Coordinates in which the population is white.
        places: The highest place of each of the K modes, ``(K, D)``.
        heights: The log-density there, ``(K,)`` in nats.
        gaussians: A Gaussian around each mode; the weights are estimates relative to the population.
    """

    def __init__(self, density: LogDensity, wrapped: Wrapped, population: Population, starts: Tensor) -> None:
        centre = _opposite_the_gap(wrapped, population.z)
        self._wrapped = lambda z: wrapped(z, centre)
        z = self._wrapped(population.z)
        self.population = population = population._replace(z=z)
        self.white = white = White(z, population.log_weights.exp())
        ends = self._wrapped(torch.cat([ascend(density, white, part) for part in z.split(1024)]))
        self.labels = _merged(components(density, white, ends), white.inverse(ends))
        with torch.no_grad():
            tops = ends[highest_of_each(self.labels, density(ends).nan_to_num(-math.inf, math.inf, -math.inf))]
        modes = self._gaussians(tops)
        more = self._wrapped(climb(density, white, starts, CLIMBS.narrow))
        for top in _others(density, white, tops, torch.cat((more, tops))):
            found = match_top(density, top, white.scale_tril)
            if found is not None and self._lacks(found):
                weight = math.exp(min(found.elbo - population.log_evidence, MIXING.largest))
                modes.append((top, found.loc, found.scale_tril, torch.tensor(weight).to(z)))
        self.places, *parts = map(torch.stack, zip(*modes, strict=True))
        self.gaussians = Mixture(*parts)
        with torch.no_grad():
            self.heights = density(self.places)
        self._complement(density, len(tops))

    def _lacks(self, found: Gaussian) -> bool:
        """True if a mode has relevant mass, but too few particles, or only copies of a few."""
        z, log_weights, *_ = self.population
        inside = found.holds(z)
        _, weights = _distinct(z[inside], log_weights[inside].exp())
        mass, share = found.elbo - self.population.log_evidence, self.population.share(inside)[0]
        effective = 1 / float(log_weights.exp().square().sum())  # copies count here, as long as islands weigh the same
        # Few particles make no mode of a small population.
        least = min(MIXING.enough * len(found.loc), share * effective / 4)
        is_rare = float(weights.sum()) ** 2 < least * float(weights.square().sum())
        lacks = share < math.exp(min(mass, 0.0)) / 4
        return mass > -MIXING.little and (lacks or is_rare)

    def _gaussians(self, tops: Tensor) -> list[tuple[Tensor, ...]]:
        """Return each mode's top, the mean and factor of a Gaussian, and its weight; small modes share a covariance."""
        z, log_weights, *_ = self.population
        parts = [self.labels == k for k in range(len(tops))]
        within = [White(z[own], (log_weights[own] - log_weights[own].max()).exp()) for own in parts]
        pooled = White(z - torch.stack([white.loc for white in within])[self.labels], log_weights.exp())
        found = list[tuple[Tensor, ...]]()
        for top, own, white in zip(tops, parts, within, strict=True):
            known = white if int(own.sum()) > MIXING.enough * z.shape[1] else pooled
            found.append((top, white.loc, known.scale_tril, torch.tensor(self.population.share(own)[0]).to(z)))
        return found

    def mixture(self) -> Mixture:
        """Return Gaussians for the base of a guide: some per mode, fitted to its draws, each with a wider one."""
        (z, log_weights, *_), (loc, factor, weights) = self.population, self.gaussians
        modes, dim = loc.shape
        number = max(1, min(MIXING.parts, 2 * MIXING.parts // modes, len(z) // (modes * MIXING.fitted * dim)))
        chances = torch.stack([self.labels == k for k in range(modes)]).double()
        others = [z[chances.multinomial(1).squeeze(-1)] for _ in range(number - 1)]  # draws of the modes
        factors = torch.cat((factor, *[factor / 2] * (number - 1)))
        found = Mixture(torch.cat((loc, *others)), factors, weights.clamp_min(1e-4).repeat(number) / number)
        found = found.fitted(z, log_weights.exp()) if number > 1 else found
        outer = found.loc, MIXING.wider * found.scale_tril, MIXING.share * found.weights
        return Mixture(*map(torch.cat, zip(found, outer, strict=True)))

    @torch.no_grad()
    def _complement(self, density: LogDensity, own: int) -> None:
        """Add weighted draws of the modes without particles, from mode ``own`` on, to the population's islands."""
        if own == len(self.places):
            return
        found, islands = self.population, len(self.population.log_evidences)
        scores = found.log_weights.double() + found.log_evidence
        parts = [(found.z, found.log_p, scores.where(self.label(found.z) < own, -math.inf), self.labels)]
        for k in range(own, len(self.places)):
            gaussian = MultivariateNormal(self.gaussians.loc[k], scale_tril=self.gaussians.scale_tril[k])
            x = gaussian.sample(torch.Size((MIXING.probes,)))
            heights, labels = density(x), self.label(x)
            scores = (heights - gaussian.log_prob(x)).double().nan_to_num(-math.inf, -math.inf, -math.inf)
            scores = scores.where(labels == k, -math.inf) - math.log(MIXING.probes)
            parts.append((x, heights, scores, torch.full_like(labels, k)))
        columns = ([x.reshape(islands, -1, *x.shape[1:]) for x in column] for column in zip(*parts, strict=True))
        z, log_p, scores, labels = (torch.cat(column, 1) for column in columns)
        weights, evidences = scores.flatten().log_softmax(0).to(found.log_weights), scores.logsumexp(-1)
        evidences, self.labels = evidences + math.log(islands), labels.flatten()
        self.population = Population(z.flatten(0, 1), weights, log_p.flatten(), evidences, *found[4:])

    def label(self, z: Tensor) -> Tensor:
        """Return the most likely mode of each vector, ``(N,)``."""
        return self.gaussians.log_joint(self._wrapped(z)).argmax(-1)


def _merged(labels: Tensor, x: Tensor) -> Tensor:
    """Assign the places of tiny modes to the nearest other mode; return labels without gaps, ``(N,)``."""
    counts = labels.bincount()
    kept = (counts >= min(float(counts.max()), max(2.0, MIXING.few * len(labels))))[labels]
    if not bool(kept.all()):
        labels = labels.clone()
        labels[~kept] = labels[kept][torch.cdist(x[~kept], x[kept]).argmin(-1)]
    return labels.unique(return_inverse=True)[1]


def _opposite_the_gap(wrapped: Wrapped, z: Tensor) -> Tensor:
    """Return, per coordinate, the angle opposite to the middle of the largest gap between places, ``(D,)``."""
    ordered = wrapped(z, torch.zeros_like(z[0])).sort(0).values
    gaps = torch.cat((ordered[1:], ordered[:1] + 2 * math.pi)) - ordered
    largest = gaps.argmax(0, keepdim=True)
    return (ordered.gather(0, largest) + gaps.gather(0, largest) / 2).squeeze(0) + math.pi


@torch.no_grad()
def _others(density: LogDensity, white: White, tops: Tensor, ends: Tensor) -> list[Tensor]:
    """Return the highest of some places, each ``(D,)``, of modes that contain no given top, then of those that do."""
    heights = density(ends).nan_to_num(-math.inf, -math.inf, -math.inf)
    ends, heights = ends[heights.isfinite()], heights[heights.isfinite()]
    labels = components(density, white, torch.cat((tops, ends)))
    known, labels = labels[: len(tops)].tolist(), labels[len(tops) :]
    found = [int(heights.where(labels == label, -math.inf).argmax()) for label in labels.unique()]
    found.sort(key=lambda top: -float(heights[top]))
    sides = ([top for top in found if (int(labels[top]) in known) == is_old] for is_old in (False, True))
    return [ends[top] for side in sides for top in side[: MIXING.others]]
