"""Encoders of vectors, and the hidden layers that other encoders share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..arguments import activation_of, check_integers, check_sizes
from .base import Encoder
from .standardize import Standardize


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
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        activation: type[nn.Module] = nn.SiLU,
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


def hidden_layers(caller: str, *widths: int, activation: type[nn.Module]) -> nn.Sequential:
    """Return linear layers from the first width to the last, each followed by a nonlinearity."""
    return activated(caller, activation, (nn.Linear(n, m) for n, m in pairwise(widths)))


def activated(caller: str, activation: type[nn.Module], layers: Iterable[nn.Module]) -> nn.Sequential:
    """Return layers, each followed by a nonlinearity."""
    return nn.Sequential(*(part for layer in layers for part in (layer, activation_of(caller, activation))))
