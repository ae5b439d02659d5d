"""Recipes of autoregressive flows: one direction costs one pass, the other about one incremental pass.

``iaf`` samples fast and scores incrementally; all others score fast and sample incrementally.  ``.inv`` swaps the two.
The maps of ``naf``, ``sospf``, ``bpf`` and ``bnaf`` have no closed inverse: a search finds it, feature by feature.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..arguments import Activation, Widths, suggests_keywords
from ..bijectors import Affine, Bernstein, Bijector, Integral, RationalQuadraticSpline, Sigmoidal, SumOfSquares
from ..conditioners import MADE
from ..conditioners.made import ancestors, checked_graph
from ..transforms import Autoregressive, BlockAutoregressive, Elementwise, FlowTransform, Permute
from .arguments import Sizes, checked_sizes
from .coupling import context_network
from .flow import Flow

Graph = Sequence[Sequence[bool]] | Tensor


@suggests_keywords
def iaf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Widths = (64, 64),
    max_log_scale: float = 3.0,
    adjacency: Graph | None = None,
    activation: Activation = nn.ReLU,
    fixed_point: bool = False,
) -> Flow:
    """Inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934): fast samples, the choice for guides.

    Each layer maps x, on the base's side, to y, on the data's side, by one masked network::

        y_i = x_i exp(s_i) + t_i,    (s_i, t_i) = net_i(x_1 … x_{i-1}, context)

    Samples take one pass of each network.  Other values than its own draws are scored incrementally, in about one pass
    too.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; each reverses the order of the features of the one before.
        hidden_dims: The widths of the hidden layers of each network.
        max_log_scale: The bound on the log-scale s of one layer, in nats.
        adjacency: A directed graph without cycles, ``(D, D)``: ``adjacency[i, j]`` is True if feature i may depend on
            feature j.  An example is :func:`~pyro_flows.posterior_graph` of a Pyro model.  All layers then have one
            order, parents first.  In flows with fast densities one layer has exactly this graph, and each further
            layer adds one generation of ancestors.  In ``iaf`` each feature depends on all of its ancestors at once,
            since the masks act on the base.
        activation: The class of the nonlinearity, such as ``torch.nn.ELU``.
        fixed_point: True to compute the slow direction by passes over all features at once, which may be faster on
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
    sizes = checked_sizes("iaf", input_dim, context_dim, num_transforms, hidden_dims)
    graph = None if adjacency is None else ancestors(checked_graph(adjacency, input_dim))
    layers = masked_layers(Affine(max_log_scale), sizes, graph, activation, fixed_point)
    return Flow([layer.inv for layer in layers])


@suggests_keywords
def maf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Widths = (64, 64),
    max_log_scale: float = 3.0,
    adjacency: Graph | None = None,
    activation: Activation = nn.ReLU,
    fixed_point: bool = False,
) -> Flow:
    """Masked autoregressive flow (Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057): fast densities.

    Each layer maps y, on the data's side, to x, on the base's side, by one masked network::

        x_i = y_i exp(s_i) + t_i,    (s_i, t_i) = net_i(y_1 … y_{i-1}, context)

    Densities take one pass of each network.  Samples are drawn incrementally, in about one pass too.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; each reverses the order of the features of the one before.
        hidden_dims: The widths of the hidden layers of each network.
        max_log_scale: The bound on the log-scale s of one layer, in nats.
        adjacency: The graph of features, ``(D, D)``, as for :func:`iaf`.
        activation: The class of the nonlinearity, such as ``torch.nn.ELU``.
        fixed_point: True to find samples by passes over all features at once, as for :func:`iaf`.

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
    sizes = checked_sizes("maf", input_dim, context_dim, num_transforms, hidden_dims)
    return Flow(masked_layers(Affine(max_log_scale, slope=1.0), sizes, adjacency, activation, fixed_point))


@suggests_keywords
def nsf_ar(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Widths = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    adjacency: Graph | None = None,
    activation: Activation = nn.ReLU,
    fixed_point: bool = False,
) -> Flow:
    """Neural spline flow, autoregressive form (Durkan et al. 2019, arXiv:1906.04032): fast densities.

    Each layer maps y, on the data's side, to x, on the base's side, by splines and one masked network::

        x_i = spline(y_i; θ_i),    θ_i = net_i(y_1 … y_{i-1}, context)

    The last map before the data is one spline per feature, which depends on no other feature.  A flow of one feature
    lacks this map.  Densities take one pass of each network.  Samples are drawn incrementally, in about one pass too.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; each reverses the order of the features of the one before.
        hidden_dims: The widths of the hidden layers of each network.
        bins: The number of bins of each spline, from 2 to 99.
        bound: The half-width of the interval that the splines bend, in the base's standard deviations; outside they are
            the identity.
        adjacency: The graph of features, ``(D, D)``, as for :func:`iaf`.
        activation: The class of the nonlinearity, such as ``torch.nn.ELU``.
        fixed_point: True to find samples by passes over all features at once, as for :func:`iaf`.

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
    sizes = checked_sizes("nsf_ar", input_dim, context_dim, num_transforms, hidden_dims)
    bijector = RationalQuadraticSpline(bins, bound)
    layers = masked_layers(bijector, sizes, adjacency, activation, fixed_point)
    last = [Elementwise(bijector, input_dim).inv] if input_dim > 1 else []
    return Flow([*layers, *last])


@suggests_keywords
def naf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 3,
    hidden_dims: Widths = (64, 64),
    components: int = 8,
    layers: int = 1,
) -> Flow:
    """Neural autoregressive flow with deep sigmoidal maps (Huang et al. 2018, arXiv:1804.00779): fast densities.

    Each layer maps y, on the data's side, to x, on the base's side, with all parameters by one masked network::

        x_i = f(y_i; θ_i),    f(y) = logit Σ_k w_k σ(a_k y + b_k),    θ_i = net_i(y_1 … y_{i-1}, context)

    Densities take one pass of each network.  Samples are drawn feature by feature, by a search for each.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; each reverses the order of the features of the one before.
        hidden_dims: The widths of the hidden layers of each network.
        components: The number of sigmoids of each layer of a map, at least 2.
        layers: The number of layers of a map, each an f.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> flow = naf(4, components=4)
        >>> x = flow.sample((3,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    sizes = checked_sizes("naf", input_dim, context_dim, num_transforms, hidden_dims)
    return Flow(masked_layers(Sigmoidal(components, layers), sizes))


@suggests_keywords
def umnn(
    input_dim: int, context_dim: int = 0, *, num_transforms: int = 3, hidden_dims: Widths = (64, 64), hidden: int = 8
) -> Flow:
    """Unconstrained monotonic neural networks (Wehenkel, Louppe 2019, arXiv:1908.05164): fast densities.

    Each layer maps y, on the data's side, to x, on the base's side, with all parameters by one masked network::

        x_i = b_i + ∫₀^{y_i} g(t; θ_i) dt,    g > 0,    (b_i, θ_i) = net_i(y_1 … y_{i-1}, context)

    log g is a bounded network of one hidden layer, chosen so that the integral and its inverse are exact.  Densities
    take one pass of each network.  Samples are drawn incrementally, in about one pass too.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; each reverses the order of the features of the one before.
        hidden_dims: The widths of the hidden layers of each masked network.
        hidden: The number of hidden units of g, at least 2.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> flow = umnn(4, hidden=4)
        >>> x = flow.sample((3,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    sizes = checked_sizes("umnn", input_dim, context_dim, num_transforms, hidden_dims)
    return Flow(masked_layers(Integral(hidden), sizes))


@suggests_keywords
def sospf(
    input_dim: int, context_dim: int = 0, *, num_transforms: int = 3, hidden_dims: Widths = (64, 64), degree: int = 6
) -> Flow:
    """Sum-of-squares polynomial flow (Jaini, Selby, Yu 2019, arXiv:1905.02325): fast densities.

    Each layer maps y, on the data's side, to x, on the base's side, with p_k polynomials and net a masked network::

        x_i = b_i + ∫₀^{y_i} Σ_k p_k(t; θ_i)² dt,    (b_i, θ_i) = net_i(y_1 … y_{i-1}, context)

    Densities take one pass of each network.  Samples are drawn feature by feature, by a search for each.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; each reverses the order of the features of the one before.
        hidden_dims: The widths of the hidden layers of each network.
        degree: The degree of the polynomials whose squares are integrated, at least 1.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> flow = sospf(4, degree=2)
        >>> x = flow.sample((3,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    sizes = checked_sizes("sospf", input_dim, context_dim, num_transforms, hidden_dims)
    return Flow(masked_layers(SumOfSquares(degree), sizes))


@suggests_keywords
def bpf(
    input_dim: int, context_dim: int = 0, *, num_transforms: int = 3, hidden_dims: Widths = (64, 64), degree: int = 32
) -> Flow:
    """Bernstein polynomial flow (Sick, Hothorn, Dürr 2020, arXiv:2004.00464): fast densities.

    Each layer maps y, on the data's side, to x, on the base's side, by polynomials of degree n on [-B, B] with B = 5::

        x_i = Σ_j β_ij C(n, j) uʲ (1 - u)ⁿ⁻ʲ,    u = (y_i + B) / 2B,    β_i = net_i(y_1 … y_{i-1}, context)

    The coefficients β_ij increase in j, and net is a masked network.  Densities take one pass of each network.  Samples
    are drawn feature by feature, by a search for each.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of autoregressive layers; each reverses the order of the features of the one before.
        hidden_dims: The widths of the hidden layers of each network.
        degree: The degree n of the polynomials, at least 2.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> flow = bpf(4, degree=8)
        >>> x = flow.sample((3,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    sizes = checked_sizes("bpf", input_dim, context_dim, num_transforms, hidden_dims)
    return Flow(masked_layers(Bernstein(degree), sizes))


@suggests_keywords
def bnaf(input_dim: int, context_dim: int = 0, *, num_transforms: int = 5, hidden_dims: Widths = (8, 8)) -> Flow:
    """Block neural autoregressive flow (De Cao, Titov, Aziz 2019, arXiv:1904.04676): fast densities.

    Each layer maps y, on the data's side, to x, on the base's side, by a single masked network of few parameters::

        x_i = f_i(y_1 … y_i, context),    increasing in y_i

    It trains better with larger steps of Adam, 0.01 to 0.02.  Densities take one pass.  Samples are found feature by
    feature, by a search to the last bits.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for none; with a context each layer has a second network.
        num_transforms: The number of layers; each reverses the order of the features of the one before.
        hidden_dims: The numbers of units *per feature*: the hidden layers are D times as wide, and so are those of the
            networks of the context.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size is out of its range.

    Example::

        >>> import torch
        >>> flow = bnaf(4)
        >>> flow().log_prob(torch.zeros(3, 4)).shape, flow().sample((3,)).shape
        (torch.Size([3]), torch.Size([3, 4]))
    """
    sizes = checked_sizes("bnaf", input_dim, context_dim, num_transforms, hidden_dims)
    sizes_of_net = sizes._replace(hidden_dims=[input_dim * width for width in hidden_dims])
    layers: list[FlowTransform] = []
    for number in range(num_transforms):
        net = context_network(sizes_of_net, input_dim, sum(hidden_dims) + 2)
        layers.append(BlockAutoregressive(input_dim, hidden_dims, net).inv)
        if number + 1 < num_transforms and input_dim > 1:
            layers.append(Permute(range(input_dim - 1, -1, -1)))
    return Flow(layers)


def masked_layers(
    bijector: Bijector, sizes: Sizes, graph: Graph | None = None, activation: Activation = nn.ReLU, loop: bool = False
) -> list[FlowTransform]:
    """Build autoregressive layers with fast densities; without a graph the order of features alternates.

    With ``loop`` the slow direction repeats passes, as for ``fixed_point`` of :class:`Autoregressive`.
    """
    layers = []
    for number in range(sizes.num_transforms):
        order = None if graph is not None else range(sizes.input_dim)[:: -1 if number % 2 else 1]
        shared = sizes.input_dim, bijector.num_params, sizes.hidden_dims, sizes.context_dim
        net = MADE(*shared, order=order, adjacency=graph, activation=activation)
        layers.append(Autoregressive(bijector, net, fixed_point=loop).inv)
    return layers
