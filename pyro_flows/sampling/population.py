"""A population that is annealed from a law r to a posterior p: tempered sequential Monte Carlo.

N particles start as draws of r.  At each of some inverse temperatures β they are weighed against the law before, which
is proportional to r¹⁻ᵝ pᵝ, resampled by their weights, and moved by Hamiltonian Monte Carlo until they have forgotten
where they were.  The next β is as far away as the effective sample size of the weights allows.  The product of the mean
weights estimates p's evidence, with hardly a bias.  Particles live on islands, each resampled by itself: how much the
islands' estimates differ tells the error of all, lost modes included that some islands have found.  Each half of the
islands moves in coordinates that are white for the other half: in their own, particles would be whiter than new draws.

Sequential Monte Carlo Samplers (Del Moral, Doucet, Jasra 2006); An Adaptive Sequential Monte Carlo Method for
Approximate Bayesian Computation (Del Moral, Doucet, Jasra 2012); Adaptive Tuning of Hamiltonian Monte Carlo Within
Sequential Monte Carlo (Buchholz, Chopin, Jacob 2021, arXiv:1808.07730); On the Role of Interaction in Sequential Monte
Carlo Algorithms (Whiteley, Lee, Heine 2016, arXiv:1309.2918).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .coordinates import White
from .hmc import HMC
from .start_distribution import Reference

ISLANDS = 16
BATCH = 2048  # particles that are run at once
HOT, STUCK = 1e-12, 8  # an inverse temperature, and how many below it show that particles are stuck
TRIES, LEAST = 64, 32  # times as many draws of r to begin with, where few have a density, and how many must


class Effort(NamedTuple):
    """How thoroughly a population is annealed.

    Attributes:
        kept: The effective share of the particles that the weights of a step in temperature must leave.
        forgotten: The correlation with where they were at which particles have moved enough.
        moves: Transitions at each temperature, at least and at most.
        max_steps: The most leapfrog steps in a transition.
        gradients: How many gradients of all particles are taken at most; then it stops, wherever it is.
    """

    kept: float = 0.5
    forgotten: float = 0.1
    moves: tuple[int, int] = (3, 12)
    max_steps: int = 16
    gradients: float = math.inf


class Population(NamedTuple):
    """Weighted draws of a posterior.

    Attributes:
        z: The particles, ``(N, D)``.
        log_weights: Their log-weights, normalised, ``(N,)``.
        log_p: The posterior's log-density, not normalised, ``(N,)`` in nats.
        log_evidences: The log evidence as each of the islands sees it, ``(G,)`` in nats.
        temperatures: The inverse temperatures β, from 0 to 1, or as far as it came.
        start_se: The standard error, in nats, of the share of r where p has a density, which all islands share.
    """

    z: Tensor
    log_weights: Tensor
    log_p: Tensor
    log_evidences: Tensor
    temperatures: list[float]
    start_se: float = 0.0

    @property
    def has_arrived(self) -> bool:
        """True if it has come to the posterior."""
        return self.temperatures[-1] == 1

    @property
    def log_evidence(self) -> float:
        """The log evidence, in nats: that of the mean of the islands'."""
        return float(self.log_evidences.logsumexp(0)) - math.log(len(self.log_evidences))

    @property
    def log_evidence_se(self) -> float:
        """Its standard error, in nats."""
        relative = self.log_evidences.softmax(0) * len(self.log_evidences)
        return math.hypot(float(relative.std()) / math.sqrt(len(relative)), self.start_se)

    def share(self, among: Tensor) -> tuple[float, float]:
        """The weight of some of the particles, ``(N,)`` of bool or of shares, and its standard error."""
        islands = len(self.log_evidences)
        weights = self.log_weights.exp().reshape(islands, -1)
        inside = (weights * among.to(weights).reshape(islands, -1)).sum(-1)
        total = float(inside.sum())
        residual = inside - total * weights.sum(-1)
        return total, float(residual.norm()) * math.sqrt(islands / (islands - 1))


def anneal(reference: Reference, number: int, effort: Effort) -> Population | None:
    """Anneal a population.

    Particles from a prior of many magnitudes may be stuck.  They start anew from a wide Gaussian.

    Args:
        reference: The law that it starts from, and the posterior.
        number: The number N of particles, a multiple of the 16 islands.
        effort: How thoroughly to do it.

    Returns:
        The :class:`Population`; None where no particle has a density to begin with.
    """
    found = _annealed(reference, number, effort, HOT)
    if found is not None and found.temperatures[-1] < HOT and reference.widen():
        return _annealed(reference, number, effort)
    return found


@torch.no_grad()
def _annealed(reference: Reference, number: int, effort: Effort, hot: float = 0.0) -> Population | None:
    """Anneal a population as far as the effort goes, or some steps in temperature if it is then still too hot."""
    found = _begun(reference, number)
    if found is None:
        return None
    z, share, start_se = found
    log_r, log_p = _scored(reference, z)
    kernels: list[HMC] = []
    log_weights = torch.zeros(number).to(z)
    log_evidences, betas = torch.full((ISLANDS,), math.log(share), dtype=torch.float64, device=z.device), [0.0]
    while betas[-1] < 1 and sum(kernel.gradients for kernel in kernels) < 2 * effort.gradients:
        if len(betas) > STUCK and betas[-1] < hot:
            break
        log_ratio = (log_p - log_r).nan_to_num(-math.inf, -math.inf, -math.inf)
        step = _step(log_weights, log_ratio, 1 - betas[-1], effort.kept)
        betas.append(1.0 if step >= 1 - betas[-1] else betas[-1] + step)
        log_weights = log_weights + step * log_ratio
        by_island = log_weights.double().reshape(ISLANDS, -1)
        log_evidences += by_island.logsumexp(-1) - math.log(by_island.shape[1])
        picked = _resampled(by_island)
        z, log_weights = z[picked], torch.zeros_like(log_weights)
        density, charts = reference.bridge(betas[-1]), [White(half) for half in reversed(z.chunk(2))]
        kernels = kernels or [HMC(density, chart, z.shape[1], effort.max_steps) for chart in charts]
        for kernel, chart in zip(kernels, charts, strict=True):
            kernel.turn_to(density, chart)
        z = torch.cat([_moved(kernel, half, effort) for kernel, half in zip(kernels, z.chunk(2), strict=True)])
        log_r, log_p = _scored(reference, z)
    log_weights = log_evidences.log_softmax(0).repeat_interleave(number // ISLANDS) - math.log(number // ISLANDS)
    return Population(z, log_weights.to(z), log_p, log_evidences, betas, start_se)


def _begun(reference: Reference, number: int) -> tuple[Tensor, float, float] | None:
    """Draws of r at which p has a density, ``(number, D)``, the share of all that have, and the noise of its logarithm;
    None if too few have."""
    alive: list[Tensor] = []
    count = 0
    while sum(len(part) for part in alive) < number and count < TRIES * number:
        z = reference.draw(number)
        log_r, log_p = _scored(reference, z)
        alive.append(z[(log_r + log_p).isfinite()])
        count += number
    z = torch.cat(alive)
    if len(z) < LEAST:
        return None
    share = len(z) / count
    return (
        z[:number] if len(z) >= number else z[torch.randint(len(z), (number,))],
        share,
        math.sqrt((1 - share) / (share * count)),
    )


def _scored(reference: Reference, z: Tensor) -> tuple[Tensor, Tensor]:
    parts = [reference.log_r_and_p(part) for part in z.split(BATCH)]
    return torch.cat([log_r for log_r, _ in parts]), torch.cat([log_p for _, log_p in parts])


def _step(log_weights: Tensor, log_ratio: Tensor, most: float, least: float) -> float:
    """How far β may rise: as far as the weights keep an effective share of the particles."""

    def kept(step: float) -> float:
        found = log_weights + step * log_ratio
        found = found - found.max()
        return float((2 * found.logsumexp(0) - (2 * found).logsumexp(0)).exp()) / len(found)

    low, high = 0.0, most
    if kept(most) >= least:
        return most
    for _ in range(50):
        middle = (low + high) / 2 if low else high / 10  # β may begin many orders of magnitude below 1
        low, high = (middle, high) if kept(middle) >= least else (low, middle)
        if low and high / low < 1.01:
            break
    return low or high


def _resampled(log_weights: Tensor) -> Tensor:
    """Indices of particles by their weights on islands, ``(G, n)``: systematic on each, ``(G * n,)``."""
    islands, number = log_weights.shape
    ends = log_weights.softmax(-1).cumsum(-1)
    points = (torch.arange(number) + torch.rand(islands, 1)).to(ends) / number
    picked = torch.searchsorted(ends, points).clamp_max(number - 1)
    return (picked + number * torch.arange(islands, device=picked.device).unsqueeze(-1)).flatten()


def _moved(kernel: HMC, z: Tensor, effort: Effort) -> Tensor:
    """Move particles until they have forgotten where they were, and how far from the middle."""
    start = _features(kernel.chart.inverse(z))
    least, most = effort.moves
    for count in range(1, most + 1):
        z = torch.cat([kernel.move(part, adapt=True)[0] for part in z.split(BATCH)])
        kept = (start * _features(kernel.chart.inverse(z))).sum(0)
        if count >= least and float(kept.max()) < effort.forgotten:
            break
    return z


def _features(x: Tensor) -> Tensor:
    """The coordinates and the square of the distance from the middle, centred and of norm 1, ``(N, D + 1)``."""
    found = torch.cat((x, x.square().sum(-1, keepdim=True)), -1)
    found = found - found.mean(0)
    return found / found.norm(dim=0).clamp_min(1e-12)
