"""Steps of fits on rows from graphs: the same losses and states as from the modules themselves."""

import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_flows import AutoFlow, Flow, fit_amortized, fit_density, flows
from pyro_flows.distributions import StandardNormal
from pyro_flows.fitting.recorded_loss import RecordedLoss
from pyro_flows.graphs import Traced
from pyro_flows.objectives import FlowMatching
from pyro_flows.training import Training
from pyro_flows.transforms import ActNorm, LULinear

X = torch.randn(120, 3, generator=torch.Generator().manual_seed(0)).exp()
C = X[:, :1] + X[:, 1:2]


class RunningMean(nn.Module):
    """Layer whose buffer is set anew in training, by an operation that does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("variance", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.variance, training=self.training)


class Jitter(nn.Module):
    """Layer with random numbers of Python."""

    def forward(self, x: Tensor) -> Tensor:
        return x + random.random() if self.training else x


class Growing(nn.Module):
    """Layer with a counter of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x


class OwnLikelihood(nn.Module):
    """Objective of a user, which may change from step to step."""

    def forward(self, flow, x: Tensor, context: Tensor | None) -> Tensor:
        return -flow.log_prob(x, context).mean()


LAYERS = {
    "plain": nn.Identity,
    "dropout": lambda: nn.Dropout(0.3),
    "batch norm": lambda: nn.BatchNorm1d(2),
    "a running mean": RunningMean,
    "random numbers of Python": Jitter,
    "a counter": Growing,
}
AS_THEY_ARE = {"batch norm", "a running mean", "random numbers of Python", "a counter"}


def conditional(layer: nn.Module) -> Flow:
    flow = flows.realnvp(3, context_dim=2, num_transforms=2, hidden_dims=(8,))
    flow.encoder = nn.Sequential(nn.Linear(1, 2), layer)
    return flow


@pytest.fixture
def refusals(monkeypatch) -> list[Traced]:
    """Return the traced losses of fits."""
    found, start = [], RecordedLoss.__init__

    def watched(self, *args):
        start(self, *args)
        found.append(self._traced)

    monkeypatch.setattr(RecordedLoss, "__init__", watched)
    return found


def in_both_modes(fit) -> list[list[Tensor]]:
    """Return the losses and the state of the module for each mode."""
    found = []
    for mode in ("off", "graph"):
        with pyro.settings.context(pyro_flows_compile=mode):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            record = fit()
            found.append([record.losses, record.held_out, *record.guide.state_dict().values()])
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_modules_in_training_mode_have_the_same_fit(refusals, name):
    off, graph = in_both_modes(
        lambda: fit_density(conditional(LAYERS[name]()), X, C, batch_size=40, max_epochs=8, progress=False)
    )
    assert all(map(torch.equal, off, graph))
    assert bool(refusals[1].refusal) == (name in AS_THEY_ARE)


FITS = {
    "ActNorm": lambda: Flow([ActNorm(3), LULinear(3)], StandardNormal((3,))),
    "splines": lambda: flows.nsf(3, num_transforms=1, hidden_dims=(8,)),
    "integers": lambda: flows.maf(3, num_transforms=1, hidden_dims=(8,)),
}


@pytest.mark.parametrize("name", FITS)
def test_steps_of_fit_density_are_those_of_the_flow(refusals, name):
    x, discrete = (X.floor(), [0, 1, 2]) if name == "integers" else (X, None)
    off, graph = in_both_modes(
        lambda: fit_density(FITS[name](), x, batch_size=40, max_epochs=8, discrete=discrete, progress=False)
    )
    assert all(map(torch.equal, off, graph))
    assert not refusals[1].refusal


def test_steps_of_flow_matching_are_those_of_the_flow(refusals):
    training = Training(objective=FlowMatching())
    off, graph = in_both_modes(
        lambda: fit_density(flows.cnf(3, hidden_dims=(8,)), X, max_epochs=8, training=training, progress=False)
    )
    assert all(map(torch.equal, off, graph))
    assert not refusals[1].refusal


def test_steps_of_fit_amortized_are_those_of_the_guide(refusals):
    def model(x=None):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)

    def fit():
        guide = AutoFlow(model, encoder=nn.Linear(2, 2), name="recorded")
        return fit_amortized(model, guide, simulations=100, batch_size=30, max_epochs=8, progress=False)

    off, graph = in_both_modes(fit)
    assert all(map(torch.equal, off, graph))
    assert not refusals[1].refusal


@pytest.mark.parametrize("why", ["an objective of the user", "mixed precision", "images", "compiled"])
def test_what_is_not_recorded(refusals, why):
    if why == "images":
        fit_density(flows.realnvp_image((1, 4, 4), num_steps=1, hidden_dim=4), torch.rand(40, 1, 4, 4), max_epochs=1)
        return
    settings, flow = {"mixed_precision": why == "mixed precision"}, flows.nsf(3, num_transforms=1, hidden_dims=(8,))
    if why == "compiled":
        flow.compile(backend="eager")
    if why == "an objective of the user":
        settings = {"objective": OwnLikelihood()}
    fit_density(flow, X, max_epochs=1, training=Training(**settings), progress=False)
    assert not refusals
