"""Early end of runs: it comes after convergence, at the same step in resumed runs; other runs take all steps."""

import math
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows import AutoFlow, fit_svi, psis
from pyro_flows.fitting.elbo_loss import is_close, is_steady
from pyro_flows.training.stopping import FEWEST, FINISH, LOOK, Horizon, noise_at

STEPS, NOISE = 200, 0.1
LOUD, NEARLY, QUIET = [1.0, 2.0] * 50, [1.0, 1.4] * 50, [1.0, 1.1] * 50  # with sds .5, .2 and .05


def shares(horizon: Horizon, losses: list[float]) -> list[float]:
    """Return the sizes of all steps of a run with the given losses."""
    taken: list[float] = []
    while len(taken) < horizon.last:
        taken.append(horizon.share(len(taken) + 1))
        horizon.observe(losses[: len(taken)])
    return taken


def test_all_steps_are_taken_while_losses_are_loud():
    for noise, losses in ((NOISE, 2 * LOUD), (0.0, 2 * QUIET)):
        taken = shares(Horizon(STEPS, noise), losses)
        assert len(taken) == STEPS
        peak = taken.index(max(taken))
        assert taken[:peak] == sorted(taken[:peak])
        assert taken[peak:] == sorted(taken[peak:], reverse=True)
        assert taken[-1] < 1e-3
    assert len(shares(Horizon(60, NOISE), 2 * QUIET)) == 60  # too few to end early


@pytest.mark.parametrize("loud", [0, 1, 3, 4])
def test_a_run_that_has_converged_ends_soon(loud):
    horizon = Horizon(STEPS, NOISE)
    taken = shares(horizon, LOUD[: loud * LOOK] + 2 * QUIET)
    converged = (loud + 1) * LOOK
    assert (horizon.converged_at, len(taken)) == (converged, converged + max(FINISH, converged // 2))
    assert taken[converged] == pytest.approx(Horizon(STEPS, 0.0).share(converged))  # no jump
    assert taken[converged:] == sorted(taken[converged:], reverse=True)
    assert taken[-1] < 0.002


@pytest.mark.parametrize(
    ("losses", "seen", "converged"),
    [(QUIET, [], 50), (NEARLY, [True], 50), (NEARLY, [False, True], 75), (NEARLY, [False] * 7, None), (LOUD, [], None)],
    ids=["by losses", "at once", "later", "never", "too far"],
)
def test_draws_show_convergence_at_a_larger_gap(losses, seen, converged):
    """They are looked at once the gap is small, until they show it."""
    answers = iter(seen)
    horizon = Horizon(STEPS, NOISE, is_good=lambda: next(answers))
    shares(horizon, LOUD[:LOOK] + 2 * losses)
    assert horizon.converged_at == converged
    assert not [*answers]


def test_a_run_for_a_looser_end_looks_at_draws_whatever_its_losses_are():
    seen = list[int]()
    horizon = Horizon(20 * LOOK, NOISE, is_good=lambda: bool(seen.append(horizon._seen // LOOK)), near=math.inf)
    horizon.observe(5 * LOUD)
    assert (seen, horizon.converged_at) == ([4, 6, 8, 12, 16], None)
    horizon = Horizon(20 * LOOK, NOISE, is_good=lambda: horizon._seen >= 6 * LOOK, near=math.inf)
    assert (len(shares(horizon, 5 * LOUD)), horizon.converged_at) == (9 * LOOK, 6 * LOOK)


def test_losses_may_end_a_run_whose_draws_cannot_be_weighted():
    horizon = Horizon(STEPS, NOISE, is_good=lambda: False, near=math.inf)
    taken = shares(horizon, 2 * QUIET)
    assert horizon.reason_to_stop(len(taken), stale=False, interrupted=False) == "converged"


def test_a_start_whose_draws_can_be_weighted_takes_few_steps():
    horizon = Horizon(STEPS, NOISE, near=math.inf)
    horizon.begin(lambda: True)
    taken = shares(horizon, LOUD)
    assert (horizon.reason_to_stop(len(taken), stale=False, interrupted=False), len(taken)) == ("weights", FEWEST)
    assert max(taken) <= Horizon(STEPS, 0.0).share(FEWEST)
    for is_ready in (None, lambda: False):
        horizon = Horizon(STEPS, NOISE, near=math.inf)
        horizon.begin(is_ready)
        assert horizon.last == STEPS


def test_a_resumed_run_keeps_what_draws_have_shown():
    horizon = Horizon(STEPS, NOISE, is_good=lambda: pytest.fail("a later state tells nothing of an earlier one"))
    horizon.resume(60, 50, by_draws=False)
    horizon.observe(LOUD[:LOOK] + NEARLY[:35])
    assert (horizon.converged_at, horizon.last) == (50, 100)


def test_draws_are_close_if_weights_have_a_light_tail_and_change_no_moment():
    pyro.set_rng_seed(0)
    z = torch.randn(2048, 3)
    assert is_close(z, 0.02 * z[:, 0].sin())
    assert not is_close(z, 0.2 * z[:, 0])  # a mean is off by .2
    assert not is_close(z, 0.1 * (z[:, 1].square() - 1))  # a standard deviation is off by a tenth
    assert not is_close(z, torch.empty(2048).exponential_())  # weights whose k-hat is 1
    assert not is_close(z, torch.full((2048,), math.nan))


def test_draws_can_be_weighted_if_enough_of_them_count():
    pyro.set_rng_seed(0)
    z, tail = torch.randn(2048).double(), torch.empty(2048).exponential_().double()
    assert is_steady(0.5 * z)  # a normal tail, and an effective share of .78
    assert not is_steady(1.5 * z)  # an effective share of .1
    assert is_steady(0.3 * tail)  # Pareto weights with k-hat .3, and a share of .82
    assert not is_steady(0.8 * tail)
    assert not is_steady(torch.full((2048,), math.nan))


def test_neither_a_trend_nor_skipped_steps_are_convergence():
    drifting = [-0.02 * step for step in range(STEPS)]  # each window is flat, but all together are not
    assert len(shares(Horizon(STEPS, NOISE), drifting)) == STEPS
    skipped = [math.nan if step % LOOK == 3 else 1.0 for step in range(STEPS)]
    assert len(shares(Horizon(STEPS, NOISE), skipped)) == STEPS


def test_losses_whose_noise_is_rounded_away_tell_nothing():
    """At 1e7 nats, single precision has a resolution of one, so the losses of a poor guide are all equal."""
    large = [1e7] * STEPS
    assert len(shares(Horizon(STEPS, NOISE, torch.finfo(torch.float32).eps), large)) == STEPS
    assert len(shares(Horizon(STEPS, NOISE, torch.finfo(torch.float64).eps), large)) == LOOK + FINISH


def test_a_run_that_is_resumed_turns_where_it_did():
    losses = LOUD[:50] + QUIET
    whole, resumed = Horizon(STEPS, NOISE), Horizon(STEPS, NOISE)
    shares(whole, losses)
    resumed.observe(losses[:130])
    assert (resumed.converged_at, resumed.last) == (whole.converged_at, whole.last) == (75, 125)


def test_the_noise_of_the_loss_tells_the_gap():
    """For a guide N(mean, 1) of N(0, 1), log-weights have the variance mean², and the gap is mean² / 2."""
    draws, gap = 64, 0.02
    source = torch.Generator().manual_seed(0)
    log_weights = math.sqrt(2 * gap) * torch.randn(4000, draws, generator=source)
    losses = log_weights.mean(-1).tolist()
    assert statistics.stdev(losses) == pytest.approx(noise_at(gap, draws), rel=4 / math.sqrt(2 * 4000))


def nearly_gaussian():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.StudentT(30.0, x[..., 0], 1.0), obs=torch.tensor(0.5))


def bent(curvature):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(curvature * x**2, 0.5))

    return model


@pytest.mark.slow
def test_a_fit_ends_when_it_has_converged_and_no_sooner(tmp_path):
    model = bent(0.3)
    fit = fit_svi(model, AutoFlow(model), progress=False, checkpoint=tmp_path / "run")
    assert fit.stopped == "converged"
    assert 100 < fit.steps < 300
    again = fit_svi(model, AutoFlow(model), progress=False, checkpoint=tmp_path / "run")
    assert (again.stopped, again.steps) == ("converged", fit.steps)  # no steps are left
    harder = bent(1.0)
    assert fit_svi(harder, AutoFlow(harder), progress=False).steps > fit.steps


@pytest.mark.slow
def test_steps_that_are_asked_for_are_all_taken():
    fit = fit_svi(nearly_gaussian, AutoFlow(nearly_gaussian), steps=90, progress=False)
    assert (fit.stopped, fit.steps) == ("steps", 90)


def test_a_fit_that_needs_its_few_steps_has_converged():
    fit = fit_svi(nearly_gaussian, AutoFlow(nearly_gaussian), progress=False)
    assert fit.stopped == "converged"
    assert fit.steps <= 80


def curved():
    x = pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.square().sum(), 0.3), obs=torch.tensor(2.0))


def test_a_fit_for_weights_ends_sooner(tmp_path):
    short, long = AutoFlow(curved), AutoFlow(curved)
    fit = fit_svi(curved, short, steps="for_weights", progress=False, checkpoint=tmp_path / "run")
    assert fit.stopped == "weights"
    again = fit_svi(curved, AutoFlow(curved), steps="for_weights", progress=False, checkpoint=tmp_path / "run")
    assert (again.stopped, again.steps) == ("weights", fit.steps)  # no steps are left
    found = psis(curved, short, num_samples=10_000)
    assert found.reliable
    assert found.ess > 0.25 * 10_000
    assert fit_svi(curved, long, progress=False).steps > fit.steps
    with pytest.raises(ValueError, match="for_weights"):
        fit_svi(curved, AutoFlow(curved), progress=False, checkpoint=tmp_path / "run")


def test_a_start_that_suits_takes_few_steps():
    fit = fit_svi(nearly_gaussian, AutoFlow(nearly_gaussian), steps="for_weights", progress=False)
    assert (fit.stopped, fit.steps) == ("weights", FEWEST)
