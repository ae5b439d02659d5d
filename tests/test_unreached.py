"""Guides whose support is narrower than the posterior's are refused by all that weighs or moves their draws."""

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import called, normals, sampling
from pyro.infer.autoguide import AutoNormal
from torch.distributions import biject_to, constraints, transforms

import pyro_flows as pf
from pyro_flows import AutoFlow, AutoPlateFlow, AutoStructuredFlow
from pyro_flows.diagnostics.unreached import REACH, unreached
from pyro_flows.programs.model_and_guide import Task

VERBS = {
    "sample": lambda model, guide: pf.sample(model, guide, progress=False),
    "refine": lambda model, guide: pf.refine(model, guide, num_samples=100),
    "resample": pf.resample,
    "psis": pf.psis,
}
WORDS = r"guide must reach where the model has mass, got \d\d% .* of the guide's site 'x'.*Give the site"


def model() -> None:
    """Model whose posterior is Normal(0.5, 0.71), with 48 % of its mass outside (0, 1) and 24 % below 0."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def mapped(*parts, base=None) -> dist.TransformedDistribution:
    """Return a transformed normal distribution, or another one."""
    return dist.TransformedDistribution(base or dist.Normal(torch.tensor(0.0), 1.0), list(parts))


def frozen(kind):
    """Return a guide of Pyro or of ours that was built for another prior."""
    return called(kind(sampling(x=dist.Uniform(0.0, 1.0))))


# Distributions over (0, 2) and (0, 1), of which torch says that their support is the real line.
scaled = mapped(transforms.SigmoidTransform(), transforms.AffineTransform(0.0, 2.0))
shifted = mapped(transforms.AffineTransform(1.0, 1.0), base=dist.Uniform(-1.0, 0.0))


@pytest.mark.parametrize("verb", VERBS)
def test_a_guide_that_cannot_reach_the_mass_is_refused(verb):
    for guide in (sampling(x=dist.Uniform(0.0, 1.0)), sampling(x=dist.HalfNormal(1.0))):
        with pytest.raises(ValueError, match=f"^{verb}: {WORDS}"):
            VERBS[verb](model, guide)


NARROW = {
    "interval": (lambda: sampling(x=dist.Uniform(0.0, 1.0)), 0.4795),
    "half line": (lambda: sampling(x=dist.LogNormal(0.0, 1.0)), 0.2398),
    "transformed": (lambda: sampling(x=scaled), 0.2398 + 0.0169),
    "transformed from an interval": (lambda: sampling(x=shifted), 0.4795),
    "Pyro's guide of another prior": (lambda: frozen(AutoNormal), 0.4795),
    "our guide of another prior": (lambda: frozen(AutoFlow), 0.4795),
}


@pytest.mark.parametrize("name", NARROW)
def test_the_mass_outside_is_measured(name):
    guide, share = NARROW[name]
    found = unreached(Task(model, guide(), (), {}))
    assert abs(found.share - share) < 4 * found.share_se
    assert found.outside == "site 'x'"


def test_a_check_names_the_site_and_the_way_out():
    found = pf.check(model, sampling(x=dist.HalfNormal(1.0)), num_samples=1000, num_chains=32)
    assert found.verdict == "do not trust"
    assert found.reason.startswith("The support of the guide's site 'x' leaves out ")
    assert "Give the site a distribution over the model's support" in repr(found)


def improper(support, event: int) -> dist.ImproperUniform:
    return dist.ImproperUniform(support, torch.Size(), torch.Size([event] if event else []))


TWO = dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1)
HALVES = dist.Uniform(torch.tensor([0.0, 0.5]), torch.tensor([0.5, 1.0]))
SAME = {  # distributions of the model's and of the guide's site
    "vector": (normals(3), dist.MultivariateNormal(torch.zeros(3), torch.eye(3))),
    "flow": (normals(3), pf.flows.nsf(3)()),
    "nonnegative": (dist.HalfNormal(1.0), dist.LogNormal(0.0, 1.0)),
    "positive": (dist.LogNormal(0.0, 1.0), dist.HalfCauchy(1.0)),
    "positive by exp": (dist.Gamma(2.0, 1.0), mapped(transforms.ExpTransform())),
    "unit interval": (dist.Beta(2.0, 2.0), dist.Uniform(0.0, 1.0)),
    "interval by its map": (dist.Uniform(-1.0, 3.0), mapped(biject_to(constraints.interval(-1.0, 3.0)))),
    "intervals": (TWO, TWO.expand(())),
    "double": (dist.Uniform(torch.zeros((), dtype=torch.float64), 1.0), dist.Uniform(0.0, 1.0)),
    "mixture": (dist.Uniform(0.0, 1.0), dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), HALVES)),
    "transform without an inverse": (
        normals(2),
        mapped(dist.transforms.planar(2), base=dist.Normal(torch.zeros(2), 1.0)),
    ),
    "wider": (dist.Uniform(0.0, 1.0), dist.Normal(0.5, 0.1)),
    "simplex": (dist.Dirichlet(torch.ones(3)), dist.Dirichlet(2 * torch.ones(3))),
    "Cholesky": (dist.LKJCholesky(3, 1.0), dist.LKJCholesky(3, 2.0)),
    "angle": (dist.VonMises(0.0, 1.0), dist.VonMises(0.0, 2.0)),
    "flat": (improper(constraints.positive, 0), dist.LogNormal(0.0, 1.0)),
    "ordered": (
        improper(dist.constraints.ordered_vector, 3),
        mapped(dist.transforms.OrderedTransform(), base=normals(3)),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_and_wider_supports_are_no_fault(name, monkeypatch):
    """No population is annealed, so the check costs nothing."""
    of_model, of_guide = SAME[name]
    monkeypatch.setattr("pyro_flows.diagnostics.unreached.anneal", None)
    assert unreached(Task(sampling(x=of_model), sampling(x=of_guide), (), {})).share == 0


def test_the_posterior_may_lie_where_no_draw_of_the_prior_does() -> None:
    def far() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 400):
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.full((400,), 4.5))

    with pytest.raises(ValueError, match=r"got 100% .* of the guide's site 'x'"):
        pf.psis(far, sampling(x=dist.Uniform(-3.8, 3.8)))


@pytest.mark.slow
def test_a_check_of_many_latents_compares_supports() -> None:
    def many() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(1100), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(1100))

    found = pf.check(many, sampling(x=dist.Uniform(-0.5 * torch.ones(1100), 0.5).to_event(1)))
    assert found.verdict == "do not trust"
    assert "The support of the guide's site 'x' leaves out an unknown part" in found.reason


def hierarchy() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("row", 4):
        pyro.sample("z", dist.Beta(1 + scale, 2.0))


def moving() -> None:
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(0.0, 1 - a))
    pyro.sample("y", dist.Normal(a + b, 0.5), obs=torch.tensor(0.5))


KINDS = AutoFlow, AutoStructuredFlow, AutoNormal, lambda program: AutoPlateFlow(program, "row")


@pytest.mark.parametrize(
    ("program", "kind"),
    [*((hierarchy, kind) for kind in KINDS), (moving, AutoFlow), (sampling(x=dist.VonMises(0.0, 1.0)), AutoFlow)],
)
def test_automatic_guides_of_the_model_reach_all_of_it(program, kind, monkeypatch):
    monkeypatch.setattr("pyro_flows.diagnostics.unreached.anneal", None)
    guide = called(kind(program))
    assert unreached(Task(program, guide, (), {})).share == 0


def test_a_narrower_support_is_no_fault_where_the_model_has_no_mass():
    """A negative scale has no density, and the posterior of a mean lies far from 0."""

    def program() -> None:
        scale = pyro.sample("scale", dist.Normal(1.0, 1.0))
        mean = pyro.sample("mean", dist.Normal(5.0, 5.0))
        pyro.sample("y", dist.Normal(mean, scale).expand([20]).to_event(1), obs=5 + torch.linspace(-1.5, 1.5, 20))

    guide = sampling(scale=dist.LogNormal(0.0, 0.2), mean=dist.LogNormal(1.6, 0.06))
    found = unreached(Task(program, guide, (), {}))
    assert found.share < 0.01
    assert pf.psis(program, guide, num_samples=1000).reliable


def test_what_cannot_be_looked_at_is_said(monkeypatch):
    monkeypatch.setattr("pyro_flows.diagnostics.unreached.REACH", dataclasses.replace(REACH, latents=0))
    with pytest.warns(UserWarning, match="psis: the support of the guide's site 'x' is narrower .* Give the site"):
        pf.psis(model, sampling(x=dist.Uniform(0.0, 1.0)), num_samples=100)
