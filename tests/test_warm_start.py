"""The Gaussian start of a flow guide is exact for Gaussian posteriors, also distant and ill-conditioned ones.

It is never worse than no warm start."""

import functools
import math
import signal
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import sampling
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_flows import AutoFlow, fit_svi, flows
from pyro_flows.fitting.guide_start import start_from_gaussian
from pyro_flows.guides import guide_flow
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.sampling.gaussian import Gaussian, fit_gaussian

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(16,))


def start(model, *args, recipe=small, **settings) -> AutoFlow:
    """Return a guide after its warm start, before any training."""
    guide = AutoFlow(model, recipe, **settings).setup(*args)
    start_from_gaussian(guide, Task(model, guide, args, {}))
    return guide


def elbo(density, loc: Tensor, scale_tril: Tensor, draws: int = 20_000) -> tuple[float, float]:
    """Return the ELBO of a Gaussian and its standard error."""
    q = dist.MultivariateNormal(loc, scale_tril=scale_tril)
    z = q.sample((draws,))
    with torch.no_grad():
        weights = (density(z) - q.log_prob(z)).double()
    return weights.mean().item(), weights.std().item() / math.sqrt(draws)


# Gaussian posteriors.


def rotated(dim: int, condition: float, shift: float) -> dist.MultivariateNormal:
    source = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=source, dtype=torch.float64)).Q
    variances = torch.logspace(0, math.log10(condition), dim, dtype=torch.float64) / condition**0.5
    loc = shift * torch.randn(dim, generator=source, dtype=torch.float64)
    return dist.MultivariateNormal(loc, precision_matrix=(axes / variances) @ axes.T)


@pytest.mark.parametrize(("dim", "condition", "shift"), [(1, 1.0, 50.0), (5, 1e4, 0.0), (50, 1e6, 3.0)])
def test_a_gaussian_is_found_exactly(dim, condition, shift):
    target = rotated(dim, condition, shift)
    found = fit_gaussian(target.log_prob, torch.zeros(dim, dtype=torch.float64), 0.1)
    q = dist.MultivariateNormal(found.loc, scale_tril=found.scale_tril)
    assert torch.distributions.kl_divergence(q, target) < 1e-6
    assert abs(found.elbo) < 1e-6  # the target is normalised


X = torch.linspace(0, 30, 40, dtype=torch.float64)
X = torch.stack([torch.ones_like(X), 100 + X, (X - 15) ** 2 / 10], -1)
TARGETS = X @ torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64) + torch.sin(7 * X[:, 1])


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), 10.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def test_an_ill_conditioned_regression_is_found_exactly():
    precision = X.T @ X + torch.eye(3, dtype=torch.float64) / 100
    assert torch.linalg.cond(precision) > 1e5
    loc = torch.linalg.solve(precision, X.T @ TARGETS)
    # The evidence: y is Gaussian with covariance I + 100 X Xᵀ.
    covariance = torch.eye(40, dtype=torch.float64) + 100 * X @ X.T
    evidence = dist.MultivariateNormal(torch.zeros(40, dtype=torch.float64), covariance).log_prob(TARGETS).item()

    guide = start(regression, X, TARGETS)
    losses = torch.stack([_loss(regression, guide, X, TARGETS) for _ in range(20)])
    assert losses.std() < 1e-3  # if the guide is the posterior, each draw gives the evidence
    assert abs(losses.mean() + evidence) < 1e-3
    deviations = torch.linalg.inv(precision).diagonal().sqrt()
    assert ((guide.flow.transforms[-1].loc - loc).abs() < 1e-3 * deviations).all()


def _loss(model, guide, *args) -> Tensor:
    return torch.tensor(Trace_ELBO().loss(model, guide, *args))


def test_flat_priors_are_no_hindrance():
    """The priors of w and log sigma are flat: w follows a t distribution, whose mean is the least-squares solution."""

    def flat(x, y):
        w = pyro.sample("w", dist.ImproperUniform(constraints.real_vector, (), (3,)))
        sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), sigma), obs=y)
        pyro.factor("scale-free", -sigma.log())

    x, y = (X - X.mean(0) * torch.tensor([0.0, 1.0, 1.0])).float(), TARGETS.float()
    guide = start(flat, x, y)
    least_squares = torch.linalg.lstsq(x, y.unsqueeze(-1))
    residual = (y - x @ least_squares.solution.squeeze(-1)).square().sum() / 37
    deviations = (residual * torch.linalg.inv(x.T @ x).diagonal() * 37 / 35).sqrt()
    draws = guide.sample(4000)
    assert ((draws["w"].mean(0) - least_squares.solution.squeeze(-1)).abs() < 0.2 * deviations).all()
    assert (draws["w"].std(0) / deviations - 1).abs().max() < 0.2
    assert draws["sigma"].median().item() == pytest.approx(residual.sqrt().item(), rel=0.1)


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "student"])
def test_a_target_a_thousand_deviations_away_is_reached(heavy):
    loc, scale = torch.tensor([1000.0, -500.0]), torch.tensor([1.0, 0.5])
    law = dist.StudentT(5.0, loc, scale) if heavy else dist.Normal(loc, scale)
    found = fit_gaussian(lambda z: law.log_prob(z).sum(-1), torch.zeros(2), 0.1)
    assert ((found.loc - loc).abs() < 0.2 * scale).all()
    assert (found.scale_tril.diagonal() / scale - 1).abs().max() < 0.3
    assert found.elbo > -0.2


# The density.


def nested(y):
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 1.0))
    with pyro.plate("outer", 2, dim=-2):
        middle = pyro.sample("middle", dist.Normal(top, 1.0))
        with pyro.plate("inner", 3, dim=-1), poutine.scale(scale=2.5):
            leaf = pyro.sample("leaf", dist.LogNormal(middle, 0.5))
            mix = pyro.sample("mix", dist.Dirichlet(torch.ones(4)))
            pyro.sample("bounded", dist.Uniform(-2.0, 5.0))
            pyro.sample("y", dist.Normal(leaf + mix[..., 0] + corr[..., 1, 0], 1.0), obs=y)


NESTED_Y = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.1, 1.5]])


def test_log_p_is_the_models_density_of_one_draw_at_a_time():
    guide = AutoFlow(nested, small).setup(NESTED_Y)
    z = torch.randn(5, guide.latent_dim)
    together = Density(Task(nested, guide, (NESTED_Y,), {})).log_prob(z)
    for row in range(5):
        values, change = guide.unpack(z[row]), torch.zeros(())
        for name, site in guide.prototype_trace.iter_stochastic_nodes():
            bijection = biject_to(site["fn"].support)
            change += bijection.log_abs_det_jacobian(bijection.inv(values[name]), values[name]).sum()
        alone = poutine.trace(poutine.condition(nested, data=values)).get_trace(NESTED_Y).log_prob_sum() + change
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-4)


# The flow after a Gaussian start.


def gaussian_model(dim: int):
    return sampling(x=dist.Normal(torch.zeros(dim, dtype=torch.float64), 1.0).to_event(1))


@pytest.mark.parametrize("dim", [1, 2, 65, 513])
@pytest.mark.parametrize("name", ["realnvp", "iaf", "nsf_ar"])
def test_start_at_makes_the_guide_that_gaussian(dim, name):
    recipe = functools.partial(getattr(flows, name), num_transforms=2, hidden_dims=(8,))
    guide = AutoFlow(gaussian_model(dim), recipe).setup()
    loc = 100 * torch.randn(dim, dtype=torch.float64)
    law = dist.MultivariateNormal(loc, rotated(dim, 1e5, 0.0).covariance_matrix)
    guide.start_at(loc, law.scale_tril)
    z = law.sample((20,))
    torch.testing.assert_close(guide.get_posterior().log_prob(z), law.log_prob(z), rtol=1e-6, atol=1e-5)
    assert guide.is_fresh


def test_of_very_many_latents_the_guide_has_the_marginals(monkeypatch):
    monkeypatch.setattr(guide_flow, "LIMITS", replace(guide_flow.LIMITS, dense=600))
    guide, law = AutoFlow(gaussian_model(601), small).setup(), rotated(601, 1e5, 2.0)
    guide.start_at(law.loc, law.scale_tril)
    assert max(parameter.numel() for parameter in guide.parameters()) < 601**2
    marginals, z = dist.Normal(law.loc, law.variance.sqrt()).to_event(1), law.sample((20,))
    torch.testing.assert_close(guide.get_posterior().log_prob(z), marginals.log_prob(z), rtol=1e-6, atol=1e-5)


# Many latents.


def counts(y: Tensor):
    """Poisson counts whose log-rates walk from row to row, and are skewed where nothing was counted."""
    steps = pyro.sample("steps", dist.Normal(torch.zeros(len(y)), 0.05).to_event(1))
    noise = pyro.sample("noise", dist.Normal(torch.zeros(len(y)), 2.0).to_event(1))
    pyro.sample("y", dist.Poisson((noise + steps.cumsum(-1) - 1).exp()).to_event(1), obs=y)


@pytest.mark.slow
def test_beyond_512_latents_correlations_and_marginals_are_found():
    y = torch.poisson((2 * torch.randn(270) - 1).exp())
    guide = AutoFlow(counts, small)
    fit_svi(counts, guide, y, steps=1, num_particles=16, progress=False)
    begun = _log_weights(counts, guide, y)
    fit_svi(counts, guide, y, steps=80, num_particles=32, lr=0.02, progress=False)
    found = _log_weights(counts, guide, y)
    assert found.std() < 0.6 * begun.std()
    assert found.mean() > begun.mean() + 5


def _log_weights(model, guide, *args) -> Tensor:
    with torch.no_grad():
        z, log_q = guide.flow().rsample_and_log_prob((1000,))
        return Density(Task(model, guide, args, {})).log_prob(z) - log_q


def test_models_that_run_one_draw_at_a_time_keep_their_start_of_many_latents():
    guide = AutoFlow(gaussian_model(513), small).setup()
    assert start_from_gaussian(guide, Task(gaussian_model(513), guide, (), {}), budget=8 * 250) is None
    assert guide.is_fresh


def test_beyond_64_latents_the_marginals_are_found():
    variance = torch.logspace(-4, 4, 100, dtype=torch.float64)
    wide = sampling(x=dist.Normal(torch.arange(100.0, dtype=torch.float64), variance.sqrt()).to_event(1))
    guide = start(wide, init_scale=1.0)
    losses = torch.stack([_loss(wide, guide) for _ in range(10)])
    assert losses.abs().max() < 1e-3


# Cases in which the warm start must not do harm.


def funnel(z: Tensor) -> Tensor:
    return dist.Normal(0.0, 3.0).log_prob(z[:, 0]) + dist.Normal(0.0, (z[:, :1] / 2).exp()).log_prob(z[:, 1:]).sum(-1)


def unbounded(z: Tensor) -> Tensor:
    """Sample eight schools without data for tau: the density is infinite at tau = 0, a point without mass."""
    tau = z[:, :1].exp()
    rest = dist.Normal(0.0, tau, validate_args=False).log_prob(z[:, 1:]).sum(-1)
    return rest + dist.HalfCauchy(5.0, validate_args=False).log_prob(tau[:, 0]) + z[:, 0]


def banana(z: Tensor) -> Tensor:
    return dist.Normal(0.0, 2.0).log_prob(z[:, 0]) + dist.Normal(z[:, 0] ** 2, 0.05).log_prob(z[:, 1])


def far_modes(z: Tensor) -> Tensor:
    narrow = dist.Normal(20.0, 0.001).log_prob(z).sum(-1) - 20  # a needle without mass
    return torch.logaddexp(narrow, dist.Normal(0.0, 1.0).log_prob(z).sum(-1))


def half_nan(z: Tensor) -> Tensor:
    return dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + torch.where(z[:, 0] > 0.05, math.nan, 0.0)


def improper(z: Tensor) -> Tensor:
    return z.sum(-1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("density", [funnel, unbounded, banana, far_modes, improper], ids=lambda f: f.__name__)
def test_it_is_never_worse_than_the_start(density, seed):
    pyro.set_rng_seed(seed)
    dim = 2 if density is banana else 9
    found = fit_gaussian(density, torch.zeros(dim), 0.1)
    assert found.loc.isfinite().all()
    assert (found.scale_tril.diagonal() > 0).all()
    before = elbo(density, torch.zeros(dim), 0.1 * torch.eye(dim))
    after = elbo(density, found.loc, found.scale_tril)
    assert after[0] > before[0] - 4 * (before[1] + after[1])


def test_the_funnels_best_gaussian_is_near():
    """The best Gaussian has an ELBO of about -1.9 nats, the start one of about -19."""
    found = fit_gaussian(funnel, torch.zeros(9), 0.1)
    assert elbo(funnel, found.loc, found.scale_tril)[0] > -3


def test_a_needle_without_mass_is_passed_over():
    found = fit_gaussian(far_modes, torch.zeros(3), 0.1)
    assert found.loc.abs().max() < 0.1
    assert found.elbo == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_where_nothing_can_be_evaluated_the_start_stays(seed):
    pyro.set_rng_seed(seed)
    loc = torch.zeros(2)
    found = fit_gaussian(lambda z: z.sum(-1) * math.nan, loc, 0.1)
    assert torch.equal(found.loc, loc)
    assert torch.equal(found.scale_tril, 0.1 * torch.eye(2))
    assert isinstance(fit_gaussian(half_nan, loc, 0.1), Gaussian)


def walled(kind: str):
    """Sample x ~ N(5, 2) and observe y = 2; the model fails near the start of the guide."""

    def model():
        x = pyro.sample("x", dist.Normal(5.0, 2.0))
        out = x > 5.2
        if kind == "nan":
            pyro.factor("wall", torch.where(out, math.nan, 0.0))
        elif kind == "invalid" and out.any():
            raise ValueError("Expected parameter scale, but found invalid values")
        elif kind == "singular" and out.any():
            torch.linalg.cholesky(-torch.eye(2))
        elif kind == "refused":
            pyro.sample("wall", dist.Normal(0.0, torch.where(out, -1.0, 1.0)), obs=torch.zeros(()))
        pyro.sample("y", dist.Normal(x, 0.5), obs=torch.tensor(2.0))

    return model


@pytest.mark.parametrize("kind", ["nan", "invalid", "singular", "refused"])
def test_it_survives_a_model_that_fails_in_places(kind):
    """The posterior, N(2.18, 0.485), lies far from the failures of the model."""
    guide = AutoFlow(walled(kind), small)
    fit = fit_svi(walled(kind), guide, steps=30, num_particles=8, progress=False)
    assert fit.losses.isfinite().any()
    draws = guide.sample(2000)["x"]
    assert abs(draws.mean().item() - 37 / 17) < 4 * 0.485 / math.sqrt(2000) + 0.1
    assert draws.std().item() == pytest.approx(0.485, rel=0.2)


def test_an_error_of_the_model_is_not_swallowed():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x.numel() > 50:
            raise ValueError("out of cheese")

    with pytest.raises(ValueError, match="out of cheese"):
        start(model)


# Conditions for a warm start.


@pytest.fixture
def guide() -> AutoFlow:
    return AutoFlow(model, small).setup()


@pytest.fixture
def calls(guide, monkeypatch) -> list[int]:
    """Return a list that grows when the guide is moved."""
    calls, place = [], guide_flow.GuideFlow.start_at
    monkeypatch.setattr(guide_flow.GuideFlow, "start_at", lambda *gaussian: [calls.append(1), place(*gaussian)])
    return calls


def model(y=3.0):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(y))


fit = functools.partial(fit_svi, model, steps=2, num_particles=4, progress=False)


def test_a_new_guide_is_started_and_a_trained_one_is_not(guide, calls):
    assert guide.is_fresh
    fit(guide)
    assert calls == [1]
    assert not guide.is_fresh
    fit(guide)
    assert calls == [1]
    fit(guide, warm_start=True)  # on request
    assert calls == [1, 1]


def test_a_guide_trained_by_svi_is_not_fresh(guide, calls):
    pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert not guide.is_fresh
    fit(guide)
    assert not calls


@pytest.mark.parametrize(
    ("settings", "starts"),
    [({"warm_start": False}, 0), ({"num_particles": 1}, 0), ({}, 0), ({"warm_start": True}, 1)],
    ids=["warm_start=False", "one particle", "an objective", "warm_start=True"],
)
def test_it_is_left_out_unless_it_is_asked_for(settings, starts, guide, calls):
    """An objective, too, has no warm start by itself."""
    objective = None if "num_particles" in settings else Trace_ELBO(num_particles=4, vectorize_particles=True)
    fit(guide, objective=objective, **settings)
    assert len(calls) == starts


def test_other_guides_have_none():
    fit(AutoNormal(model))
    with pytest.raises(ValueError, match="warm_start=True is for an AutoFlow, not for AutoNormal"):
        fit(AutoNormal(model), warm_start=True)


def test_the_search_keeps_to_its_budget():
    seen = []

    def density(z: torch.Tensor) -> torch.Tensor:
        seen.append(len(z))
        return -(z**4).sum(-1)

    fit_gaussian(density, torch.zeros(50), 0.1, budget=3000)
    assert sum(size for size in seen if size == 100) <= 3000  # the draws of the rounds
    few = sum(seen)
    seen.clear()
    fit_gaussian(density, torch.zeros(50), 0.1)
    assert sum(seen) > few


def test_a_search_that_is_told_to_end_returns_the_best_so_far():
    rounds = []

    def watch() -> bool:
        rounds.append(0)
        return len(rounds) == 3

    law = dist.Normal(torch.zeros(3), 2.0).to_event(1)
    found = fit_gaussian(law.log_prob, torch.zeros(3), 0.1, watch=watch)
    assert len(rounds) <= 4
    torch.testing.assert_close(found.scale_tril, 2 * torch.eye(3), rtol=0, atol=0.1)


def test_ctrl_c_skips_the_search_and_the_fit_goes_on():
    calls = []

    def model() -> None:
        calls.append(0)
        if len(calls) == 50:
            signal.raise_signal(signal.SIGINT)
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(x**2, 0.3))

    with pyro.settings.context(pyro_flows_compile="off"):  # a graph would not call the model
        fit = fit_svi(model, AutoFlow(model), steps=20, progress=False)
    assert (fit.steps, fit.stopped) == (20, "steps")
