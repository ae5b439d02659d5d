"""Stochastic variational inference: fit a guide to a model's posterior by maximising the ELBO.

Stochastic Variational Inference (Hoffman, Blei, Wang, Paisley 2013, arXiv:1206.7051); Automated Variational Inference
in Probabilistic Programming (Wingate, Weber 2013, arXiv:1301.1299).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pyro.infer import ELBO

from ..arguments import check_flags, check_integers, joined, quoted
from ..guides import AutoFlow
from ..guides.schedule import plan_of
from ..programs.nesting import runs_programs, settle
from ..programs.task import Task
from ..training import distributed
from ..training.loop import Fit, check_settings
from ..training.output_files import check_path
from .elbo import ELBOFit
from .ladder import Ladder, climb
from .program_checks import check_no_parameters, check_task

CALLER = "fit_svi"
LONGEST_END = ".deeper-and-longer"  # that a fit of several gives the name of a checkpoint


@distributed.collective
@runs_programs
def fit_svi(
    model: Callable[..., Any],
    guide: Any,
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
            Gaussian that it starts from, fewer where an ``AutoFlow`` has converged before (see *Choosing a flow* in the
            docs).
        objective: A Pyro ELBO, such as those of ``pyro_flows.objectives``; by default a ``PathELBO`` with
            ``num_particles`` draws at once, or, where latents are angles, a ``Trace_ELBO``: the scores of steep splines
            make path gradients too noisy.  Of several processes each takes all that it asks for, draws and minibatches,
            and their mean counts.
        num_particles: The number of draws in each step, where no objective is given; by default what suits the guide,
            or 8 where the model runs one draw at a time.  Several processes share them (*Several processes and GPUs* in
            the docs).
        lr: The largest step size, which is reached within 100 steps and falls to zero along a cosine; by default 0.01,
            0.02 for an ``AutoFlow`` over up to 32 latents alone, or 0.003 where latents are angles.  SOAP trains that
            where no objective is given, Muon the networks of larger ones, and Adam all else.
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
            Gaussian to the guide's flow, to more couplings trained for longer, to a guide that covers all modes which a
            population finds (:func:`~pyro_flows.anneal`), and to exact draws (:func:`~pyro_flows.sample`), the fit's
            ``samples``, also where a guide can be trusted but its weights are not reliable, or see a variance that is
            off by more than 5 %.  Where training breaks down, as at hard edges, it goes on to the population.  Its
            ``rungs`` tell of each; use its ``guide``, which need not be the one given.
            ``steps`` and ``lr`` are those of the guide's own flow.
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
    kwargs = joined(CALLER, kwargs, model_kwargs)
    check_integers(CALLER, restarts=restarts)
    check_integers(CALLER, optional=True, steps=steps, num_particles=num_particles)
    check_flags(CALLER, escalate=escalate, progress=progress)
    check_flags(CALLER, optional=True, warm_start=warm_start)
    check_settings(CALLER, on_nonfinite=on_nonfinite, lr=lr, clip_norm=clip_norm)
    _check_objective(objective, steps)
    several = escalate or restarts > 1
    file = check_path(CALLER, "checkpoint", checkpoint, LONGEST_END if several else "")
    if several:
        _check_several(guide, objective, escalate=escalate)
        guide.setup(*args, **kwargs)
    elif warm_start and not plan_of(guide).is_joint:
        raise ValueError(f"{CALLER}: warm_start=True is for an AutoFlow, not for {type(guide).__name__}.")
    else:
        settle(objective)
    task = Task(model, guide, args, kwargs, vectorize)
    check_task(task, objective, search=several or bool(warm_start))
    settings: dict[str, Any] = {
        "steps": steps,
        "lr": lr,
        "clip_norm": clip_norm,
        "warm_start": warm_start,
        "on_nonfinite": on_nonfinite,
        "progress": progress,
    }
    if not several:
        return ELBOFit(task, objective, num_particles).run(settings, file)
    check_no_parameters(task)
    settings |= {"objective": objective, "num_particles": num_particles, "vectorize": vectorize}

    def again(guide: AutoFlow, **settings: Any) -> Fit:
        return fit_svi(model, guide, *args, model_kwargs=kwargs, **settings)

    return climb(Ladder(again, task, settings, checkpoint), guide, escalate=escalate, restarts=restarts)


def _check_objective(objective: ELBO | None, steps: int | None) -> None:
    """Refuse what is no ELBO, and fewer steps than it anneals over."""
    verbs = "differentiable_loss", "loss_and_grads"
    if objective is not None and not any(hasattr(objective, verb) for verb in verbs):
        raise TypeError(f"{CALLER}: objective must be a Pyro ELBO such as Trace_ELBO(), got {quoted(objective)}.")
    annealed = getattr(objective, "num_steps", None)
    if steps and annealed and steps < annealed:
        raise ValueError(f"{CALLER}: steps={steps} end before the num_steps={annealed} of objective; leave steps out.")


def _check_several(guide: Any, objective: ELBO | None, *, escalate: bool) -> None:
    """Refuse guides and objectives that cannot be fitted several times."""
    if not plan_of(guide).is_joint:
        raise ValueError(f"{CALLER}: escalate and restarts are for an AutoFlow, not for {type(guide).__name__}.")
    if guide.encoder is not None:
        raise ValueError(f"{CALLER}: escalate and restarts fit one data set; give guide.bind(...), or no encoder.")
    if escalate and objective is not None:
        raise ValueError(f"{CALLER}: escalate=True chooses objectives itself; leave out objective, or escalate.")
