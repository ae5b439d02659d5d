"""The posterior of a model, from the model and its data alone: the stages of an answer, in their order.

A guide that suits the model is fitted and checked.  If it is trusted, its draws are the answer; if its weights are
reliable, they correct the draws.  Otherwise chains from the guide follow, which are exact once they have converged, or
a population that finds modes, if the check has found mass that chains may not reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..arguments import check_flags, check_integers, check_numbers, check_program
from ..programs.plate_nesting import runs_programs
from ..training import distributed
from ..user_code import warn_user
from .choice import choose
from .record import Posterior, Question
from .stages import Stages

CALLER = "posterior"


@runs_programs
def posterior(
    model: Callable[..., Any],
    *args: Any,
    num_draws: int = 4000,
    seconds: float | None = None,
    guide: Any = None,
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Sample the posterior of a model, and go on until the draws can be trusted.

    A guide that suits the model is fitted and checked.  If the check does not trust it, its draws are weighted, or
    chains from the guide run until they have converged.  If modes are missing, a population annealed from the prior
    finds them.

    Args:
        model: A Pyro model; discrete latents of finite support are summed out, and sampled at the end.
        *args: The model's arguments.
        num_draws: The number of draws.
        seconds: The time after which the best answer so far is returned; by default there is no limit.
        guide: A guide, or a function from the model to one such as ``pf.AutoStructuredFlow``.  The default is an
            :class:`~pyro_flows.AutoFlow`, beyond 512 latents an :class:`~pyro_flows.AutoStructuredFlow`, and an
            :class:`~pyro_flows.AutoPlateFlow` if latents lie in a subsampled plate.
        progress: Whether to show progress bars, and what each stage finds.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.Posterior`.  Ctrl-C returns the best answer so far.

    Raises:
        ValueError: If a number is out of its range, the model has no continuous latents, or its posterior is detectably
            improper.

    Warns:
        UserWarning: If the draws cannot be trusted.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> found = posterior(model, torch.tensor(2.0), progress=False)
        >>> found.verdict, round(found.log_evidence, 1)  # log Normal(2; 0, 2**0.5)
        ('trust', -2.3)
    """
    began = time.perf_counter()
    check_program(model=model)
    check_integers(CALLER, num_draws=num_draws)
    check_numbers(CALLER, above=0, optional=True, seconds=seconds)
    check_flags(CALLER, progress=progress)
    if distributed.size() > 1:
        raise ValueError(f"{CALLER}: run it in one process, got {distributed.size()}. Several can share fit_svi.")
    stages = Stages(Question(model, args, kwargs), num_draws, progress)
    try:
        _go_on(stages, choose(model, guide, args, kwargs))
    except (KeyboardInterrupt, ValueError, FloatingPointError) as error:
        if not stages.judged:
            raise
        if not isinstance(error, KeyboardInterrupt):
            warn_user(f"{CALLER}: a stage failed, and the best answer before it is returned. {error}")
    return stages.result(time.perf_counter() - began)


def _go_on(stages: Stages, guide: Any) -> None:
    """Fit and check a guide, and go on until the answer can be trusted."""
    try:
        stages.fit(guide)
    except FloatingPointError:  # for example at a hard edge, where a population still works
        stages.cover()
    stages.check()
    if not stages.is_settled and not stages.best.misses:
        stages.sample()
    for _ in range(2):
        if not stages.is_settled:
            stages.cover()
            stages.check()
    if not stages.is_settled and not stages.best.misses:
        stages.sample()
