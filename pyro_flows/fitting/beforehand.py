"""Checks of model and guide before a fit, so that none breaks off in the middle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer import ELBO
from pyro.poutine.trace_struct import Trace

from ..objectives import PathELBO, PathEnumELBO
from ..objectives.particles import ParticleObjective
from ..programs.draws import check_side_by_side, single_trace
from ..programs.latents import check_guided, lacking
from ..training.randomness import unchanged


def check_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    objective: ELBO | None,
    *,
    search: str = "",
) -> tuple[Trace, int]:
    """Refuse a guide that lacks latents, and a model that does not run vectorised over draws, where a fit needs both.

    Args:
        model: The model.
        guide: The guide.
        args: The model's arguments.
        kwargs: Its keyword arguments.
        objective: The user's objective; None for the default one.
        search: The argument of ``fit_svi`` by which a place to start from is searched for, if any.

    Returns:
        The model's trace of one draw, and the number of dimensions that its plates take.
    """
    single, drawn, nesting = single_trace(model, guide, args, kwargs)
    missing = lacking(single, drawn)
    if search or objective is None or isinstance(objective, PathELBO | ParticleObjective):
        check_guided("fit_svi", missing, nesting, search)
    elif isinstance(objective, PathEnumELBO):
        check_guided("fit_svi", lacking(single, drawn, enumerated=True), nesting, search)
    if search or (getattr(objective, "vectorize_particles", False) and not missing):
        with unchanged():
            check_side_by_side(model, guide, args, kwargs)
    return single, nesting
