"""Encoders of rows of one shape: vectors, images and class labels."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..arguments import Activation, Widths, activation_of, as_image, as_shape, check_integers, check_sizes
from ..compiler_state import is_traced
from .base import Encoder, Standardize


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


class MLPEncoder(Encoder):
    """A fully connected network from vectors ``(*batch, input_dim)`` to contexts ``(*batch, context_dim)``::

        h_{l+1} = a(W_l h_l + b_l),    c = W h_L + b

    Vectors are standardised first, each feature by its mean and standard deviation in the data of ``initialize``.  If a
    row is one number, add a dimension: ``x[..., None]`` with ``input_dim=1``.

    Auto-Encoding Variational Bayes (Kingma, Welling 2013, arXiv:1312.6114, appendix C).

    Args:
        input_dim: The number of features of a row.
        context_dim: The width of the context.
        hidden_dims: The widths of the hidden layers, at least one.
        activation: The class of the elementwise nonlinearity.

    Raises:
        ValueError: If a size is below 1.  In use, if the data do not end with ``input_dim`` features.

    Example::

        >>> import torch
        >>> x = 5.0 + torch.randn(100, 3)
        >>> encoder = MLPEncoder(3, context_dim=8)
        >>> encoder.initialize(x)
        >>> encoder(x).shape
        torch.Size([100, 8])
        >>> encoder(torch.zeros(7, 4))
        Traceback (most recent call last):
        ValueError: MLPEncoder: data must have shape (*batch, 3), got (7, 4).
    """

    def __init__(
        self, input_dim: int, context_dim: int, hidden_dims: Widths = (64, 64), *, activation: Activation = nn.SiLU
    ) -> None:
        name = type(self).__name__
        check_integers(name, input_dim=input_dim, context_dim=context_dim)
        check_sizes(name, hidden_dims=hidden_dims)
        super().__init__((input_dim,), context_dim, Standardize((input_dim,)))
        self.input_dim, self.hidden_dims, self.activation = input_dim, tuple(hidden_dims), activation
        self.hidden = hidden_layers(name, input_dim, *hidden_dims, activation=activation)
        self.output = nn.Linear(hidden_dims[-1], context_dim)

    def forward(self, x: Tensor) -> Tensor:
        self.check_data(x)
        return self.output(self.hidden(self.standardize(x)))


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
        channels: Widths = (32, 64),
        hidden_dim: int = 128,
        *,
        activation: Activation = nn.SiLU,
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


class ClassEmbedding(nn.Module):
    """A network from class labels to contexts ``(*batch, context_dim)``, a learned vector for each class::

        c = E[k] for the index k of a class,    c = p E for one-hot vectors or probabilities p

    Labels are an index tensor ``(*batch,)`` of integers from 0 to ``num_classes - 1``.  Or they are floating one-hot
    vectors or probabilities, ``(*batch, num_classes)``.  The dtype decides, since integers of this shape could also be
    a batch of indices.

    Args:
        num_classes: The number of classes.
        context_dim: The width of the context.

    Raises:
        ValueError: If a size is below 1.  In use, if labels are out of their range or have another form.

    Example::

        >>> import torch
        >>> embedding = ClassEmbedding(10, context_dim=4)
        >>> labels = torch.tensor([3, 1])
        >>> torch.equal(embedding(labels), embedding(torch.nn.functional.one_hot(labels, 10).float()))
        True
        >>> embedding(torch.tensor([10]))
        Traceback (most recent call last):
        ValueError: ClassEmbedding: labels must lie between 0 and 9, got labels from 10 to 10.
    """

    def __init__(self, num_classes: int, context_dim: int) -> None:
        super().__init__()
        check_integers("ClassEmbedding", num_classes=num_classes, context_dim=context_dim)
        self.num_classes, self.context_dim = num_classes, context_dim
        self.weight = nn.Parameter(torch.randn(num_classes, context_dim))

    def forward(self, labels: Tensor) -> Tensor:
        """Encode labels.

        Args:
            labels: Indices ``(*batch,)`` of integers, or floating one-hot vectors or probabilities
                ``(*batch, num_classes)``.

        Returns:
            Contexts of shape ``(*batch, context_dim)``.

        Raises:
            ValueError: If indices lie outside of 0 … ``num_classes - 1`` or look one-hot, or floating labels have
                another width, are negative, or do not sum to 1.  ``torch.compile`` and ``torch.func`` skip these
                checks.
        """
        if not is_traced() and (fault := self._fault(labels)):
            raise ValueError(f"ClassEmbedding: {fault}.")
        return labels.to(self.weight.dtype) @ self.weight if labels.is_floating_point() else self.weight[labels.long()]

    def _fault(self, labels: Tensor) -> str:
        """Return what is wrong with labels, or an empty string."""
        number, shape = self.num_classes, tuple(labels.shape)
        if labels.is_floating_point():
            if shape[-1:] != (number,):
                return f"floating labels must have shape (*batch, {number}), got {shape}. Use labels.long() for indices"
            if not ((labels >= 0).all() and torch.allclose(labels.sum(-1), labels.new_ones(()), atol=1e-3)):
                return "floating labels must be probabilities, at least 0 and with the sum 1"
        elif labels.numel():
            labels = labels.long()  # because torch has no minimum of unsigned integers
            low, high = int(labels.min()), int(labels.max())
            if not 0 <= low <= high < number:
                return f"labels must lie between 0 and {number - 1}, got labels from {low} to {high}"
            if shape[1:] and shape[-1] == number and high == 1 and (labels.sum(-1) == 1).all():
                return f"integer labels must be indices, got one-hot vectors of shape {shape}. Use labels.float()"
        return ""


def hidden_layers(caller: str, *widths: int, activation: Activation) -> nn.Sequential:
    """Return linear layers from the first width to the last, each followed by a nonlinearity."""
    return activated(caller, activation, (nn.Linear(n, m) for n, m in pairwise(widths)))


def activated(caller: str, activation: Activation, layers: Iterable[nn.Module]) -> nn.Sequential:
    """Return layers, each followed by a nonlinearity."""
    return nn.Sequential(*(part for layer in layers for part in (layer, activation_of(caller, activation))))
