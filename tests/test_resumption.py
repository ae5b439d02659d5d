"""Runs that were killed or interrupted go on to the same end: of every fit, source of rows, optimiser and objective."""

import functools
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_guides import simulator
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from pyro_flows import AutoFlow, AutoStructuredFlow, Fit, fit_amortized, fit_density, fit_svi, flows
from pyro_flows.encoders import MLPEncoder
from pyro_flows.guides.guide_flow import LIMITS
from pyro_flows.objectives import ForwardKL, TemperedELBO
from pyro_flows.training import Training, loop

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(8,))
Y = torch.tensor([1.0, 0.6, 1.4])


def conjugate(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


class Rising(Trace_ELBO):
    """ELBO whose likelihood gets more weight in each call: a state that checkpoints must keep."""

    calls = 0

    def differentiable_loss(self, model, guide, *args, **kwargs):
        self.calls += 1
        return super().differentiable_loss(poutine.scale(model, scale=min(1, self.calls / 50)), guide, *args, **kwargs)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def svi(number: int = 4, dim: int = 0, objective: Callable[[], Any] = lambda: None, **settings: Any) -> Fit:
    """Fit one latent to three rows, or many latents whose sum is known."""

    def chain() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(5.0))

    model, args, recipe = (chain, (), None) if dim else (conjugate, (Y,), small)
    number = None if (given := objective()) else number
    settings = {"steps": 30, "num_particles": number, "objective": given, "warm_start": False, **settings}
    return fit_svi(model, AutoFlow(model, recipe, name="resumed"), *args, **settings)


def minibatches(**settings: Any) -> Fit:
    """Fit groups of rows from a loader."""
    y = torch.linspace(-2, 2, 30)[:, None] + torch.randn(30, 3, generator=torch.Generator().manual_seed(0))

    def model(i, y):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", 30, subsample=i):
            level = pyro.sample("level", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(level[..., None], 1.0).to_event(1), obs=y)

    loader = DataLoader(TensorDataset(torch.arange(30), y), batch_size=8, shuffle=True)
    return fit_svi(model, AutoStructuredFlow(model), loader, **{"steps": 30, "num_particles": 1, **settings})


TABLE = (50 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))).round()
CONTEXT = torch.randn(100, 1, generator=torch.Generator().manual_seed(1))


def noisy(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collate function that augments rows with random numbers."""
    x, context = (torch.stack(part) for part in zip(*rows, strict=True))
    return x, context + 0.1 * torch.randn(context.shape)


def density(data: Callable[[], tuple], validation: Any = 0.1, **settings: Any) -> Fit:
    flow, usual = flows.nsf(2, 1, num_transforms=2, hidden_dims=(8,)), {"max_epochs": 5, "discrete": [0, 1]}
    return fit_density(flow, *data(), training=Training(validation=validation), **usual, **settings)


def loader(**options: Any) -> tuple:
    return (DataLoader(TensorDataset(TABLE, CONTEXT), batch_size=30, collate_fn=noisy, **options),)


def amortised(**settings: Any) -> Fit:
    model = simulator(lambda theta: dist.Normal(theta, 0.5).to_event(1))
    guide = AutoFlow(model, small, encoder=MLPEncoder(2, 4, (8,)))
    return fit_amortized(model, guide, simulations=200, max_epochs=8, batch_size=64, **settings)


judged = functools.partial(density, validation=(TABLE[:20], CONTEXT[:20]))
RUNS: dict[str, Callable[..., Fit]] = {
    "default": svi,
    "an objective with a state": functools.partial(svi, objective=lambda: Rising(num_particles=4)),
    "forward": functools.partial(svi, objective=lambda: ForwardKL(4, 50)),
    "tempered": functools.partial(svi, objective=lambda: TemperedELBO(30, num_particles=4)),
    "Muon and Adam": functools.partial(svi, 2, LIMITS.few + 1, steps=20),
    "SOAP": functools.partial(svi, 64, 5),
    "minibatches": minibatches,
    "table": functools.partial(density, lambda: (TABLE, CONTEXT), batch_size=30),
    "loader": functools.partial(density, loader),
    "loader with random numbers of its own": functools.partial(
        judged, lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(5))
    ),
    "loader with a sampler": functools.partial(
        judged, lambda: loader(sampler=WeightedRandomSampler(torch.rand(100), 85))
    ),
    "batches": functools.partial(judged, lambda: (list(zip(TABLE.split(40), CONTEXT.split(40), strict=True)),)),
    "amortised": amortised,
}
SLOW = "an objective with a state", "forward", "tempered", "Muon and Adam", "SOAP"
every_run = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS]
)


def run(name: str, file: Path | None, **settings: Any) -> tuple[Fit, list[Tensor]]:
    """Fit from a fixed seed, and return the record, and the losses with the final parameters."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    fit = RUNS[name](checkpoint=file, progress=False, **settings)
    return fit, [fit.losses, *(parameter.detach().clone() for parameter in fit.guide.parameters())]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def happens(patch: pytest.MonkeyPatch, number: int, what: Callable[[], object]) -> None:
    """Let something happen once, within a step of training."""
    steps, inner = itertools.count(1), loop.Descent._backward

    def backward(self: loop.Descent) -> Any:
        if next(steps) == number:
            what()
        return inner(self)

    patch.setattr(loop.Descent, "_backward", backward)


@every_run
@pytest.mark.usefixtures("hasty")
def test_a_killed_run_goes_on_to_the_same_end(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    _, whole = run(name, tmp_path / "whole")
    with monkeypatch.context() as patch:
        happens(patch, 9, sys.exit)
        with pytest.raises(SystemExit):
            run(name, tmp_path / "run")
    assert 0 < len(torch.load(tmp_path / "run", weights_only=True)["losses"]) <= 9
    for _ in range(2):  # a complete run is not repeated
        assert same(run(name, tmp_path / "run")[1], whole)
    with pytest.raises(ValueError, match=r"fit_\w+: checkpoint=.*of another run"):
        run(name, tmp_path / "run", lr=0.5)


@every_run
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_the_step_and_the_run_goes_on(
    name: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    _, whole = run(name, None)
    with monkeypatch.context() as patch:
        happens(patch, 8, lambda: signal.raise_signal(signal.SIGINT))
        fit, _ = run(name, tmp_path / "run")
    assert (fit.stopped, fit.steps) == ("interrupted", 8)
    assert "Interrupted after 8 steps" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert same(run(name, tmp_path / "run")[1], whole)


def test_a_run_that_has_stopped_early_is_not_taken_up_again(tmp_path: Path) -> None:
    """A large network overfits few rows soon."""
    x, ends = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), []
    for _ in range(2):
        pyro.set_rng_seed(0)
        flow = flows.nsf(3, num_transforms=2, hidden_dims=(64,))
        training = Training(validation=0.3, patience=2)
        settings = {"max_epochs": 200, "batch_size": 20, "lr": 0.02, "progress": False}
        fit = fit_density(flow, x, training=training, checkpoint=tmp_path / "run", **settings)
        assert fit.stopped == "held-out"
        ends.append([fit.losses, *(parameter.detach().clone() for parameter in flow.parameters())])
    assert same(*ends)


KILLED = """
import itertools, os, signal, sys
sys.path.insert(0, {tests!r})
import pytest
import test_resumption as t
clock = itertools.count(step=60)
t.loop.time.perf_counter = lambda: next(clock)
t.torch.set_num_threads(1)
t.happens(pytest.MonkeyPatch(), 20, lambda: os.kill(os.getpid(), signal.SIGKILL))
t.run("default", {file!r})
"""


@pytest.mark.slow
def test_a_run_killed_by_the_system_goes_on_in_another_process(tmp_path: Path) -> None:
    file, root = tmp_path / "run", Path(__file__).resolve().parent
    code = KILLED.format(tests=str(root), file=str(file))
    environment = {**os.environ, "PYTHONPATH": str(root.parent), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert 0 < len(torch.load(file, weights_only=True)["losses"]) < 20
    assert same(run("default", file)[1], run("default", None)[1])
