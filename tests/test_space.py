"""The space in which a guide draws: densities of guide and model there agree with Pyro's own, whatever the guide."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import called, normals, sampling, stirred
from pyro import poutine
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from torch import Tensor

from pyro_flows import AutoFlow
from pyro_flows.diagnostics.guide_space import base_of
from pyro_flows.programs.density import Density
from pyro_flows.programs.log_density import VALUED, in_parts, or_nan
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.sampling.coordinates import White
from pyro_flows.threads import Threads
from pyro_flows.vjp import score_of

Y = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
pytestmark = pytest.mark.usefixtures("double")  # Pyro inverts its IAF in the default dtype


def model(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("row", 3):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(effect, scale), obs=y)
    pyro.deterministic("twice", 2 * mean)
    pyro.factor("tilt", share[..., 0])


def by_hand(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.3, 0.8))
    pyro.sample("scale", dist.LogNormal(0.1 * mean, 0.5))
    pyro.sample("share", dist.Dirichlet(torch.tensor([2.0, 1.0, 3.0])))
    with pyro.plate("row", 3):
        pyro.sample("effect", dist.Normal(0.5 * y, 0.7))


KINDS = {kind.__name__: kind for kind in (AutoFlow, AutoNormal, AutoMultivariateNormal, AutoIAFNormal)}


def space_of(kind: str) -> Density:
    """Return the space of a guide that was moved away from its start."""
    guide = by_hand
    if kind != "by hand":
        guide = stirred(called(KINDS[kind](model), Y), 0.1)
    return Density(Task(model, guide, (Y,), {}))


@pytest.fixture(params=[*KINDS, "by hand"])
def space(request) -> Density:
    return space_of(request.param)


def test_weights_are_those_of_traces(space):
    """They are log p - log q of a draw, site by site by Pyro, with the constrained values fixed."""
    draws, guide = space.draw(5), space.task.guide.call
    assert draws.z.shape == (5, space.dim) == (5, 7)
    values = space.values(draws.z)
    for row in range(5):
        held = {name: value[row] for name, value in values.items() if name != "twice"}
        wanted = poutine.trace(poutine.condition(model, data=held)).get_trace(Y).log_prob_sum()
        if guide is by_hand:
            wanted = wanted - poutine.trace(poutine.condition(by_hand, data=held)).get_trace(Y).log_prob_sum()
        elif isinstance(guide, AutoFlow):
            wanted = wanted - guide.log_prob(held, Y)
        else:
            continue
        torch.testing.assert_close((draws.log_p - draws.log_q)[row], wanted)


def test_a_draw_is_scored_as_a_vector_is(space):
    draws = space.draw(7, batch_size=3)
    assert draws.z.shape == (7, 7)
    tolerance = 1e-4 if isinstance(space.task.guide.call, AutoIAFNormal) else 1e-8
    torch.testing.assert_close(space.log_prob(draws.z), draws.log_p, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(space.log_q(draws.z), draws.log_q, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(space.quantities(draws.z), draws.quantities, rtol=tolerance, atol=tolerance)
    z, log_q = space.scored_vectors(7, batch_size=3)
    torch.testing.assert_close(space.log_q(z), log_q, rtol=tolerance, atol=tolerance)


def test_many_vectors_run_in_parts(double):
    """Whatever the number of parts, and of vectors added to the last."""
    sizes = list[int]()

    def density(z):
        sizes.append(len(z))
        return -z.square().sum(-1)

    z = torch.randn(1000, 2)
    for mode in ("off", "graph"):
        with pyro.settings.context(pyro_flows_compile=mode):
            total = in_parts([density], 20, Threads())
            for _ in range(3):
                torch.testing.assert_close(total(z), -z.square().sum(-1))
    assert max(sizes) <= 1.5 * VALUED * 20


@pytest.mark.parametrize("kind", ["AutoFlow", "AutoNormal", "AutoMultivariateNormal", "by hand"])
def test_the_guides_density_integrates_to_one(kind):
    """Importance sampling from a wide Student's t around the guide gives an integral of one."""
    space = space_of(kind)
    z = space.draw(2000).z
    wide = dist.StudentT(5.0, z.mean(0), 1.5 * z.std(0)).to_event(1)
    places = wide.sample((10_000,))
    weights = (space.log_q(places) - wide.log_prob(places)).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / 100


def test_quantities_have_names(space):
    wanted = ["mean", "scale", "share[0]", "share[1]", "share[2]", "effect[0]", "effect[1]", "effect[2]", "twice"]
    assert space.read.names == wanted
    quantities = dict(zip(space.read.names, space.draw(4).quantities.T, strict=True))
    torch.testing.assert_close(quantities["twice"], 2 * quantities["mean"])
    torch.testing.assert_close(sum(quantities[f"share[{i}]"] for i in range(3)), torch.ones(4, dtype=torch.float64))


def test_prior_draws_are_the_priors(space):
    pyro.set_rng_seed(1)
    prior = space.values(space.prior(space.draw(4000).z))
    assert abs(prior["mean"].mean()) < 4 * 2 / math.sqrt(4000)
    assert abs(prior["mean"].std() / 2 - 1) < 4 / math.sqrt(8000)
    assert abs(prior["scale"].mean() - 2) < 4 * math.sqrt(2 / 4000)
    assert abs((prior["effect"] - prior["mean"].unsqueeze(-1)).std() - 1) < 4 / math.sqrt(24_000)


def test_prior_draws_are_nan_where_the_model_breaks_down():
    def breaks() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if bool((x > 1).any()):
            raise FloatingPointError
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.0))

    drawn = Density(Task(breaks, sampling(x=dist.Normal(0.0, 0.1)), (), {})).prior(torch.zeros(64, 1))
    assert 0 < drawn.isnan().sum() < 64
    assert (drawn[drawn.isfinite()] <= 1).all()


def test_flat_priors_stay():
    def flat() -> None:
        slope = pyro.sample("slope", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(slope, 1.0), obs=torch.tensor(0.0))

    space = Density(Task(flat, AutoFlow(flat).setup(), (), {}))
    z = space.draw(6).z
    torch.testing.assert_close(space.prior(z), z)


def test_the_prior_leaves_out_flat_latents_that_a_guide_draws_itself():
    def flat() -> None:
        slope = pyro.sample("slope", dist.ImproperUniform(dist.constraints.positive, (), ()))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        pyro.sample("y", dist.Normal(slope, scale), obs=torch.tensor(1.0))

    guide = sampling(slope=dist.LogNormal(0.0, 1.0), scale=dist.LogNormal(0.3, 0.5))
    space = Density(Task(flat, guide, (), {}))
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    log_prior, log_p = space.log_prior_and_prob(z)
    torch.testing.assert_close(log_prior, dist.Normal(0.0, 2.0).log_prob(z[:, 1]))
    torch.testing.assert_close(log_p, space.log_prob(z))


def test_angles_are_points_of_the_circle():
    def turning() -> None:
        pyro.sample("angle", dist.VonMises(3.0, 4.0))
        pyro.sample("phase", dist.Uniform(0.0, 24.0), infer={"periodic": True})

    space = Density(Task(turning, AutoFlow(turning).setup(), (), {}))
    assert space.read.names == ["cos angle", "sin angle", "cos phase", "sin phase"]
    squares = space.draw(100).quantities.square()
    torch.testing.assert_close(squares.reshape(100, 2, 2).sum(-1), torch.ones(100, 2))


def test_discrete_sites_are_refused():
    coin = sampling(side=dist.Bernoulli(0.5))
    with pytest.raises(ValueError, match=r"'side'.*discrete"):
        Density(Task(coin, coin, (), {}))


@pytest.mark.parametrize("kind", ["AutoFlow", "AutoMultivariateNormal", "AutoIAFNormal"])
def test_the_base_leads_to_the_guide(kind):
    """The density of the guide is that of the base after the change of variables."""
    space = space_of(kind)
    z = space.draw(6).z
    base = base_of(space, z)
    x = base.inverse(z)
    again, log_det = base.forward(x)
    torch.testing.assert_close(again, z, rtol=1e-4, atol=1e-4)
    moved = space.task.guide.call.get_base_dist().log_prob(x) - log_det
    torch.testing.assert_close(moved.reshape(6), space.log_q(z), rtol=1e-4, atol=1e-4)


def test_guides_without_a_way_back_have_no_base():
    assert base_of(Density(Task(model, by_hand, (Y,), {})), torch.zeros(2, 7)) is None
    two = sampling(x=normals(2))
    guide = called(AutoNormalizingFlow(two, lambda dim: dist.transforms.planar(dim)))
    space = Density(Task(two, guide, (), {}))
    assert base_of(space, space.draw(3).z) is None


def test_white_coordinates_are_white():
    factor = torch.tensor([[2.0, 0.0], [1.5, 0.1]])
    z = 5 + torch.randn(10_000, 2) @ factor.T
    white = White(z)
    x = white.inverse(z)
    torch.testing.assert_close(torch.cov(x.T), torch.eye(2), rtol=0, atol=1e-3)
    back, log_det = white.forward(x)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-4)
    jacobian = torch.autograd.functional.jacobian(lambda x: white.forward(x[None])[0][0], x[0])
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian).logabsdet)


def test_few_draws_are_whitened_by_their_sds():
    white = White(torch.randn(8, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(white.scale_tril, white.scale_tril.diag().diag())


def test_a_breakdown_of_one_draw_spares_the_others():
    sizes = []

    def singular(z: Tensor) -> Tensor:
        sizes.append(len(z))
        factor = torch.linalg.cholesky(z.diag_embed())  # it exists only for positive rows
        return torch.cholesky_inverse(factor).sum((-1, -2))

    def unsolved(z: Tensor) -> Tensor:
        if (z < 0).any():
            raise FloatingPointError("no solution")
        return z.sum(-1)

    z = torch.ones(9, 2)
    z[4] = -1
    fourth = [place == 4 for place in range(9)]
    for fragile in (singular, unsolved):
        assert or_nan(fragile)(z).isnan().tolist() == fourth
    assert sizes == [9, 9]  # the second run gives factors of NaN
    assert or_nan(lambda z: torch.stack((unsolved(z), z[:, 0]), -1), 2)(z).isnan().any(-1).tolist() == fourth
    scores = score_of(or_nan(singular), z)
    torch.testing.assert_close(scores[z[:, 0] > 0], score_of(singular, z[z[:, 0] > 0]))

    def wrong(z: Tensor) -> Tensor:
        raise ValueError("a mistake of the model's")

    with pytest.raises(ValueError, match="a mistake"):
        or_nan(wrong)(z)


def test_scores_are_gradients():
    z = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(score_of(lambda z: -z.square().sum(-1) / 2, z), -z)
    assert not score_of(lambda z: torch.zeros(4), z).any()


def test_latents_of_a_packed_vector_are_placed_as_by_a_run_of_the_guide(space):
    assert [*space._slots] == ["mean", "scale", "share", "effect"]
    z = torch.randn(7, space.dim, generator=torch.Generator().manual_seed(0))
    (quick, changes), (run, known) = space.place(z), space._place_by_run(z)
    torch.testing.assert_close({name: quick[name] for name in run}, run)
    torch.testing.assert_close(sum(changes.values()), sum(known.values()))


def test_supports_that_depend_on_other_latents_take_a_run():
    def moving() -> None:
        a = pyro.sample("a", dist.LogNormal(0.0, 0.5))
        pyro.sample("b", dist.Uniform(0.0, a))

    assert not Density(Task(moving, AutoFlow(moving).setup(), (), {}))._slots


def test_large_models_are_scored_in_parts_with_the_same_gradients():
    rows = torch.linspace(-1, 1, 100_000)

    def large() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = x[..., :1] + x[..., 1:] * rows
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=rows)

    space = Density(Task(large, AutoFlow(large).setup(), (), {}))
    assert space.task.model.chunk == 2
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(space.log_prob(z), space._log_prob(z))
    weights = torch.arange(1.0, 6.0)
    parts, whole = (score_of(lambda z, of=of: weights * of(z), z) for of in (space.log_prob, space._log_prob))
    torch.testing.assert_close(parts, whole)


def test_expanded_tensors_count_by_their_memory():
    """Each of 1,000 rows reads one of 50 numbers, so that the largest tensor in memory has 1,000 elements."""

    def table() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(50), 1.0).to_event(1))
        mean = x.unsqueeze(-1).expand(*x.shape, 1000).gather(-2, torch.zeros(*x.shape[:-1], 1, 1000).long()).squeeze(-2)
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.zeros(1000))

    assert Density(Task(table, AutoFlow(table).setup(), (), {})).task.model.largest == 1000
