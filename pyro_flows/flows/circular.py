"""A recipe for angles among real numbers: flows on tori and cylinders."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..bijectors import Affine, Bijector, CircularSpline
from ..checks import as_flags
from ..conditioners import MLP, Periodic
from ..distributions import CircularBase
from ..transforms import Coupling, Elementwise, FlowTransform
from .checks import check_sizes
from .coupling import context_network, coupling_masks
from .flow import Flow


def circular_coupling(
    input_dim: int,
    context_dim: int = 0,
    *,
    circular: Sequence[bool],
    num_transforms: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    bins: int = 8,
    max_log_scale: float = 3.0,
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Couplings of circular splines for angles and affine maps for the others (Rezende et al. 2020, arXiv:2002.02428).

    In each layer the features of one kind in a part B are mapped, given all others, A, of which angles are seen by
    their cosines and sines::

        y_A = x_A,    y_B = g(x_B) + t for angles,  x_B exp(s) + t for others,    (g, s, t) by net(x_A, context)

    with g a spline of the circle.  The density has the period 2π in each angle and integrates to one over one period.
    Angles may be scored by any representative, and samples are representatives:
    ``torch.remainder(x + math.pi, 2 * math.pi) - math.pi`` lies in [-π, π).

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        circular: For each of the D features, whether it is an angle in radians.
        num_transforms: The number of coupling masks; where angles and other features are both to be mapped, two
            layers share one.
        hidden_dims: The widths of the hidden layers of each network.
        bins: The number of bins of each circular spline, from 2 to 99.
        max_log_scale: The bound on the log-scale s of one affine layer, in nats.
        activation: The class of the nonlinearity, such as ``torch.nn.ELU``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``; at the start angles are uniform and others standard
        normal.

    Raises:
        ValueError: If a size, ``bins`` or ``max_log_scale`` is out of its range, or ``circular`` does not hold one bool
            for each feature.

    Example::

        >>> import math, torch
        >>> flow = circular_coupling(2, circular=[True, False])
        >>> round(flow().log_prob(torch.tensor([1.0, 0.0])).item(), 3)  # -log 2π - log(2π) / 2
        -2.757
    """
    check_sizes("circular_coupling", input_dim, context_dim, num_transforms, hidden_dims)
    angles = as_flags("circular_coupling", "circular", circular, input_dim)
    kinds: list[tuple[Bijector, Tensor]] = [(Affine(max_log_scale), ~angles), (CircularSpline(bins), angles)]
    layers: list[FlowTransform] = []
    for mask in coupling_masks(input_dim, num_transforms):
        for bijector, kind in kinds:
            mapped = kind & ~mask if input_dim > 1 else kind
            count, seen = int(mapped.sum()), angles[~mapped]
            if count and len(seen):
                sizes = len(seen) + int(seen.sum()), count, bijector.num_params, hidden_dims, context_dim
                net = Periodic(MLP(*sizes, activation=activation), seen)
                layers.append(Coupling(bijector, net, ~mapped))
            elif count:  # with nothing to be conditioned on
                table = context_network(context_dim, count, bijector.num_params, hidden_dims, activation)
                layers.append(Elementwise(bijector, count, table))
    return Flow(layers, CircularBase(angles))
