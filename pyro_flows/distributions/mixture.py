"""Mixtures of Gaussians: one that is trained, with diagonal covariances, and one that is set, with full covariances."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..arguments import as_flags, check_integers, check_numbers

MAX_SD = 2.0  # a normal on the circle of this conditional standard deviation, or of a larger one, is nearly uniform
TURNS = 2  # in each direction in the sum over full turns; the rest of its density is below 1e-12


class MixtureBase(nn.Module):
    """A trainable mixture of diagonal Gaussians over vectors ``(D,)``, a base with many modes::

        p(x) = Σ_k π_k N(x; μ_k, σ_k²)

    Draws are reparameterised, with first derivatives only, those of the implicit function.

    At the start each feature has mean 0 and variance 1.  The components are spread evenly in each feature, in a fixed
    order that differs between features.  Equal components would stay equal.

    Stochastic Backpropagation through Mixture Density Distributions (Graves 2016, arXiv:1607.05690); Implicit
    Reparameterization Gradients (Figurnov, Mohamed, Mnih 2018, arXiv:1805.08498).

    Args:
        input_dim: The number D of features, at least 1.
        num_components: The number K of components, at least 2.
        spread: The standard deviation of the locations of the components at the start, between 0 and 1.

    Attributes:
        loc: The locations μ, ``(K, D)``.
        log_scale: The log-scales log σ in nats, ``(K, D)``.
        logits: The logits of the weights π, ``(K)``.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> base = MixtureBase(2, num_components=3)
        >>> base().rsample((5,)).shape, len(base.loc.unique(dim=0))
        (torch.Size([5, 2]), 3)
        >>> base().rsample((5,)).sum().backward()
        >>> base.logits.grad.shape  # draws have gradients to the weights too
        torch.Size([3])
    """

    def __init__(self, input_dim: int, num_components: int, spread: float = 0.5) -> None:
        super().__init__()
        check_integers("MixtureBase", input_dim=input_dim)
        check_integers("MixtureBase", 2, num_components=num_components)
        check_numbers("MixtureBase", above=0, below=1, spread=spread)
        self.input_dim, self.num_components, self.spread = input_dim, num_components, spread
        even = torch.linspace(-1, 1, num_components)
        even = even * (spread / even.std(correction=0))
        source = torch.Generator().manual_seed(0)
        orders = [torch.arange(num_components)]
        orders += [torch.randperm(num_components, generator=source) for _ in range(input_dim - 1)]
        self.loc = nn.Parameter(even[torch.stack(orders, -1)])  # (K, D)
        self.log_scale = nn.Parameter(torch.full((num_components, input_dim), 1 - spread**2).log() / 2)
        self.logits = nn.Parameter(torch.zeros(num_components))

    def forward(self) -> dist.TorchDistribution:
        """Build the distribution at the current parameters, of batch shape ``()`` and event shape ``(D,)``."""
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        components = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)
        return ReparameterisedMixture(weights, components, validate_args=False)


class ReparameterisedMixture(dist.MixtureSameFamily):
    """torch's mixture, of diagonal Gaussians, with draws that have first derivatives.

    A draw solves F_i(x_i | x_<i; π, μ, σ) = u_i feature by feature, with u uniform and F_i the conditional distribution
    function.  With u fixed, dx_i = -dF_i / p(x_i | x_<i), so the gradient of x needs no inverse.

    Pyro's ``MixtureOfDiagNormals`` has a gradient of the logits that is right only if all locations lie on one line
    through the origin and the least scales are one.  It cannot sample the shape ``(S, T)``, nor more than B draws from
    an expanded batch of B, and it needs D > 1.
    """

    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        value = self.sample(torch.Size(sample_shape))  # (*sample_shape, *batch, D)
        normal = self.component_distribution.base_dist
        log_weight = self.mixture_distribution.logits  # of the components given x_<i: (*sample_shape, *batch, K)
        parts: list[Tensor] = []
        for place, x in enumerate(value.unsqueeze(-1).unbind(-2)):
            component = dist.Normal(normal.loc[..., place], normal.scale[..., place], validate_args=False)
            weight = torch.softmax(log_weight, -1)
            z = (x - component.loc) / component.scale
            # F_i loses its derivative where it rounds to 1, so of the two tails the nearer one is used.
            far = (weight * z).sum(-1, keepdim=True) > 0
            tail = torch.where(far, -torch.special.ndtr(-z), torch.special.ndtr(z))  # F_i, or F_i - 1
            level = (weight * tail).sum(-1, keepdim=True)
            density = (weight * component.log_prob(x).exp()).sum(-1, keepdim=True)
            x = x - (level - level.detach()) / density.detach()  # the same value, with the gradient of a draw
            log_weight = log_weight + component.log_prob(x)
            parts.append(x)
        return torch.cat(parts, -1)


class ModesBase(nn.Module):
    """A mixture of Gaussians over vectors ``(D,)`` with full covariances, a base whose modes :meth:`set` places::

        p(x) = Σ_k π_k N(x; μ_k, L_k L_kᵀ)

    It has no parameters: only the flow is trained.  So a fit by the ELBO, which tolerates a guide that covers one mode
    only, cannot lose modes.  At the start all components are standard normals.

    Args:
        input_dim: The number D of features, at least 1.
        num_components: The number K of components, at least 1.
        circular: For each of the features, True if it is an angle in radians; by default there are no angles.  The
            density has the period 2π in each angle, and draws of angles are in [-π, π).

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
        """Place the components.

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
            components: dist.TorchDistribution = WrappedNormal(self.loc, self.scale_tril, self.circular)
        else:
            components = dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
        return FixedMixture(weights, components, validate_args=False)


class FixedMixture(dist.MixtureSameFamily):
    """A mixture without parameters.  Its draws count as reparameterised, since they have no gradients to propagate."""

    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.sample(torch.Size(sample_shape))


class WrappedNormal(dist.TorchDistribution):
    """Gaussians N(μ, L Lᵀ) over vectors ``(D,)`` with some angles among the features, as products of conditionals::

        x_j given x_1 ... x_{j-1}  ~  N(μ_j - Σ_{i<j} A_ji (x_i - μ_i), L_jj²),    A the inverse of L diag(L)⁻¹

    The conditionals of angles are wrapped, with differences of angles in [-π, π).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, loc: Tensor, scale_tril: Tensor, circular: Tensor) -> None:
        sds = scale_tril.diagonal(dim1=-2, dim2=-1)
        eye = torch.eye(loc.shape[-1]).to(loc)
        unit = scale_tril / sds.unsqueeze(-2)
        self._coefficients = torch.linalg.solve_triangular(unit, eye.expand_as(unit), upper=False, unitriangular=True)
        self._loc, self._circular = loc, circular
        self._normal = dist.Normal(0.0, sds.where(~circular, sds.clamp_max(MAX_SD)), validate_args=False)
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        noise = self._normal.sample(torch.Size(sample_shape))
        offset = torch.zeros_like(noise)  # x - μ
        for j in range(noise.shape[-1]):
            mean = -(self._coefficients[..., j, :j] * offset[..., :j]).sum(-1)
            offset[..., j] = self._wrap(mean + noise[..., j], j)
        return self._wrap(self._loc + offset)

    def log_prob(self, value: Tensor) -> Tensor:
        offset = self._wrap(value - self._loc)
        rest = self._wrap((self._coefficients @ offset.unsqueeze(-1)).squeeze(-1))
        turns = 2 * math.pi * torch.arange(-TURNS, TURNS + 1).to(rest).view(-1, *[1] * rest.dim())
        wrapped = self._normal.log_prob(rest + turns).logsumexp(0)
        return torch.where(self._circular, wrapped, self._normal.log_prob(rest)).sum(-1)

    def _wrap(self, x: Tensor, features: int | slice = slice(None)) -> Tensor:
        """Return vectors, or one feature of them, with angles in [-π, π)."""
        return torch.where(self._circular[features], (x + math.pi).remainder(2 * math.pi) - math.pi, x)
