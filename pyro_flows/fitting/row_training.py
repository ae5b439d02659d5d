"""Train on rows: batches of a source, an average of states that held-out rows judge, evaluation mode at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Rows, Source
from ..threads import OPERATIONS
from ..training import distributed
from ..training.loop import Fit, descend
from ..training.state import HeldOut


def train_on_rows(
    trained: nn.Module,
    moved: list[Tensor],
    source: Source,
    loss: Callable[[Batch], Tensor],
    held_out: Callable[[int], float],
    *,
    max_epochs: int,
    patience: int,
    lr: float,
    decay: float = 0.99,
    **settings: Any,
) -> Fit:
    """Minimise a loss of rows by Adam.

    Args:
        trained: The flow or guide.
        moved: Those of its parameters that have a gradient.
        source: The rows to train on.
        loss: The mean loss of a batch.
        held_out: The loss of the rows held out, given the number of the epoch.
        max_epochs: How often to go through the rows.
        patience: After how many epochs without an improvement to stop.
        lr: The largest step size.
        decay: Of the average of states.
        **settings: Other settings of :func:`~pyro_flows.training.loop.descend`.
    """

    @torch.no_grad()
    def judged(epoch: int) -> float:
        trained.eval()
        with torch.random.fork_rng():
            torch.manual_seed(distributed.rank())
            found = held_out(epoch)
        trained.train()
        return found

    trained.train()
    try:
        return descend(
            lambda: loss(source.next()),
            [parameter for parameter in trained.parameters() if parameter.requires_grad],
            [torch.optim.Adam(moved, lr=lr, foreach=True)],
            trained=trained,
            steps=max_epochs * source.steps,
            lr=lr,
            share=lambda: source.share,
            companion=source,
            held_out=HeldOut(judged, source.steps, patience, decay),
            work=_work(trained, moved, source),
            **settings,
        )
    finally:
        trained.eval()


def _work(trained: nn.Module, moved: list[Tensor], source: Source) -> float:
    """Return about how many operations a step takes, infinity where the size of batches is not known."""
    size = source.size if isinstance(source, Rows) else math.inf
    pixels = math.prod(getattr(trained, "event_shape", ())[1:])  # which share the weights of a convolution
    return OPERATIONS * size * pixels * sum(parameter.numel() for parameter in moved)
