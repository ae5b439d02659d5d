"""Images side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..images import tiled

if TYPE_CHECKING:
    from .picture import Picture


def images(images: Tensor, *, columns: int = 8, levels: int | None = None) -> Picture:
    """Picture images side by side, row by row; :func:`~pyro_flows.save_images` writes them to a file, pixel by pixel.

    Args:
        images: ``(N, C, H, W)``, with one channel (grey) or three (red, green, blue).
        columns: How many stand in a row.
        levels: The number of integers that a model is over; without it black and white are the least number and the
            greatest, but for one in a hundred at each end.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If the images have another shape, or another number of channels, or ``columns`` is below 1.

    Example::

        >>> import torch
        >>> picture = images(torch.rand(20, 1, 8, 8), columns=10)
        >>> picture.axes[0].images[0].get_array().shape  # two rows of ten, with lines between
        (18, 90, 3)
    """
    from .picture import Picture

    pixels = tiled("images", images, columns, levels)
    height, width = pixels.shape[:2]
    inches = min(8.0, max(3.0, 0.62 * min(columns, len(images))))
    picture = Picture(inches, max(0.8, inches * height / width))
    (axis,) = picture.grid(1, 1)
    axis.imshow(pixels, interpolation="nearest")
    axis.set_axis_off()
    return picture
