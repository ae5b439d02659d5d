"""Bases of flows: modules that build a distribution at each call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..arguments import as_flags, as_shape, check_kind, check_numbers


class _Normal(dist.Normal):
    """A normal distribution whose draws are not made in place, so that vmap can draw for each of its batch."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.loc + torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device) * self.scale


class Base(nn.Module):
    """A base of flows over events of a given shape, in the dtype and on the device of its flow.

    Args:
        event_shape: The shape of an event; a number D stands for ``(D,)``.
    """

    zeros: Tensor

    def __init__(self, event_shape: int | tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = as_shape(type(self).__name__, "event_shape", event_shape)
        self.register_buffer("zeros", torch.zeros(self.event_shape), persistent=False)


class StandardNormal(Base):
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

    def forward(self) -> dist.TorchDistribution:
        """Build the distribution, of batch shape ``()`` and event shape ``event_shape``."""
        return _Normal(self.zeros, torch.ones_like(self.zeros), validate_args=False).to_event(self.zeros.dim())


class NormalBase(Base):
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

    def __init__(self, event_shape: int | tuple[int, ...]) -> None:
        super().__init__(event_shape)
        self.loc = nn.Parameter(torch.zeros(self.event_shape))
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def forward(self) -> dist.TorchDistribution:
        """Build the distribution at the current parameters, of batch shape ``()`` and event shape ``event_shape``."""
        return _Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(self.loc.dim())


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


class CircularBase(Base):
    """The base of flows on tori and cylinders: uniform on [-B, B) for each angle, N(0, 1) for each real number.

    Events have the shape ``(D,)``, in the dtype and on the device of the flow.  Any representative of an angle has the
    same density, so x and x + 2 B do.  The density integrates to one over any interval of length 2 B.

    Normalizing Flows on Tori and Spheres (Rezende et al. 2020, arXiv:2002.02428).

    Args:
        circular: For each of the D features, True if it is circular.
        bound: Half the circumference B; by default circular features are angles in radians.

    Raises:
        ValueError: If ``circular`` is empty or not a vector, or ``bound`` is not positive and finite.

    Example::

        >>> import torch
        >>> base = CircularBase([True])
        >>> round(base().log_prob(torch.tensor([100.0])).item(), 4)  # -log 2π
        -1.8379
    """

    circular: Tensor

    def __init__(self, circular: Sequence[bool] | Tensor, bound: float = math.pi) -> None:
        circular = as_flags("CircularBase", "circular", circular)
        super().__init__(len(circular))
        check_numbers("CircularBase", above=0, bound=bound)
        self.bound = bound
        self.register_buffer("circular", circular)

    def forward(self) -> dist.TorchDistribution:
        """Build the distribution, of batch shape ``()`` and event shape ``(D,)``."""
        normal = _Normal(self.zeros, torch.ones_like(self.zeros), validate_args=False)
        return NormalOrUniform(self.circular, self.bound, normal)


class NormalOrUniform(dist.TorchDistribution):
    """Independent features: uniform on [-B, B) where ``circular`` is True, and normal elsewhere."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, circular: Tensor, bound: float, normal: dist.Normal) -> None:
        self.circular, self.bound, self.normal = circular, bound, normal
        super().__init__(normal.batch_shape[:-1], normal.batch_shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> NormalOrUniform:
        return NormalOrUniform(self.circular, self.bound, self.normal.expand((*batch_shape, *self.event_shape)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        normal = self.normal.rsample(torch.Size(sample_shape))
        return torch.where(self.circular, (2 * torch.rand_like(normal) - 1) * self.bound, normal)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(self.circular, -math.log(2 * self.bound), self.normal.log_prob(value)).sum(-1)


def log_prob_of(base: Distribution, value: Tensor) -> Tensor:
    """Return the log-density of values under a base; torch's distributions fail for an empty batch."""
    if value.numel():
        return base.log_prob(value)
    return value.reshape(*value.shape[: value.dim() - len(base.event_shape)], base.event_shape.numel()).sum(-1)
