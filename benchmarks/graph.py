"""What do graphs and compiled code gain, for a density, a training step, and a whole fit with its check?

    python benchmarks/graph.py                           # two hours of one core
    python benchmarks/graph.py --targets kidiq wells     # some targets
    python benchmarks/graph.py --targets --kinds         # the page alone, from the stored results

Every run has a fresh process and one thread.  *off* runs the model through Pyro's handlers, as if there were no graphs.
*cold* begins with an empty folder of compiled code, and *warm* after all that was asked for has been compiled.  Writes
``docs/benchmarks/graph.jsonl`` and ``graph.md``.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import targets
import torch
from posteriors import write
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pyro_flows as pf
from pyro_flows import Fit
from pyro_flows.fitting.elbo_loss import ELBOLoss
from pyro_flows.graphs import packages
from pyro_flows.objectives import PathELBO
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task

DRAWS, GROUPS, ROWS = 256, 30, 600
PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
LIMIT = 900  # seconds to wait for compiled code
Row = dict[str, Any]


def random_slopes() -> Callable[[], None]:
    """Return a logistic regression with a random intercept and slope of each of 30 groups: 65 latents, centred."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(GROUPS, (ROWS,), generator=generator)
    x = torch.randn(ROWS, generator=generator)
    own = torch.randn(GROUPS, 2, generator=generator) * torch.tensor([0.8, 0.5])
    y = torch.bernoulli((0.3 + own[group, 0] + (1.0 + own[group, 1]) * x).sigmoid(), generator=generator)

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
        factor = scale.unsqueeze(-1) * pyro.sample("factor", dist.LKJCholesky(2, 2.0))
        with pyro.plate("groups", GROUPS):
            effect = pyro.sample("effect", dist.MultivariateNormal(mean.unsqueeze(-2), scale_tril=factor.unsqueeze(-3)))
        logits = effect[..., group, 0] + effect[..., group, 1] * x
        with pyro.plate("rows", ROWS):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return model


def model_of(name: str) -> Callable[[], None]:
    return random_slopes() if name == "random_slopes" else targets.load(name).model


def milliseconds(function: Callable[[], Any], repeats: int = 30) -> float:
    """Return the median time of a call, after some calls."""
    for _ in range(5):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def wait_for_code() -> None:
    """Wait until all code that was asked for is there."""
    folder, end = packages.folder(), time.time() + LIMIT
    while folder is not None and list(folder.glob("*.job")) and time.time() < end:
        time.sleep(1)
        packages._start_worker(folder)


def parts(name: str, mode: str) -> Row:
    """Measure a value with its score at 256 draws, and a training step of 256 draws, in milliseconds."""
    model = model_of(name)
    guide = pf.AutoFlow(model)
    pf.fit_svi(model, guide, steps=3, progress=False)
    guide.train()
    task = Task(model, guide, (), {}).settle()
    space, loss = Density(task), ELBOLoss(task, PathELBO(DRAWS, vectorize_particles=True), None)
    loss.parameters()
    z = space.vectors(DRAWS, DRAWS)

    def score() -> Any:
        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(space.log_prob(leaf).sum(), leaf)

    if mode == "auto":
        for function in (score, loss.joint):
            for _ in range(30):
                function()
        wait_for_code()
        time.sleep(1)
    pyro.enable_validation(False)
    return {"density": milliseconds(score), "step": milliseconds(lambda: loss.joint().backward())}


def whole(name: str) -> Row:
    """Fit and check with all defaults."""
    model = model_of(name)
    guide, start = pf.AutoFlow(model), time.perf_counter()
    fit = pf.fit_svi(model, guide, progress=False)
    middle = time.perf_counter()
    found = pf.check(model, guide)
    end = time.perf_counter()
    return {
        "fit": middle - start,
        "check": end - middle,
        "loss": fit.best_loss,
        "khat": found.khat,
        "verdict": found.verdict,
    }


def two_levels(y: Tensor) -> None:
    """Sample the effects of groups with a common mean and scale, of which each step sees 20."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.HalfNormal(5.0))
    with pyro.plate("groups", len(y), subsample_size=20) as rows:
        effect = pyro.sample("effect", dist.Normal(mean, scale))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y[rows])


def simulated(y: Tensor | None = None) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.square(), 0.5).to_event(1), obs=y)


def by_guide(build: Callable[[Any], Any], size: int) -> Fit:
    """Fit a guide of eight schools with its defaults."""
    model = targets.load("eight_schools").model
    return pf.fit_svi(model, build(model), steps=100 * size, progress=False)


def by_plate(size: int) -> Fit:
    y = 3 * torch.randn(200)
    return pf.fit_svi(two_levels, pf.AutoPlateFlow(two_levels, plate="groups"), y, steps=100 * size, progress=False)


def amortized(size: int) -> Fit:
    guide = pf.AutoFlow(simulated, encoder=pf.encoders.Standardize(3))
    return pf.fit_amortized(simulated, guide, simulations=5000, max_epochs=4 * size, progress=False)


def density(size: int) -> Fit:
    """Fit the density of a table of 5,000 rows and six columns."""
    x = torch.randn(5000, 6).cumsum(-1)
    return pf.fit_density(pf.flows.nsf(6), x, max_epochs=4 * size, progress=False)


KINDS: dict[str, Callable[[int], Fit]] = {
    **{
        name: functools.partial(by_guide, build)
        for name, build in {
            "AutoNormal": AutoNormal,
            "AutoMultivariateNormal": AutoMultivariateNormal,
            "AutoStructuredFlow": pf.AutoStructuredFlow,
            "AutoFlow": pf.AutoFlow,
        }.items()
    },
    "AutoPlateFlow, 20 of 200 rows": by_plate,
    "fit_amortized": amortized,
    "fit_density, nsf": density,
}


def step(name: str) -> Row:
    """Return the milliseconds per step of the later steps of a fit, everything included."""
    fits = []
    for size in (1, 4):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        fits.append(KINDS[name](size))
    short, long = fits
    return {"ms": 1000 * (long.seconds - short.seconds) / (long.steps - short.steps), "loss": long.best_loss}


def child(name: str, job: str, mode: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.settings.set(pyro_flows_compile=mode)
    jobs: dict[str, Callable[[], Row]] = {
        "parts": lambda: parts(name, mode),
        "whole": lambda: whole(name),
        "step": lambda: step(name),
    }
    print(json.dumps(jobs[job]()))


def run(name: str, job: str, mode: str, cache: str) -> Row:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, "--child", name, job, mode]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str) -> Row:
    """Measure one target: parts by all modes, and fits with checks by *off*, *cold* and *warm*."""
    row: Row = {"target": name}
    with tempfile.TemporaryDirectory() as cache:
        for label, mode in (("off", "off"), ("cold", "auto"), ("warm", "auto")):
            row |= {f"{label} {key}": value for key, value in run(name, "whole", mode, cache).items()}
            if label == "cold":
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
                wait_for_code()
        for label, mode in (("off", "off"), ("graph", "graph"), ("compiled", "auto")):
            row |= {f"{label} {key}": value for key, value in run(name, "parts", mode, cache).items()}
    return row


def measure_steps(name: str) -> Row:
    """Measure the steps of one kind of fit."""
    row: Row = {"kind": name}
    with tempfile.TemporaryDirectory() as cache:
        for label, mode in (("off", "off"), ("graph", "graph"), ("cold", "auto"), ("compiled", "auto")):
            row |= {f"{label} {key}": value for key, value in run(name, "step", mode, cache).items()}
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            wait_for_code()
    return row


def page(rows: list[Row], steps: list[Row]) -> str:
    """Return the page."""
    part = [
        f"| {r['target']} | {r['off density']:.2f} | {r['graph density']:.2f} | {r['compiled density']:.2f} "
        f"| {r['compiled density'] / r['off density']:.2f} | {r['off step']:.1f} | {r['graph step']:.1f} "
        f"| {r['compiled step']:.1f} | {r['compiled step'] / r['off step']:.2f} |"
        for r in rows
    ]
    seconds = {
        r["target"]: [r[f"{label} fit"] + r[f"{label} check"] for label in ("off", "cold", "warm")] for r in rows
    }
    fits = [
        f"| {r['target']} | {r['off fit']:.1f} + {r['off check']:.1f} | {r['cold fit']:.1f} + {r['cold check']:.1f} "
        f"| {r['warm fit']:.1f} + {r['warm check']:.1f} | {cold / off:.2f} | {warm / off:.2f} "
        f"| {r['off khat']:.2f}, {r['cold khat']:.2f}, {r['warm khat']:.2f} "
        f"| {', '.join(dict.fromkeys(r[f'{label} verdict'] for label in ('off', 'cold', 'warm')))} |"
        for r, (off, cold, warm) in zip(rows, seconds.values(), strict=True)
    ]

    def median(top: str, bottom: str) -> float:
        return statistics.median(r[top] / r[bottom] for r in rows)

    kinds = [
        f"| {r['kind']} | {r['off ms']:.1f} | {r['graph ms']:.1f} | {r['compiled ms']:.1f} "
        f"| {r['compiled ms'] / r['off ms']:.2f} | {r['off loss']:.3f}, {r['compiled loss']:.3f} |"
        for r in steps
    ]
    ratios = [statistics.median(times[n] / times[0] for times in seconds.values()) for n in (1, 2)]
    return f"""# Graphs and compiled code

This page is for users who want to know how much faster fits and checks are by recorded graphs and compiled code
([what is compiled by itself](../scale.md#what-is-compiled-by-itself)). Reproduce with `python benchmarks/graph.py`.
One thread, double precision, torch {torch.__version__}. Other programs kept the cores busy during some
rows, so compare ratios; those of two runs may differ by a quarter.

* *off*: each call runs the model through Pyro's handlers, as with `pyro.settings.set(pyro_flows_compile="off")`.
* *graph*: recorded lists of operations. *compiled*: the code that another process made of them.
* *cold*: a program that starts without compiled code. *warm*: the same program again, once all code is there.

## A density and a step

Milliseconds for a log-density with its score at {DRAWS} draws, and for a training step of an `AutoFlow` with {DRAWS}
draws, without the optimiser. The ratios are compiled over off. Their medians are
{median("compiled density", "off density"):.2f} and {median("compiled step", "off step"):.2f}; those of graphs alone are
{median("graph density", "off density"):.2f} and {median("graph step", "off step"):.2f}.

| target | density: off | graph | compiled | ratio | step: off | graph | compiled | ratio |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(part)}

## Steps of other fits

Milliseconds per step, with optimiser and loop, of guides of eight schools and of three other fits. Steps of the first
hundred are left out. The losses are those at the end, off and compiled.

| fit | off | graph | compiled | ratio | losses |
|---|---:|---:|---:|---:|---|
{chr(10).join(kinds)}

## A fit and its check

Seconds of `fit_svi` + `check` with all defaults. The ratios are those of the sums over *off*. Their medians are
{ratios[0]:.2f} cold and {ratios[1]:.2f} warm.

| target | off | cold | warm | cold / off | warm / off | k-hat | verdict |
|---|---:|---:|---:|---:|---:|---|---|
{chr(10).join(fits)}

## Limits

Whole fits gain less than densities and steps do. A step of the optimiser is no graph: compiled, a step of SOAP took 1.5
in place of 1.8 ms, since most of it is products of matrices. In a check what is left are draws of the guide, and the
first calls of each function, which are recorded and compared.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=[*targets.STEM, "random_slopes"])
    parser.add_argument("--kinds", nargs="*", default=[*KINDS], choices=KINDS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    file = PAGE / "graph.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = {row.get("target") or row["kind"]: row for row in known}
    for name in (*arguments.targets, *arguments.kinds):
        rows[name] = measure(name) if name in arguments.targets else measure_steps(name)
        print(rows[name], flush=True)
        write("".join(f"{json.dumps(row)}\n" for row in rows.values()), file)
    posteriors, steps = ([row for row in rows.values() if key in row] for key in ("target", "kind"))
    write(page(posteriors, steps), PAGE / "graph.md")


if __name__ == "__main__":
    main()
