"""The pace of a guide's networks while ``fit_svi`` trains it.

A guide's networks move slowly, so that the steps of any optimiser are safe.  The settings of ``fit_svi``, its warm-up,
decay, clipping and Muon, were found for weights as torch has them, and get these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..conditioners import Conditioner


@contextlib.contextmanager
def in_training(guide: Any) -> Iterator[None]:
    """Put a guide into training mode, with weights as torch has them, and then into evaluation mode, with its own.

    What the guide computes stays the same, bit for bit.
    """
    if not isinstance(guide, nn.Module):
        yield
        return
    paces = {part: part.pace for part in guide.modules() if isinstance(part, Conditioner) and part.pace is not None}
    guide.train()
    try:
        for network in paces:
            network.set_pace(None)
        yield
    finally:
        for network, pace in paces.items():
            network.set_pace(pace)
        guide.eval()
