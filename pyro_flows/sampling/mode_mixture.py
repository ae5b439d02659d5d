"""The modes of a posterior, as a population has found them, and climbs beside it.

Places from which climbs lead to one connected top are one mode.  Climbs from elsewhere find narrow modes that no
particle has met; what these weigh is told by draws of the Gaussians around them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..programs.latent_space import LatentSpace
from ..programs.log_density import LogDensity, or_nan
from .coordinates import White
from .gaussian import Gaussian, match_top
from .mixture import FITTED, Mixture
from .modes import NARROW, ascend, climb, components
from .population import Population

ENOUGH = 5  # particles a dimension that a mode's own covariance takes
PROBES = 1024  # draws that tell what a mode without particles weighs, a multiple of the islands
WIDER = 1.5, 0.02  # each Gaussian has one beside it that is as much wider, with a share
PARTS = 8  # Gaussians in each mode at most, and half of those in all modes but for one each
OTHERS, LITTLE = 8, 6.0  # modes without particles that are looked at; nats by which they may lie below the evidence
LARGEST = 500.0  # nats by which they may lie above it, for numbers to hold them
FEW = 0.002  # the share of the particles that a mode must have, to be more than a place where climbs got stuck


class Tops:
    """The modes that a population has found, and others, in which it has no particles.

    Args:
        space: The space of a guide that draws packed, unconstrained latents.
        population: The population.
        starts: Places from which climbs look for other modes, ``(n, D)``.

    Attributes:
        population: The population, with weighed draws of the modes in which it had no particles.
        labels: The mode of each particle, ``(N,)``.
        chart: Coordinates in which the population is white.
        places: Where each mode is highest, ``(K, D)``.
        heights: The log-density there, ``(K,)`` in nats.
        laws: A Gaussian around each.
        weights: About what each weighs, ``(K,)``, relative to the population.
    """

    def __init__(self, space: LatentSpace, population: Population, starts: Tensor) -> None:
        centre, density = _opposite_the_gap(space, population.z), or_nan(space.log_p)
        self._space, self._centre = space, centre
        z = space.wrapped(population.z, centre)
        self._met = population = population._replace(z=z)
        self.chart = chart = White(z, population.log_weights.exp())
        ends = space.wrapped(torch.cat([ascend(density, chart, part) for part in z.split(1024)]), centre)
        self._labels = _merged(components(density, chart, ends), chart.inverse(ends))
        with torch.no_grad():
            heights = density(ends).nan_to_num(-math.inf, math.inf, -math.inf)
        tops = [int(heights.where(self._labels == k, -math.inf).argmax()) for k in range(int(self._labels.max()) + 1)]
        places, laws, self._own = list(ends[tops]), self._gaussians(), len(tops)
        weights = [population.share(self._labels == k)[0] for k in range(len(tops))]
        more = space.wrapped(climb(density, chart, starts, NARROW), centre)
        for top in _others(density, chart, ends[tops], torch.cat((more, ends[tops]))):
            found = match_top(density, top, chart.scale_tril)
            if found is not None and self._lacks(found):
                places.append(top)
                laws.append((found.loc, found.scale_tril))
                weights.append(math.exp(min(found.elbo - population.log_evidence, LARGEST)))
        self.places, self.weights = torch.stack(places), torch.tensor(weights).to(z)
        with torch.no_grad():
            self.heights = density(self.places)
        loc, scale_tril = (torch.stack(list(part)) for part in zip(*laws, strict=True))
        self.laws = MultivariateNormal(loc, scale_tril=scale_tril)
        self.population, self.labels = self._complemented(density)

    def _lacks(self, found: Gaussian) -> bool:
        """Return True if a mode has mass that counts, but next to no particles or only copies of a few."""
        apart = self._met.z - found.loc
        distance = torch.linalg.solve_triangular(found.scale_tril, apart.T, upper=False).norm(dim=0)
        inside = distance < math.sqrt(len(found.loc)) + 3
        copies, place = self._met.z[inside].unique(dim=0, return_inverse=True)
        weights = torch.zeros(len(copies)).to(copies).index_add(0, place, self._met.log_weights[inside].exp())
        is_rare = float(weights.sum()) ** 2 < ENOUGH * len(found.loc) * float(weights.square().sum())
        mass = found.elbo - self._met.log_evidence
        lacks = self._met.share(inside)[0] < math.exp(min(mass, 0.0)) / 4
        return mass > -LITTLE and (lacks or is_rare)

    def _gaussians(self) -> list[tuple[Tensor, Tensor]]:
        """A Gaussian around the particles of each mode; modes of few of them share what is known of all."""
        z, log_weights = self._met.z, self._met.log_weights
        parts = [self._labels == k for k in range(int(self._labels.max()) + 1)]
        within = [White(z[mine], (log_weights[mine] - log_weights[mine].max()).exp()) for mine in parts]
        loc = torch.stack([white.loc for white in within])
        pooled = White(z - loc[self._labels], log_weights.exp()).scale_tril
        enough = [int(mine.sum()) > ENOUGH * z.shape[1] for mine in parts]
        factors = [white.scale_tril if known else pooled for white, known in zip(within, enough, strict=True)]
        return list(zip(loc, factors, strict=True))

    def mixture(self) -> Mixture:
        """Gaussians for the base of a guide: some for each mode, fitted to its particles, and wider ones too."""
        own, population, (wider, share) = self._own, self._met, WIDER
        loc, factor, weights = self.laws.loc, self.laws.scale_tril, self.weights.clamp_min(1e-4)
        most = len(population.z) // (own * FITTED * loc.shape[1])
        number = max(1, min(PARTS, 2 * PARTS // own, most))
        parts = [(loc[:own], factor[:own])]  # at the mode's mean, others at particles of the mode
        for _ in range(number - 1):
            chances = torch.stack([self._labels == k for k in range(own)]).double()
            parts.append((population.z[chances.multinomial(1).squeeze(-1)], factor[:own] / 2))
        locs, factors = (torch.cat(list(part)) for part in zip(*parts, strict=True))
        seen = Mixture(locs, factors, weights[:own].repeat(number) / number)
        seen = seen.fitted(population.z, population.log_weights.exp()) if number > 1 else seen
        loc, factor = torch.cat((seen.loc, loc[own:])), torch.cat((seen.scale_tril, factor[own:]))
        weights = torch.cat((seen.weights, weights[own:]))
        return Mixture(
            torch.cat((loc, loc)), torch.cat((factor, wider * factor)), torch.cat((weights, share * weights))
        )

    @torch.no_grad()
    def _complemented(self, density: LogDensity) -> tuple[Population, Tensor]:
        """The population and its labels, with weighed draws of the modes without particles: some on each island."""
        found, own, islands = self._met, self._own, len(self._met.log_evidences)
        if own == len(self.places):
            return found, self._labels
        scores = found.log_weights.double() + found.log_evidence
        scores = scores.where(self.label(found.z) < own, -math.inf)
        z, log_p, masses, labels = [found.z], [found.log_p], [scores], [self._labels]
        for k in range(own, len(self.places)):
            law = MultivariateNormal(self.laws.loc[k], scale_tril=self.laws.scale_tril[k])
            x = law.sample(torch.Size((PROBES,)))
            heights = density(x)
            weights = (heights - law.log_prob(x)).double().nan_to_num(-math.inf, -math.inf, -math.inf)
            z.append(x)
            log_p.append(heights)
            labels.append(torch.full((PROBES,), k).to(self._labels))
            masses.append(weights.where(self.label(x) == k, -math.inf) - math.log(PROBES))
        by_island = torch.cat([part.reshape(islands, -1) for part in masses], 1)
        population = found._replace(
            z=torch.cat([part.reshape(islands, -1, part.shape[-1]) for part in z], 1).flatten(0, 1),
            log_p=torch.cat([part.reshape(islands, -1) for part in log_p], 1).flatten(),
            log_weights=by_island.flatten().log_softmax(0).to(found.log_weights),
            log_evidences=by_island.logsumexp(-1) + math.log(islands),
        )
        return population, torch.cat([part.reshape(islands, -1) for part in labels], 1).flatten()

    def label(self, z: Tensor) -> Tensor:
        """The mode that each of other vectors most likely belongs to, ``(N,)``."""
        if len(self.places) == 1:
            return torch.zeros(len(z), dtype=torch.long, device=z.device)
        z = self._space.wrapped(z, self._centre)
        return torch.cat(
            [(self.laws.log_prob(part.unsqueeze(1)) + self.weights.log()).argmax(-1) for part in z.split(1000)]
        )


def _merged(labels: Tensor, x: Tensor) -> Tensor:
    """Give places of modes with next to no places to those next to them; return labels ``(N,)`` without gaps."""
    counts = labels.bincount()
    kept = (counts >= min(float(counts.max()), max(2.0, FEW * len(labels))))[labels]
    if not bool(kept.all()):
        labels = labels.clone()
        labels[~kept] = labels[kept][torch.cdist(x[~kept], x[kept]).argmin(-1)]
    return labels.unique(return_inverse=True)[1]


def _opposite_the_gap(space: LatentSpace, z: Tensor) -> Tensor:
    """The angle, in each coordinate, that lies opposite to the largest gap between those of places, ``(D,)``."""
    ordered = space.wrapped(z, torch.zeros_like(z[0])).sort(0).values
    gaps = torch.cat((ordered[1:], ordered[:1] + 2 * math.pi)) - ordered
    largest = gaps.argmax(0, keepdim=True)
    return (ordered.gather(0, largest) + gaps.gather(0, largest) / 2).squeeze(0) + math.pi


@torch.no_grad()
def _others(density: LogDensity, chart: White, tops: Tensor, ends: Tensor) -> list[Tensor]:
    """The highest of some places, each ``(D,)``, of the modes without and with one of the given tops."""
    heights = density(ends).nan_to_num(-math.inf, -math.inf, -math.inf)
    ends, heights = ends[heights.isfinite()], heights[heights.isfinite()]
    labels = components(density, chart, torch.cat((tops, ends)))
    known, labels = labels[: len(tops)], labels[len(tops) :]
    found = [int(heights.where(labels == label, -math.inf).argmax()) for label in labels.unique()]
    found.sort(key=lambda top: -float(heights[top]))
    is_known = [bool((known == labels[top]).any()) for top in found]
    kinds = ([top for top, old in zip(found, is_known, strict=True) if old == kind] for kind in (False, True))
    return [ends[top] for tops in kinds for top in tops[:OTHERS]]
