"""Programs before and during a fit: checks, what is trained, fingerprints of data and design, the site at fault."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..bijectors import Bijector
from ..objectives import PathELBO, PathEnumELBO
from ..objectives.particles import ParticleObjective
from ..programs.error_text import quoted
from ..programs.latents import check_guided, lacking
from ..programs.log_density import is_breakdown
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


def trained_by(loss: Callable[[], Tensor], model: Any, guide: Any) -> list[Tensor]:
    """The tensors that the loss depends on: those of modules, and those that Pyro's param statements touch."""
    with poutine.trace(param_only=True) as capture:
        try:
            loss()
        except (ValueError, LinAlgError, FloatingPointError) as error:
            if not is_breakdown(error):
                raise
    touched = [site["value"] for site in capture.trace.nodes.values()]
    found = [value.unconstrained() if hasattr(value, "unconstrained") else value for value in touched]
    for program in (model, guide):
        if isinstance(program, nn.Module):
            found += program.parameters()
    unique = {id(parameter): parameter for parameter in found if parameter is not None and parameter.requires_grad}
    if not unique:
        raise ValueError("fit_svi: neither the guide nor the model has parameters to train.")
    return list(unique.values())


@torch.no_grad()
def culprit(task: Task) -> str:
    """Name the first site, in the guide and then in the model, whose value or density is not finite."""
    for _ in range(20):
        with pyro.validation_enabled(False):  # which would raise, and name no site
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
                        "hard edge, where KL(q || p) is infinite: use fit_svi(..., escalate=True) or anneal"
                    )
                if not log_prob.isfinite().all():
                    return f"the {program}'s site {name!r} has a log-density that is not finite"
    return "all sites are finite in 20 single draws, so the gradient is at fault"


def fingerprint(data: tuple[Any, ...]) -> list[str]:
    """What tells one data set from another: tensors by their contents, numbers and words as they are."""
    found = []
    for value in data:
        if isinstance(value, Tensor):
            found.append(f"{zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes()):08x}")
        elif isinstance(value, int | float | str):
            found.append(repr(value))
    return found


def design(model: nn.Module) -> str:
    """What tells a module from others whose parameters have the same shapes: its classes and their settings, which
    are those arguments of their constructors that they keep as attributes."""
    found = []
    for name, part in model.named_modules():
        kept = {key: getattr(part, key, None) for key in inspect.signature(type(part)).parameters}
        plain = {k: v for k, v in kept.items() if isinstance(v, bool | int | float | str | tuple | type | Bijector)}
        found.append((name, type(part).__qualname__, plain))
    return f"{zlib.crc32(repr(found).encode()):08x}"


def check_no_parameters(task: Task) -> None:
    """Refuse a model that is trained itself: each fit would go on from where the last has left it."""
    model = task.model.call
    names = [name for name, site in task.traces[0].nodes.items() if site["type"] == "param"]
    if isinstance(model, nn.Module):
        names += [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if names:
        raise ValueError(
            f"fit_svi: escalate and restarts fit more than once, but the model has parameters ({', '.join(names[:3])}) "
            "that each fit would take over from the last. Fit once, or give them priors."
        )
