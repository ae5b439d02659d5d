"""Failures of one of two processes, for ``processes_job.py``."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from processes_job import RANK, Found, density, failed, rows, small

from pyro_flows import AutoFlow, Fit, fit_density, fit_svi, flows
from pyro_flows.training import Training

BRIEF: Any = {"training": Training(validation=torch.zeros(9, 2).double() + 5), "max_epochs": 2, "progress": False}


class Broken(Exception):
    """Error that cannot be sent between processes: it takes two arguments, but its pickle has one."""

    def __init__(self, row: int, file: str) -> None:
        super().__init__(f"row {row} of {file}")


class Batches:
    """Batches whose second epoch has another end."""

    def __init__(self, end: Callable[[], Any]) -> None:
        self.end, self.epoch = end, 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        yield from rows().split(50)[:2]
        yield rows(1) if self.epoch == 1 else self.end()


def unreadable() -> Any:
    raise Broken(7, "data.csv")


def unsendable() -> Any:
    return {"x": lambda: 0}


def gap() -> Found:
    """Fit data with a NaN that only process 1 has, and that it finds before the first step."""
    x = rows()
    if RANK == 1:
        x[7, 1] = torch.nan
    return density(x=x)


def ugly(folder: Path) -> Fit:
    """Fit with pictures, in which the drawing process fails between two steps."""

    def refuse(*_: Any) -> None:
        raise ArithmeticError("the picture is ugly")

    images = torch.randint(0, 256, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    flow = flows.Dequantized(flows.glow((1, 4, 4), num_scales=1, num_steps=1, hidden_dim=4))
    with mock.patch("pyro_flows.fitting.density._draw", refuse):
        training = Training(samples=folder / "samples.png")
        return fit_density(flow, images, max_epochs=1, progress=False, training=training)


def far_off() -> float:
    """Run a fit far from its start with one draw per process; it needs a start on which both processes agree."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.tensor([100.0, -50.0]), torch.tensor([1.0, 30.0])).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=torch.tensor(1.0))

    pyro.set_rng_seed(0)
    guide = AutoFlow(model, name=f"far_{time.monotonic_ns()}")
    return fit_svi(model, guide, steps=20, num_particles=2, progress=False).best_loss


def failing(folder: Path) -> Found:
    """Return the outcome of each failure: both processes fail together, and both go on if the script does."""
    return {
        "unreadable": failed(lambda: fit_density(small(), Batches(unreadable), **BRIEF)),
        "unsendable": failed(lambda: fit_density(small(), Batches(unsendable), **BRIEF)),
        "gap": failed(gap),
        "ugly": failed(lambda: ugly(folder)),
        "far_off": far_off(),
    }
