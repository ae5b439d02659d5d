"""The recipe of Gaussianization: each feature by the distribution function of a mixture, then a rotation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..bijectors import LogisticMixture
from ..transforms import Elementwise, FlowTransform, Orthogonal
from .arguments import check_sizes
from .coupling import context_network
from .flow import Flow


def gaussianization(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    components: int = 8,
    bound: float = 10.0,
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Gaussianization flow: each feature by a mixture's distribution function, then a rotation, over and over (Meng,
    Song, Song, Ermon 2020, arXiv:2003.01941).

    From data y to base x, with f a logistic mixture's map for each feature on its own and Q rotations, all learned::

        x = f_1(Q_1 … f_{n-1}(Q_{n-1} f_n(y)))

    No network steers one feature by another; only rotations mix them.  The maps are inverted numerically, in the
    direction that samples.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for none; with a context each layer has a network, without it a
            table.
        num_transforms: The number n of layers.
        hidden_dims: The widths of the hidden layers of each network.
        components: The number of logistic components of each map, at least 2.
        bound: The half-width of the interval that the maps bend; outside they are straight.
        activation: The class of the nonlinearity, such as ``torch.nn.ELU``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size, ``components`` or ``bound`` is out of its range.

    Example::

        >>> import torch
        >>> gaussianization(4, components=4)().log_prob(torch.zeros(3, 4)).shape
        torch.Size([3])
    """
    check_sizes("gaussianization", input_dim, context_dim, num_transforms, hidden_dims)
    bijector = LogisticMixture(components, bound=bound)
    layers: list[FlowTransform] = []
    for layer in range(num_transforms):
        net = context_network(context_dim, input_dim, bijector.num_params, hidden_dims, activation)
        layers += [Orthogonal(input_dim)] if layer and input_dim > 1 else []
        layers += [Elementwise(bijector, input_dim, net).inv]
    return Flow(layers)
