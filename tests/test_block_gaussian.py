"""The start of structured guides: exact for Gaussians of the structure, and near funnels that a Gaussian misses."""

import math

import pytest
import torch
from torch import Tensor

from pyro_flows.sampling.block_conditionals import Layout
from pyro_flows.sampling.block_gaussian import SEARCH, BlockGaussian, fit_blocks

TWO_PI = math.log(2 * math.pi)


def layouts() -> list[Layout]:
    """Return shared latents, rows, rows within these rows, and two sequences, of one and of two latents per step."""
    sizes, found, start = [(1, 1, 2), (5, 1, 2), (15, 1, 1), (1, 7, 2), (3, 9, 1)], [], 0
    for shape in sizes:
        found.append(torch.arange(start, start + math.prod(shape)).reshape(shape))
        start += math.prod(shape)
    shared, rows, inner, wide, three = found
    zeros = {name: torch.zeros(name, dtype=torch.long) for name in (1, 3, 5, 15)}
    return [
        Layout(shared, ()),
        Layout(rows, ((0, zeros[5]),)),
        Layout(inner, ((0, zeros[15]), (1, torch.arange(5).repeat_interleave(3)))),
        Layout(wide, ((0, zeros[1]),)),
        Layout(three, ((0, zeros[3]),)),
    ]


def pattern(parts: list[Layout]) -> Tensor:
    """Return True for pairs of latents that the structure couples."""
    size = sum(part.places.numel() for part in parts)
    coupled = torch.eye(size, dtype=torch.bool)
    for part in parts:
        for row, places in enumerate(part.places):
            for step in range(len(places)):
                for other in range(max(0, step - 1), step + 1):
                    coupled[places[step][:, None], places[other]] = True
            for parent, of_row in part.parents:
                coupled[places.flatten()[:, None], parts[parent].places[of_row[row]].flatten()] = True
    return coupled | coupled.T


def mean_of(found: BlockGaussian, parts: list[Layout]) -> Tensor:
    mean = torch.empty(sum(part.places.numel() for part in parts), dtype=torch.float64)
    for part, block in zip(parts, found.blocks, strict=True):
        mean[part.places] = block.loc
    return mean


@pytest.mark.parametrize("seed", range(3))
def test_a_gaussian_of_the_structure_is_found_exactly(seed: int) -> None:
    torch.manual_seed(seed)
    parts = layouts()
    size = len(pattern(parts))
    coupling = torch.randn(size, size, dtype=torch.float64) * 0.3
    precision = 3 * torch.eye(size, dtype=torch.float64) + (coupling + coupling.T) * pattern(parts)
    precision += torch.eye(size) * (0.5 - torch.linalg.eigvalsh(precision)[0]).clamp_min(0)
    mean = 5 * torch.randn(size, dtype=torch.float64)

    def density(z: Tensor) -> Tensor:
        return -((z - mean) @ precision * (z - mean)).sum(-1) / 2

    found = fit_blocks(density, parts, torch.zeros(size, dtype=torch.float64), 0.1)
    assert found is not None
    torch.testing.assert_close(mean_of(found, parts), mean, atol=1e-8, rtol=1e-8)
    log_evidence = size / 2 * TWO_PI - torch.logdet(precision) / 2
    assert abs(found.elbo - float(log_evidence)) < 1e-8


def funnel(number: int, noise: float) -> tuple[list[Layout], Tensor]:
    torch.manual_seed(0)
    zeros = torch.zeros(number, dtype=torch.long)
    parts = [
        Layout(torch.zeros(1, 1, 1, dtype=torch.long), ()),
        Layout(1 + torch.arange(number).reshape(-1, 1, 1), ((0, zeros),)),
    ]
    return parts, 0.5 * torch.randn(number, dtype=torch.float64) + noise * torch.randn(number, dtype=torch.float64)


def test_scales_of_rows_follow_a_shared_scale() -> None:
    """Rows x ~ N(0, exp(g)) with data y ~ N(x, 0.5): the marginal of g is known, and no Gaussian reaches it."""
    parts, y = funnel(50, noise=0.5)

    def density(z: Tensor) -> Tensor:
        g, x = z[:, :1], z[:, 1:]
        prior = -(x / g.exp()).square().sum(-1) / 2 - len(y) * g[:, 0] - g[:, 0].square() / 2
        return prior - ((x - y) / 0.5).square().sum(-1) / 2

    found = fit_blocks(density, parts, torch.zeros(1 + len(y), dtype=torch.float64), 0.1)
    assert found is not None
    g = torch.linspace(-4, 2, 2001, dtype=torch.float64)
    variance = (2 * g).exp()[:, None] + 0.25
    marginal = torch.softmax(-(variance.log() + y**2 / variance).sum(-1) / 2 - g**2 / 2, 0)
    mean = float((marginal * g).sum())
    deviation = float((marginal * (g - mean) ** 2).sum().sqrt())
    assert abs(float(found.blocks[0].loc) - mean) < 0.25 * deviation
    assert 0.8 < float(found.blocks[0].scale) / deviation < 1.2


def test_correlations_in_rows_follow_a_shared_one() -> None:
    """Rows x of two numbers have the correlation tanh(g), and data y ~ N(x, I): the marginal of g is known."""
    number, zeros = 1000, torch.zeros(1000, dtype=torch.long)
    parts = [
        Layout(torch.zeros(1, 1, 1, dtype=torch.long), ()),
        Layout(1 + torch.arange(2 * number).reshape(number, 1, 2), ((0, zeros),)),
    ]
    torch.manual_seed(0)
    x = torch.randn(number, 2, dtype=torch.float64) @ torch.tensor([[1.0, 0.6], [0.0, 0.8]], dtype=torch.float64)
    y = x + torch.randn_like(x)

    def log_normal(of: Tensor, g: Tensor, more: float) -> Tensor:
        rho, one = g.tanh(), 1 + more
        square = of.square().sum(-1) * one - 2 * rho * of.prod(-1)
        return (-square / (one**2 - rho**2) - (one**2 - rho**2).log()).sum(-1) / 2

    def density(z: Tensor) -> Tensor:
        g, rows = z[:, :1], z[:, 1:].reshape(len(z), number, 2)
        return log_normal(rows, g, 0.0) - (rows - y).square().sum((-1, -2)) / 2 - g[:, 0].square() / 2

    found = fit_blocks(density, parts, torch.zeros(1 + 2 * number, dtype=torch.float64), 0.1)
    assert found is not None
    g = torch.linspace(-2, 3, 2001, dtype=torch.float64)
    marginal = torch.softmax(log_normal(y, g[:, None], 1.0) - g**2 / 2, 0)
    mean = float((marginal * g).sum())
    deviation = float((marginal * (g - mean) ** 2).sum().sqrt())
    assert abs(float(found.blocks[0].loc) - mean) < 0.3 * deviation
    assert 0.8 < float(found.blocks[0].scale) / deviation < 1.2, "0.5 with correlations that stay the same"


def test_no_start_is_better_than_a_worse_one() -> None:
    """A density that breaks down around the start has no start; nor has a block of too many latents."""
    parts, _ = funnel(4, noise=1.0)
    start = torch.zeros(5, dtype=torch.float64)
    assert fit_blocks(lambda z: z.sum(-1) * math.nan, parts, start, 0.1) is None
    many = torch.arange(math.isqrt(SEARCH.numbers) + 1)
    assert fit_blocks(lambda z: -z.square().sum(-1), [Layout(many.reshape(1, 1, -1), ())], 0.0 * many, 0.1) is None
