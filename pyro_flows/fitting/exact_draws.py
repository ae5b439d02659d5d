"""Exact draws of a posterior by chains that start from a guide's draws and run until they have converged."""

import time
from collections.abc import Callable
from typing import Any

import pyro
from torch import Tensor
from tqdm import tqdm

from ..arguments import check_flags, check_integers
from ..diagnostics.guide_space import target_of
from ..diagnostics.unreached import check_reach
from ..programs.checks import check_likelihood, check_trained
from ..programs.density import Density
from ..programs.model_and_guide import Task
from ..programs.program import runs_programs
from ..sampling import Samples
from ..sampling.chains import MOVES
from ..sampling.converged_chains import ChainRun, Goal, NoDensity
from ..training.interrupts import watching
from ..user_code import warn_user

CALLER = "sample"
BATCH = 4096  # draws per run of the model
CHAINS, ONE_BY_ONE = 256, 16  # default numbers of chains; the latter where the model runs one draw at a time


@runs_programs
def sample(
    model: Callable[..., Any],
    guide: Callable[..., Any],
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
        guide: A trained guide of the same latents.
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
    check_trained(CALLER, guide)
    task = Task(model, guide, args, kwargs)
    with pyro.validation_enabled(False):  # chains avoid draws without density, which are no errors
        space = Density.sound(task)
        check_reach(CALLER, space.task)
        found = exact(space, Goal(num_draws, max_sweeps), num_chains, progress=progress)
    if not found.converged:
        words = f"Train the guide longer, reparametrise the model, or give more than max_sweeps={max_sweeps}."
        if max(found.acceptance) < MOVES.frozen:
            words = "They hardly move. Is the gradient of the model's density finite?"
        elif found.sweeps < max_sweeps:
            words = "They were interrupted."
        warn_user(f"{CALLER}: the chains have not converged after {found.sweeps} sweeps. {found.worst}. {words}")
    return found


def exact(
    space: Density, goal: Goal, num_chains: int | None, *, progress: bool, others: Tensor | None = None
) -> Samples:
    """Sample a posterior by chains that start from a guide's draws; Ctrl-C ends them early.

    Args:
        space: The guide's space.
        goal: The goal of the run.
        num_chains: The number of chains, or None for the default.
        progress: True to show a progress bar.
        others: Starts of some of the chains, ``(n, D)``.
    """
    began = time.perf_counter()
    num_chains = num_chains or (ONE_BY_ONE if space.task.runs_one_by_one else CHAINS)
    with watching(tqdm(disable=not progress, unit="sweep", dynamic_ncols=True)) as watch:
        try:
            run = ChainRun(target_of(space, BATCH), num_chains, goal, watch, others)
        except NoDensity:
            check_likelihood("sample", space.task.traces[0])
            raise
        found = run.run()
    z = run.record.z()
    draws = space.complete(z.flatten(0, 1), BATCH)
    return Samples(
        draws={name: value.unflatten(0, z.shape[:2]) for name, value in draws.items()},
        names=space.read.names,
        rhat=found.rhat,
        ess_bulk=found.ess_bulk,
        ess_tail=found.ess_tail,
        converged=run.converged,
        divergences=run.divergences,
        acceptance=run.acceptance,
        chance=run.chance,
        sweeps=run.chains.count,
        seconds=time.perf_counter() - began,
        guide=space.task.guide.call,
    )
