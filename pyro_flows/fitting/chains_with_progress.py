"""A run of chains from a guide under a progress bar."""

from __future__ import annotations

from torch import Tensor
from tqdm import tqdm

from ..programs.latent_space import LatentSpace
from ..sampling import Samples
from ..sampling.converged_chains import Goal, Run
from ..training.interrupts import watching

CHAINS, ONE_BY_ONE = 256, 16  # default numbers of chains; the latter where the model runs one draw at a time


def exact(
    space: LatentSpace, goal: Goal, num_chains: int | None, *, progress: bool, others: Tensor | None = None
) -> Samples:
    """Sample a posterior by chains that start from a guide's draws; Ctrl-C ends them early.

    Args:
        space: The guide's space.
        goal: The goal of the run.
        num_chains: The number of chains, or None for the default.
        progress: True to show a progress bar.
        others: Starts of some of the chains, ``(n, D)``.
    """
    num_chains = num_chains or (ONE_BY_ONE if space.task.runs_one_by_one else CHAINS)
    with watching(tqdm(disable=not progress, unit="sweep", dynamic_ncols=True)) as watch:
        return Run(space, num_chains, goal, watch, others).run()
