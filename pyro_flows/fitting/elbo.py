"""One fit of a guide by an ELBO: the objective, where the guide starts, and the descent."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch
from pyro import validation_enabled
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from ..diagnostics.gaussian import Gaussian
from ..guides.plan import plan_of
from ..objectives import PathELBO, TemperedELBO
from ..objectives.particles import ParticleObjective
from ..programs.task import Task
from ..training import checkpoint as checkpoints
from ..training import processes
from ..training.loop import Fit, ask, descend
from ..training.randomness import unchanged
from .beforehand import program_of
from .inspect import culprit, fingerprint, has_all, trained_by
from .optimizers import optimizers
from .pace import in_training
from .propriety import check_proper
from .warm import start_from_gaussian

SETTINGS = "num_particles", "vectorize_particles", "num_steps", "start", "alpha", "buffer_size"  # of objectives
ONE_BY_ONE = 8  # draws in each step where the model runs one at a time


class ELBOFit:
    """A fit of one guide from one start.

    Args:
        task: The model and the guide.
        objective: The objective that is asked for; None for the one that suits the guide.
        num_particles: The number of draws in each step that is asked for; None for what suits the guide.
    """

    def __init__(self, task: Task, objective: ELBO | None, num_particles: int | None) -> None:
        self.task, self.plan = task, plan_of(task.guide.call)
        self.guide: Any = task.guide.call
        self.suited = self.plan.schedule()
        self.asked: dict[str, Any] = {}  # what the user knows of, whatever the number of processes
        self.objective = objective or self._default(num_particles)

    def _default(self, num_particles: int | None) -> ELBO:
        number, processors = num_particles or self.suited.num_particles, processes.size()
        if num_particles and num_particles % processors:
            raise ValueError(
                f"fit_svi: num_particles={num_particles} are those of all {processors} processes together, which "
                "must be able to share them equally; give a multiple of the number of processes, or leave it out."
            )
        several, by_plate = number > 1, False
        if several:
            with unchanged():
                by_plate = self.task.settle().guide.engine == "plate"
            if not num_particles and self.task.runs_one_by_one:
                number = min(ONE_BY_ONE, number)
        self.asked = {"num_particles": number, "vectorize_particles": several}
        kind = PathELBO if self.plan.takes_paths else Trace_ELBO
        return kind(-(-number // processors), max_plate_nesting=self.task.nesting, vectorize_particles=by_plate)

    def start(self, warm: bool | None) -> Gaussian | None:
        """Let the guide start from a Gaussian, if that is asked for or suits, and return it.

        Raises:
            ValueError: If the posterior is improper.
        """
        if not self.plan.is_joint:
            return None
        objective = self.objective
        ours = isinstance(objective, PathELBO | ParticleObjective) and objective.vectorize_particles
        new = self.plan.is_fresh and ours and not self.task.subsampled and self.guide.encoder is None
        if new:
            check_proper(self.guide, self.task)
        if not (new if warm is None else warm):
            return None
        return start_from_gaussian(
            self.guide, self.task, objective.beta if isinstance(objective, TemperedELBO) else 1.0
        )

    def run(self, settings: dict[str, Any], file: Path | None) -> Fit:
        """Train the guide.

        Args:
            settings: ``steps``, ``lr``, ``clip_norm`` and ``warm_start``, None where nothing is asked for;
                ``on_nonfinite`` and ``progress``.
            file: The checkpoint.
        """
        task, guide, objective = self.task, self.guide, self.objective
        kept = checkpoints.steps_of(file) if file else None
        self.plan.prepare(task.model.call, task.model.args, task.model.kwargs)
        start = None if kept else self.start(settings["warm_start"])
        self._program = program_of(task, objective)
        parameters, lr = trained_by(self._loss, task.model.call, guide), float(settings["lr"] or self.suited.lr)
        annealed = getattr(objective, "num_steps", None)
        with in_training(guide, parameters, objective):
            fewer = self.plan.schedule(near=True).steps
            # A run that goes on has known since its start.
            near = start.is_near and has_all(guide, parameters) if start else kept == fewer
            near = processes.first(lambda: near)
            fit = descend(
                self._loss,
                parameters,
                optimizers(parameters, lr, self.plan.matrices()),
                trained=guide,
                steps=settings["steps"] or annealed or (fewer if near else self.suited.steps),
                lr=lr,
                clip_norm=float(settings["clip_norm"] or self.suited.clip_norm),
                on_nonfinite=settings["on_nonfinite"],
                progress=settings["progress"],
                diagnose=lambda: culprit(task),
                settled=lambda: getattr(objective, "settled", True),
                checkpoint=file,
                settings=self._named(),
                companion=objective,
            )
        self._warn(fit)
        return fit

    def _loss(self) -> Tensor:
        model, guide, objective = self.task.model, self.guide, self.objective
        if hasattr(objective, "differentiable_loss"):
            with validation_enabled(False) if self.task.has_bare_dimensions else contextlib.nullcontext():
                return objective.differentiable_loss(self._program, guide, *model.args, **model.kwargs)
        # An objective such as RenyiELBO fills in the gradients itself, one such as ReweightedWakeSleep has two losses.
        found = objective.loss_and_grads(self._program, guide, *model.args, **model.kwargs)
        return torch.tensor(sum(found) if isinstance(found, tuple) else found, requires_grad=True)

    def _named(self) -> dict[str, Any]:
        """Return the settings by which a checkpoint knows the run."""
        own = {name: getattr(self.objective, name, None) for name in SETTINGS} | self.asked
        data = fingerprint((*self.task.model.args, *self.task.model.kwargs.values()))
        return {"objective": type(self.objective).__name__, **own, "data": data}

    def _warn(self, fit: Fit) -> None:
        if fit.skipped > fit.steps / 5:
            warnings.warn(
                f"fit_svi: {fit.skipped} of {fit.steps} steps were skipped, as loss or gradient were not finite; what "
                f"was learned comes from the others. {ask(lambda: culprit(self.task))}",
                stacklevel=6,
            )
