"""The columns of the table that a flow was trained on, for its draws and the rows that it scores.

Integers were trained with noise, k + u with u ~ U[0, 1), so a draw in the cell [k, k + 1) stands for the integer k.
``sample`` returns it.  ``rsample`` keeps the noise, and so do ``pyro.sample`` and ``Predictive``, which call it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..encoders.training_record import judges
from ..user_code import warn_user


@dataclass(frozen=True)
class Columns:
    """The names of columns, and the columns of integers that were trained with noise.

    Args:
        names: The names, or None if the table had none.
        integers: For each column of integers its index, the smallest integer and the largest.
    """

    names: tuple[str, ...] | None = None
    integers: tuple[tuple[int, float, float], ...] = ()

    def check(self, event_shape: torch.Size) -> None:
        """Raise ValueError unless these are the columns of vectors of a shape."""
        places = {place for place, _, _ in self.integers}
        fits = len(event_shape) == 1 and places <= {*range(event_shape[0])}
        if not fits or (self.names is not None and len(self.names) != event_shape[0]):
            raise ValueError(f"Flow: columns must be those of events of shape {tuple(event_shape)}, got {self!r:.80}.")

    def whole(self, rows: Tensor) -> Tensor:
        """Return draws ``(*batch, D)`` with the integers in whose cells they lie, from the smallest to the largest."""
        if not self.integers:
            return rows
        columns = list(rows.unbind(-1))
        for place, low, high in self.integers:
            columns[place] = columns[place].floor().clamp(low, high)
        return torch.stack(columns, -1)

    def warn_of_integers(self, rows: Tensor) -> None:
        """Warn if more than a few of the rows ``(*batch, D)`` hold integers without noise."""
        if not (self.integers and rows.numel() and judges()) or rows.is_meta:
            return
        share = (rows == rows.floor()).reshape(-1, rows.shape[-1]).float().mean(0)
        whole = (share > 0.01).tolist()  # by chance uniform noise is 0 in one of 16 million numbers
        if found := [place for place, _, _ in self.integers if whole[place]]:
            labels = ", ".join(repr(self.names[place] if self.names else place) for place in found)
            must = f"value must hold integers with noise in columns {labels}, as the flow was trained"
            warn_user(f"log_prob: {must}, got integers. Use pyro_flows.dequantize(value, {found}).")
