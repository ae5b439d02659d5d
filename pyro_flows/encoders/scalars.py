"""Series and sets of single numbers, for networks of vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..arguments import quoted


class Scalars(nn.Module):
    """An encoder of series or sets whose elements are single numbers, ``(*batch, n)``.

    Args:
        network: An encoder of elements with one feature each, ``(*batch, n, 1)``.

    Raises:
        TypeError: If ``network`` cannot be called.

    Example::

        >>> import torch
        >>> from pyro_flows.encoders import GRUEncoder
        >>> encoder = Scalars(GRUEncoder(1, context_dim=8))
        >>> encoder(torch.randn(5, 30), mask=torch.rand(5, 30) < 0.9).shape
        torch.Size([5, 8])
    """

    def __init__(self, network: Callable[..., Tensor]) -> None:
        super().__init__()
        if isinstance(network, type) or not callable(network):
            raise TypeError(f"Scalars: network must be a network or a function, got {quoted(network)}.")
        self.network = network

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Encode series or sets.

        Args:
            x: Data of shape ``(*batch, n)``.
            *args: Further arguments of the network, such as times and masks.
            **kwargs: Its keyword arguments.

        Returns:
            The contexts of the network, ``(*batch, context_dim)``.

        Raises:
            ValueError: If the data are a single number.
        """
        if not x.dim():
            raise ValueError("Scalars: data must have shape (*batch, n), got ().")
        return self.network(x.unsqueeze(-1), *args, **kwargs)
