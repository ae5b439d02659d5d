"""Recipes of residual flows: each layer adds to x a function of x, and stays invertible.

``planar_flow``, ``radial_flow`` and ``sylvester_flow`` stack many cheap layers.  Their Jacobian is the identity, or a
multiple of it, plus a matrix of low rank: one for the first two, a few for the third.  ``residual_flow`` has free-form
networks, whose bounded slopes keep it invertible.  All of them score any value, not only their own draws.
"""

from ..arguments import Widths, suggests_keywords
from ..conditioners import LipschitzMLP
from ..transforms import ActNorm, FlowTransform, Permute, Planar, Radial, Residual, Sylvester
from ..transforms.low_rank import check_ridges
from .arguments import checked_sizes
from .coupling import context_network
from .flow import Flow


@suggests_keywords
def planar_flow(
    input_dim: int, context_dim: int = 0, *, num_transforms: int = 10, hidden_dims: Widths = (64, 64)
) -> Flow:
    """Planar flow: each layer bends space along one direction (Rezende, Mohamed 2015, arXiv:1505.05770).

    From base to data a layer is::

        y = x + u tanh(w·x + b)

    with u such that it is a bijection.  It costs O(D), but one coupling does as much as many such layers.  Samples and
    densities cost the same, except for the root of one scalar equation per layer.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for none; with a context each layer has a network, and without it
            its parameters are trained directly.
        num_transforms: The number of layers.
        hidden_dims: The widths of the hidden layers of each network.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size is out of its range.

    Example::

        >>> flow = planar_flow(4)
        >>> flow().log_prob(flow().sample((3,))).shape  # draws of another distribution object count as any value
        torch.Size([3])
    """
    sizes = checked_sizes("planar_flow", input_dim, context_dim, num_transforms, hidden_dims)
    num_params = 2 * input_dim + 1
    return Flow(Planar(input_dim, context_network(sizes, 1, num_params)) for _ in range(num_transforms))


@suggests_keywords
def radial_flow(
    input_dim: int, context_dim: int = 0, *, num_transforms: int = 10, hidden_dims: Widths = (64, 64)
) -> Flow:
    """Radial flow: each layer stretches space around one point (Rezende, Mohamed 2015, as for :func:`planar_flow`).

    From base to data a layer is::

        y = x + β (x - x₀) / (α + r),    r the distance of x from x₀

    with β such that it is a bijection.  It costs O(D), in both directions.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for none; with a context each layer has a network, and without it
            its parameters are trained directly.
        num_transforms: The number of layers.
        hidden_dims: The widths of the hidden layers of each network.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size is out of its range.

    Example::

        >>> import torch
        >>> flow = radial_flow(4, context_dim=2)
        >>> flow(torch.zeros(5, 2)).log_prob(torch.zeros(4)).shape  # one value, five contexts
        torch.Size([5])
    """
    sizes = checked_sizes("radial_flow", input_dim, context_dim, num_transforms, hidden_dims)
    num_params = input_dim + 2
    return Flow(Radial(input_dim, context_network(sizes, 1, num_params)) for _ in range(num_transforms))


@suggests_keywords
def sylvester_flow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    rank: int | None = None,
    reflections: int | None = None,
    hidden_dims: Widths = (64, 64),
) -> Flow:
    """Sylvester flow: each layer bends space along ``rank`` directions (van den Berg et al. 2018, arXiv:1803.05649).

    From base to data a layer is, with M orthonormal columns in Q and triangular R and R̃ such that it is a bijection::

        y = x + Q R tanh(R̃ Qᵀ x + b)

    The paper's kinds are choices of two numbers.  *Orthogonal* is ``rank = reflections``, the default.  *Householder*
    is ``rank = input_dim`` with any number of reflections.  *Triangular* is ``rank = input_dim, reflections = 0``; each
    layer then reverses the order of the features.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for none; with a context each layer has a network, and without it
            its parameters are trained directly.
        num_transforms: The number of layers.
        rank: The number M of directions that a layer bends, at most D; by default the smaller of D and 8.
        reflections: The number H of Householder reflections that build the directions; by default M, but less than D.
            A layer has M² + 2 M + H D parameters; with a context they are the outputs of its network.
        hidden_dims: The widths of the hidden layers of each network.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size, ``rank`` or ``reflections`` is out of its range.

    Example::

        >>> flow = sylvester_flow(4, num_transforms=1, rank=2)
        >>> sum(parameter.numel() for parameter in flow.parameters())  # M² + 2 M + H D
        16
    """
    sizes = checked_sizes("sylvester_flow", input_dim, context_dim, num_transforms, hidden_dims)
    rank, reflections = check_ridges("sylvester_flow", input_dim, rank, reflections)
    num_params = Sylvester.count_params(input_dim, rank, reflections)
    layers: list[FlowTransform] = []
    for layer in range(num_transforms):
        if layer > 0 and reflections == 0:
            layers.append(Permute(range(input_dim - 1, -1, -1)))
        net = context_network(sizes, 1, num_params)
        layers.append(Sylvester(input_dim, rank, reflections, net))
    return Flow(layers)


@suggests_keywords
def residual_flow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 8,
    hidden_dims: Widths = (64, 64),
    lipschitz: float = 0.9,
    exact: bool | None = None,
) -> Flow:
    """Residual flow: from data to base x + g(x), then back by a search (Chen et al. 2019, arXiv:1906.02735).

    Each layer maps y, on the data's side, to x, on the base's side, by a network without masks::

        x = y + g(y, context),    log det(I + J_g) = Σ_{k≥1} (-1)ᵏ⁺¹ tr(J_gᵏ) / k,    Lip(g) ≤ lipschitz < 1

    The log-determinant is exact, or an unbiased estimate of this sum.  Densities take one pass of each network, and
    samples about a dozen.  A scale and a location of each feature follow each layer, since one layer stretches by at
    most 1 + ``lipschitz`` and squeezes by at most 1 - ``lipschitz``.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of residual layers.
        hidden_dims: The widths of the hidden layers of each network.
        lipschitz: The bound on the Lipschitz constant of each network, between 0 and 1.
        exact: True for exact densities, False for unbiased estimates that differ from call to call.  By default they
            are exact if there are at most 64 features or a hidden layer is at most 64 wide.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size or the bound is out of its range.

    Example::

        >>> import torch
        >>> round(residual_flow(4)().log_prob(torch.zeros(4)).item(), 3)  # at the start it is the standard normal
        -3.676
    """
    checked_sizes("residual_flow", input_dim, context_dim, num_transforms, hidden_dims)
    layers: list[FlowTransform] = []
    for _ in range(num_transforms):
        net = LipschitzMLP(input_dim, hidden_dims, context_dim, lipschitz=lipschitz)
        layers += [Residual(net, exact).inv, ActNorm(input_dim)]
    return Flow(layers)
