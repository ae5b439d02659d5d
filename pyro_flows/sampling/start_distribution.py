"""Where a population starts: a normalised law r over vectors z that is drawn and scored, the prior where there is one.

Flat priors cannot be drawn, masked ones are not what they draw: such latents get a wide Gaussian in the unconstrained
space.  So do all latents where hardly a draw of the prior has a density, or where particles from the prior are stuck.
Priors that span the range of floats are such.  From r the way to the posterior p goes through the laws that are
proportional to r¹⁻ᵝ pᵝ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..programs.latent_space import LatentSpace
from ..programs.log_density import LogDensity, or_nan
from ..programs.task import Task
from .gaussian import fit_gaussian

WIDE = 10.0  # the standard deviation of a wide Gaussian, in units and in those of the Gaussian nearest to the posterior
ALIVE = 0.1  # the share of the prior's draws that must have a density
TRIED = 500  # draws that tell
ROUND_OFF = 0.1  # the most that the ratio p / r may owe to the size of r, in nats: priors such as 1 / v reach e^±200


class _Muted(Messenger):
    """Gives the sites of some names no log-density, and leaves a model as it is otherwise."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self._names = names

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._names:
            msg["mask"] = False


class Reference:
    """The law r of a model's latents, and the posterior p.

    Args:
        space: The space of a guide that draws packed, unconstrained latents.
        loc: The middle of what is known of the posterior, ``(D,)``.
        scale_tril: How far that reaches, a Cholesky factor ``(D, D)``; None to look for the nearest Gaussian from
            ``loc``, where it is needed.
    """

    def __init__(self, space: LatentSpace, loc: Tensor, scale_tril: Tensor | None = None) -> None:
        self._space, model = space, space.task.model
        places = space.coordinates
        self._flat = torch.tensor([name in space.flat for name in places], device=loc.device)
        self._prior = None
        if model.enumerated:
            muted = _Muted({*model.single.observation_nodes, *space.flat})  # factors are observed sites
            self._prior = Task(muted(model.call), space.task.guide.call, model.args, model.kwargs).settle().model
        self._loc, self._scale_tril = loc, scale_tril
        self._wide = self._wide_law() if bool(self._flat.any()) else None
        of_prior = self._flat, self._wide
        if not bool(self._flat.all()) and (alive := self._alive()) < ALIVE and self.widen() and self._alive() <= alive:
            self._flat, self._wide = of_prior

    def widen(self) -> bool:
        """Replace the prior by a wide Gaussian; False if r is one already."""
        if bool(self._flat.all()):
            return False
        self._flat = torch.ones_like(self._flat)
        self._wide = self._wide_law()
        return True

    def draw(self, number: int) -> Tensor:
        """Draws of r, ``(number, D)``; vectors that are not finite are draws whose size no float holds."""
        z = self._loc.expand(number, -1).clone()
        if self._wide is not None:
            z[:, self._flat] = self._wide.sample(torch.Size((number,)))
        if bool(self._flat.all()):
            return z
        drawn = self._space.prior(z)
        if drawn is not None:
            return drawn.to(z)
        if number == 1:
            return z * math.nan
        return torch.cat([self.draw(number // 2), self.draw(number - number // 2)])

    def log_r_and_p(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log-densities of r and p over z, each ``(N,)`` in nats; NaN where the model breaks down."""
        both = or_nan(self._both)(z)
        return both[..., 0], both[..., 1]

    def bridge(self, beta: float) -> LogDensity:
        """The log-density of r¹⁻ᵝ pᵝ, up to a constant."""
        if beta == 1:
            return or_nan(self._space.log_p)

        def density(z: Tensor) -> Tensor:
            log_r, log_p = self.log_r_and_p(z)
            return (1 - beta) * log_r + beta * log_p

        return self._space.in_parts(density)

    def _both(self, z: Tensor) -> Tensor:
        if bool(self._flat.all()):
            log_r, log_p = torch.zeros(len(z)).to(z), self._space.log_p(z)
        else:
            log_r, log_p = self._space.log_prior_and_p(z, self._prior)
        if self._wide is not None:
            log_r = log_r + self._wide.log_prob(z[:, self._flat])
        lost = log_r.detach().abs() * torch.finfo(log_r.dtype).eps > ROUND_OFF
        return torch.stack((log_r.masked_fill(lost, math.nan), log_p), -1)

    def _wide_law(self) -> MultivariateNormal:
        """A wide Gaussian of the flat latents."""
        loc, scale_tril = self._loc, self._scale_tril
        if scale_tril is None:
            loc, scale_tril, *_ = fit_gaussian(or_nan(self._space.log_p), loc, 1.0, rounds=50)
        covariance = scale_tril @ scale_tril.T + torch.eye(len(loc)).to(loc)
        part = covariance[self._flat][:, self._flat]
        return MultivariateNormal(loc[self._flat], WIDE**2 * part)

    @torch.no_grad()
    def _alive(self) -> float:
        """The share of some draws of r at which p has a density."""
        log_r, log_p = self.log_r_and_p(self.draw(TRIED))
        return float((log_r + log_p).isfinite().double().mean())
