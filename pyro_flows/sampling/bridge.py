"""The evidence by bridge sampling: from draws of the posterior p and of a guide q, each weighed against both.

With n draws of p and m of q, both normalised, the ratio r of p's unnormalised density to its normalised one solves::

    r = Σ_q[l / (n l + m r)] / m  ·  n / Σ_p[1 / (n l + m r)],    l = p / q with p not normalised

No weight is larger than 1 / n or 1 / m.  So what a guide draws too rarely does not spoil the evidence, as it does the
mean of l over draws of q, so long as draws of p are there.

Simulating Ratios of Normalizing Constants via a Simple Identity (Meng, Wong 1996); A Tutorial on Bridge Sampling
(Gronau et al. 2017, arXiv:1703.05984).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..programs.log_density import or_nan
from ..programs.space import Space
from .chains import Chains
from .non_centred import coordinates_of
from .population import Population

SWEEPS, PROPOSED = 20, 8  # by which particles forget what the population lacked, and draws of the guide at each
ROUNDS = 100  # of the fixed-point iteration
BATCH = 4096  # draws of the guide that are computed at once


def moved_on(space: Space, population: Population) -> Population:
    """Move the particles of a population as chains of a guide's space: in its coordinates, and by its draws."""
    density, log_q = or_nan(space.log_p), or_nan(space.log_q)
    chains = Chains(density, coordinates_of(space, population.z), population.z, max_steps=16)
    for _ in range(SWEEPS):
        chains.sweep(adapt=True)
        chains.propose(lambda number: space.draw(number, batch_size=BATCH), log_q, PROPOSED)
    return population._replace(z=chains.z, log_p=chains.log_p)


def bridge(population: Population, of_p: Tensor, of_q: Tensor) -> tuple[float, float]:
    """The log evidence and its standard error, in nats.

    Args:
        population: Weighted draws of the posterior; its islands tell their noise.
        of_p: Their log-ratios log p - log q, ``(N,)``.
        of_q: Those of draws of the guide, ``(M,)``.
    """
    of_p, of_q = (x.double().nan_to_num(-math.inf, math.inf, -math.inf) for x in (of_p, of_q))
    number = 1 / float(population.log_weights.double().exp().square().sum())
    share = number / (number + len(of_q))
    odds, log_r = math.log(share / (1 - share)), float(of_q.logsumexp(0)) - math.log(len(of_q))
    for _ in range(ROUNDS):
        above = torch.sigmoid(of_q + odds - log_r)  # of draws of q, p's share of the two densities
        below, noise = population.share(torch.sigmoid(log_r - of_p - odds))
        change = math.log(float(above.mean()) / share) - math.log(below / (1 - share))
        log_r += change
        if abs(change) < 1e-6:
            break
    return log_r, math.hypot(float(above.std() / above.mean()) / math.sqrt(len(of_q)), noise / below)
