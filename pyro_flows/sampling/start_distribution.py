"""The distribution r that a population starts from: normalised, sampled and evaluated; the prior where possible.

Flat priors cannot be sampled, and masked priors are not sampled from their densities.  Such latents get a wide Gaussian
in the unconstrained space.  All latents get one if hardly a draw of the prior has a density, or if particles from the
prior are stuck.  A prior that spans the range of floats is an example.  Distributions proportional to r¹⁻ᵝ pᵝ lead from
r to the posterior p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..vjp import LogDensity
from .gaussian import fit_gaussian

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
        in_parts: Lets a log-density find its gradient part by part, to save memory.
        takes_a_run: True if the log-density of the prior costs as much as that of p.
    """

    draw: Callable[[Tensor], Tensor]
    log_p: LogDensity
    log_prior_and_p: Callable[[Tensor], Tensor]
    flat: Tensor
    in_parts: Callable[[LogDensity], LogDensity]
    takes_a_run: bool


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
        self._flat = prior.flat.to(loc.device)
        self._wide = self._wide_gaussian() if bool(self._flat.any()) else None
        before = self._flat, self._wide
        if not self._is_wide and (alive := self._alive()) < ALIVE and self.widen() and self._alive() <= alive:
            self._flat, self._wide = before

    @property
    def _is_wide(self) -> bool:
        """True if no coordinate has its prior."""
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
        return z if self._is_wide else self._prior.draw(z).to(z)

    def log_r_and_p(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-densities of r and p over z, each ``(N,)`` in nats; NaN where the model breaks down."""
        if self._is_wide:
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

        def exact(z: Tensor) -> Tensor:
            log_prior, log_p = self._prior.log_prior_and_p(z).unbind(-1)
            return log_p.masked_fill(_is_lost(log_prior), math.nan)

        return self._prior.log_p(z) if self._prior.takes_a_run else self._prior.in_parts(exact)(z)

    def bridge(self, beta: float) -> LogDensity:
        """Return the log-density of r¹⁻ᵝ pᵝ, up to a constant."""
        if beta == 1:
            return self._prior.log_p

        def density(z: Tensor) -> Tensor:
            log_r, log_p = self.log_r_and_p(z)
            return (1 - beta) * log_r + beta * log_p

        return self._prior.in_parts(density)

    def _wide_gaussian(self) -> MultivariateNormal:
        """Build a wide Gaussian of the flat coordinates."""
        loc, scale_tril = self._loc, self._scale_tril
        if scale_tril is None:
            loc, scale_tril, *_ = fit_gaussian(self._prior.log_p, loc, 1.0, rounds=50)
        covariance = scale_tril @ scale_tril.T + torch.eye(len(loc)).to(loc)
        covariance = WIDE**2 * covariance[self._flat][:, self._flat]
        return MultivariateNormal(loc[self._flat], covariance, validate_args=False)

    @torch.no_grad()
    def _alive(self) -> float:
        """Return the share of some draws of r at which p has a density."""
        log_r, log_p = self.log_r_and_p(self.draw(TRIED))
        return float((log_r + log_p).isfinite().double().mean())


def _is_lost(log_density: Tensor) -> Tensor:
    """Return True for log-densities with rounding errors above 0.1 nats: priors such as 1 / v reach e^±200."""
    return log_density.detach().abs() * torch.finfo(log_density.dtype).eps > 0.1
