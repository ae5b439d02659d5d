"""Pictures of several panels; matplotlib is imported when the first one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from .picture import Picture as Picture
else:
    Picture: TypeAlias = Any


def blank(width: float, height: float) -> Picture:
    """Return a picture without panels, its size in inches."""
    from . import picture

    return picture.Picture(width, height)


def panels(width: float, height: float, number: int, columns: int, **settings: Any) -> tuple[Picture, list[Any]]:
    """Return a picture and the axes of its panels, row by row, with no lines above and to the right of them."""
    made = blank(width, height)
    rows = -(-number // columns)
    axes = list(np.ravel(made.subplots(rows, columns, squeeze=False, **settings)))
    for axis in axes[number:]:
        axis.remove()
    for axis in axes[:number]:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes[:number]
