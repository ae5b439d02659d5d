"""Batches on a flow's device, the integers in discrete columns spread over their cells by noise.

A Note on the Evaluation of Generative Models (Theis, van den Oord, Bethge 2015, arXiv:1511.01844).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batches import Batch
from .survey import Survey


class Spread:
    """Puts batches on a flow's device and spreads the integers in discrete columns over their cells."""

    def __init__(self, places: list[int], device: torch.device) -> None:
        self.places, self.device = torch.tensor(places, dtype=torch.long), device

    def __call__(self, batch: Batch) -> Batch:
        x, context = (None if part is None else part.to(self.device) for part in batch)
        assert x is not None
        if len(self.places):
            noise = torch.rand(len(x), len(self.places), dtype=x.dtype)
            x = x.index_add(1, self.places.to(x.device), noise.to(x.device))
        return x, context

    def moments(self, survey: Survey) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each column with its noise, ``(D,)``."""
        discrete = torch.zeros_like(survey.loc).index_fill(0, self.places, 1.0)
        return survey.loc + discrete / 2, (survey.scale.square() + discrete / 12).sqrt()
