"""Exact draws of a posterior: chains that start from a guide's draws and run until they have converged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro

from ..arguments import check_flags, check_integers, joined
from ..guides import AutoFlow
from ..programs.latent_space import sound_space
from ..programs.nesting import runs_programs
from ..programs.task import Task, check_trained
from ..sampling.run import Goal
from ..sampling.samples import Samples
from .chain_run import exact, warning
from .svi import fit_svi

CALLER = "sample"


@runs_programs
def sample(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    *args: Any,
    num_draws: int = 4000,
    num_chains: int | None = None,
    max_sweeps: int = 2000,
    progress: bool = True,
    vectorize: str = "auto",
    max_plate_nesting: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Samples:
    """Draw from a posterior, exactly, by Markov chains that a guide makes fast.

    Many chains start from the guide's draws, resampled by their weights w = p / q where these are even enough.  They
    move by Hamiltonian Monte Carlo in the coordinates of the guide's base and in whitened ones (Hoffman et al. 2019,
    arXiv:1903.03704); in hierarchies, also with effects in units of their priors' scales (Yu, Meng 2011).  They take
    draws of the guide, each accepted with the chance min(1, w' / w) (Gabrié, Rotskoff, Vanden-Eijnden 2021,
    arXiv:2105.12603).  All of these leave the posterior invariant.  So an error of the guide costs time, and does not
    spoil the draws of chains that have converged.

    The chains run until R-hat is at most 1.01 and the effective sample sizes of bulk and tails are at least
    ``num_draws``, for every latent and deterministic site (Vehtari et al. 2021, arXiv:1903.08008).  Then they run on,
    at most ten times as long, until each standard deviation is known to 1 %, or as well as from ``num_draws`` normal
    draws if these are fewer.  R-hat cannot see a mode that no chain has met: :func:`~pyro_flows.check` searches for it.

    Args:
        model: A Pyro model; discrete latents that the guide lacks are summed out, and drawn back in the end.
        guide: A trained guide of the same latents; by default an :class:`~pyro_flows.AutoFlow`, which is fitted first.
            Give None if arguments of the model follow.
        *args: The model's arguments.
        num_draws: The effective sample size that each quantity must have; the chains return at least as many draws.
        num_chains: The number of chains, at least 4; by default 256, or 16 where the model runs one draw at a time.
        max_sweeps: How often all chains are moved at most, those of the warm-up included.
        progress: Whether to show a progress bar.
        vectorize: The way to run many draws: ``"plate"``, ``"vmap"`` or ``"loop"``; by default the first of these that
            does to draws what single runs do (*Any Pyro program* in the docs).
        max_plate_nesting: How many dimensions the plates of model and guide take; by default what one run shows.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Returns:
        The :class:`~pyro_flows.Samples`.  Ctrl-C ends sampling early, and returns what there is.

    Raises:
        ValueError: If a number is out of its range; if the guide was never trained, is a point, of another model, or
            has no density over its draws; or if a discrete latent of infinite support is left to the model, or a plate
            is subsampled.

    Warns:
        UserWarning: If the chains have not converged, the model runs one draw at a time, or its log-density is an
            estimate whose noise shows.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def wide():
        ...     pyro.sample("x", dist.Normal(0.5, 1.5))
        >>> found = sample(model, wide, progress=False)
        >>> draws = found.flat["x"]
        >>> found.converged, bool(draws.mean().abs() < 0.1), bool((draws.std() - 1).abs() < 0.1)
        (True, True, True)
    """
    kwargs = joined(CALLER, kwargs, model_kwargs)
    check_integers(CALLER, num_draws=num_draws, max_sweeps=max_sweeps)
    check_integers(CALLER, 4, optional=True, num_chains=num_chains)
    check_flags(CALLER, progress=progress)
    fit = None
    if guide is None:
        guide = AutoFlow(model)
        fit = fit_svi(model, guide, *args, progress=progress, vectorize=vectorize, model_kwargs=kwargs)
    check_trained(CALLER, guide)
    with pyro.validation_enabled(False):  # a draw of no density is for the chains to shun
        space = sound_space(Task(model, guide, args, kwargs, vectorize))
        found = exact(space, Goal(num_draws, max_sweeps), num_chains, progress=progress)
    if not found.converged:
        warnings.warn(warning(found, max_sweeps), stacklevel=3)
    return replace(found, fit=fit)
