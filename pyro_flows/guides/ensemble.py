"""Ensembles of amortised guides: the mean of their densities.

A guide that was trained on too few simulations is often too narrow, and each one differently.  The mean of the
densities of several is wider, and its coverage is nearer to the stated level: A Crisis in Simulation-Based Inference?
Beware, Your Posterior Approximations Can Be Unfaithful (Hermans et al. 2021, arXiv:2110.06581).  Simple and Scalable
Predictive Uncertainty Estimation using Deep Ensembles (Lakshminarayanan, Pritzel, Blundell 2016, arXiv:1612.01474).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from ..arguments import quoted
from ..encoders import Joined
from ..flows.mixture import FlowMixture
from .auto import AutoFlow
from .loaded import sites_of


def ensemble(guides: Sequence[AutoFlow]) -> AutoFlow:
    """Return the ensemble of K trained, amortised guides of one model: the mean of their densities::

        q(z | x) = 1/K Σ_k q_k(z | x)

    It is less often overconfident than its members (Hermans et al. 2021), and its mean log-density over any data is at
    least the mean of theirs.  Train each member by :func:`~pyro_flows.fit_amortized`, on the same ``simulations``.
    Members start from other weights, and hold out other simulations.

    The ensemble is an :class:`~pyro_flows.AutoFlow` with copies of the networks.  It draws, scores, binds, and is
    calibrated, checked and saved as each member is, at K times the cost.  It has no single base, so ``fit_svi`` and
    ``neutra`` refuse it.

    Args:
        guides: The guides, at least two, each with an encoder of its own.

    Raises:
        TypeError: If one of them is no ``AutoFlow``.
        ValueError: If there are fewer than two, one has no encoder or was never trained, two share an encoder, or their
            latents differ.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow, fit_amortized, simulate
        >>> from pyro_flows.encoders import MLPEncoder
        >>> def model(x=None):
        ...     theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1).to_event(1))
        ...     return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)
        >>> known = simulate(model, num_simulations=200)
        >>> guides = [AutoFlow(model, encoder=MLPEncoder(2, context_dim=8)) for _ in range(2)]
        >>> fits = [fit_amortized(model, g, simulations=known, max_epochs=2, progress=False) for g in guides]
        >>> guide, x = ensemble(guides), torch.tensor([1.0, -1.0])
        >>> draws = guide.sample(5, x)
        >>> draws["theta"].shape, guide.log_prob(draws, x).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    _check(guides)
    new = copy.deepcopy(guides[0])
    parts = [copy.deepcopy(guide) for guide in guides]
    new.encoder = Joined([part.encoder for part in parts if part.encoder is not None])
    new.flow = FlowMixture([part.flow for part in parts])  # type: ignore[assignment]
    return new


def _check(guides: Sequence[Any]) -> None:
    """Raise an error unless guides can form an ensemble."""
    if not isinstance(guides, list | tuple) or not all(isinstance(guide, AutoFlow) for guide in guides):
        raise TypeError(f"ensemble: guides must be a list of AutoFlows, got {quoted(guides)}.")
    if len(guides) < 2:
        raise ValueError(f"ensemble: guides must hold at least two guides, got {len(guides)}. Train another one.")
    for place, guide in enumerate(guides):
        if guide.encoder is None:
            way = "Build AutoFlow(model, encoder=...), and train it by fit_amortized"
            raise ValueError(f"ensemble: guides[{place}] must have an encoder, got none. {way}.")
        if guide.prototype_trace is None or guide.is_fresh:
            raise ValueError(f"ensemble: guides[{place}] must be trained. Fit it first: fit_amortized(model, guide).")
        if _latents(guide) != _latents(guides[0]):
            got = f"{_latents(guide)} and {_latents(guides[0])}"
            raise ValueError(f"ensemble: guides must have the same latents, got {got}. Give guides of one model.")
        if isinstance(guide.flow, FlowMixture):
            raise ValueError(f"ensemble: guides[{place}] must be a single guide, got an ensemble. Give its members.")
    weights = [id(weight) for guide in guides for weight in guide.parameters()]
    if len(set(weights)) < len(weights):
        fault = (
            "guides must have weights of their own, got a network that is shared, so that each fit changed the others"
        )
        raise ValueError(f"ensemble: {fault}. Build an encoder for each guide.")


def _latents(guide: AutoFlow) -> list[str]:
    """Return the names, shapes and supports of a guide's latents, in words."""
    return [f"{site.name} {tuple(site.value.shape)} in {site.support}" for site in sites_of(guide)]
