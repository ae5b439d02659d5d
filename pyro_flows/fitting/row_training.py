"""Training on rows: batches of a source, and an average of states that is judged by held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_kind
from ..data.batches import Batch, Rows, Source, mean_of
from ..encoders import Standardize
from ..objectives import Likelihood
from ..threads import OPERATIONS
from ..training import distributed
from ..training.interrupts import uninterrupted
from ..training.loop import Descent, Fit, HeldOut, Settings
from ..transforms import FixedAffine, QuantileMap


@dataclass(frozen=True)
class RowLoss:
    """A loss of rows, rows to train on, and rows held out.

    Attributes:
        source: The rows to train on.
        judge: The rows held out.
        loss: Returns the mean loss of a batch.
        marks: Words that identify the rows, for checkpoints.
    """

    source: Source
    judge: Source
    loss: Callable[[Batch], Tensor]
    marks: list[str]


def train_on_rows(
    trained: nn.Module,
    rows: RowLoss,
    *,
    max_epochs: int,
    patience: int,
    diagnose: Callable[[], str],
    decay: float = 0.99,
    show: Callable[[float], str],
    marks: dict[str, Any],
    end_epoch: Callable[[int], None] = lambda _: None,
    **settings: Any,
) -> Fit:
    """Minimise a loss of rows by Adam, and leave the trained module in evaluation mode.

    Args:
        trained: The flow or guide.
        rows: The rows and their loss.
        max_epochs: The largest number of passes through the rows.
        patience: The number of epochs without an improvement after which to stop.
        diagnose: Returns what is not finite, for errors.
        decay: The decay of the average of states per step.
        show: Formats a loss for the progress bar.
        marks: Further settings that identify the run.
        end_epoch: Called after each epoch with its number.
        **settings: Further :class:`~pyro_flows.training.loop.Settings`.
    """

    @torch.no_grad()
    def judged(epoch: int) -> float:
        trained.eval()
        with torch.random.fork_rng():
            torch.manual_seed(distributed.rank())
            found = mean_of(rows.loss, rows.judge)
            end_epoch(epoch)
        trained.train()
        return found

    source = rows.source
    fixed = {
        p
        for part in trained.modules()
        if isinstance(part, FixedAffine | QuantileMap | Standardize)
        for p in part.parameters()
    }
    parameters: list[Tensor] = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    moved = [parameter for parameter in parameters if parameter not in fixed]
    size = source.size if isinstance(source, Rows) else None  # a loader may have batches of any size
    marks = {"data": rows.marks, "batch_size": size, **marks}
    pixels = math.prod(getattr(trained, "event_shape", ())[1:])  # which share the weights of a convolution
    work = OPERATIONS * (size or math.inf) * pixels * sum(parameter.numel() for parameter in moved)
    trained.train()
    try:
        with uninterrupted():  # the first optimiser imports the compiler
            adam = torch.optim.Adam(moved, lr=settings["lr"], foreach=True)
        return Descent(
            lambda: rows.loss(source.next()),
            parameters,
            [adam],
            Settings(steps=max_epochs * source.steps, work=work, marks=marks, **settings),
            trained,
            diagnose,
            companion=source,
            judge=HeldOut(judged, source.steps, patience, decay, show),
        ).fit()
    finally:
        trained.eval()


def checked(caller: str, objective: nn.Module | None) -> nn.Module:
    """Return the objective, or ``Likelihood()`` for None; raise TypeError unless it is an objective of rows."""
    words = "a module objective(flow, x, context) -> loss such as objectives.Likelihood(), not an ELBO, as for fit_svi"
    objective = Likelihood() if objective is None else objective
    check_kind(caller, nn.Module, words, objective=objective)
    return objective


def format_of(objective: nn.Module) -> Callable[[float], str]:
    """Return the function that formats a loss for the progress bar."""
    return ("{:.3f} nats" if getattr(objective, "in_nats", False) else "{:.4f}").format
