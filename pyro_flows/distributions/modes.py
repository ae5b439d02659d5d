"""A mixture of Gaussians with full covariances, p(x) = Σ_k π_k N(x; μ_k, Σ_k), that is set and not trained.

Angles among the features are wrapped.  Given the features before it, each is a normal on the circle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..arguments import as_flags, check_integers

WIDEST = 2.0  # the sd of an angle, given those before it, beyond which a normal on the circle is all but uniform
TURNS = 2  # each way that its density sums over; what is left out is below 1e-12


class ModesBase(nn.Module):
    """Builds a mixture of Gaussians over vectors ``(D,)``, a base with modes where :meth:`set` has put them::

        p(x) = Σ_k π_k N(x; μ_k, L_k L_kᵀ)

    It has no parameters: what moves draws is the flow.  So a fit by the ELBO, which forgives a guide that covers one
    mode alone, cannot give modes up.  At the start all components are standard normals.

    Args:
        input_dim: The number D of features, at least 1.
        num_components: The number K of components, at least 1.
        circular: For each of the features, whether it is an angle in radians; by default none is.  The density has the
            period 2π in each angle, and draws of angles are in [-π, π).

    Attributes:
        loc: The means μ, ``(K, D)``.
        scale_tril: The Cholesky factors L, ``(K, D, D)``.
        logits: The logarithms of the weights π, up to a constant, ``(K,)``.

    Raises:
        ValueError: If a number is out of its range, or ``circular`` does not hold one bool for each feature.

    Example::

        >>> import torch
        >>> base = ModesBase(2, num_components=2)
        >>> base.set(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), torch.eye(2).expand(2, 2, 2), torch.tensor([0.2, 0.8]))
        >>> round(base().log_prob(torch.tensor([3.0, 0.0])).item(), 3)  # nats: log .8 / 2π
        -2.061
    """

    loc: Tensor
    scale_tril: Tensor
    logits: Tensor
    circular: Tensor

    def __init__(self, input_dim: int, num_components: int, *, circular: Sequence[bool] | Tensor | None = None) -> None:
        super().__init__()
        check_integers("ModesBase", input_dim=input_dim, num_components=num_components)
        circular = as_flags("ModesBase", "circular", [False] * input_dim if circular is None else circular, input_dim)
        self.input_dim, self.num_components, self._has_circles = input_dim, num_components, bool(circular.any())
        self.register_buffer("circular", circular, persistent=False)
        self.register_buffer("loc", torch.zeros(num_components, input_dim))
        self.register_buffer("scale_tril", torch.eye(input_dim).repeat(num_components, 1, 1))
        self.register_buffer("logits", torch.zeros(num_components))

    def set(self, loc: Tensor, scale_tril: Tensor, weights: Tensor) -> None:
        """Put the components in their places.

        Args:
            loc: The means, ``(K, D)``.
            scale_tril: The Cholesky factors, ``(K, D, D)``.
            weights: The weights, ``(K,)``, normalised or not.
        """
        self.loc.copy_(loc)
        self.scale_tril.copy_(scale_tril)
        self.logits.copy_(weights.log())

    def forward(self) -> dist.TorchDistribution:
        """Build the distribution, of batch shape ``()`` and event shape ``(D,)``."""
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        if self._has_circles:
            components: dist.TorchDistribution = _Wrapped(self.loc, self.scale_tril, self.circular)
        else:
            components = dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
        return _FixedMixture(weights, components, validate_args=False)


class _FixedMixture(dist.MixtureSameFamily):
    """A mixture without parameters, whose draws are reparameterised for want of anything to differentiate by."""

    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.sample(torch.Size(sample_shape))


class _Wrapped(dist.TorchDistribution):
    """Gaussians N(μ, L Lᵀ) over vectors ``(D,)``, some of them angles, as products of their conditionals::

        x_j given x_1 ... x_{j-1}  ~  N(μ_j - Σ_{i<j} A_ji (x_i - μ_i), L_jj²),    A the inverse of L diag(L)⁻¹

    Those of angles are wrapped, with differences of angles in [-π, π).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, loc: Tensor, scale_tril: Tensor, circular: Tensor) -> None:
        sds = scale_tril.diagonal(dim1=-2, dim2=-1)
        eye = torch.eye(loc.shape[-1]).to(loc)
        unit = scale_tril / sds.unsqueeze(-2)
        self._coefficients = torch.linalg.solve_triangular(unit, eye.expand_as(unit), upper=False, unitriangular=True)
        self._loc, self._circular = loc, circular
        self._normal = dist.Normal(0.0, sds.where(~circular, sds.clamp_max(WIDEST)), validate_args=False)
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        noise = self._normal.sample(torch.Size(sample_shape))
        apart = torch.zeros_like(noise)
        for j in range(noise.shape[-1]):
            mean = -(self._coefficients[..., j, :j] * apart[..., :j]).sum(-1)
            apart[..., j] = self._turned(mean.unsqueeze(-1) + noise[..., j : j + 1], slice(j, j + 1)).squeeze(-1)
        return self._turned(self._loc + apart)

    def log_prob(self, value: Tensor) -> Tensor:
        apart = self._turned(value - self._loc)
        rest = self._turned((self._coefficients @ apart.unsqueeze(-1)).squeeze(-1))
        turns = 2 * math.pi * torch.arange(-TURNS, TURNS + 1).to(rest).view(-1, *[1] * rest.dim())
        wrapped = self._normal.log_prob(rest + turns).logsumexp(0)
        return torch.where(self._circular, wrapped, self._normal.log_prob(rest)).sum(-1)

    def _turned(self, x: Tensor, features: slice = slice(None)) -> Tensor:
        """Vectors, or some features of them, with angles in [-π, π)."""
        return torch.where(self._circular[features], (x + math.pi).remainder(2 * math.pi) - math.pi, x)
