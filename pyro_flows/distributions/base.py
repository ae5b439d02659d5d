"""Bases of flows: modules that build a distribution when they are called."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution


class StandardNormal(nn.Module):
    """Builds N(0, I) over events of a given shape, in the dtype and on the device of the flow that holds it.

    Args:
        event_shape: The shape of an event; a number D stands for ``(D,)``.

    Example::

        >>> StandardNormal((3,))().event_shape
        torch.Size([3])
    """

    zeros: Tensor

    def __init__(self, event_shape: int | tuple[int, ...] | torch.Size) -> None:
        super().__init__()
        self.event_shape = torch.Size((event_shape,) if isinstance(event_shape, int) else event_shape)
        self.register_buffer("zeros", torch.zeros(self.event_shape), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        ones = torch.ones_like(self.zeros)
        return dist.Normal(self.zeros, ones, validate_args=False).to_event(self.zeros.dim())


class NormalBase(nn.Module):
    """Builds independent normals whose means and scales are learned; they start as standard.

    Args:
        event_shape: The shape of an event; a number D stands for ``(D,)``.

    Example::

        >>> NormalBase((3,))().mean.tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(self, event_shape: int | tuple[int, ...] | torch.Size) -> None:
        super().__init__()
        self.event_shape = torch.Size((event_shape,) if isinstance(event_shape, int) else event_shape)
        self.loc = nn.Parameter(torch.zeros(self.event_shape))
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(self.loc.dim())


class FixedBase(nn.Module):
    """Hands out a distribution as it is.  It keeps its dtype and device when the flow moves.

    Args:
        distribution: Any torch or Pyro distribution.

    Example::

        >>> FixedBase(dist.Laplace(torch.zeros(3), 1.0).to_event(1))().event_shape
        torch.Size([3])
    """

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self.distribution = distribution

    def forward(self) -> Distribution:
        return self.distribution
