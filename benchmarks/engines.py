"""What do the three ways to run many draws cost, and how do two of Pyro's tutorials go through?

    python benchmarks/engines.py

*Engines*: log-densities of 256 draws and their gradients, under an outer plate, by vmap and in a loop, alternating in
one process; the median of the runs, and the ratio to the plate where that works.  *Choice*: the seconds that
``Task.settle`` takes to choose engines for model and guide, and the model's runs beyond the first.  *Tutorials*: the
model of ``bayesian_regression.ipynb`` and that of ``gmm.ipynb``, unchanged, by ``AutoFlow``, ``fit_svi`` and ``check``
with their defaults.

Needs ``PYRO_FLOWS_PYRO``, a checkout of Pyro's repository, and ``PYRO_FLOWS_DATA``.  Writes
``docs/benchmarks/engines.md``.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pyro
import torch
from programs import Program, taken

import pyro_flows as pf
from pyro_flows.programs.engines import ENGINES
from pyro_flows.programs.task import Task

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
DRAWS, REPEATS, SEEDS = 256, 7, 5
SIZES = {"loop": 16}  # draws of a timed run, where fewer than DRAWS
MODELS: dict[str, Callable[[], Program]] = {
    "four conjugate latents": programs.seeded(programs.conjugate),
    "neutra.py, a banana": programs.seeded(programs.neutra),
    "eight schools, centred": lambda: programs.target("eight_schools_centered"),
    "kidiq": lambda: programs.target("kidiq"),
    "german credit, sparse": lambda: programs.target("german_credit_sparse"),
    "garch": lambda: programs.target("garch"),
    "brownian motion": lambda: programs.target("brownian_unknown_scales"),
    "bayesian_regression.ipynb": programs.seeded(programs.bayesian_regression),
    "gmm.ipynb": lambda: gmm(),
}


def gmm() -> Program:
    """The mixture of gmm.ipynb, with its data."""
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    (model,) = taken("tutorial/source/gmm.ipynb", "model", K=2)
    return Program(model, (data,))


def task_of(program: Program, vectorize: str = "auto") -> Task:
    """Return a task of a program and a new guide, in the program's precision."""
    torch.set_default_dtype(program.dtype)
    guide = pf.AutoFlow(program.model).setup(*program.args, **program.kwargs)
    return Task(program.model, guide, program.args, program.kwargs, vectorize)


def timed(task: Task, size: int) -> float:
    """Return the seconds of log-densities and gradients of some draws."""
    held = {name: value.requires_grad_() for name, value in task.draw(size).latents.items()}
    start = time.perf_counter()
    task.model.log_prob(held, size).sum().backward()
    return time.perf_counter() - start


def engines(build: Callable[[], Program]) -> dict[str, float]:
    """Return the seconds of 256 draws by each engine that runs a program; those of the loop from fewer draws."""
    tasks = {}
    for engine in ENGINES:
        try:
            tasks[engine] = task_of(build(), engine).settle()
        except ValueError:  # this one does not run the program
            continue
    seconds: dict[str, list[float]] = {engine: [] for engine in tasks}
    for _ in range(REPEATS):
        for engine, task in tasks.items():
            size = SIZES.get(engine, DRAWS)
            seconds[engine].append(timed(task, size) * DRAWS / size)
    return {engine: statistics.median(found[1:]) for engine, found in seconds.items()}


def choice(build: Callable[[], Program]) -> tuple[float, int, str]:
    """Return the seconds of the choice, the runs of the model that it takes, and the engine that is chosen."""
    program, runs = build(), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs[0] += 1
        return program.model(*args, **kwargs)

    task = task_of(program._replace(model=counted))
    before, start = runs[0], time.perf_counter()
    task.settle()
    return time.perf_counter() - start, runs[0] - before, task.model.engine


def tutorial(build: Callable[[], Program], seed: int) -> dict[str, Any]:
    """Fit and check a program; return what a user sees."""
    program = build()
    torch.set_default_dtype(program.dtype)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    guide = pf.AutoFlow(program.model)
    pf.fit_svi(program.model, guide, *program.args, progress=False)
    found = pf.check(program.model, guide, *program.args)
    seconds = time.perf_counter() - start
    weights = pf.psis(program.model, guide, *program.args, num_samples=5000)
    return {
        "verdict": found.verdict,
        "seconds": seconds,
        "elbo": float(weights.log_weights.mean()),
        "evidence": f"{weights.log_evidence:.3f} ± {weights.log_evidence_se:.3f}",
    }


def report() -> list[str]:
    """Run all and return the lines of the page."""
    lines = [
        "# Engines",
        "",
        f"What do the ways to run many draws cost? Milliseconds for the log-densities of {DRAWS} draws and their",
        "gradients, on one core; `–` where a way does not run the model. *Choice*: the seconds and the runs of the",
        "model that it takes to choose. Reproduce with `python benchmarks/engines.py`.",
        "",
        "| model | plate | vmap | vmap / plate | loop | chosen | choice, s | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, build in MODELS.items():
        found, (seconds, runs, engine) = engines(build), choice(build)
        shown = {key: f"{1e3 * value:.1f}" for key, value in found.items()}
        ratio = f"{found['vmap'] / found['plate']:.2f}" if {"plate", "vmap"} <= found.keys() else "–"
        cells = shown.get("plate", "–"), shown.get("vmap", "–"), ratio, shown.get("loop", "–")
        lines.append(f"| {name} | {' | '.join(cells)} | {engine} | {seconds:.2f} | {runs} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "## Two tutorials",
        "",
        "`AutoFlow(model)`, `fit_svi` and `check` with their defaults, the model's code unchanged. ELBO and evidence,",
        "in nats, are those of 5,000 draws. The mixture with its sum written by hand reaches an ELBO of -18.0.",
        "",
        "| model | seed | verdict | seconds | ELBO | log evidence |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("bayesian_regression.ipynb", "gmm.ipynb"):
        for seed in range(SEEDS):
            row = tutorial(MODELS[name], seed)
            cells = row["verdict"], f"{row['seconds']:.1f}", f"{row['elbo']:.2f}", row["evidence"]
            lines.append(f"| {name} | {seed} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "engines.md").write_text("\n".join(report()), encoding="utf-8")


if __name__ == "__main__":
    main()
