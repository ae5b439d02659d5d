"""The program that a fit runs, and checks of model and guide before any training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from ..objectives import PathELBO, PathEnumELBO
from ..objectives.particles import ParticleObjective
from ..programs.latents import check_guided, lacking
from ..programs.quoting import quoted
from ..programs.task import Task
from ..training.randomness import unchanged


def check_task(task: Task, objective: ELBO | None, *, search: bool) -> None:
    """Refuse a guide that lacks latents, and programs that do not run vectorised over draws, where a fit needs both.

    Args:
        task: The model and the guide.
        objective: The user's objective; None for the default one.
        search: True if a place to start from is searched for.
    """
    if search or objective is None or isinstance(objective, PathELBO | PathEnumELBO | ParticleObjective):
        check_guided("fit_svi: ", *task.traces)
    if search or objective is None:
        with unchanged():
            _check_gradients(task)
    if search or (_is_vectorised(objective) and not lacking(*task.traces)):
        with unchanged():
            task.settle()
    if _is_vectorised(objective) and task.is_settled and task.guide.engine != "plate":
        raise ValueError(
            f"fit_svi: the guide{task.guide.fault}. Let it broadcast to the left of its plates, or give the objective "
            "vectorize_particles=False."
        )


def _check_gradients(task: Task) -> None:
    """Refuse a model that runs at a draw, as it did when it was traced, but not where gradients are kept."""
    latents = task.guide.alone(lambda view: {name: view.read(name) for name in task.latents}, 1)
    held = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in latents.items()}
    with torch.enable_grad():
        try:
            task.model.with_(engine="loop").log_prob(held, 1)
        except RuntimeError as error:
            raise ValueError(
                f"fit_svi: the model has no gradients, by which guides are trained: {quoted(error)}. Keep latents in "
                "torch, without .numpy(); or learn from simulations: give an AutoFlow an encoder, and fit_amortized."
            ) from error


def program_of(task: Task, objective: ELBO) -> Callable[..., Any]:
    """Return the model as an objective runs it: as it is, or, where it would not work so, lifted."""
    if isinstance(objective, TraceEnum_ELBO):
        return task.model.marked
    sums_itself = not isinstance(objective, Trace_ELBO) or isinstance(objective, TraceMeanField_ELBO)
    if sums_itself or not (task.model.enumerated or _is_vectorised(objective)):
        return task.model.call
    with unchanged():
        return task.broadcasting


def _is_vectorised(objective: ELBO | None) -> bool:
    return bool(getattr(objective, "vectorize_particles", False)) and getattr(objective, "num_particles", 1) > 1
