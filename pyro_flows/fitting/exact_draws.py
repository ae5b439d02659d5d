"""Exact draws of a posterior by chains that start from a guide's draws and run until they have converged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro

from ..arguments import check_flags, check_integers
from ..diagnostics.unreached import check_reach
from ..guides import AutoFlow
from ..programs import Program
from ..programs.density import Density
from ..programs.model_and_guide import Task, check_trained
from ..programs.plate_nesting import runs_programs
from ..sampling import Samples
from ..sampling.chains import FROZEN
from ..sampling.converged_chains import Goal
from ..user_code import warn_user
from .chains_with_progress import exact
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
    **kwargs: Any,
) -> Samples:
    """Sample a posterior exactly, by Markov chains that a guide makes fast.

    Many chains start from the guide's draws, resampled by their weights w = p / q if these are even enough.  They move
    by Hamiltonian Monte Carlo, in the coordinates of the guide's base and in whitened ones (Hoffman et al. 2019,
    arXiv:1903.03704).  In hierarchies they also measure effects in units of their priors' scales (Yu, Meng 2011).
    Draws of the guide are proposed, each accepted with probability min(1, w' / w) (Gabrié, Rotskoff, Vanden-Eijnden
    2021, arXiv:2105.12603).  All these transitions leave the posterior invariant.  So errors of the guide cost time,
    but do not bias the draws of chains that have converged.

    The chains run until R-hat is at most 1.01 and the effective sample sizes of bulk and tails are at least
    ``num_draws``, for every latent and deterministic site (Vehtari et al. 2021, arXiv:1903.08008).  Then they run up to
    ten times longer, until each standard deviation is known to 1 %, or as well as from ``num_draws`` normal draws if
    these are fewer.  R-hat does not detect a mode that no chain has visited; :func:`~pyro_flows.check` searches for it.

    Args:
        model: A Pyro model; discrete latents that the guide lacks are summed out, and sampled at the end.
        guide: A trained guide of the same latents; by default an :class:`~pyro_flows.AutoFlow`, which is fitted first.
            Give None if arguments of the model follow.
        *args: The model's arguments.
        num_draws: The least effective sample size of each quantity; the chains return at least as many draws.
        num_chains: The number of chains, at least 4; by default 256, or 16 if the model runs one draw at a time.
        max_sweeps: The largest number of sweeps of all chains, those of the warm-up included.
        progress: Whether to show a progress bar.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.sampling.Samples`.  Ctrl-C ends sampling early, and returns the draws so far.

    Raises:
        ValueError: If a number is out of its range; if the guide was never trained, is a point, is of another model, or
            has no density over its draws; if its support leaves out more than 1 % of the posterior's mass; if a
            discrete latent of infinite support is left to the model; or if a plate is subsampled.

    Warns:
        UserWarning: If the chains have not converged, the model runs one draw at a time, or its log-density is a
            visibly noisy estimate.

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
    check_integers(CALLER, num_draws=num_draws, max_sweeps=max_sweeps)
    check_integers(CALLER, 4, optional=True, num_chains=num_chains)
    check_flags(CALLER, progress=progress)
    fit = None
    if guide is None:
        model, kwargs = Program(model, kwargs=kwargs), {}
        guide = AutoFlow(model)
        fit = fit_svi(model, guide, *args, progress=progress)
    check_trained(CALLER, guide)
    task = Task(model, guide, args, kwargs)
    with pyro.validation_enabled(False):  # chains avoid draws without density, which are no errors
        space = Density.sound(task)
        check_reach(CALLER, space.task)
        found = exact(space, Goal(num_draws, max_sweeps), num_chains, progress=progress)
    if not found.converged:
        words = f"Train the guide longer, reparametrise the model, or give more than max_sweeps={max_sweeps}."
        if max(found.acceptance) < FROZEN:
            words = "They hardly move. Is the gradient of the model's density finite?"
        elif found.sweeps < max_sweeps:
            words = "They were interrupted."
        warn_user(f"{CALLER}: the chains have not converged after {found.sweeps} sweeps. {found.worst}. {words}")
    return replace(found, fit=fit)
