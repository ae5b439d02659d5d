"""A Gaussian for a flow guide to start from, found in about a second.

Adam moves each parameter at its own pace and so crawls on ill-conditioned posteriors.  Batch and match (Cai, Modi,
Pillaud-Vivien, Margossian, Gower, Blei, Saul 2024, arXiv:2402.14758) does not: each round draws z from the Gaussian
N(μ, Σ), takes the scores g = ∇ log p(z), and moves to the Gaussian whose own scores match them best, in closed form
and alike under every linear change of variables.  It starts at the guide's start and, for posteriors far away, some
steps of L-BFGS uphill from there; the better of the two in ELBO is kept, so a mode without mass leads nobody astray.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine, validation_enabled
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..diagnostics.draws import log_prob_of_draws, side_by_side, single_trace
from ..guides import AutoFlow
from ..guides.recipe import DENSE
from .loop import is_breakdown

LogDensity = Callable[[Tensor], Tensor]  # (N, D) -> (N,), in nats

NEAR = 0.25  # how little, in nats, the log-weights of a Gaussian vary that hardly differs from the posterior
POOR = 5.0  # how much, in nats, the log-weights of a Gaussian may vary before its correlations mislead


class Gaussian(NamedTuple):
    """A Gaussian over packed, unconstrained latents, and how it fits: with log-weights log p - log q.

    Attributes:
        loc: The mean, ``(D,)``.
        scale_tril: The Cholesky factor of the covariance, ``(D, D)``.
        elbo: The mean log-weight, in nats; -inf if it is no number.
        spread: The standard deviation of the log-weights, in nats.
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: float
    spread: float

    @property
    def is_near(self) -> bool:
        """Whether it hardly differs from the posterior."""
        return self.spread < NEAR

    @property
    def is_poor(self) -> bool:
        """Whether it fits so badly that its correlations mislead."""
        return self.spread > POOR


def start_from_gaussian(
    model: Callable[..., Any], guide: AutoFlow, args: tuple[Any, ...], kwargs: dict[str, Any], power: float = 1.0
) -> Gaussian | None:
    """Let a guide start from the best Gaussian found, which is where it is already if none is better.

    The Gaussian is one of the posterior, or of a power of it.  Latents on circles have none, and more than 512 latents
    are too many for a dense one.
    """
    if guide.has_circles or guide.latent_dim > DENSE:
        return None
    with validation_enabled(False):  # a place without density is for the scores to show
        density = or_nan(log_joint(model, guide, args, kwargs))
        found = fit_gaussian(lambda latent: power * density(latent), *guide.start)
    guide.start_at(found.loc, found.scale_tril.norm(dim=-1).diag() if found.is_poor else found.scale_tril)
    return found


def log_joint(model: Callable[..., Any], guide: AutoFlow, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LogDensity:
    """The model's log-density of packed, unconstrained latents."""
    _, guide_trace, nesting = single_trace(model, guide, args, kwargs)
    (latent_site,) = (name for name, site in guide_trace.nodes.items() if site.get("infer", {}).get("is_auxiliary"))

    def density(latent: Tensor) -> Tensor:
        size = len(latent)
        held = poutine.condition(guide, data={latent_site: latent.reshape(size, *(1,) * nesting, -1)})
        with poutine.block():
            placed = poutine.trace(side_by_side(held, size, nesting)).get_trace(*args, **kwargs)
            scored = poutine.trace(poutine.replay(side_by_side(model, size, nesting), trace=placed)).get_trace(
                *args, **kwargs
            )
        placed.remove_node(latent_site)  # what is left are the changes of variables
        return log_prob_of_draws(scored, size, nesting) - log_prob_of_draws(placed, size, nesting)

    return density


def or_nan(density: LogDensity) -> LogDensity:
    """A density that is NaN, for all its draws, where the model breaks down at one of them."""

    def guarded(latent: Tensor) -> Tensor:
        try:
            return density(latent)
        except (ValueError, LinAlgError) as error:
            if not is_breakdown(error):
                raise
            return latent.sum(-1) * math.nan

    return guarded


def fit_gaussian(density: LogDensity, loc: Tensor, scale: float, *, rounds: int = 100) -> Gaussian:
    """The best Gaussian that a few rounds of batch and match find, or the start where they find none better.

    Args:
        density: The log-density.
        loc: The start's mean, ``(D,)``.
        scale: The start's standard deviation.
        rounds: How many rounds to make from each place.
    """
    start = torch.eye(len(loc), dtype=loc.dtype, device=loc.device) * scale
    best = _judged(density, loc, start)
    for place in (loc, _climb(density, loc)):
        found = _match(density, place, start, rounds, draws=max(64, 2 * len(loc)))
        if found is not None and found.elbo > best.elbo:
            best = found
    return best


def _match(density: LogDensity, loc: Tensor, scale_tril: Tensor, rounds: int, draws: int) -> Gaussian | None:
    """Batch and match, with a learning rate that is constant at first and then falls; None where it breaks down."""
    eye = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
    try:
        for number in range(1, rounds + 1):
            z = loc + torch.randn(draws, len(loc), dtype=loc.dtype, device=loc.device) @ scale_tril.T
            score = score_of(density, z)
            usable = score.isfinite().all(-1)
            if usable.sum() < draws / 2:
                scale_tril = scale_tril / 2
                continue
            z, score = z[usable], score[usable]
            rate = draws / max(1.0, number - rounds / 2)
            weight = rate / (1 + rate)
            mean, mean_score = z.mean(0), score.mean(0)
            moved = loc - mean
            u = rate * torch.cov(score.T, correction=0).reshape(eye.shape) + weight * mean_score.outer(mean_score)
            v = rate * torch.cov(z.T, correction=0).reshape(eye.shape) + weight * moved.outer(moved)
            # Σ' solves Σ' U Σ' + Σ' = Σ + V; in coordinates where the right side is the identity, by its eigenvalues.
            root = scale_tril @ torch.linalg.cholesky(eye + _whitened(v, scale_tril))
            eigenvalues, vectors = torch.linalg.eigh(root.T @ u @ root)
            shrink = 2 / (1 + (1 + 4 * eigenvalues.clamp_min(0)).sqrt())
            factor = root @ (vectors * shrink.sqrt())
            scale_tril = torch.linalg.qr(factor.T).R.T
            scale_tril = scale_tril * scale_tril.diagonal().sign()
            loc = (loc + rate * (factor @ (factor.T @ mean_score) + mean)) / (1 + rate)
    except LinAlgError:
        return None
    return _judged(density, loc, scale_tril)


def _whitened(v: Tensor, scale_tril: Tensor) -> Tensor:
    half = torch.linalg.solve_triangular(scale_tril, v, upper=False)
    return torch.linalg.solve_triangular(scale_tril, half.T, upper=False)


def _climb(density: LogDensity, loc: Tensor, steps: int = 20) -> Tensor:
    """Some steps of L-BFGS uphill."""
    place = loc.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([place], max_iter=steps, history_size=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -density(place.unsqueeze(0)).sum()
        loss.backward()
        return loss.nan_to_num(math.inf)

    optimizer.step(closure)
    return place.detach() if place.isfinite().all() else loc


def score_of(density: LogDensity, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    total = density(z).sum()
    return torch.autograd.grad(total, z)[0] if total.requires_grad else torch.zeros_like(z)


@torch.no_grad()
def _judged(density: LogDensity, loc: Tensor, scale_tril: Tensor, draws: int = 500) -> Gaussian:
    """A Gaussian with what some log-weights say of it; they have no noise where it is the posterior."""
    noise = torch.randn(draws, len(loc), dtype=loc.dtype, device=loc.device)
    log_q = -noise.square().sum(-1) / 2 - scale_tril.diagonal().log().sum() - len(loc) / 2 * math.log(2 * math.pi)
    log_weights = density(loc + noise @ scale_tril.T) - log_q
    elbo = log_weights.mean().nan_to_num(-math.inf, math.inf, -math.inf)
    return Gaussian(loc, scale_tril, float(elbo), float(log_weights.std()))
