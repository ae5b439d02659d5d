"""A mixture of diagonal Gaussians, p(x) = Σ_k π_k N(x; μ_k, σ_k²), with reparameterised draws: a base with many modes.

A draw solves F_i(x_i | x_<i; π, μ, σ) = u_i feature by feature, with u uniform and F_i the conditional distribution
function.  Holding u fixed gives the gradient of x, without having to invert anything: dx_i = -dF_i / p(x_i | x_<i).
Stochastic Backpropagation through Mixture Density Distributions (Graves 2016, arXiv:1607.05690); Implicit
Reparameterization Gradients (Figurnov, Mohamed, Mnih 2018, arXiv:1805.08498).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..arguments import check_integers, check_numbers, is_integer


class MixtureBase(nn.Module):
    """Builds a trainable mixture of diagonal Gaussians over vectors ``(D,)``, a base with many modes::

        p(x) = Σ_k π_k N(x; μ_k, σ_k²)

    Draws are reparameterised, with first derivatives only: those of the implicit function.

    At the start each feature has mean 0 and variance 1.  The components lie apart, evenly in each feature and in an
    order of its own, fixed once and for all: were they equal, they would stay equal for ever.

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
        >>> base.logits.grad.shape  # draws carry gradients to the weights too
        torch.Size([3])
    """

    def __init__(self, input_dim: int, num_components: int, spread: float = 0.5) -> None:
        super().__init__()
        check_integers("MixtureBase", input_dim=input_dim)
        if is_integer(num_components) and num_components == 1:
            raise ValueError("MixtureBase: num_components must be at least 2, got 1; use StandardNormal for one.")
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
        """Build the distribution as its parameters are now, of batch shape ``()`` and event shape ``(D,)``."""
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        components = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)
        return ReparameterisedMixture(weights, components, validate_args=False)


class ReparameterisedMixture(dist.MixtureSameFamily):
    """torch's mixture, of diagonal Gaussians, with draws that carry first derivatives.

    Draws take D steps, one a feature; second derivatives of draws are not theirs.

    Pyro's ``MixtureOfDiagNormals`` will not do: its gradient of the logits is right only where all locations lie on one
    line through the origin and the least scales are one, it cannot draw shapes ``(S, T)`` nor more than B times from an
    expanded batch of B, and it needs D > 1.
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
            # Of the two tails, the near one: where F_i rounds to 1, nothing would be left of its derivative.
            far = (weight * z).sum(-1, keepdim=True) > 0
            tail = torch.where(far, -torch.special.ndtr(-z), torch.special.ndtr(z))  # F_i, or F_i - 1
            level = (weight * tail).sum(-1, keepdim=True)
            density = (weight * component.log_prob(x).exp()).sum(-1, keepdim=True)
            x = x - (level - level.detach()) / density.detach()  # its own value, with the gradient of a draw
            log_weight = log_weight + component.log_prob(x)
            parts.append(x)
        return torch.cat(parts, -1)
