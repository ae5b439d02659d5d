"""Ablation of the default guide: one change at a time from a reference, on four posteriors.

    python benchmarks/recipe.py                     # about an hour on 2 cores
    python benchmarks/recipe.py --variants reference "no warm start"
    python benchmarks/recipe.py --quick --out DIR   # few steps: a smoke run

The posteriors are a regression with condition number 1e5, a Gaussian process, and two funnels of 10 and 51 dimensions.
Each fit has one seed, and its measures are those of 100,000 raw draws, as in ``posteriors.py``.  The reference has 8
couplings and gradients clipped at 100, the default for at most 32 latents.  For 51 latents it has 3,000 steps, which
was the default until more couplings proved better than more steps.  Multiples of steps refer to the full schedule.  By
default the near-Gaussian regression takes half of it.  A fit is saved when it ends, and an interrupted run continues.
Writes ``recipe.csv`` and ``recipe.md`` into ``docs/benchmarks``.
"""

import argparse
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import posteriors
import targets
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows import flows, objectives
from pyro_flows.bijectors import RationalQuadraticSpline
from pyro_flows.distributions import ContaminatedNormalBase, StandardNormal, StudentTBase
from pyro_flows.fitting.optimizers import optimizers
from pyro_flows.guides import init_to_center
from pyro_flows.guides.base import plan_of
from pyro_flows.guides.guide_flow import LIMITS
from pyro_flows.guides.guide_flow import affine_couplings as default
from pyro_flows.sampling.gaussian import Matching
from pyro_flows.training.stopping import Horizon
from pyro_flows.transforms import Elementwise

TARGETS = "earnings", "gp_pois_regr", "eight_schools_centered", "german_credit_sparse"
QUICK = "reference", "no warm start", "averaged iterates"


class Variant(NamedTuple):
    """Difference from the reference: arguments of guide and fit, and factors of steps, draws and step size."""

    guide: dict[str, Any] = {}
    fit: dict[str, Any] = {}
    steps: float = 1.0
    draws: float = 1.0
    lr: float = 1.0
    other: dict[str, Any] = {}  # other values for constants of pyro_flows
    prepare: Callable[[Any, Callable[[], None]], None] | None = None
    train: Callable[..., None] | None = None


def laplace(guide: Any, model: Callable[[], None]) -> None:
    """Start from a Laplace approximation."""
    mode = AutoLaplaceApproximation(model, init_loc_fn=init_to_center)
    pf.fit_svi(model, mode, steps=1000, lr=0.05, objective=Trace_ELBO(), progress=False)
    found = mode.laplace_approximation()
    guide.start_at(found.loc.detach(), found.scale_tril.detach())


def by_hand(guide: Any, model: Callable[[], None], draws: int, lr: float) -> Iterator[tuple[torch.optim.Adam, float]]:
    """Train by Adam without end or decay; before each step yield the optimizer and the last loss."""
    pf.fit_svi(model, guide, steps=1, num_particles=2, lr=1e-9, progress=False)  # the warm start
    objective = objectives.PathELBO(draws, vectorize_particles=True)
    optimizer, value = torch.optim.Adam(guide.parameters(), lr=lr / 100), math.nan
    for step in itertools.count(1):
        yield optimizer, value
        if step <= 100:
            optimizer.param_groups[0]["lr"] = lr * step / 100
        optimizer.zero_grad()
        loss = objective.differentiable_loss(model, guide)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 100.0)
        optimizer.step()
        value = loss.item()


def averaged(guide: Any, model: Callable[[], None], steps: int, draws: int, lr: float) -> None:
    """Train with a constant step size, and keep the exponential average of the iterates."""
    mean = torch.optim.swa_utils.AveragedModel(guide.flow, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn())
    for _ in itertools.islice(by_hand(guide, model, draws, lr), steps):
        mean.update_parameters(guide.flow)
    guide.flow.load_state_dict(mean.module.state_dict())


def until_flat(guide: Any, model: Callable[[], None], steps: int, draws: int, lr: float) -> None:
    """Divide the step size by 3 after three blocks of 50 steps without a lower loss; stop at the fourth division."""
    losses: list[float] = []
    for optimizer, loss in itertools.islice(by_hand(guide, model, draws, lr), 4 * steps):
        losses.append(loss)
        if len(losses) == 101:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=1 / 3, patience=2, threshold=0.0)
        elif len(losses) > 101 and len(losses) % 50 == 1:
            plateau.step(sum(losses[-50:]) / 50)
            if optimizer.param_groups[0]["lr"] < lr / 60:
                return


def along_a_line(horizon: Horizon, step: int) -> float:
    """Return a share of the step size that falls linearly."""
    return min(1.0, step / 100) * (1 - (step - 1) / horizon.steps)


def late(horizon: Horizon, step: int) -> float:
    """Return a share of the step size that falls in the second half."""
    return min(1.0, step / 100, 2 * (1 - (step - 1) / horizon.steps))


def adam_alone(parameters: list[Tensor], lr: float, **_: Any) -> list[Any]:
    """Return Adam for all parameters."""
    return optimizers(parameters, lr, by_soap=[], by_muon=[])


def muon_for_matrices(parameters: list[Tensor], lr: float, **_: Any) -> list[Any]:
    """Return Muon for matrices, and Adam for all other parameters."""
    return optimizers(parameters, lr, by_soap=[], by_muon=[p for p in parameters if p.dim() == 2])


def soap_alone(parameters: list[Tensor], lr: float, **_: Any) -> list[Any]:
    """Return SOAP for all parameters."""
    return optimizers(parameters, lr, by_soap=parameters, by_muon=[])


def with_splines(input_dim: int) -> flows.Flow:
    """Return the default couplings, followed by a spline for each latent."""
    splines = Elementwise(RationalQuadraticSpline(bound=6.0), input_dim)
    return flows.Flow([*default(input_dim).transforms, splines])


def recipe(build: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Return the arguments of a guide with a recipe and the default base."""
    return {"flow": functools.partial(build, **options), "base": ContaminatedNormalBase}


VARIANTS = {
    "reference": Variant(),
    "no warm start": Variant(fit={"warm_start": False}),
    "Laplace start": Variant(fit={"warm_start": False}, prepare=laplace),
    "start with scales alone": Variant(other={"sampling.gaussian.MATCHING": Matching(poor=0.0)}),
    "start with all correlations": Variant(other={"sampling.gaussian.MATCHING": Matching(poor=math.inf)}),
    "plain gradient": Variant(fit={"objective": Trace_ELBO}),
    "Adam alone": Variant(other={"fitting.svi.optimizers": adam_alone}),
    "Muon for all networks": Variant(other={"fitting.svi.optimizers": muon_for_matrices}),
    "SOAP for all": Variant(other={"fitting.svi.optimizers": soap_alone}),
    "draws / 4": Variant(draws=1 / 4),
    "draws / 4, steps x 4": Variant(draws=1 / 4, steps=4),
    "draws x 2, steps / 2": Variant(draws=2, steps=1 / 2),
    "steps / 4": Variant(steps=1 / 4),
    "steps x 2": Variant(steps=2),
    "step size x 3": Variant(lr=3),
    "step size / 3": Variant(lr=1 / 3),
    "step size falls along a line": Variant(other={"training.stopping.Horizon.share": along_a_line}),
    "step size falls in the second half": Variant(other={"training.stopping.Horizon.share": late}),
    "step size falls when the loss does not, to a stop": Variant(train=until_flat),
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
    "a spline for each latent at the end": Variant(guide=recipe(with_splines)),
    "a scale for each latent at the end": Variant(other={"guides.guide_flow.LIMITS": replace(LIMITS, learned=0)}),
    "steps x 0.7, clipped at 1, and with 51 latents 16 couplings": Variant(
        guide={"flow": None, "base": None}, fit={"clip_norm": 1.0}, steps=0.7
    ),
    "normal base": Variant(guide={"base": StandardNormal}),
    "Student-t base": Variant(guide={"base": functools.partial(StudentTBase, df=50.0)}),
}


def measure(name: str, label: str, quick: bool) -> posteriors.Row:
    """Fit one variant to one target and return the row of results."""
    variant, draws = VARIANTS[label], 10_000 if quick else posteriors.DRAWS

    def fit(target: targets.Target) -> Any:
        guide = pf.AutoFlow(target.model, **{**recipe(default), **variant.guide}).setup()
        suited, many = plan_of(guide).schedule(), guide.latent_dim > LIMITS.few
        steps = 20 if quick else round(variant.steps * (3000 if many else suited.steps))
        asked = None if variant.steps == 1 and not (quick or many) else steps
        particles, lr = round(variant.draws * suited.num_particles), variant.lr * suited.lr
        if variant.train:
            variant.train(guide, target.model, steps, particles, lr)
            return guide
        if variant.prepare:
            variant.prepare(guide, target.model)
        options = {"clip_norm": 100.0, **variant.fit}
        if "objective" in options:
            options["objective"] = options["objective"](particles, vectorize_particles=True)
            options["warm_start"] = True
        pf.fit_svi(target.model, guide, steps=asked, num_particles=particles, lr=lr, progress=False, **options)
        return guide

    with contextlib.ExitStack() as changes:
        for place, value in variant.other.items():
            changes.enter_context(mock.patch(f"pyro_flows.{place}", value))
        return posteriors.run(name, {"variant": label}, 0, fit, draws)


def table(rows: list[posteriors.Row], names: tuple[str, ...]) -> str:
    """Return the results as Markdown."""
    by_key = {(r["target"], r["variant"]): r for r in rows}
    names = tuple(name for name in names if any(r["target"] == name for r in rows))
    heads = [f"{name} ({targets.DIMS[name]})" for name in names]
    lines = [
        "# Ablation of the default guide",
        "",
        "This page is for users who want to change the default guide. Each row makes one change to it, on four "
        "posteriors. Some changes make the fit of at least one posterior much worse: no warm start, no path gradients, "
        "no SOAP, or a quarter of the steps or draws. Most other changes matter little.",
        "",
        "Reproduce with `python benchmarks/recipe.py`. A cell has four figures: nats below log Z / k-hat / worst error "
        "of a mean in standard deviations / seconds. Each fit has seed 0. The seconds are those of a busy core, so "
        "they are rough. The number of latents stands in brackets.",
        "",
        "The reference has 8 couplings, the default for at most 32 latents. With 51 latents the default is the row "
        "with 16 couplings and gradients clipped at 1. *Plain gradient* is Pyro's `Trace_ELBO`. *Averaged iterates* "
        "and *step size falls when the loss does not, to a stop* have Adam alone.",
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
                error = f"{float(row['worst_error']):.3f}"
                cells.append(f"{gap:.3f} / {float(row['khat']):.2f} / {error} / {float(row['seconds']):.0f}")
            else:
                cells.append("–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--jobs", type=int, default=2, help="parallel fits, one thread each")
    parser.add_argument("--out", type=Path, default=posteriors.OUT, help="folder of the two files")
    parser.add_argument("--quick", action="store_true", help="smoke run: two targets, 20 steps; needs --out")
    options = parser.parse_args()
    if options.quick:
        if options.out == posteriors.OUT:
            parser.error("--quick needs --out, because its figures are not results. Add --out DIR.")
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
