"""Evaluation of image densities: bits per dimension, and grids of samples."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..atomic_files import write_atomically
from ..plots.images import tiled


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int]) -> Tensor:
    """Return the bits per dimension of images, ``-log_prob / (D log 2)``; smaller is better.

    For a lower bound of the log-mass, such as that of :class:`~pyro_flows.flows.Dequantized`, it is an upper bound.

    Args:
        log_prob: Log-masses in nats, of any shape.
        event_shape: The shape of an image, of D numbers.

    Returns:
        Bits per dimension, of the shape of ``log_prob``.

    Example::

        >>> import math
        >>> import torch
        >>> bits_per_dim(torch.tensor(-784 * math.log(256)), (1, 28, 28)).item()  # a uniform model of 256 levels
        8.0
    """
    return -log_prob / (math.prod(event_shape) * math.log(2))


def save_images(images: Tensor, path: str | os.PathLike[str], *, columns: int = 8, levels: int | None = None) -> None:
    """Write a grid of images to a PNG file, atomically.

    Args:
        images: ``(N, C, H, W)``, with one channel (grey) or three (red, green, blue).
        path: The file.
        columns: The number of images in a row.
        levels: The number of integer levels of the model.  Without it, the range from black to white holds all values
            but the 1 % at each end.

    Raises:
        ValueError: If the images have another shape, or another number of channels, or ``columns`` is below 1.

    Example::

        >>> import tempfile
        >>> import torch
        >>> save_images(torch.rand(20, 1, 8, 8), f"{tempfile.mkdtemp()}/noise.png")
    """
    pixels = tiled("save_images", images, columns, levels)
    zoom = max(1, round(40 / images.shape[2]))
    picture = pixels.repeat(zoom, 0).repeat(zoom, 1)
    from matplotlib.image import imsave

    write_atomically(Path(path), lambda draft: imsave(draft, picture, format="png"))
