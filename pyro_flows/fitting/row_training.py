"""Training on rows: batches of a source, and an average of states that is judged by held-out rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_flags, check_integers, check_kind, check_numbers
from ..data.batches import Batch, Rows, Source, mean_of
from ..encoders import Standardize
from ..objectives import Likelihood
from ..threads import OPERATIONS
from ..training import Fit, Training, distributed
from ..training.interrupts import uninterrupted
from ..training.loop import Descent, HeldOut, Settings
from ..transforms import FixedAffine, QuantileMap
from .mixed_precision import check_single, networks_in_bfloat16


@dataclass(frozen=True)
class RowFit:
    """A flow or guide, and the rows to train it on.

    Attributes:
        caller: The public function, for errors.
        trained: The flow or guide.
        source: The rows to train on.
        judge: The rows held out.
        loss: Returns the mean loss of a batch.
        marks: Settings that identify the run, such as checksums of the rows.
        diagnose: Returns what is not finite, for errors.
        show: Formats a loss for the progress bar.
        clip_norm: The largest norm of a gradient, unless the user gives another.
        end_epoch: Called after each epoch with its number.
    """

    caller: str
    trained: nn.Module
    source: Source
    judge: Source
    loss: Callable[[Batch], Tensor]
    marks: dict[str, Any]
    diagnose: Callable[[], str]
    show: Callable[[float], str] = "{:.3f} nats".format
    clip_norm: float = 5.0
    end_epoch: Callable[[int], None] = field(default=lambda _: None)


def train_on_rows(
    fit: RowFit, training: Training, *, max_epochs: int, lr: float, checkpoint: Path | None, progress: bool
) -> Fit:
    """Minimise a loss of rows by Adam, and leave the trained module in evaluation mode.

    Args:
        fit: The module, the rows and their loss.
        training: The user's options.
        max_epochs: The largest number of passes through the rows.
        lr: The largest step size.
        checkpoint: A file for the state of the run, or None.
        progress: True to show a progress bar.
    """
    trained, source = fit.trained, fit.source
    if training.mixed_precision:
        check_single(fit.caller, trained)

    @torch.no_grad()
    def judged(epoch: int) -> float:
        trained.eval()
        with torch.random.fork_rng():
            torch.manual_seed(distributed.rank())
            found = mean_of(fit.loss, fit.judge)
            fit.end_epoch(epoch)
        trained.train()
        return found

    parameters: list[Tensor] = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    standing = [part for part in trained.modules() if isinstance(part, FixedAffine | QuantileMap | Standardize)]
    fixed = {parameter for part in standing for parameter in part.parameters()}
    moved = [parameter for parameter in parameters if parameter not in fixed]
    settings = Settings(
        steps=max_epochs * source.steps,
        lr=lr,
        progress=progress and not distributed.rank(),
        checkpoint=checkpoint,
        **_settings(fit, training, moved),
    )
    judge = HeldOut(judged, source.steps, training.patience, training.ema_decay, fit.show)
    trained.train()
    try:
        with networks_in_bfloat16(trained) if training.mixed_precision else contextlib.nullcontext():
            with uninterrupted():  # the first optimiser imports the compiler
                adam = torch.optim.Adam(moved, lr=lr, foreach=True)
            return Descent(
                lambda: fit.loss(source.next()), parameters, [adam], settings, trained, fit.diagnose, [source], judge
            ).fit()
    finally:
        trained.eval()


def _settings(fit: RowFit, training: Training, moved: list[Tensor]) -> dict[str, Any]:
    """Return the settings of a run that follow from its rows and its options."""
    size = fit.source.size if isinstance(fit.source, Rows) else None  # a loader may have batches of any size
    pixels = math.prod(getattr(fit.trained, "event_shape", ())[1:])  # which share the weights of a convolution
    options = {"ema_decay": training.ema_decay, "mixed_precision": training.mixed_precision}
    return {
        "caller": fit.caller,
        "clip_norm": training.gradients.clip_norm or fit.clip_norm,
        "on_nonfinite": training.gradients.on_nonfinite,
        "marks": {**fit.marks, "batch_size": size, "objective": repr(objective_of(training)), **options},
        "work": OPERATIONS * (size or math.inf) * pixels * sum(parameter.numel() for parameter in moved),
    }


def checked(
    caller: str,
    training: Training | None,
    *,
    max_epochs: int,
    batch_size: int | None,
    lr: float,
    progress: bool,
) -> Training:
    """Return the options for training, by default the usual ones; raise an error for arguments out of their range."""
    check_integers(caller, max_epochs=max_epochs)
    check_integers(caller, optional=True, batch_size=batch_size)
    check_numbers(caller, above=0, lr=lr)
    check_flags(caller, progress=progress)
    training = Training() if training is None else training
    check_kind(caller, Training, "training.Training(...)", training=training)
    if caller != "fit_density":
        training.check_for(caller)
    return training


def objective_of(training: Training) -> nn.Module:
    """Return the objective of the user, or the default one."""
    return Likelihood() if training.objective is None else training.objective


def format_of(objective: nn.Module) -> Callable[[float], str]:
    """Return the function that formats a loss for the progress bar."""
    return ("{:.3f} nats" if getattr(objective, "in_nats", False) else "{:.4f}").format
