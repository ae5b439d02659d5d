"""Bases of flows: modules that build a distribution at each call."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..arguments import as_shape, check_kind


class StandardNormal(nn.Module):
    """The standard normal N(0, I) over events of a given shape, in the dtype and on the device of its flow.

    It is the default base of a flow.

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
    """Independent normals N(loc, exp(log_scale)²) with trainable means and scales, standard at the start.

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
        """Build the distribution at the current parameters, of batch shape ``()`` and event shape ``event_shape``."""
        return dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(self.loc.dim())


class FixedBase(nn.Module):
    """A given distribution, which keeps its dtype and device when the flow moves.

    A :class:`~pyro_flows.flows.Flow` wraps a distribution that is passed as its base in this class.

    Args:
        distribution: Any torch or Pyro distribution with the event shape of the flow.  Write
            ``distribution.to_event(n)`` if dimensions are independent.

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
        """Return the distribution."""
        return self.distribution
