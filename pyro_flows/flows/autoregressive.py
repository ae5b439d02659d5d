"""Recipes of autoregressive flows: one direction costs one pass, the other about one pass, run incrementally.

``iaf`` samples fast and scores incrementally; ``maf`` and ``nsf_ar`` score fast and sample incrementally.  ``.inv``
turns each into the other kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..bijectors import Affine, Bijector, RationalQuadraticSpline
from ..conditioners import MADE
from ..transforms import Autoregressive, FlowTransform
from .checks import check_sizes
from .flow import Flow


def iaf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Sequence[int] = (64, 64),
    max_log_scale: float = 3.0,
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934): fast samples, the choice for guides.

    Args:
        input_dim: The number of features.
        context_dim: The number of context features.
        num_transforms: The number of autoregressive layers; the order of the features is reversed from one to the next.
        hidden_dims: The widths of the hidden layers of each network.
        max_log_scale: The bound on the log-scale of one layer, in nats.
        activation: The class of the nonlinearity.

    Raises:
        ValueError: If a size is out of its range.

    Example::

        >>> iaf(4)().rsample((3,)).shape
        torch.Size([3, 4])
    """
    return Flow(_stack("iaf", Affine(max_log_scale), input_dim, context_dim, num_transforms, hidden_dims, activation))


def maf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Sequence[int] = (64, 64),
    max_log_scale: float = 3.0,
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Masked autoregressive flow (Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057): fast densities.

    Arguments and errors are those of :func:`iaf`.

    Example::

        >>> import torch
        >>> maf(4)().log_prob(torch.zeros(3, 4)).shape
        torch.Size([3])
    """
    layers = _stack("maf", Affine(max_log_scale), input_dim, context_dim, num_transforms, hidden_dims, activation)
    return Flow([layer.inv for layer in layers])


def nsf_ar(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    activation: type[nn.Module] = nn.ReLU,
) -> Flow:
    """Neural spline flow, autoregressive form (Durkan et al. 2019, arXiv:1906.04032): fast densities.

    Args:
        bins: The number of bins of each spline.
        bound: The half-width of the interval that the splines bend; outside they are the identity.

    The other arguments and the errors are those of :func:`iaf`.

    Example::

        >>> nsf_ar(4, bins=4).inv().rsample((3,)).shape
        torch.Size([3, 4])
    """
    bijector = RationalQuadraticSpline(bins, bound)
    layers = _stack("nsf_ar", bijector, input_dim, context_dim, num_transforms, hidden_dims, activation)
    return Flow([layer.inv for layer in layers])


def _stack(
    name: str,
    bijector: Bijector,
    input_dim: int,
    context_dim: int,
    num_transforms: int,
    hidden_dims: Sequence[int],
    activation: type[nn.Module],
) -> list[FlowTransform]:
    check_sizes(name, input_dim, context_dim, num_transforms, hidden_dims)
    orders = [range(input_dim), range(input_dim - 1, -1, -1)]
    return [
        Autoregressive(
            bijector,
            MADE(
                input_dim, bijector.num_params, hidden_dims, context_dim, order=orders[layer % 2], activation=activation
            ),
        )
        for layer in range(num_transforms)
    ]
