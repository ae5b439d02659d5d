"""The Gaussian of low rank plus diagonal: exact where the posterior is one, near the best Gaussian elsewhere."""

import math
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows.fitting.guide_start import start_from_gaussian
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.sampling.gaussian import fit_gaussian, fit_low_rank

DIM = 300


def stretched_normal(dtype: torch.dtype, strong: int):
    """Return a Gaussian of many scales, with ``strong`` directions of deviations from 1/30 to 30, and its moments."""
    scale, loc = torch.logspace(-1, 1, DIM, dtype=dtype), 5 * torch.randn(DIM, dtype=dtype)
    directions = torch.linalg.qr(torch.randn(DIM, strong, dtype=torch.float64))[0].to(dtype)
    precision = torch.logspace(-3, 3, strong, dtype=dtype)

    def density(z: Tensor) -> Tensor:
        x = (z - loc) / scale
        squares = x.square().sum(-1) + ((x @ directions).square() * (precision - 1)).sum(-1)
        return (precision.log().sum() - squares - DIM * math.log(2 * math.pi)) / 2 - scale.log().sum()

    factor = scale[:, None] * (torch.eye(DIM, dtype=dtype) + directions * (precision.rsqrt() - 1) @ directions.T)
    return density, loc, factor @ factor.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gaussian_of_low_rank_is_found(dtype):
    density, loc, covariance = stretched_normal(dtype, 6)
    found = fit_low_rank(density, torch.zeros(DIM, dtype=dtype), 0.1, 40)
    assert found.loc.dtype == dtype
    assert -2.0 < found.elbo < 0.5  # nats below the evidence
    deviation = covariance.diagonal().sqrt()
    assert ((found.loc - loc) / deviation).abs().max() < 0.05
    mine = found.scale * (1 + found.directions.square() @ (found.stretch.square() - 1)).sqrt()
    assert (mine / deviation - 1).abs().max() < 0.1


def regression(dim: int, rows: int):
    """Return the posterior of a logistic regression with more coefficients than rows."""
    x = torch.randn(rows, dim, dtype=torch.float64)
    y = torch.bernoulli(torch.sigmoid(x[:, :5].sum(-1)))

    def density(z: Tensor) -> Tensor:
        logits = z @ x.T
        prior = -z.square().sum(-1) / 2 - dim / 2 * math.log(2 * math.pi)
        return prior + (y * logits - torch.nn.functional.softplus(logits)).sum(-1)

    return density


@pytest.mark.slow
def test_more_coefficients_than_rows():
    density = regression(120, 20)
    start = torch.zeros(120, dtype=torch.float64)
    best = fit_gaussian(density, start, 0.1)
    found, diagonal = (fit_low_rank(density, start, 0.1, rank) for rank in (40, 1))
    assert found.elbo > best.elbo - 2
    assert found.elbo > diagonal.elbo + 3


def test_a_start_without_density_is_shrunk():
    def density(z: Tensor) -> Tensor:
        inside = (z.abs() < 1).all(-1)
        return torch.where(inside, -z.square().sum(-1) / 2 * 1e4, -torch.inf)

    found = fit_low_rank(density, torch.full((50,), 0.01), 3.0, 10)
    assert (found.scale * 100 - 1).abs().max() < 0.2


def test_ctrl_c_ends_the_search_after_a_round():
    watch = mock.Mock(return_value=True)
    density, *_ = stretched_normal(torch.float64, 4)
    assert fit_low_rank(density, torch.zeros(DIM, dtype=torch.float64), 0.1, 10, watch=watch) is not None
    watch.assert_called_once()


def test_a_start_that_cannot_be_improved_is_kept():
    assert fit_low_rank(lambda z: z.sum(-1) * 0 + math.nan, torch.zeros(5), 0.1, 2) is None


HOSTILE = {
    "linear": lambda z: z.sum(-1),
    "flat": lambda z: 0 * z.sum(-1),
    "laplace": lambda z: -z.abs().sum(-1),
    "exploding": lambda z: z.square().sum(-1).exp(),
    "steep": lambda z: -1e20 * z.square().square().sum(-1),
    "exponential": lambda z: (5 * z).exp().sum(-1),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", [0.0, 9.0, 1e3])
def test_hostile_densities_end_the_search_without_an_error(name, place):
    found = fit_low_rank(HOSTILE[name], torch.full((20,), place), 0.1, 10)
    assert found is None or all(bool(part.isfinite().all()) for part in found[:4])


def test_the_search_ends_with_its_budget():
    gradients = []

    def counted(z: Tensor) -> Tensor:
        gradients.append(len(z) if z.requires_grad else 0)
        return density(z)

    density, *_ = stretched_normal(torch.float64, 12)
    fit_low_rank(counted, torch.zeros(DIM, dtype=torch.float64), 0.1, 40, budget=2000)
    assert 2000 < sum(gradients) < 4000


def test_a_diagonal_start_leaves_angles_alone_and_directions_need_a_place():
    def angle():
        pyro.sample("angle", dist.VonMises(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = pf.AutoFlow(angle).setup()
    guide.start_at(torch.tensor([0.0, 5.0, -5.0]), torch.tensor([1.0, 2.0, 3.0]))
    drawn = guide.sample(4000)["x"]
    torch.testing.assert_close(drawn.mean(0), torch.tensor([5.0, -5.0]), atol=0.2, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), torch.diag(torch.tensor([4.0, 9.0])), atol=0.8, rtol=0)
    with pytest.raises(ValueError, match=r"AutoFlow.start_at: stretch must have at most 0 numbers .*, got 1"):
        guide.start_at(torch.zeros(3), torch.ones(3), torch.eye(3)[:, :1], torch.ones(1))


SIZE = 4100


def mean_of_many():
    x = pyro.sample("x", dist.Normal(torch.arange(float(SIZE)) % 7, 0.5).to_event(1))
    pyro.sample("y", dist.Normal(x.mean(-1), 0.001), obs=torch.tensor(3.1))


@pytest.mark.slow
def test_a_guide_beyond_4096_latents_starts_from_it(tmp_path):
    guide = pf.AutoFlow(mean_of_many).setup()
    assert start_from_gaussian(guide, Task(mean_of_many, guide, (), {})).is_near
    found = pf.psis(mean_of_many, guide, num_samples=200)
    assert found.log_weights.std() < 0.1  # 30 and more without the direction of the mean
    mean = dist.Normal((torch.arange(SIZE) % 7).double().mean(), math.hypot(0.001, 0.5 / SIZE**0.5))
    assert abs(found.log_evidence - mean.log_prob(torch.tensor(3.1))) < 0.03
    pf.save(guide, tmp_path / "guide.pt")
    again, values = pf.load(tmp_path / "guide.pt"), guide.sample(3)
    assert torch.equal(again.log_prob(values), guide.log_prob(values))
