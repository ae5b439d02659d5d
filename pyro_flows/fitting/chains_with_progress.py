"""A run of chains from a guide under a progress bar."""

from __future__ import annotations

import time

from torch import Tensor
from tqdm import tqdm

from ..diagnostics.guide_space import target_of
from ..programs.density import Density
from ..programs.latents import check_likelihood
from ..sampling import Samples
from ..sampling.converged_chains import Goal, NoDensity, Run
from ..training.interrupts import watching

BATCH = 4096  # draws per run of the model
CHAINS, ONE_BY_ONE = 256, 16  # default numbers of chains; the latter where the model runs one draw at a time


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
            run = Run(target_of(space, BATCH), num_chains, goal, watch, others)
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
