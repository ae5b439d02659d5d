"""The modes of a posterior and a mixture of Gaussians over them, from a population and from climbs.

Places whose climbs end at one connected top are one mode.  Climbs from other starts find narrow modes without
particles.  Draws of the Gaussians around these estimate their weights.

Maximum Likelihood from Incomplete Data via the EM Algorithm (Dempster, Laird, Rubin 1977).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..vjp import LogDensity
from .annealed_population import Population
from .climbs import CLIMBS, ascend, climb, components, highest_of_each
from .coordinates import White
from .gaussian import Gaussian, match_top

Wrapped = Callable[[Tensor, Tensor], Tensor]


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
            found = Mixture(
                torch.where(usable[:, None], loc, found.loc),
                torch.where(usable[:, None, None], scale_tril, found.scale_tril),
                total.clamp_min(1e-6),
            )
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
        self.population = population._replace(z=z)
        self.white = white = White(z, population.log_weights.exp())
        ends = self._wrapped(torch.cat([ascend(density, white, part) for part in z.split(1024)]))
        self.labels = _merged(components(density, white, ends), white.inverse(ends))
        with torch.no_grad():
            tops = ends[highest_of_each(self.labels, density(ends).nan_to_num(-math.inf, math.inf, -math.inf))]
        weights = [population.share(self.labels == k)[0] for k in range(len(tops))]
        modes = list(zip(tops, *self._gaussians(len(tops)), weights, strict=True))
        more = self._wrapped(climb(density, white, starts, CLIMBS.narrow))
        for top in _others(density, white, tops, torch.cat((more, tops))):
            found = match_top(density, top, white.scale_tril)
            if found is not None and self._lacks(found):
                weight = math.exp(min(found.elbo - population.log_evidence, MIXING.largest))
                modes.append((top, found.loc, found.scale_tril, weight))
        places, loc, scale_tril, weights = map(list, zip(*modes, strict=True))
        self.places = torch.stack(places)
        self.gaussians = Mixture(torch.stack(loc), torch.stack(scale_tril), torch.tensor(weights).to(z))
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

    def _gaussians(self, modes: int) -> tuple[Tensor, list[Tensor]]:
        """Fit a Gaussian to the particles of each mode; modes with few particles share a pooled covariance."""
        z, log_weights, *_ = self.population
        parts = [self.labels == k for k in range(modes)]
        within = [White(z[own], (log_weights[own] - log_weights[own].max()).exp()) for own in parts]
        loc = torch.stack([white.loc for white in within])
        pooled = White(z - loc[self.labels], log_weights.exp())
        enough = [int(own.sum()) > MIXING.enough * z.shape[1] for own in parts]
        return loc, [(own if known else pooled).scale_tril for own, known in zip(within, enough, strict=True)]

    def mixture(self) -> Mixture:
        """Return Gaussians for the base of a guide: some per mode, fitted to its draws, each with a wider one."""
        (z, log_weights, *_), (loc, factor, weights) = self.population, self.gaussians
        modes, dim = loc.shape
        number = max(1, min(MIXING.parts, 2 * MIXING.parts // modes, len(z) // (modes * MIXING.fitted * dim)))
        locs, factors = [loc], [factor]  # one at the mode's mean, the others at draws of the mode
        for _ in range(number - 1):
            chances = torch.stack([self.labels == k for k in range(modes)]).double()
            locs.append(z[chances.multinomial(1).squeeze(-1)])
            factors.append(factor / 2)
        found = Mixture(torch.cat(locs), torch.cat(factors), weights.clamp_min(1e-4).repeat(number) / number)
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
        z, log_p, scores, labels = (
            torch.cat([part.reshape(islands, -1, *part.shape[1:]) for part in column], 1)
            for column in zip(*parts, strict=True)
        )
        log_weights = scores.flatten().log_softmax(0).to(found.log_weights)
        log_evidences = scores.logsumexp(-1) + math.log(islands)
        self.population = found._replace(
            z=z.flatten(0, 1), log_p=log_p.flatten(), log_weights=log_weights, log_evidences=log_evidences
        )
        self.labels = labels.flatten()

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
    old = [top for top in found if int(labels[top]) in known]
    new = [top for top in found if top not in old]
    return [ends[top] for top in (*new[: MIXING.others], *old[: MIXING.others])]
