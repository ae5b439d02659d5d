"""Mixtures of Gaussians with full covariances, fitted to weighted draws by expectation maximisation.

Maximum Likelihood from Incomplete Data via the EM Algorithm (Dempster, Laird, Rubin 1977).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

FITTED = 20  # effective draws per dimension from which a component's mean and covariance are estimated
ROUNDS = 50


class Mixture(NamedTuple):
    """A mixture of K Gaussians over vectors ``(D,)``.

    Attributes:
        loc: The means, ``(K, D)``.
        scale_tril: The Cholesky factors of the covariances, ``(K, D, D)``.
        weights: What the components weigh, ``(K,)``.
    """

    loc: Tensor
    scale_tril: Tensor
    weights: Tensor

    def chances(self, x: Tensor) -> Tensor:
        """The probability that each of some vectors, ``(N, D)``, comes from each component, ``(N, K)``."""
        laws = MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
        parts = [laws.log_prob(part.unsqueeze(1)) + self.weights.log() for part in x.split(1000)]
        return torch.cat(parts).softmax(-1)

    def fitted(self, x: Tensor, weights: Tensor) -> Mixture:
        """The mixture that draws, ``(N, D)``, of some weights, ``(N,)``, lead to from this one.

        Components of too few draws stay as they are, but for what they weigh; copies of a draw count as one.
        """
        found = self
        x, place = x.unique(dim=0, return_inverse=True)
        weights = weights.new_zeros(len(x)).index_add(0, place, weights)
        for _ in range(ROUNDS):
            chances = weights.unsqueeze(-1) * found.chances(x)
            total = chances.sum(0)
            effective = total.square() / chances.square().sum(0).clamp_min(1e-30)
            shares = (chances / total.clamp_min(1e-12)).T  # (K, N)
            loc = shares @ x
            apart = shares.sqrt().unsqueeze(-1) * (x - loc.unsqueeze(1))  # (K, N, D)
            scale_tril, failed = torch.linalg.cholesky_ex(apart.mT @ apart)
            usable = (effective > FITTED * x.shape[1]) & (failed == 0) & scale_tril.isfinite().all((-1, -2))
            found = Mixture(
                torch.where(usable[:, None], loc, found.loc),
                torch.where(usable[:, None, None], scale_tril, found.scale_tril),
                total.clamp_min(1e-6),
            )
        return found
