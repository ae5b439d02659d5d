"""A matplotlib figure that a notebook shows by itself, and that no global state knows of."""

from __future__ import annotations

from io import BytesIO

import matplotlib.figure


class Picture(matplotlib.figure.Figure):
    """A figure laid out so that no label is cut off; ``savefig`` writes it to a file.

    Args:
        width: In inches.
        height: In inches.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), dpi=100, layout="constrained")

    def _repr_png_(self) -> bytes:
        """Return what notebooks show."""
        file = BytesIO()
        self.savefig(file, format="png", dpi=self.dpi)
        return file.getvalue()
