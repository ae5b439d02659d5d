"""A population annealed from a distribution r to a posterior p: tempered sequential Monte Carlo.

N particles start as draws of r.  A sequence of inverse temperatures β leads through distributions proportional to
r¹⁻ᵝ pᵝ.  At each β the particles are weighted, resampled and moved by Hamiltonian Monte Carlo until they have forgotten
their places.  The effective sample size of the weights determines the next β.  The product of the mean weights is a
nearly unbiased estimate of the evidence.

The distribution r is the prior where possible.  Flat priors cannot be sampled, and masked priors are not sampled from
their densities.  Such latents get a wide Gaussian in the unconstrained space.  All latents get one if hardly a draw of
the prior has a density, or if particles from the prior are stuck, as from a prior that spans the range of floats.

The particles live on islands, and each island is resampled separately.  The scatter of the islands' estimates gives the
standard error of their mean.  It includes the error from modes that only some islands have found.  Each half of the
islands moves in coordinates whitened by the other half: whitened by themselves, particles would be whiter than new
draws.

Bridge sampling combines the particles with draws of a guide q.  With n draws of p and m of q, both normalised, the
ratio r of p's unnormalised density to its normalised one solves::

    r = Σ_q[l / (n l + m r)] / m  ·  n / Σ_p[1 / (n l + m r)],    l = p / q with p not normalised

No term exceeds 1 / n or 1 / (m r).  So regions where the guide rarely draws do not spoil the evidence if particles
cover them.  They do spoil the mean of l over draws of q.

Sequential Monte Carlo Samplers (Del Moral, Doucet, Jasra 2006); An Adaptive Sequential Monte Carlo Method for
Approximate Bayesian Computation (Del Moral, Doucet, Jasra 2012); Adaptive Tuning of Hamiltonian Monte Carlo Within
Sequential Monte Carlo (Buchholz, Chopin, Jacob 2021, arXiv:1808.07730); On the Role of Interaction in Sequential Monte
Carlo Algorithms (Whiteley, Lee, Heine 2016, arXiv:1309.2918); Simulating Ratios of Normalizing Constants via a Simple
Identity (Meng, Wong 1996); A Tutorial on Bridge Sampling (Gronau et al. 2017, arXiv:1703.05984).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..vjp import LogDensity
from .chains import HMC, Chains, Graphs, Target
from .coordinates import White
from .gaussian import fit_gaussian

IsEnough = Callable[[Tensor, Tensor, Tensor], bool]
ISLANDS = 16
HOT, STUCK = 1e-12, 8  # particles are stuck if this inverse temperature is not reached in so many steps
SWEEPS, PROPOSED = 20, 8  # sweeps that move particles on, and draws of the guide proposed after each
WIDE = 10.0  # standard deviation of a wide Gaussian, in units and in those of the Gaussian nearest to the posterior
ALIVE = 0.1  # share of the prior's draws that must have a density
TRIED = 500  # draws that estimate this share
BATCH = 2048  # particles per run of the model


@dataclass(frozen=True)
class Prior:
    """A posterior p and the prior of its coordinates, as functions of vectors, ``(N, D)``, NaN where models break down.

    Attributes:
        draw: Returns draws of the prior, as many as there are vectors; coordinates with flat priors stay.
        log_p: The log-density of p.
        log_prior_and_p: The log-densities of the prior, without coordinates with flat priors, and of p, ``(N, 2)``.
        flat: True for the coordinates whose priors cannot be drawn, ``(D,)``.
        in_parts: Lets a log-density of vectors, and of tensors that all share, find its gradient part by part.
        takes_a_run: True if the log-density of the prior costs as much as that of p.
    """

    draw: Callable[[Tensor], Tensor]
    log_p: LogDensity
    log_prior_and_p: Callable[[Tensor], Tensor]
    flat: Tensor
    in_parts: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
    takes_a_run: bool


class WideGaussian(NamedTuple):
    """Gaussian over vectors ``(D,)``.

    torch's ``MultivariateNormal`` is not used because its first call imports sympy, which takes a third of a second.
    """

    loc: Tensor
    scale_tril: Tensor

    def sample(self, number: int) -> Tensor:
        """Sample vectors, ``(number, D)``."""
        return self.loc + torch.randn(number, len(self.loc)).to(self.loc) @ self.scale_tril.T

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density over vectors, ``(N, D) -> (N,)``."""
        size = torch.linalg.solve_triangular(self.scale_tril, (z - self.loc).T, upper=False).square().sum(0)
        return -size / 2 - self.scale_tril.diagonal().log().sum() - len(self.loc) / 2 * math.log(2 * math.pi)


class Reference:
    """The distribution r that leads to a posterior p.

    Args:
        prior: The prior and the posterior.
        loc: A centre of the posterior as far as known, ``(D,)``.
        scale_tril: The Cholesky factor of a covariance around it, ``(D, D)``; None to search for the nearest Gaussian
            from ``loc`` if one is needed.
    """

    def __init__(self, prior: Prior, loc: Tensor, scale_tril: Tensor | None = None) -> None:
        self._prior, self._loc, self._scale_tril = prior, loc, scale_tril
        self._exact = prior.in_parts(self._exact_log_p)
        self._flat, self._wide = torch.zeros_like(loc, dtype=torch.bool), cast(WideGaussian | None, None)
        if prior.flat.any():
            self.widen(prior.flat.to(loc.device))
        before = self._flat, self._wide
        if not self._flat.all() and (alive := self._alive()) < ALIVE and self.widen() and self._alive() <= alive:
            self._flat, self._wide = before
        self._mixed = prior.in_parts(self._mixture)

    def widen(self, flat: Tensor | None = None) -> bool:
        """Replace the prior of some coordinates, by default all, by a wide Gaussian; return False if r is one."""
        if self._flat.all():
            return False
        loc, scale_tril, flat = self._loc, self._scale_tril, torch.ones_like(self._flat) if flat is None else flat
        if scale_tril is None:
            loc, scale_tril, *_ = fit_gaussian(self._prior.log_p, loc, 1.0, rounds=50)
        covariance = WIDE**2 * (scale_tril @ scale_tril.T + torch.eye(len(loc)).to(loc))[flat][:, flat]
        self._flat, self._wide = flat, WideGaussian(loc[flat], torch.linalg.cholesky(covariance))
        self._mixed = self._prior.in_parts(self._mixture)
        return True

    def draw(self, number: int) -> Tensor:
        """Sample r, ``(number, D)``; draws that overflow are not finite."""
        z = self._loc.expand(number, -1).clone()
        if self._wide is not None:
            z[:, self._flat] = self._wide.sample(number)
        return z if self._flat.all() else self._prior.draw(z).to(z)

    def log_r_and_p(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-densities of r and p over z, each ``(N,)`` in nats; NaN where the model breaks down."""
        if self._flat.all():
            log_p = torch.cat([self._prior.log_p(part) for part in z.split(BATCH)])
            log_r = torch.zeros(len(z)).to(z)
        else:
            log_r, log_p = torch.cat([self._prior.log_prior_and_p(part) for part in z.split(BATCH)]).unbind(-1)
        if self._wide is not None:
            log_r = log_r + self._wide.log_prob(z[:, self._flat])
        return log_r.masked_fill(_is_lost(log_r), math.nan), log_p

    def log_p(self, z: Tensor) -> Tensor:
        """Return the log-density of p over z, ``(N,)`` in nats; NaN where rounding errors of the prior may hide it.

        Far out a huge log prior may be cancelled by as huge a log-likelihood, and their sum is noise.
        """
        return self._prior.log_p(z) if self._prior.takes_a_run else self._exact(z)

    def _exact_log_p(self, z: Tensor) -> Tensor:
        log_prior, log_p = self._prior.log_prior_and_p(z).unbind(-1)
        return log_p.masked_fill(_is_lost(log_prior), math.nan)

    def bridge(self, beta: float) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """Return the log-density of r¹⁻ᵝ pᵝ, up to a constant, and the tensors that it takes after the vectors."""
        return (self._prior.log_p, ()) if beta == 1 else (self._mixed, (torch.tensor(beta).to(self._loc),))

    def _mixture(self, z: Tensor, beta: Tensor) -> Tensor:
        log_r, log_p = self.log_r_and_p(z)
        return (1 - beta) * log_r + beta * log_p

    @torch.no_grad()
    def _alive(self) -> float:
        """Return the share of some draws of r at which p has a density."""
        log_r, log_p = self.log_r_and_p(self.draw(TRIED))
        return float((log_r + log_p).isfinite().double().mean())


def _is_lost(log_density: Tensor) -> Tensor:
    """Return True for log-densities with rounding errors above 0.1 nats: priors such as 1 / v reach e^±200."""
    return log_density.detach().abs() * torch.finfo(log_density.dtype).eps > 0.1


class Effort(NamedTuple):
    """Settings of annealing.

    Attributes:
        kept: The effective share of the particles that a step in temperature keeps.
        forgotten: The autocorrelation below which particles have moved enough.
        moves: The least and the largest number of transitions per temperature.
        max_steps: The largest number of leapfrog steps per transition.
        gradients: The largest number of gradients per particle, at which annealing stops.
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
        log_weights: Their normalised log-weights, ``(N,)``.
        log_p: The posterior's log-density, not normalised, ``(N,)`` in nats.
        log_evidences: The estimates of the log evidence by the islands, ``(G,)`` in nats.
        temperatures: The inverse temperatures β, from 0 to 1 if annealing is complete.
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
        """True if the population has reached the posterior."""
        return self.temperatures[-1] == 1

    @property
    def log_evidence(self) -> float:
        """The log evidence, in nats: the logarithm of the islands' mean evidence."""
        return float(self.log_evidences.logsumexp(0)) - math.log(len(self.log_evidences))

    @property
    def log_evidence_se(self) -> float:
        """The standard error of the log evidence, in nats."""
        relative = self.log_evidences.softmax(0) * len(self.log_evidences)
        return math.hypot(float(relative.std()) / math.sqrt(len(relative)), self.start_se)

    def share(self, among: Tensor) -> tuple[float, float]:
        """Return the weight of some particles, ``(N,)`` of bool or of shares, and its standard error."""
        islands = len(self.log_evidences)
        weights = self.log_weights.exp().reshape(islands, -1)
        inside = (weights * among.to(weights).reshape(islands, -1)).sum(-1)
        total = float(inside.sum())
        residual = inside - total * weights.sum(-1)
        return total, float(residual.norm()) * math.sqrt(islands / (islands - 1))


@torch.no_grad()
def anneal(
    reference: Reference, number: int, effort: Effort, hot: float = HOT, is_enough: IsEnough | None = None
) -> Population | None:
    """Anneal a population until its effort is spent.

    If particles are stuck, as may be those from a prior of many magnitudes, they start again from a wide Gaussian.

    Args:
        reference: The distribution r to start from, and the posterior.
        number: The number N of particles, a multiple of the 16 islands.
        effort: The settings.
        hot: Particles are stuck if they do not reach this inverse temperature in a few steps.
        is_enough: Returns True if annealing may end before the posterior is reached, given the particles, their
            log-densities, and the log-weights that would turn them into draws of the posterior.

    Returns:
        The :class:`Population`; None if hardly a draw of r has a density.
    """
    start = _start(reference, number)
    if start is None:
        return None
    z, log_evidence, start_se = start
    log_r, log_p = reference.log_r_and_p(z)
    kernels, betas, graphs = list[HMC](), [0.0], Graphs()
    log_evidences = torch.full((ISLANDS,), log_evidence, dtype=torch.float64, device=z.device)
    while betas[-1] < 1 and sum(kernel.gradients for kernel in kernels) < 2 * effort.gradients:
        if len(betas) > STUCK and betas[-1] < hot:
            if reference.widen():
                return anneal(reference, number, effort, 0.0, is_enough)
            break
        log_ratio = (log_p - log_r).nan_to_num(-math.inf, -math.inf, -math.inf)
        step = _step(log_ratio, 1 - betas[-1], effort.kept)
        betas.append(1.0 if step >= 1 - betas[-1] else betas[-1] + step)
        by_island = (step * log_ratio).double().reshape(ISLANDS, -1)
        log_evidences += by_island.logsumexp(-1) - math.log(by_island.shape[1])
        picked = systematic(by_island.softmax(-1), by_island.shape[1]).unsqueeze(-1)
        halves = z.reshape(ISLANDS, -1, z.shape[1]).take_along_dim(picked, 1).flatten(0, 1).chunk(2)
        (density, given), coordinates = reference.bridge(betas[-1]), [White(half) for half in reversed(halves)]
        kernels = kernels or [HMC(density, one, z.shape[1], effort.max_steps, graphs=graphs) for one in coordinates]
        for kernel, white in zip(kernels, coordinates, strict=True):
            kernel.retarget(density, white, *given)
        z = torch.cat([_moved(kernel, half, effort) for kernel, half in zip(kernels, halves, strict=True)])
        log_r, log_p = reference.log_r_and_p(z)
        if is_enough is not None and betas[-1] < 1 and is_enough(z, log_p, (1 - betas[-1]) * (log_p - log_r)):
            break
    log_weights = log_evidences.log_softmax(0).repeat_interleave(number // ISLANDS) - math.log(number // ISLANDS)
    return Population(z, log_weights.to(z), log_p, log_evidences, betas, start_se)


def _start(reference: Reference, number: int) -> tuple[Tensor, float, float] | None:
    """Draw particles from r where p has a density; return them, and the logarithm of r's share there with its error.

    None if too few draws have a density.
    """
    parts, count = list[Tensor](), 0
    while sum(map(len, parts)) < number and count < 64 * number:  # few draws of r may have a density
        z = reference.draw(number)
        log_r, log_p = reference.log_r_and_p(z)
        parts.append(z[(log_r + log_p).isfinite()])
        count += number
    z = torch.cat(parts)
    if len(z) < 32:
        return None
    share = len(z) / count
    z = z[:number] if len(z) >= number else z[torch.randint(len(z), (number,))]
    return z, math.log(share), math.sqrt((1 - share) / (share * count))


def _step(log_ratio: Tensor, most: float, least: float) -> float:
    """Return the largest step in β after which the weights keep an effective share ``least`` of the particles."""

    def kept(step: float) -> float:
        found = step * (log_ratio - log_ratio.max())
        return float((2 * found.logsumexp(0) - (2 * found).logsumexp(0)).exp()) / len(found)

    low, high = 0.0, most
    if kept(most) >= least:
        return most
    for _ in range(50):
        middle = (low + high) / 2 if low else high / 10  # the first β may be many orders of magnitude below 1
        low, high = (middle, high) if kept(middle) >= least else (low, middle)
        if low and high / low < 1.01:
            break
    return low or high


def _moved(kernel: HMC, z: Tensor, effort: Effort) -> Tensor:
    """Move particles until they have forgotten their places and their distances from the centre."""

    def features(z: Tensor) -> Tensor:
        x = kernel.coordinates.inverse(z)
        found = torch.cat((x, x.square().sum(-1, keepdim=True)), -1)
        found = found - found.mean(0)
        return found / found.norm(dim=0).clamp_min(1e-12)

    start, (least, most) = features(z), effort.moves
    for count in range(1, most + 1):
        z = torch.cat([kernel.move(part, adapt=True)[0] for part in z.split(BATCH)])
        if count >= least and float((start * features(z)).sum(0).max()) < effort.forgotten:
            break
    return z


def moved_on(target: Target, population: Population) -> Population:
    """Move the particles of a population as chains, in the coordinates of a guide and by its draws."""
    chains = Chains(target.log_p, target.coordinates(population.z), population.z, max_steps=16)
    for _ in range(SWEEPS):
        chains.sweep(adapt=True)
        chains.propose(target.draw, target.log_q, PROPOSED)
    return population._replace(z=chains.z, log_p=chains.log_p)


def bridge(population: Population, of_p: Tensor, of_q: Tensor) -> tuple[float, float]:
    """Return the log evidence and its standard error, in nats; the error is infinite without an overlap.

    Args:
        population: Weighted draws of the posterior, whose islands give their sampling error.
        of_p: The log-ratios log p - log q of these draws, ``(N,)``.
        of_q: The log-ratios of draws of the guide, ``(M,)``.
    """
    of_p, of_q = (x.double().nan_to_num(-math.inf, math.inf, -math.inf) for x in (of_p, of_q))
    log_weights = population.log_weights.double()
    number = 1 / float(log_weights.exp().square().sum())
    odds, log_r = math.log(number / len(of_q)), float(of_q.logsumexp(0)) - math.log(len(of_q))
    for _ in range(200):
        above = logsigmoid(of_q + odds - log_r)  # at draws of q, the logarithm of p's share of the two densities
        below = logsigmoid(log_r - of_p - odds)  # at draws of p, the logarithm of q's share
        mean_above = float(above.logsumexp(0)) - math.log(len(of_q))
        mean_below = float((log_weights + below).logsumexp(0))
        change = mean_above - mean_below - odds
        log_r += change / 2  # whole steps may oscillate
        if abs(change) < 1e-4:  # nats
            break
    else:
        return log_r, math.inf
    relative = (above - mean_above).exp()
    _, noise = population.share((below - mean_below).exp())
    return log_r, math.hypot(float(relative.std()) / math.sqrt(len(of_q)), noise)


def systematic(weights: Tensor, number: int) -> Tensor:
    """Resample systematically by weights ``(*batch, S)``; return indices in increasing order, ``(*batch, number)``.

    They are those of N points u, u + 1/N, u + 2/N, … on the cumulated weights (Douc, Cappé, Moulines 2005).
    """
    edges = weights.double().cumsum(-1)
    end = edges[..., -1:]
    offset, steps = torch.rand_like(end), torch.arange(number, device=end.device)
    # A point that is rounded up to the very end would lie beyond the last draw of positive weight.
    points = ((steps + offset) / number * end).minimum(end.nextafter(torch.zeros_like(end)))
    # Without any weight the edges are NaN, and no index is right.
    return torch.searchsorted(edges, points, right=True).clamp_max(weights.shape[-1] - 1)
