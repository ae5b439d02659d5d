"""One fit of a guide by an ELBO: the objective, the start of the guide, the schedule, and the descent."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from ..guides.block_guide import BlockGuide
from ..guides.blocks import Block
from ..guides.default_training import Schedule, plan_of
from ..objectives import PathELBO, TemperedELBO
from ..objectives.base import ParticleObjective
from ..programs.density import Density
from ..programs.model_and_guide import Task
from ..programs.program import bound_values
from ..threads import OPERATIONS
from ..training import Gradients, distributed
from ..training.checkpoint import fingerprint, kept_settings, settings_of
from ..training.loop import Descent, Fit, Settings
from ..training.randomness import unchanged
from ..training.stopping import noise_at
from .elbo_loss import ELBOLoss, FreshMean
from .guide_start import STARTS, Start, start_from_blocks, start_from_gaussian
from .model_batches import ModelBatches
from .optimizers import optimizers
from .program_checks import culprit
from .propriety import check_proper
from .training_mode import in_training, parts_of


@dataclass(frozen=True)
class Wish:
    """The user's settings of a fit, as in :func:`~pyro_flows.fit_svi`; None stands for what suits the guide."""

    steps: int | None = None
    lr: float | None = None
    objective: ELBO | None = None
    num_particles: int | None = None
    warm_start: bool | None = None
    gradients: Gradients = field(default_factory=Gradients)
    checkpoint: Path | None = None
    progress: bool = False


@dataclass(frozen=True)
class Tuning:
    """Constants of fits by the default objective.

    Attributes:
        converged: The gap to the log evidence, in nats, below which a fit has converged: far below what weights show.
        many: The number of draws per step from which on SOAP does better than Adam.
        one_by_one: The number of draws per step if the model runs one at a time: more cost more than they gain.
    """

    converged: float = 0.003
    many: int = 64
    one_by_one: int = 8


TUNING = Tuning()


class ELBOFit:
    """One fit of one guide.

    Args:
        task: The model and the guide.
        wish: The user's settings.
        batches: The source of the model's arguments in each step; None if they stay the same.

    Attributes:
        marks: The settings of the default objective, which do not depend on the number of processes, and the start.
        objective: The user's objective, or the one that suits the guide.
    """

    def __init__(self, task: Task, wish: Wish, batches: ModelBatches | None = None) -> None:
        self.task, self.wish, self.batches = task, wish, batches
        self.guide: Any = task.guide.call
        self.plan = plan_of(self.guide)
        self.marks: dict[str, Any] = {}
        self.objective: Any = wish.objective or self._default()

    def _default(self) -> ELBO:
        # Processes share the draws, or the rows of a batch.
        processes, share = (1, 1 / distributed.size()) if self.batches else (distributed.size(), 1.0)
        wished = self.wish.num_particles
        number = wished or self.plan.schedule(share=share).num_particles
        if wished and wished % processes:
            words = f"{wished} are those of all {processes} processes together"
            raise ValueError(f"fit_svi: num_particles={words}; give a multiple of {processes}, or leave it out.")
        several, by_plate = number > 1, False
        if several:
            with unchanged():
                by_plate = self.task.settle().guide.engine == "plate"
            if not wished and self.task.runs_one_by_one:
                number = min(TUNING.one_by_one, number)
        self.marks = {"num_particles": number, "vectorize_particles": several}
        kind = PathELBO if self.plan.takes_paths else Trace_ELBO
        return kind(-(-number // processes), max_plate_nesting=self.task.model.nesting, vectorize_particles=by_plate)

    def run(self) -> Fit:
        """Train the guide."""
        task, guide, plan, wish = self.task, self.guide, self.plan, self.wish
        kept = settings_of(wish.checkpoint) if wish.checkpoint else None
        plan.prepare(task.model.call, task.model.args, task.model.kwargs)
        start = None if kept else self._start()
        loss = ELBOLoss(task, self.objective, self.batches)
        parameters = loss.parameters()
        alone = self._is_alone(parameters)
        near, rows_near = self._where(start, parameters, kept)
        if wish.objective is None and rows_near and self._prefers_short_steps:
            loss.objective = self.objective = _without_paths(self.objective)
        with in_training(guide, parameters, self.objective, rows_near=rows_near):
            schedule = plan.schedule(near=near, alone=alone)
            if near and alone and not (wish.steps or wish.num_particles):
                self.objective.num_particles = -(-schedule.num_particles // distributed.size())
            settings = self._settings(schedule, parameters, alone=alone)
            by_soap, by_muon = plan.by_soap() if alone else [], plan.by_muon()
            descent = Descent(
                loss.joint if alone else loss,
                parameters,
                optimizers(parameters, settings.lr, by_soap=by_soap, by_muon=by_muon),
                settings,
                guide,
                lambda: culprit(task),
                companions=loss.companions,
            )
            fit = descent.fit()
        if not loss.repeats or fit.stopped == "interrupted":
            return fit
        # The running loss of a short fit lags behind, since it is a mean over the steps that led to the state.
        fresh = FreshMean().of(descent.loss)
        return fit if math.isnan(fresh) else replace(fit, best_loss=fresh)

    def _start(self) -> Start | None:
        """Start the guide from a Gaussian and return it, or None if the guide keeps its start.

        Raises:
            ValueError: If the posterior is improper.
        """
        task, guide, objective, wish = self.task, self.guide, self.objective, self.wish
        new = self.plan.is_fresh and isinstance(objective, PathELBO | ParticleObjective)
        if not self.plan.is_joint:
            blocked = new and isinstance(guide, BlockGuide)
            return start_from_blocks(guide, task, wish.progress) if blocked else None
        new = new and objective.vectorize_particles and not task.subsampled and guide.encoder is None
        new = new and not self.batches  # one batch is no posterior
        if new:
            check_proper("fit_svi", Density(task), guide.start[0])
        if not (new if wish.warm_start is None else wish.warm_start):
            return None
        power = objective.beta if isinstance(objective, TemperedELBO) else 1.0
        suited, seconds = self.plan.schedule(), math.inf if wish.warm_start else STARTS.seconds
        budget = STARTS.share * suited.steps * suited.num_particles
        return start_from_gaussian(guide, task, power, budget, wish.progress, seconds)

    def _where(self, start: Start | None, parameters: list[Tensor], kept: dict[str, Any] | None) -> tuple[bool, bool]:
        """Return whether the run starts near the posterior, and whether the rows of plates do, and note both.

        Args:
            start: The start that was found, or None.
            parameters: The tensors that are trained.
            kept: The settings of the run that is resumed, or None.
        """
        near = start is not None and start.is_near and {*parameters} <= {*self.guide.parameters()}
        rows_near = any(part.starts_near for part in parts_of(self.guide, parameters) if isinstance(part, Block))
        self.marks |= distributed.broadcast(lambda: {"near": near, "rows_near": rows_near})
        self.marks |= {name: kept[name] for name in ("near", "rows_near")} if kept else {}
        return self.marks["near"], self.marks["rows_near"]

    @property
    def _prefers_short_steps(self) -> bool:
        """True if path gradients would save less noise than minibatches make, and cost a second run of the guide."""
        return isinstance(self.guide, BlockGuide) and self.guide.prefers_short_steps

    def _is_alone(self, parameters: list[Tensor]) -> bool:
        """True if one flow is trained by many draws per step, and nothing else."""
        if self.wish.objective or self.batches or self.task.subsampled or not self.objective.vectorize_particles:
            return False
        suits = self.plan.is_joint and self.plan.takes_paths and self.guide.draws_from_flow
        return suits and self.marks["num_particles"] >= TUNING.many and {*parameters} <= {*self.guide.parameters()}

    def _settings(self, schedule: Schedule, parameters: list[Tensor], *, alone: bool) -> Settings:
        wish, model, objective = self.wish, self.task.model, self.objective
        draws = getattr(objective, "num_particles", 1)  # of this process
        is_large = self.task.is_settled and model.chunk == 1  # a single draw is work for several threads
        args = self.batches.others if self.batches else model.args
        data = fingerprint(bound_values(model.call, args, model.kwargs))
        data += [f"{self.batches.steps} batches"] if self.batches else []
        return Settings(
            caller="fit_svi",
            steps=wish.steps or getattr(objective, "num_steps", None) or schedule.steps,
            lr=float(wish.lr or schedule.lr),
            clip_norm=float(wish.gradients.clip_norm or schedule.clip_norm),
            on_nonfinite=wish.gradients.on_nonfinite,
            progress=wish.progress,
            checkpoint=wish.checkpoint,
            marks={"objective": type(objective).__name__, **kept_settings(objective), **self.marks, "data": data},
            work=math.inf if is_large else OPERATIONS * draws * sum(part.numel() for part in parameters),
            noise=noise_at(TUNING.converged, draws * distributed.size()) if alone and not wish.steps else 0.0,
        )


def _without_paths(objective: Any) -> Trace_ELBO:
    """Return Pyro's own objective with the same draws."""
    draws = {"num_particles": objective.num_particles, "vectorize_particles": objective.vectorize_particles}
    return Trace_ELBO(max_plate_nesting=objective.max_plate_nesting, **draws)
