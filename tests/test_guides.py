"""AutoFlow.

It starts at its specified place, stays inside every support, and scores its draws.  It supports what Pyro expects of
an ``AutoContinuous``: SVI with each ELBO, ``Predictive``, NeuTra, ``AutoGuideList``, the compiled ELBO, copies and
pickles.  A flow can also be a prior.
"""

import copy
import functools
import math

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import stir
from models import Y as NESTED_Y
from models import draws_of, plates, same, sampling, state
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, JitTrace_ELBO, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam
from torch.distributions import constraints

from pyro_flows import AutoFlow, AutoPlateFlow, AutoStructuredFlow, Flow, fit_svi, flows, psis
from pyro_flows.bijectors import Affine
from pyro_flows.guides import init_to_center
from pyro_flows.guides.guide_flow import default_flow, local_flow
from pyro_flows.transforms import Coupling

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(16,))
small_iaf = functools.partial(flows.iaf, num_transforms=2, hidden_dims=(16,))

RECIPES = {name: getattr(flows, name) for name in ("nice", "realnvp", "maf", "iaf", "nsf", "nsf_ar")}


def regression(y=None):
    """Model with two global latents and a row of local ones; all sites but one are constrained."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("row", 3):
        rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
        pyro.sample("y", dist.Normal(mu + rate, tau), obs=y)


Y = torch.tensor([0.5, 1.0, 2.0])


# Initial values.


@pytest.mark.parametrize("name", RECIPES)
def test_starts_exactly_at_loc_and_scale(name):
    start = {"a": torch.tensor(2.0), "b": torch.tensor([0.1, 1.0, 7.0])}

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("b", dist.LogNormal(0.0, 1.0))

    recipe = functools.partial(RECIPES[name], num_transforms=2, hidden_dims=(16,))
    guide = AutoFlow(model, recipe, init_loc_fn=init_to_value(values=start), init_scale=0.3).setup()
    loc = torch.cat([start["a"][None], start["b"].log()])
    gaussian = dist.Normal(loc, 0.3).to_event(1)

    # The whole density equals the Gaussian's, also far out, up to round-off in float32 for numbers up to 100.
    z = loc + torch.randn(50, 4) * torch.tensor([0.3, 3.0]).repeat_interleave(25)[:, None]
    torch.testing.assert_close(guide.get_posterior().log_prob(z), gaussian.log_prob(z), rtol=1e-5, atol=1e-4)

    # Four standard errors of the mean, sd / sqrt(N), and of the standard deviation, sd / sqrt(2 N).
    draws = guide.sample(4000)
    draws = torch.cat([draws["a"][:, None], draws["b"].log()], -1)
    assert ((draws.mean(0) - loc).abs() < 4 * 0.3 / math.sqrt(4000)).all()
    assert ((draws.std(0) - 0.3).abs() < 4 * 0.3 / math.sqrt(8000)).all()


CENTERS = [
    (dist.Normal(100.0, 1.0), 100.0),  # the median
    (dist.HalfCauchy(2.0), 2.0),
    (dist.LogNormal(0.7, 1.0), math.exp(0.7)),
    (dist.Gamma(3.0, 2.0), 1.5),  # no median in closed form, so the mean
    (dist.Beta(2.0, 6.0), 0.25),
    (dist.Dirichlet(torch.tensor([1.0, 2.0, 5.0])), [0.125, 0.25, 0.625]),
    (dist.LKJCholesky(2, 1.0), [[1.0, 0.0], [0.0, 1.0]]),  # neither, so the origin of the unconstrained space
    (dist.StudentT(1.0, 0.0, 1.0), 0.0),
    (dist.ImproperUniform(constraints.positive, (), ()), 1.0),
    (dist.ImproperUniform(constraints.interval(0.0, 4.0), (), (2,)), [2.0, 2.0]),
    (dist.Normal(torch.tensor([1.0, 2.0]), 1.0).to_event(1), [1.0, 2.0]),
]


@pytest.mark.parametrize(("prior", "center"), CENTERS, ids=[type(prior).__name__ for prior, _ in CENTERS])
def test_init_to_center(prior, center):
    torch.testing.assert_close(init_to_center({"fn": prior}), torch.tensor(center))


def test_setup_makes_parameters_once():
    guide = AutoFlow(regression, small)
    assert not list(guide.parameters())
    assert guide.setup(Y) is guide
    before = dict(guide.named_parameters())
    stir(guide)
    values = state(guide)
    guide.setup(Y)
    guide(Y)
    after = dict(guide.named_parameters())
    assert before
    assert all(after[name] is parameter for name, parameter in before.items())
    assert same(state(guide), values)


def test_failed_setup_can_be_retried():
    guide = AutoFlow(regression, small)
    for _ in range(2):  # the error is repeated, and the guide does not stay half set up
        with pytest.raises(ValueError, match="site 'y'"):
            guide.setup(torch.tensor([0.0, math.nan, 1.0]))
    assert guide.setup(Y).sample(2)["rate"].shape == (2, 3)


# Supports and densities.

SUPPORTS = {
    "positive": dist.HalfNormal(torch.ones(3)).to_event(1),
    "unit_interval": dist.Beta(2.0, 3.0),
    "interval": dist.Uniform(-2.0, 5.0),
    "greater_than": dist.Pareto(2.0, 3.0),
    "simplex": dist.Dirichlet(torch.ones(4)),
    "corr_cholesky": dist.LKJCholesky(3, 2.0),
    "ordered": dist.ImproperUniform(dist.constraints.ordered_vector, (), (4,)),
    "positive_ordered": dist.ImproperUniform(dist.constraints.positive_ordered_vector, (), (4,)),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_draws_stay_inside_the_support(name):
    prior = SUPPORTS[name]
    # In float32, exp(89) overflows, which draws of scale 1 would reach.
    guide = stir(AutoFlow(sampling(x=prior), small, init_scale=0.5).setup())
    draws = guide.sample(500)["x"]
    assert draws.shape == (500, *prior.shape())
    assert prior.support.check(draws).all()
    assert guide.log_prob({"x": draws}).isfinite().all()


LINE = torch.linspace(-12, 12, 8001, dtype=torch.float64)
ONE_DIMENSIONAL = {
    "real": (dist.Normal, (0.0, 1.0), LINE),
    "positive": (dist.LogNormal, (0.0, 1.0), LINE.exp()),
    "greater_than": (dist.Pareto, (2.0, 3.0), 2 + LINE.exp()),
    "unit_interval": (dist.Beta, (2.0, 3.0), LINE.sigmoid()),
    "interval": (dist.Uniform, (-2.0, 5.0), -2 + 7 * LINE.sigmoid()),
}


@pytest.mark.parametrize("name", ONE_DIMENSIONAL)
def test_one_dimensional_densities_integrate_to_one(name):
    """The trapezoidal rule on the constrained line does not use the guide's Jacobians."""
    family, numbers, grid = ONE_DIMENSIONAL[name]
    model = sampling(x=family(*torch.tensor(numbers, dtype=torch.float64)))
    recipe = functools.partial(flows.nsf_ar, num_transforms=2, hidden_dims=(16,))
    guide = stir(AutoFlow(model, recipe, init_scale=0.5).setup())
    assert torch.trapezoid(guide.log_prob({"x": grid}).exp(), grid).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("recipe", [small, small_iaf], ids=["realnvp", "iaf"])
def test_log_prob_agrees_with_the_guides_own_trace(recipe):
    def model():
        regression()
        pyro.sample("mix", dist.Dirichlet(torch.ones(3)))
        pyro.sample("corr", dist.LKJCholesky(3, 1.0))
        plates()

    guide = stir(AutoFlow(poutine.block(model, hide=["x", "y"]), recipe, init_scale=0.5).setup())
    for _ in range(3):
        trace = poutine.trace(guide).get_trace()
        values = {name: trace.nodes[name]["value"] for name, _ in guide.prototype_trace.iter_stochastic_nodes()}
        assert len(values) == 9
        torch.testing.assert_close(guide.log_prob(values), trace.log_prob_sum(), rtol=1e-4, atol=1e-3)


def test_log_prob_scores_batches_row_by_row():
    guide = stir(AutoFlow(regression, small).setup(Y))
    draws = guide.sample(6)
    together = guide.log_prob({name: value.reshape(2, 3, *value.shape[1:]) for name, value in draws.items()})
    single = [guide.log_prob({name: value[i] for name, value in draws.items()}) for i in range(6)]
    torch.testing.assert_close(together, torch.stack(single).reshape(2, 3), rtol=1e-5, atol=1e-4)


def test_log_prob_outside_of_the_support():
    guide = AutoFlow(sampling(scale=dist.LogNormal(0.0, 1.0), share=dist.Dirichlet(torch.ones(3)))).setup()
    share = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [0.5, 0.5, 0.5]])
    scores = guide.log_prob({"scale": torch.tensor([1.0, -1.0, 1.0]), "share": share})
    assert scores.isfinite().tolist() == [True, False, False]
    assert scores[1:].tolist() == [-math.inf, -math.inf]
    torch.testing.assert_close(scores[0], guide.log_prob({"scale": torch.tensor(1.0), "share": share[0]}))


def test_log_prob_names_what_is_wrong_with_its_values():
    guide = AutoFlow(regression, small).setup(Y)
    draws = guide.sample(4)
    with pytest.raises(ValueError, match="lack the latent site 'rate'"):
        guide.log_prob({"mu": draws["mu"], "tau": draws["tau"]})
    with pytest.raises(ValueError, match=r"values\['rate'\] must have shape \(\*batch, 3\), got \(4, 2\)"):
        guide.log_prob({**draws, "rate": draws["rate"][:, :2]})


# Quantiles and draws.


def test_sample_shapes():
    guide = AutoFlow(plates, small)
    shapes = {name: tuple(value.shape) for name, value in guide.sample(5, NESTED_Y).items()}
    assert shapes == {"top": (5,), "middle": (5, 2, 1), "leaf": (5, 2, 3), "pair": (5, 2, 3, 3)}


def test_median_and_quantiles():
    def model():
        pyro.sample("x", dist.LogNormal(1.0, 2.0))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(torch.tensor([0.0, 5.0]), 1.0))

    guide = AutoFlow(model, small, init_scale=0.5).setup()
    levels = torch.tensor([0.1, 0.5, 0.9])
    # At the start all quantiles are known; a quantile's standard error is sqrt(p (1 - p) / N) / density.
    normal = dist.Normal(0.0, 1.0)
    z = normal.icdf(levels)
    error = 4 * 0.5 * (levels * (1 - levels) / guide.num_summary_draws).sqrt() / normal.log_prob(z).exp()
    quantiles = guide.quantiles(levels.tolist())
    assert guide.quantiles(0.5)["x"].shape == quantiles["x"].shape[1:]
    assert quantiles["x"].shape == (3,)
    assert quantiles["y"].shape == (3, 2)
    assert ((quantiles["x"].log() - (1 + 0.5 * z)).abs() < error).all()
    assert ((quantiles["y"] - (torch.tensor([0.0, 5.0]) + 0.5 * z[:, None])).abs() < error[:, None]).all()
    median = guide.median()
    assert median["y"].shape == (2,)
    assert (median["x"].log() - 1).abs() < error[1]

    # Away from the start, they equal those of the draws, within four standard errors of both (hence sqrt 2).
    stir(guide)
    draws = guide.sample(guide.num_summary_draws)["x"].log()
    inside = (draws[:, None] < guide.quantiles(levels)["x"].log()).float().mean(0)
    assert ((inside - levels).abs() < 4 * math.sqrt(2) * (levels * (1 - levels) / len(draws)).sqrt()).all()


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive(parallel):
    guide = AutoFlow(regression, small).setup(Y)
    predictive = Predictive(regression, guide=guide, num_samples=20, parallel=parallel)
    draws = predictive(None)
    assert draws["y"].shape == (20, 3)
    # In parallel runs, Pyro keeps the dimensions of plates that do not contain the site.
    assert draws["rate"].shape == (20, 3)
    assert draws["mu"].numel() == 20
    assert draws["mu"].std() > 0


# Pyro's inference algorithms.


@pytest.mark.parametrize("model_and_data", [(regression, Y), (plates, NESTED_Y)], ids=["plate", "nested plates"])
def test_vectorized_particles_estimate_the_same_elbo(model_and_data):
    model, data = model_and_data
    guide = stir(AutoFlow(model, small).setup(data))
    nesting = 1 if model is regression else 2
    losses = [
        Trace_ELBO(num, max_plate_nesting=nesting, vectorize_particles=vectorize).loss(model, guide, data)
        for num, vectorize in ((2000, True), (100, False))
    ]
    # The standard error of the difference of two means of independent log-weights.
    spread = psis(model, guide, data, num_samples=1000).log_weights.std().item()
    assert spread > 0.01
    assert abs(losses[0] - losses[1]) < 4 * spread * math.sqrt(1 / 2000 + 1 / 100)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_as_a_guide(name, size):
    def model():
        with pyro.plate("rows", size):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.full((size,), 3.0))

    recipe = functools.partial(RECIPES[name], num_transforms=2, hidden_dims=(8,))
    guide = AutoFlow(model, recipe).setup()
    before = [parameter.detach().clone() for parameter in laws.learned(guide)]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(64, vectorize_particles=True))
    losses = [svi.step() for _ in range(5)]
    # The start at 0 +- 0.1 is some 3 nats per row from the optimum, known to 1 / sqrt(64) of less than that.
    assert losses[-1] < losses[0] - 0.3 * size
    moved = [not torch.equal(old, new) for old, new in zip(before, laws.learned(guide), strict=True)]
    # With one feature, an autoregressive network has no inputs, so its first weights do not change.
    assert all(moved) if size > 1 else sum(moved) > 2


@pytest.mark.parametrize("recipe", [small, small_iaf], ids=["realnvp", "iaf"])
@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_elbo_equals_trace_elbo(recipe, vectorize):
    """They are equal from the second call on, because tracing uses more random numbers."""
    guide = stir(AutoFlow(regression, recipe).setup(Y))
    settings = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    compiled, plain = JitTrace_ELBO(**settings, ignore_jit_warnings=True), Trace_ELBO(**settings)
    compiled.loss_and_grads(regression, guide, Y)
    found = []
    for elbo in (compiled, plain):
        guide.zero_grad()
        pyro.set_rng_seed(1)
        loss = elbo.loss_and_grads(regression, guide, Y)
        found.append((loss, [parameter.grad.clone() for parameter in laws.learned(guide)]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for fast, slow in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_elbo_sees_updated_parameters():
    """Compiled code must not keep the parameters of the trace."""
    guide = AutoFlow(regression, small)
    elbo = JitTrace_ELBO(8, vectorize_particles=True, max_plate_nesting=1, ignore_jit_warnings=True)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = torch.tensor([svi.step(Y) for _ in range(100)])
    pyro.set_rng_seed(1)
    compiled = elbo.loss_and_grads(regression, guide, Y)
    pyro.set_rng_seed(1)
    plain = Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=1).loss(regression, guide, Y)
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert losses[-20:].mean() < losses[:5].mean() - 1


@pytest.mark.slow
def test_neutra_and_nuts_on_a_trained_guide():
    """x ~ N(0, 1), and y = 2 has noise 1, so the posterior is N(1, 1/2)."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))

    guide = AutoFlow(model, small, init_scale=0.5)
    fit_svi(model, guide, steps=150, lr=0.02, num_particles=8, warm_start=False, progress=False)
    guide.requires_grad_(False)
    neutra = NeuTraReparam(guide)
    chain = MCMC(NUTS(neutra.reparam(model)), num_samples=60, warmup_steps=30, disable_progbar=True)
    chain.run()
    (latent,) = (value for name, value in chain.get_samples().items() if name.endswith("shared_latent"))
    draws = neutra.transform_sample(latent)
    assert draws["x"].shape == (60,)
    assert (draws["w"] > 0).all()
    # Four standard errors of 60 draws, each counted as half an independent draw.
    assert abs(draws["x"].mean().item() - 1) < 4 * math.sqrt(0.5 / 30)
    assert 0.3 < draws["x"].std().item() < 1.3


@pytest.mark.parametrize("recipe", [small, small_iaf], ids=["realnvp", "iaf"])
def test_transform_runs_each_network_once(recipe):
    guide = AutoFlow(regression, recipe).setup(Y)
    networks = {id(module): 0 for module in guide.flow.modules() if type(module).__name__ in ("MLP", "MADE")}
    assert len(networks) == 2

    def count(module, *_):
        networks[id(module)] += 1

    for module in guide.flow.modules():
        if id(module) in networks:
            module.register_forward_hook(count)
    transform = guide.get_transform(Y)
    x = guide.get_base_dist().sample()
    y = transform(x)
    transform.log_abs_det_jacobian(x, y)
    assert list(networks.values()) == [1, 1]

    guide(Y)  # a draw and its score
    poutine.trace(guide).get_trace(Y).compute_log_prob()
    assert list(networks.values()) == [3, 3]


def test_base_transform_and_posterior_are_consistent():
    guide = stir(AutoFlow(regression, small).setup(Y))
    x = guide.get_base_dist().sample((7,))
    transform, posterior = guide.get_transform(Y), guide.get_posterior(Y)
    assert guide.get_base_dist().event_shape == posterior.event_shape == (guide.latent_dim,) == (5,)
    z = transform(x)
    composed = dist.TransformedDistribution(guide.get_base_dist(), transform)
    torch.testing.assert_close(composed.log_prob(z), posterior.log_prob(z), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transform.inv(z.clone()), x, rtol=1e-3, atol=1e-4)
    change = torch.autograd.functional.jacobian(transform, x[0]).slogdet()[1]
    torch.testing.assert_close(transform.log_abs_det_jacobian(x[0], transform(x[0])), change, rtol=1e-4, atol=1e-4)


# The default guide.


def schools(effects, errors):
    """Model of eight schools, centred: a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, errors), obs=effects)


SCHOOLS = torch.tensor([28.0, 8.0, -3.0]), torch.tensor([15.0, 10.0, 16.0])


def schools_evidence(effects, errors) -> float:
    """Return the log evidence: schools and mu by hand, tau by the trapezoidal rule in log tau."""
    log_tau = torch.linspace(-15, 10, 5001, dtype=torch.float64)
    tau, size = log_tau.exp(), len(effects)
    covariance = torch.diag_embed((errors**2 + tau[:, None] ** 2).double()) + 25 * torch.ones(size, size).double()
    likelihood = dist.MultivariateNormal(torch.zeros(size).double(), covariance).log_prob(effects.double())
    log_density = likelihood + dist.HalfCauchy(torch.tensor(5.0).double()).log_prob(tau) + log_tau
    return torch.trapezoid(log_density.exp(), log_tau).log().item()


@pytest.mark.slow
def test_the_default_fit_of_a_funnel_reaches_its_evidence_in_few_steps():
    guide = AutoFlow(schools)
    fit_svi(schools, guide, *SCHOOLS, steps=120, num_particles=64, progress=False)
    found = psis(schools, guide, *SCHOOLS, num_samples=4000)
    assert found.log_evidence == pytest.approx(schools_evidence(*SCHOOLS), abs=4 * found.log_evidence_se + 0.02)
    assert schools_evidence(*SCHOOLS) - found.log_weights.mean().item() < 0.25


def test_the_default_fit_of_correlated_latents_is_exact_at_once():
    """The warm start finds the Gaussian posterior, and training by path gradients keeps it."""
    scale_tril = torch.linalg.cholesky(0.99 * torch.ones(6, 6) + 0.01 * torch.eye(6))
    model = sampling(x=dist.MultivariateNormal(100.0 * torch.arange(6.0), scale_tril=scale_tril))
    guide = AutoFlow(model)
    fit = fit_svi(model, guide, steps=20, num_particles=64, progress=False)
    assert fit.losses.abs().max() < 0.1  # log evidence 0; float32 has an error of 3e-5 at 500, for sds of 0.1
    assert fit.losses.mean().abs() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("elbo", [Trace_ELBO(), Trace_ELBO(16, vectorize_particles=True)], ids=["one draw", "16 draws"])
def test_the_default_guide_trains_under_plain_svi(elbo):
    """x ~ N(0, 1) in four dimensions, with its noisy sum observed: the sum of five normals."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(3.0))

    evidence = dist.Normal(0.0, math.sqrt(5)).log_prob(torch.tensor(3.0)).item()
    guide = AutoFlow(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.03}), elbo)
    losses = torch.tensor([svi.step() for _ in range(200)])
    assert losses.isfinite().all()
    assert losses[:20].median() > 3 - evidence
    assert losses[-50:].median() < 1.5 - evidence


# Models with discrete sites.

MIXED = torch.cat([torch.linspace(-2.5, -1.5, 10), torch.linspace(2.5, 3.5, 20)])


@config_enumerate
def mixture(data):
    weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 3.0))
    with pyro.plate("row", len(data)):
        which = pyro.sample("which", dist.Categorical(torch.stack([1 - weight, weight])))
        pyro.sample("x", dist.Normal(loc[which], 0.5), obs=data)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True], ids=["enumerated in the model", "AutoDiscreteParallel"])
def test_guide_list_beside_a_discrete_site(guided):
    guide = AutoGuideList(mixture)
    guide.append(AutoFlow(poutine.block(mixture, hide=["which"]), small))
    if guided:
        guide.append(AutoDiscreteParallel(poutine.block(mixture, expose=["which"])))
    svi = SVI(mixture, guide, pyro.optim.Adam({"lr": 0.03}), TraceEnum_ELBO(max_plate_nesting=1))
    losses = torch.tensor([svi.step(MIXED) for _ in range(300)])
    assert losses[-30:].mean() < losses[:5].mean() - 10
    draws = [guide(MIXED) for _ in range(50)]
    loc = torch.stack([draw["loc"] for draw in draws]).mean(0)
    # The posterior's standard deviations are 0.5 / sqrt(10) and 0.5 / sqrt(20).
    torch.testing.assert_close(loc, torch.tensor([-2.0, 3.0]), rtol=0, atol=0.3)


# A flow inside a model.


def banana() -> Flow:
    """Return a fixed non-Gaussian prior over two numbers."""
    flow = flows.realnvp(2, num_transforms=2, hidden_dims=(8,))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return flow.requires_grad_(False)


@pytest.mark.slow
def test_flow_as_a_prior():
    """SVI and NUTS agree on the posterior."""
    prior = banana()

    def model():
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=torch.tensor([0.5, -0.5]))

    guide = AutoNormal(model)
    fit = fit_svi(model, guide, steps=200, lr=0.02, num_particles=8, progress=False)
    assert fit.losses[-30:].mean() < fit.losses[:5].mean()
    chain = MCMC(NUTS(model), num_samples=80, warmup_steps=40, disable_progbar=True)
    chain.run()
    draws = chain.get_samples()["x"]
    assert draws.shape == (80, 2)
    # The likelihood alone gives x an sd of 0.3; four standard errors of the chain, whose draws count half.
    assert ((guide.median()["x"] - draws.mean(0)).abs() < 4 * 0.3 / math.sqrt(40)).all()


# Copies, files, dtypes.


def train(guide: AutoFlow, steps: int) -> list[float]:
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(8, vectorize_particles=True))
    return [svi.step(Y) for _ in range(steps)]


def test_deepcopy_after_training():
    guide = AutoFlow(regression, small)
    train(guide, 5)
    before = draws_of(guide)
    twin = copy.deepcopy(guide)
    assert same(before, draws_of(twin))
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in twin.parameters()}
    train(twin, 3)
    assert same(before, draws_of(guide))
    after = draws_of(twin)
    assert not same(before, after)
    train(guide, 3)
    assert not same(before, draws_of(guide))
    assert same(after, draws_of(twin))
    assert twin.model is not None
    assert guide.model is twin.model


def test_a_guide_starts_elsewhere_where_the_model_breaks_down_at_the_centre():
    def ring():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        radius = x.norm(dim=-1)
        pyro.factor("ring", radius / radius - 1)  # the density at the centre is NaN
        pyro.sample("y", dist.Normal(radius, 0.3), obs=torch.tensor(3.0))

    def seen_outside():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("nan", x / x - 1)
        pyro.sample("y", dist.Poisson(1.0), obs=torch.tensor(-1.0))

    assert AutoFlow(ring).setup().start[0].norm() > 0
    with pytest.raises(ValueError, match="found invalid values"):
        AutoFlow(ring, init_loc_fn=init_to_center).setup()  # as specified
    with pytest.raises(ValueError):
        AutoFlow(seen_outside).setup()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("build", [AutoFlow, AutoStructuredFlow, lambda model: AutoPlateFlow(model, "row")])
def test_a_guide_starts_elsewhere_where_equal_values_are_refused(build, seed):
    """Sorted cut points are equal at the centre, where ``OrderedLogistic`` refuses them but has a finite density."""

    def ordinal(y, spread=1.0):
        cuts = pyro.sample("cuts", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        with pyro.plate("row", len(y)):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.OrderedLogistic(slope, spread * cuts.sort(-1).values), obs=y)

    pyro.set_rng_seed(seed)
    y = torch.arange(8) % 4
    guide = build(ordinal).setup(y)
    start = guide.prototype_trace.nodes["cuts"]["value"]
    assert len(start.unique()) == 3
    assert Trace_ELBO().loss(ordinal, guide, y) < math.inf
    with pytest.raises(ValueError, match=r"OrderedVector.*Give the guide a start .*: init_loc_fn="):
        build(ordinal).setup(y, 0.0)


def test_a_negative_scale_of_a_latent_is_named():
    def model():
        pyro.sample("x", dist.Normal(0.0, -1.0))

    with pytest.raises(ValueError, match=r"AutoFlow: the model fails: .*scale: -1\.0\) to satisfy .*init_loc_fn"):
        AutoFlow(model).setup()


def test_a_guide_starts_from_the_prior_where_nothing_is_near_the_origin():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        pyro.factor("edge", torch.where((x > 3).all(-1), 0.0, -math.inf))

    assert (AutoFlow(model).setup().start[0] > 3).all()
    with pytest.raises(ValueError, match="'edge' is -inf at the guide's start"):
        AutoFlow(model, init_loc_fn=init_to_center).setup()


def test_float64_model_gives_float64_draws():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("w", dist.Gamma(torch.ones(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0, dtype=torch.float64))

    guide = AutoFlow(model)
    fit_svi(model, guide, steps=3, num_particles=2, progress=False)  # with the warm start
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float64}
    draws = guide.sample(3)
    assert {value.dtype for value in (*draws.values(), *guide().values(), guide.log_prob(draws))} == {torch.float64}
    assert torch.get_default_dtype() == torch.float32


def test_guides_keep_damped_couplings_from_base_to_draws() -> None:
    """The recipe ``realnvp`` is steep and goes from data to base, but first steps of guides need damped couplings."""
    layers = [*default_flow(3).transforms, *local_flow(3, 2).transforms[:-1]]
    assert len(layers) == 12
    assert all(isinstance(layer, Coupling) and layer.bijector == Affine(3.0, slope=0.25) for layer in layers)


def test_the_base_has_wide_tails_up_to_512_latents() -> None:
    bases = [default_flow(dim).base for dim in (3, 33, 512, 513)]
    assert [(base.share, base.scale) for base in bases[:3]] == [(0.02, 1.6), (0.05, 1.3), (0.05, 1.3)]
    assert type(bases[3]).__name__ == "StandardNormal"
