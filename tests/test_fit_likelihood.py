"""Learned likelihoods: densities of simulators that stand in any Pyro model, with real, positive and discrete entries.

A ``Mixed`` distribution is normalised, and its draws have its density.  ``fit_likelihood`` learns known likelihoods,
and a posterior with a learned likelihood is that with the exact one.
"""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import silent
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor

from pyro_flows import AutoFlow, fit_likelihood, fit_svi, flows, load, save
from pyro_flows.encoders import MLPEncoder, Standardize
from pyro_flows.flows import Flow, Mixed
from pyro_flows.transforms import TriangularAffine

small = {"num_transforms": 1, "hidden_dims": (8,)}


def recipe(input_dim: int, context_dim: int) -> Flow:
    return flows.nsf_ar(input_dim, context_dim, **small)


def stirred(model: Mixed) -> Mixed:
    """Move a distribution away from its start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def mixed(dtype: torch.dtype = torch.float64) -> Mixed:
    """Build a distribution over a positive number, three categories, a real number and two categories."""
    flow = flows.nsf_ar(2, context_dim=1 + 5, **small)
    return stirred(Mixed(flow, (0, 3, 0, 2), 1, positive=(0,), hidden_dims=(8,)).to(dtype))


@torch.no_grad()
def test_draws_have_the_density():
    """Masses of pairs of categories are integrals over a grid of log-times and of the real entry.

    They add up to 1, and of 20,000 draws the shares are these masses, within four standard errors.
    """
    model, number, total = mixed(), 20_000, 0.0
    context, steps = torch.tensor([0.3], dtype=torch.float64), torch.linspace(-12, 12, 161, dtype=torch.float64)
    draws = model(context).sample((number,))
    assert (draws[:, 0] > 0).all()
    time, y = torch.meshgrid(steps.exp(), steps, indexing="ij")
    for k, j in torch.cartesian_prod(torch.arange(3), torch.arange(2)):
        value = torch.stack((time, k.expand_as(time), y, j.expand_as(time)), -1)
        mass = float((model(context).log_prob(value).exp() * time).sum()) * float(steps[1] - steps[0]) ** 2
        share = float(((draws[:, 1] == k) & (draws[:, 3] == j)).double().mean())
        assert abs(share - mass) < 4 * math.sqrt(mass * (1 - mass) / number) + 5e-3
        total += mass
    assert abs(total - 1) < 0.01


def test_values_outside_of_the_support_have_no_density_and_finite_gradients():
    model = mixed()
    value = torch.tensor([[1, 0, 0, 0], [-1, 0, 0, 0], [1, 3, 0, 0], [1, 0.5, 0, 0], [1, 0, 0, -1]]).double()
    context = torch.zeros(5, 1, dtype=torch.float64, requires_grad=True)
    with pyro.validation_enabled(False):
        log_prob = model(context).log_prob(value)
    assert log_prob.isfinite().tolist() == [True, False, False, False, False]
    log_prob[0].backward()
    assert context.grad.isfinite().all()
    assert model.support.check(value).tolist() == log_prob.isfinite().tolist()
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="must lie in the support"):
        model(context).log_prob(value)


def test_it_is_a_distribution_with_the_batch_of_its_contexts():
    model = mixed(torch.float32)
    q = model(torch.randn(4, 1))
    assert (q.batch_shape, q.event_shape, q.log_prob(q.sample((3,))).shape) == ((4,), (4,), (3, 4))
    draws = q.sample((3,)), q.expand((5, 4)).sample(), model.sample((2,), torch.randn(4, 1))
    assert [draw.shape for draw in draws] == [(3, 4, 4), (5, 4, 4), (2, 4, 4)]


def test_vectors_that_share_a_context_have_the_density_of_each():
    model = mixed()
    context = torch.randn(5, 1, 1, dtype=torch.float64)
    value = model(context).sample((40,)).squeeze(-2).transpose(0, 1)  # (5, 40, 4)
    shared = model(context).log_prob(value)
    assert torch.allclose(shared, model(context.expand(5, 40, 1).contiguous()).log_prob(value), atol=1e-10)
    assert shared.isfinite().all()


def test_networks_see_a_shared_context_once():
    """Rows of draws, people and trials cost network passes for draws and people; the data have one draw."""
    model, seen = Mixed(flows.nsf(1, context_dim=1 + 2, **small), (2, 0), 1, positive=(1,)), []
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda part, given, output: seen.append(given[0][..., 0].numel()))
    value = model(torch.randn(5, 1, 1)).expand([5, 40]).sample()
    seen.clear()
    model(torch.randn(7, 5, 1, 1)).log_prob(value)
    assert set(seen) == {7 * 5}


def test_expanded_distributions_draw_for_each_place():
    model = stirred(Mixed(flows.nsf_ar(1, context_dim=1, **small), (0,), 1, positive=(0,)))
    draws = model(torch.randn(2, 1, 1)).expand([2, 50]).sample((3,))
    assert (draws.shape, len(draws.unique())) == ((3, 2, 50, 1), 300)


def test_it_copies_pickles_and_saves(tmp_path):
    model = mixed(torch.float32)
    context, value = torch.randn(1), torch.tensor([1.0, 2.0, 0.5, 1.0])
    want = model(context).log_prob(value)
    save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), load(tmp_path / "model.pt")):
        assert torch.equal(other(context).log_prob(value), want)


def test_all_entries_may_be_categories_and_contexts_may_be_absent():
    model = stirred(Mixed(None, (2, 3), hidden_dims=(8,)))
    table = torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0))
    assert torch.allclose(model().log_prob(table).exp().sum(), torch.ones(()), atol=1e-5)
    assert model().sample((5,)).shape == (5, 2)


@pytest.mark.parametrize(
    "model", [mixed(torch.float32), Mixed(None, (2, 3), 1), Mixed(recipe(1, 1), (0,), 1, positive=(0,))]
)
def test_batches_may_be_empty(model):
    for context, shape in ((torch.zeros(0, 1), ()), (torch.zeros(1), (0,)), (torch.zeros(3, 0, 1), (2,))):
        q = model(context)
        draws = q.sample(shape)
        assert draws.shape == (*shape, *context.shape[:-1], len(model.categories))
        assert q.log_prob(draws).shape == draws.shape[:-1]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Mixed(None, (0, 2)), "flow must be a flow over 1 entries with contexts of width 2"),
        (lambda: Mixed(recipe(1, 2), (2,)), "flow must be None"),
        (lambda: Mixed(recipe(2, 0), (0, 0)), "all real, and none positive"),
        (lambda: Mixed(recipe(1, 2), (0, 2), positive=(1,)), r"positive must hold indices of real entries.*\[0\]"),
        (lambda: mixed()(), "context is missing"),
        (lambda: Mixed(None, (2,))(torch.zeros(1)), "context is unexpected"),
        (lambda: mixed()(torch.zeros(2)), r"context must have shape \(\*batch, 1\), got \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def normal(theta: Tensor) -> Tensor:
    return theta + 0.5 * torch.randn(theta.shape)


def choices(theta: Tensor) -> Tensor:
    return torch.stack((torch.rand(len(theta)) + 0.1, torch.bernoulli(theta[:, 0].sigmoid())), -1)


PRIOR = dist.Uniform(torch.full((1,), -3.0), 3.0)


def quick(simulator: Callable[[Tensor], Tensor], **settings: Any) -> Flow | Mixed:
    """Learn the likelihood of a simulator from 200 draws, in two epochs."""
    theta = PRIOR.sample((200,))
    return fit_likelihood(theta, simulator(theta), **{"max_epochs": 2, "progress": False, "flow": recipe, **settings})


def test_a_run_resumes_on_the_same_simulations_alone(tmp_path):
    theta = PRIOR.sample((100,))
    x = normal(theta)[:, 0]
    settings = {"flow": recipe, "max_epochs": 1, "progress": False, "checkpoint": tmp_path / "run"}
    assert fit_likelihood(theta[:, 0], x, **settings).event_shape == (1,)
    fit_likelihood(theta, x, **settings)
    with pytest.raises(ValueError, match="is of another run"):
        fit_likelihood(theta, x + 1, **settings)


@pytest.fixture(scope="module")
def chosen() -> Mixed:
    """Return the likelihood of a positive number and a category."""
    pyro.set_rng_seed(0)
    return quick(choices, entries={0: "positive", 1: "discrete"})


def of_rows(likelihood: Flow | Mixed) -> Callable[[Tensor], None]:
    """Return a model of rows whose likelihood is learned."""

    def model(x: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            pyro.sample("x", likelihood(theta[..., None, None]), obs=x)

    return model


def test_entries_may_be_discrete_and_positive(chosen):
    assert isinstance(chosen, Mixed)
    x = chosen(torch.zeros(50, 1)).sample()
    assert set(x[:, 1].tolist()) <= {0.0, 1.0}
    assert (x[:, 0] > 0).all()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1.0, 2.0], r"holds data outside of the support of ModelDistribution \(1 of 9, such as \[1, 2\]\)\. Recode"),
        ([-1.0, 1.0], r"holds data outside of the support .* such as \[-1, 1\]\)"),
        ([math.nan, 1.0], r"holds 1 NaN; argument 'x' holds 1 NaN\. Leave those rows out"),
        ([1.0, math.nan], r"holds 1 NaN"),
        ([math.inf, 1.0], r"is -inf at the guide's start; its data hold 1 infinite number\. Leave those rows"),
    ],
)
def test_data_that_a_likelihood_cannot_draw_are_named(row, words, chosen):
    x = torch.ones(9, 2)
    x[4] = torch.tensor(row)
    with pytest.raises(ValueError, match=rf"AutoFlow: .*site 'x' {words}"):
        AutoFlow(of_rows(chosen)).setup(x)


def test_a_prior_of_categories_is_refused_and_one_of_positive_numbers_keeps_its_support():
    q = mixed(torch.float32)(torch.zeros(1))
    with pytest.raises(ValueError, match="latent site 'z' is discrete"):
        AutoFlow(lambda: pyro.sample("z", q)).setup()
    positive = stirred(Mixed(flows.nsf_ar(2, context_dim=1, **small), (0, 0), 1, positive=(1,)))(torch.zeros(1))
    draws = AutoFlow(lambda: pyro.sample("z", positive), init_scale=3.0).setup().sample(100)["z"]
    assert (draws[:, 1] > 0).all()
    assert (draws[:, 0] < 0).any()


@pytest.mark.parametrize(
    ("simulator", "entries", "words"),
    [
        (lambda t: t[:1], None, "as many rows, at least 20, got 200 and 1"),
        (lambda t: t[..., None].expand(-1, 1, 2), None, r"x must have shape \(N, D\), got \(200, 1, 2\)"),
        (lambda t: torch.complex(t, t), None, r"fit_likelihood: x must hold real numbers, .*view_as_real\(x\)"),
        (lambda t: t * math.nan, None, r"x\[:, 0\]' holds NaN"),
        (lambda t: t * 0, None, r"x\[:, 0\]' is constant"),
        (normal, {0: "discrete"}, "discrete entry 0 must hold integers"),
        (normal, {0: "positive"}, "entry 0 must be positive"),
        (normal, {1: "positive"}, "entries must map indices below 1"),
        (normal, {0: "real"}, "to 'discrete' or 'positive'"),
        (normal, 0, "entries must map indices"),
    ],
)
def test_simulations_that_do_not_fit_are_refused(simulator, entries, words):
    with pytest.raises(ValueError, match=words):
        quick(simulator, entries=entries)


def test_draws_that_are_no_tensors_are_refused():
    with pytest.raises(TypeError, match="x must be a tensor, got ndarray"):
        quick(lambda t: t.numpy())


def test_integers_that_are_not_discrete_are_warned_of():
    """A density over integers can grow without a bound, and a posterior with it is wrong."""

    def counts(theta: Tensor) -> Tensor:
        return torch.cat((torch.poisson(theta.exp()), normal(theta)), -1)

    with pytest.warns(UserWarning, match=r"of x, column 0 holds integers \(.*Give integers as entries={0: .discrete.}"):
        quick(counts)
    with silent():
        quick(counts, entries={0: "discrete"})


def test_values_that_many_draws_share_are_warned_of():
    def censored(theta: Tensor) -> Tensor:
        return (theta + torch.randn(theta.shape)).clamp(max=1.5)

    with pytest.warns(UserWarning, match=r"of x, column 0 repeats a value \(1\.5 in \d+ %.*Mark a value that repeats"):
        quick(censored)
    with pytest.warns(UserWarning, match=r"of x, column 0 holds multiples of 0\.5"):
        quick(lambda theta: (2 * normal(theta)).round() / 2)
    with silent():
        quick(normal)


def shifted(theta: Tensor) -> Tensor:
    """Return a category k, and theta + k."""
    k = torch.bernoulli(torch.full_like(theta, 0.3))
    return torch.cat((k, theta + k), -1)


@pytest.mark.parametrize(
    ("simulator", "settings", "words"),
    [
        (lambda t: normal(t).expand(-1, 2), {}, r"x\[:, 0\], x\[:, 1\]"),
        (lambda t: torch.cat((normal(t), 2 * t + 1), -1), {}, r"theta\[:, 0\], x\[:, 1\]"),
        (shifted, {"entries": {0: "discrete"}}, r"theta\[:, 0\], x\[:, 0\], x\[:, 1\]"),
    ],
    ids=["equal columns", "x is theta", "given a category"],
)
def test_entries_that_others_or_the_parameters_determine_are_warned_of(simulator, settings, words):
    with pytest.warns(UserWarning, match=rf"fit_likelihood: {words} determine one another \(by a linear relation\)"):
        quick(simulator, **settings)


def test_parameters_that_determine_one_another_are_no_fault():
    theta = PRIOR.sample((200,)).expand(-1, 2)
    with silent():
        fit_likelihood(theta, normal(theta), flow=recipe, max_epochs=1, progress=False)
    with pytest.warns(UserWarning, match=r"theta\[:, 1\], x\[:, 0\] determine one another"):
        fit_likelihood(theta, theta[:, :1], flow=recipe, max_epochs=1, progress=False)


def test_complex_parameters_are_refused_by_name():
    theta = PRIOR.sample((200,))
    with pytest.raises(ValueError, match="fit_likelihood: theta must hold real numbers, got"):
        fit_likelihood(torch.complex(theta, theta), theta)


@pytest.mark.parametrize("settings", [{}, {"entries": {0: "positive"}}])
@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (lambda d, c: flows.nsf(d + 1, c), ValueError, r"shape \(1,\) with contexts of width 1, got Flow\(\(2,\)"),
        (lambda d, c: flows.nsf(d, c + 1), ValueError, r"contexts of width 1, got Flow\(\(1,\), context_dim=2"),
        (lambda d, c: flows.nsf(d), ValueError, "contexts of width 1"),
        (lambda d, c: None, ValueError, "contexts of width 1, got None"),
        (lambda d: flows.nsf(d), TypeError, "fails: .*takes 1 positional argument"),
    ],
    ids=["events", "contexts", "no contexts", "no flow", "arguments"],
)
def test_recipes_of_another_size_are_refused(wrong, error, words, settings):
    with pytest.raises(error, match=rf"fit_likelihood: flow\(1, 1\) .*{words}"):
        quick(lambda t: normal(t).exp(), flow=wrong, **settings)


def test_recipes_may_bring_an_encoder():
    def encoded(input_dim: int, context_dim: int) -> Flow:
        encoder = MLPEncoder(context_dim, 3, (4,))
        return Flow(recipe(input_dim, 3).transforms, encoder=encoder)

    likelihood = quick(normal, flow=encoded)
    assert likelihood(torch.zeros(4, 1)).batch_shape == (4,)


def test_data_of_another_width_have_one_clear_error(chosen):
    with pytest.raises(ValueError, match=r"value must have the event shape \(2,\) on the right, got shape \(9, 1\)"):
        AutoFlow(of_rows(chosen)).setup(torch.ones(9, 1))


@pytest.mark.parametrize("local", [False, True])
def test_a_likelihood_that_a_model_holds_is_not_trained(local):
    """Pyro registers the modules of a model, so a likelihood with trainable parameters would adapt to the data."""

    class Holder(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.likelihood = quick(normal)

        def forward(self, x: Tensor) -> None:
            of_rows(self.likelihood)(x)

    x = normal(torch.ones(10, 1))
    with pyro.settings.context(module_local_params=local):
        model = Holder()
        before = copy.deepcopy(model.likelihood.state_dict())
        with silent():
            fit_svi(model, AutoFlow(model, flow=flows.realnvp), x, steps=2, progress=False)
            if not local:  # Pyro's SVI then fails for any plain module in a model
                SVI(model, AutoFlow(model, flow=flows.realnvp), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    assert all(torch.equal(value, before[name]) for name, value in model.likelihood.state_dict().items())


def test_contexts_have_a_dimension_of_parameters():
    likelihood = quick(normal)
    assert isinstance(likelihood, Flow)
    assert likelihood(torch.zeros(4, 1)).log_prob(torch.zeros(4, 1)).shape == (4,)
    with pytest.raises(ValueError, match=r"context must have shape \(\*batch, 1\), got \(5,\).*context\[..., None\]"):
        likelihood(torch.zeros(5))


def test_a_location_that_all_numbers_of_a_context_share_is_accepted():
    flow = Flow(flows.nsf(2, 3).transforms, encoder=Standardize((1,)))
    assert flow(torch.zeros(5, 3)).batch_shape == (5,)


@pytest.mark.slow
def test_a_posterior_with_a_learned_likelihood_is_that_with_the_exact_one():
    """The learned density costs at most .02 nats per row, and moves the mean of a posterior of 20 rows by .3 sd."""
    likelihood = fit_likelihood(theta := PRIOR.sample((5000,)), normal(theta), progress=False)
    theta = PRIOR.sample((4000,))
    x = normal(theta)
    loss = dist.Normal(theta, 0.5).to_event(1).log_prob(x) - likelihood(theta).log_prob(x)
    assert loss.mean() < 0.02

    x, model = normal(torch.ones(20, 1)), of_rows(likelihood)
    guide = AutoFlow(model)
    fit_svi(model, guide, x, steps=100, progress=False)
    draws, precision = guide.sample(4000)["theta"], 1 + 20 / 0.25
    assert abs(float(draws.mean()) - float(x.sum()) / 0.25 / precision) < 0.3 * precision**-0.5
    assert abs(float(draws.std()) * precision**0.5 - 1) < 0.1


@pytest.mark.slow
def test_correlations_that_depend_on_the_parameters_are_learned_by_default():
    """The density of a normal pair with a correlation tanh(2 θ), and spreads exp(θ), loses at most .02 nats."""

    def exact(theta: Tensor) -> dist.MultivariateNormal:
        r, sd = (2 * theta).tanh().squeeze(-1), theta.exp().squeeze(-1)
        zero = torch.zeros_like(r)
        rows = torch.stack((sd, zero), -1), torch.stack((r * sd, (1 - r * r).sqrt() * sd), -1)
        return dist.MultivariateNormal(theta.expand(-1, 2), scale_tril=torch.stack(rows, -2))

    prior = dist.Uniform(torch.full((1,), -1.0), 1.0)
    likelihood = fit_likelihood(theta := prior.sample((5000,)), exact(theta).sample(), progress=False)
    assert any(isinstance(part, TriangularAffine) for part in likelihood.transforms)
    theta = prior.sample((4000,))
    x = exact(theta).sample()
    assert (exact(theta).log_prob(x) - likelihood(theta).log_prob(x)).mean() < 0.02
