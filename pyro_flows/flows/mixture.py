"""Recipes of flows whose maps are distribution functions of mixtures: Flow++ for vectors, and Gaussianization."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..bijectors import LogisticMixture
from ..conditioners import MLP
from ..transforms import ActNorm, Elementwise, FlowTransform, Orthogonal
from .checks import check_sizes
from .coupling import coupling_layers
from .flow import Flow


def flowpp(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    components: int = 8,
    bound: float = 10.0,
    activation: type[nn.Module] = nn.ReLU,
    residual: bool = True,
) -> Flow:
    """Flow++ for vectors: couplings by distribution functions of logistic mixtures (Ho et al. 2019, arXiv:1902.00275).

    Its maps are inverted numerically, in the direction that samples; ``.inv`` turns it round.

    Args:
        components: The number of logistic components of each map.
        bound: The half-width of the interval that the maps bend; outside they are straight.

    The other arguments and the errors are those of :func:`~pyro_flows.flows.nice`.

    Example::

        >>> flowpp(4, components=4)().sample((3,)).shape
        torch.Size([3, 4])
    """
    bijector = LogisticMixture(components, bound=bound)
    layers = coupling_layers(
        "flowpp", bijector, input_dim, context_dim, num_transforms, hidden_dims, activation, residual
    )
    return Flow(part for layer in layers for part in (layer.inv, ActNorm(input_dim)))


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

    No network steers one feature by another; only rotations mix them.  The kernels are logistic.  The maps are inverted
    numerically, in the direction that samples.

    Args:
        input_dim: The number of features.
        context_dim: The number of context features; with a context each layer has a network, without it a table.
        num_transforms: The number of layers.
        hidden_dims: The widths of the hidden layers of each network.
        components: The number of logistic components of each map.
        bound: The half-width of the interval that the maps bend; outside they are straight.
        activation: The class of the nonlinearity.

    Raises:
        ValueError: If a size is out of its range.

    Example::

        >>> import torch
        >>> gaussianization(4, components=4)().log_prob(torch.zeros(3, 4)).shape
        torch.Size([3])
    """
    check_sizes("gaussianization", input_dim, context_dim, num_transforms, hidden_dims)
    bijector = LogisticMixture(components, bound=bound)
    layers: list[FlowTransform] = []
    for layer in range(num_transforms):
        net = None
        if context_dim:
            net = MLP(context_dim, input_dim, bijector.num_params, hidden_dims, activation=activation)
        layers += [Orthogonal(input_dim)] if layer and input_dim > 1 else []
        layers += [Elementwise(bijector, input_dim, net).inv]
    return Flow(layers)
