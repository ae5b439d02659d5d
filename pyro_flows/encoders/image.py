"""A convolutional encoder of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..arguments import as_image, check_integers, check_sizes
from .base import Encoder
from .mlp import activated
from .standardize import Standardize


class ConvEncoder(Encoder):
    """A convolutional network from images ``(*batch, C, H, W)`` to contexts ``(*batch, context_dim)``::

        h_{l+1} = a(W_l * h_l + b_l) with stride 2,    c = V a(U vec(h_L) + b) + d

    Each convolution halves height and width, rounding up; give large images more of them.  Images are standardised
    first, each channel by its mean and standard deviation in the data of ``initialize``.

    Striving for Simplicity: The All Convolutional Net (Springenberg, Dosovitskiy, Brox, Riedmiller 2014,
    arXiv:1412.6806).

    Args:
        image_shape: Channels, height and width of an image.
        context_dim: The width of the context.
        channels: The number of channels after each convolution, at least one.
        hidden_dim: The width of the fully connected layer after the convolutions.
        activation: The class of the elementwise nonlinearity.

    Raises:
        ValueError: If a size is below 1, ``image_shape`` does not hold three, or an image is too small to be halved so
            often.  In use, if the data do not end with ``image_shape``.

    Example::

        >>> import torch
        >>> x = torch.randint(0, 256, (10, 1, 28, 28))
        >>> encoder = ConvEncoder((1, 28, 28), context_dim=8)
        >>> encoder.initialize(x)
        >>> encoder(x).shape
        torch.Size([10, 8])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        context_dim: int,
        channels: Sequence[int] = (32, 64),
        hidden_dim: int = 128,
        *,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        name = type(self).__name__
        shape = as_image(name, "image_shape", image_shape)
        check_integers(name, context_dim=context_dim, hidden_dim=hidden_dim)
        check_sizes(name, channels=channels)
        counts = tuple(channels)
        step = 2 ** len(counts)
        if min(shape[1:]) < step:
            must = f"have a height and width of at least {step}, halved for each of channels = {counts}"
            raise ValueError(f"{name}: image_shape must {must}, got {shape}. Give fewer channels.")
        super().__init__(shape, context_dim, Standardize((shape[0], 1, 1)))
        self.image_shape, self.channels = shape, counts
        self.hidden_dim, self.activation = hidden_dim, activation
        layers = (nn.Conv2d(n, m, kernel_size=3, stride=2, padding=1) for n, m in pairwise((shape[0], *counts)))
        self.convolutions = activated(name, activation, layers)
        flat_dim = counts[-1] * math.prod(math.ceil(size / step) for size in shape[1:])
        self.hidden = activated(name, activation, [nn.Linear(flat_dim, hidden_dim)])
        self.output = nn.Linear(hidden_dim, context_dim)

    def forward(self, x: Tensor) -> Tensor:
        self.check_data(x)
        batch = x.shape[:-3]
        # A convolution takes one batch dimension; the product, not -1, so that a batch may be empty.
        images = self.standardize(x).reshape(math.prod(batch), *self.image_shape)
        h = self.convolutions(images).flatten(1)
        return self.output(self.hidden(h)).reshape(*batch, self.context_dim)
