"""Supports that depend on other latents, compared with models that draw on fixed supports and stretch."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO

import pyro_flows as pf
from pyro_flows import AutoFlow, AutoPlateFlow
from pyro_flows.encoders import MLPEncoder

Y = torch.tensor(2.0)


def nested(y=None):
    a = pyro.sample("a", dist.LogNormal(0.0, 0.5))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    with pyro.plate("rows", 3):
        c = pyro.sample("c", dist.Uniform(-b, a))
    pyro.sample("y", dist.Normal(c.sum(-1, keepdim=c.dim() > 1) + b, 0.5), obs=y)


def stretched(y):
    a = pyro.sample("a", dist.LogNormal(0.0, 0.5))
    b = pyro.deterministic("b", a * pyro.sample("u", dist.Uniform(0.0, 1.0)))
    with pyro.plate("rows", 3):
        v = pyro.sample("v", dist.Uniform(torch.zeros(()), 1.0))
        c = pyro.deterministic("c", (a + b) * v - b)
    pyro.sample("y", dist.Normal(c.sum(-1, keepdim=c.dim() > 1) + b, 0.5), obs=y)


@pytest.mark.slow
def test_a_guide_is_what_it_is_for_the_stretched_twin():
    """The unconstrained spaces are the same, and so are the fits, draw by draw.

    Adam trains these guides.  SOAP would not do: with gradients of less than full rank, its bases depend on round-off.
    """
    losses, draws = [], []
    for model in (nested, stretched):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = AutoFlow(model)
        losses.append(pf.fit_svi(model, guide, Y, steps=20, num_particles=32, progress=False).losses)
        pyro.set_rng_seed(2)
        draws.append(pf.psis(model, guide, Y, num_samples=100).log_weights)
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*draws, rtol=1e-3, atol=1e-3)


def test_draws_lie_in_their_supports_and_have_the_density_of_their_draws():
    guide = AutoFlow(nested, init_scale=0.7).setup(Y)
    values = guide.sample(500, Y)
    assert (values["b"] < values["a"]).all()
    assert ((values["c"] > -values["b"].unsqueeze(-1)) & (values["c"] < values["a"].unsqueeze(-1))).all()
    log_q = guide.log_prob(values, Y)
    packed, log_det = guide.pack(values, Y)
    torch.testing.assert_close(guide.get_posterior(Y).log_prob(packed) + log_det, log_q)
    batches = {name: value.reshape(20, 25, *value.shape[1:]) for name, value in values.items()}
    torch.testing.assert_close(guide.log_prob(batches, Y), log_q.reshape(20, 25))
    assert (guide.log_prob({**values, "b": values["a"] + 1.0}, Y) == -torch.inf).all()


def test_the_density_integrates_to_one():
    """Importance sampling from the prior, which covers the support, gives an integral of one."""
    guide = AutoFlow(nested, init_scale=0.3).setup(Y)
    prior = pf.simulate(nested, num_simulations=40_000).latents
    log_prior = dist.LogNormal(0.0, 0.5).log_prob(prior["a"]) - prior["a"].log()
    log_prior -= 3 * (prior["a"] + prior["b"]).log()
    weights = (guide.log_prob(prior, Y) - log_prior).exp()
    assert abs(weights.mean() - 1) < 5 * weights.std() / 200


@pytest.mark.slow
def test_pyros_own_training_and_prediction_take_it():
    guide = AutoFlow(nested)
    for elbo in (Trace_ELBO(), Trace_ELBO(4, max_plate_nesting=1, vectorize_particles=True)):
        svi = SVI(nested, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        assert all(abs(svi.step(Y)) < 1e4 for _ in range(3))
    found = Predictive(nested, guide=guide, num_samples=5)(Y)
    assert found["c"].shape[-1] == 3
    assert pf.check(nested, guide, Y, num_samples=200, num_chains=16).names[:2] == ["a", "b"]
    twin = copy.deepcopy(guide)
    torch.testing.assert_close(twin.median(Y)["a"], guide.median(Y)["a"], rtol=0.1, atol=0.1)


def test_guides_that_cannot_move_supports_refuse_them_by_name():
    for guide in (AutoPlateFlow(nested, "rows"), AutoFlow(nested, encoder=MLPEncoder(1, context_dim=2))):
        with pytest.raises(ValueError, match=r"Flow: the support of latent site 'b', .* depends on another latent"):
            guide.setup(torch.tensor([2.0]))


def test_a_guide_without_its_model_says_why_it_cannot_draw(tmp_path):
    guide = AutoFlow(nested).setup(Y)
    pf.save(guide, tmp_path / "guide.pt")
    with pytest.raises(ValueError, match="the supports of some latents depend on other latents"):
        pf.load(tmp_path / "guide.pt").sample(3, Y)
