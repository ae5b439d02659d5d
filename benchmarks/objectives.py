"""Cost and benefit of the objectives.

    python benchmarks/objectives.py                  # all three questions, about 10 minutes on one core
    python benchmarks/objectives.py --quick --out F  # few steps: a smoke run

1. *Cost.* The time of a step of ``PathELBO`` over that of a step of Pyro's ``Trace_ELBO``.  Guide and number of draws
   are the same; the steps alternate.
2. *Objectives.* ``AutoFlow`` on the centred eight schools with each objective: nats below log Z, k-hat, errors and
   seconds.
3. *Modes.* Two Gaussians in two dimensions, 8 sd apart: the fitted weight of the first mode, by the default objective
   and by ``TemperedELBO``.

Writes ``docs/benchmarks/objectives.md``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import posteriors
import pyro
import pyro.distributions as dist
import targets
import torch
from pyro.infer import Trace_ELBO

import pyro_flows as pf
from pyro_flows import objectives
from pyro_flows.guides.base import plan_of

OUT = posteriors.OUT / "objectives.md"
SEEDS, TEMPERED = (0, 1, 2), 3000  # steps for modes far apart
FINISH = "`ImportanceWeightedELBO(16)`, after the default"


def fresh(model: Callable[[], None], seed: int) -> pf.AutoFlow:
    """Return a new guide, after removing all traces of the last one."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return pf.AutoFlow(model).setup()


def cost(repetitions: int) -> list[list[str]]:
    """Return the rows of the time of a step with path gradients and without."""
    rows = []
    for name in ("eight_schools_centered", "low_dim_gauss_mix", "german_credit_sparse"):
        model = targets.load(name).model
        guide = fresh(model, 0)
        number = plan_of(guide).schedule().num_particles
        losses = [
            kind(number, vectorize_particles=True, max_plate_nesting=1) for kind in (Trace_ELBO, objectives.PathELBO)
        ]
        seconds: list[list[float]] = [[], []]
        for _ in range(repetitions + 3):
            for loss, times in zip(losses, seconds, strict=True):
                start = time.perf_counter()
                guide.zero_grad()
                loss.differentiable_loss(model, guide).backward()
                times.append(time.perf_counter() - start)
        plain, path = (1000 * statistics.median(times[3:]) for times in seconds)
        rows.append([name, str(number), f"{plain:.1f}", f"{path:.1f}", f"{path / plain:.2f}"])
    return rows


def compare(steps: int | None) -> list[list[str]]:
    """Return the rows of a fit to a funnel with each objective."""
    target = targets.load("eight_schools_centered")
    number = steps or plan_of(fresh(target.model, 0)).schedule().steps
    kinds: dict[str, Callable[[], Any]] = {
        "`PathELBO` (default)": lambda: None,
        "`Trace_ELBO` (Pyro)": lambda: Trace_ELBO(256, vectorize_particles=True),
        FINISH: lambda: objectives.ImportanceWeightedELBO(16),
        "`RenyiELBO(0.5)`": lambda: objectives.RenyiELBO(0.5, num_particles=256, vectorize_particles=True),
        "`ForwardKL`": lambda: objectives.ForwardKL(256),
        "`TemperedELBO`": lambda: objectives.TemperedELBO(number, num_particles=256),
    }
    rows = []
    for label, build in kinds.items():
        guide = fresh(target.model, 0)
        start = time.perf_counter()
        if label == FINISH:
            pf.fit_svi(target.model, guide, steps=number, progress=False)
            pf.fit_svi(target.model, guide, steps=number // 2, lr=3e-4, objective=build(), progress=False)
        else:
            pf.fit_svi(target.model, guide, steps=number, objective=build(), warm_start=True, progress=False)
        seconds = time.perf_counter() - start
        found = posteriors.judge(target, guide, posteriors.DRAWS)
        gap = targets.evidence(target.name) - found["elbo"]
        spread = f"{found['low_sd']:.2f}–{found['high_sd']:.2f}"
        rows.append(
            [label, f"{gap:.3f}", f"{found['khat']:.2f}", f"{found['worst_error']:.3f}", spread, f"{seconds:.0f}"]
        )
        print(" ".join(rows[-1]), flush=True)
    return rows


def two_modes(weight: float) -> Callable[[], None]:
    """Return a mixture of two Gaussians in two dimensions, 8 sd apart; ``weight`` is that of the first."""
    places = torch.tensor([[-4.0, 0.0], [4.0, 0.0]])
    parts = dist.MultivariateNormal(places, torch.eye(2))

    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
        logits = parts.log_prob(z.unsqueeze(-2)) + torch.tensor([weight, 1 - weight]).log()
        pyro.factor("modes", logits.logsumexp(-1))

    return model


def modes(steps: int | None) -> list[list[str]]:
    """Return the rows of the fitted weight of the first mode."""
    rows = []
    for weight in (0.5, 0.2):
        model = two_modes(weight)
        for label in ("`PathELBO` (default)", "`TemperedELBO`"):
            found, seconds = [], []
            for seed in SEEDS:
                guide = fresh(model, seed)
                start = time.perf_counter()
                number = steps or TEMPERED
                objective = objectives.TemperedELBO(number) if "Tempered" in label else None
                pf.fit_svi(model, guide, steps=number, objective=objective, progress=False)
                seconds.append(time.perf_counter() - start)
                found.append((guide.sample(100_000)["z"][:, 0] < 0).double().mean().item())
            rows.append([f"{weight}", label, ", ".join(f"{w:.3f}" for w in found), f"{statistics.median(seconds):.0f}"])
            print(" ".join(rows[-1]), flush=True)
    return rows


def table(title: str, text: str, columns: list[str], rows: list[list[str]]) -> str:
    """Return a section with a table, as Markdown."""
    lines = [f"## {title}", "", text, "", "| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|")
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke run with few steps; needs --out")
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write")
    options = parser.parse_args()
    if options.quick and options.out == OUT:
        parser.error("--quick needs --out, because its figures are not results. Add --out FILE.")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    steps = 20 if options.quick else None
    costs = cost(5 if options.quick else 100)
    ratios = sorted(row[-1] for row in costs)
    parts = [
        "# Objectives\n",
        "This page is for users who choose the objective of a fit. It measures what each objective costs and what it "
        f"gains. A step of the default, `PathELBO`, takes {ratios[0]} to {ratios[-1]} times as long as one of Pyro's "
        "`Trace_ELBO`, and the fit ends closer to log Z. Only `TemperedELBO` keeps both of two distant modes.\n",
        "Reproduce with `python benchmarks/objectives.py`. All runs are in float64 on one thread. "
        f"torch {torch.__version__}, Pyro {pyro.__version__}.\n",
        table(
            "What a step with path gradients costs",
            "Milliseconds for a loss and its gradients. The two objectives alternate; the times are medians.",
            ["target", "draws", "`Trace_ELBO`, ms", "`PathELBO`, ms", "ratio"],
            costs,
        ),
        table(
            "Each objective on the centred eight schools",
            "All fits have the same warm start, steps and draws, with one exception. Under the importance-weighted "
            "bound alone, the flow grows wide until draws overflow. So this fit continues the default one, with half "
            "as many steps of size .0003. Errors are those of raw draws, in standard deviations.",
            ["objective", "log Z − ELBO", "k-hat", "worst error", "sd ratio", "s"],
            compare(steps),
        ),
        table(
            "Two modes, 8 sd apart",
            "The fitted weight of the first mode, for each seed.",
            ["true weight", "objective", "seeds " + ", ".join(map(str, SEEDS)), "s"],
            modes(steps),
        ),
    ]
    posteriors.write("\n".join(parts), options.out)


if __name__ == "__main__":
    main()
