"""Subsampled plates of data are weighted on all of their rows."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows import AutoFlow
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task

Y = torch.linspace(-1.0, 2.0, 10)


def regression(y, size=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("outside", dist.Normal(mean, 1.0), obs=torch.tensor(0.5))
    with pyro.plate("rows", len(y), subsample_size=size) as rows:
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y[rows])


def mixture(y, size=None):
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    with pyro.plate("rows", len(y), subsample_size=size) as rows:
        k = pyro.sample("k", dist.Bernoulli(weight))
        pyro.sample("y", dist.Normal(2 * k, 0.5), obs=y[rows])


def taking(y, size=None):
    """Return ``x @ w``, which runs under vmap."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(y), subsample_size=size) as rows:
        pyro.sample("y", dist.Normal(torch.stack((y, y**2), -1)[rows] @ w, 0.5), obs=y[rows])


@pytest.mark.parametrize("size", [1, 3, 5, 7, 10])
@pytest.mark.parametrize("model", [regression, mixture, taking])
def test_the_density_is_that_of_all_rows(model, size):
    guide = AutoFlow(model).setup(Y)
    draws = Task(model, guide, (Y,), {}).check().draw(20)
    part = Task(model, guide, (Y, size), {}).check().settle()
    torch.testing.assert_close(part.model.log_prob(draws.latents, 20), draws.log_p, rtol=1e-5, atol=1e-4)
    if not part.model.enumerated:  # then a population of annealing reads the prior off the same run
        spaces = [Density(task) for task in (part, Task(model, guide, (Y,), {}).check())]
        z = torch.randn(20, spaces[0].dim)
        torch.testing.assert_close(*(space.log_prior_and_prob(z) for space in spaces), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_verdicts_and_evidence_are_those_of_all_rows():
    guide = AutoFlow(regression)
    pf.fit_svi(regression, guide, Y, 4, steps=100, progress=False)
    whole, part = (pf.psis(regression, guide, Y, size) for size in (None, 4))
    assert abs(whole.log_evidence - part.log_evidence) < 4 * (whole.log_evidence_se + part.log_evidence_se)
    checks = [pf.check(regression, guide, Y, size, num_samples=2000) for size in (None, 4)]
    assert checks[0].verdict == checks[1].verdict
    noise = math.hypot(*(float(found.chains.error_se.max()) for found in checks))
    assert abs(checks[0].drift - checks[1].drift) < 4 * noise
    assert noise < 0.1
    assert pf.refine(regression, guide, Y, 4, num_samples=10, transitions=4).draws["mean"].shape == (10,)
    assert pf.resample(regression, guide, Y, 4, num_samples=10)["mean"].shape == (10,)


def local(y, size=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])


def chosen(y, rows):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), subsample=rows):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y[rows])


def test_rows_with_latents_or_from_elsewhere_are_refused_by_the_plate():
    rows = torch.tensor([1, 4])
    for model, guide, chosen_rows in ((local, pf.AutoPlateFlow(local, "rows"), 3), (chosen, AutoFlow(chosen), rows)):
        guide.setup(Y, chosen_rows)
        with pytest.raises(ValueError, match=r"lies in plate 'rows', which is subsampled \([23] of 10 rows\)"):
            pf.psis(model, guide, Y, chosen_rows)


def shared(y, size=None):
    """Sample a discrete latent outside of the plate: all rows share it, so that its sum does not factorise."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    side = pyro.sample("side", dist.Bernoulli(0.5))
    with pyro.plate("rows", len(y), subsample_size=size) as rows:
        pyro.sample("y", dist.Normal(mean + side, 0.5), obs=y[rows])


def test_a_sum_that_all_rows_share_is_not_taken_apart():
    guide = AutoFlow(shared).setup(Y, 5)
    assert pf.psis(shared, guide, Y, num_samples=50).log_weights.isfinite().all()
    with pytest.raises(ValueError, match=r"lies in plate 'rows', which is subsampled \(5 of 10 rows\)"):
        pf.psis(shared, guide, Y, 5, num_samples=50)
