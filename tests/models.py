"""Models and guides that several test files share."""

import contextlib
import dataclasses
import math
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from pyro_flows import AutoFlow, Check, Posterior
from pyro_flows.answers import Step
from pyro_flows.answers.record import Question
from pyro_flows.diagnostics import Finding
from pyro_flows.transforms import NonCentred


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


def plates(x=None, size=3):
    """Sample two nested plates, with constrained latents in both and outside."""
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("outer", 2, dim=-2):
        middle = pyro.sample("middle", dist.Normal(top, 1.0))
        with pyro.plate("inner", size, dim=-1):
            leaf = pyro.sample("leaf", dist.LogNormal(middle, 0.5))
            pair = pyro.sample("pair", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(leaf.log() + pair[..., 0], 1.0), obs=x)


def in_groups(mu, y=None, groups=6, noise=1.0):
    """Sample groups of three numbers, each around a level of its own, given their mean."""
    with pyro.plate("group", groups):
        theta = pyro.sample("theta", dist.Normal(mu, 0.5))
        return pyro.sample("y", dist.Normal(theta[..., None], noise).expand((*theta.shape, 3)).to_event(1), obs=y)


Y = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.1, 1.5]])


def sampling(**sites):
    """Return a program that draws independent sites, whatever its arguments."""

    def program(*_, **__):
        for name, law in sites.items():
            pyro.sample(name, law)

    return program


def normals(dim, scale=1.0, loc=0.0):
    """Return a vector of independent normals."""
    return dist.Normal(torch.full((dim,), loc), scale).to_event(1)


def with_posterior(law, prior):
    """Return a model of one site x with this posterior: its likelihood is the ratio of the two distributions."""

    def model():
        x = pyro.sample("x", prior)
        pyro.factor("data", law.log_prob(x) - prior.log_prob(x))

    return model


def beyond(edge, loc=0.0):
    """Return a model of a normal latent x whose likelihood is zero up to an edge."""

    def model():
        x = pyro.sample("x", dist.Normal(loc, 1.0))
        pyro.factor("wall", torch.where(x > edge, 0.0, -math.inf))

    return model


def called(guide, *args):
    """Return a guide after its first call, which makes the parameters of Pyro's guides."""
    guide(*args)
    return guide


@contextlib.contextmanager
def silent(category=Warning):
    """Turn warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", category)
        yield


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


def state(guide):
    """Return copies of the parameters."""
    return [parameter.detach().clone() for parameter in guide.parameters()]


def draws_of(guide, *args):
    """Return draws that are equal for equal guides."""
    pyro.set_rng_seed(3)
    return list(guide.sample(10, *args).values())


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def stirred(guide, scale=0.05):
    """Move a guide away from its start, frames included; what is set and not trained stays."""
    fixed = {
        id(tensor) for module in guide.modules() if isinstance(module, NonCentred) for tensor in module.parameters()
    }
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if not name.endswith("unit") and id(parameter) not in fixed:
                parameter.add_(scale * torch.randn_like(parameter))
    return guide
