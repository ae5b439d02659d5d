"""Statistics that compare datasets with their own posterior predictive replicates.

Each maps N datasets and S replicates of each to N numbers, in the same way for all, so that the numbers of datasets
from one distribution are exchangeable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..programs.quantities import labels_of

SHRUNK = 0.1  # the weight of the identity in a correlation matrix
WIDEST = 1000  # entries of a dataset beyond which their correlations are left out
POINTS, OTHERS = 100, 300  # entries of a dataset and of its replicates in an energy distance, at most
FEWEST = 4  # entries of a dataset that have a distribution
TINY = 1e-6  # of the standard deviation of all datasets: smaller ones are round-off


class Statistic(NamedTuple):
    """A statistic of N datasets.

    Attributes:
        name: Its name.
        value: Its values, ``(N,)``.
        high: The fault that a large value shows, in words.
        low: The fault that a small value shows, or "" if small values show none.
    """

    name: str
    value: Tensor
    high: str
    low: str = ""


class Predictive(NamedTuple):
    """N datasets, the last of them observed, with their replicates.

    Attributes:
        data: The datasets, by the model's arguments, each ``(N, *shape)``.
        replicates: S replicates of each, ``(S, N, *shape)``.
        contexts: The encoder's contexts of the datasets, ``(N, context_dim)``.
    """

    data: dict[str, Tensor]
    replicates: dict[str, Tensor]
    contexts: Tensor

    @property
    def names(self) -> list[str]:
        """The names of the P entries of a dataset."""
        return [label for name, x in self.data.items() for label in labels_of(name, x.shape[1:])]

    def residuals(self) -> tuple[Tensor, Tensor]:
        """Return datasets ``(N, P)`` and replicates ``(S, N, P)`` minus the replicates' means, over their sds."""
        x = torch.cat([value.reshape(len(value), -1).float() for value in self.data.values()], -1)
        y = torch.cat([y.reshape(*y.shape[:2], -1).float() for y in self.replicates.values()], -1)
        y = y.nan_to_num(0.0, 0.0, 0.0)  # any number does: the p-value is exact for every statistic
        loc, scale = y.mean(0), y.std(0)
        scale = scale.clamp(min=1e-30).maximum(TINY * x.std(0))
        return (x - loc) / scale, (y - loc) / scale

    def statistics(self) -> list[Statistic]:
        """Return all statistics."""
        x, y = self.residuals()
        found = [_distance(x, y), _largest(x, self.names), _run(x, self.names), _remote(self.contexts)]
        for name, data in self.data.items():
            points, others = _points(data, self.replicates[name])
            if points.shape[1] >= FEWEST:
                found += [_spread(name, points, others), _energy(name, points, others)]
        return found


def _distance(x: Tensor, y: Tensor) -> Statistic:
    """Return the logarithm of the Mahalanobis distance of the residuals."""
    if x.shape[1] <= WIDEST:
        rows = y.flatten(0, 1)
        corr = (1 - SHRUNK) * rows.T @ rows / len(rows) + SHRUNK * torch.eye(x.shape[1]).to(x)
        x = torch.linalg.solve_triangular(torch.linalg.cholesky(corr), x.T, upper=False).T
    words = "the data scatter {} around their replicates than simulated datasets do"
    value = x.square().mean(1).clamp(min=1e-30).log() / 2
    return Statistic("distance from replicates", value, words.format("more"), words.format("less"))


def _largest(x: Tensor, names: list[str]) -> Statistic:
    entry = names[int(x[-1].abs().argmax())]
    return Statistic("largest residual", x.abs().amax(1).log1p(), f"{entry} lies far from its replicates")


def _run(x: Tensor, names: list[str]) -> Statistic:
    """Return the largest sum of neighbouring residuals over the square root of their number."""
    size = x.shape[1]
    total = torch.cat((torch.zeros_like(x[:, :1]), x.cumsum(1)), 1)
    lengths = [length for length in (2**k for k in range(1, size.bit_length())) if length < size] + [size]
    sums = [(total[:, length:] - total[:, :-length]) / length**0.5 for length in lengths]
    best = max(range(len(sums)), key=lambda k: float(sums[k][-1].abs().max()))
    first = int(sums[best][-1].abs().argmax())
    side = "higher" if sums[best][-1, first] > 0 else "lower"
    span = f"{names[first]} to {names[first + lengths[best] - 1]}" if size > 1 else names[0]
    value = torch.cat(sums, 1).abs().amax(1).log1p()
    return Statistic("largest sum of residuals", value, f"the data at {span} lie {side} than their replicates")


def _remote(contexts: Tensor) -> Statistic:
    """Return the logarithm of the Mahalanobis distance of contexts from their mean."""
    c = (contexts - contexts.mean(0)) / contexts.std(0).clamp(min=1e-9)
    cov = (1 - SHRUNK) * c.T @ c / len(c) + SHRUNK * torch.eye(c.shape[1]).to(c)
    value = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), c.T, upper=False).square().mean(0)
    return Statistic("distance from simulations", value.log1p(), "the prior and the simulator make no such data")


def _points(data: Tensor, replicates: Tensor) -> tuple[Tensor, Tensor]:
    """Return a dataset's entries along its first dimension, ``(N, n, d)``, and a share of all replicates' entries."""
    x = data.float().reshape(len(data), data.shape[1] if data.dim() > 1 else 1, -1)
    y = replicates.float().nan_to_num(0.0, 0.0, 0.0).reshape(len(replicates), *x.shape).transpose(0, 1).flatten(1, 2)
    kept = torch.linspace(0, x.shape[1] - 1, min(POINTS, x.shape[1])).long()
    return x[:, kept], y[:, torch.randperm(y.shape[1])[:OTHERS]]


def _spread(name: str, points: Tensor, others: Tensor) -> Statistic:
    """Return the logarithm of the ratio of the entries' standard deviation to that of replicates."""
    own, other = (part.std(1).square().mean(-1).clamp(min=1e-30).log() / 2 for part in (points, others))
    words = f"the entries of {name} vary {{}} than those of its replicates"
    return Statistic(f"spread of {name}", own - other, words.format("more"), words.format("less"))


def _energy(name: str, points: Tensor, others: Tensor) -> Statistic:
    """Return the energy distance of the entries from those of replicates."""
    # Features that are constant in replicates, such as the first steps of a mask, must not divide by zero.
    least = TINY * torch.cat((points, others), 1).flatten(0, 1).std(0)
    scale = others.std(1, keepdim=True).maximum(least)
    scale = torch.where(scale > 0, scale, 1.0)
    x, y = points / scale, others / scale
    one, two = y.tensor_split(2, 1)
    value = 2 * torch.cdist(x, y).mean((1, 2)) - torch.cdist(x, x).mean((1, 2)) - torch.cdist(one, two).mean((1, 2))
    words = f"the entries of {name} have another distribution than those of its replicates"
    return Statistic(f"energy distance of {name}", value, words)
