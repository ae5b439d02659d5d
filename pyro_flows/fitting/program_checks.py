"""Checks of programs: before a fit, and after a loss that is not finite."""

from __future__ import annotations

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from torch import Tensor

from ..objectives import ForwardKL, PathELBO, PathEnumELBO
from ..objectives.base import ParticleObjective
from ..programs.latents import check_drawn, check_guided, check_likelihood, lacking
from ..programs.model_and_guide import Task
from ..training.randomness import unchanged
from ..user_code import warn_user
from .propriety import check_masked
from .score_check import check_score


def check_task(task: Task, objective: ELBO | None, *, search: bool) -> None:
    """Raise ValueError unless the guide has all latents and programs run vectorised over draws, if a fit needs both.

    Args:
        task: The model and the guide.
        objective: The user's objective; None for the default one.
        search: True if the fit searches for a start.
    """
    if drawn := [name for name in task.left_out if name in task.latents and not task.observes]:
        name = drawn[0]
        warn_user(f"fit_svi: the model observes no data, since {name}=None is drawn. Give {name}=... if you have it.")
    if search or objective is None or isinstance(objective, PathELBO | PathEnumELBO | ParticleObjective):
        check_guided("fit_svi: ", *task.traces, task.left_out)
        check_drawn("fit_svi: ", *task.traces)
        if not task.model.enumerated:  # a point may depend on discrete latents, which are drawn here
            check_likelihood("fit_svi", task.traces[0])
    if search or objective is None or (_takes_scores(objective) and not task.model.enumerated):
        check_score(task)
    check_masked(task)
    vectorised = is_vectorised(objective) and not lacking(*task.traces)
    if search or vectorised:
        with unchanged():
            task.settle()
    if vectorised and task.guide.engine != "plate":
        raise ValueError(
            f"fit_svi: the guide{task.guide.fault}. Let it broadcast to the left of its plates, or give the objective "
            "vectorize_particles=False."
        )


def is_vectorised(objective: ELBO | None) -> bool:
    """True if an objective runs programs for many draws at once."""
    return bool(getattr(objective, "vectorize_particles", False)) and getattr(objective, "num_particles", 1) > 1


def _takes_scores(objective: ELBO) -> bool:
    """True if an objective trains guides by the model's scores."""
    return not isinstance(objective, ForwardKL)


@torch.no_grad()
def culprit(task: Task) -> str:
    """Return words for the first site, of the guide and then of the model, whose value or density is not finite."""
    for _ in range(20):
        with pyro.validation_enabled(False):  # validation would raise, and name no site
            model_trace, guide_trace = task.once()
        for program, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, site in trace.nodes.items():
                if site["type"] != "sample":
                    continue
                value = site["value"]
                if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                    return f"the {program}'s site {name!r} has a value that is not finite"
                log_prob = scale_and_mask(site["fn"].log_prob(value), 1.0, site["mask"])
                if program == "model" and (log_prob == -torch.inf).any():
                    return (
                        f"the model's site {name!r} has a log-density of -inf where the guide draws: an overflow, or a "
                        "hard edge, where KL(q || p) is infinite: use pf.posterior or pf.anneal"
                    )
                if not log_prob.isfinite().all():
                    return f"the {program}'s site {name!r} has a log-density that is not finite"
    return "all sites are finite in 20 single draws, so the gradient is at fault"
