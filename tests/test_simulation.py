"""Simulations are draws of the model: vectorised or one by one, with plates, and with data in any argument.

A model that cannot be simulated is refused with a message that names argument or site."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import plates
from pyro import poutine
from scipy import stats
from torch import Tensor, nn

from pyro_flows import AutoFlow, fit_amortized, simulate
from pyro_flows.encoders import MLPEncoder
from pyro_flows.programs import Program, Simulations
from pyro_flows.programs.simulator import Simulator


def linear(x=None):
    """Sample theta ~ N(0, 1), x_j ~ N(theta, 1/4) for three j."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("x", dist.Normal(theta[..., None], 0.5 * torch.ones(3)).to_event(1), obs=x)


def simulator(model, *args, vectorize="auto", **kwargs) -> Simulator:
    return Simulator("caller", Program(model, vectorize=vectorize), args, kwargs)


def flat(found: Simulations) -> Tensor:
    values = {**found.latents, **{f"data_{name}": value for name, value in found.data.items()}}
    return torch.cat([values[name].reshape(len(found), -1) for name in sorted(values)], 1).double()


@pytest.mark.parametrize("model", [linear, plates], ids=["plain", "plates"])
def test_side_by_side_is_one_by_one(model):
    """Means, variances and covariances agree within the standard errors of both."""
    wide = flat(simulator(model).draw(6000))
    alone = flat(simulator(model, vectorize="loop").draw(400))
    assert wide.shape[1] == alone.shape[1]
    moments = []
    for draws in (wide, alone):
        centred = draws - wide.mean(0)
        products = torch.cat([draws, (centred[:, :, None] * centred[:, None, :]).flatten(1)], 1)
        moments.append((products.mean(0), products.std(0) / math.sqrt(len(draws))))
    (mean, error), (few, coarse) = moments
    off = ((mean - few) / (error**2 + coarse**2).sqrt().clamp_min(1e-12)).abs()
    assert off.max() < 6  # for up to 1500 correlated numbers, from distributions with heavier tails than a normal one


def test_shapes_are_those_of_the_sites():
    for vectorize in ("plate", "vmap", "loop"):
        found = simulator(plates, size=3, vectorize=vectorize).draw(5)
        shapes = {name: tuple(value.shape) for name, value in found.latents.items()}
        assert shapes == {"top": (5,), "middle": (5, 2, 1), "leaf": (5, 2, 3), "pair": (5, 2, 3, 3)}
        assert {name: tuple(value.shape) for name, value in found.data.items()} == {"x": (5, 2, 3)}
        assert len(found) == 5


def test_simulations_are_shown_by_their_shapes():
    assert repr(simulate(linear, num_simulations=5)) == "Simulations(5 draws, latents={'theta': ()}, data={'x': (3,)})"


def test_moments_of_a_linear_model():
    found = simulator(linear).draw(20_000, batch_size=7000)
    theta, x = found.latents["theta"], found.data["x"]
    assert len(theta) == len(x) == 20_000
    assert theta.unique().numel() > 19_900  # batches differ
    # The variance of x is 1.25, that of its mean over j is 1 + 1 / 12, and its covariance with theta is 1.
    assert abs(theta.mean()) < 4 / math.sqrt(20_000)
    assert (x.var(0) - 1.25).abs().max() < 4 * 1.25 * math.sqrt(2 / 20_000)
    assert ((theta[:, None] * x).mean(0) - 1).abs().max() < 4 * math.sqrt((1.25 + 1) / 20_000)
    assert stats.kstest(((x - theta[:, None]) / 0.5).flatten().numpy(), "norm").pvalue > 1e-4


def test_given_latents_are_held():
    theta = torch.linspace(-20, 20, 50)
    for vectorize in ("plate", "vmap", "loop"):
        found = simulator(linear, vectorize=vectorize).draw(50, {"theta": theta}, batch_size=20)
        assert torch.equal(found.latents["theta"], theta)
        assert (found.data["x"] - theta[:, None]).abs().max() < 0.5 * 6
    held = torch.randn(4, 2, 1) * 10
    found = simulator(plates).draw(4, {"middle": held})
    assert torch.equal(found.latents["middle"], held)
    assert (found.latents["leaf"].log() - held).abs().max() < 0.5 * 6


def test_seeds_repeat():
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(4)
        draws.append(flat(simulator(plates).draw(10)))
    assert torch.equal(*draws)


def test_take_and_join():
    found = simulator(linear).draw(10)
    part = found.take(torch.tensor([3, 1])).join(found.take(slice(0, 2)))
    assert len(part) == 4
    assert torch.equal(part.data["x"], found.data["x"][[3, 1, 0, 1]])
    assert torch.equal(part.latents["theta"], found.latents["theta"][[3, 1, 0, 1]])
    assert found.row(0)["x"].shape == (3,)


def test_simulate():
    pyro.set_rng_seed(1)
    found = simulate(plates, num_simulations=7, batch_size=3, size=3)
    pyro.set_rng_seed(1)
    assert torch.equal(flat(found), flat(simulator(plates, size=3).draw(7, batch_size=3)))
    assert len(simulate(Program(plates, vectorize="loop"), num_simulations=4)) == 4
    for name in ("num_simulations", "batch_size"):
        with pytest.raises(ValueError, match=f"simulate: {name} must be an integer of at least 1"):
            simulate(plates, **{name: 0})


# The argument that holds the data.


def sites(model, *args, **kwargs) -> dict[str, str]:
    return simulator(model, *args, **kwargs).sites


def test_arguments_are_matched_to_sites():
    def renamed(observations=None):
        linear(observations)

    def several(scale, seen=None, n=None, *, other=None):
        theta = pyro.sample("theta", dist.Normal(0.0, scale))
        pyro.sample("other", dist.Normal(theta, 1.0), obs=other)
        pyro.sample("y", dist.Normal(theta, 1.0), obs=seen)

    def swapped(a=None, b=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(theta, 1.0), obs=a)
        pyro.sample("a", dist.Normal(theta, 1.0), obs=b)

    def integers(counts=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("k", dist.Poisson(rate), obs=counts)

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)

        def forward(self, x=None):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.net(theta[..., None]), 1.0).to_event(1), obs=x)

    assert sites(linear) == sites(linear, None) == sites(linear, x=None) == {"x": "x"}
    assert sites(renamed) == {"observations": "x"}
    assert sites(several, 2.0) == sites(several, 2.0, None) == {"seen": "y", "other": "other"}
    assert sites(swapped) == {"a": "b", "b": "a"}
    assert sites(integers) == {"counts": "k"}
    assert sites(Module()) == {"x": "x"}
    assert sites(poutine.block(linear, hide=["theta"])) == {"x": "x"}


def test_arguments_come_back_in_their_places():
    def model(n, x=None, *, scale=1.0):
        theta = pyro.sample("theta", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(theta[..., None], torch.ones(n)).to_event(1), obs=x)

    simulated = simulator(model, 2, scale=3.0)
    x = torch.zeros(2)
    assert simulated.arguments({"x": x}) == ((2, x), {"scale": 3.0})
    found = simulated.draw(4000)
    assert found.data["x"].shape == (4000, 2)
    assert found.latents["theta"].std().item() == pytest.approx(3, abs=4 * 3 / math.sqrt(8000))


def test_given_data_are_no_data_argument():
    """An argument that the call fixes is not simulated."""

    def model(x=None, covariate=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        covariate = pyro.sample("covariate", dist.Normal(0.0, 1.0), obs=covariate)
        pyro.sample("x", dist.Normal(theta + covariate, 0.1), obs=x)

    with pytest.raises(ValueError, match="site 'covariate' is observed though no argument"):
        sites(model, covariate=torch.tensor(100.0))
    assert sites(model) == {"x": "x", "covariate": "covariate"}


# Models that cannot be simulated.


def refused(model, words, *args, **kwargs):
    with pytest.raises(ValueError, match=words) as error:
        simulator(model, *args, **kwargs)
    assert "caller" in str(error.value)


def refused_under_a_plate(model, words):
    with pytest.raises(ValueError, match=rf"^the model{words}.*vectorize"):
        simulator(model, vectorize="plate").draw(5)


def many(model, number=400) -> Simulations:
    """Return simulations; a model that does not broadcast runs under vmap."""
    made = simulator(model)
    found = made.draw(number)
    assert made.model.engine == "vmap"
    return found


def is_standard_normal(noise: Tensor):
    assert stats.kstest(noise.flatten().double().numpy(), "norm").pvalue > 1e-3


def test_what_cannot_be_simulated_is_refused():
    def required(x):
        linear(x)

    def factor(x=None):
        linear(x)
        pyro.factor("penalty", torch.tensor(0.0))

    def coded(x=None):
        linear(x)
        pyro.sample("z", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    def nothing(x=None):
        pyro.sample("theta", dist.Normal(0.0, 1.0))

    def changed(x=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0), obs=None if x is None else x + 1)

    def subsampled(x=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6, subsample_size=2):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    refused(required, r"missing a required argument: 'x'.*must be optional")
    refused(factor, "'penalty' is a factor statement")
    refused(coded, "site 'z' is observed though no argument was left open for it")
    refused(nothing, r"takes no data.*its arguments are x, and \['x'\] reach no observed site")
    refused(changed, "site .x. must observe argument .x. unchanged")
    refused(lambda: linear(), "its arguments are none")
    refused(subsampled, r"plate 'rows', which is subsampled \(2 of 6 rows\)")


def outside(x=None):
    """Return noise from torch, which is drawn once for all vectorised draws."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Delta(theta[..., None] + torch.randn(3), event_dim=1), obs=x)


def inside(x=None):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Delta(theta[..., None] + noise, event_dim=1), obs=x)


def test_noise_from_outside_of_sample_statements_is_another_for_each_draw():
    refused_under_a_plate(outside, " draws noise for site 'x' outside of sample statements, the same for all draws")
    for found in (many(outside), simulator(outside, vectorize="loop").draw(300), simulator(inside).draw(300)):
        is_standard_normal(found.data["x"] - found.latents["theta"][:, None])


def test_noise_of_the_shape_of_the_draws_is_accepted():
    def own(x=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Delta(theta + torch.randn(theta.shape)), obs=x)

    found = simulator(own).draw(400)
    assert (found.data["x"] - found.latents["theta"]).std() > 0.7


def test_a_model_that_does_not_broadcast_is_simulated_as_one_by_one():
    weights = torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 1.0]])

    def model(x=None):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(weights @ theta, 1.0).to_event(1), obs=x)

    refused_under_a_plate(model, " does not run vectorised over draws: .*weights @ theta")
    for found in (many(model), simulator(model, vectorize="loop").draw(300)):
        is_standard_normal(found.data["x"] - found.latents["theta"] @ weights.T)

    guide = AutoFlow(model, encoder=MLPEncoder(3, 2, (4,)))
    brief = {"simulations": 40, "max_epochs": 1, "progress": False}
    with pytest.raises(ValueError, match=r"does not run vectorised over draws.*vectorize"):
        fit_amortized(Program(model, vectorize="plate"), guide, **brief)
    for engine in ("auto", "vmap", "loop"):
        assert fit_amortized(Program(model, vectorize=engine), guide, **brief).losses.isfinite().all()


def test_as_many_numbers_as_draws_do_not_pass_for_them():
    """With two vectorised draws, one factor per draw would match a vector of two by accident."""

    def model(x=None):
        factor = pyro.sample("factor", dist.LogNormal(0.0, 1.0))
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Delta(factor * theta, event_dim=1), obs=x)

    refused_under_a_plate(model, " makes site 'x' another function of the latents when it runs vectorised")
    found = many(model)
    torch.testing.assert_close(found.data["x"], found.latents["factor"][:, None] * found.latents["theta"])


def test_a_model_that_sums_over_all_it_sees_sees_one_draw():
    def model(x=None):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(theta.sum(), 1.0), obs=x)

    refused_under_a_plate(model, "'s log-density at site .* for one draw, but .* vectorised over draws")
    found = many(model)
    is_standard_normal(found.data["x"] - found.latents["theta"].sum(1))


def test_a_mean_over_all_it_sees_in_a_delta_is_one_over_one_draw():
    def model(x=None):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Delta(theta - theta.mean(), event_dim=1), obs=x)

    refused_under_a_plate(model, " makes site 'x' another function of the latents when it runs vectorised")
    theta = (found := many(model)).latents["theta"]
    torch.testing.assert_close(found.data["x"], theta - theta.mean(1, keepdim=True))
