"""Weights of single rows find a wrong row among thousands, and find none where there is none."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import called
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import Tensor

from pyro_flows import check
from pyro_flows.diagnostics.row_weights import RowWeights, row_weights
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task

N = 1200
Y = torch.randn(N, generator=torch.Generator().manual_seed(0)) * 2
PRECISION = 1 + 1e4 + N / 4  # of the mean, given all data
MEAN = float(0.5 * 1e4 + Y.sum() / 4) / PRECISION


def pairs() -> None:
    """Sample two latents in each row of two plates, one of them a pair: the sum of three standard normals has data."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("of_mean", dist.Normal(mean, 0.01), obs=torch.tensor(0.5))
    with pyro.plate("outer", N // 4, dim=-2), pyro.plate("inner", 4, dim=-1):
        level = pyro.sample("level", dist.Normal(mean, 1.0))
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(level + slopes.sum(-1), 1.0), obs=Y.reshape(-1, 4))


def guide_of(shift: Callable[[Tensor], Tensor], scale: float = 1.0) -> Callable[[], None]:
    """Return the posterior of ``pairs``, where a function has moved the means of levels."""

    def guide() -> None:
        mean = pyro.sample("mean", dist.Normal(MEAN, PRECISION**-0.5))
        with pyro.plate("outer", N // 4, dim=-2), pyro.plate("inner", 4, dim=-1):
            away = Y.reshape(-1, 4) - mean
            covariance = scale**2 * (torch.eye(3) - 0.25)
            means = away[..., None] / 4 + shift(away)[..., None] * torch.eye(3)[0]
            whole = dist.MultivariateNormal(means, covariance)
            three = pyro.sample("three", whole, infer={"is_auxiliary": True})
            pyro.sample("level", dist.Delta(mean + three[..., 0]))
            pyro.sample("slopes", dist.Delta(three[..., 1:], event_dim=1))

    return guide


def one_row(size: float) -> Callable[[Tensor], Tensor]:
    def shift(like: Tensor) -> Tensor:
        moved = torch.zeros(like.shape[-2:])
        moved[70, 3] = size * 0.75**0.5
        return moved.expand(like.shape)

    return shift


def judged(model: Any, guide: Any) -> tuple[RowWeights, ...]:
    with pyro.validation_enabled(False):
        return row_weights(Density.sound(Task(model, guide, (), {})))


@pytest.mark.parametrize("seed", range(5))
def test_the_posterior_has_no_wrong_row(seed: int) -> None:
    pyro.set_rng_seed(seed)
    (found,) = judged(pairs, guide_of(one_row(0.0)))
    assert (found.plates, found.number) == ("outer,inner", N)
    assert not found.is_off(0.1)
    assert found.khat < 0.5


@pytest.mark.parametrize("size", [-0.5, 0.5])
def test_one_wrong_row_is_found_and_named(size: float) -> None:
    (found,) = judged(pairs, guide_of(one_row(size)))
    assert found.name == "level[70, 3]"
    assert found.is_off(0.1)
    assert abs(found.error + size) < 6 * found.noise


def test_rows_that_are_too_narrow_have_a_large_khat() -> None:
    (found,) = judged(pairs, guide_of(one_row(0.0), scale=0.6))
    assert found.khat > 0.7


@pytest.mark.slow
def test_a_check_tells_it() -> None:
    sizes = {"num_samples": 500, "num_chains": 16}
    assert check(pairs, guide_of(one_row(0.0)), **sizes).trusted
    found = check(pairs, guide_of(one_row(1.0)), **sizes)
    assert not found.trusted
    assert any(finding.quantity == "level[70, 3]" for finding in found.findings)


def of(kind: Any, model: Any, scale: float) -> Any:
    """Return a guide of Pyro at its start, with this standard deviation."""
    return called(kind(model, init_scale=scale))


def test_guides_of_all_rows_together_and_crossed_rows_have_no_weights() -> None:
    assert judged(pairs, of(AutoDiagonalNormal, pairs, 0.1)) == ()

    def crossed() -> None:
        users, items = pyro.plate("users", 100, dim=-2), pyro.plate("items", 120, dim=-1)
        with users:
            kind = pyro.sample("kind", dist.Normal(0.0, 1.0))
        with items:
            good = pyro.sample("good", dist.Normal(0.0, 1.0))
        with users, items:
            pyro.sample("y", dist.Normal(kind + good, 1.0), obs=torch.zeros(100, 120))

    assert judged(crossed, of(AutoNormal, crossed, 0.1)) == ()


def test_data_outside_of_the_rows_are_no_fault() -> None:
    """Coefficients of a regression share all data; walks couple rows; pairs of rows share the latents of a group."""

    def regression() -> None:
        with pyro.plate("features", 150):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal((w * Y[:150]).sum(-1, keepdim=True), 1.0), obs=torch.ones(5))

    def walk() -> None:
        with pyro.plate("features", 150):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.factor("steps", -((w - w.roll(1, -1)) ** 2))

    def grouped() -> None:
        with pyro.plate("groups", 200, dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("members", 2, dim=-1):
                own = pyro.sample("own", dist.Normal(level, 1.0))
                pyro.sample("y", dist.Normal(own, 1.0), obs=Y[:400].reshape(200, 2))

    assert judged(regression, of(AutoNormal, regression, 0.5)) == judged(walk, of(AutoNormal, walk, 0.5)) == ()
    assert [found.plates for found in judged(grouped, of(AutoNormal, grouped, 0.7))] == ["groups"]
