"""The door goes on until its draws can be trusted, says so if they cannot, and loses nothing on the way."""

from __future__ import annotations

import dataclasses
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import with_verdict
from torch import Tensor

import pyro_flows as pf
from pyro_flows import AutoFlow, check, flows
from pyro_flows.answers import stages
from pyro_flows.diagnostics import verdict
from pyro_flows.diagnostics.missing_modes import Missing

small = functools.partial(flows.realnvp, num_transforms=4, hidden_dims=(16,))
Y = torch.tensor([1.0, 0.0, -2.0])


def normal(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def two_modes() -> None:
    parts = dist.Normal(torch.tensor([-4.0, 4.0]), 1.0)
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    logits = parts.log_prob(z[..., :1]) - math.log(2)
    pyro.factor("modes", logits.logsumexp(-1) - z[..., 1].square() / 2)


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    """Use small populations, and few sweeps of chains."""
    monkeypatch.setattr(stages, "PARTICLES", 512)
    monkeypatch.setattr(stages, "SWEEPS", 20)


def distrust(*args, **kwargs):
    """Return a coarse check that trusts no guide, and so skips the search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "search", lambda *_: Missing(0.0, 0.0))
        return with_verdict(check(*args, num_samples=1000, num_chains=16, **kwargs), "do not trust")


def names(answer: pf.Posterior) -> list[str]:
    return [step.name for step in answer.steps]


def test_a_guide_that_is_trusted_is_the_answer():
    found = pf.posterior(normal, Y, guide=lambda model: AutoFlow(model, small), num_draws=500, progress=False)
    assert names(found) == ["fit", "check"]
    assert found.trusted
    assert found.draws["x"].shape == (500, 3)
    torch.testing.assert_close(found.draws["x"].mean(0), Y / 2, rtol=0, atol=0.15)
    evidence = dist.Normal(0.0, math.sqrt(2)).log_prob(Y).sum().item()
    assert abs(found.log_evidence - evidence) < 5 * found.log_evidence_se + 1e-3
    assert "x[2]" in repr(found)


@pytest.mark.slow
def test_a_missing_mode_is_found():
    pyro.set_rng_seed(1)
    found = pf.posterior(two_modes, progress=False)
    assert names(found) == ["fit", "check", "population", "check"]
    assert found.trusted
    assert (found.draws["z"][:, 0] > 0).float().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_draws_are_exact_where_the_guide_is_not_trusted(monkeypatch):
    monkeypatch.setattr(stages, "check", distrust)
    found = pf.posterior(normal, Y, num_draws=400, progress=False)
    assert names(found) == ["fit", "check", "chains"]
    assert found.trusted
    assert found.chains.converged
    assert found.draws["x"].shape == (400, 3)


@pytest.mark.slow
def test_less_evidence_than_before_is_not_trusted():
    """A second guide with one of two modes, exactly, is not trusted after a first one with both."""

    def both() -> None:
        parts = dist.Normal(torch.tensor([-9.0, 9.0]), 1.0)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))

    whole = check(both, both)
    run = stages.Stages(stages.Question(both, (), {}), 100, progress=False)
    run.judged.append(stages.Judged(both, whole))
    half = dataclasses.replace(whole, psis=dataclasses.replace(whole.psis, log_evidence=whole.log_evidence - 0.69))
    found = run._compared(half)
    assert found.verdict == "do not trust"
    assert "0.69 nats more evidence" in found.reason
    assert run._compared(whole).trusted
