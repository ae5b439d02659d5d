"""The distribution r that a population starts from: normalised, sampled and evaluated; the prior where possible.

Flat priors cannot be sampled, and masked priors are not sampled from their densities.  Such latents get a wide Gaussian
in the unconstrained space.  All latents get one if hardly a draw of the prior has a density, or if particles from the
prior are stuck.  A prior that spans the range of floats is an example.  Distributions proportional to r¹⁻ᵝ pᵝ lead from
r to the posterior p.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..programs.latent_space import LatentSpace
from ..programs.log_density import or_nan
from ..vjp import LogDensity
from .gaussian import fit_gaussian

WIDE = 10.0  # standard deviation of a wide Gaussian, in units and in those of the Gaussian nearest to the posterior
ALIVE = 0.1  # share of the prior's draws that must have a density
TRIED = 500  # draws that estimate this share
ROUND_OFF = 0.1  # largest rounding error of the log-ratio log p - log r, in nats: priors such as 1 / v reach e^±200
BATCH = 2048  # particles per run of the model


class _Muted(Messenger):
    """Masks the log-densities of the sites of some names."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self._names = names

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._names:
            msg["mask"] = False


class Reference:
    """The distribution r of a model's latents, and the posterior p.

    Args:
        space: The space of a guide that draws packed, unconstrained latents.
        loc: A centre of the posterior as far as known, ``(D,)``.
        scale_tril: The Cholesky factor of a covariance around it, ``(D, D)``; None to search for the nearest Gaussian
            from ``loc`` if one is needed.
    """

    def __init__(self, space: LatentSpace, loc: Tensor, scale_tril: Tensor | None = None) -> None:
        self._space, model = space, space.task.model
        self._prior = None
        if model.enumerated:
            muted = _Muted({*model.single.observation_nodes, *space.flat})  # factors are observed sites
            self._prior = space.task.of(space.task.guide.call, muted(model.call)).settle().model
        self._loc, self._scale_tril = loc, scale_tril
        self._flat = torch.tensor([name in space.flat for name in space.coordinates], device=loc.device)
        self._wide = self._wide_gaussian() if bool(self._flat.any()) else None
        before = self._flat, self._wide
        if not self._is_wide and (alive := self._alive()) < ALIVE and self.widen() and self._alive() <= alive:
            self._flat, self._wide = before

    @property
    def _is_wide(self) -> bool:
        """True if no latent has its prior."""
        return bool(self._flat.all())

    def widen(self) -> bool:
        """Replace the prior by a wide Gaussian; return False if r is one already."""
        if self._is_wide:
            return False
        self._flat = torch.ones_like(self._flat)
        self._wide = self._wide_gaussian()
        return True

    def draw(self, number: int) -> Tensor:
        """Sample r, ``(number, D)``; draws that overflow are not finite."""
        z = self._loc.expand(number, -1).clone()
        if self._wide is not None:
            z[:, self._flat] = self._wide.sample(torch.Size((number,)))
        return z if self._is_wide else self._space.prior(z).to(z)

    def log_r_and_p(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-densities of r and p over z, each ``(N,)`` in nats; NaN where the model breaks down."""
        both = torch.cat([or_nan(self._log_r_and_p, 2)(part) for part in z.split(BATCH)])
        return both[..., 0], both[..., 1]

    def log_p(self, z: Tensor) -> Tensor:
        """Return the log-density of p over z, ``(N,)`` in nats; NaN where rounding errors of the prior may hide it.

        Far out a huge log prior may be cancelled by as huge a log-likelihood, and their sum is noise.
        """
        return or_nan(self._space.in_parts(self._log_p))(z)

    def bridge(self, beta: float) -> LogDensity:
        """Return the log-density of r¹⁻ᵝ pᵝ, up to a constant."""
        if beta == 1:
            return or_nan(self._space.log_p)

        def density(z: Tensor) -> Tensor:
            log_r, log_p = self.log_r_and_p(z)
            return (1 - beta) * log_r + beta * log_p

        return self._space.in_parts(density)

    def _log_r_and_p(self, z: Tensor) -> Tensor:
        if self._is_wide:
            log_r, log_p = torch.zeros(len(z)).to(z), self._space.log_p(z)
        else:
            log_r, log_p = self._space.log_prior_and_p(z, self._prior)
        if self._wide is not None:
            log_r = log_r + self._wide.log_prob(z[:, self._flat])
        return torch.stack((log_r.masked_fill(_is_lost(log_r), math.nan), log_p), -1)

    def _log_p(self, z: Tensor) -> Tensor:
        if self._prior is not None:  # which takes another run
            return self._space.log_p(z)
        log_prior, log_p = self._space.log_prior_and_p(z)
        return log_p.masked_fill(_is_lost(log_prior), math.nan)

    def _wide_gaussian(self) -> MultivariateNormal:
        """Build a wide Gaussian of the flat latents."""
        loc, scale_tril = self._loc, self._scale_tril
        if scale_tril is None:
            loc, scale_tril, *_ = fit_gaussian(or_nan(self._space.log_p), loc, 1.0, rounds=50)
        covariance = scale_tril @ scale_tril.T + torch.eye(len(loc)).to(loc)
        return MultivariateNormal(loc[self._flat], WIDE**2 * covariance[self._flat][:, self._flat])

    @torch.no_grad()
    def _alive(self) -> float:
        """Return the share of some draws of r at which p has a density."""
        log_r, log_p = self.log_r_and_p(self.draw(TRIED))
        return float((log_r + log_p).isfinite().double().mean())


def _is_lost(log_density: Tensor) -> Tensor:
    """Return True for log-densities whose rounding error is large."""
    return log_density.detach().abs() * torch.finfo(log_density.dtype).eps > ROUND_OFF
