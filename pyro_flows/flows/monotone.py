"""Recipes of autoregressive flows with smooth curves in place of splines, most of them inverted numerically.

All score fast and sample incrementally.  ``.inv`` turns each into the other kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..bijectors import Bernstein, Integral, Sigmoidal, SumOfSquares
from ..transforms import BlockAutoregressive, FlowTransform, Permute
from .arguments import check_sizes
from .autoregressive import Graph, masked_layers
from .coupling import context_network
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

    Each layer maps y, on the data's side, to x, on the base's side, with all parameters by one masked network::

        x_i = f(y_i; θ_i),    f(y) = logit Σ_k w_k σ(a_k y + b_k),    θ_i = net_i(y_1 … y_{i-1}, context)

    Densities take one pass of each network; samples are drawn feature by feature, by a search for each.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; the order of the features is reversed from one to the next.
        hidden_dims: The widths of the hidden layers of each network.
        components: The number of sigmoids of each layer of a map, at least 2.
        layers: The number of layers of a map: f after f.
        bound: The half-width of the interval that the maps bend; outside they are straight.
        adjacency: Which feature may depend on which, ``(D, D)``, as for :func:`~pyro_flows.flows.iaf`.
        activation: The class of the nonlinearity of the networks, such as ``torch.nn.ELU``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range, or the graph has a cycle or needs wider hidden layers.

    Example::

        >>> flow = naf(4, components=4)
        >>> x = flow.sample((3,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    bijector = Sigmoidal(components, layers, bound)
    return Flow(
        masked_layers("naf", bijector, input_dim, context_dim, num_transforms, hidden_dims, adjacency, activation)
    )


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

    Each layer maps y, on the data's side, to x, on the base's side, with all parameters by one masked network::

        x_i = b_i + ∫₀^{y_i} g(t; θ_i) dt,    g > 0,    (b_i, θ_i) = net_i(y_1 … y_{i-1}, context)

    log g is a network of one hidden layer, bounded; its integral is one that can be taken, and undone, exactly.
    Densities take one pass of each network; samples are drawn incrementally, in about one pass too.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; the order of the features is reversed from one to the next.
        hidden_dims: The widths of the hidden layers of each masked network.
        hidden: The number of hidden units of the network whose integral a map is, at least 2.
        bound: The half-width of the interval that the maps bend; outside they are straight.
        adjacency: Which feature may depend on which, ``(D, D)``, as for :func:`~pyro_flows.flows.iaf`.
        activation: The class of the nonlinearity of the masked networks, such as ``torch.nn.ELU``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range, or the graph has a cycle or needs wider hidden layers.

    Example::

        >>> flow = umnn(4, hidden=4)
        >>> x = flow.sample((3,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    bijector = Integral(hidden, bound=bound)
    return Flow(
        masked_layers("umnn", bijector, input_dim, context_dim, num_transforms, hidden_dims, adjacency, activation)
    )


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

    Each layer maps y, on the data's side, to x, on the base's side, with p_k polynomials and net a masked network::

        x_i = b_i + ∫₀^{y_i} Σ_k p_k(t; θ_i)² dt,    (b_i, θ_i) = net_i(y_1 … y_{i-1}, context)

    Densities take one pass of each network; samples are drawn feature by feature, by a search for each.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; the order of the features is reversed from one to the next.
        hidden_dims: The widths of the hidden layers of each network.
        degree: The degree of the polynomials whose squares are integrated, at least 1.
        polynomials: Their number; two can be any positive polynomial.
        bound: The half-width of the interval that the maps bend; outside they are straight.
        adjacency: Which feature may depend on which, ``(D, D)``, as for :func:`~pyro_flows.flows.iaf`.
        activation: The class of the nonlinearity of the networks, such as ``torch.nn.ELU``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range, or the graph has a cycle or needs wider hidden layers.

    Example::

        >>> flow = sospf(4, degree=2)
        >>> x = flow.sample((3,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    bijector = SumOfSquares(degree, polynomials, bound=bound)
    return Flow(
        masked_layers("sospf", bijector, input_dim, context_dim, num_transforms, hidden_dims, adjacency, activation)
    )


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

    Each layer maps y, on the data's side, to x, on the base's side, by polynomials of degree n on [-B, B]::

        x_i = Σ_j β_ij C(n, j) uʲ (1 - u)ⁿ⁻ʲ,    u = (y_i + B) / 2B,    β_i = net_i(y_1 … y_{i-1}, context)

    whose coefficients β_ij increase in j; net is a masked network.  Densities take one pass of each network; samples
    are drawn feature by feature, by a search for each.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; the order of the features is reversed from one to the next.
        hidden_dims: The widths of the hidden layers of each network.
        degree: The degree n of the polynomials, at least 2.
        bound: The half-width B of the interval that the maps bend; outside they are straight.
        adjacency: Which feature may depend on which, ``(D, D)``, as for :func:`~pyro_flows.flows.iaf`.
        activation: The class of the nonlinearity of the networks, such as ``torch.nn.ELU``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range, or the graph has a cycle or needs wider hidden layers.

    Example::

        >>> flow = bpf(4, degree=8)
        >>> x = flow.sample((3,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    bijector = Bernstein(degree, bound=bound)
    return Flow(
        masked_layers("bpf", bijector, input_dim, context_dim, num_transforms, hidden_dims, adjacency, activation)
    )


def bnaf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Sequence[int] = (8, 8),
    max_log_slope: float = 3.0,
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Block neural autoregressive flow (De Cao, Titov, Aziz 2019, arXiv:1904.04676): fast densities.

    Each layer maps y, on the data's side, to x, on the base's side, by a single masked network of few parameters::

        x_i = f_i(y_1 … y_i, context),    increasing in y_i

    It learns better with the larger steps of Adam, 0.01 to 0.02.  Densities take one pass; samples are searched for
    feature by feature, to the last bits.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for none; with a context each layer has a second network.
        num_transforms: The number of layers; the order of the features is reversed from one to the next.
        hidden_dims: The numbers of units *of each feature*: the hidden layers are D times as wide, as are those of the
            networks of the context.
        max_log_slope: The bound on what bends and what scales a feature in one layer, in nats each.
        activation: The class of the nonlinearity of the networks of the context.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size or ``max_log_slope`` is out of its range.

    Example::

        >>> import torch
        >>> flow = bnaf(4)
        >>> flow().log_prob(torch.zeros(3, 4)).shape, flow().sample((3,)).shape
        (torch.Size([3]), torch.Size([3, 4]))
    """
    check_sizes("bnaf", input_dim, context_dim, num_transforms, hidden_dims)
    num_params, widths = sum(hidden_dims) + 2, [input_dim * width for width in hidden_dims]
    layers: list[FlowTransform] = []
    for number in range(num_transforms):
        net = context_network(context_dim, input_dim, num_params, widths, activation)
        layers.append(BlockAutoregressive(input_dim, hidden_dims, net, max_log_slope).inv)
        if number + 1 < num_transforms and input_dim > 1:
            layers.append(Permute(range(input_dim - 1, -1, -1)))
    return Flow(layers)
