"""Recipes of autoregressive flows: one direction costs one pass, the other about one pass, run incrementally.

``iaf`` samples fast and scores incrementally; all others score fast and sample incrementally.  ``.inv`` turns each into
the other kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..bijectors import Affine, Bijector, RationalQuadraticSpline
from ..conditioners import MADE
from ..conditioners.made import ancestors, checked_graph
from ..transforms import Autoregressive, FlowTransform
from .arguments import check_sizes
from .coupling import marginal
from .flow import Flow

Graph = Sequence[Sequence[bool]] | Tensor


def iaf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Sequence[int] = (64, 64),
    max_log_scale: float = 3.0,
    slope: float = 0.25,
    adjacency: Graph | None = None,
    activation: type[nn.Module] = nn.ReLU,
    fixed_point: bool = False,
) -> Flow:
    """Inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934): fast samples, the choice for guides.

    Each layer maps x, on the base's side, to y, on the data's side, by one masked network::

        y_i = x_i exp(s_i) + t_i,    (s_i, t_i) = net_i(x_1 … x_{i-1}, context)

    Samples take one pass of each network; values that it did not draw are scored incrementally, in about one pass too.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; the order of the features is reversed from one to the next.
        hidden_dims: The widths of the hidden layers of each network.
        max_log_scale: The bound on the log-scale s of one layer, in nats.
        slope: The slope of s where it is zero; in loops of your own on given data 1 learns faster.
        adjacency: ``adjacency[i, j]`` says whether feature i may depend on feature j, ``(D, D)``, a directed graph
            without cycles, such as :func:`~pyro_flows.posterior_graph` of a Pyro model.  All layers then have one
            order, parents first.  In flows of fast densities one layer has exactly this graph, and each layer more
            lets a feature see one generation of ancestors more.  ``iaf`` masks the base, whose features reach all of
            their descendants: it sees all ancestors at once.
        activation: The class of the nonlinearity, such as ``torch.nn.ELU``.
        fixed_point: Whether the slow direction is found by passes over all features at once, which may be faster on
            GPUs: see :class:`~pyro_flows.transforms.Autoregressive`.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range, or the graph has a cycle or needs wider hidden layers.

    Example::

        >>> import torch
        >>> flow = iaf(4)
        >>> x, log_q = flow.rsample_and_log_prob((3,))
        >>> x.shape, torch.allclose(flow.log_prob(x.detach()), log_q, atol=1e-4)
        (torch.Size([3, 4]), True)
    """
    bijector = Affine(max_log_scale, slope)
    graph = None if adjacency is None else ancestors(checked_graph(adjacency, input_dim))
    layers = masked_layers(
        "iaf", bijector, input_dim, context_dim, num_transforms, hidden_dims, graph, activation, fixed_point
    )
    return Flow([layer.inv for layer in layers])


def maf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Sequence[int] = (64, 64),
    max_log_scale: float = 3.0,
    slope: float = 1.0,
    adjacency: Graph | None = None,
    activation: type[nn.Module] = nn.ReLU,
    fixed_point: bool = False,
) -> Flow:
    """Masked autoregressive flow (Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057): fast densities.

    Each layer maps y, on the data's side, to x, on the base's side, by one masked network::

        x_i = y_i exp(s_i) + t_i,    (s_i, t_i) = net_i(y_1 … y_{i-1}, context)

    Densities take one pass of each network; samples are drawn incrementally, in about one pass too.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; the order of the features is reversed from one to the next.
        hidden_dims: The widths of the hidden layers of each network.
        max_log_scale: The bound on the log-scale s of one layer, in nats.
        slope: The slope of s where it is zero.
        adjacency: Which feature may depend on which, ``(D, D)``, as for :func:`iaf`.
        activation: The class of the nonlinearity, such as ``torch.nn.ELU``.
        fixed_point: Whether samples are found by passes over all features at once, as for :func:`iaf`.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range, or the graph has a cycle or needs wider hidden layers.

    Example::

        >>> import torch
        >>> chain = [[0, 0, 0], [1, 0, 0], [0, 1, 0]]  # feature 1 depends on 0, and 2 on 1
        >>> flow = maf(3, num_transforms=1, adjacency=chain)
        >>> flow.log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    bijector = Affine(max_log_scale, slope)
    layers = masked_layers(
        "maf", bijector, input_dim, context_dim, num_transforms, hidden_dims, adjacency, activation, fixed_point
    )
    return Flow(layers)


def nsf_ar(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    adjacency: Graph | None = None,
    activation: type[nn.Module] = nn.ReLU,
    fixed_point: bool = False,
) -> Flow:
    """Neural spline flow, autoregressive form (Durkan et al. 2019, arXiv:1906.04032): fast densities.

    Each layer maps y, on the data's side, to x, on the base's side, by splines and one masked network::

        x_i = spline(y_i; θ_i),    θ_i = net_i(y_1 … y_{i-1}, context)

    At the end of the data each of several features passes a spline of its own, which no other feature steers.
    Densities take one pass of each network; samples are drawn incrementally, in about one pass too.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; the order of the features is reversed from one to the next.
        hidden_dims: The widths of the hidden layers of each network.
        bins: The number of bins of each spline, from 2 to 99.
        bound: The half-width of the interval that the splines bend, in the base's standard deviations; outside they are
            the identity.
        adjacency: Which feature may depend on which, ``(D, D)``, as for :func:`iaf`.
        activation: The class of the nonlinearity, such as ``torch.nn.ELU``.
        fixed_point: Whether samples are found by passes over all features at once, as for :func:`iaf`.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range, or the graph has a cycle or needs wider hidden layers.

    Example::

        >>> import torch
        >>> flow = nsf_ar(4, bins=4)
        >>> flow.log_prob(torch.zeros(3, 4)).shape, flow.inv.sample((3,)).shape  # .inv is the flow that samples fast
        (torch.Size([3]), torch.Size([3, 4]))
    """
    bijector = RationalQuadraticSpline(bins, bound)
    layers = masked_layers(
        "nsf_ar", bijector, input_dim, context_dim, num_transforms, hidden_dims, adjacency, activation, fixed_point
    )
    return Flow([*layers, *(layer.inv for layer in marginal(bijector, input_dim))])


def masked_layers(
    name: str,
    bijector: Bijector,
    input_dim: int,
    context_dim: int,
    num_transforms: int,
    hidden_dims: Sequence[int],
    adjacency: Graph | None,
    activation: type[nn.Module],
    fixed_point: bool = False,
) -> list[FlowTransform]:
    """Build autoregressive layers of fast densities; those without a graph alternate between two orders of features."""
    check_sizes(name, input_dim, context_dim, num_transforms, hidden_dims)
    sizes = input_dim, bijector.num_params, hidden_dims, context_dim
    orders = [range(input_dim), range(input_dim - 1, -1, -1)]
    layers = []
    for number in range(num_transforms):
        order = orders[number % 2] if adjacency is None else None
        net = MADE(*sizes, order=order, adjacency=adjacency, activation=activation)
        layers.append(Autoregressive(bijector, net, fixed_point=fixed_point).inv)
    return layers
