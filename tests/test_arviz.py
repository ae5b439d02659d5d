"""Guide draws as ArviZ data, and draws resampled by their weights.

All values are in the right groups, with ArviZ 0.2x and 1.x.  Resampled draws and predictions have their known
distributions.
"""

import functools
import importlib
import math
import sys
import types
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from models import Y, beyond, nested, sampling, silent

from pyro_flows import AutoFlow, arviz_versions, check, flows, psis, resample, to_arviz
from pyro_flows.diagnostics.importance import reweighted, smooth
from pyro_flows.programs import Program
from pyro_flows.programs.model_and_guide import Draws
from pyro_flows.sampling.annealed_population import systematic

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(16,))
SHAPES = {"top": (), "middle": (2, 1), "leaf": (2, 3), "pair": (2, 3, 2), "double": (2, 3), "square": ()}


def groups_of(data) -> set[str]:
    """Return the groups of an InferenceData (ArviZ 0.2x) or DataTree (1.x)."""
    return set(data.groups()) if callable(data.groups) else set(data.children)


def _find_psislw():
    """Return ArviZ's smoothing function; ArviZ 1.x expects negative log-weights."""
    if hasattr(az, "psislw"):
        return az.psislw
    smooth = importlib.import_module("arviz_stats.base").array_stats.psislw
    return lambda log_weights: smooth(-log_weights)


arviz_psislw = _find_psislw()  # found before a test replaces ArviZ


target = sampling(x=dist.Normal(0.0, 1.0))


def gaussian(scale: float):
    return sampling(x=dist.Normal(0.0, scale))


@pytest.fixture
def guide():
    return AutoFlow(nested, small, init_scale=0.5).setup(Y)


@pytest.fixture
def data(guide):
    return to_arviz(nested, guide, Y, num_samples=40)


def test_groups_and_dims(data):
    assert groups_of(data) == {"posterior", "sample_stats", "log_likelihood", "observed_data"}
    assert set(data.posterior.data_vars) == set(SHAPES)
    for name, shape in SHAPES.items():
        assert data.posterior[name].shape == (1, 40, *shape)
        named = 3 if name == "middle" else min(2 + len(shape), 4)
        assert data.posterior[name].dims[:named] == ("chain", "draw", "outer", "inner")[:named]


def test_deterministic_sites_belong_to_their_draws(data):
    np.testing.assert_allclose(data.posterior["double"].values, 2 * data.posterior["leaf"].values, rtol=1e-6)
    np.testing.assert_allclose(data.posterior["square"].values, data.posterior["top"].values ** 2, rtol=1e-6)


def test_observed_data_is_there_once(data):
    assert dict(data.observed_data.sizes) == {"outer": 2, "inner": 3}
    np.testing.assert_array_equal(data.observed_data["y"].values, Y.numpy())


def test_log_likelihood_of_each_observation(data):
    assert tuple(map(str, data.log_likelihood["y"].dims)) == ("chain", "draw", "outer", "inner")
    pair = torch.as_tensor(data.posterior["pair"].values)
    expected = dist.Normal(pair.sum(-1), 1.0).log_prob(Y)
    np.testing.assert_allclose(data.log_likelihood["y"].values, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_log_likelihood_can_be_left_out(guide):
    data = to_arviz(nested, guide, Y, num_samples=30, log_likelihood=False)
    assert groups_of(data) == {"posterior", "sample_stats", "observed_data"}


def test_model_without_data():
    data = to_arviz(target, gaussian(0.9), num_samples=30)
    assert groups_of(data) == {"posterior", "sample_stats"}


def test_without_vectorize_the_layout_is_the_same(guide, data):
    single = to_arviz(Program(nested, vectorize="loop"), guide, Y, num_samples=25)
    assert set(groups_of(single)) == set(groups_of(data))
    for group in groups_of(single):
        for name, value in single[group].items():
            assert (value.dims, value.sizes.get("draw", 25)) == (data[group][name].dims, 25)


def test_attrs_hold_khat():
    """It is found from 10,000 draws whatever their number, as in psis and check, of which the latter draws others."""
    guide = gaussian(0.5)  # k-hat is 1 - 0.5², so that it warns
    khat = psis(target, guide).khat
    pyro.set_rng_seed(0)
    with pytest.warns(UserWarning, match=rf"k-hat is {khat:.2f}, above 0\.70: .* Judge the guide by pf\.check"):
        data = to_arviz(target, guide, num_samples=30)
    for group in groups_of(data):
        attrs = data[group].attrs
        assert (attrs["inference_library"], attrs["khat"], attrs["num_weighed"]) == ("pyro_flows", khat, 10_000)
    checked = check(target, guide, num_chains=16).psis
    assert len(checked.log_weights) == 10_000
    # The shape of the 300 largest weights has a standard error of (1 + k) / sqrt(300).
    assert abs(checked.khat - khat) < 4 * 2**0.5 * (1 + khat) / 300**0.5
    with silent():
        assert to_arviz(target, gaussian(1.1), num_samples=30, num_weighed=100).posterior.attrs["num_weighed"] == 100


def test_netcdf_round_trip(data, tmp_path):
    path = str(tmp_path / "draws.nc")
    data.to_netcdf(path)
    again = az.from_netcdf(path)
    assert set(groups_of(again)) == set(groups_of(data))
    for group in groups_of(data):
        assert again[group].attrs["khat"] == data[group].attrs["khat"]
        for name, value in data[group].items():
            np.testing.assert_array_equal(again[group][name].values, value.values)
            assert again[group][name].dims == value.dims


def test_summary_runs(data):
    table = az.summary(data, kind="stats")
    assert "leaf[1, 2]" in table.index
    shown = float(table.loc["top", "mean"])  # three decimals, as text in ArviZ 1.2
    assert shown == pytest.approx(float(data.posterior["top"].mean()), abs=6e-4)


def test_a_model_that_does_not_broadcast_is_told_how():
    """A model that mixes draws under a plate raises an error with the site's name, and runs by other engines."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.deterministic("wide", x.sum().expand(3) if x.dim() == 0 else x.reshape(-1)[:7])

    with pytest.raises(ValueError, match=r"site 'wide' has shape \(3,\).*vectorize"):
        to_arviz(Program(model, vectorize="plate"), gaussian(0.9), num_samples=30)
    for engine in ("auto", "vmap", "loop"):
        found = to_arviz(Program(model, vectorize=engine), gaussian(0.9), num_samples=30).posterior
        assert found["wide"].shape == (1, 30, 3)
        assert (found["wide"].values == found["x"].values[..., None]).all()


def test_a_model_that_runs_one_draw_at_a_time_is_said_once():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0 if x.item() > 0 else 2.0), obs=torch.tensor(1.0))

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        to_arviz(model, gaussian(0.9), num_samples=30, num_weighed=30)
    assert sum("one draw at a time" in str(one.message) for one in found) == 1


def test_agrees_with_arviz():
    checked = psis(target, gaussian(0.7), num_samples=2500)  # 3 √S is whole, since ArviZ 1.x rounds it down
    log_smoothed, khat = arviz_psislw(checked.log_weights.double().numpy())
    smoothed = np.exp(log_smoothed) / np.exp(log_smoothed).sum()
    assert checked.khat == pytest.approx(float(khat), abs=1e-9)
    assert checked.ess == pytest.approx(1 / (smoothed**2).sum(), rel=1e-9)
    mean = checked.log_weights.double().logsumexp(0).item() - math.log(2500)  # of the raw weights
    assert checked.log_evidence == pytest.approx(mean, abs=1e-9)


def test_equal_weights_have_no_tail():
    """Zero weights do not count; for large densities, round-off makes weights equal too."""
    log_weights = torch.tensor([2.0, 1.0, 0.0, 1.0]).double().repeat_interleave(torch.tensor([90, 10, 60, 40])).log()
    smoothed, khat = smooth(log_weights)
    assert khat == -math.inf
    torch.testing.assert_close(smoothed.exp(), log_weights.exp() / 230, atol=1e-12, rtol=0)
    nearly = (-6.547 + 1e-6 * np.random.default_rng(0).standard_normal(10_000)).astype(np.float32)
    assert 1 < len(np.unique(np.sort(nearly)[-300:])) < 10
    assert smooth(torch.as_tensor(nearly).double())[1] == -math.inf


# The other version of ArviZ, which may not be installed: stand-ins with its layout.


def test_arviz_1_gets_a_tree(monkeypatch):
    """ArviZ 1.x has no container class and uses xarray's."""
    monkeypatch.setitem(sys.modules, "arviz", types.ModuleType("arviz"))
    variables = {"x": (("chain", "draw", "row"), np.zeros((1, 30, 2))), "row": (("row",), np.array([3, 7]))}
    tree = arviz_versions.container({"posterior": variables}, {"khat": 0.1})
    assert isinstance(tree, xarray.DataTree)
    assert (tree["posterior"].attrs, tree["posterior"].sizes) == ({"khat": 0.1}, {"chain": 1, "draw": 30, "row": 2})
    np.testing.assert_array_equal(tree["posterior"]["row"].values, [3, 7])
    np.testing.assert_array_equal(tree["posterior"]["draw"].values, np.arange(30))


# Leave-one-out cross-validation by ArviZ.


def loo(data, **options) -> float:
    """Return the expected log predictive density by ArviZ, and fail on warnings."""
    with silent(UserWarning):
        found = az.loo(data, **options)
    return float(found["elpd_loo"] if hasattr(az, "psislw") else found.elpd)


def rows_model(y: torch.Tensor, w: torch.Tensor | None = None, seen: torch.Tensor | None = None) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=True if seen is None else seen):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)
    if w is not None:
        with pyro.plate("more", len(w)):
            pyro.sample("w", dist.Normal(x.unsqueeze(-1), 2.0 * torch.ones(2)).to_event(1), obs=w)


def exact(precision: float, mean: float):
    """Return a Gaussian guide of the site x."""
    return sampling(x=dist.Normal(mean, precision**-0.5))


ROWS, PAIRS = torch.tensor([0.3, -1.0, 2.0, 1.1]), torch.tensor([[1.0, 2.0], [0.0, -1.5], [0.5, 0.4]])


def test_loo_of_each_observed_site_is_exact():
    """The reference is the exact density of each row given the others in a Gaussian model; a pair is one row."""
    precision = 0.01 + 4 + 6 / 4
    total = float(ROWS.sum() + PAIRS.sum() / 4)
    data = to_arviz(rows_model, exact(precision, total / precision), ROWS, PAIRS, num_samples=4000)
    assert (data.log_likelihood["y"].shape, data.log_likelihood["w"].shape) == ((1, 4000, 4), (1, 4000, 3))
    of_row, of_pair = precision - 1, precision - 0.5  # the precision without one of them
    rows = dist.Normal((total - ROWS) / of_row, (1 / of_row + 1) ** 0.5)
    locs = (total - PAIRS.sum(1, keepdim=True) / 4) / of_pair * torch.ones(2)
    pairs = dist.MultivariateNormal(locs, 4 * torch.eye(2) + 1 / of_pair)
    for name, value in (("y", float(rows.log_prob(ROWS).sum())), ("w", float(pairs.log_prob(PAIRS).sum()))):
        # The unsmoothed estimate is -log mean(1 / p) for each row, and smoothing does not add noise.
        ratios = np.exp(-data.log_likelihood[name].values[0].astype(float))
        noise = (ratios.std(0) / ratios.mean(0)).sum() / math.sqrt(4000)
        assert abs(loo(data, var_name=name) - value) < 4 * noise < 0.3


def test_loo_of_masked_rows_is_that_of_the_others():
    """Rows without a likelihood are left out, because ArviZ 1.x fails on them and 0.2x counts them as outliers."""
    seen = torch.tensor([True, False, True, True])
    guide = exact(3.01, 1.1)
    found = []
    for y, mask in ((ROWS, seen), (ROWS[seen], None)):
        pyro.set_rng_seed(0)
        found.append(to_arviz(rows_model, guide, y, seen=mask, num_samples=1000))
    masked, others = found
    assert masked.log_likelihood["y"].dims == ("chain", "draw", "y_seen")
    np.testing.assert_array_equal(masked.log_likelihood["y_seen"].values, [0, 2, 3])
    np.testing.assert_array_equal(masked.log_likelihood["y"].values, others.log_likelihood["y"].values)
    np.testing.assert_array_equal(masked.observed_data["y"].values, ROWS.numpy())
    assert loo(masked) == loo(others)
    nothing = to_arviz(rows_model, guide, ROWS, seen=torch.zeros(4, dtype=torch.bool), num_samples=30)
    assert set(groups_of(nothing)) == {"posterior", "sample_stats", "observed_data"}


# Predictions.


def growth(y: torch.Tensor, z: torch.Tensor) -> None:
    """Model with an observed site that depends on an earlier one through a deterministic site in a plate."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        first = pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        doubled = pyro.deterministic("doubled", 2 * first)
        pyro.sample("z", dist.Normal(doubled.unsqueeze(-1), 0.5 * torch.ones(2)).to_event(1), obs=z)
    pyro.factor("nothing", torch.zeros(()))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "vectorize"), [(4000, "plate"), (4000, "vmap"), (400, "loop")])
def test_predictions_follow_the_model(number, vectorize):
    """With the guide x ~ N(4.5, 1/4), predictions are y = x + e and z = 2 y + e / 2, for all data."""
    program, y, z = Program(growth, vectorize=vectorize), torch.tensor([5.0, 6.0, 7.0]), torch.full((3, 2), -20.0)
    data = to_arviz(program, exact(4.0, 4.5), y, z, num_samples=number, posterior_predictive=True)
    predicted = data.posterior_predictive
    assert set(predicted.data_vars) == {"y", "z"}
    for name, dims in (("y", ("rows",)), ("z", ("rows", "z_dim_1"))):
        assert predicted[name].dims == ("chain", "draw", *data.observed_data[name].dims) == ("chain", "draw", *dims)
    np.testing.assert_array_equal(data.observed_data["y"].values, [5.0, 6.0, 7.0])
    columns = data.posterior["x"], predicted["y"], predicted["z"]
    joint = np.concatenate([column.values[0].reshape(number, -1) for column in columns], 1)
    loading = np.zeros((10, 10))  # noise of x, of the three y and of the six z
    loading[0, 0], loading[1:4, 0], loading[1:4, 1:4] = 0.5, 0.5, np.eye(3)
    loading[4:] = 2 * np.repeat(loading[1:4], 2, axis=0)
    loading[4:, 4:] = 0.5 * np.eye(6)
    covariance = loading @ loading.T
    expected, sd = 4.5 * np.array([1.0] * 4 + [2.0] * 6), np.sqrt(np.diag(covariance))
    assert (abs(joint.mean(0) - expected) < 4 * sd / math.sqrt(number)).all()
    noise = np.sqrt((np.outer(sd, sd) ** 2 + covariance**2) / number)  # standard error of a sample covariance
    assert (abs(np.cov(joint.T) - covariance) < 4.5 * noise).all()


def test_predictions_of_nested_plates_and_masked_rows(guide):
    data = to_arviz(nested, guide, Y, num_samples=30, posterior_predictive=True)
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "outer", "inner")
    assert (data.posterior_predictive["y"].values.std((0, 1)) > 0.3).all()  # the noise has sd 1
    seen = torch.tensor([True, False, True, True])
    masked = to_arviz(rows_model, exact(2.0, 1.0), ROWS, seen=seen, num_samples=30, posterior_predictive=True)
    assert masked.posterior_predictive["y"].shape == (1, 30, 4)


# Resampling.


def test_systematic_resampling_keeps_each_draw_as_often_as_it_weighs():
    weights = torch.tensor([0.0, 0.31, 0.02, 0.0, 0.6, 0.07, 0.0], dtype=torch.float64)
    counts = torch.stack([systematic(weights, 10).bincount(minlength=7) for _ in range(4000)]).double()
    assert (counts.sum(-1) == 10).all()
    assert ((counts - 10 * weights).abs() < 1).all()
    assert (counts[:, weights == 0] == 0).all()
    part = 10 * weights % 1
    assert ((counts.mean(0) - 10 * weights).abs() <= 4 * (part * (1 - part) / 4000).sqrt() + 1e-6).all()
    rows = systematic(torch.stack((weights, weights.flip(0))), 10)
    assert ((rows[1].bincount(minlength=7) - 10 * weights.flip(0)).abs() < 1).all()


def test_resampled_draws_are_shuffled():
    """The weights are all alike, so that each draw is kept once and may be anywhere."""
    x = torch.arange(50.0)
    draws = Draws({"x": x}, torch.zeros(50), torch.zeros(50))
    orders = torch.stack([reweighted(draws, 50, "resample")[0].latents["x"] for _ in range(500)])
    assert (orders.sort(-1).values == x).all()
    assert ((orders.mean(0) - 24.5).abs() < 4.5 * 14.5 / math.sqrt(500)).all()


def test_resampled_draws_are_the_posterior():
    """The guide is off by half an sd and too wide; the posterior is N(2.4 / 4.01, 1 / 4.01)."""
    guide = exact(1.5, 0.85)
    draws = resample(rows_model, guide, ROWS, num_samples=3000)["x"]
    assert draws.shape == (3000,)
    sd, size = 4.01**-0.5, psis(rows_model, guide, ROWS).ess
    noise = sd * (1 / size + 1 / 3000) ** 0.5
    assert abs(draws.mean() - float(ROWS.sum()) / 4.01) < 4 * noise
    assert abs(draws.std() - sd) < 4 * noise / 2**0.5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_resampled_sites_keep_together(guide):
    """All sites keep their shapes and come from the same draw, and equal seeds give equal draws."""
    found = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        found.append(resample(nested, guide, Y, num_samples=20, num_weighed=30))
    draws, again = found
    assert {name: value.shape[1:] for name, value in draws.items()} == SHAPES
    assert {len(value) for value in draws.values()} == {20}
    assert all(torch.equal(value, again[name]) for name, value in draws.items())
    torch.testing.assert_close(draws["double"], 2 * draws["leaf"])
    torch.testing.assert_close(draws["square"], draws["top"] ** 2)


def test_as_many_are_weighed_as_are_kept():
    assert resample(target, gaussian(1.1), num_samples=60, num_weighed=25)["x"].unique().numel() > 30
    assert resample(Program(target, vectorize="loop"), gaussian(1.1), num_samples=1, num_weighed=100)["x"].shape == (1,)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("importance", [False, True])
def test_sample_stats_are_those_of_the_draws_that_are_kept(guide, importance):
    settings = {"importance": importance, "num_weighed": 200, "log_likelihood": False}
    data = to_arviz(nested, guide, Y, num_samples=50, **settings)
    stats = {name: torch.as_tensor(data.sample_stats[name].values[0]) for name in ("log_p", "log_q", "log_weight")}
    latents = {name: torch.as_tensor(data.posterior[name].values[0]) for name in ("top", "middle", "leaf", "pair")}
    torch.testing.assert_close(stats["log_q"], guide.log_prob(latents).detach(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(stats["log_weight"], stats["log_p"] - stats["log_q"])
    held = [pyro.poutine.condition(nested, {name: value[row] for name, value in latents.items()}) for row in range(50)]
    log_p = torch.stack([pyro.poutine.trace(model).get_trace(Y).log_prob_sum() for model in held])
    torch.testing.assert_close(stats["log_p"], log_p.detach(), rtol=1e-4, atol=1e-3)
    assert (len(latents["top"].unique()) < 50) == importance  # some draws occur several times


def test_resampled_data_say_so():
    data = to_arviz(rows_model, exact(2.0, 1.0), ROWS, num_samples=500, importance=True, posterior_predictive=True)
    plain = to_arviz(rows_model, exact(2.0, 1.0), ROWS, num_samples=500)
    assert set(groups_of(data)) == {*groups_of(plain), "posterior_predictive"}
    for group in groups_of(data):
        assert data[group].attrs["importance_resampled"] == 1
        assert 500 < data[group].attrs["importance_ess"] < 10_000
    assert plain["posterior"].attrs["importance_resampled"] == 0
    x = torch.as_tensor(data.posterior["x"].values[0])
    likelihood = dist.Normal(x[:, None], 1.0).log_prob(ROWS)
    np.testing.assert_allclose(data.log_likelihood["y"].values[0], likelihood.numpy(), rtol=1e-5, atol=1e-6)
    noise = 4.01**-0.5 * (1 / data.posterior.attrs["importance_ess"] + 1 / 500) ** 0.5
    assert abs(float(x.mean()) - float(ROWS.sum()) / 4.01) < 4 * noise


@pytest.mark.parametrize("function", [resample, functools.partial(to_arviz, importance=True)])
def test_weights_that_cannot_be_trusted_are_a_warning(function):
    """For a Gaussian of scale .3, the shape of the weights' tail is 1 - .3² = .91."""
    with pytest.warns(UserWarning, match=r"k-hat is .*, above 0.70: a few draws hold most of the weight"):
        function(target, gaussian(0.3), num_samples=100)


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(ValueError, match="resample: num_samples must be an integer of at least 1, got 0"):
        resample(target, gaussian(1.0), num_samples=0)
    for function in (resample, to_arviz):
        with pytest.raises(ValueError, match="num_weighed must be an integer of at least 25, got 24"):
            function(target, gaussian(1.0), num_weighed=24)

    with pytest.raises(ValueError, match="all log-weights are -inf"):
        resample(beyond(100.0), gaussian(1.0))


def test_draws_outside_the_support_are_never_kept():
    assert (resample(beyond(0.0), gaussian(1.0), num_samples=2000)["x"] > 0).all()
