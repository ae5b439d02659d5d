"""The local test accepts exact guides, and rejects those that are wrong at the observation, whatever the error."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_guides import conjugate, gaussian, posterior, simulator, wrong
from models import normals
from scipy import stats

from pyro_flows import AutoFlow, fit_amortized, flows, local_c2st
from pyro_flows.diagnostics import LocalC2ST
from pyro_flows.diagnostics.amortised import p_value, scaled
from pyro_flows.diagnostics.local_c2st import Proposal, neighbours_of
from pyro_flows.encoders import MLPEncoder
from pyro_flows.programs import Program
from pyro_flows.programs.simulator import Simulator

X = torch.tensor([1.0, -0.5])
FAR = torch.tensor([3.0, -3.0])  # 2.7 standard deviations of the data from their mean, in each direction
run = functools.partial(local_c2st, conjugate, observed={"x": X}, num_simulations=5000)


def test_an_exact_guide_passes():
    found = run(posterior())
    assert found.passed is True
    assert found.reason.startswith("No test finds an error for this dataset (p = ")
    assert repr(found).startswith("LocalC2ST(passed=True, p_value=")
    assert found.names == ["theta[0]", "theta[1]"]
    assert found.truths.shape == found.draws.shape == (300, 2)
    assert (found.distance.diff() >= 0).all()
    assert found.p_value == (1 + int((found.null >= found.statistic).sum())) / 1000
    # Four numbers that are about N(0, 1).
    assert torch.stack((found.location, found.spread)).abs().max() < 4.5


ERRORS = wrong(0.75, 1.4, 0.5)


@pytest.mark.parametrize("near", [None, X], ids=["everywhere", "here"])
@pytest.mark.parametrize(("how", "settings"), ERRORS.items(), ids=list(ERRORS))
def test_an_error_is_found_and_named(how, settings, near):
    found = run(posterior(**settings, near=near))
    assert not found.passed
    assert f"(p = {found.p_value:.2g}): the draws of " in found.reason
    assert f" lie {how}. Means are off by up to " in found.reason
    assert found.p_value < 0.005
    signed = found.spread if "width" in settings else found.location
    assert (signed > 0).all() == (how in ("too narrow", "too low"))
    if near is None:  # each is an average over about 200 rows
        assert (found.ratio - 1 / settings.get("width", 1)).abs().max() < 0.25
        assert (found.shift + settings.get("shift", 0)).abs().max() < 0.3


def test_an_exact_guide_of_many_latents_far_narrower_than_the_prior_passes():
    """Its posterior is more than e⁵⁰ times as dense as the prior; a bound on that ratio would fail such guides."""
    narrow = simulator(lambda theta: dist.Normal(theta, 0.1).to_event(1), normals(30))
    guide = gaussian(narrow, lambda x: (x / 1.01, torch.full_like(x, 0.1 / 1.01**0.5)))
    assert local_c2st(narrow, guide, observed={"x": narrow()}, num_simulations=4000, num_null=200).passed


def test_an_error_elsewhere_is_not_found():
    found = run(posterior(width=0.7, near=X + torch.tensor([1.5, 0.0])))
    assert found.p_value > 1e-3  # a test of 1000 statistics has no smaller one


def test_a_guide_that_ignores_the_data_fails():
    found = run(gaussian(conjugate, lambda x: (0 * x, 0 * x + 1)))
    assert not found.passed


def test_a_wrong_correlation_is_found():
    """The posterior of two terms of a sum has a negative correlation, and the guide has the right marginals."""

    def moments(x):
        return tuple(part.expand(*x.shape[:-1], 2) for part in (x / 2.25, torch.full_like(x, (1.25 / 2.25) ** 0.5)))

    sum_of_two = simulator(lambda theta: dist.Normal(theta.sum(-1, keepdim=True), 0.5).to_event(1))
    found = local_c2st(sum_of_two, gaussian(sum_of_two, moments), observed={"x": torch.ones(1)}, num_simulations=5000)
    assert found.fault == "the correlation of the draws of theta[0] and theta[1] is too high"


def folded(theta):
    """The absolute value of one latent is observed, so that its posterior has two modes."""
    return dist.Normal(torch.stack((theta[..., 0].abs(), theta[..., 1]), -1), 0.1).to_event(1)


def test_a_gaussian_in_place_of_two_modes_is_found():
    def moments(x):
        sd = (x[..., :1].square() + 0.01).sqrt()
        return torch.cat((0 * x[..., :1], x[..., 1:]), -1), torch.cat((sd, torch.full_like(sd, 0.1)), -1)

    model, observed = simulator(folded), {"x": torch.tensor([1.0, 0.0])}
    found = local_c2st(model, gaussian(model, moments), observed=observed, num_simulations=5000)
    assert not found.passed
    assert "of theta[0] has a wrong shape" in found.fault or "joint distribution" in found.fault


@pytest.mark.slow
@pytest.mark.parametrize("x", [X, FAR], ids=["typical", "far"])
def test_p_values_of_an_exact_guide_are_uniform(x):
    guide, found = posterior(), []
    for seed in range(100):
        pyro.set_rng_seed(seed)
        found.append(local_c2st(conjugate, guide, observed={"x": x}, num_simulations=2000, num_null=199).p_value)
    assert stats.kstest(found, "uniform").pvalue > 1e-3


@pytest.mark.slow
def test_local_errors_at_any_observation_are_found():
    """The scale is reduced by 20 % near the observation, within a third of the standard deviation of the data."""
    failed = 0
    for seed in range(40):
        pyro.set_rng_seed(seed)
        x = conjugate()
        guide = posterior(width=0.8, near=x, reach=math.sqrt(1.25) / 3)
        failed += not local_c2st(conjugate, guide, observed={"x": x}).passed
    assert failed >= 38  # in the benchmark at least 99 of 100


@torch.no_grad()
def nearby(model, guide, x, number=400):
    simulator = Simulator("test", model, (), {})
    how = {"num_simulations": 4000, "number": number, "num_samples": 40}
    return neighbours_of(guide, simulator, {"x": x.unsqueeze(0)}, **how)


@pytest.mark.parametrize("x", [X, FAR], ids=["typical", "far"])
def test_the_true_latents_are_one_of_the_candidates(x):
    """Half of the latents are proposed near the observation.  The weights of the candidates take account of this."""
    found = nearby(conjugate, posterior(), x)
    assert found.numbers.shape == found.base.shape == (400, 41, 2)
    assert found.distance[0] < 0.2 < found.distance[-1]
    z = {}
    for kind, log_weights in ("right", found.log_weights), ("even", torch.zeros_like(found.log_weights)):
        shares = log_weights.softmax(1)
        expected = (shares.unsqueeze(-1) * found.base).sum(1)
        variance = (shares.unsqueeze(-1) * (found.base - expected.unsqueeze(1)).square()).sum(1)
        z[kind] = (found.base[:, 0] - expected).sum(0) / variance.sum(0).sqrt()
    assert z["right"].abs().max() < 4
    if x is FAR:
        assert z["even"].abs().max() > 5


def test_base_coordinates_are_those_of_the_latents():
    found = nearby(conjugate, posterior(), X)
    sd = math.sqrt(0.2)
    centre = (found.numbers - sd * found.base)[:, :1]  # 0.8 x, the same for all candidates of a row
    assert torch.allclose(found.numbers - sd * found.base, centre.expand_as(found.numbers), atol=1e-4)


def test_hidden_latents_before_those_of_the_guide_leave_the_prior():
    """The prior of theta has no density that one run shows, so all simulations are from the prior."""

    def scaled_prior(x=None):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), scale.unsqueeze(-1)).to_event(1))
        return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)

    shown = pyro.poutine.block(scaled_prior, hide=["scale"])
    guide = gaussian(shown, lambda x: (0.8 * x, torch.full_like(x, 0.45)))
    simulator = Simulator("test", scaled_prior, (), {})
    proposal = Proposal(simulator, guide.of_datasets(X[None]))
    assert not proposal.is_mixed
    assert (proposal.log_weights(torch.randn(5, 2)) == 0).all()
    assert local_c2st(scaled_prior, guide, observed={"x": X}, num_simulations=1000).null.shape == (999,)


@pytest.mark.slow
def test_bounds_plates_and_angles():
    def bounded(x=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        turn = pyro.sample("turn", dist.VonMises(0.0, 1.0))
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Beta(2.0, 2.0))
            return pyro.sample("x", dist.Normal(z * rate + turn.cos(), 0.5), obs=x)

    small = functools.partial(flows.circular_coupling, circular=[False, True, *[False] * 3], num_transforms=2)
    guide = AutoFlow(bounded, small, encoder=MLPEncoder(3, 4, (8,)))
    fit_amortized(bounded, guide, simulations=200, max_epochs=1, progress=False)
    found = local_c2st(bounded, guide, observed={"x": bounded()}, num_simulations=1000)
    assert found.names == ["rate", "turn", "z[0]", "z[1]", "z[2]"]
    assert found.truths.isfinite().all()


@pytest.mark.slow
def test_one_by_one():
    model, how = Program(conjugate, vectorize="loop"), {"num_simulations": 1000, "num_null": 100}
    assert local_c2st(model, posterior(), observed={"x": X}, **how).p_value > 1e-2 / 2


def test_keyword_arguments_reach_the_model():
    assert not run(posterior(), noise=2.0).passed  # the guide is exact for noise 0.5


def test_statistics_are_scaled():
    value = scaled(torch.arange(101.0) * 3)
    assert (value[50], value[98], p_value(value, 100)) == (0, 1, 1 / 101)


def test_plot():
    found = run(posterior(width=0.5))
    figure = found.plot()
    assert len(figure.axes) == 3
    assert found.reason[:30] in figure._suptitle.get_text()
    figure.canvas.draw()


def test_the_reason_counts_the_simulations():
    z = torch.zeros(5, 1)
    distance = torch.linspace(0, 0.5, 5)
    found = LocalC2ST(["a"], 0.1, torch.rand(99), 0.4, 0.01, "", z[0], z[0], z[0], z[0], z, z, distance)
    assert "(p = 0.4), by 5 simulations within 0.5 standard deviations" in found.reason


# Errors.


@pytest.mark.parametrize(
    ("observed", "words"),
    [
        ({}, r"observed must hold one dataset, observed=\{'x': ...\}, got"),
        ({"y": X}, r"observed must hold one dataset, observed=\{'x': ...\}, got"),
        ({"x": X[None]}, r"observed\['x'\] must have shape \(2,\), got \(1, 2\)"),
        ({"x": X * math.nan}, r"observed\['x'\] must be finite"),
    ],
)
def test_observations_that_do_not_fit_are_refused(observed, words):
    with pytest.raises(ValueError, match="local_c2st: " + words):
        local_c2st(conjugate, posterior(), observed=observed)


NOWHERE = r"local_c2st: observed must lie near some simulations, but {}\. Call misspecification.*num_simulations=5000\."


@pytest.mark.parametrize("x", [20.0, 1e3, 1e30])
def test_an_observation_with_no_simulations_near_is_refused(x):
    words = NOWHERE.format(r"the nearest 75 are up to (\d.*|inf) standard deviations of its posterior away")
    with pytest.raises(ValueError, match=words):
        run(posterior(), observed={"x": torch.full((2,), x)})


@pytest.mark.parametrize("x", [12.0, 1e30])
def test_a_guide_that_is_blind_to_huge_data_does_not_hide_that_no_simulations_are_near(x):
    guide = gaussian(conjugate, lambda x: (0.8 * x.clamp(-4.5, 4.5), torch.full_like(x, 0.2**0.5)))
    with pytest.raises(ValueError, match=NOWHERE.format("its data lie outside of those of the nearest 300")):
        run(guide, observed={"x": torch.full((2,), x)})


def test_counts_that_many_simulations_share_lie_near_them():
    """Contexts of equal data differ by round-off, of which standard deviations are no measure."""
    model = simulator(lambda rate: dist.Poisson(rate.expand(3)).to_event(1), dist.LogNormal(0.0, 1.0))
    guide = AutoFlow(model, flows.iaf, encoder=MLPEncoder(3, context_dim=4))
    fit_amortized(model, guide, simulations=200, max_epochs=1, progress=False)
    assert local_c2st(model, guide, observed={"x": torch.zeros(3)}, num_simulations=5000).distance.isfinite().all()


def test_simulations_that_fail_are_left_out():
    unstable = simulator(lambda theta: dist.Normal(theta + 0 * (2 + theta).sqrt(), 0.5).to_event(1))
    guide = gaussian(unstable, lambda x: (0.8 * x, torch.full_like(x, 0.2**0.5)))
    found = local_c2st(unstable, guide, observed={"x": X}, num_simulations=5000)
    assert found.truths.isfinite().all()
    assert found.p_value > 1e-3


def test_simulations_without_finite_data_are_refused():
    broken = simulator(lambda theta: dist.Delta(theta / 0 * 0, event_dim=1))
    guide = AutoFlow(broken, encoder=MLPEncoder(2, 4, (8,))).setup(torch.zeros(2))
    with pytest.raises(ValueError, match="local_c2st: at least 20 of 100 simulations must have finite data, got 0"):
        local_c2st(broken, guide, observed={"x": torch.zeros(2)}, num_simulations=1000)


def test_draws_that_are_not_finite_have_the_error_of_the_guide():
    guide = AutoFlow(conjugate, encoder=MLPEncoder(2, 4, (8,)))
    fit_amortized(conjugate, guide, simulations=100, max_epochs=1, progress=False)
    with pytest.raises(FloatingPointError, match=r"the data lie up to .* standard deviations from the mean"):
        run(guide, observed={"x": torch.full((2,), 1e30)}, num_simulations=1000)
