"""Conditioners that are periodic in some of their inputs, such as angles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import CONDITIONER, as_flags, check_kind, check_numbers
from .base import Conditioner


class Periodic(Conditioner):
    """Another conditioner, made periodic in some of its inputs: it takes cos(π x / B) and sin(π x / B) in place of x.

    It takes ``(*batch, D)`` to ``(*batch, output_dim, num_params)`` and serves coupling layers of angles.  It reorders
    the features, so do not wrap a network whose features are ordered, such as a :class:`MADE`.

    Normalizing Flows on Tori and Spheres (Rezende et al. 2020, arXiv:2002.02428).

    Args:
        net: The network.  Its inputs are the cosines of the P periodic features, then their sines, then the D - P other
            features.  So ``net.input_dim`` is D + P.
        periodic: For each of the D features, True if it is periodic.
        bound: Half the period, B; by default the periodic features are angles in radians.

    Raises:
        ValueError: If ``periodic`` does not fit the network's inputs, or ``bound`` is not positive and finite.  In use,
            if the network takes contexts and none is given.

    Example::

        >>> import math, torch
        >>> from pyro_flows.conditioners import MLP
        >>> inner = MLP(3, 2, num_params=5)
        >>> _ = torch.nn.init.normal_(inner.output.weight)
        >>> net = Periodic(inner, [True, False])
        >>> x = torch.randn(7, 2)
        >>> torch.allclose(net(x), net(x + torch.tensor([2 * math.pi, 0.0])), atol=1e-4)
        True
    """

    periodic: Tensor
    order: Tensor

    def __init__(self, net: Conditioner, periodic: Sequence[bool] | Tensor, bound: float = math.pi) -> None:
        check_kind("Periodic", Conditioner, CONDITIONER, net=net)
        periodic = as_flags("Periodic", "periodic", periodic)
        check_numbers("Periodic", above=0, bound=bound)
        wanted = len(periodic) + int(periodic.sum())
        if net.input_dim != wanted:
            fault = f"net must take {wanted} inputs, two for each periodic feature, for periodic = {periodic.tolist()}"
            raise ValueError(f"Periodic: {fault}, got net.input_dim = {net.input_dim}.")
        super().__init__(len(periodic), net.output_dim, net.num_params, net.hidden_dims, context_dim=0)
        self.context_dim = net.context_dim  # the context enters inside the network
        self.net = net
        self.bound = bound
        self.register_buffer("periodic", periodic)
        self.register_buffer("order", torch.argsort(~periodic, stable=True))  # the periodic features first

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x.index_select(-1, self.order)
        count = self.net.input_dim - self.input_dim
        angle = x[..., :count] * (math.pi / self.bound)
        return self.net(torch.cat((angle.cos(), angle.sin(), x[..., count:]), -1), context)
