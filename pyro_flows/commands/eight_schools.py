"""The main job: a flow guide for the eight schools, whose centred posterior is a funnel that no Gaussian can follow.

Data: Rubin (1981), "Estimation in parallel randomized experiments", Journal of Educational Statistics 6(4).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..diagnostics import check, to_arviz
from ..files import write_atomically
from ..fitting import fit_svi
from ..flows import Flow
from ..guides import AutoFlow
from .funnel import plot_funnel
from .interrupts import NOTHING, Interrupted, beside, hold_ctrl_c, what_was_kept
from .report import draws_of, report

SCHOOLS = "ABCDEFGH"
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
WRITTEN, SHOWN = 4000, 100_000  # draws
FILES = "eight_schools.nc", "eight_schools.png"


def eight_schools(effects: Tensor, standard_errors: Tensor) -> None:
    """The effect of coaching in each of eight schools, partially pooled."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, standard_errors), obs=effects)


def run(out: Path, *, recipe: Callable[[int], Flow] | None, steps: int, seed: int, quiet: bool) -> bool:
    """Fit, print and write the two files into the folder ``out``; return whether the answer can be used.

    Raises:
        Interrupted: After Ctrl-C, when what was fitted is written beside these files.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)  # ten latents: more threads would only wait for each other
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    data = EFFECTS, STANDARD_ERRORS
    guide = AutoFlow(eight_schools, recipe)
    paths = out / FILES[0], out / FILES[1]
    with hold_ctrl_c() as asked:
        fit = fit_svi(eight_schools, guide, *data, steps=steps, progress=not quiet)
        if fit.stopped == "interrupted" and not fit.best_step:
            raise Interrupted(NOTHING)
        checked = check(eight_schools, guide, *data, num_samples=40_000)
        weighted = checked.verdict == "reweight"
        written = to_arviz(eight_schools, guide, *data, num_samples=WRITTEN, importance=weighted)
        kept = beside(paths) if fit.stopped == "interrupted" else paths
        write_atomically(kept[0], written.to_netcdf)
    many = to_arviz(eight_schools, guide, *data, num_samples=SHOWN, importance=weighted, log_likelihood=False)
    draws, seconds = draws_of(many), time.perf_counter() - start
    some = {name: torch.from_numpy(values[:WRITTEN]) for name, values in draws.items()}
    effects = {f"theta {school}": column for school, column in zip(SCHOOLS, some["theta"].T, strict=True)}
    figure = plot_funnel(some["mu"], some["tau"], effects)
    write_atomically(kept[1], lambda path: figure.savefig(path, dpi=150))
    if not quiet:
        advice = "Try more steps or another flow."
        labels = {"theta": list(SCHOOLS)}
        print(report(draws, checked, seconds=seconds, skipped=fit.skipped, advice=advice, labels=labels))
        print(f"Wrote {kept[0]} and {kept[1]}.")
    if asked() or fit.stopped == "interrupted":
        raise Interrupted(what_was_kept(paths, *kept))
    return checked.verdict != "do not trust"
