"""Path gradients with discrete latents summed out, on the models of Pyro's tutorials, for guides of every kind."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from pyro_flows import AutoFlow, AutoPlateFlow, flows
from pyro_flows.objectives import PathEnumELBO

DATA = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
WORDS = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])


@config_enumerate
def mixture() -> None:
    """Sample the Gaussian mixture of Pyro's tutorial: weights and scale lie outside of the plate of the components."""
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(DATA)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(Vindex(locs[..., None, :])[..., assignment], scale), obs=DATA)


def hidden_markov() -> None:
    """Sample the hidden Markov model of Pyro's tutorial: the states lie in a plate, and a rate lies outside."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    with pyro.plate("states", 2):
        rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2)))
        emit = pyro.sample("emit", dist.Beta(1 + rate, 1.0))
    x = torch.tensor(0)
    for t in pyro.markov(range(len(WORDS))):
        state = dist.Categorical(Vindex(rows[..., None, :, :])[..., x, :])
        x = pyro.sample(f"x_{t}", state, infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(emit[..., None, :])[..., x]), obs=WORDS[t])


MODELS = {"mixture": (mixture, "components"), "hidden Markov": (hidden_markov, "states")}
GUIDES: dict[str, Callable[[Any, str], Any]] = {
    "AutoFlow": lambda model, _: AutoFlow(model, small),
    "AutoPlateFlow": lambda model, plate: AutoPlateFlow(model, plate, local_flow=small, global_flow=small),
    "AutoNormal": lambda model, _: AutoNormal(model),
    "AutoMultivariateNormal": lambda model, _: AutoMultivariateNormal(model),
}


def small(dim: int, context_dim: int = 0) -> flows.Flow:
    return flows.realnvp(dim, context_dim, num_transforms=2, hidden_dims=(8,), activation=nn.ELU)


def continuous(model: Any) -> Any:
    return poutine.block(model, hide_fn=lambda msg: msg["name"].startswith(("assignment", "x_")))


def moments(loss: Any, model: Any, guide: Any, parameters: list[Tensor], number: int) -> tuple[Tensor, Tensor]:
    """Return the mean gradient over a number of steps, and its standard error."""
    rows = []
    for _ in range(number):
        found = torch.autograd.grad(loss.differentiable_loss(model, guide), parameters, allow_unused=True)
        filled = [0 * parameter if g is None else g for g, parameter in zip(found, parameters, strict=True)]
        rows.append(nn.utils.parameters_to_vector(filled))
    stacked = torch.stack(rows).double()
    return stacked.mean(0), stacked.std(0) / number**0.5


@pytest.mark.slow
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("name", MODELS)
def test_every_guide_has_the_gradient_of_pyros_own(name: str, kind: str, vectorize: bool) -> None:
    """The loss is the same for the same draws, and the gradient has the same mean."""
    model, plate = MODELS[name]
    pyro.set_rng_seed(0)
    guide = GUIDES[kind](continuous(model), plate)
    guide()
    for parameter in guide.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    parameters = list(guide.parameters())
    number = 4 if not vectorize else 60
    settings = {"num_particles": number, "max_plate_nesting": 1, "vectorize_particles": vectorize}
    path, plain = PathEnumELBO(**settings), TraceEnum_ELBO(**settings)
    losses = []
    for loss in (path, plain):
        pyro.set_rng_seed(1)
        losses.append(loss.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    if vectorize:
        (one, one_error), (other, other_error) = (moments(loss, model, guide, parameters, 30) for loss in (path, plain))
        assert (other.abs() > 5 * other_error).any()  # the gradient is not zero
        assert ((one - other).abs() <= 5 * (one_error**2 + other_error**2).sqrt() + 1e-4).all()
    else:
        path.loss_and_grads(model, guide)
        assert any(p.grad is not None and p.grad.any() for p in parameters)


def conjugate() -> None:
    """Sample from a model with a known posterior: k does not affect x, whose posterior is Normal(1, 1/√2)."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))
    pyro.sample("w", dist.Normal(k, 1.0), obs=torch.tensor(0.4))


def test_gradients_vanish_at_the_posterior_draw_by_draw() -> None:
    guide = AutoNormal(poutine.block(conjugate, hide=["k"]))
    guide()
    guide.locs.x, guide.scales.x = torch.tensor(1.0), torch.tensor(0.5**0.5)
    for settings in ({}, {"num_particles": 5, "vectorize_particles": True}):
        guide.zero_grad()
        PathEnumELBO(max_plate_nesting=0, **settings).loss_and_grads(conjugate, guide)
        grads = [parameter.grad.abs().max() for parameter in guide.parameters()]
        assert len(grads) == 2
        assert max(grads) < 1e-5
        guide.zero_grad()
        TraceEnum_ELBO(max_plate_nesting=0, **settings).loss_and_grads(conjugate, guide)
        assert max(parameter.grad.abs().max() for parameter in guide.parameters()) > 1e-3


def test_a_second_run_takes_no_branch_from_the_queue() -> None:
    """A guide that enumerates k sequentially scores and counts each branch once."""

    def model() -> None:
        k = pyro.sample("k", dist.Bernoulli(0.3))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + 4 * k, 1.0), obs=torch.tensor(3.0))

    def guide() -> None:
        k = pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))), infer={"enumerate": "sequential"})
        loc = pyro.param("loc", torch.tensor([1.0, -0.5]))
        pyro.sample("x", dist.Normal(loc[k.long()], 0.7))

    guide()
    for vectorize in (False, True):
        settings = {"num_particles": 3, "max_plate_nesting": 0, "vectorize_particles": vectorize}
        losses = []
        for kind in (PathEnumELBO, TraceEnum_ELBO):
            pyro.set_rng_seed(0)
            losses.append(kind(**settings).loss(model, guide))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
