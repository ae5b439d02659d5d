"""Guides of hierarchies: the priors that are read from the model, the potentials, and the answers they give."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows.guides.hierarchy import DEEPEST
from pyro_flows.training.stopping import FEWEST
from pyro_flows.transforms import NonCentred


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("row", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def slopes(group: Tensor, y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(1.0).expand([2]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    with pyro.plate("groups", 4):
        effect = pyro.sample("effect", dist.MultivariateNormal(mean, scale_tril=sd.unsqueeze(-1) * factor))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(effect[..., group, 0], 1.0), obs=y)


def chain(length: int) -> None:
    x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
    for number in range(length):
        x = pyro.sample(f"x_{number + 1}", dist.Normal(0.0, x.exp()))


def units_of(model, *args: Tensor) -> NonCentred | None:
    return pf.AutoFlow(model).setup(*args).flow.units


def test_a_funnel_is_independent_in_its_units():
    guide = pf.AutoFlow(funnel).setup()
    noise = torch.randn(1000, 10, dtype=torch.get_default_dtype()) * torch.tensor([3.0, *[1.0] * 9])
    z, log_det = guide.flow.units.forward_and_log_det(noise)
    values = guide.unpack(z)
    torch.testing.assert_close(values["x"], noise[:, 1:] * (noise[:, :1] / 2).exp())
    torch.testing.assert_close(log_det, 9 * noise[:, 0] / 2)


def test_correlated_slopes_are_in_units_of_their_priors():
    group, y = torch.arange(20) % 4, torch.randn(20)
    guide = pf.AutoFlow(slopes).setup(group, y)
    z = torch.randn(50, guide.latent_dim)
    values = guide.unpack(z)
    x, _ = guide.flow.units.inverse_and_log_det(z)
    effects = x[:, [place for place, name in enumerate(guide.coordinates) if name == "effect"]].reshape(50, 4, 2)
    factor = values["sd"].unsqueeze(-1) * values["factor"]
    shift = (values["effect"] - values["mean"].unsqueeze(1)).unsqueeze(-1)
    expected = torch.linalg.solve_triangular(factor.unsqueeze(1), shift, upper=False).squeeze(-1)
    torch.testing.assert_close(effects, expected, rtol=1e-3, atol=1e-4)


def test_effects_of_many_numbers_are_in_units_of_their_scales():
    def model() -> None:
        sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(6), scale_tril=sd * torch.eye(6)))

    units = units_of(model)
    assert [tuple(group.columns.shape) for group in units.groups] == [(1, 6)]
    y, _ = units.forward_and_log_det(torch.ones(7))
    torch.testing.assert_close(y, torch.full((7,), math.e).index_fill(0, torch.tensor(0), 1.0))


def test_a_long_walk_is_measured_by_its_steps():
    def model() -> None:
        sd, x = pyro.sample("sd", dist.LogNormal(0.0, 1.0)), torch.zeros(())
        for number in range(10):
            x = pyro.sample(f"x_{number}", dist.Normal(x, sd))

    units = units_of(model)
    assert units.levels == 1
    y, _ = units.forward_and_log_det(torch.ones(11))
    torch.testing.assert_close(y, torch.cat([torch.ones(1), math.e * torch.arange(1.0, 11.0)]))


def test_a_model_without_a_hierarchy_and_one_that_is_too_deep_have_no_units():
    assert units_of(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))) is None
    assert units_of(lambda: chain(DEEPEST)).levels == DEEPEST
    assert units_of(lambda: chain(DEEPEST + 1)) is None


@pytest.mark.parametrize("noise", [0.1, 10.0])
def test_potentials_are_the_likelihoods_of_effects(noise):
    truth = torch.linspace(-2, 2, 8)

    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("group", 8):
            x = pyro.sample("x", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(x, noise), obs=truth)

    guide = pf.AutoFlow(model)
    pf.fit_svi(model, guide, steps=1, progress=False)
    (group,) = guide.flow.units.groups
    precision = group.precision.detach().flatten()
    if noise < 1:
        torch.testing.assert_close(precision, torch.full((8,), noise**-2), rtol=0.2, atol=0.0)
        torch.testing.assert_close(group.field.detach().flatten() / precision, truth, rtol=0.1, atol=0.02)
    else:
        assert (precision < 0.05).all()


def test_a_funnel_is_fitted_exactly():
    pyro.set_rng_seed(0)
    guide = pf.AutoFlow(funnel)
    fit = pf.fit_svi(funnel, guide, progress=False)
    weights = pf.psis(funnel, guide)
    assert fit.steps <= 100
    assert weights.khat < 0.5
    assert weights.log_evidence == pytest.approx(0.0, abs=0.02)
    assert guide.sample(20_000)["v"].std().item() == pytest.approx(3.0, abs=0.1)  # 6 standard errors


def test_density_and_draws_agree_and_come_back_from_a_file(tmp_path):
    group, y = torch.arange(20) % 4, torch.randn(20)
    guide = pf.AutoFlow(slopes).setup(group, y)
    pf.fit_svi(slopes, guide, group, y, steps=3, progress=False)
    draws = guide.sample(10, group, y)
    pf.save(guide, tmp_path / "guide.pt")
    again = pf.load(tmp_path / "guide.pt")
    torch.testing.assert_close(again.log_prob(draws), guide.log_prob(draws, group, y))
    assert again.flow.units.levels == guide.flow.units.levels
    assert math.isfinite(again.log_prob(again.sample(10)).sum().item())


def test_a_start_that_is_given_replaces_the_units():
    guide = pf.AutoFlow(funnel).setup()
    guide.start_at(torch.ones(10), torch.full((10,), 0.5))
    z = guide.get_transform()(torch.zeros(10))
    torch.testing.assert_close(z, torch.ones(10))
    torch.testing.assert_close(guide.start[0], torch.ones(10))


def test_many_effects_start_at_their_posterior():
    pyro.set_rng_seed(0)
    y = 0.5 + 0.8 * torch.randn(150, 1) + 0.7 * torch.randn(150, 4)

    def model() -> None:
        mean, sd = pyro.sample("mean", dist.Normal(0.0, 3.0)), pyro.sample("sd", dist.HalfNormal(2.0))
        with pyro.plate("group", 150):
            x = pyro.sample("x", dist.Normal(mean, sd))
            pyro.sample("y", dist.Normal(x.unsqueeze(-1), 0.7).expand([150, 4]).to_event(1), obs=y)

    guide = pf.AutoFlow(model)
    fit = pf.fit_svi(model, guide, steps="for_weights", progress=False)
    assert fit.stopped == "weights"
    assert fit.steps == FEWEST
    assert pf.psis(model, guide, num_samples=4000).ess > 2000
