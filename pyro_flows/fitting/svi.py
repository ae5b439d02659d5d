"""Stochastic variational inference: fit a guide to a model's posterior by maximising the ELBO.

Stochastic Variational Inference (Hoffman, Blei, Wang, Paisley 2013, arXiv:1206.7051); Automated Variational Inference
in Probabilistic Programming (Wingate, Weber 2013, arXiv:1301.1299).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pyro.infer import ELBO

from ..arguments import check_flags, check_integers, check_kind, check_numbers, check_program, quoted
from ..encoders.training_record import recorded
from ..guides.default_training import plan_of
from ..programs.model_and_guide import Task
from ..programs.plate_nesting import runs_programs, settle
from ..training import Fit, Gradients, distributed
from ..training.checkpoint import check_path
from .elbo import ELBOFit, Wish
from .model_batches import ModelBatches, find_loader
from .program_checks import check_task

CALLER = "fit_svi"


@distributed.collective
@runs_programs
@recorded()
def fit_svi(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    steps: int | None = None,
    objective: ELBO | None = None,
    num_particles: int | None = None,
    lr: float | None = None,
    gradients: Gradients | None = None,
    warm_start: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Fit:
    """Fit a guide, and any parameters of the model, by maximising the evidence lower bound.

    With the default objective the loss of a step, in nats, is a mean over draws z of the guide q.  It estimates an
    upper bound of minus the log evidence (Hoffman et al. 2013; Wingate, Weber 2013)::

        loss = -ELBO = E_q [log q(z) - log p(z, x)]

    An ``AutoFlow`` starts from a Gaussian, which is found within about a second and suits ill-conditioned and far-off
    posteriors.  Then it is trained with path gradients.  Every ``Standardize`` layer in the encoder of a new
    ``AutoPlateFlow`` is initialised from the data; the encoders of ``pyro_flows.encoders`` begin with one.

    Args:
        model: A Pyro model.
        guide: Any Pyro guide.
        *args: The model's arguments.  A ``DataLoader`` among them stands for the values of its batches: in each step
            the model gets those of the next one.  See *Thousands of latents* in the docs.
        steps: The number of steps.  The default is the number over which a ``TemperedELBO`` anneals.  Otherwise it
            suits the guide and the Gaussian from which it starts, and an ``AutoFlow`` that has converged takes fewer
            (see *Choosing a flow* in the docs).
        objective: A Pyro ELBO, such as those of ``pyro_flows.objectives``.  The default is a ``PathELBO`` with
            ``num_particles`` vectorised draws.  If latents are angles, it is a ``Trace_ELBO``, since the scores of
            steep splines make path gradients too noisy.  Each of several processes takes all its draws and minibatches,
            and the loss is their mean.
        num_particles: The number of draws per step, without ``objective``; by default as suits the guide, or 8 if the
            model runs one draw at a time.  Several processes share them (*Several processes and GPUs* in the docs).
        lr: The largest step size, which is reached within 100 steps and falls to zero along a cosine.  The default is
            0.01, 0.02 for an ``AutoFlow`` over up to 32 latents alone, or 0.003 if latents are angles.  Without
            ``objective`` SOAP trains that guide, Muon the networks of larger ones, and Adam all else.
        gradients: The treatment of gradients: see :class:`~pyro_flows.training.Gradients`.  Their largest norm is by
            default 100, or 1 for an ``AutoFlow`` over more than 32 latents.
        warm_start: Whether to search for a Gaussian to start from; for a ``TemperedELBO``, one of the flattened
            posterior.  By default a new ``AutoFlow`` does so with objectives of ``pyro_flows`` that are vectorised over
            draws, without subsampled plates.  It takes at most a minute then if the model runs one draw at a time, and
            is left out with a warning if too few runs fit into that.  A guide that was trained before resumes from its
            present state.
        checkpoint: A file for the state of the run, written every 50 steps but at most every ten seconds, and at the
            end.  The same call with the same file resumes a run that was killed, to the same result as without the
            break.  With another number of processes the noise differs.  Runs are identified by their settings and
            by tensors, numbers and strings among the arguments, not by attributes of the model.  If the disk is full,
            training goes on and tries again.
        progress: Whether to show a progress bar.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.Fit`.  The guide is left at its best state, in evaluation mode, also after Ctrl-C, which
        ends the fit early.

    Raises:
        TypeError: If the model needs arguments that are not given, or a guide is given in its place.
        ValueError: If an argument is out of its range, the guide does not suit the model or lacks a latent that cannot
            be summed out, there is nothing to train, the model's score is not the gradient of its log-density, the
            posterior is improper, all data are points of ``Delta``, the checkpoint is of another run, or several
            processes do not fit the same.
        FloatingPointError: If the loss or gradients stay non-finite; the error names the site at fault.

    Warns:
        UserWarning: If priors are masked, and so flat.  If more than a fifth of the steps, or the last ones, were
            skipped.  If a checkpoint could not be written.

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
    check_program(model=model, guide=guide)
    check_integers(CALLER, optional=True, steps=steps, num_particles=num_particles)
    check_flags(CALLER, progress=progress)
    check_flags(CALLER, optional=True, warm_start=warm_start)
    check_numbers(CALLER, above=0, optional=True, lr=lr)
    gradients = Gradients() if gradients is None else gradients
    check_kind(CALLER, Gradients, "training.Gradients(...)", gradients=gradients)
    _check_objective(objective, steps)
    loader = find_loader(args, kwargs)
    if loader is not None and warm_start:
        raise ValueError(f"{CALLER}: warm_start needs all data at once, and not a DataLoader.")
    batches = ModelBatches(loader, args) if loader is not None else None
    args = batches.next() if batches else args
    file = check_path(CALLER, "checkpoint", checkpoint)
    if warm_start and not plan_of(guide).is_joint:
        raise ValueError(f"{CALLER}: warm_start=True is for an AutoFlow, not for {type(guide).__name__}.")
    settle(objective)
    task = Task(model, guide, args, kwargs)
    check_task(task, objective, search=bool(warm_start))
    wish = Wish(steps, lr, objective, num_particles, warm_start, gradients, file, progress)
    return ELBOFit(task, wish, batches).run()


def _check_objective(objective: ELBO | None, steps: int | None) -> None:
    """Raise an error unless the objective is an ELBO, and the steps suffice for it to anneal."""
    verbs = "differentiable_loss", "loss_and_grads"
    if objective is not None and not any(hasattr(objective, verb) for verb in verbs):
        raise TypeError(f"{CALLER}: objective must be a Pyro ELBO such as Trace_ELBO(), got {quoted(objective)}.")
    annealed = getattr(objective, "num_steps", None)
    if steps and annealed and steps < annealed:
        raise ValueError(f"{CALLER}: steps={steps} end before the num_steps={annealed} of objective; leave steps out.")
