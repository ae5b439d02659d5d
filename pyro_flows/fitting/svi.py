"""Stochastic variational inference: fit a guide to a model's posterior by maximising the ELBO.

Stochastic Variational Inference (Hoffman, Blei, Wang, Paisley 2013, arXiv:1206.7051); Automated Variational Inference
in Probabilistic Programming (Wingate, Weber 2013, arXiv:1301.1299).
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro import validation_enabled
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from ..checks import check_flags, check_integers, joined, quoted
from ..guides import AutoFlow, AutoPlateFlow
from ..guides.encoding import initialize
from ..objectives import PathELBO, TemperedELBO
from ..objectives.particles import ParticleObjective
from ..programs.nesting import settle, takes_nesting
from ..programs.task import Task
from ..training import checkpoint as checkpoints
from ..training import processes
from ..training.attempts import check_path
from ..training.loop import Fit, ask, check_settings, descend
from ..training.randomness import unchanged
from .beforehand import check_task, program_of
from .inspect import check_no_parameters, culprit, fingerprint, has_all, trained_by
from .ladder import climb
from .optimizers import matrices, optimizers
from .pace import in_training
from .propriety import check_proper
from .schedule import suited_to
from .warm import start_from_gaussian

SETTINGS = "num_particles", "vectorize_particles", "num_steps", "start", "alpha", "buffer_size"  # of objectives
ONE_BY_ONE = 8  # draws in each step where the model runs one at a time
LONGEST_END = ".deeper-and-longer"  # that a fit of several gives the name of a checkpoint


@processes.together
@takes_nesting
def fit_svi(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    steps: int | None = None,
    objective: ELBO | None = None,
    num_particles: int | None = None,
    lr: float | None = None,
    clip_norm: float | None = None,
    warm_start: bool | None = None,
    on_nonfinite: str = "skip",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    escalate: bool = False,
    restarts: int = 1,
    vectorize: str = "auto",
    max_plate_nesting: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Fit:
    """Fit a guide, and whatever parameters the model has, by maximising the evidence lower bound.

    With the default objective the loss of a step, in nats, is a mean over draws z of the guide q, which estimates what
    is never below minus the log evidence (Hoffman et al. 2013, arXiv:1206.7051; Wingate, Weber 2013, arXiv:1301.1299)::

        loss = -ELBO = E_q [log q(z) - log p(z, x)]

    An ``AutoFlow`` starts from a Gaussian that is found first, within a second or so, and suits ill-conditioned and
    far-off posteriors; then it is trained with path gradients.  The data set each ``Standardize``
    in the encoder of a new ``AutoPlateFlow``, which those of ``pyro_flows.encoders`` begin with.

    Args:
        model: A Pyro model.
        guide: Any Pyro guide.
        *args: The model's arguments.
        steps: The number of steps; by default as many as a ``TemperedELBO`` anneals over, or as suit the guide and the
            Gaussian that it starts from (see *Choosing a flow* in the docs).
        objective: A Pyro ELBO, such as those of ``pyro_flows.objectives``; by default a ``PathELBO`` with
            ``num_particles`` draws at once, or, where latents are angles, a ``Trace_ELBO``: the scores of steep splines
            make path gradients too noisy.  Of several processes each takes all that it asks for, draws and minibatches,
            and their mean counts.
        num_particles: The number of draws in each step, where no objective is given; by default what suits the guide,
            or 8 where the model runs one draw at a time.  Several processes share them (*Several processes and GPUs* in
            the docs).
        lr: The largest step size, which is reached within 100 steps and falls to zero along a cosine; by default 0.01,
            or 0.003 where latents are angles.  Beyond 32 latents Muon trains an ``AutoFlow``'s networks; Adam all else.
        clip_norm: The largest norm of a gradient; by default 100, or 1 for an ``AutoFlow`` over more than 32 latents.
        warm_start: Whether to look for a Gaussian to start from, one of the flattened posterior for a ``TemperedELBO``.
            By default a new ``AutoFlow`` does, with objectives of ``pyro_flows`` that are vectorised over draws and no
            subsampled plates; one that was trained before goes on from where it is.
        on_nonfinite: ``"skip"`` passes over steps whose loss or gradient is not finite, counts them, and ends with an
            error when there are 100 in a row; ``"raise"`` ends at the first.
        checkpoint: A file that the state of the run is kept in, after each 50 steps but at most every ten seconds,
            and at the end.  A run that was killed and is called again with the same file goes on from there, to the
            same result as without the break, with another number of processes too, but for their noise.  Runs are told
            apart by their settings and by tensors, numbers and strings among the arguments, not by what the model holds
            itself.  With ``escalate`` or ``restarts`` each fit has a file of its own, with the fit's name added.  Where
            the disk is full, training goes on and tries again.
        progress: Whether to show a progress bar.
        escalate: Whether to judge the fit by :func:`~pyro_flows.check` and, until one can be trusted, to go on: from a
            Gaussian to the guide's flow, to more couplings trained for longer, and to an objective that covers mass.
            The fit's ``rungs`` tell of each; use its ``guide``, which need not be the one given.  ``steps`` and ``lr``
            are those of the guide's own flow.
        restarts: How often to fit an ``AutoFlow``, each time from elsewhere: the prior, or far around the start.  The
            best is kept.
        vectorize: The way to run many draws: ``"plate"``, ``"vmap"`` or ``"loop"``; by default the first of these that
            does to draws what single runs do (*Any Pyro program* in the docs).
        max_plate_nesting: How many dimensions the plates of model and guide take; by default that of the objective, or
            what one run shows, which is too few where a model has dimensions of its own to the left of its plates.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Returns:
        The :class:`~pyro_flows.Fit`.  The guide is left at its best state, in evaluation mode, also after Ctrl-C, which
        ends the fit early and returns.

    Raises:
        TypeError: If the model asks for arguments that are not given.
        ValueError: If an argument is out of its range, the guide refuses the model or lacks a latent of it that
            cannot be summed out, there is nothing to train, the posterior is improper, the checkpoint is
            of another run, or several processes do not fit the same.
        FloatingPointError: If the loss or gradients stay non-finite; the error names the site at fault.

    Warns:
        UserWarning: If more than a fifth of the steps was skipped, or a checkpoint could not be written.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0, 1))
        ...     pyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> guide = AutoFlow(model)
        >>> fit = fit_svi(model, guide, torch.tensor(2.0), steps=20, progress=False)
        >>> fit.losses.shape, bool((guide.median()["x"] - 1).abs() < 0.2)  # the posterior is Normal(1, 0.71)
        (torch.Size([20]), True)
    """
    kwargs = joined("fit_svi", kwargs, model_kwargs)
    settings: dict[str, Any] = {
        "num_particles": num_particles,
        "lr": lr,
        "clip_norm": clip_norm,
        "on_nonfinite": on_nonfinite,
        "vectorize": vectorize,
    }
    check_integers("fit_svi", optional=True, steps=steps, num_particles=num_particles)
    check_integers("fit_svi", restarts=restarts)
    if objective is not None and not any(
        hasattr(objective, verb) for verb in ("differentiable_loss", "loss_and_grads")
    ):
        raise TypeError(f"fit_svi: objective must be a Pyro ELBO such as Trace_ELBO(), got {quoted(objective)}.")
    check_flags("fit_svi", progress=progress, escalate=escalate)
    check_flags("fit_svi", optional=True, warm_start=warm_start)
    check_settings("fit_svi", lr=lr, clip_norm=clip_norm, on_nonfinite=on_nonfinite)
    file = check_path("fit_svi", "checkpoint", checkpoint, LONGEST_END if escalate or restarts > 1 else "")
    if escalate or restarts > 1:
        if not isinstance(guide, AutoFlow):
            raise ValueError(f"fit_svi: escalate and restarts are for an AutoFlow, not for {type(guide).__name__}.")
        if guide.encoder is not None:
            raise ValueError("fit_svi: escalate and restarts fit one data set; give guide.bind(...), or no encoder.")
        if escalate and objective is not None:
            raise ValueError("fit_svi: escalate=True chooses objectives itself; leave out objective, or escalate.")
        settings |= {"steps": steps, "objective": objective, "warm_start": warm_start, "progress": progress}
        guide.setup(*args, **kwargs)
        task = Task(model, guide, args, kwargs, vectorize)
        check_no_parameters(task)
        check_task(task, objective, search=True)
        fit_once = functools.partial(_again, model, args, kwargs)
        return climb(fit_once, guide, task, settings, checkpoint, escalate=escalate, restarts=restarts)
    settle(objective)
    task = Task(model, guide, args, kwargs, vectorize)
    check_task(task, objective, search=bool(warm_start))
    _check_steps(steps, annealed := getattr(objective, "num_steps", None))
    suited = suited_to(guide)
    if num_particles and objective is None and num_particles % processes.size():
        raise ValueError(
            f"fit_svi: num_particles={num_particles} are those of all {processes.size()} processes together, which "
            "must be able to share them equally; give a multiple of the number of processes, or leave it out."
        )
    lr, clip_norm = float(lr or suited.lr), float(clip_norm or suited.clip_norm)
    asked: dict[str, Any] = {}  # what the user knows of, whatever the number of processes
    if objective is None:
        several = (num_particles or suited.num_particles) > 1
        if several:
            with unchanged():
                task.settle()
        alone = several and task.runs_one_by_one
        num_particles = num_particles or (min(ONE_BY_ONE, suited.num_particles) if alone else suited.num_particles)
        asked = {"num_particles": num_particles, "vectorize_particles": num_particles > 1}
        kind = Trace_ELBO if isinstance(guide, AutoFlow) and guide.has_circles else PathELBO
        own = -(-num_particles // processes.size())
        by_plate = several and task.guide.engine == "plate"
        objective = kind(own, max_plate_nesting=task.nesting, vectorize_particles=by_plate)
    kept = checkpoints.steps_of(file) if file else None
    if warm_start and not isinstance(guide, AutoFlow):
        raise ValueError(f"fit_svi: warm_start=True is for an AutoFlow, not for {type(guide).__name__}.")
    start = None
    if isinstance(guide, AutoPlateFlow) and guide.is_fresh:
        initialize("fit_svi", guide.contexts.encoder, model, args, kwargs)
    if isinstance(guide, AutoFlow) and not kept:
        ours = isinstance(objective, PathELBO | ParticleObjective) and objective.vectorize_particles
        new = guide.is_fresh and ours and not task.subsampled and guide.encoder is None
        if new:
            check_proper(guide, task)
        if new if warm_start is None else warm_start:
            power = objective.beta if isinstance(objective, TemperedELBO) else 1.0
            start = start_from_gaussian(guide, task, power)
    program = program_of(task, objective)

    def loss() -> Tensor:
        if hasattr(objective, "differentiable_loss"):
            with validation_enabled(False) if task.has_bare_dimensions else contextlib.nullcontext():
                return objective.differentiable_loss(program, guide, *args, **kwargs)
        # An objective such as RenyiELBO fills in the gradients itself, one such as ReweightedWakeSleep has two losses.
        found = objective.loss_and_grads(program, guide, *args, **kwargs)
        return torch.tensor(sum(found) if isinstance(found, tuple) else found, requires_grad=True)

    parameters = trained_by(loss, model, guide)
    with in_training(guide, parameters, objective):
        fewer = suited_to(guide, near=True).steps
        near = kept == fewer  # a run that goes on has known since its start
        if isinstance(guide, AutoFlow) and start:
            near = start.is_near and has_all(guide, parameters)
        near = processes.first(lambda: near)
        fit = descend(
            loss,
            parameters,
            optimizers(parameters, lr, matrices(guide)),
            trained=guide,
            steps=steps or annealed or (fewer if near else suited.steps),
            lr=lr,
            clip_norm=clip_norm,
            on_nonfinite=on_nonfinite,
            progress=progress,
            diagnose=lambda: culprit(task),
            settled=lambda: getattr(objective, "settled", True),
            checkpoint=file,
            settings={
                "objective": type(objective).__name__,
                **{name: getattr(objective, name, None) for name in SETTINGS},
                **asked,
                "data": fingerprint((*args, *kwargs.values())),
            },
            companion=objective,
        )
    if fit.skipped > fit.steps / 5:
        warnings.warn(
            f"fit_svi: {fit.skipped} of {fit.steps} steps were skipped, as loss or gradient were not finite; what was "
            f"learned comes from the others. {ask(lambda: culprit(task))}",
            stacklevel=4,
        )
    return fit


def _again(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], guide: AutoFlow, **settings: Any
) -> Fit:
    return fit_svi(model, guide, *args, model_kwargs=kwargs, **settings)


def _check_steps(asked: int | None, annealed: int | None) -> None:
    """Refuse fewer steps than an objective anneals over."""
    if asked and annealed and asked < annealed:
        raise ValueError(
            f"fit_svi: steps={asked} end before the num_steps={annealed} in which the objective reaches the "
            "posterior.  Leave steps out, or give the objective as many."
        )
