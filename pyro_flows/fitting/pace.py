"""The pace of a guide's networks and of what it learns of each row, while ``fit_svi`` trains it.

A guide's networks move slowly, so that the steps of any optimiser are safe.  The settings of ``fit_svi``, its warm-up,
decay, clipping and Muon, were found for weights as torch has them, and for rows that move farther in a step than what
all rows share, since a row is seen once in many steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..conditioners.base import Network
from ..guides.contexts import RowContexts
from ..guides.names import holders
from ..transforms import Elementwise, ScaledLinear

OF_ROWS = 32.0
PACED = Network, Elementwise, RowContexts, ScaledLinear
# where Pyro's JIT objectives keep what they compiled
RECORDED = "_loss_and_surrogate_loss", "_differentiable_loss", "_jit_loss_and_surrogate_loss"


@contextlib.contextmanager
def in_training(guide: Any, parameters: list[Tensor], objective: Any) -> Iterator[None]:
    """Put a guide into training mode, with paces that suit ``fit_svi``, and then into evaluation mode, with its own.

    The guide computes the same, bit for bit.

    Args:
        guide: The guide; guides that a function calls are found by their parameters.
        parameters: The tensors that are trained.
        objective: The loss, which forgets what it compiled: paces are constants there.
    """
    guides = [guide] if isinstance(guide, nn.Module) else holders(parameters)
    parts = [part for one in guides for part in one.modules() if isinstance(part, PACED) and part.pace is not None]
    paces = [part.pace for part in parts]
    for one in guides:
        one.train()
    try:
        for part in parts:
            part.set_pace(OF_ROWS if isinstance(part, RowContexts) else None)
        _forget(objective)
        yield
    finally:
        for part, pace in zip(parts, paces, strict=True):
            part.set_pace(pace)
        _forget(objective)
        for one in guides:
            one.eval()


def _forget(objective: Any) -> None:
    for name in RECORDED:
        if name in getattr(objective, "__dict__", ()):
            setattr(objective, name, None)
