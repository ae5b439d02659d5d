"""Many Markov chains at once, which move in several coordinates in turn, and by draws of the guide.

In each set of coordinates they make a step of Hamiltonian Monte Carlo.  Draws of the guide are proposed too, each
accepted with the chance min(1, w' / w), where w = p / q: a good guide's carry a chain anywhere in one step.  All leave
the density invariant.

Monte Carlo Sampling Methods Using Markov Chains and Their Applications (Hastings 1970); Adaptive Monte Carlo augmented
with normalizing flows (Gabrié, Rotskoff, Vanden-Eijnden 2021, arXiv:2105.12603).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..programs.latent_space import Scored
from ..programs.log_density import LogDensity
from .hmc import HMC, Coordinates

FROZEN = 0.2  # the mean acceptance below which chains hardly move


class Chains:
    """N chains of a density over vectors z.

    Args:
        density: The log-density, ``(N, D) -> (N,)``; where it is not finite no chain goes.
        charts: The coordinates to move in: the first in each sweep, the others in every second one.
        z: Where the chains start, ``(N, D)``.
        max_steps: The most leapfrog steps in a transition.

    Attributes:
        z: Where the chains are, ``(N, D)``.
        log_p: The log-density there, ``(N,)``.
        excess: The log-weights log p - log q there, after the latest proposals, less the logarithm of these' mean.
        kernels: What moves them, one in each of the charts.
    """

    def __init__(self, density: LogDensity, charts: Sequence[Coordinates], z: Tensor, max_steps: int = 8) -> None:
        self.z, self.log_p = z, torch.full(z.shape[:1], math.nan).to(z)
        self.kernels = [HMC(density, chart, z.shape[1], max_steps) for chart in charts]
        self.excess = torch.zeros_like(self.log_p)
        self._sweeps = 0

    @property
    def acceptance(self) -> list[float]:
        """The mean acceptance of the latest move in each of the charts."""
        return [kernel.acceptance for kernel in self.kernels]

    @property
    def divergences(self) -> int:
        """In how many trajectories the energy went astray."""
        return sum(kernel.divergences for kernel in self.kernels)

    def sweep(self, *, adapt: bool) -> None:
        """Move in the charts' coordinates; steps are adapted, in all of them, while that is asked for."""
        self._sweeps += 1
        for kernel in self.kernels if adapt or self._sweeps % 2 else self.kernels[:1]:
            self.z, self.log_p = kernel.move(self.z, adapt=adapt)

    @torch.no_grad()
    def propose(self, draw: Callable[[int], Scored], log_q: LogDensity, times: int) -> tuple[list[Tensor], float]:
        """Propose draws of a guide to each chain, a number of times.

        Args:
            draw: Draws of the guide.
            log_q: Its log-density, ``(N, D) -> (N,)``.
            times: How often.

        Returns:
            Where the chains were after each time, and the mean chance of a draw to be taken.
        """
        proposals, number, chances = draw(times * len(self.z)), len(self.z), []
        log_weights = (proposals.log_p - proposals.log_q).nan_to_num(-math.inf, -math.inf, -math.inf)
        own = self.log_p - log_q(self.z).nan_to_num(-math.inf, math.inf, -math.inf)
        places = []
        for z, log_p, log_weight in zip(
            proposals.z.split(number), proposals.log_p.split(number), log_weights.split(number), strict=True
        ):
            chance = (log_weight - own).clamp_max(0).exp()
            taken = torch.rand_like(chance) < chance
            self.z = torch.where(taken.unsqueeze(-1), z, self.z)
            self.log_p, own = torch.where(taken, log_p, self.log_p), torch.where(taken, log_weight, own)
            places.append(self.z)
            chances.append(float(chance.mean()))
        self.excess = own - (log_weights.logsumexp(0) - math.log(len(log_weights)))
        return places, sum(chances) / times
