"""The evidence by bridge sampling: from draws of the posterior p and of a guide q, each weighed against both.

With n draws of p and m of q, both normalised, the ratio r of p's unnormalised density to its normalised one solves::

    r = Σ_q[l / (n l + m r)] / m  ·  n / Σ_p[1 / (n l + m r)],    l = p / q with p not normalised

No term is larger than 1 / n or 1 / (m r).  So what a guide draws too rarely does not spoil the evidence, as it does the
mean of l over draws of q, so long as draws of p are there.

Simulating Ratios of Normalizing Constants via a Simple Identity (Meng, Wong 1996); A Tutorial on Bridge Sampling
(Gronau et al. 2017, arXiv:1703.05984).
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..programs.latent_space import LatentSpace
from ..programs.log_density import or_nan
from .chains import Chains
from .non_centred import coordinates_of
from .population import Population

SWEEPS, PROPOSED = 20, 8  # by which particles forget what the population lacked, and draws of the guide at each
ROUNDS, CLOSE = 200, 1e-4  # of the fixed-point iteration; the step, in nats, at which it ends
BATCH = 4096  # draws of the guide that are computed at once


def moved_on(space: LatentSpace, population: Population) -> Population:
    """Move the particles of a population as chains of a guide's space: in its coordinates, and by its draws."""
    density, log_q = or_nan(space.log_p), or_nan(space.log_q)
    chains = Chains(density, coordinates_of(space, population.z), population.z, max_steps=16)
    for _ in range(SWEEPS):
        chains.sweep(adapt=True)
        chains.propose(lambda number: space.draw(number, batch_size=BATCH), log_q, PROPOSED)
    return population._replace(z=chains.z, log_p=chains.log_p)


def bridge(population: Population, of_p: Tensor, of_q: Tensor) -> tuple[float, float]:
    """Return the log evidence and its standard error, in nats; the error is infinite without an overlap.

    Args:
        population: Weighted draws of the posterior; its islands tell their noise.
        of_p: Their log-ratios log p - log q, ``(N,)``.
        of_q: Those of draws of the guide, ``(M,)``.
    """
    of_p, of_q = (x.double().nan_to_num(-math.inf, math.inf, -math.inf) for x in (of_p, of_q))
    log_weights = population.log_weights.double()
    number = 1 / float(log_weights.exp().square().sum())
    odds, log_r = math.log(number / len(of_q)), float(of_q.logsumexp(0)) - math.log(len(of_q))
    for _ in range(ROUNDS):
        above = logsigmoid(of_q + odds - log_r)  # of draws of q, the logarithm of p's share of the two densities
        below = logsigmoid(log_r - of_p - odds)  # of draws of p, that of q's share
        mean_above = float(above.logsumexp(0)) - math.log(len(of_q))
        mean_below = float((log_weights + below).logsumexp(0))
        change = mean_above - mean_below - odds
        log_r += change / 2  # a whole step may lead back and forth
        if abs(change) < CLOSE:
            break
    else:
        return log_r, math.inf
    relative = (above - mean_above).exp()
    _, noise = population.share((below - mean_below).exp())
    return log_r, math.hypot(float(relative.std()) / math.sqrt(len(of_q)), noise)
