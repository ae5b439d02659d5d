"""Why is the default guide what it is?  One change at a time, away from the defaults, on four posteriors.

    python benchmarks/recipe.py                     # about an hour on 2 cores
    python benchmarks/recipe.py --variants default "no warm start"
    python benchmarks/recipe.py --quick --out DIR   # few steps: a smoke run

The posteriors: a regression with condition number 1e5, a Gaussian process, two funnels of 10 and 51 dimensions.  One
seed; 100,000 raw draws judge each fit, as in ``posteriors.py``.  Multiples of steps are those of the full schedule, of
which the regression, being near-Gaussian, takes half by default.  A fit is saved when it ends, and a run that was
stopped goes on where it was.  Writes ``recipe.csv`` and ``recipe.md`` into ``docs/benchmarks``.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import posteriors
import targets
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import nn

import pyro_flows as pf
from pyro_flows import flows, objectives
from pyro_flows.distributions import ContaminatedNormalBase, StandardNormal, StudentTBase
from pyro_flows.fitting.optimizers import FEW
from pyro_flows.fitting.schedule import suited_to
from pyro_flows.guides import init_to_center

TARGETS = "earnings", "gp_pois_regr", "eight_schools_centered", "german_credit_sparse"
QUICK = "default", "no warm start", "averaged iterates"


class Variant(NamedTuple):
    """What differs from the defaults: of the guide, of the fit, of how many times the steps and the draws."""

    guide: dict[str, Any] = {}
    fit: dict[str, Any] = {}
    steps: float = 1.0
    draws: float = 1.0
    lr: float = 1.0
    few: float = FEW  # up to how many latents Adam trains all
    prepare: Callable[[Any, Callable[[], None]], None] | None = None
    train: Callable[..., None] | None = None


def laplace(guide: Any, model: Callable[[], None]) -> None:
    """Start from a Laplace approximation."""
    mode = AutoLaplaceApproximation(model, init_loc_fn=init_to_center)
    pf.fit_svi(model, mode, steps=1000, lr=0.05, objective=Trace_ELBO(), progress=False)
    found = mode.laplace_approximation()
    guide.start_at(found.loc.detach(), found.scale_tril.detach())


def averaged(guide: Any, model: Callable[[], None], steps: int, draws: int, lr: float) -> None:
    """A constant step size, and the exponential average of the iterates."""
    pf.fit_svi(model, guide, steps=1, num_particles=2, lr=1e-9, progress=False)  # the warm start
    objective = objectives.PathELBO(draws, vectorize_particles=True)
    mean = torch.optim.swa_utils.AveragedModel(guide.flow, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn())
    optimizer = torch.optim.Adam(guide.parameters(), lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100)
        optimizer.zero_grad()
        objective.differentiable_loss(model, guide).backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 100.0)
        optimizer.step()
        mean.update_parameters(guide.flow)
    guide.flow.load_state_dict(mean.module.state_dict())


# AutoFlow's couplings and base, to be changed.
default = functools.partial(flows.realnvp, activation=nn.ELU)


def recipe(build: Callable[..., Any], **options: Any) -> dict[str, Any]:
    return {"flow": functools.partial(build, **options), "base": ContaminatedNormalBase}


VARIANTS = {
    "default": Variant(),
    "no warm start": Variant(fit={"warm_start": False}),
    "Laplace start": Variant(fit={"warm_start": False}, prepare=laplace),
    "plain gradient": Variant(fit={"objective": Trace_ELBO}),
    "Adam alone": Variant(few=math.inf),
    "Muon for all networks": Variant(few=0),
    "draws / 4": Variant(draws=1 / 4),
    "draws / 4, steps x 4": Variant(draws=1 / 4, steps=4),
    "draws x 2, steps / 2": Variant(draws=2, steps=1 / 2),
    "steps / 4": Variant(steps=1 / 4),
    "steps x 2": Variant(steps=2),
    "step size x 3": Variant(lr=3),
    "step size / 3": Variant(lr=1 / 3),
    "averaged iterates": Variant(train=averaged),
    "gradients clipped at 1": Variant(fit={"clip_norm": 1.0}),
    "4 couplings": Variant(guide=recipe(default, num_transforms=4)),
    "16 couplings": Variant(guide=recipe(default, num_transforms=16)),
    "width 128": Variant(guide=recipe(default, hidden_dims=(128, 128))),
    "ReLU": Variant(guide=recipe(default, activation=nn.ReLU)),
    "log-scales up to 1": Variant(guide=recipe(default, max_log_scale=1.0)),
    "3 IAF layers": Variant(guide=recipe(flows.iaf, num_transforms=3, hidden_dims=(128, 128), activation=nn.ELU)),
    "5 spline couplings": Variant(guide=recipe(flows.nsf, activation=nn.ELU)),
    "5 spline couplings, step size / 3": Variant(guide=recipe(flows.nsf, activation=nn.ELU), lr=1 / 3),
    "normal base": Variant(guide={"base": StandardNormal}),
    "Student-t base": Variant(guide={"base": functools.partial(StudentTBase, df=50.0)}),
}


def measure(name: str, label: str, quick: bool) -> posteriors.Row:
    """Fit one variant to one target and judge it."""
    variant, draws = VARIANTS[label], 10_000 if quick else posteriors.DRAWS

    def fit(target: targets.Target) -> Any:
        guide = pf.AutoFlow(target.model, **variant.guide).setup()
        suited = suited_to(guide)
        steps = 20 if quick else round(variant.steps * suited.steps)
        asked = None if variant.steps == 1 and not quick else steps
        particles, lr = round(variant.draws * suited.num_particles), variant.lr * suited.lr
        if variant.train:
            variant.train(guide, target.model, steps, particles, lr)
            return guide
        if variant.prepare:
            variant.prepare(guide, target.model)
        options = dict(variant.fit)
        if "objective" in options:
            options["objective"] = options["objective"](particles, vectorize_particles=True)
            options["warm_start"] = True
        with mock.patch("pyro_flows.fitting.optimizers.FEW", variant.few):
            pf.fit_svi(target.model, guide, steps=asked, num_particles=particles, lr=lr, progress=False, **options)
        return guide

    return posteriors.run(name, {"variant": label}, 0, fit, draws)


def table(rows: list[posteriors.Row], names: tuple[str, ...]) -> str:
    """For each target: nats below log Z, k-hat, worst error, seconds."""
    by_key = {(r["target"], r["variant"]): r for r in rows}
    names = tuple(name for name in names if any(r["target"] == name for r in rows))
    heads = [f"{name} ({targets.DIMS[name]})" for name in names]
    lines = [
        "# The recipe: one change at a time",
        "",
        "Each cell: nats below log Z / k-hat / seconds (seed 0, on a busy core; a rough guide). "
        "Reproduce with `python benchmarks/recipe.py`.",
        "",
        "| variant | " + " | ".join(heads) + " |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for label in VARIANTS:
        cells = []
        for name in names:
            row = by_key.get((name, label), {})
            if row.get("failed"):
                cells.append("failed")
            elif row:
                gap = targets.evidence(name) - float(row["elbo"])
                cells.append(f"{gap:.3f} / {float(row['khat']):.2f} / {float(row['seconds']):.0f}")
            else:
                cells.append("–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--jobs", type=int, default=2, help="fits at a time, one thread each")
    parser.add_argument("--out", type=Path, default=posteriors.OUT, help="folder of the two files")
    parser.add_argument("--quick", action="store_true", help="two targets, three variants, 20 steps: needs --out")
    options = parser.parse_args()
    if options.quick:
        if options.out == posteriors.OUT:
            parser.error("--quick needs --out: its figures are no results")
        options.targets, options.variants = list(TARGETS[:2]), list(QUICK)
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "recipe.csv"
    rows = posteriors.read(results)
    done = {(r["target"], r["variant"]) for r in rows}
    wanted = [(n, label) for label in options.variants for n in options.targets if (n, label) not in done]
    for row in posteriors.side_by_side(measure, [(*key, options.quick) for key in wanted], options.jobs):
        rows.append(row)
        posteriors.save(rows, results)
    posteriors.write(table(rows, TARGETS), options.out / "recipe.md")


if __name__ == "__main__":
    main()
