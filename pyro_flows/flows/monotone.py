"""Recipes of autoregressive flows with smooth curves in place of splines, most of them inverted numerically.

All score fast and sample incrementally.  ``.inv`` turns each into the other kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..bijectors import Bernstein, Integral, Sigmoidal, SumOfSquares
from .autoregressive import Graph, autoregressive_layers
from .flow import Flow


def naf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 3,
    hidden_dims: Sequence[int] = (64, 64),
    components: int = 8,
    layers: int = 1,
    bound: float = 10.0,
    adjacency: Graph | None = None,
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Neural autoregressive flow with deep sigmoidal maps (Huang et al. 2018, arXiv:1804.00779): fast densities.

    Args:
        components: The number of sigmoids of each layer of a map.
        layers: The number of layers of a map.
        bound: The half-width of the interval that the maps bend; outside they are straight.

    The other arguments and the errors are those of :func:`~pyro_flows.flows.iaf`.

    Example::

        >>> naf(4, components=4)().sample((3,)).shape
        torch.Size([3, 4])
    """
    bijector = Sigmoidal(components, layers, bound)
    stack = autoregressive_layers(
        "naf", bijector, input_dim, context_dim, num_transforms, hidden_dims, adjacency, activation
    )
    return Flow([layer.inv for layer in stack])


def umnn(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 3,
    hidden_dims: Sequence[int] = (64, 64),
    hidden: int = 8,
    bound: float = 5.0,
    adjacency: Graph | None = None,
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Unconstrained monotonic neural networks (Wehenkel, Louppe 2019, arXiv:1908.05164): fast densities.

    Here the integral is one that can be taken, and undone, exactly.

    Args:
        hidden: The number of hidden units of the network whose integral a map is.
        bound: The half-width of the interval that the maps bend; outside they are straight.

    The other arguments and the errors are those of :func:`~pyro_flows.flows.iaf`.

    Example::

        >>> umnn(4, hidden=4)().sample((3,)).shape
        torch.Size([3, 4])
    """
    bijector = Integral(hidden, bound=bound)
    layers = autoregressive_layers(
        "umnn", bijector, input_dim, context_dim, num_transforms, hidden_dims, adjacency, activation
    )
    return Flow([layer.inv for layer in layers])


def sospf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 3,
    hidden_dims: Sequence[int] = (64, 64),
    degree: int = 6,
    polynomials: int = 2,
    bound: float = 5.0,
    adjacency: Graph | None = None,
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Sum-of-squares polynomial flow (Jaini, Selby, Yu 2019, arXiv:1905.02325): fast densities.

    Args:
        degree: The degree of the polynomials whose squares are integrated.
        polynomials: Their number.
        bound: The half-width of the interval that the maps bend; outside they are straight.

    The other arguments and the errors are those of :func:`~pyro_flows.flows.iaf`.

    Example::

        >>> sospf(4, degree=2)().sample((3,)).shape
        torch.Size([3, 4])
    """
    bijector = SumOfSquares(degree, polynomials, bound=bound)
    layers = autoregressive_layers(
        "sospf", bijector, input_dim, context_dim, num_transforms, hidden_dims, adjacency, activation
    )
    return Flow([layer.inv for layer in layers])


def bpf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 3,
    hidden_dims: Sequence[int] = (64, 64),
    degree: int = 32,
    bound: float = 5.0,
    adjacency: Graph | None = None,
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Bernstein polynomial flow (Sick, Hothorn, Dürr 2020, arXiv:2004.00464): fast densities.

    Args:
        degree: The degree of the polynomials.
        bound: The half-width of the interval that the maps bend; outside they are straight.

    The other arguments and the errors are those of :func:`~pyro_flows.flows.iaf`.

    Example::

        >>> bpf(4, degree=8)().sample((3,)).shape
        torch.Size([3, 4])
    """
    bijector = Bernstein(degree, bound=bound)
    layers = autoregressive_layers(
        "bpf", bijector, input_dim, context_dim, num_transforms, hidden_dims, adjacency, activation
    )
    return Flow([layer.inv for layer in layers])
