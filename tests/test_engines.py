"""Engines: plate, vmap and loop give many draws the results of single runs, and the first that works is chosen."""

import dataclasses
import math
from functools import partial

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
from models import normals, sampling, silent
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.ops.indexing import Vindex
from torch import nn

import pyro_flows as pf
from pyro_flows import AutoFlow
from pyro_flows.diagnostics import measurements, missing_modes
from pyro_flows.diagnostics.importance import Weighing
from pyro_flows.fitting import guide_start
from pyro_flows.fitting.guide_start import start_from_gaussian
from pyro_flows.objectives import ImportanceWeightedELBO, PathELBO, TemperedELBO
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.sampling.coordinates import White
from pyro_flows.vjp import score_of

X = torch.linspace(-2.0, 2.0, 12, dtype=torch.float64).reshape(4, 3)
Y = torch.tensor([0.3, -1.2, 0.8, 2.1], dtype=torch.float64)
QUICK = {"steps": 3, "progress": False}
pytestmark = pytest.mark.usefixtures("double")


# Models from Pyro's tutorials, and equivalent models that broadcast to the left of their plates.


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def regression_twin(x, y):
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    weight = pyro.sample("linear.weight", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    bias = pyro.sample("linear.bias", dist.Normal(0.0, 10.0).expand([1]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((weight[..., 0, :] * x).sum(-1) + bias[..., 0], sigma), obs=y)


class Network(PyroModule):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = PyroModule[nn.Linear](3, 5), PyroModule[nn.Linear](5, 1, bias=False)
        self.hidden.weight = PyroSample(dist.Normal(0.0, 1.0).expand([5, 3]).to_event(2))
        self.hidden.bias = PyroSample(dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        self.out.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 5]).to_event(2))

    def forward(self, x, y=None):
        mean = self.out(torch.tanh(self.hidden(x))).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


def network_twin(x, y):
    weight = pyro.sample("hidden.weight", dist.Normal(0.0, 1.0).expand([5, 3]).to_event(2))
    bias = pyro.sample("hidden.bias", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    out = pyro.sample("out.weight", dist.Normal(0.0, 1.0).expand([1, 5]).to_event(2))
    hidden = torch.tanh((weight * x.unsqueeze(-2)).sum(-1) + bias)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((hidden * out[..., 0, :]).sum(-1), 0.5), obs=y)


def matmul(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def matmul_twin(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def lkj(x, y):
    theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(3)).to_event(1))
    factor = pyro.sample("L", dist.LKJCholesky(3, 1.0))
    scale_tril = torch.mm(torch.diag(theta.sqrt()), factor)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale_tril), obs=x)


def lkj_twin(x, y):
    theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(3)).to_event(1))
    factor = pyro.sample("L", dist.LKJCholesky(3, 1.0))
    with pyro.plate("data", len(x)):
        scale_tril = theta.sqrt().unsqueeze(-1) * factor
        pyro.sample("obs", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale_tril), obs=x)


def gaussian_process(x, y):
    kernel = gp.kernels.RBF(input_dim=1)
    kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    kernel.variance = PyroSample(dist.LogNormal(0.0, 1.0))
    gp.models.GPRegression(x[:, 0], y, kernel, noise=torch.tensor(0.1), jitter=1e-6).model()


def gaussian_process_twin(x, y):
    lengthscale = pyro.sample("kernel.lengthscale", dist.LogNormal(0.0, 1.0))
    variance = pyro.sample("kernel.variance", dist.LogNormal(0.0, 1.0))
    gap = (x[:, 0] - x[:, :1]) / lengthscale[..., None, None]
    covariance = variance[..., None, None] * (-gap.square() / 2).exp() + (0.1 + 1e-6) * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


def states_of(number):
    state, states = torch.zeros(()), []
    for t in pyro.markov(range(number)):
        state = pyro.sample(f"z_{t}", dist.Normal(0.9 * state, 1.0))
        states.append(state)
    return states


def chain(x, y):
    """Model with a ``pyro.markov`` loop that stacks its states along a new dimension."""
    states = states_of(len(y))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(torch.stack(states), 0.5), obs=y)


def chain_twin(x, y):
    states = states_of(len(y))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(torch.cat([s.reshape(*s.shape[:-1], -1) for s in states], -1), 0.5), obs=y)


TWINS = {
    "regression": (Regression, regression_twin),
    "network": (Network, network_twin),
    "matmul": (lambda: matmul, matmul_twin),
    "lkj": (lambda: lkj, lkj_twin),
    "gp": (lambda: gaussian_process, gaussian_process_twin),
    "chain": (lambda: chain, chain_twin),
}
every_twin = pytest.mark.parametrize("name", TWINS)


@pytest.fixture
def brief(monkeypatch):
    """Shorten the search for modes and the chains."""
    for module, name, numbers in (
        (missing_modes, "SEARCH", {"starts": 16, "probes": 500, "gradients": 40}),
        (missing_modes, "REACH", {"few": 16, "particles": 64}),
        (measurements, "SHORT_RUN", {"sweeps": measurements.SHORT_RUN.block}),
    ):
        monkeypatch.setattr(module, name, dataclasses.replace(getattr(module, name), **numbers))


def pair(name):
    build, twin = TWINS[name]
    model = build()
    guide = AutoFlow(model, init_scale=0.5).setup(X, Y)
    return model, twin, guide


@every_twin
def test_refused_models_run_by_vmap_and_have_the_density_of_their_twins(name):
    model, twin, guide = pair(name)
    task = Task(model, guide, (X, Y), {}).settle()
    assert (task.model.engine, task.guide.engine) == ("vmap", "plate")
    draws = task.draw(40)
    for program in (pf.Program(twin, vectorize="plate"), pf.Program(model, vectorize="loop")):
        wanted = Task(program, guide, (X, Y), {}).settle().model.log_prob(draws.latents, 40)
        torch.testing.assert_close(draws.log_p, wanted, rtol=1e-9, atol=1e-9)


@every_twin
@pytest.mark.parametrize(
    "objective",
    [
        partial(PathELBO, 6, vectorize_particles=True),
        partial(Trace_ELBO, 6, vectorize_particles=True),
        partial(ImportanceWeightedELBO, 6),
        partial(TemperedELBO, 10, num_particles=6),
    ],
    ids=["path", "trace", "iw", "tempered"],
)
def test_elbo_gradients_are_those_of_the_twins(name, objective):
    model, twin, guide = pair(name)
    task = Task(model, guide, (X, Y), {})
    parameters = list(guide.parameters())

    def gradients(program):
        pyro.set_rng_seed(5)
        loss = objective(max_plate_nesting=task.model.nesting).differentiable_loss(program, guide, X, Y)
        return loss, torch.autograd.grad(loss, parameters, allow_unused=True)

    loss, found = gradients(task.broadcasting)
    wanted_loss, wanted = gradients(twin)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-9, atol=1e-9)
    assert [one is None for one in found] == [other is None for other in wanted]
    pairs = [(one, other) for one, other in zip(found, wanted, strict=True) if one is not None]
    torch.testing.assert_close(*zip(*pairs, strict=True), rtol=1e-6, atol=1e-6)


@every_twin
def test_scores_are_those_of_the_twins(name):
    model, twin, guide = pair(name)
    spaces = [Density(Task(program, guide, (X, Y), {})) for program in (model, twin)]
    z = torch.randn(5, spaces[0].dim)
    torch.testing.assert_close(*(score_of(space.log_prob, z) for space in spaces), rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", ["regression", "gp"])
def test_verbs_take_models_that_do_not_broadcast(name):
    model, _, guide = pair(name)
    pf.fit_svi(model, guide, X, Y, **QUICK)
    assert pf.psis(model, guide, X, Y, num_samples=50).log_weights.isfinite().all()
    assert pf.check(model, guide, X, Y, num_samples=100, num_chains=16).verdict
    assert pf.refine(model, guide, X, Y, num_samples=10, transitions=4).draws.keys() == guide.median(X, Y).keys()
    found = pf.to_arviz(model, guide, X, Y, num_samples=30, posterior_predictive=True)
    assert all(found[group].sizes["draw"] == 30 for group in ("posterior", "posterior_predictive", "log_likelihood"))
    assert pf.resample(model, guide, X, Y, num_samples=10, num_weighed=30).keys() >= guide.median(X, Y).keys()


# The loop, and models that need it.


def branching(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(2 * w if w.item() > 0 else 3 * w, 1.0), obs=y)


NORM = nn.BatchNorm1d(1)


def normalising(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(NORM.double()(X[:, :1] * w).squeeze(-1) * w, 1.0), obs=y)


RUNS_ALONE = (
    r"^the model runs one draw at a time\. In a plate of draws, the model does not run vectorised over draws: test_eng"
    r".* Under torch\.func\.vmap, the model does not run vectorised over draws: test_engines\.py:\d+, `pyro\.sample"
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [branching, normalising])
def test_what_only_single_runs_can_do_runs_in_a_loop_and_one_line_says_so(model):
    y = Y[0] if model is branching else Y
    guide = AutoFlow(model).setup(y)
    with pytest.warns(UserWarning, match=RUNS_ALONE):
        task = Task(model, guide, (y,), {}).settle()
    assert task.model.engine == "loop"
    draws = task.draw(3)
    for row in range(3):
        held = poutine.condition(model, data={name: value[row] for name, value in draws.latents.items()})
        alone = poutine.trace(held).get_trace(y).log_prob_sum()
        torch.testing.assert_close(draws.log_p[row], alone, rtol=1e-9, atol=1e-9)
    assert pf.fit_svi(model, AutoFlow(model), y, warm_start=False, **QUICK).losses.isfinite().all()


def summing(y):
    """Model with a small term that depends on all draws together."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -w.square().sum())
    with pyro.plate("data", 10_000):
        pyro.sample("y", dist.Normal(w, 1e-3), obs=y.expand(10_000) + 0.5)


def test_a_density_that_mixes_draws_is_seen_at_its_site_whatever_the_size_of_others():
    guide = AutoFlow(summing).setup(Y[0])
    assert Task(summing, guide, (Y[0],), {}).settle().model.engine == "vmap"
    with pytest.raises(ValueError, match=r"log-density at site 'penalty' \(test_engines.*`\) is .* for one draw"):
        Task(pf.Program(summing, vectorize="plate"), guide, (Y[0],), {}).settle()


def test_the_warning_of_the_loop_quotes_the_line_of_a_density_that_differs():
    def model(y):
        summing(y)
        pyro.sample("v", dist.Normal(0.0, 1.0)).reshape(-1).min().item()

    said = r"one draw at a time.*at site 'penalty' .*`pyro\.factor\(\"penalty\".*func\.vmap, .*\.item\(\)`: Runtime"
    with pytest.warns(UserWarning, match=said):
        Task(model, AutoFlow(model).setup(Y[0]), (Y[0],), {}).settle()


def deriving(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("share", w / w.sum())
    pyro.sample("y", dist.Normal(w.sum(-1), 1.0), obs=y)


def test_deterministic_sites_count_in_the_choice():
    guide = AutoFlow(deriving).setup(Y[0])
    task = Task(deriving, guide, (Y[0],), {}).settle()
    assert task.model.engine == "vmap"
    share = task.values(task.draw(7).latents)["share"]
    torch.testing.assert_close(share.sum(-1), torch.ones(7))


def test_a_guide_that_does_not_broadcast_is_run_by_vmap():
    scale = torch.tensor([[0.2, 0.1, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.1]])

    def guide(x, y):
        noise = pyro.sample("noise", dist.Normal(torch.zeros(3), 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Delta(torch.mv(scale, noise), event_dim=1, log_density=-scale.diagonal().log().sum()))

    task = Task(matmul, guide, (X, Y), {}).settle()
    assert task.guide.engine == "vmap"
    draws = task.draw(1000)
    assert draws.latents["w"].std(0).min() > 0.05  # each draw has its own noise
    exact = dist.MultivariateNormal(torch.zeros(3), scale @ scale.T).log_prob(draws.latents["w"])
    torch.testing.assert_close(draws.log_q, exact)


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("vectorize", ["vmap", "loop", "plate"])
def test_an_engine_can_be_insisted_on(vectorize):
    guide = AutoNormal(matmul_twin)
    guide(X, Y)
    program = pf.Program(matmul_twin, vectorize=vectorize)
    assert Task(program, guide, (X, Y), {}).settle().model.engine == vectorize
    for verb in (pf.psis, pf.check):
        verb(program, guide, X, Y, num_samples=100)


def test_random_structure_is_refused_by_the_site():
    def growing(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        if runs.append(1) or len(runs) % 2:
            pyro.sample("extra", dist.Normal(w, 1.0), obs=y)
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    runs: list[int] = []
    with pytest.raises(ValueError, match=r"other sites from run to run: 'extra' is in some runs only\. Let it draw"):
        pf.psis(growing, sampling(w=dist.Normal(0.0, 1.0)), Y[0], num_samples=50)


# Programs with traps for engines, searches or guides.


def test_a_draw_out_of_range_is_weighed_and_no_error():
    """One draw overflows in its constrained space; its density is not finite, and the others are."""

    def model():
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    space = Density(Task(model, AutoFlow(model).setup(), (), {}))
    z = torch.tensor([[0.5], [1000.0]], requires_grad=True)
    found = space.log_prob(z)
    assert found.isfinite().tolist() == [True, False]


@pytest.mark.slow
def test_plates_that_hold_no_site_do_not_meet_the_plate_of_draws():
    """Pyro's compartmental models compute within a plate of time, and add a factor outside of it."""

    def model(data):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("time", len(data), dim=-1):
            total = float(len(data)) * x
        if total > 1e9:
            raise AssertionError
        pyro.sample("y", dist.Normal(total, 1.0), obs=data.sum())

    assert pf.fit_svi(model, AutoFlow(model), torch.ones(3), num_particles=4, **QUICK).losses.isfinite().all()


def test_a_model_without_gradients_is_refused_before_training():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(torch.as_tensor(x.numpy() ** 2), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"(?s)fit_svi: the model has no gradients.*numpy\(\).*without .numpy"):
        pf.fit_svi(model, AutoFlow(model), torch.tensor(1.0), **QUICK)


def test_a_law_without_a_support_is_over_the_real_numbers():
    """Example: zuko's flows within ``ZukoToPyro``."""

    class Nameless(dist.MultivariateNormal):
        @property
        def support(self):
            raise NotImplementedError

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", Nameless(torch.full((2,), 3.0), torch.eye(2)))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    y = torch.zeros(3)
    for guide in (AutoFlow(model), pf.AutoPlateFlow(model, "rows")):
        pf.fit_svi(model, guide, y, **QUICK)
        assert guide.sample(4, y)["z"].shape == (4, 3, 2)


# Densities that change between runs.

DROPOUT = nn.Dropout(0.5)


def dropping(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(30), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(DROPOUT(w + 1).sum(-1, keepdim=True), 0.1), obs=y)


def dropping_alone(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(30), 1.0).to_event(1))
    w[0].item()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(DROPOUT(w + 1).sum(), 0.1), obs=y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [dropping, dropping_alone])
@pytest.mark.parametrize("verb", [pf.psis, pf.check, pf.resample, pf.refine])
def test_a_density_that_changes_from_run_to_run_is_refused_at_its_site(verb, model):
    guide = AutoFlow(model)
    pf.fit_svi(model, guide, Y, warm_start=False, **QUICK)  # a noisy loss does no harm
    with pytest.raises(ValueError, match=r"log-density changes from run to run, .* most at site 'y': draws cannot"):
        verb(model, guide, Y)


def shaken(sd):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", sd * torch.randn(()))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    return Task(model, AutoFlow(model).setup(), (), {})


def test_a_noisy_density_is_refused_for_weights_after_its_engine_was_chosen():
    task = shaken(20.0)
    with pytest.warns(UserWarning, match="log-density is an estimate"):
        task.settle()
    with pytest.raises(ValueError, match=r"most at site 'f': draws cannot be weighed"):
        task.check()
    task.check(whole=False)


def test_a_noisy_density_is_said_once_for_all_guides_of_a_task():
    task = shaken(1.0)
    with pytest.warns(UserWarning, match="log-density is an estimate"):
        task.settle()
    with silent():
        task.of(AutoFlow(task.model.call).setup()).check().settle()


def test_vmap_that_cannot_draw_is_tried_once():
    runs = []

    def model():
        runs.append(1)
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if torch._C._functorch.is_batchedtensor(x):
            raise RuntimeError("cannot draw")

    guide = AutoFlow(sampling(x=normals(2))).setup()
    runner, number = Task(model, guide, (), {}).model.by("vmap"), []
    for _ in range(2):
        before = len(runs)
        runner.sample(lambda view: {"x": view.read("x")}, {"x": torch.zeros(3, 2)}, 3)
        number.append(len(runs) - before)
    assert number == [4, 3]


class Remembering(PyroModule):
    """Model that creates a parameter in its first run, and whose density changes between runs."""

    def __init__(self):
        super().__init__()
        self.weight, self.kept = PyroParam(torch.ones(())), None

    def forward(self, y):
        if self.kept is None:
            self.kept = self.weight.detach()
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(self.kept * w + 5 * torch.randn(()), 1.0), obs=y)


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_a_parameter_of_the_first_run_alone_hides_no_noise(engine):
    model = Remembering()
    guide = AutoFlow(Remembering()).setup(Y)
    with pytest.raises(ValueError, match=r"log-density changes from run to run, .* most at site 'y'"):
        pf.psis(pf.Program(model, vectorize=engine), guide, Y)


def mixing(y):
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(Vindex(loc)[..., k], 1.0), obs=y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [matmul_twin, matmul, branching, mixing])
def test_the_choice_takes_few_runs(model):
    runs, arguments = [], {branching: (Y[0],), mixing: (Y,)}.get(model, (X, Y))

    def counted(*args):
        runs.append(1)
        return model(*args)

    task = Task(counted, AutoFlow(model).setup(*arguments), arguments, {})
    before = len(runs)
    task.settle()
    assert len(runs) - before <= (9 if model is mixing else 5)  # a sum is checked at several discrete values


# Writes into the values of latents, and a model that has the same density without them.

FREE = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)


def pinning(y=None, matmul=False):
    """Pin the first of three effects to zero by a write into their draw."""
    effects = pyro.sample("effects", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with torch.no_grad():
        effects[..., 0] = 0
        scale += 1
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(X @ effects if matmul else (X * effects).sum(-1), scale), obs=y)


def pinning_twin(y=None, matmul=False):
    effects = pyro.sample("effects", dist.Normal(torch.zeros(3), 1.0).to_event(1)) * FREE
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0)) + 1
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(X @ effects, scale), obs=y)


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_a_write_into_a_sampled_value_changes_no_draw_and_no_prior(engine):
    guide = AutoFlow(pinning).setup(Y, True)
    programs = (pf.Program(model, vectorize=engine) for model in (pinning, pinning_twin))
    spaces = [Density(Task(program, guide, (Y, True), {})) for program in programs]
    z = torch.randn(5, 4)
    before = z.clone()
    one, twin = (space.log_prob(z) for space in spaces)
    torch.testing.assert_close(one, twin)
    torch.testing.assert_close(*(score_of(space.log_prob, z) for space in spaces))
    torch.testing.assert_close(z, before, rtol=0, atol=0)
    draws = spaces[0].task.draw(20)
    assert (draws.latents["effects"][:, 0] != 0).all()
    torch.testing.assert_close(draws.log_p, spaces[1].task.model.log_prob(draws.latents, 20))


@pytest.mark.parametrize("make", [AutoFlow, pf.AutoStructuredFlow, lambda model: pf.AutoPlateFlow(model, "data")])
def test_guides_hand_out_values_that_may_be_written_to(make):
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            level = pyro.sample("level", dist.LogNormal(mean, 1.0))
            with torch.no_grad():
                level[..., 0] = 1
            pyro.sample("y", dist.Normal(level, 0.5), obs=y)

    svi = SVI(model, make(model), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(2, vectorize_particles=True))
    assert math.isfinite(svi.step(Y))
    assert pf.fit_svi(model, make(model), Y, warm_start=False, **QUICK).losses.isfinite().all()


@pytest.mark.parametrize("vectorize", ["auto", "plate", "vmap", "loop"])
def test_fits_and_simulations_of_a_model_that_writes_into_its_latents(vectorize):
    program = pf.Program(pinning, vectorize=vectorize)
    fit = pf.fit_svi(program, AutoFlow(pinning), Y, warm_start=False, **QUICK)
    assert fit.losses.isfinite().all()
    found = pf.simulate(program, num_simulations=50)
    assert 0.6 < found.latents["effects"][:, 0].std() < 1.4  # the standard error is 0.1


# Searches over a model that runs one draw at a time have a budget of runs.


def one_by_one(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    COUNTED.append(w[0].item())
    pyro.sample("y", dist.Normal(w.sum(-1), 1.0), obs=y)


COUNTED: list[float] = []


@pytest.mark.filterwarnings("ignore:the model runs one draw")
def test_the_search_for_a_start_of_a_slow_model_is_left_out_or_ended_by_its_budget(monkeypatch):
    guide = AutoFlow(one_by_one).setup(Y[0])
    task = Task(one_by_one, guide, (Y[0],), {}).settle()
    assert task.model.engine == "loop"
    assert 0 < task.model.choice.seconds < 1
    task.model, before = task.model.with_(choice=task.model.choice._replace(seconds=1.0)), len(COUNTED)
    with pytest.warns(UserWarning, match=r"no Gaussian is sought to start from, since .* one draw at a time"):
        assert start_from_gaussian(guide, task, seconds=2000.0) is None
    assert len(COUNTED) == before
    monkeypatch.setattr(guide_start, "STARTS", dataclasses.replace(guide_start.STARTS, least_runs=100))
    with pytest.warns(UserWarning, match=r"the search for a start ended after 600 runs, as the model runs one draw"):
        assert start_from_gaussian(guide, task, seconds=600.0) is not None
    assert len(COUNTED) - before < 2000  # a search without a budget takes more


@pytest.mark.filterwarnings("ignore:the model runs one draw")
def test_a_check_of_a_slow_model_says_what_it_leaves_out(monkeypatch):
    def exact(y):
        cov = torch.linalg.inv(torch.eye(2) + 1.0)
        pyro.sample("w", dist.MultivariateNormal(cov.sum(-1) * y, cov))

    for module in ("importance", "few_latents"):
        monkeypatch.setattr(f"pyro_flows.diagnostics.{module}.WEIGHING", Weighing(seconds=1e-3))
    monkeypatch.setattr(measurements, "SHORT_RUN", dataclasses.replace(measurements.SHORT_RUN, seconds=1e-3))
    COUNTED.clear()
    found = pf.check(one_by_one, exact, Y[0])
    assert found.trusted
    for words in ("no search for other modes, since the model runs one draw at a time, and a run takes", "missing=?"):
        assert words in repr(found)
    assert len(found.psis.log_weights) == 300
    assert len(COUNTED) < 2500


@pytest.mark.filterwarnings("ignore:the model runs one draw")
def test_the_search_for_modes_of_a_slow_model_ends_by_its_budget(monkeypatch):
    guide = AutoFlow(one_by_one).setup(Y[0])
    task = Task(one_by_one, guide, (Y[0],), {}).settle()
    task.model = task.model.with_(choice=task.model.choice._replace(seconds=1e-3))
    space = Density(task)
    draws = space.draw(100)
    monkeypatch.setattr(missing_modes, "SEARCH", dataclasses.replace(missing_modes.SEARCH, seconds=1.0))
    COUNTED.clear()
    found = missing_modes.search(space, White(draws.z), draws, missing_modes.further_draws(space, draws), 0.0)
    assert found.share > 0.5  # the guide is not trained
    assert found.cut == "the model runs one draw at a time, and a run takes 0.001 s"
    assert len(COUNTED) < 10_000  # 1,000 runs, and a look at what was found; without a budget 40,000


def test_the_search_for_modes_of_any_model_ends_by_the_clock(monkeypatch):
    def many_at_once(y):
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    def exact(y):
        pyro.sample("x", dist.Normal(y / 2, 0.5**0.5))

    monkeypatch.setattr(missing_modes, "SEARCH", dataclasses.replace(missing_modes.SEARCH, seconds=1e-6))
    found = pf.check(many_at_once, exact, torch.tensor(1.0))
    assert found.trusted
    assert "The search for other modes ended early, since it took 1e-06 s." in repr(found)
