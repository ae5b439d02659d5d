"""The base class of conditioners, networks (x, context) -> the parameters of a bijector."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import arguments
from ..arguments import check_integers, check_sizes
from .pace import Linear, Network


class Conditioner(Network):
    """A network θ(x, c) that computes ``num_params`` parameters for each of ``output_dim`` features.

    It is the abstract base class of the networks behind couplings, autoregressive layers and conditional maps.
    A feature is a number and ``size`` is ``()``, or it is a channel of an image, of size ``(H, W)``, or a token of a
    sequence, of size ``(token_dim,)``.  Each number of a feature receives its own parameters.

    A subclass calls ``super().__init__`` and defines :meth:`forward`.  It keeps these rules:

    - its last layer starts at zero, and the others at random: then every bijector starts at the identity, and after
      three steps of an optimiser every parameter has moved;
    - its layers are ``Linear`` of ``conditioners.pace``, so that a guide can choose how far a step moves them;
    - the context enters the first hidden layer by :meth:`add_context`, so that it is processed once and broadcast over
      samples;
    - rows are independent of one another, unlike with batch norm, and calls are deterministic.

    Output ``p * output_dim + i`` of the last layer should be parameter p of feature i, as :meth:`arranged` assumes.
    Each parameter of all features is then contiguous in memory, as the elementwise maps read them.

    Args:
        input_dim: The number of features that go in; 0 if the parameters depend on the context only.
        output_dim: The number of features that receive parameters.
        num_params: The number of parameters of each number of a feature (``bijector.num_params``).
        hidden_dims: The widths of the hidden layers, at least one.
        context_dim: The number of context features, 0 without.

    Attributes:
        size: The shape of one feature, ``()`` unless a subclass sets another.
        from_context: The linear map of contexts ``(*batch, context_dim)`` to the first hidden layer, or None.

    Raises:
        ValueError: If a size is out of its range.

    Example::

        >>> import torch
        >>> from pyro_flows.bijectors import Affine
        >>> from pyro_flows.transforms import Coupling
        >>> class OneLayer(Conditioner):
        ...     def __init__(self, input_dim, output_dim, num_params, width=16, context_dim=0):
        ...         super().__init__(input_dim, output_dim, num_params, (width,), context_dim)
        ...         self.first = Linear(input_dim, width)
        ...         self.last = Linear(width, num_params * output_dim, zero=True)
        ...     def forward(self, x, context=None):
        ...         h = torch.tanh(self.add_context(self.first(x), context))
        ...         return self.arranged(self.last(h))
        >>> layer = Coupling(Affine(), OneLayer(2, 1, num_params=2), mask=[True, True, False])
        >>> y, log_det = layer.forward_and_log_det(torch.ones(3))
        >>> y.tolist(), log_det.item()  # the identity at the start
        ([1.0, 1.0, 1.0], 0.0)
    """

    size: tuple[int, ...] = ()
    from_context: nn.Module | None

    def __init__(
        self, input_dim: int, output_dim: int, num_params: int, hidden_dims: Sequence[int], context_dim: int
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        check_integers(caller, 0, input_dim=input_dim, context_dim=context_dim)
        check_integers(caller, output_dim=output_dim, num_params=num_params)
        check_sizes(caller, hidden_dims=hidden_dims)
        self.input_dim, self.output_dim = input_dim, output_dim
        self.num_params, self.context_dim = num_params, context_dim
        self.hidden_dims = tuple(hidden_dims)
        self.from_context = Linear(context_dim, self.hidden_dims[0], bias=False) if context_dim else None

    def add_context(self, h: Tensor, context: Tensor | None) -> Tensor:
        """Add the term of the context to the first hidden layer.

        Args:
            h: The term of the inputs, ``(*batch, hidden_dims[0])``.
            context: Contexts of shape ``(*batch, context_dim)``, broadcast with ``h``; ignored if ``context_dim`` is 0.

        Returns:
            Of shape ``(*batch, hidden_dims[0])``.

        Raises:
            ValueError: If the network takes contexts and none is given.
        """
        share = share_of(self, context)
        return h if share is None else h + share

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Compute parameters.

        Args:
            x: Inputs of shape ``(*batch, input_dim, *size)``.
            context: Contexts of shape ``(*batch, context_dim)``, broadcast with ``x``, or None if ``context_dim`` is 0.

        Returns:
            Parameters of shape ``(*batch, output_dim, *size, num_params)``.

        Raises:
            ValueError: If the network takes contexts and none is given.
        """

    def arranged(self, outputs: Tensor) -> Tensor:
        """Return ``(*batch, num_params * output_dim)`` outputs of a layer as ``(*batch, output_dim, num_params)``."""
        return outputs.unflatten(-1, (self.num_params, self.output_dim)).mT


class Rectifier(nn.ReLU):
    """max(0, x) in place, for inputs that nothing else reads, such as the results of linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=torch._C._get_tracing_state() is None)  # torch.jit must record a copy


def activation_of(caller: str, kind: type[nn.Module]) -> nn.Module:
    """Return an activation for the results of linear layers; errors as in ``arguments.activation_of``."""
    return Rectifier() if kind is nn.ReLU else arguments.activation_of(caller, kind)


def share_of(net: Any, context: Tensor | None) -> Tensor | None:
    """Return the term of a context in the first hidden layer of a network, or None if the network takes no contexts.

    Raises:
        ValueError: If the network takes contexts and none is given.
    """
    if net.from_context is None:
        return None
    if context is None:
        name, width = type(net).__name__, net.context_dim
        raise ValueError(f"{name}: context is missing; this network takes contexts of width {width}.")
    return net.from_context(context)
