"""Calibration accepts exact amortised guides and rejects narrow, wide and shifted ones, by each of three tests."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_guides import conjugate, gaussian, posterior, simulator, wrong
from scipy import stats

from pyro_flows import AutoFlow, calibrate, fit_amortized, flows, local_c2st, misspecification
from pyro_flows.diagnostics import Calibration
from pyro_flows.diagnostics.calibration import uniformity
from pyro_flows.encoders import MLPEncoder
from pyro_flows.programs import Program

run = functools.partial(calibrate, num_simulations=1000, num_samples=100)


def test_an_exact_guide_passes():
    found = run(conjugate, posterior())
    assert found.calibrated is True  # a Python bool, not one of NumPy
    assert found.reason.startswith("No test finds an error over 1000 datasets; ")
    assert repr(found).startswith("Calibration(calibrated=True, sbc_p=")
    assert found.names == ["theta[0]", "theta[1]"]
    assert (found.ranks.shape, found.coverage.shape, found.tarp.shape) == ((1000, 2), (1000,), (1000,))
    assert found.sbc_p == min(1, 2 * float(found.rank_p.min()))
    for shares in (found.ranks, found.coverage, found.tarp):
        assert ((shares >= 0) & (shares <= 1)).all()
        # The mean of 1000 uniform numbers has the standard error sqrt(1 / 12 / 1000).
        assert ((shares.mean(0) - 0.5).abs() < 4 / math.sqrt(12_000)).all()


def test_p_values_of_an_exact_guide_are_uniform():
    """The p-values are collected over several seeds."""
    guide, found = posterior(), []
    for seed in range(24):
        pyro.set_rng_seed(seed)
        one = calibrate(conjugate, guide, num_simulations=200, num_samples=50)
        found.append([*one.rank_p.tolist(), one.coverage_p, one.tarp_p])
    p = torch.tensor(found, dtype=torch.float64)
    # p is twice the smaller of two nearly independent p-values: P(p < t) = t - t² / 4, and p = 1 in a quarter of cases.
    u = torch.where(p < 1, p - p**2 / 4, 0.75 + 0.25 * torch.rand_like(p))
    for column in u.T.numpy():
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert (p < 0.01 / 3).sum() <= 4  # of 96 p-values


ERRORS = wrong(0.8, 1.3, 0.4)


@pytest.mark.parametrize(("how", "settings"), ERRORS.items(), ids=list(ERRORS))
def test_an_error_is_found_and_named(how, settings):
    found = run(conjugate, posterior(**settings))
    assert not found.calibrated
    assert found.sbc_p < 1e-4
    assert f" are not uniform, since its draws lie {how}" in found.reason


def test_the_reason_names_the_tests_that_fail():
    even = torch.linspace(0.001, 0.999, 500)
    exact = {"names": ["rate"], "ranks": even[:, None], "coverage": even, "tarp": even, "rank_p": torch.tensor([0.5])}
    exact |= {"sbc_p": 0.5, "coverage_p": 0.5, "tarp_p": 0.5}
    assert "regions of 90 %" in Calibration(**exact).reason
    ranks = Calibration(**{**exact, "ranks": even[:, None] ** 2, "sbc_p": 1e-9}).reason
    assert ranks == "The draws are not calibrated: the ranks of rate are not uniform, since its draws lie too high."
    narrow = Calibration(**{**exact, "coverage": even**0.5, "coverage_p": 1e-9}).reason
    assert narrow.endswith(": 81.0 % of the truths lie in regions of 90 %, since the draws lie too narrow.")
    middle = Calibration(**{**exact, "tarp": torch.where(even > 0.85, even, even**2 / 0.85), "tarp_p": 1e-9}).reason
    assert ": by TARP 65.2 % of the truths lie in regions of 50 %" in middle


@pytest.mark.parametrize("settings", [{"width": 0.7}, {"width": 1.4}, {"shift": 0.8}])
def test_each_test_sees_what_is_wrong(settings):
    found = run(conjugate, posterior(**settings), num_simulations=2000)
    assert max(found.sbc_p, found.coverage_p) < 1e-6
    assert found.tarp_p < 1e-3


def test_levels_of_coverage_are_those_of_the_chi_square():
    """With 0.8 times the width, the region of level γ contains the true value with a known smaller probability."""
    found = run(conjugate, posterior(width=0.8), num_simulations=4000, num_samples=200)
    for level in (0.5, 0.9):
        radius = stats.chi2.ppf(level, 2)
        wanted = stats.chi2.cdf(radius * 0.64, 2)
        share = float((found.coverage <= level).double().mean())
        # With 200 draws, a level has an error of at most .035; its noise averages out up to a bias of 1 / 200.
        assert abs(share - wanted) < 4 * math.sqrt(0.25 / 4000) + 1 / 200


def test_bounds_and_plates():
    """Latents have different supports and plates; the densities are those of constrained values."""

    def bounded(x=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Beta(2.0, 2.0))
            return pyro.sample("x", dist.Normal(z * rate, 0.5), obs=x)

    small = functools.partial(flows.nsf_ar, num_transforms=1, hidden_dims=(8,))
    guide = AutoFlow(bounded, small, encoder=MLPEncoder(3, 4, (8,)))
    fit_amortized(bounded, guide, simulations=200, max_epochs=1, progress=False)
    found = calibrate(bounded, guide, num_simulations=50, num_samples=20)
    assert found.names == ["rate", "z[0]", "z[1]", "z[2]"]
    assert found.ranks.shape == (50, 4)


def test_coverage_of_constrained_values():
    """Density regions of positive values: the exact guide of the log-normal model passes."""
    prior = dist.LogNormal(torch.zeros(2), 1.0).to_event(1)
    positive = simulator(lambda theta: dist.Normal(theta.log(), 1.0).to_event(1), prior)
    for width in (1.0, 0.7):
        guide = gaussian(positive, lambda x, width=width: (x / 2, torch.full_like(x, width * 0.5**0.5)))
        found = run(positive, guide)
        assert found.calibrated == (width == 1)
        assert (found.coverage_p < 1e-6) == (width < 1)


def test_one_by_one():
    found = calibrate(Program(conjugate, vectorize="loop"), posterior(), num_simulations=100, num_samples=40)
    assert min(found.sbc_p, found.coverage_p, found.tarp_p) > 1e-4


def test_keyword_arguments_reach_the_model():
    found = run(conjugate, posterior(), num_simulations=300, noise=5.0)
    assert found.sbc_p < 1e-6  # the guide is exact for noise 0.5


def test_uniformity():
    counts = torch.randint(0, 101, (2000,)) / 100.0
    assert uniformity(counts, 100) > 1e-3
    for other in (counts * 0.9, 0.5 + (counts - 0.5) * 0.85, torch.full((50,), 0.5), torch.zeros(50)):
        assert uniformity(other, 100) < 1e-4
    # The shares of two draws take three values: they are uniform, and have little power.
    assert uniformity(torch.randint(0, 3, (2000,)) / 2.0, 2) > 1e-3


# Errors.


LEAST = {  # of each number
    calibrate: {"num_simulations": 20, "num_samples": 20},
    local_c2st: {"num_simulations": 1000, "num_samples": 10, "num_null": 100},
    misspecification: {"num_simulations": 99, "num_samples": 10},
}
every_test = pytest.mark.parametrize("test", LEAST, ids=lambda test: test.__name__)


def refused(words, test, model, guide, **settings):
    observed = {} if test is calibrate else {"observed": {"x": torch.zeros(2)}}
    with pytest.raises(ValueError, match=words):
        test(model, guide, **observed, **settings)


@every_test
def test_numbers_out_of_range_are_refused(test):
    for name, least in LEAST[test].items():
        for value in (least - 1, float(least), True):
            words = f"{test.__name__}: {name} must be an integer of at least {least}"
            refused(words, test, conjugate, posterior(), **{name: value})
    for level in () if test is calibrate else (0.0, 1.0):
        refused(f"{test.__name__}: level must lie between 0 and 1", test, conjugate, posterior(), level=level)


@every_test
def test_guides_that_are_not_amortised_are_refused(test):
    words = f"{test.__name__}: guide must be an AutoFlow with an encoder"
    for guide, got in (AutoFlow(conjugate).setup(torch.zeros(2)), "AutoFlow without one"), (3, "int"):
        refused(f"{words}.*got {got}", test, conjugate, guide)
    refused("the guide was never trained", test, conjugate, AutoFlow(conjugate, encoder=MLPEncoder(2, 2)))


@every_test
def test_models_of_other_latents_are_refused(test):
    def other(x=None):
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(phi, 1.0).to_event(1), obs=x)

    words = r"latent site 'theta' is not in the model, which has 'phi', but the guide was built for one of shape \(2,\)"
    refused(f"{test.__name__}: with these arguments {words}. Give the model that", test, other, posterior())


def test_models_that_cannot_be_simulated_are_refused():
    def coded(x=None):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(theta, 1.0).to_event(1), obs=torch.zeros(2))

    with pytest.raises(ValueError, match=r"calibrate: .*site 'x' is observed though no argument"):
        calibrate(coded, posterior())
