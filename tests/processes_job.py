"""Job of two processes for ``test_processes.py``: ``torchrun --nproc-per-node 2 processes_job.py FOLDER``."""

import contextlib
import functools
import io
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from exact_guides import simulator
from grouped_options import grouped
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_flows as pf
from pyro_flows import fit_amortized, fit_density, fit_svi, flows
from pyro_flows.encoders import MLPEncoder
from pyro_flows.fitting import Observed
from pyro_flows.objectives import ForwardKL, Likelihood
from pyro_flows.training import distributed

RANK = int(os.environ.get("RANK", 0))
LAST = int(os.environ.get("WORLD_SIZE", 1)) - 1
Found = dict[str, Any]


def told(fit: pf.Fit) -> Found:
    """Return the parts of a fit that are compared."""
    state = torch.cat([parameter.detach().flatten().double() for parameter in fit.guide.parameters()])
    found = {"losses": fit.losses, "state": state, "best": fit.best_step, "stopped": fit.stopped}
    held = fit.held_out if fit.held_out is not None else torch.zeros(0)
    return {**found, "held_out": held, "skipped": fit.skipped, "random": torch.get_rng_state()}


def failed(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def rows(seed: int = 0, number: int = 150) -> Tensor:
    x = torch.randn(number, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 5 + x @ torch.tensor([[2.0, 1.0], [0.0, 0.5]]).double()


def small() -> flows.Flow:
    """Return a flow whose initial weights differ between processes; a fit broadcasts those of process 0."""
    flow = flows.maf(2, num_transforms=2, hidden_dims=(8,)).double()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    return flow


class At(Likelihood):
    """Likelihood that calls a function at one step of one process."""

    def __init__(self, step: int, rank: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.at, self.process, self.act, self.step = step, rank, act, 0

    def forward(self, flow: Any, x: Tensor, context: Any = None) -> Tensor:
        loss = super().forward(flow, x, context)
        if torch.is_grad_enabled():
            self.step += 1
            if self.step == self.at and self.process == RANK:
                return self.act(loss)
        return loss

    def extra_repr(self) -> str:
        return ""


def density(**settings: Any) -> Found:
    """Fit batches of 37 rows, divided into 18 and 19 rows."""
    pyro.set_rng_seed(RANK)
    settings = {"x": rows(), "max_epochs": 5, "batch_size": 37, "progress": False, **settings}
    return told(fit_density(small(), **grouped(settings)))


def loader(**settings: Any) -> Found:
    """Fit batches from a loader whose last batch has one row, so that one process has no row."""
    batches = DataLoader(TensorDataset(rows(number=152)), batch_size=34, shuffle=True)
    return density(x=batches, batch_size=None, **settings)


def amortized() -> Found:
    prior = dist.Normal(torch.zeros(2).double(), 1).to_event(1)
    model = simulator(lambda theta: dist.Normal(theta, 0.5).to_event(1), prior)
    pyro.set_rng_seed(RANK)
    theta = rows(RANK)  # the fit ignores those of process 1
    encoder, name = MLPEncoder(2, 4, hidden_dims=(8,)).double(), f"amortised_{time.monotonic_ns()}"
    recipe = functools.partial(flows.maf, num_transforms=1, hidden_dims=(8,))
    guide = pf.AutoFlow(model, lambda *dims: recipe(*dims).double(), encoder=encoder, name=name)
    known = pf.Simulations({"theta": theta}, {"x": theta + 0.1})
    settings = {"max_epochs": 3, "batch_size": 33, "progress": False}
    found = told(fit_amortized(model, guide, simulations=known, **settings))
    drawn = fit_amortized(model, guide, simulations=101, datasets=Observed({"x": theta[0]}), **settings)
    return {**found, "rounds": told(drawn)}


Y = torch.tensor([1.0, 2.0, 4.0]).double()


def normal(y: Tensor = Y) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).double(), 3.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def without_noise(objective: Any) -> Found:
    pyro.clear_param_store()
    pyro.set_rng_seed(RANK)
    fit = fit_svi(normal, AutoDelta(normal), Y, steps=30, objective=objective, progress=False)
    return told(fit)


def noise() -> Found:
    """Return the losses of one guide that hardly moves."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormal(normal)
    fit = fit_svi(normal, guide, Y, steps=400, num_particles=8, lr=1e-12, progress=False)
    return told(fit)


def minibatches() -> Found:
    """Return the fit and the minibatches that each process sees."""
    y, seen = torch.arange(40.0).double(), []

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).double(), 3.0))
        with pyro.plate("rows", 40, subsample_size=5) as index:
            seen.append(index.clone())
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    guide = pf.AutoPlateFlow(model, "rows", name=f"plates_{time.monotonic_ns()}")
    fit = fit_svi(model, guide, y, steps=3, progress=False)
    return {**told(fit), "seen": torch.stack([index.sort().values for index in seen[-3:]])}


def streamed(at: int = 0, **settings: Any) -> Found:
    """Fit levels of rows, which a loader gives, by points: without noise of draws.  Interrupt process 1 at a step."""
    y, steps = torch.arange(45.0).double(), [0]

    def model(i: Tensor, y: Tensor) -> None:
        steps[0] += 1
        if steps[0] == at and RANK == 1:
            os.kill(os.getpid(), signal.SIGINT)
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).double(), 3.0))
        with pyro.plate("rows", 45, subsample=i):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    pyro.clear_param_store()
    pyro.set_rng_seed(RANK)
    guide = AutoDelta(model, create_plates=lambda i, y: pyro.plate("rows", 45, subsample=i))
    guide(torch.arange(45), y)
    batches = DataLoader(TensorDataset(torch.arange(45), y), batch_size=14, shuffle=True)
    return told(fit_svi(model, guide, batches, steps=12, objective=Trace_ELBO(), progress=False, **settings))


def many_rows(checkpoint: Path) -> Found:
    """Fit a guide whose number of draws depends on the rows in a batch."""
    number = 60_000

    def model(i: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", number, subsample=i):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(mu, 1.0)), 1.0), obs=y)

    pyro.set_rng_seed(RANK)
    batches = DataLoader(TensorDataset(torch.arange(number), torch.randn(number)), batch_size=50_000)
    guide = pf.AutoStructuredFlow(model, name=f"rows_{time.monotonic_ns()}")
    return told(fit_svi(model, guide, batches, steps=2, checkpoint=checkpoint, progress=False))


def resumed_stream(folder: Path) -> Found:
    """Interrupt a fit on a stream of rows, and resume it."""
    runs = {"whole": streamed(), "broken": streamed(checkpoint=folder / "streamed", at=11)}
    return {**runs, "resumed": streamed(checkpoint=folder / "streamed")}


def replayed(folder: Path) -> Found:
    """Run and resume a fit in which every process stores its own draws, also in the checkpoint."""

    def run(file: Path | None, at: int) -> Found:
        pyro.set_rng_seed(3)
        pyro.clear_param_store()
        objective, calls = ForwardKL(4, 50), [0]

        def model(y: Tensor) -> None:
            calls[0] += 1
            if calls[0] == at and RANK == 1:
                os.kill(os.getpid(), signal.SIGINT)
            normal(y)

        guide = AutoNormal(normal)
        settings = {"steps": 12, "progress": False, "checkpoint": file}
        return told(fit_svi(model, guide, Y, objective=objective, **settings))

    whole = run(None, 0)
    broken = run(folder / "replayed", 9)
    return {"whole": whole, "broken": broken, "resumed": run(folder / "replayed", 0)}


def interrupt(loss: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGINT)
    return loss


def resumed(folder: Path) -> Found:
    """Interrupt process 1 alone and resume; also resume what one process alone has interrupted."""
    broken = density(checkpoint=folder / "two", objective=At(6, 1, interrupt))
    if RANK == 0:
        (folder / "left_by_two").write_bytes((folder / "two").read_bytes())
    again = density(checkpoint=folder / "two", objective=At(0, 0, interrupt))
    left = density(checkpoint=folder / "left_by_one", objective=At(0, 0, interrupt))
    half = loader(checkpoint=folder / "loader", objective=At(8, 1, interrupt))
    loaded = loader(checkpoint=folder / "loader", objective=At(0, 0, interrupt))
    return {"broken": broken, "again": again, "left": left, "half": half, "loaded": loaded}


def full_disk(folder: Path) -> Found:
    """Fit with a checkpoint that only process 0 fails to write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if RANK == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = density(checkpoint=folder / "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return {**found, "said": [str(warning.message) for warning in said], "there": (folder / "full").exists()}


def spoil(loss: Tensor) -> Tensor:
    return loss * torch.nan


def give_up(_: Tensor) -> Tensor:
    raise FloatingPointError("an equation of process 1")


def fail(_: Tensor) -> Tensor:
    raise KeyError("the step of process 1")


def missing() -> Found:
    """Add up gradients: one that one process lacks, one that both lack, and the request of one process."""
    a, b, c = (torch.ones((), requires_grad=True, dtype=kind) for kind in (torch.float, torch.double, torch.double))
    loss, share = 3 * a if RANK else 5 * b, (0.25, 0.75)[RANK]
    loss.backward()
    total, wishes = distributed.add_up([a, b, c], loss.detach(), share, [RANK == 1, False])
    return {"grads": [a.grad, b.grad, c.grad], "loss": total, "wishes": wishes}


RUNS: dict[str, Callable[[], Found]] = {  # their results do not depend on the number of processes
    "density": density,
    "loader": loader,
    "amortized": amortized,
    "plain": lambda: without_noise(Trace_ELBO()),
    "default": lambda: without_noise(None),
    "grads": lambda: without_noise(RenyiELBO(0.5, num_particles=2)),
    "streamed": streamed,
    "skipped": lambda: density(objective=At(4, LAST, spoil)),
    "unsolved": lambda: density(objective=At(4, LAST, give_up)),
}


def both(folder: Path) -> Found:
    return {
        **{name: run() for name, run in RUNS.items()},
        "noise": noise(),
        "minibatches": minibatches(),
        "many_rows": many_rows(folder / "many_rows"),
        "resumed_stream": resumed_stream(folder),
        "replayed": replayed(folder),
        "resumed": resumed(folder),
        "missing": missing(),
        "full_disk": full_disk(folder),
        "raised": failed(lambda: density(objective=At(4, 1, give_up), on_nonfinite="raise")),
        "failed": failed(lambda: density(objective=At(4, 1, fail))),
        "refused": failed(lambda: density(x=rows(RANK))),
        "uneven": failed(lambda: fit_svi(normal, AutoNormal(normal), Y, steps=1, num_particles=3)),
    }


def main(folder: Path) -> None:
    from processes_failing import failing, gap  # imports from this module

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        found = {**both(folder), **failing(folder)}
    torch.save({**found, "said": said.getvalue()}, folder / f"found_{RANK}")
    gap()  # ends the launcher


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
