"""A matplotlib figure that a notebook shows by itself, and that no global state knows of."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import matplotlib.figure
import numpy as np


class Picture(matplotlib.figure.Figure):
    """A figure laid out so that no label is cut off; ``savefig`` writes it to a file.

    Args:
        width: In inches.
        height: In inches.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), dpi=100, layout="constrained")

    def _repr_png_(self) -> bytes:
        """What notebooks show."""
        file = BytesIO()
        self.savefig(file, format="png", dpi=self.dpi)
        return file.getvalue()

    def grid(self, number: int, columns: int, **settings: Any) -> list[Any]:
        """Axes for a number of panels, row by row, with no lines above and to the right of them."""
        rows = -(-number // columns)
        axes = list(np.ravel(self.subplots(rows, columns, squeeze=False, **settings)))
        for axis in axes[number:]:
            axis.remove()
        for axis in axes[:number]:
            axis.spines[["top", "right"]].set_visible(False)
        return axes[:number]
