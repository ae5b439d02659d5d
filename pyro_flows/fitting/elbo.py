"""One fit of a guide by an ELBO: the objective, the start of the guide, the pace of its networks, and the descent.

The settings of ``fit_svi``, its warm-up, decay and clipping, were tuned for weights as torch initialises and scales
them.  Guides set slower paces for their networks, which are safe with any optimiser; training puts them aside.  The
parameters of each row take larger steps than shared ones, since each row is seen once in many steps.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine, validation_enabled
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..conditioners.pace import Paced
from ..flows import Flow
from ..guides.base import holders
from ..guides.block_guide import BlockGuide
from ..guides.blocks import Block
from ..guides.contexts import RowContexts
from ..guides.default_training import Schedule, plan_of
from ..objectives import PathELBO, TemperedELBO
from ..objectives.base import ParticleObjective
from ..programs.latent_space import LatentSpace
from ..programs.log_density import is_breakdown
from ..programs.model_and_guide import Lifted, Task
from ..programs.program import bound_values
from ..programs.traces import leaves_of
from ..threads import OPERATIONS
from ..training import distributed
from ..training.checkpoint import fingerprint, settings_of
from ..training.loop import Descent, Fit, Settings
from ..training.randomness import unchanged
from ..training.stopping import noise_at
from ..transforms.carried import InSingle
from ..vjp import is_plain
from .gaussian_start import SECONDS, SHARE, Start, start_from_blocks, start_from_gaussian
from .model_batches import Followed, ModelBatches
from .optimizers import optimizers
from .program_checks import culprit, is_vectorised
from .propriety import check_proper

# The attributes of objectives that identify a run.
SETTINGS = "num_particles", "vectorize_particles", "num_steps", "start", "alpha", "buffer_size"
OF_ROWS = 32.0  # the unit of the parameters of rows, unless the rows start near the posterior
# The attributes in which Pyro's JIT objectives keep compiled functions.
RECORDED = "_loss_and_surrogate_loss", "_differentiable_loss", "_jit_loss_and_surrogate_loss"
CONVERGED = 0.003  # the gap to the log evidence, in nats, below which a fit has converged
LEAST, MOST = 10, 50  # losses in the mean that is reported at the end
SHARP = 0.01  # nats, the standard error below which no more of them are taken
MANY = 64  # draws per step, from which on SOAP does better than Adam
ONE_BY_ONE = 8  # draws per step if the model runs one at a time


class ELBOFit:
    """One fit of one guide.

    Args:
        task: The model and the guide.
        objective: The user's objective; None for the one that suits the guide.
        num_particles: The user's number of draws per step; None for the one that suits the guide.
        batches: The source of the model's arguments in each step; None if they stay the same.
    """

    def __init__(
        self, task: Task, objective: ELBO | None, num_particles: int | None, batches: ModelBatches | None = None
    ) -> None:
        self.task, self.plan, self._batches = task, plan_of(task.guide.call), batches
        self.guide: Any = task.guide.call
        self.marks: dict[str, Any] = {}  # the default objective's settings, which do not depend on the processes
        self.is_default, self._chooses = objective is None, objective is None and num_particles is None
        self.objective: Any = objective or self._default(num_particles)

    def _default(self, num_particles: int | None) -> ELBO:
        processors, share = distributed.size(), 1.0
        if self._batches:  # processes share the rows of a batch, and not the draws
            processors, share = 1, self._batches.share
        number = num_particles or distributed.broadcast(lambda: self.plan.schedule(share=share).num_particles)
        if num_particles and num_particles % processors:
            words = f"{num_particles} are those of all {processors} processes together"
            raise ValueError(f"fit_svi: num_particles={words}; give a multiple of {processors}, or leave it out.")
        several, by_plate = number > 1, False
        if several:
            with unchanged():
                by_plate = self.task.settle().guide.engine == "plate"
            if not num_particles and self.task.runs_one_by_one:
                number = min(ONE_BY_ONE, number)
        self.marks = {"num_particles": number, "vectorize_particles": several}
        kind = PathELBO if self.plan.takes_paths else Trace_ELBO
        return kind(-(-number // processors), max_plate_nesting=self.task.model.nesting, vectorize_particles=by_plate)

    def start(self, warm: bool | None, progress: bool = False) -> Start | None:
        """Start the guide from a Gaussian and return it, or None if the guide keeps its start.

        Args:
            warm: The user's choice; None for what suits the guide.
            progress: True to show a progress bar if the search takes more than a second.

        Raises:
            ValueError: If the posterior is improper.
        """
        objective = self.objective
        ours = isinstance(objective, PathELBO | ParticleObjective)
        new = self.plan.is_fresh and ours
        if not self.plan.is_joint:
            blocked = new and isinstance(self.guide, BlockGuide)
            return start_from_blocks(self.guide, self.task, progress) if blocked else None
        new = new and objective.vectorize_particles and not self.task.subsampled and self.guide.encoder is None
        new = new and not self._batches  # one batch is no posterior
        if new:
            check_proper("fit_svi", self._space, self.guide.start[0])
        if not (new if warm is None else warm):
            return None
        power = objective.beta if isinstance(objective, TemperedELBO) else 1.0
        suited, seconds = self.plan.schedule(), math.inf if warm else SECONDS
        budget = SHARE * suited.steps * suited.num_particles
        return start_from_gaussian(self.guide, self.task, power, budget, progress, seconds)

    def run(self, asked: dict[str, Any], file: Path | None) -> Fit:
        """Train the guide.

        Args:
            asked: ``steps``, ``lr``, ``clip_norm`` and ``warm_start``, None for defaults; ``on_nonfinite`` and
                ``progress``.
            file: The checkpoint, or None.
        """
        task, guide, objective, plan = self.task, self.guide, self.objective, self.plan
        kept = settings_of(file) if file else None
        plan.prepare(task.model.call, task.model.args, task.model.kwargs)
        start = None if kept else self.start(asked["warm_start"], asked["progress"])
        self._program = _program_of(task, objective)
        parameters = _trained_by(self._loss, task.model.call, guide)
        alone = self._is_alone(parameters)
        near, rows_near = self._where(start, parameters, kept)
        if self.is_default and rows_near and self._prefers_short_steps:
            objective = self.objective = _without_paths(objective)
        with in_training(guide, parameters, objective, rows_near=rows_near):
            schedule = plan.schedule(near=near, alone=alone)
            if near and alone and self._chooses and not asked["steps"]:
                objective.num_particles = -(-schedule.num_particles // distributed.size())
            settings = self._settings(asked, schedule, parameters, alone=alone, file=file)
            by_soap, by_muon = plan.by_soap() if alone else [], plan.by_muon()
            descent = Descent(
                self.joint_loss if alone else self._loss,
                parameters,
                optimizers(parameters, settings.lr, by_soap=by_soap, by_muon=by_muon),
                settings,
                guide,
                lambda: culprit(task),
                companion=Followed(objective, self._batches) if self._batches else objective,
            )
            fit = descent.fit()
        if self._batches or task.subsampled or not self._can_repeat or fit.stopped == "interrupted":
            return fit
        return replace(fit, best_loss=fresh_loss(descent.loss, fit))

    @property
    def _can_repeat(self) -> bool:
        """True if the loss of the objective, at the end of the run, is the same function of the guide at each call."""
        objective = self.objective
        if not hasattr(objective, "differentiable_loss") or vars(objective).keys() & {*RECORDED}:
            return False
        return getattr(objective, "settled", True) and not hasattr(objective, "num_steps")

    def _where(self, start: Start | None, parameters: list[Tensor], kept: dict[str, Any] | None) -> tuple[bool, bool]:
        """Return whether the run starts near the posterior, and whether the rows of plates do, and note both.

        Args:
            start: The start that was found, or None.
            parameters: The tensors that are trained.
            kept: The settings of the run that is resumed, or None.
        """
        near = start is not None and start.is_near and {*parameters} <= {*self.guide.parameters()}
        rows_near = any(part.starts_near for part in _parts_of(self.guide, parameters) if isinstance(part, Block))
        self.marks |= distributed.broadcast(lambda: {"near": near, "rows_near": rows_near})
        self.marks |= {name: kept[name] for name in ("near", "rows_near")} if kept else {}
        return self.marks["near"], self.marks["rows_near"]

    @property
    def _prefers_short_steps(self) -> bool:
        """True if path gradients would save less noise than minibatches make, and cost a second run of the guide."""
        guide = self.guide
        return isinstance(guide, BlockGuide) and guide.repeats_for_paths and guide.takes_minibatches

    def _settings(
        self, asked: dict[str, Any], schedule: Schedule, parameters: list[Tensor], *, alone: bool, file: Path | None
    ) -> Settings:
        model, objective = self.task.model, self.objective
        draws = getattr(objective, "num_particles", 1)  # of this process
        is_large = self.task.is_settled and model.chunk == 1  # a single draw is work for several threads
        own = {name: getattr(objective, name, None) for name in SETTINGS} | self.marks
        args = self._batches.others if self._batches else model.args
        data = fingerprint(bound_values(model.call, args, model.kwargs))
        data += [f"{self._batches.steps} batches"] if self._batches else []
        return Settings(
            caller="fit_svi",
            steps=asked["steps"] or getattr(objective, "num_steps", None) or schedule.steps,
            lr=float(asked["lr"] or schedule.lr),
            clip_norm=float(asked["clip_norm"] or schedule.clip_norm),
            on_nonfinite=asked["on_nonfinite"],
            progress=asked["progress"],
            checkpoint=file,
            marks={"objective": type(objective).__name__, **own, "data": data},
            work=math.inf if is_large else OPERATIONS * draws * sum(part.numel() for part in parameters),
            noise=noise_at(CONVERGED, draws * distributed.size()) if alone and not asked["steps"] else 0.0,
        )

    def _loss(self) -> Tensor:
        if self._batches:
            self._batches.feed(self.task, is_lifted=isinstance(self._program, Lifted))
        model, guide, objective = self.task.model, self.guide, self.objective
        if hasattr(objective, "differentiable_loss"):
            # A lifted model is one factor, without the plates whose rows are given; an engine has validated it.
            silent = self.task.has_bare_dimensions or isinstance(self._program, Lifted)
            with validation_enabled(False) if silent else contextlib.nullcontext():
                return objective.differentiable_loss(self._program, guide, *model.args, **model.kwargs)
        # An objective such as RenyiELBO fills in the gradients itself, one such as ReweightedWakeSleep has two losses.
        found = objective.loss_and_grads(self._program, guide, *model.args, **model.kwargs)
        return torch.tensor(sum(found) if isinstance(found, tuple) else found, requires_grad=True)

    def _is_alone(self, parameters: list[Tensor]) -> bool:
        """True if one flow is trained by many draws per step, and nothing else."""
        plain = self.is_default and self.plan.is_joint and self.plan.takes_paths and self.guide.draws_from_flow
        many = plain and self.objective.vectorize_particles and self.marks["num_particles"] >= MANY
        many = many and not self.task.subsampled and not self._batches
        return many and {*parameters} <= {*self.guide.parameters()}

    @functools.cached_property
    def _space(self) -> LatentSpace:
        return LatentSpace(self.task)

    @functools.cached_property
    def _flow(self) -> Flow:
        flow = self.guide.flow
        single = self.guide.has_default_flow and is_plain([flow]) and InSingle.suits(flow.unscaled)
        return Flow([InSingle(flow.unscaled), flow.fixed], flow.base) if single else flow

    def joint_loss(self) -> Tensor:
        """Return the loss of the default objective, without the handlers that an ELBO runs a guide under."""
        z, log_q = self._flow().with_path_gradient().rsample_and_log_prob((self.objective.num_particles,))
        return (log_q - self._space.log_p(z)).mean()


@torch.no_grad()
def fresh_loss(loss: Callable[[], Tensor], fit: Fit) -> float:
    """Return the loss at the state that a fit has kept, as a mean of new draws; random numbers are left alone.

    The running loss of a short fit lags behind, since it is a mean over the steps that led to the state.
    """
    found: list[float] = []
    with unchanged():
        pyro.set_rng_seed(distributed.rank())  # so that a run that was resumed finds the same
        while len(found) < LEAST or (len(found) < MOST and torch.tensor(found).std() > SHARP * len(found) ** 0.5):
            try:
                found.append(float(loss()))
            except Exception as error:
                if not is_breakdown(error):
                    raise
                found.append(math.nan)
    every = [value for values in distributed.all_gather(lambda: found) for value in values if math.isfinite(value)]
    return sum(every) / len(every) if every else fit.best_loss


def _program_of(task: Task, objective: ELBO) -> Callable[..., Any]:
    """Return the model as an objective runs it: unchanged, or lifted if the objective needs that."""
    if isinstance(objective, TraceEnum_ELBO):
        return task.model.marked
    sums_itself = not isinstance(objective, Trace_ELBO) or isinstance(objective, TraceMeanField_ELBO)
    if sums_itself or not (task.model.enumerated or is_vectorised(objective)):
        return task.model.call
    with unchanged():
        return task.broadcasting


def _without_paths(objective: Any) -> Trace_ELBO:
    """Return Pyro's own objective with the same draws."""
    draws = {"num_particles": objective.num_particles, "vectorize_particles": objective.vectorize_particles}
    return Trace_ELBO(max_plate_nesting=objective.max_plate_nesting, **draws)


def _trained_by(loss: Callable[[], Tensor], model: Any, guide: Any) -> list[Tensor]:
    """Return the tensors that the loss depends on, in modules and in Pyro's param statements."""
    with poutine.trace(param_only=True) as capture:
        try:
            loss()
        except (ValueError, LinAlgError, FloatingPointError) as error:
            if not is_breakdown(error):
                raise
    found = leaves_of(capture.trace, model, guide)
    unique = {id(parameter): parameter for parameter in found if parameter is not None and parameter.requires_grad}
    if not unique:
        raise ValueError("fit_svi: neither the guide nor the model has parameters to train.")
    return list(unique.values())


@contextlib.contextmanager
def in_training(guide: Any, parameters: list[Tensor], objective: Any, *, rows_near: bool = False) -> Iterator[None]:
    """Put a guide into training mode, without paces; afterwards into evaluation mode, with its own.

    The outputs of the guide stay the same, bit for bit.

    Args:
        guide: The guide; guides that a function calls are found by their parameters.
        parameters: The tensors that are trained.
        objective: The loss, whose compiled functions are dropped, since units are constants in them.
        rows_near: True if rows of plates start near their posteriors.
    """
    guides = _guides_of(guide, parameters)
    parts = [part for part in _parts_of(guide, parameters) if isinstance(part, Paced)]
    with contextlib.ExitStack() as stack:
        for one in guides:
            stack.callback(one.eval)
            one.train()
        stack.callback(_forget, objective)
        for part in parts:
            stack.callback(part.set_unit, part.unit)
            part.set_unit(OF_ROWS if isinstance(part, RowContexts) and not rows_near else 1.0)
        _forget(objective)
        yield


def _guides_of(guide: Any, parameters: list[Tensor]) -> list[Any]:
    """Return a guide that is a module; guides that a function calls are found by their parameters."""
    return [guide] if isinstance(guide, nn.Module) else holders(parameters)


def _parts_of(guide: Any, parameters: list[Tensor]) -> list[nn.Module]:
    return [part for one in _guides_of(guide, parameters) for part in one.modules()]


def _forget(objective: Any) -> None:
    """Drop the compiled functions of an objective."""
    for name in RECORDED:
        if name in getattr(objective, "__dict__", ()):
            setattr(objective, name, None)
