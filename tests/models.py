"""Models that several test files share."""

from __future__ import annotations

import dataclasses

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from pyro_flows import AutoFlow, Check, Posterior
from pyro_flows.answers import Step
from pyro_flows.answers.record import Question
from pyro_flows.diagnostics import Finding


def nested(y=None, *, noise=1.0):
    """Sample two nested plates, a factor, a deterministic site and data."""
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


def with_verdict(found: Check, verdict: str) -> Check:
    """Return a check with the findings that lead to a verdict."""
    findings = () if verdict == "trust" else (Finding("mean", "x", 1.0, 0.1, verdict),)
    return dataclasses.replace(found, findings=findings)


def prior_answer(model, *args, verdict="trust", said="", **_):
    """Return an answer of draws from the prior at once, in place of that of ``pf.posterior``."""
    draws = {}
    trace = poutine.trace(poutine.uncondition(model)).get_trace(*args)
    for name in poutine.trace(model).get_trace(*args).stochastic_nodes:
        if not site_is_subsample(trace.nodes[name]):
            draws[name] = trace.nodes[name]["fn"].sample((4000,))
    steps = (Step("fit", 1.5, "", "AutoFlow"), Step("check", 0.5, verdict, said))
    return Posterior(
        draws, verdict, "For a test.", -31.3, 0.004, steps, 2.0, AutoFlow(model), None, Question(model, args, {}, model)
    )
