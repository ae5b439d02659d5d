"""Amortised guides, trained on simulations.

They find known posteriors of new data, at all scales and within all bounds.  They can be bound to one dataset, stop and
resume, and improve in truncated rounds.  Errors name the argument or the site.
"""

import functools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_guides import Line
from grouped_options import grouped
from models import same, silent, state
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.reparam import NeuTraReparam
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pyro_flows as pf
from pyro_flows import AutoFlow, AutoPlateFlow, Flow, fit_amortized, fit_svi, flows, psis, simulate
from pyro_flows.bijectors import Affine
from pyro_flows.encoders import Arguments, GRUEncoder, MLPEncoder, SetEncoder
from pyro_flows.fitting import Observed, amortized
from pyro_flows.programs import Program, Simulations
from pyro_flows.programs.simulator import Simulator
from pyro_flows.transforms import Elementwise, QuantileMap

small = functools.partial(flows.nsf_ar, num_transforms=2, hidden_dims=(16,))


def quick(*args: Any, **settings: Any) -> pf.Fit:
    """Fit in two epochs; options of training may be given one by one."""
    usual = {"simulations": 200, "max_epochs": 2, "batch_size": 64, "progress": False}
    return fit_amortized(*args, **{**usual, **grouped(settings)})


DESIGN = torch.tensor([[1.0, 0.5], [0.0, 1.0], [-1.0, 1.0]])
NOISE = 0.5


def linear(x=None):
    """theta ~ N(0, I) in two dimensions, x ~ N(A theta, I / 4) in three: the posterior is known."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    location = (theta[..., None, :] * DESIGN).sum(-1)
    return pyro.sample("x", dist.Normal(location, NOISE).to_event(1), obs=x)


COV = torch.linalg.inv(torch.eye(2) + DESIGN.T @ DESIGN / NOISE**2)


def exact_mean(x: Tensor) -> Tensor:
    return x @ DESIGN @ COV / NOISE**2


def log_evidence(x: Tensor) -> float:
    cov = DESIGN @ DESIGN.T + NOISE**2 * torch.eye(3)
    return dist.MultivariateNormal(torch.zeros(3), cov).log_prob(x).item()


@pytest.fixture(scope="module")
def trained():
    """Return a trained guide of the linear model, and the record of its fit."""
    pyro.set_rng_seed(0)
    guide = AutoFlow(linear, small, encoder=MLPEncoder(3, 4, (32,)))
    fit = fit_amortized(linear, guide, simulations=5000, max_epochs=18, batch_size=100, lr=1e-2, progress=False)
    return guide, fit


X = torch.tensor([0.8, -0.3, 1.1])


def simulations_of(model, number: int = 5, *args: Any, **kwargs: Any) -> Tensor:
    return Simulator("test", model, args, kwargs).draw(number).data["x"]


# Known answers.


@pytest.mark.slow
def test_posteriors_of_new_data_are_found(trained):
    """Errors are in the posterior's sd.  The standard error of 2000 draws is 0.022 for means and 1.6 % for sds."""
    guide, _ = trained
    off = []
    for x in simulations_of(linear, 12):
        draws = guide.sample(2000, x)["theta"]
        assert draws.shape == (2000, 2)
        off.append((draws.mean(0) - exact_mean(x)) / COV.diagonal().sqrt())
        ratio = torch.linalg.solve(COV, draws.T.cov())
        assert (torch.linalg.eigvals(ratio).real.sqrt().log()).abs().max() < 0.25
    assert torch.stack(off).square().mean().sqrt() < 0.2
    assert torch.stack(off).abs().max() < 0.5


def test_the_loss_is_the_entropy_of_the_posterior(trained):
    """-E log q is the entropy of the exact posterior plus the divergence, which is not negative."""
    _, fit = trained
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * COV).item()
    error = 1 / math.sqrt(500)  # standard error of the mean of 500 half chi-squares of two degrees
    assert -4 * error < fit.best_loss - entropy < 0.05 + 4 * error
    assert fit.held_out.min().item() == fit.best_loss
    assert fit.guide.training is False


def test_weights_give_the_evidence(trained):
    guide, _ = trained
    for x in (X, -X):
        found = psis(linear, guide, x, num_samples=2000)
        assert abs(found.log_evidence - log_evidence(x)) < 0.01 + 4 * found.log_evidence_se
        assert found.ess > 1000
    draws = pf.resample(linear, guide, X, num_samples=1000)["theta"]
    assert ((draws.mean(0) - exact_mean(X)) / COV.diagonal().sqrt()).abs().max() < 0.15


def test_many_data_sets_at_once(trained):
    guide, _ = trained
    xs = simulations_of(linear, 6)
    draws = guide.sample(50, xs)["theta"]
    assert draws.shape == (50, 6, 2)
    scores = guide.log_prob({"theta": draws}, xs)
    assert scores.shape == (50, 6)
    alone = torch.stack([guide.log_prob({"theta": draws[:, i]}, x) for i, x in enumerate(xs)], 1)
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)


def series(x=None, times=None, mask=None):
    """Noisy values of a line at random times, some of them missing."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    times = pyro.sample("times", dist.Uniform(0.0, 5.0).expand([6]).to_event(1), obs=times)
    mask = pyro.sample("mask", dist.Bernoulli(0.7).expand([6]).to_event(1), obs=mask)
    noise = dist.Normal((slope[..., None] * times)[..., None], 0.5).mask(mask[..., None].bool())
    return pyro.sample("x", noise.to_event(2), obs=x)


def test_an_encoder_takes_some_of_the_models_arguments():
    """A mask of a model may be drawn by it, as zeros and ones; what training has given cannot be left out."""
    guide = AutoFlow(series, small, encoder=Arguments(GRUEncoder(1, 4, 8), 0, times=1, mask=2))
    quick(series, guide)
    assert not guide.encoder.network.standardize.is_fresh
    drawn = simulate(series, num_simulations=3).data
    assert guide.sample(5, drawn["x"], drawn["times"], drawn["mask"])["slope"].shape == (5, 3)
    x, times, mask = (drawn[name][0] for name in ("x", "times", "mask"))
    net = guide.encoder.network
    assert torch.equal(guide.context(x, times, mask), net(x, mask.bool(), times))
    with pytest.raises(ValueError, match=r"times \(argument 1 of the model\) must be given, as in all of training"):
        guide.context(x, mask=mask)
    with pytest.raises(ValueError, match=r"mask \(argument 2 of the model\) must be given.*Give ones if nothing"):
        guide.sample(5, x, times)
    with pytest.warns(
        UserWarning, match=r"GRUEncoder: the data have 12 elements, but training had [0-3] to 6\. Train on"
    ):
        guide.encoder(torch.randn(12, 1), torch.arange(12), torch.ones(12))
    assert psis(series, guide, x, times, mask, num_samples=25).log_weights.isfinite().all()


def test_with_and_without_module_local_params(local_params):
    guide = AutoFlow(linear, small, encoder=MLPEncoder(3, 4, (8,)))
    losses = quick(linear, guide, max_epochs=6, batch_size=15, lr=0.01).losses
    assert losses[-12:].mean() < losses[:12].mean() - 0.2
    assert not list(pyro.get_param_store().keys())
    guide(X)
    assert bool(pyro.get_param_store().keys()) != local_params


@pytest.mark.slow
def test_bad_scales_are_standardised():
    """Latents of 1e4 ± 10 and data of 1e-3 give the same fit as latents and data of unit scale."""

    def model(x=None):
        theta = pyro.sample("theta", dist.Normal(torch.tensor([1e4, -3e-4]), torch.tensor([10.0, 1e-4])).to_event(1))
        unit = (theta - torch.tensor([1e4, -3e-4])) / torch.tensor([10.0, 1e-4])
        return pyro.sample("x", dist.Normal(5e3 + 1e-1 * unit, 0.5e-1).to_event(1), obs=x)

    guide = AutoFlow(model, small, encoder=MLPEncoder(2, 4, (32,)))
    fit = fit_amortized(model, guide, simulations=3000, max_epochs=12, batch_size=100, lr=0.01, progress=False)
    # Each unit latent has the posterior variance 1 / (1 + 4).
    entropy = math.log(2 * math.pi * math.e / 5) + math.log(10 * 1e-4)
    assert -4 / math.sqrt(300) < fit.best_loss - entropy < 0.1 + 4 / math.sqrt(300)
    draws = guide.sample(1000, torch.tensor([5e3 + 1e-1, 5e3]))["theta"]
    unit = (draws - torch.tensor([1e4, -3e-4])) / torch.tensor([10.0, 1e-4])
    assert ((unit.mean(0) - torch.tensor([0.8, 0.0])) / math.sqrt(1 / 5)).abs().max() < 0.35


def bounded(x=None):
    """Posteriors that concentrate at the bounds of the prior."""
    a = pyro.sample("a", dist.Uniform(2.0, 3.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    size = pyro.sample("size", dist.HalfNormal(1.0))
    location = torch.stack((a, share[..., 0], size), -1)
    return pyro.sample("x", dist.Normal(location, 0.3).to_event(1), obs=x)


def test_nothing_leaks_out_of_bounds():
    guide = AutoFlow(bounded, small, encoder=MLPEncoder(3, 4, (16,)))
    quick(bounded, guide, simulations=1000, max_epochs=8)
    for x in (torch.tensor([1.5, 1.2, -0.5]), torch.tensor([9.0, -4.0, 7.0])):
        draws = guide.sample(2000, x)
        assert ((draws["a"] >= 2) & (draws["a"] <= 3)).all()
        assert dist.constraints.simplex.check(draws["share"]).all()
        assert (draws["size"] >= 0).all()
        off = {"a": torch.tensor([1.9, 2.5, 3.1]), "share": torch.ones(3, 3) / 3, "size": torch.ones(3)}
        scores = guide.log_prob(off, x)
        assert scores[0] == scores[2] == -math.inf
        assert scores[1].isfinite()
        # All mass of the density lies inside, so its mean over the volume is one over the volume.
    a = torch.linspace(2, 3, 2002)[1:-1]

    def one(x=None):
        a = pyro.sample("a", dist.Uniform(2.0, 3.0))
        return pyro.sample("x", dist.Normal(a[..., None], 0.3).to_event(1), obs=x)

    guide = AutoFlow(one, small, encoder=MLPEncoder(1, 2, (8,)))
    quick(one, guide)
    mass = guide.log_prob({"a": a}, torch.tensor([2.6])).exp().mean().item()
    assert mass == pytest.approx(1, abs=0.01)


# Data arguments.


def test_an_untrained_guide_is_the_prior():
    """Fixed maps of an amortised guide take normals to draws of the prior; guides of one dataset have none."""

    def model(x=None):
        a = pyro.sample("a", dist.Uniform(-1.0, 3.0))
        b = pyro.sample("b", dist.HalfCauchy(2.0))
        return pyro.sample("x", dist.Normal(a, b), obs=x)

    guide = AutoFlow(model, encoder=lambda x: x[..., None])
    fit_amortized(model, guide, simulations=5000, max_epochs=1, lr=1e-9, progress=False)
    drawn = guide.sample(20_000, torch.zeros(()))
    for share in ((drawn["a"] + 1) / 4, dist.HalfCauchy(2.0).cdf(drawn["b"])):
        found = torch.histc(share, 10, 0, 1) / len(share)
        assert (found - 0.1).abs().max() < 5 * (0.09 / 5000 + 0.09 / 20_000) ** 0.5
    bound = guide.bind(torch.zeros(()))
    assert isinstance(bound.flow.transforms[-2], QuantileMap)
    assert not any(isinstance(part, QuantileMap) for part in AutoFlow(model).setup(torch.zeros(())).flow.modules())


def test_arguments_of_every_kind():
    """Fixed, renamed, several, keyword and integer arguments reach the encoder as they reach the model."""

    def model(scale, counts=None, *, y=None):
        rate = pyro.sample("rate", dist.LogNormal(0.0, scale))
        pyro.sample("seen", dist.Poisson(rate), obs=counts)
        pyro.sample("y", dist.Normal(rate.log(), 0.5), obs=y)

    class Both(MLPEncoder):
        def forward(self, scale, counts, *, y):
            assert scale == 1.5
            return super().forward(torch.stack((counts.log1p(), y), -1))

    guide = AutoFlow(model, small, encoder=Both(2, 4, (8,)))
    fit = quick(model, guide, 1.5, simulations=500, max_epochs=12, lr=0.01)
    assert fit.losses[-7:].mean() < fit.losses[:7].mean()
    assert guide.sample(5, 1.5, torch.tensor(3.0), y=torch.tensor(1.0))["rate"].shape == (5,)
    assert not torch.equal(guide.encoder.standardize.scale, torch.ones(2))
    low = guide.sample(200, 1.5, torch.tensor(0.0), y=torch.tensor(-2.0))["rate"].log().mean()
    high = guide.sample(200, 1.5, torch.tensor(20.0), y=torch.tensor(2.0))["rate"].log().mean()
    assert high > low + 0.5


@pytest.mark.slow
def test_plates_sets_and_delta_simulators():
    def simulator(theta, noise):
        return theta[..., None, None] + noise

    def model(x=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.Normal(torch.zeros(5, 1), 1.0).to_event(2))
        return pyro.sample("x", dist.Delta(simulator(theta, noise), event_dim=2), obs=x)

    guide = AutoFlow(poutine.block(model, hide=["noise"]), small, encoder=SetEncoder(1, 4, (16,), num_queries=1))
    quick(model, guide, simulations=2000, max_epochs=10, lr=0.01)
    assert guide.latent_dim == 1
    draws = guide.sample(2000, 1.2 + torch.linspace(-1.4, 1.4, 5)[:, None])["theta"]
    # Five unit observations: N(5 · 1.2 / 6, 1 / 6).
    assert abs(draws.mean() - 1) < 0.5 / math.sqrt(6)
    assert draws.std().item() == pytest.approx(1 / math.sqrt(6), rel=0.3)


def test_modules_as_models_in_float64_and_functions_as_encoders():
    class Model(nn.Module):
        def forward(self, x=None):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)

    model = Model()
    for encoder in (lambda x: x, MLPEncoder(2, 4, (8,)).double()):
        guide = AutoFlow(model, small, encoder=encoder)
        assert quick(model, guide).losses.isfinite().all()
        draws = guide.sample(3, torch.zeros(2, dtype=torch.float64))["theta"]
        assert (draws.shape, draws.dtype) == ((3, 2), torch.float64)


@pytest.mark.slow
def test_simulations_made_before():
    """Given simulations train in any order, and new simulations of the same number train equally well."""
    made = simulate(linear, num_simulations=600)
    order = made.latents["theta"][:, 0].argsort()
    losses = []
    for simulations in (made, made.take(order), 600):
        pyro.set_rng_seed(0)
        guide = AutoFlow(linear, small, encoder=MLPEncoder(3, 4, (16,)))
        settings = {"max_epochs": 12, "lr": 0.01}
        losses.append(quick(linear, guide, simulations=simulations, **settings).best_loss)
    assert max(losses) - min(losses) < 4 * math.sqrt(2 / 60) + 0.2  # 60 rows are held out
    assert max(losses) < 2.4  # the entropy of the prior is 2.84
    guide = AutoFlow(linear, small, encoder=MLPEncoder(3, 4, (16,)))
    words = r"simulations must hold at least 20 draws of the data arguments \['x'\], got"
    refused(linear, words + " 19", simulations=made.take(slice(0, 19)), guide=guide)
    refused(linear, words + r" 600 of \['y'\]", simulations=Simulations(made.latents, {"y": made.data["x"]}))
    refused(linear, "either simulations or Observed", simulations=made, datasets=Observed({"x": X}))


def test_discrete_latents_are_named():
    """A discrete site that observes an argument is no latent, and one that the user hides needs no word."""

    def mixture(x=None, count=None):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        theta = pyro.sample("theta", dist.Normal(4 * k - 2, 1.0))
        pyro.sample("count", dist.Poisson(theta.exp()), obs=count)
        pyro.sample("x", dist.Bernoulli(logits=theta), obs=x)

    def encode(x, count):
        return torch.stack((x, count), -1)

    shown = AutoFlow(mixture, small, encoder=encode)
    hidden = AutoFlow(poutine.block(mixture, hide=["k"]), small, encoder=encode)
    words = r"fit_amortized: the posterior of discrete latents is not learned, here 'k'\. .*hide=\['k'\]"
    with pytest.warns(UserWarning, match=words) as found:
        quick(mixture, shown, max_epochs=1)
    assert len(found) == 1
    assert shown.sample(2, torch.ones(()), torch.ones(())).keys() == {"theta"}
    with silent():
        quick(mixture, hidden, max_epochs=1)


# Guides bound to one dataset.


def test_a_bound_guide_has_the_same_density(trained):
    guide, _ = trained
    before, bound = state(guide), guide.bind(X)
    assert bound.encoder is None
    draws = guide.sample(50, X)
    for args in ((), (X,)):  # a bound guide ignores its arguments
        torch.testing.assert_close(bound.log_prob(draws, *args), guide.log_prob(draws, X), rtol=1e-4, atol=1e-4)
    pyro.set_rng_seed(2)
    mine = bound.sample(5)["theta"]
    pyro.set_rng_seed(2)
    torch.testing.assert_close(mine, guide.sample(5, X)["theta"], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for parameter in bound.parameters():
            parameter.add_(0.1)
    assert same(state(guide), before)


@pytest.mark.slow
def test_a_bound_guide_trains_on(local_params):
    guide = AutoFlow(linear, small, encoder=MLPEncoder(3, 4, (8,)))
    quick(linear, guide, simulations=300, max_epochs=5)
    bound = guide.bind(X)
    rough = psis(linear, bound, X, num_samples=500).log_weights.mean()
    assert fit_svi(linear, bound, X, steps=80, num_particles=32, progress=False).guide is bound
    context = next(parameter for name, parameter in bound.named_parameters() if name.endswith("context"))
    assert not torch.equal(context, guide.context(X))
    weights = psis(linear, bound, X, num_samples=2000).log_weights
    gap = log_evidence(X) - weights.mean().item()
    error = weights.std().item() / math.sqrt(2000)
    assert -4 * error < gap < 0.1 + 4 * error
    assert gap < (log_evidence(X) - rough)


@pytest.mark.slow
def test_a_bound_guide_is_checked_exported_and_used_by_neutra(trained):
    bound = trained[0].bind(X)
    verdict = pf.check(linear, bound, X, num_samples=1000)
    assert abs(verdict.log_evidence - log_evidence(X)) < 0.05
    assert pf.to_arviz(linear, bound, X, num_samples=50)["posterior"]["theta"].shape == (1, 50, 2)
    # The target over the base is p(theta(u), x) q_base(u) / q(theta(u)), for every implementation of the map.
    found = pf.neutra(linear, bound, X, check=False)
    reparam = NeuTraReparam(bound)
    pyros = poutine.reparam(linear, config=lambda _: reparam), None, None
    for program, name, transform in ((found.model, found.site, found.transform), pyros):
        trace = poutine.trace(program).get_trace(X)
        name = name or next(node for node in trace.nodes if node.endswith("_shared_latent"))
        u = torch.tensor([0.4, -1.1])
        back = (transform or (lambda samples, name=name: reparam.transform_sample(samples[name])))({name: u})
        held = poutine.trace(poutine.condition(program, {name: u})).get_trace(X).log_prob_sum()
        joint = poutine.trace(poutine.condition(linear, back)).get_trace(X).log_prob_sum()
        wanted = joint + bound.get_base_dist().log_prob(u) - bound.log_prob(back)
        torch.testing.assert_close(held, wanted, rtol=1e-4, atol=1e-4)
        gap = (back["theta"] - exact_mean(X)) / COV.diagonal().sqrt()
        assert 0.1 < gap.norm() < 3


def test_an_amortised_guide_works_with_pyro(trained):
    guide, _ = trained
    assert set(guide(X)) == {"theta"}
    median = guide.median(X)["theta"]
    assert ((median - exact_mean(X)) / COV.diagonal().sqrt()).abs().max() < 0.35
    assert guide.quantiles([0.1, 0.9], X)["theta"].shape == (2, 2)


def test_bind_asks_for_one_data_set(trained):
    guide, _ = trained
    with pytest.raises(ValueError, match=r"give one dataset, for which the encoder returns one vector"):
        guide.bind(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="has no encoder"):
        guide.bind(X).bind(X)
    with pytest.raises(ValueError, match="was never set up"):
        AutoFlow(linear, encoder=MLPEncoder(3, 2)).bind(X)


# Stopping and resuming.


def test_a_second_fit_goes_on():
    guide = AutoFlow(linear, small, encoder=MLPEncoder(3, 4, (8,)))
    before = quick(linear, guide, simulations=500, max_epochs=10, lr=0.01).losses[:7].mean()
    start = [value.clone() for value in (guide.flow.transforms[-1].loc, guide.encoder.standardize.loc)]
    after = quick(linear, guide, simulations=500, max_epochs=1, lr=1e-6).losses.mean()
    assert after < before - 0.4
    assert torch.equal(start[0], guide.flow.transforms[-1].loc)
    assert torch.equal(start[1], guide.encoder.standardize.loc)


# Rounds.


def narrow(noise: float):
    """Return theta ~ N(0, 1), x ~ N(theta, noise²), and a guide that equals the posterior by construction."""

    def model(x=None):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        return pyro.sample("x", dist.Normal(theta[..., None], noise).to_event(1), obs=x)

    def recipe(dim, width):
        return Flow([Elementwise(Affine(20.0), dim, Line(width, dim))])

    guide = AutoFlow(model, recipe, encoder=lambda x: x, init_scale=1.0).setup(torch.zeros(1))
    net, sd = guide.flow.transforms[0].conditioner, noise / math.sqrt(1 + noise**2)
    with torch.no_grad():
        net.output.weight[1, 0] = 1 / (1 + noise**2)
        net.output.bias.copy_(torch.tensor([80 * math.atanh(math.log(sd) / 20), 0.0]))
    draws = guide.sample(4000, torch.tensor([0.5]))["theta"]
    assert draws.std().item() == pytest.approx(sd, rel=4 / math.sqrt(8000))
    return model, guide, sd


@pytest.mark.parametrize("noise", [0.3, 2e-4], ids=["rejection", "resampling"])
def test_truncated_draws_follow_the_prior_within_the_region(noise, monkeypatch):
    model, guide, sd = narrow(noise)
    resampled = []
    inner = amortized.Truncated._resampled
    monkeypatch.setattr(
        amortized.Truncated, "_resampled", lambda self, *args: resampled.append(0) or inner(self, *args)
    )
    x = 0.6
    simulator = Simulator("test", model, (), {})
    simulator.draw(2)  # as before the first truncated round
    law = amortized.Truncated(simulator, guide, {"x": torch.tensor([x])})
    draws = law.draw(1000)["theta"].double()
    assert draws.shape == (1000,)
    assert bool(resampled) == (noise < 1e-3)
    mean = x / (1 + noise**2)
    # log q = -z² / 2 - log sd - log sqrt(2π) > τ
    reach = sd * math.sqrt(-2 * (float(law.threshold) + math.log(sd) + 0.5 * math.log(2 * math.pi)))
    assert 3 < reach / sd < 5.5  # the region with all but 1e-4 of the mass ends at 3.9 standard deviations
    assert (draws - mean).abs().max() <= reach * (1 + 1e-3)
    low, high = (stats.norm.cdf(mean + side * reach) for side in (-1, 1))
    shares = (stats.norm.cdf(draws.numpy()) - low) / (high - low)
    assert stats.kstest(shares, "uniform").pvalue > 1e-3


@pytest.mark.slow
def test_second_rounds_look_closer(tmp_path, monkeypatch):
    """The second round draws latents from the prior, within the region of the first guide, and data from the model."""
    x, laws = X, []
    draw = amortized.Truncated.draw

    def watched(self, number):
        values = draw(self, number)
        laws.append((self.threshold, self._log_q(values), values["theta"]))
        return values

    monkeypatch.setattr(amortized.Truncated, "draw", watched)
    guide, file = AutoFlow(linear, small, encoder=MLPEncoder(3, 4, (16,))), tmp_path / "run"
    settings = {"max_epochs": 15, "batch_size": 60, "lr": 0.01, "checkpoint": file, "progress": False}
    fit = fit_amortized(linear, guide, simulations=2001, datasets=Observed({"x": x}), **settings)
    first, second = (torch.load(tmp_path / f"run.{r}.simulations", weights_only=True) for r in (1, 2))
    assert (len(first["latents"]["theta"]), len(second["latents"]["theta"])) == (1000, 1001)
    ((threshold, log_q, theta),) = laws
    assert torch.equal(theta, second["latents"]["theta"])
    assert (log_q > threshold).all()
    far = []
    for part in (first, second):
        off = part["latents"]["theta"] - exact_mean(x)
        far.append((off * torch.linalg.solve(COV, off.T).T).sum(1).mean())  # squared, in sd of the posterior
    assert far[1] < 0.9 * far[0]
    residual = second["data"]["x"] - second["latents"]["theta"] @ DESIGN.T
    assert stats.kstest((residual / NOISE).flatten().numpy(), "norm").pvalue > 1e-3
    assert fit.losses.isfinite().all()
    draws = guide.sample(2000, x)["theta"]
    assert ((draws.mean(0) - exact_mean(x)) / COV.diagonal().sqrt()).abs().max() < 0.4


@pytest.mark.slow
def test_later_rounds_keep_the_latents_that_the_guide_does_not_show():
    """mu comes before theta and is not in the guide; a new mu would not fit the theta that is kept."""

    def model(x=None):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("theta", dist.Normal(mu, 0.2))
        return pyro.sample("x", dist.Normal(mu, 0.2), obs=x)

    class Wide(MLPEncoder):
        def forward(self, x):
            return super().forward(x[..., None])

    guide = AutoFlow(poutine.block(model, hide=["mu"]), small, encoder=Wide(1, 4, (8,)))
    observed = {"x": torch.tensor(0.5)}
    quick(model, guide, simulations=1000, max_epochs=10, lr=0.01)
    law = amortized.Truncated(Simulator("test", model, (), {}), guide, observed)
    values = law.draw(500, batch_size=1000)
    assert values.keys() == {"mu", "theta"}
    assert (values["theta"] - values["mu"]).std().item() == pytest.approx(0.2, rel=0.2)
    _, guide, _ = narrow(2e-4)
    law = amortized.Truncated(Simulator("test", before_narrow(2e-4), (), {}), guide, {"x": torch.tensor([0.6])})
    with pytest.raises(ValueError, match=r"latent site 'mu', which the guide does not show"):
        law.draw(100, batch_size=500)


def before_narrow(noise: float):
    """The model of :func:`narrow`, with theta in two steps."""

    def model(x=None):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), math.sqrt(0.5)))
        theta = pyro.sample("theta", dist.Normal(mu, math.sqrt(0.5)))
        return pyro.sample("x", dist.Normal(theta[..., None], noise).to_event(1), obs=x)

    return model


def test_data_that_are_not_finite_are_refused():
    guide = AutoFlow(linear, small, encoder=MLPEncoder(3, 4, (8,))).setup(X)
    wrong = torch.tensor([0.0, math.nan, 1.0])
    for ask in (guide.bind, lambda x: guide.sample(5, x), lambda x: guide.log_prob(guide.sample(5, X), x)):
        with pytest.raises(ValueError, match=r"AutoFlow: the encoder returned 4 NaN .* of 4; are the data finite"):
            ask(wrong)


FAR = r"AutoFlow: the draw of latent site 'theta' must be finite, got (nan|-?inf): {}\. Correct the data, or train on"


def test_finite_data_whose_draws_are_not_finite_are_refused():
    """Finite numbers overflow in the networks; all uses of the guide end in one error that names the data."""
    guide, x = AutoFlow(linear, encoder=MLPEncoder(3, 4, (8,))), torch.tensor([0.0, 1e30, 1.0])
    quick(linear, guide)
    uses = (
        lambda x: guide.sample(5, x),
        lambda x: guide.sample(5, torch.stack((X, x))),
        lambda x: guide.log_prob(guide.sample(5, X), x),
        guide.bind,
        guide.median,
        guide,
        Predictive(linear, guide=guide, num_samples=2),
        lambda x: psis(linear, guide, x),
        lambda x: pf.check(linear, guide, x),
    )
    words = FAR.format(r"the data lie up to \d\.\de\+29 standard deviations from the mean of those in training")
    for use in uses:
        with pytest.raises(FloatingPointError, match=words):
            use(x)
    near = torch.tensor([0.0, 1e3, 1.0])  # far, but with finite draws
    assert guide.sample(5, near)["theta"].isfinite().all()


def test_infinite_draws_of_bounded_latents_are_refused_without_standardised_data():
    def positive(x=None):
        theta = pyro.sample("theta", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, 0.5), obs=x)

    guide = AutoFlow(positive, small, encoder=lambda x: torch.stack((x, 0.5 * x), -1)).setup(torch.zeros(()))
    with torch.no_grad():
        guide.flow.transforms[-1].loc.fill_(200.0)  # log theta
    with pytest.raises(FloatingPointError, match=FAR.format(r"the contexts of the data reach 1e\+03")):
        guide.sample(5, torch.tensor(1e3))
    with pytest.raises(FloatingPointError, match="the guide's parameters are finite, but so large"):
        guide.sample(5, torch.tensor(1.0))


@pytest.mark.parametrize("wrong", [[0.0, 1.0, 2.0], X.numpy(), None])
def test_data_that_are_no_tensor_are_refused_with_what_encoders_take(wrong):
    guide = AutoFlow(linear, small, encoder=MLPEncoder(3, 4, (8,))).setup(X)
    with pytest.raises((ValueError, TypeError), match=r"the encoder must .*got (list|ndarray|no arguments)\."):
        guide.sample(5, *(() if wrong is None else (wrong,)))


def test_rounds_need_the_data_and_simulations_side_by_side():
    guide = AutoFlow(linear, small, encoder=MLPEncoder(3, 4, (8,)))
    refused(Program(linear, vectorize="loop"), "give another vectorize", guide=guide, datasets=Observed({"x": X}))
    words = r"must hold one dataset, observed=\{'x': ...\}"
    refused(linear, words, guide=guide, datasets=Observed({"y": X}))


# Errors.


def refused(model, words, *args, guide=None, **settings):
    guide = guide or AutoFlow(model, small, encoder=MLPEncoder(3, 2, (4,)))
    with pytest.raises(ValueError, match=words):
        quick(model, guide, *args, **settings)


def test_guides_that_cannot_be_trained_are_refused():
    words = "must be an AutoFlow with an encoder"
    refused(linear, words + ".*got AutoFlow without one", guide=AutoFlow(linear))
    refused(linear, words + ".*got AutoPlateFlow, which fit_svi trains", guide=AutoPlateFlow(linear, "rows"))
    refused(linear, words + ".*got function", guide=lambda x: None)


def test_numbers_out_of_range_are_refused():
    wrong = {"simulations": (19, True), "max_epochs": (0,), "batch_size": (True,), "lr": (math.nan,)}
    for name, value in ((name, value) for name, values in wrong.items() for value in values):
        refused(linear, f": {name} must", **{name: value})
    refused(linear, "cannot be written.*there is no folder", checkpoint="/no/such/folder/run")


def test_draws_that_cannot_be_learned_from_are_refused():
    def model(prior, tweak, x=None):
        theta = pyro.sample("theta", prior)
        return pyro.sample("x", dist.Delta(tweak(theta[..., None] + torch.zeros(3)), event_dim=1), obs=x)

    refused(model, "data argument 'x' is constant: -?0 in every draw", dist.Normal(0.0, 1.0), lambda x: 0 * x)
    refused(model, "data argument 'x' holds NaN or inf in .* of 200 draws", dist.Normal(0.0, 1.0), lambda x: x.log())
    wild = dist.LogNormal(0.0, 1000.0)
    refused(model, "'(theta|x)' holds NaN or inf in .* of 200 draws", wild, lambda x: x)


def test_encoders_and_recipes_that_do_not_fit_are_refused():
    class Flat(MLPEncoder):
        def forward(self, x):
            return super().forward(x).sum()

    words = "for one dataset the encoder must return one vector|must return a floating tensor"
    refused(linear, words, guide=AutoFlow(linear, small, encoder=Flat(3, 2, (4,))))
    refused(linear, words, guide=AutoFlow(linear, small, encoder=lambda x: x[..., None]))
    refused(linear, "the encoder fails on the arguments", guide=AutoFlow(linear, encoder=MLPEncoder(4, 2)))
    plain = AutoFlow(linear, lambda dim, width: flows.nsf(dim), encoder=MLPEncoder(3, 2, (4,)))
    refused(linear, r"flow\(2, 2\) must return a Flow .* with contexts of width 2", guide=plain)

    def doubled(dim: int, width: int) -> Flow:
        return Flow(small(dim, width).transforms, encoder=MLPEncoder(3, width, (4,)))

    refused(linear, "must return a Flow .* no encoder", guide=AutoFlow(linear, doubled, encoder=MLPEncoder(3, 2, (4,))))
    with pytest.raises(TypeError, match=r"flow\(2, 2\) fails"):
        quick(linear, AutoFlow(linear, lambda dim: flows.nsf(dim), encoder=MLPEncoder(3, 2, (4,))))
    with pytest.raises(TypeError, match="encoder must be a network or function"):
        AutoFlow(linear, encoder=MLPEncoder)


def test_a_latent_that_the_model_does_not_draw_is_refused():
    def other(x=None):
        pyro.sample("omega", dist.Normal(0.0, 1.0))
        linear(x)

    guide = AutoFlow(other, small, encoder=lambda x: x)
    refused(linear, "latent site 'omega' of the guide is not drawn by the model", guide=guide)


@pytest.mark.parametrize("kind", [DataLoader, tuple, dict])
def test_simulations_of_another_class_are_refused(kind):
    given = kind([("theta", torch.zeros(30, 2)), ("x", torch.zeros(30, 3))])
    words = r"simulations must be a number, a pf\.Simulations\(latents, data\), or .*, got"
    with pytest.raises(TypeError, match=f"fit_amortized: {words}"):
        quick(linear, AutoFlow(linear, small, encoder=MLPEncoder(3, 4, (8,))), simulations=given)


def test_arguments_are_chosen_by_position_or_by_name():
    def model(x: Tensor | None = None, mask: Tensor | None = None) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean, 1.0).expand([4, 1]).to_event(2), obs=x)

    network, x, mask = SetEncoder(1, 4), torch.randn(4, 1), torch.ones(4, dtype=torch.bool)
    contexts = [
        AutoFlow(model, encoder=Arguments(network, 0, mask=place)).setup(x, mask).context(x, mask=mask)
        for place in (1, "mask")
    ]
    assert torch.equal(*contexts)
    with pytest.raises(ValueError, match="the model has x, mask"):
        AutoFlow(model, encoder=Arguments(network, 0, mask="msak")).setup(x)
