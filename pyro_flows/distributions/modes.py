"""A mixture of Gaussians with full covariances, p(x) = Σ_k π_k N(x; μ_k, Σ_k), that is set and not trained."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..checks import check_integers


class ModesBase(nn.Module):
    """Builds a mixture of Gaussians over vectors ``(D,)``, a base with modes where :meth:`set` has put them::

        p(x) = Σ_k π_k N(x; μ_k, L_k L_kᵀ)

    It has no parameters: what moves draws is the flow.  So a fit by the ELBO, which forgives a guide that covers one
    mode alone, cannot give modes up.  At the start all components are standard normals.

    Args:
        input_dim: The number D of features, at least 1.
        num_components: The number K of components, at least 1.

    Attributes:
        loc: The means μ, ``(K, D)``.
        scale_tril: The Cholesky factors L, ``(K, D, D)``.
        logits: The logarithms of the weights π, up to a constant, ``(K,)``.

    Raises:
        ValueError: If an argument is out of its range.

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

    def __init__(self, input_dim: int, num_components: int) -> None:
        super().__init__()
        check_integers("ModesBase", input_dim=input_dim, num_components=num_components)
        self.input_dim, self.num_components = input_dim, num_components
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
        components = dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
        return _FixedMixture(weights, components, validate_args=False)


class _FixedMixture(dist.MixtureSameFamily):
    """A mixture without parameters, whose draws are reparameterised for want of anything to differentiate by."""

    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.sample(torch.Size(sample_shape))
