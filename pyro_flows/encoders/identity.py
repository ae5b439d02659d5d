"""Encoders without a network: the data are the context."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..arguments import as_image, as_shape
from .base import Encoder
from .standardize import Standardize


class Identity(Encoder):
    """Data ``(*batch, *data_shape)`` themselves as contexts ``(*batch, context_dim)``, each entry standardised.

    It serves data of a few numbers, such as summary statistics, without a loss of information.

    Args:
        data_shape: The shape of a row: an integer for vectors, ``()`` for single numbers.

    Raises:
        ValueError: If a size is below 1.  In use, if the data do not end with ``data_shape``.

    Example::

        >>> import torch
        >>> identity = Identity((2, 2))
        >>> x = torch.tensor([[[0, 5], [1, 1]], [[10, 7], [3, 1]]])
        >>> identity.initialize(x)
        >>> identity(x).tolist()
        [[-1.0, -1.0, -1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    """

    def __init__(self, data_shape: int | Sequence[int]) -> None:
        shape = as_shape("Identity", "data_shape", data_shape)
        super().__init__(shape, math.prod(shape), Standardize(shape))

    def forward(self, x: Tensor) -> Tensor:
        self.check_data(x)
        return self.standardize(x).reshape(*x.shape[: x.dim() - len(self.data_shape)], self.context_dim)


class Flatten(Encoder):
    """Images ``(*batch, C, H, W)`` as contexts ``(*batch, C * H * W)``, each channel standardised.

    It serves networks with a ``context_shape``, which use the image at each place.

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
        shape = as_image("Flatten", "image_shape", image_shape)
        super().__init__(shape, math.prod(shape), Standardize((shape[0], 1, 1)))
        self.image_shape = shape

    def forward(self, x: Tensor) -> Tensor:
        self.check_data(x)
        return self.standardize(x).flatten(-3)
