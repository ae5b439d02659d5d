"""Grids of images."""

import math

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_integers
from .panels import Picture, panels


def images(images: Tensor, *, columns: int = 8, levels: int | None = None) -> Picture:
    """Plot a grid of images, row by row; :func:`~pyro_flows.save_images` writes the grid to a file, pixel by pixel.

    Args:
        images: ``(N, C, H, W)``, with one channel (grey) or three (red, green, blue).
        columns: The number of images in a row.
        levels: The number of integers that a model is over; without it black and white are the 1 % and 99 % quantiles
            of the numbers.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If the images have another shape or number of channels, or ``columns`` is below 1.

    Example::

        >>> import torch
        >>> picture = images(torch.rand(20, 1, 8, 8), columns=10)
        >>> picture.axes[0].images[0].get_array().shape  # two rows of ten, with lines between
        (18, 90, 3)
    """
    pixels = tiled("images", images, columns, levels)
    height, width = pixels.shape[:2]
    inches = min(8.0, max(3.0, 0.62 * min(columns, len(images))))
    picture, (axis,) = panels(inches, max(0.8, inches * height / width), 1, 1)
    axis.imshow(pixels, interpolation="nearest")
    axis.set_axis_off()
    return picture


def tiled(caller: str, images: Tensor, columns: int, levels: int | None) -> np.ndarray:
    """Return a grid of images with white lines between them, ``(height, width, 3)``, from 0 to 1; NaN becomes white."""
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"{caller}: images must have shape (N, 1 or 3, H, W), got {tuple(images.shape)}.")
    check_integers(caller, columns=columns)
    pixels = images.detach().to("cpu", torch.float64).numpy()
    finite = pixels[np.isfinite(pixels)] if np.isfinite(pixels).any() else np.zeros(1)
    low, high = (0.0, levels - 1.0) if levels else np.quantile(finite, [0.01, 0.99])
    pixels = np.nan_to_num((pixels.clip(low, high) - low) / max(high - low, 1e-12), nan=1.0)
    columns = min(columns, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    margins = (0, rows * columns - len(pixels)), (0, 0), (0, 1), (0, 1)
    grid = np.pad(pixels, margins, constant_values=1.0)  # (rows · columns, C, H + 1, W + 1)
    _, channels, height, width = grid.shape
    grid = grid.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return np.repeat(grid.reshape(rows * height, columns * width, channels), 3 // channels, 2)
