"""Bases of flows: modules that build a distribution when they are called."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..arguments import as_shape, check_kind


class StandardNormal(nn.Module):
    """Builds N(0, I) over events of a given shape, in the dtype and on the device of the flow that holds it.

    It is the base of every flow that is not given another.

    Args:
        event_shape: The shape of an event; a number D stands for ``(D,)``.

    Example::

        >>> import torch
        >>> base = StandardNormal((3,))
        >>> base().event_shape, round(base().log_prob(torch.zeros(3)).item(), 4)  # nats: -3/2 log 2π
        (torch.Size([3]), -2.7568)
        >>> base.double()().sample().dtype
        torch.float64
    """

    zeros: Tensor

    def __init__(self, event_shape: int | tuple[int, ...] | torch.Size) -> None:
        super().__init__()
        self.event_shape = as_shape("StandardNormal", "event_shape", event_shape)
        self.register_buffer("zeros", torch.zeros(self.event_shape), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        """Build the distribution, of batch shape ``()`` and event shape ``event_shape``."""
        return dist.Normal(self.zeros, torch.ones_like(self.zeros), validate_args=False).to_event(self.zeros.dim())


class NormalBase(nn.Module):
    """Builds independent normals N(loc, exp(log_scale)²) whose means and scales are learned; they start as standard.

    Args:
        event_shape: The shape of an event; a number D stands for ``(D,)``.

    Attributes:
        loc: The means, of shape ``event_shape``.
        log_scale: The logarithms of the standard deviations, in nats, of shape ``event_shape``.

    Example::

        >>> NormalBase((3,))().mean.tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(self, event_shape: int | tuple[int, ...] | torch.Size) -> None:
        super().__init__()
        self.event_shape = as_shape("NormalBase", "event_shape", event_shape)
        self.loc = nn.Parameter(torch.zeros(self.event_shape))
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def forward(self) -> dist.TorchDistribution:
        """Build the distribution as its parameters are now, of batch shape ``()`` and event shape ``event_shape``."""
        return dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(self.loc.dim())


class FixedBase(nn.Module):
    """Hands out a distribution as it is.  It keeps its dtype and device when the flow moves.

    A :class:`~pyro_flows.flows.Flow` makes one of a distribution that is given as its base.

    Args:
        distribution: Any torch or Pyro distribution; its event shape has to be that of the flow, so
            ``distribution.to_event(n)`` where dimensions are independent.

    Example::

        >>> import pyro.distributions as dist
        >>> import torch
        >>> laplace = dist.Laplace(torch.zeros(3), 1.0).to_event(1)
        >>> FixedBase(laplace)() is laplace
        True
    """

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        check_kind("FixedBase", Distribution, "a distribution of Pyro or torch", distribution=distribution)
        self.distribution = distribution

    def forward(self) -> Distribution:
        """Hand out the distribution."""
        return self.distribution
