"""The base of flows on tori and cylinders."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..arguments import as_flags, check_numbers


class CircularBase(nn.Module):
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
    zeros: Tensor

    def __init__(self, circular: Sequence[bool] | Tensor, bound: float = math.pi) -> None:
        super().__init__()
        circular = as_flags("CircularBase", "circular", circular)
        check_numbers("CircularBase", above=0, bound=bound)
        self.bound = bound
        self.register_buffer("circular", circular)
        self.register_buffer("zeros", torch.zeros(len(circular)), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        """Build the distribution, of batch shape ``()`` and event shape ``(D,)``."""
        normal = dist.Normal(self.zeros, torch.ones_like(self.zeros), validate_args=False)
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
