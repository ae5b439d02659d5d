"""Stability and final ELBO of guides in a plain loop of Pyro's ``SVI``, at several step sizes.

    python benchmarks/training.py --jobs 2                      # all parts, some hours on 2 cores
    python benchmarks/training.py hold --only conjugate neutra  # one part, some models
    python benchmarks/training.py elbo --seeds 0 --particles 1  # fewer runs
    python benchmarks/training.py --quick --out DIR             # two models, 25 steps: a smoke run

Each run is ``SVI(model, guide, optimiser({"lr": lr}), Trace_ELBO(particles))`` on a model of ``programs.py``, without
warm-up, clipping or decay.  Our guide is ``AutoFlow`` with its defaults, or ``AutoPlateFlow`` if local latents come in
minibatches.  Pyro's guides have their defaults.  On flat priors they start where ours start.  The parts:

*hold*: 150 steps with Adam and ClippedAdam at five step sizes.  The target is a largest loss after step 20 of at most 3
times that of ``AutoIAFNormal`` on the same seed.  That guide takes .6 s per step beyond 1,000 latents.  There, and if
its own run is not finite, ``AutoNormal`` replaces it.  Losses have an arbitrary constant and can be negative.  So the
ratios are those of excesses over a floor, which is the lowest loss that any guide reached on the model.

*elbo*: 1,000 steps with Adam, then the ELBO of 1,000 draws (200 if the model does not broadcast over draws).  The first
seed tries five step sizes, and each guide takes the best of them for the other seeds.

*short*: 1,000 fits of 40 steps, with seeds 0 to 999 spread over ten models.  All parameters must be finite after every
step.

*recipes*: as *hold*, for ``AutoFlow(model, flows.maf)`` and all other recipes without further arguments.

*ablation*: the default guide, and the earlier guide without centred networks and without a pace, each with one change.

A run ends if a loss is not finite, or if a call fails.  It is saved when it ends, and an interrupted benchmark
continues.  Remove ``training.csv`` after a change of a guide.  Writes ``docs/benchmarks/training.md`` and
``training.csv``, a row per run.
"""

import argparse
import csv
import functools
import io
import itertools
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import posteriors
import pyro
import torch
import training_ablation
from posteriors import Row, centred
from programs import PROGRAMS, Program
from pyro.infer import SVI
from pyro.infer.autoguide import AutoIAFNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from training_table import page

import pyro_flows as pf

LRS, OPTIMISERS, PARTICLES = (0.001, 0.003, 0.01, 0.03, 0.05), ("Adam", "ClippedAdam"), (1, 16)
STEPS = {"hold": 150, "elbo": 1000, "short": 40, "recipes": 150, "ablation": 150}
SEEDS = {"hold": range(5), "elbo": range(5), "short": range(1000), "recipes": range(3), "ablation": range(3)}
EARLY, LAST = 20, 20  # first steps to ignore, and last steps whose mean is the loss at the end
SLOW = 1000  # largest number of latents for AutoIAFNormal, which is slow beyond it
SHORT = (
    *("conjugate", "bayesian_regression", "neutra", "bnn", "stable", "lda", "eight_schools"),
    *("eight_schools_centered", "kidiq", "german_credit_sparse"),
)
RECIPES = (
    *("nice", "realnvp", "nsf", "flowpp", "iaf", "maf", "nsf_ar", "sospf", "bpf", "umnn", "naf", "bnaf"),
    *("gaussianization", "planar_flow", "radial_flow", "sylvester_flow", "residual_flow", "cnf", "ffjord"),
)
GRIDS = {  # the guides, models and step sizes of a part
    "recipes": (
        ("AutoIAFNormal", "AutoNormal", *RECIPES),
        ("conjugate", "eight_schools_centered", "kidiq"),
        (0.01, 0.03),
    ),
    "ablation": (tuple(training_ablation.VARIANTS), training_ablation.MODELS, training_ablation.LRS),
}
QUICK = "conjugate", "eight_schools"
MEASURES = "latents", "ended", "worst", "end", "elbo", "elbo_se", "seconds", "failed"


class Run(NamedTuple):
    """Training run: the first columns of its row in ``training.csv``."""

    part: str
    model: str
    guide: str
    optimiser: str
    lr: float
    particles: int
    seed: int
    steps: int

    @property
    def key(self) -> tuple[str, ...]:
        """The fields as text, as in the file."""
        return tuple(map(str, self))


def ours(program: Program) -> Any:
    """Return our default guide for a program."""
    if program.plate:
        return pf.AutoPlateFlow(program.guided, program.plate, encoder=program.encoder and program.encoder())
    return pf.AutoFlow(program.guided)


def startable(program: Program) -> Any:
    """Return the model for Pyro's guides, which need a start if a prior is flat."""
    return centred(program.guided) if program.flat else program.guided


def of_recipe(name: str, program: Program) -> Any:
    """Return our guide with the flow of a recipe."""
    return pf.AutoFlow(program.guided, getattr(pf.flows, name))


GUIDES: dict[str, Callable[[Program], Any]] = {
    "AutoFlow": ours,
    "AutoPlateFlow": ours,
    "AutoIAFNormal": lambda program: AutoIAFNormal(startable(program)),
    "AutoNormal": lambda program: AutoNormal(startable(program)),
    "AutoMultivariateNormal": lambda program: AutoMultivariateNormal(startable(program)),
    "AutoLowRankMultivariateNormal": lambda program: AutoLowRankMultivariateNormal(startable(program)),
    "own guide": lambda program: program.own_guide,
    **{name: functools.partial(of_recipe, name) for name in RECIPES},
}


def load(name: str) -> Program:
    """Build a program under its own default dtype."""
    logging.getLogger("pyro").setLevel(logging.WARNING)  # Pyro logs every guess of max_plate_nesting
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float32)
    program = PROGRAMS[name]()
    if program.dtype is torch.float32:
        return program
    torch.set_default_dtype(program.dtype)
    return PROGRAMS[name]()


def contenders(name: str, part: str) -> list[str]:
    """Return the guides that a part of the benchmark trains on a model."""
    program = load(name)
    if program.own_guide:
        return ["AutoPlateFlow", "own guide"]
    guides = ["AutoFlow"]
    if pf.AutoFlow(program.guided).setup(*program.args, **program.kwargs).latent_dim <= SLOW:
        guides.append("AutoIAFNormal")
    guides.append("AutoNormal")
    if part == "elbo" and program.scalable:
        guides += ["AutoMultivariateNormal", "AutoLowRankMultivariateNormal"]
    return guides


def runs(part: str, options: argparse.Namespace, rows: list[Row]) -> Iterator[Run]:
    """Yield the runs of a part, fewer particles and first seeds first, as far as rows determine the step sizes."""
    steps = options.steps or STEPS[part]
    seeds = SEEDS[part] if options.seeds is None else options.seeds
    if part == "short":
        for seed in seeds:
            name = SHORT[seed % len(SHORT)]
            if name in options.only:
                yield Run(part, name, "AutoFlow", "Adam", 0.01, 1, seed, steps)
        return
    if part in GRIDS:
        labels, names, lrs = GRIDS[part]
        for seed, name, label, lr in itertools.product(seeds, names, labels, lrs):
            if name in options.only and lr in options.lrs:
                variant = training_ablation.VARIANTS.get(label)
                yield Run(part, name, label, "Adam", lr, variant.particles if variant else 1, seed, steps)
        return
    guides = {name: contenders(name, part) for name in options.only}
    optimisers = options.optimisers if part == "hold" else OPTIMISERS[:1]
    for particles, seed, name in itertools.product(options.particles, seeds, options.only):
        for guide, optimiser in itertools.product(guides[name], optimisers):
            tried = [Run(part, name, guide, optimiser, lr, particles, seeds[0], steps) for lr in options.lrs]
            lrs = options.lrs if part == "hold" or seed == seeds[0] else best(tried, rows)
            for lr in lrs:
                yield Run(part, name, guide, optimiser, lr, particles, seed, steps)


def best(tried: list[Run], rows: list[Row]) -> list[float]:
    """Return a list of the step size with the highest ELBO, or an empty list while a run has no row."""
    elbos = {key_of(row): float(row["elbo"] or "-inf") for row in rows if row["part"] == "elbo"}
    if any(run.key not in elbos for run in tried):
        return []
    return [max(tried, key=lambda run: elbos[run.key]).lr]


def measure(run: Run) -> Row:
    """Train one guide and return its row; the part *elbo* also estimates the ELBO."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    pyro.clear_param_store()
    found: dict[str, Any] = dict(zip(Run._fields, run.key, strict=True))
    start = time.perf_counter()
    try:
        program = load(run.model)
        pyro.set_rng_seed(run.seed)
        build = training_ablation.build(run.guide) if run.part == "ablation" else GUIDES[run.guide]
        guide = build(program)
        losses, failed = train(run, program, guide)
        finite = len(losses) == run.steps
        found |= {"latents": getattr(guide, "latent_dim", ""), "ended": len(losses), "failed": failed}
        found["worst"] = max(losses[EARLY:], default=math.nan) if finite else math.inf
        found["end"] = statistics.fmean(losses[-LAST:]) if losses else math.nan
        if run.part == "elbo":
            found["elbo"], found["elbo_se"] = elbo(program, guide) if finite else (-math.inf, math.nan)
    except Exception as error:
        found["failed"] = message(error)
    found["seconds"] = round(time.perf_counter() - start, 2)
    return {key: f"{value:.7g}" if isinstance(value, float) else str(value) for key, value in found.items()}


def message(error: Exception) -> str:
    """Return an error as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def train(run: Run, program: Program, guide: Any) -> tuple[list[float], str]:
    """Return the losses up to the first one that is not finite, and the error that ended the run, if any."""
    optimiser = getattr(pyro.optim, run.optimiser)({"lr": run.lr})
    vectorised = program.batched and run.particles > 1
    objective = program.elbo(num_particles=run.particles, vectorize_particles=vectorised)
    svi = SVI(program.model, guide, optimiser, objective)
    batches = program.batches() if program.batches else itertools.repeat(program.args)
    losses: list[float] = []
    for args in itertools.islice(batches, run.steps):
        try:
            loss = svi.step(*args, **program.kwargs)
        except Exception as error:
            return losses, message(error)
        every = run.part == "short" or len(losses) == run.steps - 1
        if not math.isfinite(loss) or (every and not finite_parameters()):
            break
        losses.append(loss)
    return losses, ""


def finite_parameters() -> bool:
    """True if all parameters in Pyro's store are finite."""
    return all(bool(value.isfinite().all()) for _, value in pyro.get_param_store().named_parameters())


@torch.no_grad()
def elbo(program: Program, guide: Any) -> tuple[float, float]:
    """Return the ELBO and its standard error, with sums over draws in double precision."""
    together, repeats = (50, 20) if program.batched else (1, 200)
    objective = program.elbo(num_particles=together, vectorize_particles=together > 1)
    found = [-objective.loss(program.model, guide, *program.args, **program.kwargs) for _ in range(repeats)]
    if not all(map(math.isfinite, found)):
        return -math.inf, math.nan
    return statistics.fmean(found), statistics.stdev(found) / math.sqrt(repeats)


def text_of(rows: Iterable[Row], header: bool) -> str:
    """Return rows as lines of ``training.csv``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (*Run._fields, *MEASURES), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def append(row: Row, path: Path) -> None:
    """Append a row to the file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        file.write(text_of([row], header=new))


def key_of(row: Row) -> tuple[str, ...]:
    """Return the key of the run of a row."""
    return tuple(row[name] for name in Run._fields)


def whole(path: Path) -> list[Row]:
    """Return the rows of the file, after removing an incomplete last line."""
    if path.exists() and not (text := path.read_text()).endswith("\n"):
        posteriors.write(text[: text.rfind("\n") + 1], path)
    return posteriors.read(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"parts to run, of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--only", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS), metavar="MODEL")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        help="seeds (default: 0 to 4 for hold and elbo, 0 to 999 for short, 0 to 2 for recipes and ablation); the "
        "first one of elbo tries all step sizes",
    )
    parser.add_argument("--lrs", nargs="+", type=float, default=LRS, help="step sizes of all parts except short")
    parser.add_argument("--particles", nargs="+", type=int, default=PARTICLES, help="particles of hold and elbo")
    parser.add_argument("--optimisers", nargs="+", default=OPTIMISERS, choices=OPTIMISERS, help="optimisers of hold")
    parser.add_argument("--steps", type=int, help=f"steps per run (default: {STEPS})")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one thread each")
    parser.add_argument("--out", type=Path, default=posteriors.OUT, help="folder of the two files")
    parser.add_argument("--quick", action="store_true", help="smoke run: two models, 25 steps; needs --out")
    options = parser.parse_args()
    if options.quick:
        if options.out == posteriors.OUT:
            parser.error("--quick needs --out, because its figures are not results. Add --out DIR.")
        options.only, options.seeds, options.lrs, options.particles = [*QUICK], [0], [0.01], [1]
        options.steps = 25
    if unknown := set(options.part) - set(STEPS):
        parser.error(f"part must be one of {', '.join(STEPS)}, got {unknown.pop()}.")
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "training.csv"
    while wanted := missing(options, whole(results)):
        print(f"{len(wanted)} runs", flush=True)
        for row in posteriors.side_by_side(measure, [(run,) for run in wanted], options.jobs):
            append(row, results)
    rows = sorted(whole(results), key=place)
    posteriors.write(text_of(rows, header=True), results)
    posteriors.write(page(rows), options.out / "training.md")


def missing(options: argparse.Namespace, rows: list[Row]) -> list[Run]:
    """Return the requested runs without a row whose step sizes are known."""
    done = {key_of(row) for row in rows}
    return [run for part in options.part or STEPS for run in runs(part, options, rows) if run.key not in done]


def place(row: Row) -> tuple[Any, ...]:
    """Return the place of a row in the file: by part, model and guide, and then by the numbers."""
    names = *STEPS, *PROGRAMS, *GUIDES, *training_ablation.VARIANTS
    words = (names.index(row[name]) for name in ("part", "model", "guide"))
    return *words, row["optimiser"], *(float(row[name]) for name in ("lr", "particles", "seed", "steps"))


if __name__ == "__main__":
    main()
