"""The recipe of planar flows: the cheapest layers there are, one bend of space each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..conditioners import MLP
from ..transforms import Planar
from .checks import check_sizes
from .flow import Flow


def planar(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 10,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Planar flow (Rezende, Mohamed 2015, arXiv:1505.05770), which also scores values that it did not draw.

    Each layer bends space along one direction, in O(D): many are needed for what one coupling does.

    Args:
        input_dim: The number of features.
        context_dim: The number of context features; with a context each layer has a network, without it a table.
        num_transforms: The number of planar layers.
        hidden_dims: The widths of the hidden layers of each network.
        activation: The class of the nonlinearity.

    Raises:
        ValueError: If a size is out of its range.

    Example::

        >>> flow = planar(4)
        >>> flow().log_prob(flow().sample((3,))).shape
        torch.Size([3])
    """
    check_sizes("planar", input_dim, context_dim, num_transforms, hidden_dims)
    return Flow(
        Planar(
            input_dim,
            MLP(context_dim, 1, 2 * input_dim + 1, hidden_dims, activation=activation) if context_dim else None,
        )
        for _ in range(num_transforms)
    )
