"""A normal model of two levels: groups of 1 to 50 rows, whose posterior is known up to an integral on a grid.

The benchmark trains one guide for datasets of 5 to 100 groups.  It also replaces the density of a row by a learned one.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows.encoders import SetEncoder

ROWS, NOISE = 50, 2.0
SIZES = torch.ones(ROWS + 1).index_fill(0, torch.tensor([0]), 0.0)  # from 1 to 50 rows, equally likely
Moments = tuple[Tensor, Tensor]


def present(size: Tensor) -> Tensor:
    """Return True for the rows of each group that are there, ``(*batch, ROWS)``."""
    return torch.arange(ROWS) < size[..., None]


def two_levels(y: Tensor | None = None, size: Tensor | None = None, groups: int = 100) -> None:
    """Sample groups with means of their own, and some rows of each."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("group", groups):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        size = pyro.sample("size", dist.Categorical(SIZES), obs=size)
        pyro.sample("y", dist.Normal(theta[..., None], NOISE).mask(present(size)).to_event(1), obs=y)


def with_likelihood(likelihood: Callable[[Tensor], Any]) -> Callable[..., None]:
    """Return the model with another density of a row, for given data."""

    def model(y: Tensor, size: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("group", len(y), dim=-2):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            with pyro.plate("row", ROWS, dim=-1):
                pyro.sample("y", likelihood(theta[..., None]).mask(present(size)), obs=y[..., None])

    return model


def one_row(theta: Tensor) -> Tensor:
    """Simulate one row for each mean of a group, ``(N, 1)``."""
    return theta + NOISE * torch.randn(theta.shape)


class OfRows(SetEncoder):
    """Context of each group, from those of its rows that are there."""

    def __init__(self) -> None:
        super().__init__(1, context_dim=16, hidden_dims=(24, 24), num_queries=1, num_moments=1)

    def forward(self, y: Tensor, size: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return super().forward(y[..., None], present(size))


def guide() -> pf.AutoPlateFlow:
    """Build the amortised guide."""
    return pf.AutoPlateFlow(two_levels, "group", encoder=OfRows(), global_encoder=SetEncoder(16, context_dim=32))


def resampled(fitted: pf.AutoPlateFlow, y: Tensor, size: Tensor, groups: int) -> tuple[dict[str, Tensor], float]:
    """Return draws of a guide, resampled by the model's density, and the k-hat of as many other draws."""
    khat = pf.psis(two_levels, fitted, y, size, groups=groups, num_samples=20_000).khat
    return pf.resample(two_levels, fitted, y, size, groups=groups, num_samples=4000, num_weighed=20_000), khat


def exact(y: Tensor, size: Tensor, deviation: float = NOISE) -> dict[str, Moments]:
    """Return posterior means and standard deviations; tau lies on a grid, the rest is normal given tau.

    Args:
        y: The rows of each group, ``(groups, ROWS)``.
        size: The number of rows that are there, ``(groups,)``.
        deviation: The standard deviation of a row.
    """
    y, number = y.double(), size.double()
    average, noise = (y * present(size)).sum(-1) / number, deviation**2 / number
    tau = torch.linspace(1e-3, 12.0, 3000, dtype=torch.float64)[:, None]
    precision = 1 / (tau**2 + noise)  # (grid, groups)
    total = precision.sum(-1) + 1 / 4
    centre = (precision * average).sum(-1) / total
    log_p = (precision.log() - precision * average**2).sum(-1) + centre**2 * total - total.log() - tau[:, 0] ** 2 / 4
    weight = (log_p / 2).softmax(0)

    def moments(mean: Tensor, variance: Tensor) -> Moments:
        w = weight if mean.dim() == 1 else weight[:, None]
        first = (w * mean).sum(0)
        return first, ((w * (mean**2 + variance)).sum(0) - first**2).sqrt()

    share = tau**2 * precision
    mean = share * average + (1 - share) * centre[:, None]
    variance = share * noise + (1 - share) ** 2 / total[:, None]
    zero = torch.zeros_like(centre)
    return {"mu": moments(centre, 1 / total), "tau": moments(tau[:, 0], zero), "theta": moments(mean, variance)}


def by_least_squares(theta: Tensor, x: Tensor) -> Callable[[Tensor, Tensor], dict[str, Moments]]:
    """Estimate a normal density of a row with a linear mean from rows ``(N, 1)``, and return its exact posterior."""
    inputs = torch.cat((torch.ones_like(theta), theta), 1)
    intercept, slope = torch.linalg.lstsq(inputs, x).solution[:, 0].tolist()
    deviation = float((x[:, 0] - intercept - slope * theta[:, 0]).std())
    return lambda y, size: exact((y - intercept) / slope, size, deviation / slope)


def errors(draws: dict[str, Tensor], y: Tensor, size: Tensor) -> dict[str, Moments]:
    """Return errors of means, in standard deviations, and ratios of standard deviations, for each site."""
    found = {}
    for site, (mean, sd) in exact(y, size).items():
        values = draws[site].double().reshape(len(draws[site]), *mean.shape)
        found[site] = (values.mean(0) - mean) / sd, values.std(0) / sd
    return found
