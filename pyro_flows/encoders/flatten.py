"""Images as contexts: c = vec((x - loc) / scale), for networks that see of it what lies at each place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..arguments import as_image
from .base import Encoder
from .standardize import Standardize


class Flatten(Encoder):
    """Images ``(*batch, C, H, W)`` as contexts ``(*batch, C * H * W)``, each channel standardised.

    It serves networks that see of an image what lies at each place, those with a ``context_shape``.

    Args:
        image_shape: Channels, height and width of an image.

    Raises:
        ValueError: If a size is below 1, or there are not three.  In use, if the data do not end with ``image_shape``.

    Example::

        >>> import torch
        >>> flatten = Flatten((1, 2, 2))
        >>> images = torch.tensor([[[[0, 0], [10, 10]]]])
        >>> flatten.initialize(images)
        >>> flatten(images).tolist()
        [[-1.0, -1.0, 1.0, 1.0]]
    """

    def __init__(self, image_shape: Sequence[int]) -> None:
        channels, height, width = as_image("Flatten", "image_shape", image_shape)
        super().__init__((channels, height, width), channels * height * width, Standardize((channels, 1, 1)))
        self.image_shape = (channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        self.check_data(x)
        return self.standardize(x).flatten(-3)
