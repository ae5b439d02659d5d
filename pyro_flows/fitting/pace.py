"""The pace of a guide's networks and of what it learns of each row, while ``fit_svi`` trains it.

A guide's networks move slowly, so that the steps of any optimiser are safe.  The settings of ``fit_svi``, its warm-up,
decay, clipping and Muon, were found for weights as torch has them, and for rows that move farther in a step than what
all rows share, since a row is seen once in many steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..conditioners import Conditioner
from ..guides.contexts import RowContexts
from ..transforms import ScaledLinear

OF_ROWS = 32.0
PACED = Conditioner, RowContexts, ScaledLinear


@contextlib.contextmanager
def in_training(guide: Any) -> Iterator[None]:
    """Put a guide into training mode, with paces that suit ``fit_svi``, and then into evaluation mode, with its own.

    What the guide computes stays the same, bit for bit.
    """
    if not isinstance(guide, nn.Module):
        yield
        return
    parts = [part for part in guide.modules() if isinstance(part, PACED) and part.pace is not None]
    paces = [part.pace for part in parts]
    guide.train()
    try:
        for part in parts:
            part.set_pace(OF_ROWS if isinstance(part, RowContexts) else None)
        yield
    finally:
        for part, pace in zip(parts, paces, strict=True):
            part.set_pace(pace)
        guide.eval()
