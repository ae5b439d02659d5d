"""Distributions of real vectors, each by its draws and its density, with known posteriors for ``check``."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class Law(dist.TorchDistribution):
    """Distribution of vectors; subclasses define ``draw(size)`` and ``log_prob(value)``."""

    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.real_vector

    def __init__(self, dim: int) -> None:
        super().__init__(torch.Size(), torch.Size((dim,)), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Law:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.draw(torch.Size(sample_shape) + self.batch_shape)

    def draw(self, size: torch.Size) -> Tensor:
        raise NotImplementedError


class Mixture(Law):
    """Mixture of two distributions of vectors; the first has the given share of the mass."""

    def __init__(self, share: float, first: dist.TorchDistribution, second: dist.TorchDistribution) -> None:
        super().__init__(first.event_shape[0])
        self.share, self.first, self.second = share, first, second

    def draw(self, size: torch.Size) -> Tensor:
        first, second = (law.sample(size) for law in (self.first, self.second))
        return torch.where(torch.rand(size).unsqueeze(-1) < self.share, first, second)

    def log_prob(self, value: Tensor) -> Tensor:
        first, second = self.first.log_prob(value), self.second.log_prob(value)
        return torch.logaddexp(first + math.log(self.share), second + math.log(1 - self.share))


class Edged(Law):
    """Uniform distribution on a cube, extended to all vectors by a density of zero."""

    def __init__(self, low: float, high: float, dim: int) -> None:
        super().__init__(dim)
        self.low, self.high = low, high

    def draw(self, size: torch.Size) -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(size + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        inside = ((value > self.low) & (value < self.high)).all(-1)
        height = -self.event_shape[0] * math.log(self.high - self.low)
        return torch.full(inside.shape, height).where(inside, -math.inf)


class Ring(Law):
    """Distribution with a normal radius, 3 ± .3, and a uniform direction."""

    def draw(self, size: torch.Size) -> Tensor:
        way = torch.randn(size + self.event_shape)
        radius = 3 + 0.3 * torch.randn(size)
        return radius.unsqueeze(-1) * way / way.norm(dim=-1, keepdim=True)

    def log_prob(self, value: Tensor) -> Tensor:
        radius = value.norm(dim=-1)
        return dist.Normal(3.0, 0.3).log_prob(radius) - (2 * math.pi * radius).log()


class StudentT(Law):
    """A t with unit scales and few degrees of freedom, up to a constant."""

    def __init__(self, df: float, dim: int) -> None:
        super().__init__(dim)
        self.df = df

    def draw(self, size: torch.Size) -> Tensor:
        chi2 = torch.distributions.Chi2(self.df).sample(size)
        return torch.randn(size + self.event_shape) * (self.df / chi2).sqrt().unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        return -(self.df + self.event_shape[0]) / 2 * torch.log1p(value.square().sum(-1) / self.df)


class Funnel(Law):
    """v ~ Normal(0, 3) above ``low``, and normal numbers of scale exp(v / 2); below ``low`` there is no density."""

    def __init__(self, dim: int, low: float = -math.inf) -> None:
        super().__init__(dim)
        self.low, self.first = low, dist.Normal(0.0, 3.0)

    def draw(self, size: torch.Size) -> Tensor:
        least = float(self.first.cdf(torch.tensor(self.low)))
        v = self.first.icdf(least + (1 - least) * torch.rand(size)).unsqueeze(-1)
        return torch.cat((v, (v / 2).exp() * torch.randn(*size, self.event_shape[0] - 1)), -1)

    def log_prob(self, value: Tensor) -> Tensor:
        v, x = value[..., :1], value[..., 1:]
        inside = 1 - self.first.cdf(torch.tensor(self.low))
        found = self.first.log_prob(v[..., 0]) - inside.log() + dist.Normal(0.0, (v / 2).exp()).log_prob(x).sum(-1)
        return found.where(v[..., 0] >= self.low, -math.inf)
