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
    layers = autoregressive_layers(
        "bpf", bijector, input_dim, context_dim, num_transforms, hidden_dims, adjacency, activation
    )
    return Flow([layer.inv for layer in layers])
