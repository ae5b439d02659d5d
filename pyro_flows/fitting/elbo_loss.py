"""The loss of one step of a fit by an ELBO, as the training loop calls it, and its mean at the end."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine, validation_enabled
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..flows import Flow
from ..programs.density import Density
from ..programs.log_density import is_breakdown
from ..programs.model_and_guide import Lifted, Task
from ..programs.traces import leaves_of
from ..training import distributed
from ..training.randomness import unchanged
from ..transforms.carried import InSingle
from ..vjp import is_plain
from .model_batches import ModelBatches
from .program_checks import is_vectorised

# The attributes in which Pyro's JIT objectives keep compiled functions.
COMPILED = "_loss_and_surrogate_loss", "_differentiable_loss", "_jit_loss_and_surrogate_loss"


class ELBOLoss:
    """An objective of a model and a guide, on their next minibatch if the data come in batches.

    Args:
        task: The model and the guide.
        objective: The objective.
        batches: The source of the model's arguments in each step; None if they stay the same.
    """

    def __init__(self, task: Task, objective: Any, batches: ModelBatches | None) -> None:
        self.task, self.objective, self.batches = task, objective, batches
        self._program = _program_of(task, objective)

    @property
    def companions(self) -> list[Any]:
        """The objects whose states belong to the run."""
        return [self.objective, self.batches] if self.batches else [self.objective]

    @property
    def repeats(self) -> bool:
        """True if the loss, at the end of the run, is the same function of the guide at each call."""
        objective = self.objective
        if self.batches or self.task.subsampled or not hasattr(objective, "differentiable_loss"):
            return False
        compiled = vars(objective).keys() & {*COMPILED}
        return not compiled and getattr(objective, "settled", True) and not hasattr(objective, "num_steps")

    def __call__(self) -> Tensor:
        """Return the loss of a step."""
        if self.batches:
            self.batches.feed(self.task, is_lifted=isinstance(self._program, Lifted))
        model, guide, objective = self.task.model, self.task.guide.call, self.objective
        if hasattr(objective, "differentiable_loss"):
            # A lifted model is one factor, without the plates whose rows are given; an engine has validated it.
            silent = self.task.has_bare_dimensions or isinstance(self._program, Lifted)
            with validation_enabled(False) if silent else contextlib.nullcontext():
                return objective.differentiable_loss(self._program, guide, *model.args, **model.kwargs)
        # An objective such as RenyiELBO fills in the gradients itself, one such as ReweightedWakeSleep has two losses.
        found = objective.loss_and_grads(self._program, guide, *model.args, **model.kwargs)
        return torch.tensor(sum(found) if isinstance(found, tuple) else found, requires_grad=True)

    def joint(self) -> Tensor:
        """Return the loss of a ``PathELBO`` and one flow, without the handlers that an ELBO runs a guide under."""
        flow, space = self._joint
        z, log_q = flow().with_path_gradient().rsample_and_log_prob((self.objective.num_particles,))
        return (log_q - space.log_prob(z)).mean()

    @functools.cached_property
    def _joint(self) -> tuple[Flow, Density]:
        guide: Any = self.task.guide.call
        flow: Any = guide.flow
        single = guide.has_default_flow and is_plain([flow]) and InSingle.suits(flow.unscaled)
        return Flow([InSingle(flow.unscaled), flow.fixed], flow.base) if single else flow, Density(self.task)

    def parameters(self) -> list[Tensor]:
        """Return the tensors that the loss depends on, in modules and in Pyro's param statements."""
        with poutine.trace(param_only=True) as capture:
            try:
                self()
            except (ValueError, LinAlgError, FloatingPointError) as error:
                if not is_breakdown(error):
                    raise
        found = leaves_of(capture.trace, self.task.model.call, self.task.guide.call)
        unique = {id(parameter): parameter for parameter in found if parameter is not None and parameter.requires_grad}
        if not unique:
            raise ValueError("fit_svi: neither the guide nor the model has parameters to train.")
        return list(unique.values())


def _program_of(task: Task, objective: ELBO) -> Callable[..., Any]:
    """Return the model as an objective runs it: unchanged, or lifted if the objective needs that."""
    if isinstance(objective, TraceEnum_ELBO):
        return task.model.marked
    sums_itself = not isinstance(objective, Trace_ELBO) or isinstance(objective, TraceMeanField_ELBO)
    if sums_itself or not (task.model.enumerated or is_vectorised(objective)):
        return task.model.call
    with unchanged():
        return task.broadcasting


def forget_compiled(objective: Any) -> None:
    """Drop the compiled functions of an objective."""
    for name in COMPILED:
        if name in getattr(objective, "__dict__", ()):
            setattr(objective, name, None)


@dataclass(frozen=True)
class FreshMean:
    """The mean of a loss over new draws: as many as it takes to know it, within limits.

    Attributes:
        least: The fewest losses, which tell how noisy they are.
        most: The most losses, about a tenth of the time of a short fit.
        sharp: The standard error, in nats, below which no more are taken: the digits that a fit prints.
    """

    least: int = 10
    most: int = 50
    sharp: float = 0.01

    def of(self, loss: Callable[[], Tensor]) -> float:
        """Return the mean, NaN if no loss is finite; random numbers are left alone."""
        found: list[float] = []
        with unchanged():
            pyro.set_rng_seed(distributed.rank())  # so that a run that was resumed finds the same
            while len(found) < self.least or self._goes_on(found):
                try:
                    found.append(float(loss().detach()))  # TraceEnum_ELBO needs gradients
                except Exception as error:
                    if not is_breakdown(error):
                        raise
                    found.append(math.nan)
        every = [value for values in distributed.all_gather(lambda: found) for value in values if math.isfinite(value)]
        return sum(every) / len(every) if every else math.nan

    def _goes_on(self, found: list[float]) -> bool:
        return len(found) < self.most and bool(torch.tensor(found).std() > self.sharp * len(found) ** 0.5)
