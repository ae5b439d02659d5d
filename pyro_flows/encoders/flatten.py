"""Images as contexts: c = vec((x - loc) / scale), for networks that see of it what lies at each place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Encoder, check_sizes
from .standardize import Standardize


class Flatten(Encoder):
    """Images ``(*batch, C, H, W)`` as contexts ``(*batch, C * H * W)``, each channel standardised.

    Args:
        image_shape: Channels, height and width of an image.

    Raises:
        ValueError: If a size is below 1.

    Example::

        >>> import torch
        >>> Flatten((3, 8, 8))(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 192])
    """

    def __init__(self, image_shape: Sequence[int]) -> None:
        channels, height, width = image_shape
        check_sizes("Flatten", image_shape=(channels, height, width))
        super().__init__((channels, height, width), channels * height * width, Standardize((channels, 1, 1)))
        self.image_shape = (channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        self.check_data(x)
        return self.standardize(x).flatten(-3)
