"""An ensemble is the equal mixture of its members, in all that a guide does, and it is less overconfident than they."""

import copy
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_guides import conjugate, gaussian, posterior, simulator
from pyro.infer import Predictive, Trace_ELBO

import pyro_flows as pf
from pyro_flows import AutoFlow, ensemble, fit_amortized, flows, local_c2st, misspecification
from pyro_flows.encoders import Arguments, Joined, MLPEncoder
from pyro_flows.flows.mixture import FlowMixture

X = torch.tensor([1.0, -0.5])
small = functools.partial(flows.nsf_ar, num_transforms=1, hidden_dims=(16,))


@pytest.fixture(scope="module")
def members() -> list[AutoFlow]:
    pyro.set_rng_seed(0)
    known = pf.simulate(conjugate, num_simulations=100)
    found = []
    for _ in range(3):
        encoder = Arguments(MLPEncoder(2, 4, (8,)), 0)
        guide = AutoFlow(conjugate, lambda dim, context_dim: small(dim, context_dim), encoder=encoder)
        fit_amortized(conjugate, guide, simulations=known, max_epochs=2, progress=False)
        found.append(guide)
    return found


@pytest.fixture(scope="module")
def guide(members) -> AutoFlow:
    return ensemble(members)


def test_the_density_is_the_mean_of_those_of_the_members(members, guide):
    x = torch.randn(4, 2)
    draws = guide.sample(7, x)
    assert draws["theta"].shape == (7, 4, 2)
    each = torch.stack([member.log_prob(draws, x) for member in members])
    assert torch.allclose(guide.log_prob(draws, x), each.logsumexp(0) - math.log(3), atol=1e-5)


def test_draws_are_those_of_the_members_in_equal_parts():
    """Members that lie far apart tell which of them drew."""
    far = ensemble([posterior(shift=shift) for shift in (-40.0, 0.0, 40.0)])
    for draws in (far.sample(3000, X)["theta"], Predictive(conjugate, guide=far, num_samples=100)(X)["theta"]):
        z = (draws.reshape(-1, 2) - 0.8 * X) / math.sqrt(0.2)
        shares = torch.stack([((z - shift).abs() < 10).all(1).double().mean() for shift in (-40, 0, 40)])
        assert shares.sum() == 1
        assert (shares - 1 / 3).abs().max() < 4 * (2 / 9 / len(z)) ** 0.5


def test_it_is_independent_of_its_members(members):
    own = ensemble(members)
    before = own.log_prob({"theta": X}, X)
    for parameter in members[0].parameters():
        parameter.data.add_(1e-2)
    assert own.log_prob({"theta": X}, X) == before
    assert copy.deepcopy(own).log_prob({"theta": X}, X) == before
    for parameter in members[0].parameters():
        parameter.data.sub_(1e-2)


def test_a_bound_ensemble_is_that_of_bound_members(guide):
    own, draws = guide.bind(X), guide.sample(5, X)
    assert own.encoder is None
    assert torch.allclose(own.log_prob(draws), guide.log_prob(draws, X), atol=1e-5)


def test_pyro_takes_it_as_a_guide(guide):
    assert Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=0).loss(conjugate, guide, X) < 20
    trace = pyro.poutine.trace(guide).get_trace(X)
    log_q = guide.log_prob({"theta": trace.nodes["theta"]["value"]}, X)
    assert torch.allclose(trace.log_prob_sum(), log_q, atol=1e-5)


@pytest.mark.parametrize("bound", [False, True])
def test_what_weighs_draws_takes_it(bound):
    exact = ensemble([posterior(), posterior()])
    own = exact.bind(X) if bound else exact
    found = pf.psis(conjugate, own, X, num_samples=1000)
    assert found.ess > 990
    assert found.log_evidence == pytest.approx(float(dist.Normal(0.0, 1.25**0.5).log_prob(X).sum()), abs=0.01)
    assert pf.resample(conjugate, own, X, num_samples=10, num_weighed=100)["theta"].shape == (10, 2)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [False, True])
def test_check_takes_it(bound):
    exact = ensemble([posterior(), posterior()])
    assert pf.check(conjugate, exact.bind(X) if bound else exact, X).trusted
    narrow = ensemble([posterior(0.6), posterior(0.6)])
    assert not pf.check(conjugate, narrow.bind(X) if bound else narrow, X).trusted


def test_tests_of_calibration_and_of_one_observation_take_it():
    for width in (1.0, 0.6):
        own = ensemble([posterior(width), posterior(width)])
        found = pf.calibrate(conjugate, own, num_simulations=400, num_samples=100)
        local = local_c2st(conjugate, own, observed={"x": X}, num_simulations=3000)
        assert found.calibrated == local.passed == (width == 1)
    assert misspecification(conjugate, own, observed={"x": X}, num_simulations=99, num_samples=10).passed
    assert not misspecification(conjugate, own, observed={"x": 20 * X}, num_simulations=99, num_samples=10).passed


def test_members_whose_errors_differ_are_wrong_and_their_ensemble_less_so():
    """Two members that err to opposite sides fail; their mixture, which is too wide, has a better coverage."""
    one, other = posterior(0.7, shift=-0.7), posterior(0.7, shift=0.7)
    inside = []
    for own in (one, other, ensemble([one, other])):
        found = pf.calibrate(conjugate, own, num_simulations=1000, num_samples=100)
        inside.append(float((found.coverage <= 0.9).double().mean()))
    assert max(inside[:2]) < 0.72
    assert inside[2] > 0.77


def test_files_hold_it(guide, tmp_path):
    pf.save(guide, tmp_path / "guide.pt")
    again, x = pf.load(tmp_path / "guide.pt"), torch.randn(4, 2)
    draws = again.sample(5, x)
    assert torch.equal(again.log_prob(draws, x), guide.log_prob(draws, x))
    pf.save(guide.bind(X), tmp_path / "own.pt")
    assert torch.equal(pf.load(tmp_path / "own.pt").log_prob(draws), guide.bind(X).log_prob(draws))


# Errors.


def test_what_does_not_fit_is_refused_with_the_way_out(members):
    first, network = members[0], MLPEncoder(2, 4, (8,))
    shared = [AutoFlow(conjugate, small, encoder=Arguments(network, 0)) for _ in range(2)]
    for one in shared:
        fit_amortized(conjugate, one, simulations=40, max_epochs=1, progress=False)
    untrained = AutoFlow(conjugate, encoder=MLPEncoder(2, 4, (8,))).setup(X)
    other = simulator(
        lambda theta: dist.Normal(theta, 0.5).to_event(1), dist.LogNormal(torch.zeros(2), 1.0).to_event(1)
    )
    for guides, words in (
        (first, "ensemble: guides must be a list of AutoFlows"),
        ([first], "at least two guides, got 1"),
        ([first, AutoFlow(conjugate)], r"guides\[1\] must have an encoder"),
        ([first, untrained], r"guides\[1\] must be trained"),
        ([first, gaussian(other, lambda x: (x, 0 * x + 0.5))], "must have the same latents, got"),
        (shared, r"got a network that is shared.*Build an encoder for each"),
        ([first, ensemble(members)], r"guides\[1\] must be a single guide, got an ensemble\. Give its members"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            ensemble(guides)


def test_what_needs_one_transform_refuses_it(guide):
    own = guide.bind(X)
    with pytest.raises(ValueError, match=r"fit_svi cannot train an ensemble.*Train one of its members"):
        pf.fit_svi(conjugate, own, X, steps=2, progress=False)
    for run in (own.get_transform, own.get_base_dist, lambda: own.start):
        with pytest.raises(NotImplementedError, match=r"is no single transform .*Use one of its flows"):
            run()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: FlowMixture([flows.nsf(2), 3]), "FlowMixture: flows must be flows of pyro_flows"),
        (lambda: FlowMixture([flows.nsf(2), flows.nsf(3)]), r"over vectors of one size, got \[\(2,\), \(3,\)\]"),
        (lambda: Joined([]), "Joined: networks must hold at least one network"),
        (lambda: Joined([MLPEncoder]), "Joined: networks must be a network or a function, got <class"),
    ],
)
def test_mixtures_and_joined_encoders_refuse_what_does_not_fit(build, words):
    with pytest.raises((TypeError, ValueError), match=words):
        build()


def test_joined_encoders_choose_their_own_arguments():
    """Each takes the arguments that it asks for, by position or by name, and one that is left out is None."""

    def model(n, x=None, y=None, *, scale=1.0):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        x = pyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(mean[..., :1].expand(*mean.shape[:-1], n), 1.0).to_event(1), obs=y)

    encoder = Joined([Arguments(MLPEncoder(2, 4, (8,)), 1), Arguments(MLPEncoder(3, 5, (8,)), 2)])
    guide = AutoFlow(model, small, encoder=encoder)
    fit_amortized(model, guide, 3, simulations=40, max_epochs=1, progress=False)
    assert guide.flow.context_dim == 9
    x, y = torch.randn(2), torch.randn(5, 3)
    assert guide.sample(4, 3, x, y[0])["mean"].shape == (4, 2)
    with pytest.raises(ValueError, match=r"contexts of one batch \(\*batch, n\), got shapes \(4,\), \(5, 5\)"):
        guide.sample(4, 3, x, y)
