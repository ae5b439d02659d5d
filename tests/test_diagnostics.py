"""The diagnostics tell the truth.

``psis`` finds the k-hat and the evidence of pairs where both are known, in agreement with ArviZ; ``to_arviz`` keeps
every number in its place, with both generations of ArviZ.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

from pyro_flows import AutoFlow, Psis, flows, psis, to_arviz
from pyro_flows.diagnostics import compat
from pyro_flows.diagnostics.importance import weigh

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(16,))


def groups_of(data) -> set[str]:
    """The groups of an InferenceData (ArviZ 0.2x) or DataTree (1.x)."""
    return set(data.groups()) if callable(data.groups) else set(data.children)


def _find_psislw():
    """ArviZ's own smoothing, asked directly: 1.x takes the negative of the log-weights."""
    if hasattr(az, "psislw"):
        return az.psislw
    smooth = importlib.import_module("arviz_stats.base").array_stats.psislw
    return lambda log_weights: smooth(-log_weights)


arviz_psislw = _find_psislw()  # found now, before a test puts a stand-in in ArviZ's place


def target(*_, **__):
    pyro.sample("x", dist.Normal(0.0, 1.0))


def gaussian(scale: float):
    def guide(*_, **__):
        pyro.sample("x", dist.Normal(0.0, scale))

    return guide


# Pareto-smoothed importance sampling.


@pytest.mark.parametrize(("scale", "low", "high"), [(0.5, 0.6, 1.0), (0.95, -1.0, 0.3), (1.5, -math.inf, 0.3)])
def test_khat_of_gaussians(scale, low, high):
    """For a Gaussian of scale s < 1 against the standard one the weights' tail has the shape 1 - s²."""
    checked = psis(target, gaussian(scale), num_samples=10_000)
    assert isinstance(checked, Psis)
    assert low < checked.khat < high
    assert checked.threshold == pytest.approx(0.7)
    assert checked.reliable == (checked.khat < 0.7)
    assert 1 <= checked.ess < 10_000


def test_evidence_and_its_standard_error():
    runs = [psis(target, gaussian(0.9), num_samples=1000) for _ in range(20)]
    evidence = torch.tensor([run.log_evidence for run in runs])
    error = torch.tensor([run.log_evidence_se for run in runs])
    assert (evidence.abs() < 4 * error).all()  # the evidence is 1
    # A standard deviation of 20 runs is known to within 1 / sqrt(2 · 19), 16 %: four of these are 65 %.
    assert 0.35 < (evidence.std() / error.mean()).item() < 1.65


def test_effective_sample_size():
    """For q = N(0, s²) against p = N(0, 1): E w² = s² / sqrt(2 s² - 1), so ess / S is sqrt(2 s² - 1) / s²."""
    checked = psis(target, gaussian(1.2), num_samples=20_000)
    assert checked.ess / 20_000 == pytest.approx(math.sqrt(2 * 1.44 - 1) / 1.44, rel=0.02)


def test_equal_densities():
    checked = psis(target, gaussian(1.0), num_samples=400)
    assert checked.khat == -math.inf
    assert checked.ess == pytest.approx(400)
    assert checked.log_evidence == pytest.approx(0, abs=1e-6)
    assert checked.log_evidence_se == pytest.approx(0, abs=1e-6)
    assert checked.reliable


def test_few_draws_lower_the_threshold():
    assert psis(target, gaussian(0.9), num_samples=100).threshold == pytest.approx(0.5)


def test_agrees_with_arviz():
    checked = psis(target, gaussian(0.7), num_samples=2000)
    log_smoothed, khat = arviz_psislw(checked.log_weights.double().numpy())
    smoothed = np.exp(log_smoothed) / np.exp(log_smoothed).sum()
    assert checked.khat == pytest.approx(float(khat), abs=1e-9)
    assert checked.ess == pytest.approx(1 / (smoothed**2).sum(), rel=1e-9)
    # The evidence is the plain mean of the raw weights.
    assert checked.log_evidence == pytest.approx(
        checked.log_weights.double().logsumexp(0).item() - math.log(2000), abs=1e-9
    )


def test_log_weights_are_raw():
    """Neither normalised nor smoothed: with an observation they are log p(x, y) - log q(x) of each draw."""
    seen = []

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(30.0))

    def guide():
        seen.append(pyro.sample("x", dist.Normal(15.0, 0.5)))

    checked = psis(model, guide, num_samples=50)
    x = seen[-1]
    expected = dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(x, 1.0).log_prob(torch.tensor(30.0))
    torch.testing.assert_close(checked.log_weights, expected - dist.Normal(15.0, 0.5).log_prob(x))
    assert checked.log_weights.max() < -200


def nested(y=None, *, noise=1.0):
    """Two nested plates, a factor, a deterministic site, data."""
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("outer", 2, dim=-2):
        middle = pyro.sample("middle", dist.Normal(top, 1.0))
        with pyro.plate("inner", 3, dim=-1):
            leaf = pyro.sample("leaf", dist.Normal(middle, 1.0))
            pair = pyro.sample("pair", dist.Normal(leaf[..., None], torch.ones(2)).to_event(1))
            pyro.deterministic("double", 2 * leaf)
            pyro.sample("y", dist.Normal(pair.sum(-1), noise), obs=y)
    pyro.factor("penalty", -0.1 * top**2)
    pyro.deterministic("square", top**2)


Y = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.1, 1.5]])


@pytest.fixture
def guide():
    return AutoFlow(nested, small, init_scale=0.5).setup(Y)


def test_vectorized_draws_have_the_law_of_single_ones(guide):
    """Log-weights of both kinds have the same mean, within four standard errors, and the same spread."""
    many = psis(nested, guide, Y, num_samples=2000).log_weights.double()
    few = psis(nested, guide, Y, num_samples=300, vectorize=False).log_weights.double()
    assert few.shape == (300,)
    assert abs(many.mean() - few.mean()) < 4 * (many.var() / 2000 + few.var() / 300).sqrt()
    assert 0.7 < few.std() / many.std() < 1.4


def test_log_weights_of_nested_plates_are_those_of_the_trace(guide):
    """Recomputed from the densities alone, at the guide's own draws."""
    data = to_arviz(nested, guide, Y, num_samples=30)
    posterior = {name: torch.as_tensor(data.posterior[name].values[0]) for name in ("top", "middle", "leaf", "pair")}
    top, middle, leaf, pair = posterior.values()
    log_p = dist.Normal(0.0, 1.0).log_prob(top) - 0.1 * top**2
    log_p = log_p + dist.Normal(top[:, None, None], 1.0).log_prob(middle).sum((-2, -1))
    log_p = log_p + dist.Normal(middle, 1.0).log_prob(leaf).sum((-2, -1))
    log_p = log_p + dist.Normal(leaf[..., None], 1.0).log_prob(pair).sum((-3, -2, -1))
    log_p = log_p + dist.Normal(pair.sum(-1), 1.0).log_prob(Y).sum((-2, -1))
    stats = {name: torch.as_tensor(data.sample_stats[name].values[0]) for name in ("log_p", "log_q", "log_weight")}
    torch.testing.assert_close(stats["log_p"], log_p.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats["log_q"], guide.log_prob(posterior).detach(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(stats["log_weight"], stats["log_p"] - stats["log_q"])


@pytest.mark.parametrize("batch_size", [7, 30, 1000])
def test_batch_size_changes_no_shapes(guide, batch_size):
    assert psis(nested, guide, Y, num_samples=30, batch_size=batch_size).log_weights.shape == (30,)
    data = to_arviz(nested, guide, Y, num_samples=30, batch_size=batch_size)
    assert data.posterior["pair"].shape == (1, 30, 2, 3, 2)
    assert data.log_likelihood["y"].shape == (1, 30, 2, 3)


def test_model_keyword_arguments(guide):
    """Given straight, or through model_kwargs where their names clash."""

    def clashing(y, num_samples=None):
        nested(y, noise=num_samples)

    straight, clash = [], []
    for name, kept in (("noise", straight), ("num_samples", clash)):
        pyro.set_rng_seed(1)
        if name == "noise":
            kept.append(psis(nested, guide, Y, num_samples=30, noise=3.0))
        else:
            kept.append(psis(clashing, guide_of(guide), Y, num_samples=30, model_kwargs={"num_samples": 3.0}))
    torch.testing.assert_close(straight[0].log_weights, clash[0].log_weights)


def guide_of(guide):
    """A guide that takes any keyword."""
    return lambda y, **_: guide(y)


def test_leaves_no_trace_in_an_outer_handler():
    with pyro.poutine.trace() as outer:
        psis(target, gaussian(0.9), num_samples=30)
    assert not [name for name, site in outer.trace.nodes.items() if site["type"] == "sample"]


@pytest.mark.parametrize("function", [psis, to_arviz])
def test_too_few_draws_are_refused(function):
    with pytest.raises(ValueError, match=r"num_samples must be at least 25.*got 24"):
        function(target, gaussian(1.0), num_samples=24)


def test_weights_that_are_not_finite_are_refused():
    good = torch.randn(50)
    for value in (math.nan, math.inf):
        bad = good.clone()
        bad[3] = value
        with pytest.raises(ValueError, match="1 of 50 log-weights are NaN or"):
            weigh(bad)
    with pytest.raises(ValueError, match="all log-weights are -inf"):
        weigh(torch.full((50,), -math.inf))
    some = good.clone()
    some[:5] = -math.inf  # draws outside the model's support only weigh nothing
    assert math.isfinite(weigh(some).log_evidence)


def test_guide_outside_the_support_is_refused():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 100, 0.0, -math.inf))

    with pytest.raises(ValueError, match="all log-weights are -inf"):
        psis(model, gaussian(1.0), num_samples=50)


# ArviZ.


@pytest.fixture
def data(guide):
    return to_arviz(nested, guide, Y, num_samples=40)


def test_groups_and_dims(data):
    assert set(groups_of(data)) == {"posterior", "sample_stats", "log_likelihood", "observed_data"}
    dims = {name: tuple(map(str, value.dims)) for name, value in data.posterior.items()}
    sizes = {name: value.shape for name, value in data.posterior.items()}
    assert set(dims) == {"top", "middle", "leaf", "pair", "double", "square"}
    assert dims["top"] == dims["square"] == ("chain", "draw")
    assert dims["leaf"] == dims["double"] == ("chain", "draw", "outer", "inner")
    assert dims["middle"][:3] == ("chain", "draw", "outer")
    assert dims["pair"][:4] == ("chain", "draw", "outer", "inner")
    assert sizes["top"] == (1, 40)
    assert sizes["middle"] == (1, 40, 2, 1)
    assert sizes["leaf"] == (1, 40, 2, 3)
    assert sizes["pair"] == (1, 40, 2, 3, 2)


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
    assert set(groups_of(data)) == {"posterior", "sample_stats", "observed_data"}


def test_model_without_data():
    data = to_arviz(target, gaussian(0.9), num_samples=30)
    assert set(groups_of(data)) == {"posterior", "sample_stats"}


def test_without_vectorize_the_layout_is_the_same(guide, data):
    single = to_arviz(nested, guide, Y, num_samples=25, vectorize=False)
    assert set(groups_of(single)) == set(groups_of(data))
    for group in groups_of(single):
        for name, value in single[group].items():
            assert value.dims == data[group][name].dims
            assert value.sizes.get("draw", 25) == 25


def test_attrs_hold_khat(data):
    khat = weigh(torch.as_tensor(data.sample_stats["log_weight"].values[0])).khat
    for group in groups_of(data):
        assert data[group].attrs["inference_library"] == "pyro_flows"
        assert data[group].attrs["khat"] == pytest.approx(khat)


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
    assert table.loc["top", "mean"] == pytest.approx(float(data.posterior["top"].mean()), abs=6e-4)  # three decimals


def test_a_model_that_does_not_broadcast_is_told_how():
    """A model that mixes its draws up is refused by the site's name, and runs one draw at a time."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.deterministic("wide", x.sum().expand(3) if x.dim() == 0 else x.reshape(-1)[:7])

    with pytest.raises(ValueError, match=r"site 'wide' has shape \(3,\).*vectorize=False"):
        to_arviz(model, gaussian(0.9), num_samples=30)
    assert to_arviz(model, gaussian(0.9), num_samples=30, vectorize=False).posterior["wide"].shape == (1, 30, 3)


# The other generation of ArviZ, which this environment lacks: a stand-in with its layout.


def test_arviz_1_gets_negated_weights(monkeypatch):
    """ArviZ 1.x moved psislw into arviz_stats, where it takes the negative of the log-ratios."""
    seen = []

    def negated(values):
        seen.append(values)
        return arviz_psislw(-values)

    modern, stats, base = (types.ModuleType(name) for name in ("arviz", "arviz_stats", "arviz_stats.base"))
    base.array_stats = types.SimpleNamespace(psislw=negated)
    for module in (modern, stats, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    log_weights = np.random.default_rng(0).normal(size=500)
    smoothed, khat = compat.psislw(log_weights)
    np.testing.assert_array_equal(seen[0], -log_weights)
    expected, expected_khat = arviz_psislw(log_weights)
    np.testing.assert_allclose(smoothed, expected)
    assert khat == pytest.approx(float(expected_khat))


def test_arviz_1_gets_groups_as_one_argument(monkeypatch):
    """ArviZ 1.x takes the groups as one dictionary and returns a tree of them."""
    calls = []

    def from_dict(groups, *, coords, dims):
        calls.append((groups, coords, dims))
        return {name: types.SimpleNamespace(attrs={}) for name in groups}

    modern = types.ModuleType("arviz")
    modern.from_dict = from_dict
    monkeypatch.setitem(sys.modules, "arviz", modern)
    groups = {"posterior": {"x": np.zeros((1, 30, 2))}}
    tree = compat.from_groups(groups, {}, {"x": ["row"]}, {"khat": 0.1})
    assert calls == [(groups, {}, {"x": ["row"]})]
    assert tree["posterior"].attrs == {"khat": 0.1}


def test_a_subsampled_plate_is_refused_by_name():
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=4):
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(4))

    def guide() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"plate 'rows', which is subsampled \(4 of 10 rows\)"):
        psis(model, guide, num_samples=100)


def test_batch_size_must_be_positive():
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        psis(model, model, num_samples=100, batch_size=0)


def test_masked_rows_carry_no_likelihood():
    seen = torch.tensor([True, False, True])

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.ones(3))

    def guide() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    found = to_arviz(model, guide, num_samples=50)["log_likelihood"]["y"].values
    assert (found[..., 1] == 0).all()
    assert (found[..., [0, 2]] < 0).all()


def test_a_model_that_sums_over_all_draws_is_refused():
    """It runs side by side without an error, and is wrong: its factor would count once for every draw."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.factor("f", -0.5 * (x - 1).pow(2).sum())

    def guide() -> None:
        pyro.sample("x", dist.Normal(0.5, 0.7).expand([2]).to_event(1))

    with pytest.raises(ValueError, match="with two draws side by side"):
        psis(model, guide, num_samples=100)
    found = psis(model, guide, num_samples=2000, vectorize=False)
    # N(0, 1) times exp(-(x - 1)^2 / 2) integrates to exp(-1/4) / sqrt(2) in each of two dimensions.
    assert abs(found.log_evidence - (-0.5 - math.log(2))) < 4 * found.log_evidence_se


def test_a_model_that_cannot_run_side_by_side_is_refused():
    """Its data lie in a plate, which the guide has not; still the two are tried together."""
    x = torch.randn(20, 3)

    def model(product) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(product(w), 1.0), obs=torch.zeros(20))

    def guide(product) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(
        ValueError, match=r"does not run with draws side by side.*with \(x \* w\).sum\(-1\) in place of x @ w"
    ):
        psis(model, guide, lambda w: x @ w, num_samples=30)
    with pytest.raises(ValueError, match="with two draws side by side"):
        psis(model, guide, lambda w: (w * x.sum(0)).sum(), num_samples=30)
    assert psis(model, guide, lambda w: (x * w).sum(-1), num_samples=30).log_weights.shape == (
        30,
    )  # what the error recommends


def test_a_latent_without_a_guide_is_refused():
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="latent site 'z' of the model is not in the guide"):
        psis(model, gaussian(0.9), num_samples=100)


def test_a_point_is_refused():
    with pytest.raises(ValueError, match="the guide is a point"):
        psis(target, AutoDelta(target), num_samples=100)
