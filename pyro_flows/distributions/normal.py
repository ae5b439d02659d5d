"""Bases of flows: modules that build a distribution at each call.

Under both, the weights p / q of a normal posterior stay bounded.  The contaminated normal has all moments of a normal.
The exponential of Student's t has no mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..arguments import as_flags, as_shape, check_kind, check_numbers, require


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


class StudentTBase(Base):
    """Independent standard Student's t, each feature with trainable degrees of freedom::

        df = l (u / l)^σ(a)

    with a real parameter a and the bounds l and u.  Steps in a are geometric in df, so an optimiser moves at one pace
    all the way from Cauchy to normal.  It is the base for targets with heavy tails: no flow of Lipschitz maps, such as
    couplings and splines with linear tails, can make the tails of its base heavier.  Draws have first derivatives only.

    Tails of Lipschitz Triangular Flows (Jaini, Kobyzev, Yu, Brubaker 2020, arXiv:1907.04481); Marginal Tail-Adaptive
    Normalizing Flows (Laszkiewicz, Lederer, Fischer 2022, arXiv:2206.10311).

    Args:
        event_shape: The shape of an event; a number D stands for ``(D,)``.
        df: The degrees of freedom at the start.
        min_df: Their lower bound l; 1 is the Cauchy distribution, and means exist above 1, variances above 2.
        max_df: Their upper bound u; at 200 the distribution is normal to some 4e-5 nats.

    Raises:
        ValueError: Unless ``0 < min_df < df < max_df < inf``.

    Example::

        >>> base = StudentTBase((3,), df=5.0)
        >>> base().event_shape, round(base.degrees_of_freedom[0].item(), 3)
        (torch.Size([3]), 5.0)
    """

    def __init__(
        self, event_shape: int | tuple[int, ...], df: float = 10.0, min_df: float = 1.0, max_df: float = 200.0
    ) -> None:
        super().__init__(event_shape)
        check_numbers("StudentTBase", above=0, df=df, min_df=min_df, max_df=max_df)
        require(min_df < df < max_df, "StudentTBase", "df", f"lie between min_df = {min_df} and max_df = {max_df}", df)
        self.df, self.min_df, self.max_df = df, min_df, max_df
        start = math.log(math.log(df / min_df) / math.log(max_df / df))
        self.free_df = nn.Parameter(torch.full(self.event_shape, start))

    @property
    def degrees_of_freedom(self) -> Tensor:
        """The current degrees of freedom of each feature, ``event_shape``."""
        return self.min_df * torch.exp(math.log(self.max_df / self.min_df) * torch.sigmoid(self.free_df))

    def forward(self) -> dist.TorchDistribution:
        """Build the distribution at the current parameters, of batch shape ``()`` and event shape ``event_shape``."""
        df = self.degrees_of_freedom
        return dist.StudentT(df, torch.zeros_like(df), torch.ones_like(df), validate_args=False).to_event(df.dim())


class ContaminatedNormal(dist.TorchDistribution):
    """Independent mixtures (1 - share) N(0, 1) + share N(0, scale²), one for each number of ``like``.

    Args:
        like: A tensor of the batch shape, the dtype and the device.
        share: The share of the wide component.
        scale: Its standard deviation.

    Example::

        >>> ContaminatedNormal(torch.zeros(3), share=0.02, scale=1.6).log_prob(torch.zeros(3)).shape
        torch.Size([3])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real
    has_rsample = True

    def __init__(self, like: Tensor, share: float, scale: float) -> None:
        self._like, self.share, self.scale = like, share, scale
        super().__init__(like.shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> ContaminatedNormal:
        return ContaminatedNormal(self._like.expand(torch.Size(batch_shape)), self.share, self.scale)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        like = self._like  # drawn anew and not in place, so that vmap can draw for each of its batch
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=like.dtype, device=like.device)
        return torch.where(torch.rand_like(noise) < self.share, self.scale * noise, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        half_square = value.square() / 2
        wide = half_square * (1 - self.scale**-2) + math.log(self.share / self.scale)
        narrow = wide.new_full((), math.log1p(-self.share))  # both relative to N(0, 1) without its normaliser
        return torch.logaddexp(wide, narrow) - half_square - math.log(2 * math.pi) / 2


class ContaminatedNormalBase(Base):
    """Independent contaminated normals, in the dtype and on the device of the flow::

        p(x) = Π_i (1 - share) N(x_i; 0, 1) + share N(x_i; 0, scale²)

    Tails are slightly heavier than a normal's, so that the weights p / q of a normal posterior stay bounded.  All
    moments of a normal exist.  Nothing is trained.

    A survey of sampling from contaminated distributions (Tukey 1960).

    Args:
        event_shape: The shape of an event; a number D stands for ``(D,)``.
        share: The share of the wide component, between 0 and 1.
        scale: Its standard deviation, in those of the narrow one; above 1.

    Raises:
        ValueError: Unless ``0 < share < 1`` and ``1 < scale < inf``.

    Example::

        >>> import torch
        >>> base, normal, x = ContaminatedNormalBase(1)(), torch.distributions.Normal(0.0, 1.0), torch.tensor([5.0])
        >>> round((base.log_prob(x) - normal.log_prob(x)).item(), 1)  # nats by which a far point is likelier
        3.3
    """

    def __init__(self, event_shape: int | tuple[int, ...], share: float = 0.02, scale: float = 1.6) -> None:
        super().__init__(event_shape)
        check_numbers("ContaminatedNormalBase", above=0, below=1, share=share)
        check_numbers("ContaminatedNormalBase", above=1, scale=scale)
        self.share, self.scale = share, scale

    def forward(self) -> dist.TorchDistribution:
        """Build the distribution, of batch shape ``()`` and event shape ``event_shape``."""
        return ContaminatedNormal(self.zeros, self.share, self.scale).to_event(self.zeros.dim())
