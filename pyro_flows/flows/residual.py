"""The recipe of residual flows: free-form networks, kept invertible by a bound on their slopes."""

from __future__ import annotations

from collections.abc import Sequence

from ..conditioners import LipschitzMLP
from ..transforms import ActNorm, FlowTransform, Residual
from .checks import check_sizes
from .flow import Flow


def residual_flow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    lipschitz: float = 0.9,
    exact: bool | None = None,
) -> Flow:
    """Residual flow: from data to base x + g(x), then back by a search (Chen et al. 2019, arXiv:1906.02735).

    Each layer maps y, on the data's side, to x, on the base's side, by a network that no mask constrains::

        x = y + g(y, context),    log det(I + J_g) = Σ_{k≥1} (-1)ᵏ⁺¹ tr(J_gᵏ) / k,    Lip(g) ≤ lipschitz < 1

    The log-determinant is exact, or this sum estimated without bias.  Densities take one pass of each network; samples
    about a dozen.  Between the layers stand scales and locations of each feature, since one layer stretches by at most
    1 + ``lipschitz`` and squeezes by at most 1 - ``lipschitz``.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of residual layers.
        hidden_dims: The widths of the hidden layers of each network.
        lipschitz: The bound on the Lipschitz constant of each network, between 0 and 1.
        exact: Whether densities are exact, or unbiased estimates that differ from call to call; by default they are
            exact where features or a hidden layer are at most 64 wide.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size or the bound is out of its range.

    Example::

        >>> import torch
        >>> round(residual_flow(4)().log_prob(torch.zeros(4)).item(), 3)  # at the start it is the standard normal
        -3.676
    """
    check_sizes("residual_flow", input_dim, context_dim, num_transforms, hidden_dims)
    layers: list[FlowTransform] = []
    for _ in range(num_transforms):
        net = LipschitzMLP(input_dim, hidden_dims, context_dim, lipschitz=lipschitz)
        layers += [Residual(net, exact).inv, ActNorm(input_dim)]
    return Flow(layers)
