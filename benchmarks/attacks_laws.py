"""Distributions of unusual shapes with exact samples and exact densities, for ``attacks.py``.

Each distribution is unbatched until a plate expands it.  All supports are unconstrained.  If a density ends at an edge,
the log-density beyond the edge is minus infinity.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution


class Law(dist.TorchDistribution):
    """Base class; subclasses define ``draw(size)`` and ``log_prob(value)``, which broadcast over leading dimensions."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, event_shape: Sequence[int]) -> None:
        self._support = dist.constraints.real_vector if event_shape else dist.constraints.real
        super().__init__(torch.Size(), torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> Any:
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Law:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.draw(torch.Size(sample_shape) + self.batch_shape)

    def draw(self, size: torch.Size) -> Tensor:
        raise NotImplementedError


def normal(loc: float | Tensor, scale: float | Tensor, dim: int) -> Distribution:
    """Return a vector of independent normals."""
    return dist.Normal(loc + torch.zeros(dim), scale + torch.zeros(dim)).to_event(1)


class Mixture(Law):
    """Mixture of distributions with the same event shape and support."""

    def __init__(self, weights: Sequence[float] | Tensor, laws: Sequence[Distribution]) -> None:
        super().__init__(laws[0].event_shape)
        self.weights, self.laws, self._support = torch.as_tensor(weights, dtype=torch.float64), laws, laws[0].support

    def draw(self, size: torch.Size) -> Tensor:
        chosen = torch.distributions.Categorical(self.weights).sample(size)
        value = self.laws[0].sample(size)
        for index, law in enumerate(self.laws):
            mine = chosen == index
            value[mine] = law.sample(torch.Size((int(mine.sum()),)))
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        parts = [law.log_prob(value) + share for law, share in zip(self.laws, self.weights.log(), strict=True)]
        return torch.stack(parts).logsumexp(0)


class Blocks(Law):
    """Concatenation of independent vectors."""

    def __init__(self, *laws: Distribution) -> None:
        self.laws, self.sizes = laws, [law.event_shape[0] for law in laws]
        super().__init__((sum(self.sizes),))

    def draw(self, size: torch.Size) -> Tensor:
        return torch.cat([law.sample(size) for law in self.laws], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        parts = value.split(self.sizes, -1)
        return sum((law.log_prob(part) for law, part in zip(self.laws, parts, strict=True)), torch.zeros(()))


class Chain(Law):
    """Scalar distribution of the first number, and a distribution of the other numbers that depends on it."""

    def __init__(self, first: Distribution, rest: Callable[[Tensor], Distribution], dim: int) -> None:
        super().__init__((dim,))
        self.first, self.rest = first, rest

    def draw(self, size: torch.Size) -> Tensor:
        first = self.first.sample(size)
        return torch.cat((first.unsqueeze(-1), self.rest(first).sample()), -1)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.first.log_prob(value[..., 0]) + self.rest(value[..., 0]).log_prob(value[..., 1:])


class Tabulated(Law):
    """One-dimensional density on an interval, linear between the points of a fine grid."""

    def __init__(self, log_density: Callable[[Tensor], Tensor], low: float, high: float, cells: int = 20_000) -> None:
        super().__init__(())
        self.low, self.step, self.cells = low, (high - low) / cells, cells
        heights = log_density(torch.linspace(low, high, cells + 1))
        density = (heights - heights.max()).exp()
        masses = (density[1:] + density[:-1]) / 2
        self.total = masses.cumsum(0) / masses.sum()
        self.density = density / (masses.sum() * self.step)

    def draw(self, size: torch.Size) -> Tensor:
        cell = torch.searchsorted(self.total, torch.rand(size)).clamp_max(self.cells - 1)
        left, right, level = self.density[cell], self.density[cell + 1], torch.rand(size)
        ahead = level * (left + right) / (left + (left.square() + level * (right.square() - left.square())).sqrt())
        return self.low + self.step * (cell + ahead)

    def log_prob(self, value: Tensor) -> Tensor:
        place = (value - self.low) / self.step
        cell = place.detach().nan_to_num(0.0).clamp(0, self.cells - 1).long()
        density = self.density[cell] + (place - cell) * (self.density[cell + 1] - self.density[cell])
        inside = (place >= 0) & (place <= self.cells)
        return torch.where(inside, density.clamp_min(0), 0.0).log()


class Edged(Law):
    """Distribution of bounded support, extended to all numbers by a density of zero."""

    def __init__(self, base: Distribution) -> None:
        super().__init__(base.event_shape)
        self.base = base

    def draw(self, size: torch.Size) -> Tensor:
        return self.base.sample(size)

    def log_prob(self, value: Tensor) -> Tensor:
        inside = self.base.support.check(value)
        held = inside.unsqueeze(-1) if self.event_shape else inside
        return torch.where(inside, self.base.log_prob(torch.where(held, value, self.base.mean)), -torch.inf)


class ExpGamma(Law):
    """Independent numbers above 1 whose logarithms are gamma-distributed."""

    def __init__(self, shape: float, rate: float, dim: int) -> None:
        super().__init__((dim,))
        self._support = dist.constraints.independent(dist.constraints.positive, 1)
        self.logs = Edged(dist.Gamma(shape * torch.ones(dim), rate * torch.ones(dim)).to_event(1))

    def draw(self, size: torch.Size) -> Tensor:
        return self.logs.sample(size).exp()

    def log_prob(self, value: Tensor) -> Tensor:
        return self.logs.log_prob(value.log()) - value.log().sum(-1)


def box(low: float, high: float, dim: int) -> Law:
    """Return the uniform distribution on a cube, with hard edges."""
    return Edged(dist.Uniform(low * torch.ones(dim), high * torch.ones(dim), validate_args=False).to_event(1))


class Shell(Law):
    """Uniform direction and gamma radius: a ring in two dimensions, a shell in more."""

    def __init__(self, dim: int, radius: float, width: float) -> None:
        super().__init__((dim,))
        shape = (radius / width) ** 2
        self.radius = dist.Gamma(torch.tensor(shape), torch.tensor(shape / radius))
        self.log_area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)

    def draw(self, size: torch.Size) -> Tensor:
        way = torch.randn(*size, *self.event_shape)
        return self.radius.sample(size).unsqueeze(-1) * way / way.norm(dim=-1, keepdim=True)

    def log_prob(self, value: Tensor) -> Tensor:
        radius = value.norm(dim=-1)
        return self.radius.log_prob(radius) - self.log_area - (value.shape[-1] - 1) * radius.log()


class Triangle(Law):
    """Uniform distribution on the triangle between 0, (side, 0) and (0, side)."""

    def __init__(self, side: float) -> None:
        super().__init__((2,))
        self.side = side

    def draw(self, size: torch.Size) -> Tensor:
        return self.side * dist.Dirichlet(torch.ones(3)).sample(size)[..., :2]

    def log_prob(self, value: Tensor) -> Tensor:
        inside = (value >= 0).all(-1) & (value.sum(-1) <= self.side)
        return torch.where(inside, math.log(2 / self.side**2), -torch.inf) + 0 * value.sum(-1)


class Checkerboard(Law):
    """Uniform distribution on the black squares of an n × n board of unit squares around the origin, with n even."""

    def __init__(self, squares: int) -> None:
        super().__init__((2,))
        self.squares = squares

    def draw(self, size: torch.Size) -> Tensor:
        row = torch.randint(self.squares, size)
        column = 2 * torch.randint(self.squares // 2, size) + row % 2
        return torch.stack((row, column), -1) + torch.rand(*size, 2) - self.squares / 2

    def log_prob(self, value: Tensor) -> Tensor:
        place = (value + self.squares / 2).floor()
        black = ((place >= 0) & (place < self.squares)).all(-1) & (place.sum(-1) % 2 == 0)
        return torch.where(black, math.log(2 / self.squares**2), -torch.inf) + 0 * value.sum(-1)


class Correlations(Law):
    """LKJ distribution of the Cholesky factor of a 3 × 3 correlation matrix, sampled by partial correlations.

    In torch 2.13, the draws of ``LKJCholesky`` do not follow its density: their correlations vary too much.
    """

    def __init__(self, concentration: float) -> None:
        super().__init__((3, 3))
        self.density = dist.LKJCholesky(3, concentration)
        self._support = dist.constraints.corr_cholesky
        counts = concentration + torch.tensor([0.5, 0.5, 0.0])
        self.partial = dist.Beta(counts, counts).to_event(1)

    def draw(self, size: torch.Size) -> Tensor:
        first, second, third = (2 * self.partial.sample(size) - 1).unbind(-1)
        rest = (1 - second.square()).sqrt()
        zero, one = torch.zeros(size), torch.ones(size)
        rows = (one, zero, zero), (first, (1 - first.square()).sqrt(), zero)
        last = second, third * rest, (1 - third.square()).sqrt() * rest
        return torch.stack([torch.stack(row, -1) for row in (*rows, last)], -2)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.density.log_prob(value)
