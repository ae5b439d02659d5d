"""Importance sampling diagnostics.

``psis`` finds known values of k-hat and of the evidence, and raises errors for models and guides without weights.
"""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Y, beyond, nested, sampling
from pyro.infer.autoguide import AutoDelta

from pyro_flows import AutoFlow, flows, psis, to_arviz
from pyro_flows.diagnostics import importance
from pyro_flows.diagnostics.importance import weigh
from pyro_flows.programs import Program

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(16,))


target = sampling(x=dist.Normal(0.0, 1.0))


def gaussian(scale: float):
    return sampling(x=dist.Normal(0.0, scale))


# Pareto-smoothed importance sampling.


@pytest.mark.parametrize(("scale", "low", "high"), [(0.5, 0.6, 1.0), (0.95, -1.0, 0.3), (1.5, -math.inf, 0.3)])
def test_khat_of_gaussians(scale, low, high):
    """For a Gaussian guide of scale s < 1 and a standard normal, the weights' tail has the shape 1 - s²."""
    checked = psis(target, gaussian(scale), num_samples=10_000)
    assert low < checked.khat < high
    assert (checked.threshold, checked.reliable) == (pytest.approx(0.7), checked.khat < 0.7)
    assert 1 <= checked.ess < 10_000


def test_evidence_and_its_standard_error():
    runs = [psis(target, gaussian(0.9), num_samples=1000) for _ in range(20)]
    evidence = torch.tensor([run.log_evidence for run in runs])
    error = torch.tensor([run.log_evidence_se for run in runs])
    assert (evidence.abs() < 4 * error).all()  # the evidence is 1
    # The relative error of an sd of 20 runs is 1 / sqrt(2 · 19) = 16 %; four of these are 65 %.
    assert 0.35 < (evidence.std() / error.mean()).item() < 1.65


def test_effective_sample_size():
    """For q = N(0, s²) against p = N(0, 1): E w² = s² / sqrt(2 s² - 1), so ess / S is sqrt(2 s² - 1) / s²."""
    checked = psis(target, gaussian(1.2), num_samples=20_000)
    assert checked.ess / 20_000 == pytest.approx(math.sqrt(2 * 1.44 - 1) / 1.44, rel=0.02)


def test_equal_densities():
    checked = psis(target, gaussian(1.0), num_samples=400)
    assert (checked.khat, checked.reliable) == (-math.inf, True)
    assert checked.ess == pytest.approx(400)
    assert (checked.log_evidence, checked.log_evidence_se) == pytest.approx((0, 0), abs=1e-6)


def test_even_weights_are_reliable_whatever_the_shape_of_their_tail():
    """The tail is heavy, but its size is a thousandth."""
    log_weights = 1e-3 * dist.Pareto(1.0, 1.0).sample((10_000,)).clamp_max(500)
    found = weigh(log_weights)
    assert found.khat > found.threshold
    assert (found.even, found.reliable) == (True, True)
    assert not weigh(log_weights + 2 * (torch.arange(10_000) == 0)).even


def test_few_draws_lower_the_threshold():
    assert psis(target, gaussian(0.9), num_samples=100).threshold == pytest.approx(0.5)


def test_log_weights_are_raw():
    """Log-weights are log p(x, y) - log q(x) of each draw, neither normalised nor smoothed."""
    seen, prior, law = [], dist.Normal(0.0, 1.0), dist.Normal(15.0, 0.5)

    def model():
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(30.0))

    checked = psis(model, lambda: seen.append(pyro.sample("x", law)), num_samples=50)
    x = seen[-1]
    expected = prior.log_prob(x) + dist.Normal(x, 1.0).log_prob(torch.tensor(30.0)) - law.log_prob(x)
    torch.testing.assert_close(checked.log_weights, expected)
    assert checked.log_weights.max() < -200


@pytest.fixture
def guide():
    return AutoFlow(nested, small, init_scale=0.5).setup(Y)


def test_draws_that_run_in_parts_have_the_same_shapes(guide, monkeypatch):
    monkeypatch.setattr(importance.Weighing, "at_once", lambda *_: 7)
    assert psis(nested, guide, Y, num_samples=30).log_weights.shape == (30,)
    data = to_arviz(nested, guide, Y, num_samples=30)
    assert data.posterior["pair"].shape == (1, 30, 2, 3, 2)
    assert data.log_likelihood["y"].shape == (1, 30, 2, 3)


def test_model_keyword_arguments(guide):
    """Keyword arguments are passed directly, or by a ``Program`` if names clash."""

    def clashing(y, num_samples=None):
        nested(y, noise=num_samples)

    pyro.set_rng_seed(1)
    straight = psis(nested, guide, Y, num_samples=30, noise=3.0)
    pyro.set_rng_seed(1)
    clash = psis(Program(clashing, kwargs={"num_samples": 3.0}), guide, Y, num_samples=30)
    torch.testing.assert_close(straight.log_weights, clash.log_weights)


def test_leaves_no_trace_in_an_outer_handler():
    with pyro.poutine.trace() as outer:
        psis(target, gaussian(0.9), num_samples=30)
    assert not [name for name, site in outer.trace.nodes.items() if site["type"] == "sample"]


@pytest.mark.parametrize("function", [psis, to_arviz])
def test_too_few_draws_are_refused(function):
    with pytest.raises(ValueError, match=r"num_samples must be an integer of at least 25.*got 24"):
        function(target, gaussian(1.0), num_samples=24)


def test_weights_that_are_not_finite_are_refused():
    good = torch.randn(50)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="1 of 50 log-weights are NaN or"):
            weigh(torch.cat((good[1:], torch.tensor([value]))))
    with pytest.raises(ValueError, match="all log-weights are -inf"):
        weigh(torch.full((50,), -math.inf))
    some = good.where(torch.arange(50) > 4, -math.inf)  # draws outside the model's support have weight zero
    assert math.isfinite(weigh(some).log_evidence)


def test_guide_outside_the_support_is_refused():
    with pytest.raises(ValueError, match="all log-weights are -inf"):
        psis(beyond(100.0), gaussian(1.0), num_samples=50)


def test_a_subsampled_plate_is_refused_by_name():
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=4):
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(4))

    with pytest.raises(ValueError, match=r"plate 'rows', which is subsampled \(4 of 10 rows\)"):
        psis(model, target, num_samples=100)


def test_the_error_of_the_evidence_has_room_for_what_was_not_drawn():
    """Pareto weights of shape .6 have infinite variance, so their sample variance underestimates the error."""
    within = 0
    for _ in range(200):
        found = weigh(-0.6 * torch.rand(1000, dtype=torch.float64).log())
        within += abs(found.log_evidence - math.log(2.5)) < 2 * found.log_evidence_se
    assert within > 200 * 0.93 - 3 * (200 * 0.93 * 0.07) ** 0.5
    assert weigh(torch.zeros(100)).log_evidence_se == 0
    assert weigh(-2 * torch.rand(1000).log()).log_evidence_se == math.inf  # they have no mean


def test_a_point_is_refused():
    with pytest.raises(ValueError, match="the guide is a point"):
        psis(target, AutoDelta(target), num_samples=100)
