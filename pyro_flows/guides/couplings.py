"""Affine couplings for the draws of a guide: y_B = x_B exp(s) + t, with (s, t) = net(x_A).

The recipe ``flows.realnvp`` is made for densities.  Its scales are steep, and its shifts are in units of the base.  A
guide learns from its own draws: shifts are in units of the draws, and scales are damped, since steep ones compound from
layer to layer and throw the first draws of a fit out of range.  And without a context its networks are centred.  While
a guide is far from the posterior, all gradients point one way; they are to move the affine map, not to bend couplings.

Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..bijectors import Affine
from ..flows import Flow
from ..flows.arguments import checked_sizes
from ..flows.coupling import coupling_layers


def affine_couplings(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    max_log_scale: float = 3.0,
    activation: type[nn.Module] = nn.ELU,
) -> Flow:
    """Build the couplings of a guide; arguments are those of :func:`~pyro_flows.flows.realnvp`.

    Raises:
        ValueError: If a size or ``max_log_scale`` is out of its range.

    Example::

        >>> len(affine_couplings(4, num_transforms=2).transforms)
        2
    """
    bijector = Affine(max_log_scale)
    sizes = checked_sizes("affine_couplings", input_dim, context_dim, num_transforms, hidden_dims)
    centered = context_dim == 0  # with a context the location is a function of it
    return Flow(coupling_layers(bijector, sizes, activation, False, centered))
