"""The Gaussian nearest to a density, found in about a second.

Batch and match (Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei, Saul 2024, arXiv:2402.14758) draws z from the
Gaussian N(μ, Σ) in each round and takes the scores g = ∇ log p(z).  Then it moves to the Gaussian whose own scores
match them best.  The update has a closed form and is invariant under linear changes of variables.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..vjp import LogDensity, score_of, value_and_score

Watch = Callable[[], bool]  # called after each round of a search; True ends it.  bool() is False
SLACK = 0.5  # nats by which the ELBO may fall in a step, which is noise of the draws


@dataclass(frozen=True)
class Matching:
    """Settings of batch and match.

    Attributes:
        near: The standard deviation of the log-weights, in nats, of a Gaussian that hardly differs from the posterior.
        poor: That of a Gaussian whose correlations may mislead.
        tried: Draws at which each size of a mode is tried.
        fewest: The fewest rounds, however small the budget.
        last: Rounds in which the learning rate decreases.
        close: The mean square of a difference between scores, relative to that of a score, at which fits rest.
    """

    near: float = 0.25
    poor: float = 5.0
    tried: int = 32
    fewest: int = 10
    last: int = 20
    close: float = 0.5


MATCHING = Matching()


class Gaussian(NamedTuple):
    """A Gaussian over packed, unconstrained latents, and its fit by the log-weights log p - log q.

    Attributes:
        loc: The mean, ``(D,)``.
        scale_tril: The Cholesky factor of the covariance, ``(D, D)``.
        elbo: The mean log-weight, in nats; -inf if it is NaN.
        spread: The standard deviation of the log-weights, in nats.
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: float
    spread: float

    def holds(self, z: Tensor) -> Tensor:
        """Return True for vectors, ``(N, D)``, within the radius that holds nearly all of the Gaussian, ``(N,)``."""
        distance = torch.linalg.solve_triangular(self.scale_tril, (z - self.loc).T, upper=False).norm(dim=0)
        return distance < math.sqrt(len(self.loc)) + 3

    @property
    def is_near(self) -> bool:
        """True if the Gaussian hardly differs from the posterior."""
        return self.spread < MATCHING.near

    @property
    def is_poor(self) -> bool:
        """True if the Gaussian fits so badly that its correlations may mislead."""
        return self.spread > MATCHING.poor


def judged(log_p: Tensor, noise: Tensor, log_det: Tensor | float) -> tuple[float, float]:
    """Return the mean and the standard deviation of the log-weights log p - log q of draws, in nats.

    The mean is the ELBO, -inf if it is NaN.  The weights are constant if q is the posterior.

    Args:
        log_p: The log-density of the posterior at the draws, ``(N,)``.
        noise: The standard normal noise of the draws, ``(N, D)``.
        log_det: The log-determinant of the draws in their noise.
    """
    log_q = -noise.square().sum(-1) / 2 - noise.shape[-1] / 2 * math.log(2 * math.pi)
    weights = log_p - (log_q - log_det)
    return float(weights.mean().nan_to_num(-math.inf, math.inf, -math.inf)), float(weights.std())


def is_no_worse(elbo: float, start: float, dtype: torch.dtype) -> bool:
    """True if a step to an ELBO may be taken; large sums have round-off, too."""
    return elbo >= start - SLACK - 16 * torch.finfo(dtype).eps * abs(start) or not math.isfinite(start)


def fit_gaussian(
    density: LogDensity, loc: Tensor, scale: float, *, rounds: int = 100, budget: float = math.inf, watch: Watch = bool
) -> Gaussian:
    """Fit a Gaussian by batch and match; return the start if no round improves on it.

    Args:
        density: The log-density.
        loc: The start's mean, ``(D,)``.
        scale: The start's standard deviation.
        rounds: The largest number of rounds from each place.
        budget: The largest number of gradients.
        watch: Called after each round; True ends the search.
    """
    start = torch.eye(len(loc), dtype=loc.dtype, device=loc.device) * scale
    found = [_fitted(density, loc, start)]
    rounds = int(min(rounds, max(MATCHING.fewest, budget / 2 / max(64, 2 * len(loc)))))
    for place in (_climb(density, loc), loc):
        if (gaussian := match(density, place, start, rounds, watch)) is not None:
            found.append(gaussian)
            if gaussian.is_near or watch():
                break
    return max(found, key=lambda gaussian: gaussian.elbo)


def match_top(density: LogDensity, top: Tensor, scale_tril: Tensor) -> Gaussian | None:
    """Match a Gaussian to the mode around a top, which may be far narrower than ``scale_tril``.

    It starts at the largest of some sizes at which the density falls by at most a nat per dimension.  None if it breaks
    down or leads away.
    """
    sizes = 3.0 ** -torch.arange(1.0, 7.0).to(top)
    noise = torch.randn(len(sizes), MATCHING.tried, len(top), dtype=top.dtype, device=top.device) @ scale_tril.T
    with torch.no_grad():
        heights = density((top + sizes.view(-1, 1, 1) * noise).flatten(0, 1)).view(len(sizes), -1)
        fall = density(top.unsqueeze(0)) - heights.nan_to_num(-math.inf, math.inf, -math.inf).median(-1).values
    fits = (fall <= len(top)).nonzero()
    found = match(density, top, sizes[int(fits[0]) if len(fits) else -1] * scale_tril, rounds=60)
    return found if found is not None and found.holds(top.unsqueeze(0)) else None


def match(
    density: LogDensity, loc: Tensor, scale_tril: Tensor, rounds: int = 100, watch: Watch = bool
) -> Gaussian | None:
    """Batch and match with a learning rate that is constant until the scores stop improving, and then decreases.

    None if it breaks down.
    """
    eye, draws = torch.eye(len(loc), dtype=loc.dtype, device=loc.device), max(64, 2 * len(loc))
    rests, errors = rounds / 2, list[float]()  # mean squares of differences between scores, where Σ = I
    try:
        for number in range(1, rounds + 1):
            noise = torch.randn(draws, len(loc), dtype=loc.dtype, device=loc.device)
            score = score_of(density, loc + noise @ scale_tril.T)
            usable = score.isfinite().all(-1)
            if usable.sum() < draws / 2:
                scale_tril = scale_tril / 2
                continue
            noise, score = noise[usable], score[usable]
            errors.append(float((score @ scale_tril + noise).square().mean()))
            latest, before = errors[-3:], errors[-6:-3]
            if number < rests and len(before) == 3 and statistics.median(latest) < MATCHING.close:
                rests = number if statistics.median(latest) > 0.7 * statistics.median(before) else rests
            if number > rests + MATCHING.last or watch():
                break
            rate = draws / max(1.0, number - rests)
            weight = rate / (1 + rate)
            mean, mean_score = noise.mean(0), score.mean(0)
            u = rate * torch.cov(score.T, correction=0).reshape(eye.shape) + weight * mean_score.outer(mean_score)
            v = rate * torch.cov(noise.T, correction=0).reshape(eye.shape) + weight * mean.outer(mean)
            # Σ' solves Σ' U Σ' + Σ' = Σ + L V Lᵀ with Σ = L Lᵀ; eigenvalues give it where the right side is I.
            root = scale_tril @ torch.linalg.cholesky(eye + v)
            eigenvalues, vectors = torch.linalg.eigh(root.T @ u @ root)
            shrink = 2 / (1 + (1 + 4 * eigenvalues.clamp_min(0)).sqrt())
            factor = root @ (vectors * shrink.sqrt())
            loc = loc + weight * (factor @ (factor.T @ mean_score) + scale_tril @ mean)
            scale_tril = torch.linalg.qr(factor.T).R.T
            scale_tril = scale_tril * scale_tril.diagonal().sign()
    except LinAlgError:
        return None
    return _fitted(density, loc, scale_tril)


def _climb(density: LogDensity, loc: Tensor) -> Tensor:
    """Make some steps of L-BFGS uphill."""
    from scipy.optimize import minimize  # importing torch's L-BFGS takes most of a second

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        height, score = value_and_score(density, torch.as_tensor(x).to(loc).unsqueeze(0))
        return -float(height.nan_to_num(-math.inf)), -score[0].nan_to_num(0, 0, 0).double().cpu().numpy()

    found = minimize(loss, loc.double().cpu().numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 20})
    place = torch.as_tensor(found.x).to(loc)
    return place if place.isfinite().all() else loc


@torch.no_grad()
def _fitted(density: LogDensity, loc: Tensor, scale_tril: Tensor) -> Gaussian:
    """Return a Gaussian with the mean and spread of some log-weights."""
    noise = torch.randn(500, len(loc), dtype=loc.dtype, device=loc.device)
    log_det = scale_tril.diagonal().log().sum()
    return Gaussian(loc, scale_tril, *judged(density(loc + noise @ scale_tril.T), noise, log_det))
