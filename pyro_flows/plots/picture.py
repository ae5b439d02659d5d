"""A matplotlib figure that notebooks display, outside of pyplot's global state."""

from io import BytesIO

import matplotlib.figure


class Picture(matplotlib.figure.Figure):
    """A figure with a layout that cuts off no label; ``savefig`` writes it to a file.

    Args:
        width: The width in inches.
        height: The height in inches.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), dpi=100, layout="constrained")

    def _repr_png_(self) -> bytes:
        """Return the PNG that notebooks display."""
        file = BytesIO()
        self.savefig(file, format="png", dpi=self.dpi)
        return file.getvalue()
