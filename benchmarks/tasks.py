"""Tasks of amortised inference, as Pyro models: ``amortized.py`` trains guides on them.

The first three come from Benchmarking Simulation-Based Inference (Lueckmann, Boelts, Greenberg, Goncalves, Macke 2021,
arXiv:2101.04653).  Their observations and reference draws are read from the folder that ``PYRO_FLOWS_DATA`` names.  The
others have answers in closed form, or on a grid.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_flows import encoders

OBSERVATIONS = 1, 2, 3, 4, 5


class TwoMoons(dist.TorchDistribution):
    """Half moon, open to the left, around a centre that depends on θ: points at a random angle and distance from it."""

    arg_constraints = {"theta": constraints.real_vector}
    support = constraints.real_vector
    radius = dist.Normal(0.1, 0.01)

    def __init__(self, theta: Tensor, validate_args: bool | None = None) -> None:
        self.theta = theta
        t1, t2 = theta.unbind(-1)
        self.place = torch.stack((0.25 - (t1 + t2).abs() / math.sqrt(2), (t2 - t1) / math.sqrt(2)), -1)
        super().__init__(theta.shape[:-1], theta.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TwoMoons:
        return TwoMoons(self.theta.expand(*batch_shape, 2))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size((*sample_shape, *self.batch_shape))
        angle, radius = math.pi * (torch.rand(shape) - 0.5), self.radius.sample(shape)
        return self.place + torch.stack((radius * angle.cos(), radius * angle.sin()), -1)

    def log_prob(self, value: Tensor) -> Tensor:
        arm = value - self.place
        radius = arm.norm(dim=-1)
        log_p = self.radius.log_prob(radius) - (math.pi * radius).log()  # the change to polar coordinates
        return torch.where(arm[..., 0] > 0, log_p, -math.inf)


def box(limit: float, dim: int) -> dist.TorchDistribution:
    """Return the uniform distribution on a box around zero."""
    return dist.Uniform(torch.full((dim,), -limit), limit).to_event(1)


def two_moons(x: Tensor | None = None) -> Tensor:
    """Sample a point of a half moon, whose posterior has two of them."""
    theta = pyro.sample("theta", box(1.0, 2))
    return pyro.sample("x", TwoMoons(theta), obs=x)


def gaussian_linear_uniform(x: Tensor | None = None) -> Tensor:
    """Sample a Gaussian vector with a uniform prior of its mean."""
    theta = pyro.sample("theta", box(1.0, 10))
    return pyro.sample("x", dist.Normal(theta, math.sqrt(0.1)).to_event(1), obs=x)


def slcp(x: Tensor | None = None) -> Tensor:
    """Sample four points of a Gaussian: a simple likelihood with a complex posterior."""
    theta = pyro.sample("theta", box(3.0, 5))
    s1, s2 = (theta[..., 2:4] ** 2).clamp(min=1e-6).unbind(-1)  # zero, the prior's median, has no density
    t5 = theta[..., 4]
    # The Cholesky factor of a correlation tanh(t5): 1 / cosh(t5) is the square root of 1 - tanh(t5)^2.
    rows = torch.stack((s1, torch.zeros_like(s1)), -1), torch.stack((s2 * t5.tanh(), s2 / t5.cosh()), -1)
    point = dist.MultivariateNormal(theta[..., None, :2], scale_tril=torch.stack(rows, -2)[..., None, :, :])
    return pyro.sample("x", point.expand((*theta.shape[:-1], 4)).to_event(1), obs=x)


@dataclass(frozen=True)
class Task:
    """Task of inference.

    Attributes:
        model: The model.
        limit: The limit of its prior's box.
        dim: The number of its latents.
        shape: The shape of its data.
        encoder: Builds the encoder of the data.
        points: The number of independent points in a dataset.
    """

    model: Callable[..., Tensor]
    limit: float
    dim: int
    shape: tuple[int, ...]
    encoder: Callable[[], torch.nn.Module]
    points: int = 1

    def with_likelihood(self, likelihood: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
        """Return the model of points ``(points, D)`` with another density of each."""

        def model(x: Tensor | None = None) -> Tensor:
            theta = pyro.sample("theta", box(self.limit, self.dim))
            with pyro.plate("point", self.points):
                return pyro.sample("x", likelihood(theta[..., None, :]), obs=x)

        return model


TASKS = {
    "two_moons": Task(two_moons, 1.0, 2, (2,), lambda: encoders.Standardize((2,))),
    "gaussian_linear_uniform": Task(gaussian_linear_uniform, 1.0, 10, (10,), lambda: encoders.Standardize((10,))),
    "slcp": Task(slcp, 3.0, 5, (4, 2), lambda: encoders.SetEncoder(2, context_dim=32), 4),
}


def folder() -> Path:
    """Return the folder of the reference draws, or exit with an error that names their source."""
    here = Path(__file__).resolve()
    path = Path(os.environ.get("PYRO_FLOWS_DATA", here.parents[2] / "shared" / "data")) / "sbi"
    if not path.is_dir():
        sys.exit(
            f"folder: {path} must be a folder, but it is missing. Set PYRO_FLOWS_DATA to a folder with sbi/TASK.npz, "
            "which holds observation_K and reference_K for K = 1, ..., 5. The originals are in sbibm "
            "(github.com/sbi-benchmark/sbibm)."
        )
    return path


def load(name: str, number: int) -> tuple[Tensor, np.ndarray]:
    """Return an observation of a task and reference draws of its posterior, ``(10,000, dim)``."""
    with np.load(folder() / f"{name}.npz") as file:
        x = torch.as_tensor(file[f"observation_{number}"], dtype=torch.float32).reshape(TASKS[name].shape)
        return x, np.asarray(file[f"reference_{number}"], dtype=np.float32)


def c2st(draws: np.ndarray, reference: np.ndarray) -> float:
    """Return the accuracy of a classifier of draws against the reference, both ``(N, D)``; 0.5 if they agree.

    Revisiting Classifier Two-Sample Tests (Lopez-Paz, Oquab 2016, arXiv:1610.06545), in the version of sbibm.
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    mean, sd = reference.mean(0), reference.std(0, ddof=1)
    width = 10 * reference.shape[1]
    points = np.concatenate(((reference - mean) / sd, (draws - mean) / sd))
    labels = np.repeat((0, 1), (len(reference), len(draws)))
    network = MLPClassifier((width, width), activation="relu", solver="adam", max_iter=1000, random_state=1)
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # a fold that did not converge warns
        return float(cross_val_score(network, points, labels, cv=KFold(5, shuffle=True, random_state=1)).mean())


def conjugate(x: Tensor | None = None) -> Tensor:
    """Sample a Gaussian in two dimensions, with a Gaussian posterior."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)


def groups(y: Tensor, subsample_size: int | None = 100) -> None:
    """Sample schools: each row of y, ``(groups, pupils)``, has a latent mean."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("group", len(y), subsample_size=subsample_size) as rows:
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta[..., None], 1.0).to_event(1), obs=y[rows])


def make_groups(number: int = 2000, pupils: int = 5) -> Tensor:
    """Return simulated data of ``groups``."""
    theta = 1.5 + 0.8 * torch.randn(number)
    return theta[:, None] + torch.randn(number, pupils)


def exact_groups(y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return posterior means and standard deviations of the latents of ``groups``.

    Those of mu and tau are computed on a grid, and the others are exact given mu and tau.
    """
    number, mean, noise = len(y), y.double().mean(1), 1 / y.shape[1]
    spread = (mean.var() - noise).sqrt()
    span = torch.linspace(-0.15, 0.15, 201, dtype=torch.float64)
    mu, tau = torch.meshgrid(mean.mean() + span, spread + span, indexing="ij")
    var = tau**2 + noise
    log_p = -number / 2 * var.log() - ((mean - mean.mean()).square().sum() + number * (mean.mean() - mu) ** 2) / var / 2
    p = (log_p - mu**2 / 50 - tau**2 / 8).flatten().softmax(0).reshape(mu.shape)

    def moments(value: Tensor) -> tuple[Tensor, Tensor]:
        first = (p * value).sum()
        return first, (p * (value - first) ** 2).sum().sqrt()

    share = tau**2 / var  # given mu and tau, theta ~ Normal(share mean + (1 - share) mu, sd sqrt(share noise))
    centres = [share * m + (1 - share) * mu for m in mean]
    first = torch.stack([(p * c).sum() for c in centres])
    second = torch.stack([(p * (c - m) ** 2).sum() for c, m in zip(centres, first, strict=True)])
    sd = (second + (p * share * noise).sum()).sqrt()
    return {"mu": moments(mu), "tau": moments(tau), "theta": (first, sd)}
