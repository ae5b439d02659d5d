"""Recipes whose layers add to x a few bends of space: cheap layers, of which many are stacked.

The Jacobian is the identity, or a multiple of it, plus a matrix of low rank: one for ``planar_flow`` and
``radial_flow``, a few for ``sylvester_flow``.  All of them also score values that they did not draw.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..conditioners import MLP
from ..transforms import FlowTransform, Permute, Planar, Radial, Sylvester
from ..transforms.sylvester import check_ridges
from .checks import check_sizes
from .flow import Flow


def planar_flow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 10,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Planar flow: each layer bends space along one direction (Rezende, Mohamed 2015, arXiv:1505.05770).

    From base to data a layer is::

        y = x + u tanh(w·x + b)

    with u such that it is a bijection.  It costs O(D): many are needed for what one coupling does.  Samples and
    densities cost the same, but for the root of one scalar equation a layer.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for none; with a context each layer has a network, without it a
            table.
        num_transforms: The number of layers.
        hidden_dims: The widths of the hidden layers of each network.
        activation: The class of the nonlinearity of the networks, such as ``torch.nn.ELU``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size is out of its range.

    Example::

        >>> flow = planar_flow(4)
        >>> flow().log_prob(flow().sample((3,))).shape  # of values that are not its own draws, too
        torch.Size([3])
    """
    check_sizes("planar_flow", input_dim, context_dim, num_transforms, hidden_dims)
    return Flow(
        Planar(input_dim, _network(2 * input_dim + 1, context_dim, hidden_dims, activation))
        for _ in range(num_transforms)
    )


def radial_flow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 10,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Radial flow: each layer stretches space around one point (Rezende, Mohamed 2015, arXiv:1505.05770).

    From base to data a layer is::

        y = x + β (x - x₀) / (α + r),    r the distance of x from x₀

    with β such that it is a bijection.  It costs O(D), in both directions.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for none; with a context each layer has a network, without it a
            table.
        num_transforms: The number of layers.
        hidden_dims: The widths of the hidden layers of each network.
        activation: The class of the nonlinearity of the networks, such as ``torch.nn.ELU``.

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
    check_sizes("radial_flow", input_dim, context_dim, num_transforms, hidden_dims)
    return Flow(
        Radial(input_dim, _network(input_dim + 2, context_dim, hidden_dims, activation)) for _ in range(num_transforms)
    )


def sylvester_flow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    rank: int | None = None,
    reflections: int | None = None,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Sylvester flow: each layer bends space along ``rank`` directions (van den Berg et al. 2018, arXiv:1803.05649).

    From base to data a layer is, with M orthonormal columns in Q and triangular R and R̃ such that it is a bijection::

        y = x + Q R tanh(R̃ Qᵀ x + b)

    The paper's kinds are choices of two numbers: *orthogonal* is ``rank = reflections``, as by default; *Householder*
    is ``rank = input_dim`` with any number of reflections; and *triangular* is ``rank = input_dim, reflections = 0``,
    between whose layers the order of the features is reversed.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for none; with a context each layer has a network, without it a
            table.
        num_transforms: The number of layers.
        rank: The number M of directions that a layer bends, at most D; by default as many, up to 8.
        reflections: The number H of Householder reflections that make the directions; by default M, but less than D.
            A layer has M² + 2 M + H D parameters, and with a context as many outputs of its network.
        hidden_dims: The widths of the hidden layers of each network.
        activation: The class of the nonlinearity of the networks, such as ``torch.nn.ELU``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size, ``rank`` or ``reflections`` is out of its range.

    Example::

        >>> flow = sylvester_flow(4, num_transforms=1, rank=2)
        >>> sum(parameter.numel() for parameter in flow.parameters())  # M² + 2 M + H D
        16
    """
    check_sizes("sylvester_flow", input_dim, context_dim, num_transforms, hidden_dims)
    rank, reflections = check_ridges("sylvester_flow", input_dim, rank, reflections)
    num_params = Sylvester.count_params(input_dim, rank, reflections)
    layers: list[FlowTransform] = []
    for layer in range(num_transforms):
        if layer > 0 and reflections == 0:
            layers.append(Permute(range(input_dim - 1, -1, -1)))
        net = _network(num_params, context_dim, hidden_dims, activation)
        layers.append(Sylvester(input_dim, rank, reflections, net))
    return Flow(layers)


def _network(num_params: int, context_dim: int, hidden_dims: Sequence[int], activation: type[nn.Module]) -> MLP | None:
    """From contexts to what is added to the table of one layer; None without a context."""
    return MLP(context_dim, 1, num_params, hidden_dims, activation=activation) if context_dim else None
