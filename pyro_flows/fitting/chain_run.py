"""A run of chains in the space of a guide, until they have converged, and its record."""

from __future__ import annotations

import time

from torch import Tensor
from tqdm import tqdm

from ..programs.latent_space import LatentSpace
from ..sampling.chains import FROZEN
from ..sampling.run import BATCH, Goal, Outcome, Run
from ..sampling.samples import Samples
from ..training.interrupts import hold_interrupts

CHAINS, ONE_BY_ONE = 256, 16  # chains by default, also where the model runs one draw at a time


def exact(
    space: LatentSpace, goal: Goal, num_chains: int | None, *, progress: bool, others: Tensor | None = None
) -> Samples:
    """Draw from the posterior by chains that start from a guide's draws.

    Args:
        space: The guide's space.
        goal: What is asked for.
        num_chains: The number of chains, or None.
        progress: Whether to show a progress bar.
        others: Other places that some chains start from, ``(n, D)``.
    """
    start = time.perf_counter()
    chains = num_chains or (ONE_BY_ONE if space.task.runs_one_by_one else CHAINS)
    found = _run(space, chains, goal, others, progress=progress)
    rhat, ess_bulk, ess_tail, *_ = found.convergence
    return Samples(
        draws={k: v.unflatten(0, found.z.shape[:2]) for k, v in space.drawn_back(found.z.flatten(0, 1), BATCH).items()},
        names=space.read.names,
        rhat=rhat,
        ess_bulk=ess_bulk,
        ess_tail=ess_tail,
        converged=found.converged,
        divergences=found.divergences,
        acceptance=found.acceptance,
        chance=found.chance,
        sweeps=found.sweeps,
        seconds=time.perf_counter() - start,
        guide=space.task.guide.call,
    )


def _run(space: LatentSpace, chains: int, goal: Goal, others: Tensor | None, *, progress: bool) -> Outcome:
    """Run chains under a progress bar; Ctrl-C ends them early."""
    with hold_interrupts() as asked, tqdm(disable=not progress, unit="sweep", dynamic_ncols=True) as bar:

        def tell(words: str) -> None:
            bar.update()
            bar.set_postfix_str(words, refresh=False)

        return Run(space, chains, goal, tell, asked, others).run()


def warning(found: Samples, max_sweeps: int) -> str:
    """Say how far the chains are from convergence, why, and what to do."""
    rhat, ess, names = found.rhat, found.ess_bulk.minimum(found.ess_tail), found.names
    highest, lowest = int(rhat.argmax()), int(ess.argmin())
    words = (
        f"sample: the chains have not converged after {found.sweeps} sweeps. R-hat is {float(rhat[highest]):.3f} for "
        f"{names[highest]}, and the effective sample size {float(ess[lowest]):.0f} for {names[lowest]}. "
    )
    if max(found.acceptance, default=1.0) < FROZEN:
        return words + "They hardly move. Is the gradient of the model's density finite?"
    if found.sweeps < max_sweeps:
        return words + "They were interrupted."
    return words + f"Train the guide longer, reparametrise the model, or give more than max_sweeps={max_sweeps}."
