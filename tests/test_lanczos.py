"""The method of Lanczos, and coordinates that it stretches."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import called
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

import pyro_flows as pf
from pyro_flows.diagnostics.guide_space import guide_coordinates, guide_density
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.sampling.coordinates import Mapped, Stretched, White
from pyro_flows.sampling.gaussian import lanczos

DIM = 200


def symmetric(values: torch.Tensor) -> torch.Tensor:
    """Return a matrix with these eigenvalues and random eigenvectors."""
    vectors, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=values.dtype))
    return vectors * values @ vectors.T


def spread(*outside: float) -> torch.Tensor:
    """Return eigenvalues between 1 and 2, and some outside."""
    return torch.cat((torch.tensor(outside), torch.linspace(1, 2, DIM - len(outside)))).double()


def test_extreme_eigenvalues_are_found_in_few_products():
    matrix = symmetric(spread(-3.0, 0.01, 50.0))
    basis, values = lanczos(matrix.__matmul__, torch.randn(DIM).double(), 24)
    assert basis.shape == (DIM, 24)
    for value in (-3.0, 0.01, 50.0):
        near = (values - value).abs().argmin()
        assert abs(values[near] - value) < 1e-6
        assert torch.allclose(matrix @ basis[:, near], values[near] * basis[:, near], atol=1e-5)
    assert torch.allclose(basis.T @ basis, torch.eye(24).double(), atol=1e-12)
    assert torch.allclose(basis.T @ matrix @ basis, values.diag(), atol=1e-10)
    assert torch.equal(values, values.sort().values)


def test_a_linear_equation_is_solved_by_the_first_vector():
    matrix, right = symmetric(spread(0.05, 30.0)), torch.randn(DIM).double()
    basis, values = lanczos(matrix.__matmul__, right, 30)
    assert torch.allclose(basis @ (basis.T @ right / values), torch.linalg.solve(matrix, right), atol=1e-6)


@pytest.mark.parametrize("start", [torch.zeros(DIM), torch.full((DIM,), torch.inf), torch.ones(DIM)])
def test_other_directions_are_found_when_a_space_is_complete(start):
    """All vectors are eigenvectors of the identity."""
    basis, values = lanczos(lambda vector: vector, start, 24)
    assert 1 <= basis.shape[1] <= 24
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)
    assert torch.allclose(values, torch.ones(len(values)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e20])
def test_no_directions_of_a_product_that_is_not_finite(bad):
    assert lanczos(lambda vector: bad * vector, torch.ones(DIM), 5) is None


def test_few_dimensions_have_few_directions():
    basis, values = lanczos(torch.diag(torch.tensor([1.0, 2.0])).__matmul__, torch.ones(2), 24)
    assert basis.shape == (2, 2)
    assert torch.allclose(values, torch.tensor([1.0, 2.0]))


def test_stretched_coordinates_are_a_change_of_variables():
    directions, _ = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))
    chart = Stretched(White(3 * torch.randn(100, 6).double() + 1), directions, torch.tensor([0.1, 2.0, 30.0]).double())
    x = torch.randn(4, 6).double()
    z, log_det = chart.forward(x)
    assert torch.allclose(chart.inverse(z), x, atol=1e-10)
    for row, found in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda row: chart.forward(row[None])[0][0], row)
        assert torch.allclose(jacobian.slogdet().logabsdet, found)
    assert chart.whitened(z) is chart


def hierarchy() -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Gamma(2.0, mean.exp()))


GUIDES = AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal
GUIDES = *GUIDES, pf.AutoFlow, pf.AutoStructuredFlow


@pytest.mark.parametrize("is_stretched", [False, True])
@pytest.mark.parametrize("kind", GUIDES)
def test_the_density_of_a_guide_over_its_coordinates(kind, is_stretched):
    pyro.set_rng_seed(0)
    guide = called(kind(hierarchy))
    for param in guide.parameters():
        param.data += 0.1 * torch.rand_like(param)
    space = Density.sound(Task(hierarchy, guide, (), {}))
    chart, *_ = guide_coordinates(space, space.draw(500).z)[0]
    assert isinstance(chart, White if kind in GUIDES[:1] + GUIDES[3:4] else Mapped)  # which have no transform
    if is_stretched:
        directions, _ = torch.linalg.qr(torch.randn(6, 2))
        chart = Stretched(chart, directions, torch.tensor([0.5, 3.0]))
    z = space.draw(7).z
    x = chart.inverse(z)
    z, log_det = chart.forward(x)
    found = guide_density(space, chart)(x, z, log_det)
    assert found.shape == (7,)
    assert torch.allclose(found, space.log_q(z) + log_det, atol=1e-3)
