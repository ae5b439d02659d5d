"""Stochastic variational inference: fit a guide to a model's posterior by maximising the ELBO.

Stochastic Variational Inference (Hoffman, Blei, Wang, Paisley 2013, arXiv:1206.7051); Automated Variational Inference
in Probabilistic Programming (Wingate, Weber 2013, arXiv:1301.1299).
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from pyro.infer import ELBO
from torch import Tensor, nn

from ..arguments import check_flags, check_integers, check_kind, check_numbers, check_program, quoted
from ..encoders.training_record import recorded
from ..guides.base import Schedule, plan_of
from ..guides.block_guide import BlockGuide
from ..guides.blocks import Block
from ..guides.guide_call import Call
from ..objectives import PathELBO, TemperedELBO
from ..objectives.base import ParticleObjective
from ..objectives.plain import PlainELBO
from ..programs.density import Density
from ..programs.model_and_guide import Task
from ..programs.program import bound_values, runs_programs, settle
from ..threads import OPERATIONS
from ..training import Fit, Gradients, distributed
from ..training.checkpoint import check_path, fingerprint, kept_settings, settings_of
from ..training.loop import Descent, Settings
from ..training.randomness import unchanged
from ..training.stopping import NEAR, noise_at
from .elbo_loss import ELBOLoss, ModelBatches, batches_among, fresh_mean, in_training, parts_of
from .guide_start import STARTS, Start, start_from_blocks, start_from_gaussian
from .optimizers import optimizers
from .program_checks import check_proper, check_task, culprit

CALLER = "fit_svi"
FOR_WEIGHTS = "for_weights"  # in place of a number of steps
CONVERGED = 0.01  # nats of the gap to the log evidence at convergence: far below what weights show
MANY = 64  # draws per step from which on SOAP does better than Adam
ONE_BY_ONE = 8  # draws per step if the model runs one at a time: more cost more than they gain


@distributed.collective(CALLER)
@runs_programs
@recorded()
def fit_svi(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    steps: int | Literal["for_weights"] | None = None,
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
            (see *Choosing a flow* in the docs).  ``"for_weights"`` is for an ``AutoFlow`` whose draws will be weighted,
            as by :func:`~pyro_flows.psis`.  The fit then ends soon after a quarter of them is effective and their k-hat
            is below about 0.5.  For 50 latents that is several times sooner, and at once if this holds at the start.
            Other guides take their default number.
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
    for_weights = steps == FOR_WEIGHTS
    number = None if for_weights else cast(int | None, steps)
    check_integers(CALLER, optional=True, steps=number, num_particles=num_particles)
    check_flags(CALLER, progress=progress)
    check_flags(CALLER, optional=True, warm_start=warm_start)
    check_numbers(CALLER, above=0, optional=True, lr=lr)
    gradients = Gradients() if gradients is None else gradients
    check_kind(CALLER, Gradients, "training.Gradients(...)", gradients=gradients)
    if objective is not None and not (
        hasattr(objective, "differentiable_loss") or hasattr(objective, "loss_and_grads")
    ):
        raise TypeError(f"{CALLER}: objective must be a Pyro ELBO such as Trace_ELBO(), got {quoted(objective)}.")
    annealed = getattr(objective, "num_steps", None)
    if number and annealed and number < annealed:
        raise ValueError(f"{CALLER}: steps={number} end before the num_steps={annealed} of objective; leave steps out.")
    batches = batches_among(args, kwargs)
    if batches and warm_start:
        raise ValueError(f"{CALLER}: warm_start needs all data at once, and not a DataLoader.")
    args = batches.next() if batches else args
    file = check_path(CALLER, "checkpoint", checkpoint)
    if warm_start and not plan_of(guide).is_joint:
        raise ValueError(f"{CALLER}: warm_start=True is for an AutoFlow, not for {type(guide).__name__}.")
    settle(objective)
    task = Task(model, guide, args, kwargs)
    check_task(task, objective, search=bool(warm_start))
    progress = progress and not distributed.rank()
    settings = number, objective, num_particles, lr, gradients, warm_start, for_weights, file, progress
    return ELBOFit(task, batches, *settings).run()


@dataclass(eq=False)
class ELBOFit:
    """One fit of one guide by an ELBO: the objective, the start of the guide, the schedule, and the descent.

    Args:
        task: The model and the guide.
        batches: The source of the model's arguments in each step; None if they stay the same.
        steps: As for :func:`~pyro_flows.fit_svi`, like all that follow; None stands for what suits the guide.
        for_weights: True to end once the draws of the guide can be weighted.

    Attributes:
        marks: The settings of the default objective, which do not depend on the number of processes, and the start.
        elbo: The user's objective, or the one that suits the guide.
    """

    task: Task
    batches: ModelBatches | None = None
    steps: int | None = None
    objective: ELBO | None = None
    num_particles: int | None = None
    lr: float | None = None
    gradients: Gradients = field(default_factory=Gradients)
    warm_start: bool | None = None
    for_weights: bool = False
    checkpoint: Path | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        self.guide: Any = self.task.guide.call
        self.plan, self.processes = plan_of(self.guide), distributed.size()
        self.marks: dict[str, Any] = {"for_weights": True} if self.for_weights else {}
        self.elbo: Any = self.objective or self._default()

    def _default(self) -> ELBO:
        # Processes share the draws, or the rows of a batch.
        processes, share = (1, 1 / self.processes) if self.batches else (self.processes, 1.0)
        number = self.num_particles or self.plan.schedule(share=share).num_particles
        if self.num_particles and number % processes:
            words = f"{number} are those of all {processes} processes together"
            raise ValueError(f"{CALLER}: num_particles={words}; give a multiple of {processes}, or leave it out.")
        several, by_plate = number > 1, False
        if several:
            with unchanged():
                by_plate = self.task.settle().guide.engine == "plate"
            if not self.num_particles and self.task.runs_one_by_one:
                number = min(ONE_BY_ONE, number)
        self.marks |= {"num_particles": number, "vectorize_particles": several}
        kind = PathELBO if self.plan.takes_paths else PlainELBO
        return kind(-(-number // processes), max_plate_nesting=self.task.model.nesting, vectorize_particles=by_plate)

    def run(self) -> Fit:
        """Train the guide."""
        task, guide, plan, model = self.task, self.guide, self.plan, self.task.model
        kept = settings_of(self.checkpoint) if self.checkpoint else None
        plan.prepare(Call(CALLER, model.call, model.args, model.kwargs))
        start = None if kept else self._start()
        loss = ELBOLoss(task, self.elbo, self.batches)
        parameters = loss.parameters()
        trains_guide = isinstance(guide, nn.Module) and {*parameters} <= {*guide.parameters()}
        alone = trains_guide and plan.is_joint and plan.takes_paths and guide.draws_from_flow
        alone = alone and not (self.objective or self.batches or task.subsampled)  # many draws of one flow
        alone = alone and self.elbo.vectorize_particles and self.marks["num_particles"] >= MANY
        near = trains_guide and start is not None and start.is_near
        rows_near = any(part.starts_near for part in parts_of(guide, parameters) if isinstance(part, Block))
        self.marks |= distributed.broadcast(lambda: {"near": near, "rows_near": rows_near})
        self.marks |= {name: kept[name] for name in ("near", "rows_near")} if kept else {}
        near, rows_near = self.marks["near"], self.marks["rows_near"]
        if not self.objective and rows_near and isinstance(guide, BlockGuide) and guide.prefers_short_steps:
            # Path gradients would save less noise than minibatches make, and cost a second run of the guide.
            draws = self.elbo.num_particles, self.elbo.max_plate_nesting
            loss.objective = self.elbo = PlainELBO(*draws, vectorize_particles=self.elbo.vectorize_particles)
        with in_training(guide, parameters, self.elbo, rows_near=rows_near):
            schedule = plan.schedule(near=near, alone=alone)
            if near and alone and not (self.steps or self.num_particles):
                self.elbo.num_particles = -(-schedule.num_particles // self.processes)
            settings = self._settings(schedule, parameters, alone=alone)
            soap, muon = plan.by_soap() if alone else [], plan.by_muon()
            descent = Descent(
                loss.joint if alone else loss,
                parameters,
                optimizers(parameters, settings.lr, by_soap=soap, by_muon=muon),
                settings,
                guide,
                lambda: culprit(task),
                companions=loss.companions,
                is_good=(loss.can_be_weighted if self.for_weights else loss.is_good) if alone else None,
                is_ready=loss.is_ready if self.for_weights and alone else None,
            )
            fit = descent.fit()
            if alone:  # graphs hold the units of training
                fit = self._refreshed(fit, loss, loss.joint)
        return fit if alone else self._refreshed(fit, loss, loss.plain)

    @staticmethod
    def _refreshed(fit: Fit, loss: ELBOLoss, anew: Callable[[], Tensor]) -> Fit:
        """Return the record with the mean of new losses; a mean over the steps that led to a state lags behind."""
        if not loss.repeats or fit.stopped == "interrupted":
            return fit
        fresh = fresh_mean(anew)
        return fit if math.isnan(fresh) else replace(fit, best_loss=fresh)

    def _start(self) -> Start | None:
        """Start the guide from a Gaussian and return it, or None if the guide keeps its start.

        Raises:
            ValueError: If the posterior is improper.
        """
        task, guide, elbo = self.task, self.guide, self.elbo
        new = self.plan.is_fresh and isinstance(elbo, PathELBO | ParticleObjective)
        if not self.plan.is_joint:
            return start_from_blocks(guide, task, self.progress) if new and isinstance(guide, BlockGuide) else None
        new = new and elbo.vectorize_particles and not (task.subsampled or self.batches)
        new = new and guide.encoder is None
        if new:  # one batch is no posterior
            check_proper(CALLER, Density(task), guide.start[0])
        if not (new if self.warm_start is None else self.warm_start):
            return None
        power = elbo.beta if isinstance(elbo, TemperedELBO) else 1.0
        suited, seconds = self.plan.schedule(), math.inf if self.warm_start else STARTS.seconds
        budget = STARTS.share * suited.steps * suited.num_particles
        return start_from_gaussian(guide, task, power, budget, self.progress, seconds)

    def _settings(self, schedule: Schedule, parameters: list[Tensor], *, alone: bool) -> Settings:
        model, elbo = self.task.model, self.elbo
        draws = getattr(elbo, "num_particles", 1)  # of this process
        is_large = self.task.is_settled and model.chunk == 1  # a single draw is work for several threads
        args = self.batches.others if self.batches else model.args
        data = fingerprint(bound_values(model.call, args, model.kwargs))
        data += [f"{self.batches.steps} batches"] if self.batches else []
        return Settings(
            CALLER,
            self.steps or getattr(elbo, "num_steps", None) or schedule.steps,
            lr=float(self.lr or schedule.lr),
            clip_norm=float(self.gradients.clip_norm or schedule.clip_norm),
            on_nonfinite=self.gradients.on_nonfinite,
            progress=self.progress,
            checkpoint=self.checkpoint,
            marks={"objective": type(elbo).__name__, **kept_settings(elbo), **self.marks, "data": data},
            work=math.inf if is_large else OPERATIONS * draws * sum(part.numel() for part in parameters),
            noise=noise_at(CONVERGED, draws * self.processes) if alone and not self.steps else 0.0,
            near=math.inf if self.for_weights else NEAR,
        )
