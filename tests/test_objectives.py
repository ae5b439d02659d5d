"""Objectives are Pyro ELBOs, with the right value and a gradient with the right mean.

If the guide is the posterior, the gradient has no noise.  Objectives respect plates, scale, mask, subsampling and
discrete latents."""

from __future__ import annotations

import functools
import math
import resource
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import refusals
from models import sampling
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from pyro_flows import AutoFlow, Flow, fit_svi, flows
from pyro_flows.objectives import ForwardKL, ImportanceWeightedELBO, PathELBO, PathEnumELBO, RenyiELBO, TemperedELBO
from pyro_flows.programs.runner import TOTAL

Y = torch.tensor([1.0, 2.5, 4.0])

OBJECTIVES: dict[str, Callable[[], Any]] = {
    "path": lambda: PathELBO(8, vectorize_particles=True),
    "path_looped": lambda: PathELBO(4),
    "importance": lambda: ImportanceWeightedELBO(8),
    "importance_looped": lambda: ImportanceWeightedELBO(4, vectorize_particles=False),
    "renyi": lambda: RenyiELBO(0.5, 8),
    "forward": lambda: ForwardKL(8, 64),
    "tempered": lambda: TemperedELBO(30, num_particles=8),
    "tempered_looped": lambda: TemperedELBO(20, num_particles=3, vectorize_particles=False),
}
every_objective = pytest.mark.parametrize("build", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def small(dim: int) -> Flow:
    return flows.realnvp(dim, num_transforms=2, hidden_dims=(8,), activation=nn.ELU)


def plain() -> None:
    """Sample two latents and their data, in plates, scaled and masked."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with pyro.plate("group", 2, dim=-2), pyro.plate("row", 3, dim=-1), poutine.scale(scale=0.7):
        keep = torch.tensor([True, False, True])
        pyro.sample("y", dist.Normal(mu, sigma).mask(keep), obs=Y.expand(2, 3))


def subsampled() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("row", 3, subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[rows])


def learned() -> None:
    """Sample from a model that has a parameter."""
    offset = pyro.param("offset", torch.tensor(0.3))
    x = pyro.sample("x", dist.Normal(offset, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(-1), 0.7), obs=torch.tensor(1.5))


def gaussian() -> None:
    cov = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    pyro.sample("x", dist.MultivariateNormal(torch.tensor([2.0, -1.0]), cov))


def coin() -> None:
    heads = pyro.sample("heads", dist.Bernoulli(0.4))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + heads, 1.0), obs=torch.tensor(1.0))


def randomly(guide: Any, scale: float = 0.3) -> list[Tensor]:
    """Set random parameters of a guide, and return them."""
    guide()
    parameters = list(guide.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn_like(parameter))
    return parameters


def gradient(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def moments(sample: Callable[[], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of a random vector and its standard error."""
    draws = torch.stack([sample() for _ in range(count)])
    return draws.mean(0), draws.std(0) / math.sqrt(count)


def agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Assert that two estimates have one mean: their standardised differences are about standard normal."""
    z = (ours[0] - theirs[0]) / (ours[1] ** 2 + theirs[1] ** 2).sqrt().clamp_min(1e-9)
    assert z.abs().max() < 4.5
    assert z.square().mean() < 2


def gradients_agree(losses: list[Any], model: Any, guide: Any, parameters: list[Tensor], count: int) -> None:
    agree(*(moments(lambda e=e: gradient(e.differentiable_loss(model, guide), parameters), count) for e in losses))


def losses_agree(losses: list[Any], model: Any, guide: Any) -> None:
    """Assert that objectives have the same loss of the same draws."""
    values = []
    for objective in losses:
        pyro.set_rng_seed(0)
        values.append(objective.loss(model, guide))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


# ------------------------------------------------------------ all objectives


@every_objective
def test_it_trains_with_svi(build):
    guide = AutoFlow(plain, small)
    svi = SVI(plain, guide, pyro.optim.Adam({"lr": 0.01}), build())
    losses = [svi.step() for _ in range(5)]
    assert all(map(math.isfinite, losses))
    assert math.isfinite(svi.evaluate_loss())


@pytest.mark.slow
@every_objective
def test_it_trains_with_fit_svi(build):
    guide = AutoNormal(plain)
    fit = fit_svi(plain, guide, steps=30, objective=build(), progress=False)
    assert fit.losses.isfinite().all()


@every_objective
def test_it_is_a_module_with_local_parameters(build):
    with pyro.settings.context(module_local_params=True):
        guide = AutoFlow(plain, small).setup()
        loss = build()(plain, guide)
        loss().backward()
        learned = guide.flow.transforms[:-1]  # the last transform is set, not trained
        assert all(p.grad is not None for transform in learned for p in transform.parameters())
        SVI(plain, guide, pyro.optim.Adam({"lr": 0.01}), build()).step()


@every_objective
def test_it_trains_with_subsamples_or_refuses_them(build):
    objective, guide = build(), AutoFlow(subsampled, small)
    if isinstance(objective, ForwardKL):
        with pytest.raises(ValueError, match="site 'y' lies in plate 'row', which is subsampled"):
            objective.loss(subsampled, guide)
    else:
        assert math.isfinite(objective.loss_and_grads(subsampled, guide))


@every_objective
@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_a_latent_that_follows_from_others_changes_nothing(build):
    def model(place):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(place(2 * x), 1.0), obs=torch.tensor(1.0))

    written_out = functools.partial(model, lambda x: x)
    guide = AutoNormal(written_out)
    named = functools.partial(model, lambda x: pyro.sample("twice", dist.Delta(x)))
    guide()
    found = []
    for program in (written_out, named):
        pyro.set_rng_seed(0)
        guide.zero_grad()
        loss = build().loss_and_grads(program, guide)
        found.append([torch.tensor(loss), *(parameter.grad for parameter in guide.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("build", [OBJECTIVES[n] for n in ("importance", "importance_looped", "forward", "tempered")])
@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_a_discrete_latent_is_refused_by_name(build):
    guide = AutoFlow(poutine.block(coin, hide=["heads"]), small)
    with pytest.raises(ValueError, match="'heads' of the model is not in the guide"):
        build().loss(coin, guide)


@pytest.mark.parametrize("build", [OBJECTIVES[name] for name in ("importance", "tempered")])
def test_draws_without_a_gradient_are_refused_by_name(build):
    def guide():
        pyro.sample("heads", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match="'heads' of the guide has no reparameterised draws"):
        build().loss_and_grads(coin, guide)


@every_objective
def test_memory_stays_where_it_is(build):
    """Memory stays constant: the nesting of plates is known in time, and steps leave nothing behind."""
    objective, guide = build(), AutoFlow(plain, small)
    for _ in range(3):
        objective.loss_and_grads(plain, guide)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(60 if objective.vectorize_particles else 10):
        objective.loss_and_grads(plain, guide)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB
    assert objective.max_plate_nesting == (3 if objective.vectorize_particles else math.inf)


# ------------------------------------------------------------ path gradients


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("model", [plain, learned])
def test_path_elbo_has_the_value_of_pyros(model, vectorize):
    guide = AutoFlow(model, small)
    randomly(guide)
    losses_agree([kind(4, vectorize_particles=vectorize) for kind in (PathELBO, Trace_ELBO)], model, guide)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda m: AutoFlow(m, small), AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("model", [plain, learned, subsampled])
def test_path_gradients_have_the_mean_of_pyros(model, make):
    guide = make(model)
    parameters = randomly(guide, 0.2)
    if model is learned:
        parameters.append(pyro.param("offset").unconstrained())
    losses = [kind(64, vectorize_particles=True) for kind in (PathELBO, Trace_ELBO)]
    gradients_agree(losses, model, guide, parameters, 60)


@pytest.mark.slow
def test_path_gradients_are_those_of_a_loop():
    guide = AutoFlow(plain, small)
    parameters = randomly(guide, 0.2)
    gradients_agree([PathELBO(4, vectorize_particles=True), PathELBO(4)], plain, guide, parameters, 40)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "build", [*map(OBJECTIVES.get, ("path", "importance", "importance_looped", "renyi")), lambda: RenyiELBO(2.0, 4)]
)
@pytest.mark.parametrize("make", [lambda m: AutoFlow(m, small), AutoMultivariateNormal], ids=["flow", "normal"])
def test_no_noise_is_left_where_the_guide_is_the_posterior(build, make):
    """The guide is the posterior of the latent, so every gradient of every draw is zero up to round-off."""
    guide = make(gaussian)
    parameters = randomly(guide)
    posterior = guide.get_posterior()

    def model():
        pyro.sample("x", _Frozen(posterior))

    assert gradient(build().differentiable_loss(model, guide), parameters).abs().max() < 1e-10


class _Frozen(dist.TorchDistribution):
    """Distribution with frozen parameters: its score has a gradient to the value alone."""

    def __init__(self, inner: Any, batch_shape: tuple[int, ...] = ()) -> None:
        self.inner = inner
        super().__init__(torch.Size(batch_shape), inner.event_shape, validate_args=False)

    support = dist.constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Frozen:
        return _Frozen(self.inner, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = value.detach().requires_grad_()
            log_prob = self.inner.log_prob(leaf)
            (score,) = torch.autograd.grad(log_prob.sum(), leaf)
        return log_prob.detach() + (score * (value - value.detach())).sum(-1)


@pytest.mark.slow
def test_path_gradients_with_discrete_latents_summed_out():
    """The model is a mixture with enumerated assignments."""

    @config_enumerate
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        with pyro.plate("row", 3):
            which = pyro.sample("which", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("y", dist.Normal(loc[which], 1.0), obs=Y)

    guide = AutoFlow(poutine.block(model, hide=["which"]), small)
    parameters = randomly(guide, 0.2)
    losses = [kind(2, max_plate_nesting=1) for kind in (PathEnumELBO, TraceEnum_ELBO)]
    losses_agree(losses, model, guide)
    gradients_agree(losses, model, guide, parameters, 40)


# ------------------------------------------------------------ Rényi's bound


def log_weights(model: Any, guide: Any, count: int) -> Tensor:
    """Return log p - log q of vectorised draws, with all gradients: ``(count,)``."""
    with pyro.plate("draws", count):
        guide_trace = poutine.trace(guide).get_trace()
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    sums = []
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
        sums.append(sum(s["log_prob"] for s in trace.nodes.values() if s["type"] == "sample" and s["name"] != "draws"))
    return sums[0] - sums[1]


def textbook(model: Any, guide: Any, alpha: float, count: int) -> Tensor:
    """Return Rényi's bound by its formula, for autograd."""
    powers = (1 - alpha) * log_weights(model, guide, count)
    return -(torch.logsumexp(powers, 0) - math.log(count)) / (1 - alpha)


def chain() -> None:
    """Sample a guide whose second draw depends on the first."""
    loc, scale, slope = (
        pyro.param(name, torch.tensor(value)) for name, value in (("loc", 0.2), ("scale", 0.6), ("slope", 0.4))
    )
    first = pyro.sample("first", dist.Normal(loc, scale.exp()), infer={"is_auxiliary": True})
    second = pyro.sample("second", dist.Normal(slope * first, 0.8), infer={"is_auxiliary": True})
    pyro.sample("x", dist.Delta(torch.stack((first, second), -1), event_dim=1))


def flow_guide() -> Any:
    guide = AutoFlow(learned, small, init_scale=0.7)
    randomly(guide, 0.2)
    return guide


def parameters_of(guide: Any) -> list[Tensor]:
    """Return the parameter of the model and those of the guide."""
    learned()
    if isinstance(guide, nn.Module):
        return [pyro.param("offset").unconstrained(), *guide.parameters()]
    guide()
    return [pyro.param(name).unconstrained() for name in ("offset", "loc", "scale", "slope")]


every_guide = pytest.mark.parametrize("make", [lambda: chain, flow_guide], ids=["chain", "flow"])
outside = pytest.mark.filterwarnings("ignore:trying to observe a value outside of inference")


@outside
@every_guide
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_the_bound_is_the_textbooks(make, alpha):
    guide = make()
    parameters_of(guide)
    values = []
    for bound in (
        lambda: RenyiELBO(alpha, 5, max_plate_nesting=0).loss(learned, guide),
        lambda: textbook(learned, guide, alpha, 5).item(),
    ):
        pyro.set_rng_seed(1)
        values.append(bound())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.slow
@outside
@every_guide
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_its_gradient_has_the_mean_of_the_textbooks(make, alpha):
    """The gradients of guide and model have the right mean, although neither is that of the formula."""
    guide = make()
    parameters = parameters_of(guide)
    objective = RenyiELBO(alpha, 5)
    ours = moments(lambda: gradient(objective.differentiable_loss(learned, guide), parameters), 150)
    agree(ours, moments(lambda: gradient(textbook(learned, guide, alpha, 5), parameters), 150))


@pytest.mark.slow
@outside
def test_side_by_side_and_one_by_one_have_the_same_gradient():
    parameters = parameters_of(chain)
    losses = [ImportanceWeightedELBO(3, vectorize_particles=vectorize) for vectorize in (True, False)]
    gradients_agree(losses, learned, chain, parameters, 100)


@pytest.mark.slow
@outside
def test_a_point_takes_the_weights_of_a_parameter():
    """The location of a ``Delta`` is not a draw, so that its gradient is the plain one."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, s), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.3)), 0.9))
        pyro.sample("s", dist.Delta(pyro.param("s0", torch.tensor(0.8))))

    guide()
    parameters = [pyro.param("m").unconstrained(), pyro.param("s0").unconstrained()]
    objective = ImportanceWeightedELBO(3)
    ours = moments(lambda: gradient(objective.differentiable_loss(model, guide), parameters), 150)
    agree(ours, moments(lambda: gradient(textbook(model, guide, 0.0, 3), parameters), 150))


def test_one_draw_is_the_elbo():
    guide = AutoFlow(plain, small)
    randomly(guide)
    losses_agree([ImportanceWeightedELBO(1, max_plate_nesting=2), PathELBO()], plain, guide)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_the_bound_of_a_gaussian_is_known(alpha):
    """For q = N(0, 1) and p = N(1, 1) the bound is -α/2."""
    model, guide = (sampling(x=dist.Normal(loc, 1.0)) for loc in (1.0, 0.0))
    assert RenyiELBO(alpha, 200_000).loss(model, guide) == pytest.approx(alpha / 2, abs=0.03)


# ------------------------------------------------------------ the inclusive divergence


def test_the_inclusive_divergence_covers_the_marginals():
    """The exclusive divergence would give a standard deviation of 0.6."""
    guide = AutoNormal(gaussian, init_scale=0.5)
    fit_svi(gaussian, guide, steps=400, lr=0.1, objective=ForwardKL(128, 2000), progress=False)
    assert guide.locs.x.tolist() == pytest.approx([2.0, -1.0], abs=0.15)
    assert guide.scales.x.tolist() == pytest.approx([1.0, 1.0], abs=0.12)


def test_its_loss_is_the_log_evidence_at_the_posterior():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    guide = sampling(x=dist.Normal(0.5, math.sqrt(0.5)))
    evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(1.0)).item()
    assert ForwardKL(64).loss(model, guide) == pytest.approx(evidence, abs=1e-4)


def test_old_draws_are_kept_up_to_a_number():
    objective, guide = ForwardKL(8, 20), AutoNormal(plain)
    for step in range(1, 5):
        objective.loss_and_grads(plain, guide)
        assert len(objective.state_dict()[TOTAL]) == min(8 * step, 20)
    kept = objective.state_dict()
    assert math.isfinite(objective.loss(plain, guide))  # without gradients nothing changes
    assert objective.state_dict()[TOTAL] is kept[TOTAL]


def test_draws_are_kept_for_one_guide_one_model_and_one_data_set():
    class Program:
        def shifted(self, place, scale=1.0):
            pyro.sample("x", dist.Normal(place, scale))

    first, normal = Program(), AutoNormal(Program().shifted)

    def kept(*args, program=first, guide=normal, **kwargs):
        objective.loss_and_grads(program.shifted, guide, *args, **kwargs)
        return len(objective.state_dict()[TOTAL])

    objective, places = ForwardKL(8, 64), torch.tensor([1.0, -1.0])
    assert [kept(places[0]) for _ in range(3)] == [8, 16, 24]  # views of the same number, with a new method each time
    assert [kept(places[1]) for _ in range(2)] == [8, 16]
    assert [kept(places[1], scale=2.0) for _ in range(2)] == [8, 16]
    assert kept(places[1], program=Program(), scale=2.0) == 8
    assert kept(places[1], guide=AutoFlow(Program().shifted, small)) == 8
    places.neg_()
    assert kept(places[1]) == 8
    other = ForwardKL(8, 64)
    other.load_state_dict(objective.state_dict())
    objective = other
    assert kept(places[1]) == 16


def test_a_guide_that_moves_under_its_draws_is_refused():
    guide = AutoGuideList(plain)
    guide.append(AutoFlow(poutine.block(plain, hide=["sigma"]), small))
    guide.append(AutoDelta(poutine.block(plain, hide=["mu"])))
    with pytest.raises(ValueError, match="site 'sigma' of the guide depends on its parameters"):
        ForwardKL(8, 64).loss_and_grads(plain, guide)


# ------------------------------------------------------------ annealing


def test_beta_rises_to_one():
    objective, guide, betas = TemperedELBO(20, start=0.1, num_particles=4), AutoNormal(plain), []
    for _ in range(20):
        betas.append(objective.beta)
        assert objective.settled <= (objective.beta == 1)
        objective.loss_and_grads(plain, guide)
    assert betas == sorted(betas)
    assert (betas[0], betas[-1], objective.settled) == (pytest.approx(0.1), 1.0, True)
    objective.loss(plain, guide)
    assert objective.step == 20


def test_it_ends_as_the_path_elbo():
    guide = AutoFlow(plain, small)
    parameters = randomly(guide)
    tempered = TemperedELBO(10, num_particles=4, max_plate_nesting=2)
    tempered.load_state_dict({"step": 10})
    grads = []
    for objective in (tempered, PathELBO(4, vectorize_particles=True, max_plate_nesting=2)):
        pyro.set_rng_seed(0)
        grads.append(gradient(objective.differentiable_loss(plain, guide), parameters))
    torch.testing.assert_close(grads[0], grads[1])


def modes(share: float) -> None:
    """Sample from two modes, six standard deviations apart; at eight, the fit takes too long for a test."""
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    parts = dist.Normal(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 1.0).to_event(1).log_prob(x.unsqueeze(-2))
    pyro.factor("modes", torch.logsumexp(parts + torch.tensor([share, 1 - share]).log(), -1))


@pytest.mark.slow
def test_it_finds_two_modes_and_their_shares():
    guide = AutoFlow(modes, lambda dim: flows.realnvp(dim, num_transforms=6, hidden_dims=(32,), activation=nn.ELU))
    fit_svi(modes, guide, 0.3, steps=500, objective=TemperedELBO(500, num_particles=128), progress=False)
    assert (guide.sample(10_000)["x"][:, 0] < 0).float().mean().item() == pytest.approx(0.3, abs=0.15)


# ------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("build", [OBJECTIVES["forward"], OBJECTIVES["tempered"]], ids=["forward", "tempered"])
def test_what_is_loaded_goes_on_as_what_was_saved(build, tmp_path):
    guide, first, second = AutoFlow(plain, small), build(), build()
    for _ in range(3):
        first.loss_and_grads(plain, guide)
    torch.save(first.state_dict(), tmp_path / "state")
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    second.max_plate_nesting = first.max_plate_nesting  # otherwise one more run finds it out
    for _ in range(3):
        losses = []
        for objective in (first, second):
            pyro.set_rng_seed(1)
            losses.append(objective.loss_and_grads(plain, guide))
        assert losses[0] == losses[1]


# ------------------------------------------------------------ arguments


test_arguments_out_of_range_are_refused = refusals(
    (lambda: ImportanceWeightedELBO(0), "num_particles must be an integer of at least 1, got 0"),
    (lambda: RenyiELBO(1.0), "alpha must not be 1, got 1: that bound is the ELBO"),
    (lambda: ForwardKL(1), "ForwardKL: num_particles must be an integer of at least 2, got 1"),
    (lambda: ForwardKL(64, 10), "ForwardKL: buffer_size must be at least num_particles, got 10"),
    (lambda: TemperedELBO(0), "TemperedELBO: num_steps must be an integer of at least 1, got 0"),
    (lambda: TemperedELBO(10, start=0.0), "TemperedELBO: start must be above 0 and at most 1, got 0.0"),
)
