"""Models under ``poutine.reparam``: the sites that the user wrote are returned, as by Pyro's ``Predictive``."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import sampling
from pyro import poutine
from pyro.infer.autoguide import init_to_median
from pyro.infer.reparam import LocScaleReparam, ProjectedNormalReparam, TransformReparam
from test_arviz import groups_of

from pyro_flows import AutoFlow, AutoPlateFlow, AutoStructuredFlow, check, load, resample, save, to_arviz
from pyro_flows.programs.simulator import Simulator

Y = torch.tensor([1.0, 2.0, 0.0, -1.0])


def hierarchy(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("group", len(y)):
        x = pyro.sample("x", dist.Normal(mean, scale))
        pyro.deterministic("twice", 2 * x)
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


non_centred = poutine.reparam(hierarchy, {"x": LocScaleReparam(0.0)})


@pytest.mark.parametrize("kind", [AutoFlow, AutoStructuredFlow, lambda model: AutoPlateFlow(model, "group")])
def test_a_guide_returns_the_sites_that_the_user_wrote(kind):
    guide = kind(non_centred).setup(Y)
    draws = guide.sample(50, Y)
    assert list(draws) == ["mean", "scale", "x_decentered", "x"]  # those of pyro.deterministic are not among them
    expected = draws["mean"].unsqueeze(-1) + draws["scale"].unsqueeze(-1) * draws["x_decentered"]
    torch.testing.assert_close(draws["x"], expected)
    assert guide.log_prob(draws, Y).shape == (50,)
    guide.num_summary_draws = 100
    assert guide.median(Y)["x"].shape == (4,)
    assert guide.quantiles([0.1, 0.9], Y)["x"].shape == (2, 4)


@pytest.mark.filterwarnings("ignore:to_arviz. the AutoFlow was never trained", "ignore:resample. k-hat")
def test_the_sites_that_the_user_wrote_are_no_data():
    guide = AutoFlow(non_centred).setup(Y)
    data = to_arviz(non_centred, guide, Y, num_samples=30, posterior_predictive=True)
    assert groups_of(data) >= {"posterior", "posterior_predictive", "log_likelihood", "observed_data"}
    assert set(data["posterior"].data_vars) == {"mean", "scale", "x_decentered", "x", "twice"}
    for group in ("posterior_predictive", "log_likelihood", "observed_data"):
        assert set(data[group].data_vars) == {"y"}
    assert data["posterior"]["x"].dims == ("chain", "draw", "group")
    torch.testing.assert_close(2 * data["posterior"]["x"].values, data["posterior"]["twice"].values)
    assert resample(non_centred, guide, Y, num_samples=5)["x"].shape == (5, 4)


def test_a_check_judges_the_sites_that_the_user_wrote():
    model = poutine.reparam(sampling(x=dist.Normal(3.0, 2.0)), {"x": LocScaleReparam(0.0)})
    guide = sampling(x_decentered=dist.Normal(0.0, 1.0))
    assert check(model, guide, num_samples=200, num_chains=16).names == ["x_decentered", "x"]


REPARAMS = {
    "transform": (TransformReparam(), dist.LogNormal(torch.tensor(0.0), 1.0)),
    "projected": (ProjectedNormalReparam(), dist.ProjectedNormal(torch.ones(2))),
}


@pytest.mark.parametrize("name", REPARAMS)
def test_other_reparametrisations(name):
    reparam, law = REPARAMS[name]
    guide = AutoFlow(poutine.reparam(sampling(x=law), {"x": reparam}), init_loc_fn=init_to_median)
    draws = guide.setup().sample(20)
    assert law.support.check(draws["x"]).all()
    assert draws["x"].unique(dim=0).shape == (20, *law.event_shape)


def test_a_site_may_depend_on_a_discrete_latent():
    """The discrete latent is drawn given the others: x - noise is 0 or 3, in the posterior's shares."""

    def model():
        kind = pyro.sample("kind", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(3 * kind, 1.0))

    guide = AutoFlow(poutine.reparam(model, {"x": LocScaleReparam(0.0)})).setup()
    draws = guide.sample(2000)
    kind = (draws["x"] - draws["x_decentered"]) / 3
    assert ((kind - kind.round()).abs() < 1e-5).all()
    assert abs(float(kind.mean()) - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5


def test_without_model_or_arguments_the_latents_alone_are_returned(tmp_path):
    guide = AutoFlow(non_centred).setup(Y)
    assert list(guide.sample(2)) == ["mean", "scale", "x_decentered"]
    save(guide, tmp_path / "guide.pt")
    assert list(load(tmp_path / "guide.pt").sample(2, Y)) == ["mean", "scale", "x_decentered"]


def test_a_subsampled_plate_is_left_out():
    def model(y):
        with pyro.plate("group", len(y), subsample_size=2) as rows:
            x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[rows])

    guide = AutoPlateFlow(poutine.reparam(model, {"x": LocScaleReparam(0.0)}), "group").setup(Y)
    assert {name: value.shape for name, value in guide.sample(5, Y).items()} == {"x_decentered": (5, 4)}


def test_a_reparametrised_model_can_be_simulated():
    def model(y=None):
        x = pyro.sample("x", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    found = Simulator("fit_amortized", poutine.reparam(model, {"x": LocScaleReparam(0.0)}), (), {})
    assert found.sites == {"y": "y"}


def test_a_likelihood_written_as_a_point_at_the_data_stays_an_observation():
    def model(y):
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("y", dist.Delta(y, log_density=-((y - x) ** 2)), obs=y)
        pyro.sample("time", dist.Delta(torch.ones(())), obs=torch.ones(()))

    data = to_arviz(model, lambda y: pyro.sample("x", dist.Normal(0.5, 0.6)), torch.tensor(1.0), num_samples=30)
    assert set(data["posterior"].data_vars) == {"x"}
    assert set(data["observed_data"].data_vars) == {"y", "time"}
    assert "y" in data["log_likelihood"].data_vars
