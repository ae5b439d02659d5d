"""The door goes on until its draws can be trusted, says so if they cannot, and loses nothing on the way."""

import dataclasses
import functools
import importlib
import math
import signal
import time
import warnings
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import called, normals, sampling, with_posterior, with_verdict
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor
from torch.distributions import constraints
from vector_laws import Mixture

import pyro_flows as pf
from pyro_flows import AutoFlow, check, flows
from pyro_flows.answers import stages
from pyro_flows.answers.posterior import _choose
from pyro_flows.answers.record import Question
from pyro_flows.programs.density import Quantities
from pyro_flows.time_limit import seconds_left, within
from pyro_flows.training import distributed
from pyro_flows.training.interrupts import uninterrupted

small = functools.partial(flows.realnvp, num_transforms=4, hidden_dims=(16,))
Y = torch.tensor([1.0, 0.0, -2.0])
X = torch.linspace(-1, 1, 12).reshape(-1, 1)
SMALL = {"guide": lambda model: AutoFlow(model, small), "progress": False}
EVIDENCE = dist.Normal(0.0, math.sqrt(2)).log_prob(Y).sum().item()


def normal(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def line(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        mean = pyro.deterministic("mean", slope[..., None] * x[:, 0])
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


two_modes = with_posterior(
    Mixture(0.5, *(dist.Normal(torch.tensor([at, 0.0]), 1.0).to_event(1) for at in (-4.0, 4.0))),
    prior=dist.ImproperUniform(constraints.real_vector, (), (2,)),
)


def local(y: Tensor, size: int | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=size) as rows:
        level = pyro.sample("level", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(level, 1.0), obs=y[rows])


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    """Use small populations, and few sweeps of chains."""
    monkeypatch.setattr(stages, "EFFORT", stages.Effort(particles=512, sweeps=60))


def distrust(*args, **kwargs):
    """Return a coarse check that trusts no guide."""
    return with_verdict(check(*args, num_samples=1000, num_chains=16, **kwargs), "do not trust")


def raising(error: BaseException):
    def broken(*_, **__):
        raise error

    return broken


def names(answer: pf.Posterior) -> list[str]:
    return [step.name for step in answer.steps]


def stages_of(model, *args, number: int = 100, **settings) -> stages.Stages:
    return stages.Stages(Question(model, args, {}, model), number, progress=False, **settings)


# The stages, in their order.


def test_a_guide_that_is_trusted_is_the_answer():
    found = pf.posterior(normal, Y, num_draws=500, **SMALL)
    assert names(found) == ["fit", "check"]
    assert (found.verdict, found.trusted, found.chains) == ("trust", True, None)
    assert isinstance(found.guide, AutoFlow)
    assert found.draws["x"].shape == (500, 3)
    torch.testing.assert_close(found.draws["x"].mean(0), Y / 2, rtol=0, atol=0.15)
    assert abs(found.log_evidence - EVIDENCE) < 5 * found.log_evidence_se + 1e-3
    assert found.seconds >= sum(step.seconds for step in found.steps)
    for words in ("trust", found.reason, "x[2]", "fit → check"):
        assert words in repr(found)


def test_complex_and_short_numbers_are_read(tmp_path):
    def model(y: Tensor) -> None:
        normal(y)
        pyro.deterministic("c", torch.complex(y, -y))
        pyro.deterministic("b", y.bfloat16())

    trace = pyro.poutine.trace(model).get_trace(Y)
    read = Quantities(trace.nodes, ["x"])
    values = {name: trace.nodes[name]["value"][None] for name in ("x", "c", "b")}
    assert read.names[3:5] == ["re c[0]", "re c[1]"]
    torch.testing.assert_close(read.numbers(values)[0, 3:], torch.cat([Y, -Y, Y]))
    draws = {name: value.expand(9, 3) for name, value in values.items()}
    found = pf.Posterior(draws, "trust", "", -1.0, 0.1, (pf.answers.Step("fit", 1.0, "", ""),), 1.0)
    assert "im c[2]" in found.summary()
    found.save(tmp_path / "answer")
    assert torch.equal(pf.load(tmp_path / "answer").draws["c"], draws["c"])


@pytest.mark.slow
def test_reliable_weights_correct_the_draws():
    """A guide that is too wide is resampled by its weights, without any training."""
    wide = called(AutoNormal(normal, init_loc_fn=init_to_value(values={"x": Y / 2}), init_scale=1.0), Y)
    found = pf.posterior(normal, Y, guide=wide, progress=False)
    assert names(found) == ["fit", "check"]
    assert (found.steps[1].verdict, found.trusted, found.resampled) == ("reweight", True, True)
    assert "resampled" in found.reason
    torch.testing.assert_close(found.draws["x"].std(0), torch.full((3,), 0.5**0.5), rtol=0.08, atol=0)


@pytest.mark.slow
def test_draws_are_exact_where_the_guide_is_not_trusted(monkeypatch):
    monkeypatch.setattr(stages, "check", distrust)
    found = pf.posterior(normal, Y, num_draws=400, **SMALL)
    assert names(found) == ["fit", "check", "fit", "check", "chains"]
    assert (found.trusted, found.chains.converged, found.resampled) == (True, True, False)
    assert found.draws["x"].shape == (400, 3)
    assert abs(found.log_evidence - EVIDENCE) < 5 * found.log_evidence_se + 1e-3
    assert "R-hat" in found.summary().splitlines()[0]
    data = found.to_arviz(log_likelihood=False)["posterior"]
    assert (data.sizes["chain"], data.attrs["inference_method"], data.attrs["converged"]) == (64, "mcmc", 1)


@pytest.mark.parametrize(("loc", "is_known"), [(1.0, True), (31.0, False)])
def test_the_evidence_is_unknown_where_the_guide_hardly_overlaps_the_posterior(loc, is_known):
    y = torch.ones(3)
    chains = SimpleNamespace(flat={"x": 0.5 + 0.5**0.5 * torch.randn(2048, 3)}, converged=True, worst="")
    psis = SimpleNamespace(log_weights=torch.zeros(1))
    checked = SimpleNamespace(verdict="do not trust", findings=(), reason="Far.", psis=psis)
    judged = [stages.Judged(sampling(x=normals(3, 0.7, loc)), checked)]
    found = stages_of(normal, y, number=16, chains=chains, judged=judged).answer(0.0)
    assert found.draws["x"].shape == (16, 3)
    assert ("evidence is unknown" in found.reason) != is_known
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(y).sum().item()
    assert math.isnan(found.log_evidence) if not is_known else abs(found.log_evidence - exact) < 0.3


@pytest.mark.slow
def test_a_missing_mode_is_found():
    pyro.set_rng_seed(1)
    found = pf.posterior(two_modes, progress=False)
    assert names(found) == ["fit", "check", "population", "check"]
    assert found.trusted
    assert (found.draws["x"][:, 0] > 0).float().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_every_stage_is_tried_before_it_gives_up(monkeypatch):
    monkeypatch.setattr(stages, "check", distrust)
    monkeypatch.setattr(stages, "EFFORT", stages.Effort(particles=64, sweeps=9))
    found = pf.posterior(two_modes, num_draws=100_000, **SMALL)
    assert names(found) == ["fit", "check", "chains", *2 * ["population", "check", "chains"]]
    assert found.verdict == "do not trust"
    assert "have not converged" in found.reason
    assert math.isnan(found.log_evidence)


@pytest.mark.slow
def test_chains_that_leave_out_what_a_check_has_found_do_not_converge():
    """A guide that is too wide for one of two modes counts as collapsed, because its chains drift."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal((x - 1) ** 2, 2.0), obs=torch.tensor(25.0))  # x is near 6 or -4

    found = check(model, guide := sampling(x=dist.Normal(6.0, 0.35)))
    assert next(finding.kind for finding in found.findings) in ("collapsed", "mode")
    run = stages_of(model, number=400, judged=[stages.Judged(guide, found)])
    run.sample()
    assert not run.is_exact


@pytest.mark.slow
def test_less_evidence_than_before_is_not_trusted():
    """A second guide with one of two modes, exactly, is not trusted after a first one with both."""
    parts = dist.Normal(torch.tensor([-9.0, 9.0]), 1.0)
    both = sampling(z=dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))
    whole = check(both, both)
    run = stages_of(both, judged=[stages.Judged(both, whole)])
    half = dataclasses.replace(whole, psis=dataclasses.replace(whole.psis, log_evidence=whole.log_evidence - 0.69))
    found = run._compared(half)
    assert found.verdict == "do not trust"
    assert "0.69 nats more evidence" in found.reason
    assert run._compared(whole).trusted


@pytest.mark.slow
def test_a_hard_edge_is_met_by_a_population():
    """At a hard edge KL(q || p) is infinite, so no fit by the ELBO can continue."""

    def positive() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("edge", torch.where(x[..., 0] > 0, 0.0, -math.inf))

    guide = AutoFlow(positive, small, init_loc_fn=init_to_value(values={"x": torch.tensor([0.05, 0.0])}))
    with pytest.warns(UserWarning, match="training broke down, and a population takes over.*'edge'"):
        found = pf.posterior(positive, guide=guide, progress=False)
    assert names(found)[:2] == ["fit", "population"]
    x, y = found.draws["x"].T
    assert (x.mean().item(), y.std().item()) == pytest.approx(((2 / math.pi) ** 0.5, 1), abs=0.06)


# The guide.


def effects(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_a_guide_is_chosen_from_the_model():
    def chosen(model, *args):
        return type(_choose(model, args, {}, None)[1]).__name__

    assert chosen(normal, Y) == "AutoFlow"
    assert chosen(sampling(x=normals(600))) == "AutoStructuredFlow"
    assert chosen(local, torch.randn(30)) == "AutoFlow"
    assert chosen(local, torch.randn(30), 5) == "AutoPlateFlow"
    assert chosen(local, torch.randn(300)) == "AutoStructuredFlow"  # the scale of its effects is known
    assert chosen(effects, torch.randn(300)) == "AutoFlow"


def test_rows_of_a_subsampled_plate_are_all_drawn_and_not_trusted():
    y = torch.randn(12)
    found = pf.posterior(local, y, 5, guide=_quick, num_draws=50, progress=False)
    assert {name: value.shape for name, value in found.draws.items()} == {"mean": (50,), "level": (50, 12)}
    assert not found.trusted
    assert "plate 'row', which is subsampled" in found.reason


def _quick(model):
    guide = pf.AutoPlateFlow(model, "row")
    pf.fit_svi(model, guide, steps=5, progress=False)
    return guide


@pytest.mark.slow
def test_a_trained_guide_is_not_trained_again():
    guide = AutoFlow(normal, small)
    pf.fit_svi(normal, guide, Y, progress=False)
    before = [parameter.clone() for parameter in guide.parameters()]
    found = pf.posterior(normal, Y, guide=guide, progress=False)
    assert all(map(torch.equal, before, guide.parameters()))
    assert "trained before" in found.steps[0].said


def test_a_given_guide_is_taken_as_it_is_unless_it_is_known_to_be_untrained(monkeypatch):
    class Trained(torch.nn.Module):
        def forward(self, y: Tensor) -> None:
            normal(y)

    monkeypatch.setattr(stages, "fit_svi", raising(KeyboardInterrupt()))
    run = stages_of(normal, Y)
    for guide in (called(AutoNormal(normal), Y), Trained()):
        run.fit(guide, is_given=True)
        assert "trained before" in run.steps[-1].said
    for guide in (AutoNormal(normal), AutoFlow(normal, small)):
        with pytest.raises(KeyboardInterrupt):
            run.fit(guide, is_given=True)
    with pytest.raises(KeyboardInterrupt):
        run.fit(Trained())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: pyro.sample("k", dist.Bernoulli(0.5)), "must have a continuous latent site"),
        (lambda: pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0)), "no parameters, got 'loc'"),
        (lambda: pyro.sample("x", dist.ImproperUniform(constraints.real, (), ())), "posterior is improper"),
    ],
)
def test_models_without_a_posterior_are_refused(model, words):
    with pytest.raises(ValueError, match=words):
        pf.posterior(model, progress=False)


def test_bad_arguments_are_refused(monkeypatch):
    for settings in ({"num_draws": 0}, {"seconds": -1.0}, {"progress": "no"}, {"guide": 5}, {"guide": lambda _: None}):
        with pytest.raises((ValueError, TypeError), match=next(iter(settings))):
            pf.posterior(normal, Y, **settings)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(ValueError, match="in one process, got 2"):
        pf.posterior(normal, Y)


# Time, interruptions, errors.


@pytest.mark.parametrize("seconds", [1e-4, 0.02, 0.05])
def test_the_best_answer_in_the_time_is_returned(seconds, recwarn):
    found = pf.posterior(normal, Y, seconds=seconds, **SMALL)
    assert names(found) == ["fit"]
    assert found.steps[0].said.startswith("out of time AutoFlow")
    assert found.draws["x"].isfinite().all()
    assert (found.verdict, found.interrupted) == ("do not trust", False)
    assert "not checked" in found.reason
    assert f"give more than {seconds:g} seconds" in found.reason
    assert not any("failed" in str(one.message) for one in recwarn)


def test_chains_that_the_time_ends_are_not_interrupted(answer, monkeypatch):
    cut = SimpleNamespace(converged=False, sweeps=1, worst="R-hat 1.50")
    monkeypatch.setattr(stages, "exact", lambda *_, **__: cut)
    run = stages.Stages(answer.question, 100, progress=False, judged=[stages.Judged(answer.guide)])
    for left, words in ((math.inf, "interrupted R-hat"), (-1.0, "out of time R-hat")):
        monkeypatch.setattr(stages, "seconds_left", lambda left=left: left)
        with pytest.raises(KeyboardInterrupt):
            run.sample()
        assert run.steps[-1].said == f"{words} 1.50"


def test_the_end_of_the_time_is_no_interruption():
    with within(0.001), uninterrupted():
        time.sleep(0.01)
    assert seconds_left() == math.inf


@pytest.mark.slow
def test_a_guide_that_is_trained_for_weights_is_trained_on(monkeypatch):
    def effects() -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("groups", 8):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]))

    monkeypatch.setattr(stages, "check", distrust)
    monkeypatch.setattr(stages, "exact", raising(KeyboardInterrupt()))
    found = pf.posterior(effects, progress=False)
    assert names(found) == ["fit", "check", "fit", "check", "chains"]


@pytest.mark.slow
def test_a_check_within_the_time_counts(monkeypatch):
    monkeypatch.setattr(stages, "check", distrust)
    monkeypatch.setattr(stages.Stages, "sample", raising(KeyboardInterrupt()))
    found = pf.posterior(normal, Y, seconds=30, **SMALL)
    assert names(found) == ["fit", "check", "fit", "check"]
    assert found.reason == found.steps[-1].said


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LookupError("bad")])
def test_a_stage_that_breaks_off_costs_no_other(monkeypatch, error):
    monkeypatch.setattr(stages, "check", distrust)
    monkeypatch.setattr(stages, "exact", raising(error))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = pf.posterior(normal, Y, **SMALL)
    assert names(found)[:5] == ["fit", "check", "fit", "check", "chains"]
    assert found.interrupted == isinstance(error, KeyboardInterrupt)
    assert found.steps[4].said == ("interrupted" if isinstance(error, KeyboardInterrupt) else "failed: bad")
    assert any("a stage failed" in str(one.message) for one in caught) != found.interrupted
    assert found.verdict == "do not trust"


def test_a_factorisation_that_fails_is_met_by_a_population(monkeypatch):
    for owner, name in ((stages, "fit_svi"), (stages.Stages, "cover")):
        monkeypatch.setattr(owner, name, raising(torch.linalg.LinAlgError("singular")))
    with pytest.warns(UserWarning, match="a population takes over. singular"), pytest.raises(RuntimeError):
        pf.posterior(normal, Y, **SMALL)


def test_an_answer_that_cannot_be_drawn_is_an_earlier_one(monkeypatch):
    first = called(AutoNormal(normal), Y)

    def add(self, *_: object) -> None:
        self.question = Question(normal, (Y,), {}, normal)
        self.judged += [stages.Judged(raising(LookupError("lost"))), stages.Judged(first)]

    monkeypatch.setattr(importlib.import_module("pyro_flows.answers.posterior"), "_go_on", add)
    with pytest.warns(UserWarning, match="a stage failed.*lost"):
        assert pf.posterior(normal, Y, num_draws=10, **SMALL).draws["x"].shape == (10, 3)


def test_draws_keep_to_the_time_and_to_a_first_interruption(monkeypatch, ctrl_c):
    def pause(y: Tensor) -> None:
        time.sleep(0.005)
        normal(y)

    slow = pf.Program(pause, vectorize="loop")
    guide = called(AutoNormal(slow), Y)
    add = lambda self, *_: self.judged.append(stages.Judged(guide))  # noqa: E731
    monkeypatch.setattr(importlib.import_module("pyro_flows.answers.posterior"), "_go_on", add)
    with pytest.warns(UserWarning, match="time allows for .* draws"):
        found = pf.posterior(slow, Y, seconds=0.5, guide=guide, progress=False)
    assert len(found.draws["x"]) < 100
    assert found.seconds < 2
    of_guide = stages.Stages._of_guide

    def pressed(*args):
        signal.raise_signal(signal.SIGINT)
        return of_guide(*args)

    monkeypatch.setattr(stages.Stages, "_of_guide", pressed)
    found = pf.posterior(slow, Y, num_draws=5, guide=guide, progress=False)
    assert (len(found.draws["x"]), found.interrupted) == (5, True)


def test_an_interruption_before_any_answer_is_raised(monkeypatch):
    monkeypatch.setattr(stages, "fit_svi", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        pf.posterior(normal, Y, **SMALL)


@pytest.mark.parametrize("progress", [True, False])
def test_stages_are_told_as_they_run(progress, capsys):
    pf.posterior(normal, Y, **{**SMALL, "progress": progress})
    said = capsys.readouterr().err
    assert ("posterior: check (weights, chains, search for modes; " in said) == progress
    assert progress or not said


# What an answer holds, and what can be asked of it.


@pytest.mark.slow
def test_discrete_and_reparametrised_sites_are_drawn():
    @config_enumerate
    def mixture(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        high = pyro.sample("high", dist.Normal(3.0, scale))
        with pyro.plate("row", len(y)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(kind * high, 0.5), obs=y)

    model = pyro.poutine.reparam(mixture, {"high": LocScaleReparam(0.0)})
    found = pf.posterior(model, torch.tensor([0.1, 3.0, -0.2, 3.3]), num_draws=300, **SMALL)
    assert found.trusted
    assert {"scale", "high", "kind"} <= found.draws.keys()
    torch.testing.assert_close(found.draws["kind"].mean(0).round(), torch.tensor([0.0, 1.0, 0.0, 1.0]))


@pytest.fixture(scope="module")
def answer() -> pf.Posterior:
    return pf.posterior(line, X, 0.7 * X[:, 0], num_draws=400, **SMALL)


def test_predictions_at_the_data_and_elsewhere(answer):
    again = answer.predictive()
    assert {name: value.shape for name, value in again.items()} == {"mean": (400, 12), "y": (400, 12)}
    assert again["y"].std(0).mean().item() == pytest.approx(0.5, abs=0.1)
    there = answer.predictive(None, torch.full((3, 1), 2.0))
    torch.testing.assert_close(there["mean"], (2 * answer.draws["slope"])[:, None].expand(400, 3))
    assert there["y"].shape == (400, 3)
    alone = dataclasses.replace(answer, question=None)
    assert alone.predictive(line, X)["y"].shape == (400, 12)
    with pytest.raises(ValueError, match="model must be given"):
        alone.predictive()
    with pytest.raises(TypeError, match=r"must be a model or None, got a Tensor. Give None first"):
        answer.predictive(X)


def test_predictions_without_a_site_to_predict_are_refused():
    draws = {"x": torch.zeros(10, 3)}
    given = pf.Posterior(draws, "trust", "", 0.0, 0.0, (), 0.0, question=Question(normal, (Y,), {}, normal))
    assert given.predictive()["y"].shape == given.predictive(None, None)["y"].shape == (10, 3)
    with pytest.raises(ValueError, match=r"must leave a site to predict.*Give None in place of the data"):
        given.predictive(None, Y)


def test_rows_of_another_number_are_drawn_anew():
    found = pf.posterior(local, torch.full((12,), 2.0), num_draws=100, **SMALL)
    model = pyro.poutine.uncondition(local)
    there = found.predictive(model, torch.zeros(30))
    assert there["level"].shape == (100, 30)
    assert there["level"].mean().item() == pytest.approx(found.draws["mean"].mean().item(), abs=0.2)


def test_an_answer_as_arviz_data_as_a_table_and_as_a_figure(answer):
    data = answer.to_arviz(posterior_predictive=True)
    assert data["posterior"].sizes == {"chain": 1, "draw": 400, "row": 12}
    assert "y" in data["posterior_predictive"]
    for group in ("posterior", "observed_data"):
        facts = {key: value for key, value in data[group].attrs.items() if key not in ("created_at", "sampling_time")}
        wanted = {"inference_method": "variational", "importance_resampled": answer.resampled}
        assert facts == {"inference_library": "pyro_flows", **wanted}
    lines = answer.summary(mean=[f"at {place}" for place in range(12)]).splitlines()
    assert lines[0].split() == ["mean", "sd", "5", "%", "95", "%"]
    assert lines[2].startswith("mean[at 0]")
    assert answer.plot() is not None
    with pytest.raises(ValueError, match=r"has no model.*pf.to_arviz\(model, found.guide"):
        dataclasses.replace(answer, question=None).to_arviz()
