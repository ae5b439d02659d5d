"""The ladder stops when it can, continues when it must, reports each rung, and loses nothing."""

from __future__ import annotations

import dataclasses
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import with_verdict
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from pyro_flows import AutoFlow, Fit, check, fit_svi, flows
from pyro_flows.diagnostics import verdict
from pyro_flows.diagnostics.missing_modes import Missing
from pyro_flows.fitting import escalation
from pyro_flows.guides.default_training import Schedule
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.sampling.converged_chains import Goal

small = functools.partial(flows.realnvp, num_transforms=4, hidden_dims=(16,))


def normal(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x.square() / 2, 0.3))


def two_modes() -> None:
    parts = dist.Normal(torch.tensor([-4.0, 4.0]), 1.0)
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    logits = parts.log_prob(z[..., :1]) - math.log(2)
    pyro.factor("modes", logits.logsumexp(-1) - z[..., 1].square() / 2)


Y = torch.tensor([1.0, 0.0, -2.0])


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    """Use small populations, and few sweeps for exact draws."""
    monkeypatch.setattr(escalation, "PARTICLES", 512)
    monkeypatch.setattr(escalation, "EXACT", Goal(200, 20))


def distrust(*args, **kwargs):
    """Return a coarse check that trusts no guide, and so skips the search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "search", lambda *_: Missing(0.0, 0.0))
        return with_verdict(check(*args, num_samples=1000, num_chains=16, **kwargs), "do not trust")


def names(fit: Fit) -> list[str]:
    return [rung.name for rung in fit.rungs]


@pytest.mark.slow
def test_a_gaussian_is_enough_for_a_gaussian():
    guide = AutoFlow(normal, small)
    fit = fit_svi(normal, guide, Y, escalate=True, progress=False)
    assert names(fit) == ["Gaussian"]
    assert fit.check.trusted
    assert fit.guide is fit.rungs[0].fit.guide
    assert fit.guide.sample(5)["x"].shape == (5, 3)
    assert guide.is_fresh  # the guide was not trained


@pytest.mark.slow
def test_a_bent_posterior_takes_a_flow():
    guide = AutoFlow(banana)
    fit = fit_svi(banana, guide, escalate=True, progress=False)
    assert names(fit) == ["Gaussian", "flow"]
    assert [rung.check.trusted for rung in fit.rungs] == [False, True]
    assert fit.guide is guide
    assert fit.seconds == pytest.approx(sum(rung.seconds for rung in fit.rungs))
    for number, rung in enumerate(fit.rungs, 1):
        assert f"{number}. {rung.name}" in repr(fit)
        assert rung.check.reason in repr(fit)


@pytest.mark.slow
def test_a_missing_mode_is_found():
    """Neither more couplings nor more steps can find the mode, so these rungs are skipped."""
    pyro.set_rng_seed(1)
    fit = fit_svi(two_modes, AutoFlow(two_modes, small), num_particles=64, escalate=True, progress=False)
    assert names(fit)[:2] == ["Gaussian", "annealed"]
    assert [finding.kind for finding in fit.rungs[0].check.findings] == ["mode"]
    assert fit.check.trusted
    assert (fit.guide.sample(4000)["z"][:, 0] > 0).float().mean() == pytest.approx(0.5, abs=0.1)


def never(*_, **__):
    raise AssertionError("it was fitted")


@pytest.mark.slow
def test_every_rung_is_tried_before_it_gives_up(monkeypatch):
    """Each rung starts from the last: the deeper flow first draws as the one before it."""
    monkeypatch.setattr(escalation, "check", distrust)
    deepened = []
    original = escalation._deepened

    def spy(guide):
        new = original(guide)
        z = torch.randn(4, guide.latent_dim)
        torch.testing.assert_close(new.get_transform()(z), guide.get_transform()(z), rtol=1e-4, atol=1e-4)
        deepened.append(new)
        return new

    monkeypatch.setattr(escalation, "_deepened", spy)
    settings = {"num_particles": 16, "progress": False}
    monkeypatch.setattr(AutoFlow, "schedule", lambda self, **_: Schedule(20))
    fit = fit_svi(banana, AutoFlow(banana, small), steps=40, escalate=True, **settings)
    assert names(fit) == ["Gaussian", "flow", "deeper and longer", "annealed", "exact draws"]
    assert len(deepened[0].flow.transforms) == 4 + 8 + 2
    assert fit.check.verdict == "do not trust"
    assert fit.samples is fit.rungs[-1].samples
    assert "s): Samples(" in repr(fit)  # without the loss of an earlier rung
    elbos = [float(rung.check.psis.log_weights.mean()) for rung in fit.rungs]
    assert fit.guide is fit.rungs[elbos.index(max(elbos))].fit.guide  # losses of other objectives are not comparable


@pytest.mark.slow
def test_draws_are_exact_where_weights_are_not_reliable(monkeypatch):
    def uncertain(*args, **kwargs):
        found = check(*args, **kwargs)
        log_weights = found.psis.log_weights + 2 * (torch.arange(len(found.psis.log_weights)) == 0)
        return dataclasses.replace(found, psis=dataclasses.replace(found.psis, khat=1.1, log_weights=log_weights))

    monkeypatch.setattr(escalation, "check", uncertain)
    fit = fit_svi(normal, AutoFlow(normal, small), Y, escalate=True, progress=False)
    assert names(fit) == ["Gaussian", "exact draws"]
    assert fit.check.trusted
    assert fit.samples.converged


@pytest.mark.slow
def test_chains_that_leave_out_what_a_check_has_found_do_not_converge():
    """A guide that is too wide for one of two modes counts as collapsed, because its chains drift."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal((x - 1) ** 2, 2.0), obs=torch.tensor(25.0))  # x is near 6 or -4

    def guide() -> None:
        pyro.sample("x", dist.Normal(6.0, 0.35))

    found = check(model, guide)
    assert next(finding.kind for finding in found.findings) in ("collapsed", "mode")
    climber = escalation.Ladder(never, Task(model, guide, (), {}), {"progress": False, "vectorize": "auto"}, None)
    climber.note(escalation.Rung("wide", Fit(guide, torch.zeros(1), 0.0, 1, 1, 0, 1.0, "steps"), found, 1.0))
    climber.sample("exact draws")
    samples = climber.result().samples
    assert samples is None or not samples.converged


@pytest.mark.slow
def test_less_evidence_than_before_is_not_trusted():
    """A second fit with one of two modes, exactly, is not trusted after a first fit with both."""

    def both() -> None:
        pyro.sample(
            "z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-9.0, 9.0]), 1.0))
        )

    whole = check(both, both)
    climber = escalation.Ladder(never, Task(both, both, (), {}), {"progress": False}, None)
    fit = Fit(both, torch.zeros(1), 0.0, 1, 1, 0, 1.0, "steps")
    climber.note(escalation.Rung("first", fit, whole, 1.0))
    half = dataclasses.replace(whole, psis=dataclasses.replace(whole.psis, log_evidence=whole.log_evidence - 0.69))
    found = climber._compared(half)
    assert found.verdict == "do not trust"
    assert "0.69 nats more evidence" in found.reason
    assert climber._compared(whole).trusted


@pytest.mark.slow
def test_the_best_rung_is_kept():
    climber = escalation.Ladder(never, Task(banana, banana, (), {}), {"progress": False}, None)
    right = check(banana, banana)
    for name, said, elbo in (("a", "do not trust", -1.0), ("b", "reweight", -3.0), ("c", "reweight", -2.0)):
        fit = Fit(name, torch.zeros(1), 0.0, 1, 1, 0, 1.0, "steps")
        weights = dataclasses.replace(right.psis, log_weights=torch.full((10,), elbo))
        climber.note(escalation.Rung(name, fit, with_verdict(dataclasses.replace(right, psis=weights), said), 1.0))
    assert climber.result().guide == "c"


# Restarts.


@pytest.mark.slow
def test_restarts_find_the_better_mode():
    """A single start stays at a spurious mode, tens of nats below the posterior."""

    def spurious() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 30.0))
        high, low = dist.Normal(60.0, 1.0).log_prob(z), dist.Normal(-60.0, 1.0).log_prob(z) - 40
        pyro.factor("modes", torch.logaddexp(high, low))

    start = pyro.infer.autoguide.init_to_value(values={"z": torch.tensor(-60.0)})
    guide = AutoFlow(spurious, small, init_loc_fn=start)
    alone = fit_svi(spurious, guide, steps=100, progress=False)
    pyro.set_rng_seed(0)
    fit = fit_svi(spurious, AutoFlow(spurious, small, init_loc_fn=start), steps=100, restarts=6, progress=False)
    assert names(fit) == [f"start {number}" for number in range(1, 7)]
    assert fit.best_loss == min(rung.fit.best_loss for rung in fit.rungs)
    assert fit.best_loss < alone.best_loss - 30
    assert fit.guide.sample(100)["z"].mean() > 50
    assert fit.check is None


def test_restarts_of_flat_priors():
    def flat() -> None:
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.positive, (), ()))
        pyro.sample("y", dist.Normal(x.log(), 1.0), obs=torch.tensor(0.5))
        pyro.factor("change", -x.log())

    fit = fit_svi(flat, AutoFlow(flat, small), steps=60, restarts=2, progress=False)
    assert len(fit.rungs) == 2


@pytest.mark.slow
def test_restarts_in_another_dtype_and_of_angles():
    """A float64 model restarts under a float32 default, and so does a model of angles, which have no Gaussian start."""
    double = Y.double()

    def precise() -> None:
        x = pyro.sample("x", dist.Normal(double.new_zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.MultivariateNormal(x, torch.eye(3, dtype=torch.float64)), obs=double)

    def turning() -> None:
        pyro.sample("angle", dist.VonMises(1.0, 4.0))

    for model in (precise, turning):
        recipe = small if model is precise else None
        fit = fit_svi(model, AutoFlow(model, recipe), steps=20, restarts=2, progress=False)
        assert names(fit) == ["start 1", "start 2"]
    assert check(precise, fit_svi(precise, AutoFlow(precise, small), progress=False).guide).trusted


@pytest.mark.slow
def test_longer_training_leaves_the_rung_before_it_alone(monkeypatch):
    def turning() -> None:
        pyro.sample("angle", dist.VonMises(1.0, 4.0))

    monkeypatch.setattr(escalation, "check", distrust)
    monkeypatch.setattr(AutoFlow, "schedule", lambda self, **_: Schedule(20))
    fit = fit_svi(turning, AutoFlow(turning), steps=20, escalate=True, progress=False)
    assert names(fit) == ["flow", "deeper and longer", "annealed", "exact draws"]
    assert len({id(rung.fit.guide) for rung in fit.rungs[:3]}) == 3


# Interruptions, files, bad input.


@pytest.mark.slow
def test_an_interrupted_ladder_keeps_the_best_rung(monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return distrust(*args, **kwargs)

    monkeypatch.setattr(escalation, "check", interrupted)
    fit = fit_svi(normal, AutoFlow(normal, small), Y, steps=30, escalate=True, progress=False)
    assert names(fit) == ["Gaussian", "flow"]
    assert fit.stopped == "interrupted"
    assert fit.rungs[1].check is None
    assert fit.guide is fit.rungs[0].fit.guide  # the checked guide
    assert fit.guide.sample(3)["x"].isfinite().all()


@pytest.mark.slow
def test_a_ladder_goes_on_from_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(escalation, "check", distrust)
    monkeypatch.setattr(AutoFlow, "schedule", lambda self, **_: Schedule(20))
    settings = {"steps": 30, "num_particles": 16, "escalate": True, "progress": False}
    settings["checkpoint"] = tmp_path / "run.pt"
    first = fit_svi(normal, AutoFlow(normal, small), Y, **settings)
    files = {"run.pt.Gaussian", "run.pt.flow", "run.pt.deeper-and-longer"}
    assert {path.name for path in tmp_path.iterdir()} - {"run.pt.annealed"} == files  # this rung may need no training
    again = fit_svi(normal, AutoFlow(normal, small), Y, **settings)
    assert [rung.fit.best_loss for rung in again.rungs] == [rung.fit.best_loss for rung in first.rungs]


def positive() -> None:
    """Sample two normal latents, the first one restricted to positive values."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("edge", torch.where(x[..., 0] > 0, 0.0, -math.inf))


@pytest.mark.slow
def test_a_hard_edge_is_met_by_a_population():
    """At a hard edge KL(q || p) is infinite, so no fit by the ELBO can continue."""
    guide = AutoFlow(positive, small, init_loc_fn=init_to_value(values={"x": torch.tensor([0.05, 0.0])}))
    with pytest.raises(FloatingPointError, match=r"'edge' has a log-density of -inf.*hard edge"):
        fit_svi(positive, guide, progress=False)
    with pytest.raises(FloatingPointError, match="'edge'"):
        fit_svi(positive, guide, escalate=True, on_nonfinite="raise", progress=False)
    with pytest.warns(UserWarning, match="training broke down; a population takes over.*'edge'"):
        fit = fit_svi(positive, guide, escalate=True, progress=False)
    assert names(fit)[0] == "annealed"
    draws = fit.samples.flat["x"] if fit.samples else fit.guide.sample(4000)["x"]
    assert draws[:, 0].mean().item() == pytest.approx((2 / math.pi) ** 0.5, abs=0.06)
    assert draws[:, 1].std().item() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad")])
def test_a_rung_that_breaks_off_costs_no_other(monkeypatch, error):
    """A rung that fails in its warm start, outside of any loop that catches Ctrl-C, does not lose the other rungs."""
    monkeypatch.setattr(escalation, "check", distrust)
    monkeypatch.setattr(escalation, "_restarted", lambda climber, guide, *_: climber.fit("flow", _Broken(error)))
    monkeypatch.setattr(escalation.Ladder, "fit", _fit_or_break(escalation.Ladder.fit))
    fit = fit_svi(normal, AutoFlow(normal, small), Y, escalate=True, progress=False)
    assert names(fit) == ["Gaussian"]
    assert fit.guide is fit.rungs[0].fit.guide
    assert fit.stopped == ("interrupted" if isinstance(error, KeyboardInterrupt) else f"flow: {error}")


@dataclasses.dataclass
class _Broken:
    error: BaseException


def _fit_or_break(fit):
    def fitted(self, name, guide, **settings):
        if isinstance(guide, _Broken):
            self.fit_once = functools.partial(_raise, guide.error)
        return fit(self, name, guide, **settings)

    return fitted


def _raise(error, *_, **__):
    raise error


@pytest.mark.slow
def test_where_the_flow_breaks_down_a_population_takes_over(monkeypatch):
    fit_once = escalation.Ladder.fit

    def broken(self, name, guide, **settings):
        if name == "flow":
            raise FloatingPointError("not finite")
        return fit_once(self, name, guide, **settings)

    monkeypatch.setattr(escalation, "check", distrust)
    monkeypatch.setattr(escalation.Ladder, "fit", broken)
    with pytest.warns(UserWarning, match=r"a population takes over\. not finite"):
        fit = fit_svi(normal, AutoFlow(normal, small), Y, escalate=True, progress=False)
    assert names(fit) == ["Gaussian", "annealed", "exact draws"]


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_a_start_that_breaks_down_costs_no_other(on_nonfinite, monkeypatch):
    fit_once, calls = escalation.Ladder.fit, []

    def broken(self, name, guide, **settings):
        calls.append(name)
        self.name = name
        if name == "start 2":
            raise FloatingPointError("not finite")
        return fit_once(self, name, guide, **settings)

    monkeypatch.setattr(escalation.Ladder, "fit", broken)
    settings = {"steps": 20, "restarts": 3, "on_nonfinite": on_nonfinite, "progress": False}
    fit = fit_svi(normal, AutoFlow(normal, small), Y, **settings)
    assert names(fit) == ["start 1"]
    assert calls == ["flow", "start 2"]
    assert fit.stopped == "start 2: not finite"


def test_a_model_with_parameters_is_refused():
    """A model with parameters is refused, because each fit would inherit those of the last one."""

    def model(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        x = pyro.sample("x", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(x, 1.0).expand([3]).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"parameters \(scale\)"):
        fit_svi(model, AutoFlow(model, small), Y, restarts=2, progress=False)


def test_what_cannot_be_fitted_twice_is_refused():
    guide = AutoNormal(normal)
    guide(Y)
    for settings in ({"escalate": True}, {"restarts": 3}):
        with pytest.raises(ValueError, match=r"AutoFlow, not for AutoNormal"):
            fit_svi(normal, guide, Y, progress=False, **settings)
    with pytest.raises(ValueError, match="objective"):
        fit_svi(normal, AutoFlow(normal), Y, escalate=True, objective=pyro.infer.Trace_ELBO(), progress=False)
    with pytest.raises(ValueError, match=r"restarts.*0"):
        fit_svi(normal, AutoFlow(normal), Y, restarts=0, progress=False)


@pytest.mark.slow
def test_rungs_are_told_as_they_are_made(capsys):
    fit_svi(normal, AutoFlow(normal, small), Y, steps=20, escalate=True)
    assert "1. Gaussian" in capsys.readouterr().err
