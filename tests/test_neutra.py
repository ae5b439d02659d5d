"""NeuTra: chains in the base space of a guide find the posterior, and a collapsed guide is detected."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import called, silent, stirred
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)

import pyro_flows as pf
from pyro_flows import AutoFlow, fit_svi, flows, neutra
from pyro_flows.diagnostics import Neutra

Y = torch.tensor([1.0, 2.5, 0.2])


def model(y: torch.Tensor, noise: float = 1.0) -> None:
    """Sample a latent in a plate: x given y is N(y / 2, 1/2); two more keep their priors."""
    with pyro.plate("rows", 3):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, noise), obs=y)
    pyro.sample("scale", dist.LogNormal(0.5, 0.5))
    pyro.sample("shares", dist.Dirichlet(torch.tensor([3.0, 2.0])))


def bent() -> AutoFlow:
    """Return a nonlinear guide that is far from the posterior."""
    flow = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(8,))
    return stirred(AutoFlow(model, flow, init_scale=1.0).setup(Y), 0.1)


def run(found: Neutra, *args) -> dict[str, torch.Tensor]:
    kernel = NUTS(found.model, jit_compile=False)
    mcmc = MCMC(kernel, 200, 100, initial_params=found.initial(), disable_progbar=True)
    mcmc.run(*args)
    return found.transform(mcmc.get_samples())


def error(draws: torch.Tensor, mean: float) -> float:
    """Return the error of a chain's mean in standard errors of ten batches: Student-t with 9 degrees of freedom."""
    batches = draws.reshape(10, -1).mean(1)
    return abs(float(batches.mean()) - mean) / (float(batches.std()) / 10**0.5)


FAR = 6.0  # a t with 9 degrees of freedom exceeds it once in 5,000 draws


@pytest.mark.slow
@pytest.mark.parametrize("local", [False, True])
def test_chains_find_the_posterior(local):
    """Any guide works, with its parameters in Pyro's store or in the guide alone."""
    with pyro.settings.context(module_local_params=local):
        draws = run(neutra(model, bent(), Y, check=False), Y)
    assert {name: value.shape[1:] for name, value in draws.items()} == {"x": (3,), "scale": (), "shares": (2,)}
    normal = [(value, float(y) / 2, 0.5) for value, y in zip(draws["x"].T, Y, strict=True)]
    for value, mean, variance in (*normal, (draws["scale"].log(), 0.5, 0.25)):
        assert error(value, mean) < FAR
        assert error((value - mean) ** 2, variance) < FAR
    assert error(draws["shares"][:, 0], 0.6) < FAR
    torch.testing.assert_close(draws["shares"].sum(-1), torch.ones(200))


@pytest.mark.parametrize("build", [None, AutoMultivariateNormal, AutoDiagonalNormal, AutoIAFNormal])
@pytest.mark.parametrize("options", [{"noise": 0.5}, {"noise": 2.0}])
@torch.no_grad()
def test_the_density_is_that_of_the_base(double, build, options):
    """It is log p(T(u), x) + log|dT/du| by autograd, counted once for a latent in a plate of three rows."""
    guide = stirred(called(build(model) if build else bent(), Y), 0.1)
    found = neutra(model, guide, Y, check=False, **options)
    u, noise = torch.randn(5), options["noise"]
    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(lambda u: guide.get_transform()(u), u)
    z, values = guide.get_transform()(u), found.transform(u)
    shares = torch.distributions.biject_to(torch.distributions.constraints.simplex)
    change = values["scale"].log() + shares.log_abs_det_jacobian(z[4:], values["shares"])
    log_joint = poutine.trace(poutine.condition(model, values)).get_trace(Y, noise).log_prob_sum()
    expected = log_joint + jacobian.slogdet()[1] + change
    held = poutine.condition(found.model, {found.site: u})
    actual = poutine.trace(held).get_trace(Y, noise=noise).log_prob_sum()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_transform_keeps_the_shape_of_its_samples():
    """Samples come by draw, by chain and draw, as a tensor or as a dictionary; other sites do not change."""
    found = neutra(model, bent(), Y, check=False)
    u = torch.randn(4, 6, 5)
    by_chain = found.transform({found.site: u, "other": torch.ones(4, 6)})
    flat = found.transform(u.reshape(24, 5))
    assert by_chain["x"].shape == (4, 6, 3)
    assert by_chain["scale"].shape == by_chain["other"].shape == (4, 6)
    assert by_chain["shares"].shape == (4, 6, 2)
    for name in ("x", "scale", "shares"):
        torch.testing.assert_close(by_chain[name].reshape(flat[name].shape), flat[name])
        torch.testing.assert_close(found.transform(u[2, 3])[name], by_chain[name][2, 3])
    with pytest.raises(ValueError, match=r"samples must contain the site 'x_shared_latent', got \['other'\]"):
        found.transform({"other": torch.ones(4)})


def test_transform_takes_supports_where_they_move():
    def triangle():
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        pyro.sample("b", dist.Uniform(0.0, 1 - a))

    guide = AutoFlow(triangle)
    fit_svi(triangle, guide, steps=3, progress=False)
    found = neutra(triangle, guide, check=False)
    for u in torch.randn(5, 2):
        trace = poutine.trace(poutine.condition(found.model, {found.site: u})).get_trace()
        for name, value in found.transform(u).items():
            torch.testing.assert_close(value, trace.nodes[name]["value"])


def test_chains_start_from_the_guide():
    guide = bent()
    found = neutra(model, guide, Y, check=False)
    start = found.initial(2000)[found.site]
    assert start.shape == (2000, 5)
    draws, own = found.transform(start)["x"], guide.sample(2000)["x"]
    noise = (draws.var(0) / 2000 + own.var(0) / 2000).sqrt()
    assert ((draws.mean(0) - own.mean(0)).abs() < 4.5 * noise).all()
    assert found.initial()[found.site].shape == (5,)
    with pytest.raises(ValueError, match="num_chains must be an integer of at least 1, got 0"):
        found.initial(0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:num_chains=2 is more than:UserWarning")
def test_several_chains():
    found = neutra(model, bent(), Y, check=False)
    how = {"num_chains": 2, "initial_params": found.initial(2), "disable_progbar": True, "mp_context": "fork"}
    mcmc = MCMC(NUTS(found.model, max_tree_depth=4), 20, 20, **how)
    mcmc.run(Y)
    draws = found.transform(mcmc.get_samples(group_by_chain=True))
    assert draws["x"].shape == (2, 20, 3)
    assert not torch.equal(draws["x"][0], draws["x"][1])


def test_a_model_that_breaks_down_leaves_nothing_behind():
    """After a failure between two latents, the next run is not affected."""
    broken = False

    def fragile() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        if broken:
            raise RuntimeError("broke down")
        pyro.sample("b", dist.Normal(0.0, 1.0))

    guide = called(AutoDiagonalNormal(fragile))
    found = neutra(fragile, guide, check=False)
    broken = True
    with pytest.raises(RuntimeError, match="broke down"):
        poutine.trace(found.model).get_trace()
    broken = False
    assert {"a", "b"} <= set(poutine.trace(found.model).get_trace().nodes)


def correlated() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(0.8 * x, 0.6))


def gaussian(scale: float) -> AutoMultivariateNormal:
    """Return the posterior of the model above with its standard deviations scaled."""
    guide = called(AutoMultivariateNormal(correlated))
    guide.loc.data.zero_()
    guide.scale = torch.tensor([scale, scale])
    guide.scale_tril = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    return guide


@pytest.mark.slow
def test_a_collapsed_guide_is_a_warning():
    guide = gaussian(0.2)
    verdict = pf.check(correlated, guide)
    assert verdict.verdict == "do not trust"
    pyro.set_rng_seed(0)
    with pytest.warns(UserWarning, match=r"neutra: the guide cannot be trusted, so chains may miss a part"):
        found = neutra(correlated, guide)
    assert isinstance(found, Neutra)
    with silent(UserWarning):
        neutra(correlated, guide, check=False)
        neutra(correlated, gaussian(1.0))
    draws = run(found)  # the chains converge on this easy model despite the guide
    assert error(draws["x"], 0.0) < FAR


@pytest.mark.parametrize("kind", [AutoNormal, AutoLaplaceApproximation])
def test_guides_without_a_base_are_refused(kind):
    guide = called(kind(correlated))
    words = "guide must be an AutoContinuous with a base distribution, such as AutoFlow or AutoMultivariateNormal"
    with pytest.raises(ValueError, match=f"neutra: {words}, got {kind.__name__}, which has no"):
        neutra(correlated, guide)


@pytest.mark.parametrize("guide", [AutoFlow(correlated), AutoFlow(correlated).setup(), AutoDiagonalNormal(correlated)])
def test_untrained_guides_are_refused(guide):
    with pytest.raises(ValueError, match=r"neutra: the Auto.* was never trained; fit it first"):
        neutra(correlated, guide, check=False)


def test_a_guide_that_cannot_be_checked_is_refused():
    def part() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("rows", 6, subsample=torch.arange(2)):
            pyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=torch.zeros(2))

    guide = called(AutoDiagonalNormal(part))
    with pytest.raises(ValueError, match=r"check failed: .*'rows', .* subsampled.*Pass check=False"):
        neutra(part, guide)
    assert neutra(part, guide, check=False).site == "x_shared_latent"


@pytest.mark.slow
def test_the_density_of_a_model_that_sums_over_all_it_sees_is_that_of_the_base(double):
    """Under a plate of draws such a factor would count once for every draw."""

    def sums() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", -0.5 * (x - 1).pow(2).sum())

    guide = called(AutoDiagonalNormal(sums))
    guide.scale = torch.full((2,), 0.6)
    guide.loc.data.fill_(0.5)
    found = neutra(sums, guide)
    for u in torch.randn(5, 2):
        base = poutine.trace(poutine.condition(found.model, {found.site: u})).get_trace()
        x = found.transform(u)["x"]
        wanted = dist.Normal(0.0, 1.0).log_prob(x).sum() - 0.5 * (x - 1).square().sum()
        log_det = guide.scale.log().sum()
        torch.testing.assert_close(base.log_prob_sum(), wanted + log_det)
