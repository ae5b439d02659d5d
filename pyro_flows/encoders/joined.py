"""The contexts of several networks in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import quoted


class Joined(nn.Module):
    """Several encoders of the same arguments, whose contexts follow one another in one vector.

    Each gets all arguments of the model, or those that :class:`Arguments` chooses.

    Args:
        networks: The networks or functions, at least one.

    Raises:
        TypeError: If one of them cannot be called.
        ValueError: If ``networks`` is empty.  In use, if the batches of the contexts differ.

    Example::

        >>> import torch
        >>> from pyro_flows.encoders import Arguments, MLPEncoder, SetEncoder
        >>> encoder = Joined([Arguments(MLPEncoder(3, context_dim=4), 0), Arguments(SetEncoder(2, context_dim=8), 1)])
        >>> encoder(torch.randn(5, 3), torch.randn(5, 20, 2)).shape
        torch.Size([5, 12])
    """

    def __init__(self, networks: Sequence[Callable[..., Tensor]]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("Joined: networks must hold at least one network, got none.")
        for place, network in enumerate(networks):
            if isinstance(network, type) or not callable(network):
                raise TypeError(f"Joined: networks must be networks or functions, got {quoted(network)}.")
            if isinstance(network, nn.Module):
                self.add_module(str(place), network)
        self.networks = tuple(networks)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Encode the arguments.

        Args:
            *args: The positional arguments of the model, in its order.
            **kwargs: Its keyword-only arguments.

        Returns:
            The contexts of the networks, ``(*batch, context_dim)``.
        """
        return self.join([network(*args, **kwargs) for network in self.networks])

    def join(self, contexts: Sequence[Tensor]) -> Tensor:
        """Return the contexts of all networks in one vector, ``(*batch, context_dim)``."""
        if len({context.shape[:-1] for context in contexts}) > 1:
            shapes = ", ".join(str(tuple(context.shape)) for context in contexts)
            raise ValueError(f"Joined: networks must return contexts of one batch (*batch, n), got shapes {shapes}.")
        return torch.cat(list(contexts), -1)
