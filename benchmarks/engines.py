"""What do the engines for many draws cost, and how long do two of Pyro's tutorials take?

    python benchmarks/engines.py

*Engines*: the time of the log-densities of 256 draws and of their gradients.  The engines are an outer plate, vmap and
a loop.  Their runs alternate in one process, and the page has medians.

*Choice*: the seconds that ``Task.settle`` needs to choose engines for model and guide, and the model's runs beyond the
first.

*Tutorials*: the unchanged models of ``bayesian_regression.ipynb`` and ``gmm.ipynb``, with ``AutoFlow``, ``fit_svi`` and
``check`` and their defaults.

Set ``PYRO_FLOWS_PYRO`` to a checkout of Pyro's repository, and set ``PYRO_FLOWS_DATA``.  Writes
``docs/benchmarks/engines.md``.
"""

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
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.programs.program import ENGINES

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
DRAWS, REPEATS, SEEDS = 256, 7, 5
SIZES = {"loop": 16}  # draws of a timed run, if fewer than DRAWS
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
    """Return the mixture of gmm.ipynb, with its data."""
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    (model,) = taken("tutorial/source/gmm.ipynb", "model", K=2)
    return Program(model, (data,))


def task_of(program: Program, vectorize: str = "auto") -> Task:
    """Return a task of a program and a new guide, in the program's precision."""
    torch.set_default_dtype(program.dtype)
    guide = pf.AutoFlow(program.model).setup(*program.args, **program.kwargs)
    return Task(pf.Program(program.model, vectorize=vectorize), guide, program.args, program.kwargs)


def timed(task: Task, size: int) -> float:
    """Return the seconds of log-densities and gradients of some draws."""
    held = {name: value.requires_grad_() for name, value in task.draw(size).latents.items()}
    start = time.perf_counter()
    task.model.log_prob(held, size).sum().backward()
    return time.perf_counter() - start


def engines(build: Callable[[], Program]) -> dict[str, float]:
    """Return the seconds of 256 draws by each engine that runs a program; the loop is timed on fewer draws."""
    tasks = {}
    for engine in ENGINES:
        try:
            tasks[engine] = task_of(build(), engine).settle()
        except ValueError:  # the engine does not run this program
            continue
    seconds: dict[str, list[float]] = {engine: [] for engine in tasks}
    for _ in range(REPEATS):
        for engine, task in tasks.items():
            size = SIZES.get(engine, DRAWS)
            seconds[engine].append(timed(task, size) * DRAWS / size)
    return {engine: statistics.median(found[1:]) for engine, found in seconds.items()}


def choice(build: Callable[[], Program]) -> tuple[float, int, str]:
    """Return the seconds and the model runs that the choice needs, and the chosen engine."""
    program, runs = build(), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs[0] += 1
        return program.model(*args, **kwargs)

    task = task_of(program._replace(model=counted))
    before, start = runs[0], time.perf_counter()
    task.settle()
    return time.perf_counter() - start, runs[0] - before, task.model.engine


def tutorial(build: Callable[[], Program], seed: int) -> dict[str, Any]:
    """Fit and check a program, and return verdict, time, ELBO and evidence."""
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
    """Run all parts, and return the lines of the page."""
    rows, ratios = [], []
    for name, build in MODELS.items():
        found, (seconds, runs, engine) = engines(build), choice(build)
        shown = {key: f"{1e3 * value:.1f}" for key, value in found.items()}
        ratio = "–"
        if {"plate", "vmap"} <= found.keys():
            ratios.append(found["vmap"] / found["plate"])
            ratio = f"{ratios[-1]:.2f}"
        cells = shown.get("plate", "–"), shown.get("vmap", "–"), ratio, shown.get("loop", "–")
        rows.append(f"| {name} | {' | '.join(cells)} | {engine} | {seconds:.2f} | {runs} |")
        print(rows[-1], flush=True)
    lines = [
        "# Engines",
        "",
        "This page is for users who choose `vectorize`. It compares the three engines that run a model for many draws:",
        "an outer plate, vmap and a loop. By default, the package uses the first of them that works for the model.",
        f"If plate and vmap work, vmap takes {min(ratios):.2f} to {max(ratios):.2f} times as long as the plate.",
        "Reproduce with `python benchmarks/engines.py`.",
        "",
        f"Columns *plate*, *vmap* and *loop*: milliseconds for the log-densities of {DRAWS} draws and their gradients,",
        "on one core; `–`: the engine does not run the model. *choice* and *runs*: the seconds and the model runs that",
        "the choice needs.",
        "",
        "| model | plate, ms | vmap, ms | vmap / plate | loop, ms | chosen | choice, s | runs |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "## Two tutorials",
        "",
        "`AutoFlow(model)`, `fit_svi` and `check` run the unchanged models with their defaults. ELBO and evidence are",
        "in nats, from 5,000 draws. If the sum over labels is written by hand, the mixture reaches an ELBO of -18.0.",
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
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "engines.md").write_text("\n".join(report()), encoding="utf-8")


if __name__ == "__main__":
    main()
