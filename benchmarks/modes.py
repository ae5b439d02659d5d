"""Does ``pf.anneal`` find all modes, and the evidence?  A comparison with pocoMC.

    python benchmarks/modes.py                              # every target, both samplers, three seeds
    python benchmarks/modes.py --samplers anneal            # without pocoMC
    python benchmarks/modes.py --targets forty two-50 --seeds 0
    python benchmarks/modes.py --quick --out DIR            # one target, few particles: a smoke run
    python benchmarks/modes.py --truth                      # check the known answers, a minute of one core

Both samplers have their defaults.  The model has double precision.  Each target of ``mode_targets.py`` divides space
into regions, one for each mode.  A region is found if it has at least half of its share among the weighted draws.  The
total variation is half the sum of the errors of the shares.  The error of log Z is given in nats and in standard
errors, which combine the sampler's own and that of the known value.  The price is the number of points at which the
model is evaluated, with or without its gradient.  For ``pf.anneal`` it includes the fit of the guide.

``pf.anneal`` also returns a guide.  Of its unweighted draws, 20,000 are measured in the same way.  The reported weights
of modes are compared with the known shares, in the standard errors that ``pf.anneal`` states.

Each run is saved when it ends.  A second call resumes a stopped benchmark and repeats the runs that failed.  pocoMC may
be installed in another environment with Pyro: pass its Python as ``--peer-python``.  Writes ``modes.csv`` and
``modes.md`` into ``docs/benchmarks``.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mode_peers
import mode_targets
import pyro
import targets
import torch
from mode_targets import ModeTarget
from posteriors import read, side_by_side, write, write_csv
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from targets import Draws
from torch import Tensor

import pyro_flows as pf

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
NAMES = mode_targets.NAMES + targets.NAMES
SAMPLERS, SEEDS = ("anneal", "pocoMC"), (0, 1, 2)
GUIDE_DRAWS, QUICK_PARTICLES = 20_000, 200
MEASURES = (
    "found",
    "of",
    "variation",
    "worst",
    "log_evidence",
    "log_evidence_se",
    "error",
    "z",
    "draws",
    "ess",
    "modes",
    "mode_z",
    "guide_found",
    "guide_variation",
    "guide_worst",
    "temperatures",
    "evaluations",
    "cpu_seconds",
    "seconds",
    "failed",
)

Row = dict[str, str]


class Counter(Messenger):
    """Handler that counts the points at which a model is evaluated, by the values of its first latent."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.site = 0, ""

    def _pyro_post_sample(self, message: dict[str, Any]) -> None:
        if site_is_subsample(message):
            return
        self.site = self.site or message["name"]
        if message["name"] == self.site:
            event = math.prod(message["value"].shape[message["value"].dim() - len(message["fn"].event_shape) :])
            self.count += message["value"].numel() // max(1, event)


def counted(model: Callable[[], None]) -> tuple[Callable[[], None], Counter]:
    """Return a model that counts its evaluations, and the counter."""
    counter = Counter()

    def counting() -> None:
        with counter:
            model()

    return counting, counter


def of_regions(target: ModeTarget, draws: Draws, log_weights: Tensor) -> dict[str, float]:
    """Return how many regions the draws find, and the errors of their shares."""
    number = len(target.shares)
    if not number:
        return {}
    shares = torch.zeros(number).index_add(0, target.regions(draws), log_weights.exp())
    errors = (shares - target.shares).abs()
    found = int((shares >= target.shares / 2).sum())
    return {"found": found, "variation": float(errors.sum()) / 2, "worst": float(errors.max())}


def of_evidence(target: ModeTarget, log_evidence: float, error: float) -> dict[str, float]:
    """Return log Z, its stated standard error, and the distance from the known value."""
    difference = log_evidence - target.log_evidence
    both = math.hypot(error, target.error)
    found = {"log_evidence": log_evidence, "log_evidence_se": error, "error": difference}
    return {**found, "z": difference / both} if both > 0 else found


def of_modes(target: ModeTarget, modes: list[Any]) -> dict[str, float]:
    """Return the number of reported modes, and the largest error of their weights in stated standard errors."""
    number = len(target.shares)
    if not number or not modes:
        return {"modes": len(modes)}
    places = {name: torch.stack([torch.as_tensor(mode.place[name]) for mode in modes]) for name in modes[0].place}
    region = target.regions(places)
    weights, errors = (torch.tensor([float(getattr(mode, k)) for mode in modes]) for k in ("weight", "weight_se"))
    weight = torch.zeros(number).index_add(0, region, weights)
    error = torch.zeros(number).index_add(0, region, errors.square()).sqrt()
    z = (weight - target.shares).abs() / error
    return {"modes": len(modes), "mode_z": float(z[error > 0].max()) if (error > 0).any() else math.nan}


def of_draws(log_weights: Tensor) -> dict[str, float]:
    return {"draws": len(log_weights), "ess": float(1 / log_weights.exp().square().sum())}


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Return the result of a call, with its wall time and its CPU time in seconds."""
    clock, processor = time.perf_counter(), time.process_time()
    found = call()
    return found, {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}


def anneal(target: ModeTarget, seed: int, quick: bool) -> dict[str, Any]:
    """Run ``pf.anneal`` on a target and measure what it returns."""
    model, counter = counted(target.model)
    settings = {"num_particles": QUICK_PARTICLES} if quick else {}
    found, row = timed(lambda: pf.anneal(model, progress=False, **settings))
    row["evaluations"] = counter.count
    draws, log_weights = found.draws, found.log_weights.double()
    row |= of_regions(target, draws, log_weights) | of_draws(log_weights)
    row |= of_evidence(target, float(found.log_evidence), float(found.log_evidence_se))
    row |= of_modes(target, list(found.modes)) | {"temperatures": len(found.temperatures)}
    if len(target.shares):
        equal = torch.full((GUIDE_DRAWS,), -math.log(GUIDE_DRAWS))
        own = of_regions(target, found.guide.sample(GUIDE_DRAWS), equal)
        row |= {f"guide_{key}": value for key, value in own.items()}
    return row


def pocomc(target: ModeTarget, seed: int, quick: bool) -> dict[str, Any]:
    """Run pocoMC on a target and measure what it returns."""
    model, counter = counted(target.model)
    found, row = timed(lambda: mode_peers.pocomc(model, seed, quick))
    row["evaluations"] = counter.count
    row |= of_regions(target, found.draws, found.log_weights) | of_draws(found.log_weights)
    return row | of_evidence(target, found.log_evidence, found.error)


def measure(name: str, sampler: str, seed: int, quick: bool, python: str) -> Row:
    """Run one sampler on one target, and return a row of results, or of the reason of a failure."""
    if sampler != "anneal" and python != sys.executable:
        return elsewhere(name, sampler, seed, quick, python)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pyro.enable_validation(False)
    pyro.clear_param_store()
    row: dict[str, Any] = {"target": name, "sampler": sampler, "seed": str(seed)}
    start = time.perf_counter()
    try:
        target = mode_targets.load(name)
        row["of"] = len(target.shares)
        pyro.set_rng_seed(seed)
        row |= (anneal if sampler == "anneal" else pocomc)(target, seed, quick)
    except Exception as error:
        row["seconds"] = time.perf_counter() - start
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in row.items()}


def elsewhere(name: str, sampler: str, seed: int, quick: bool, python: str) -> Row:
    """Run ``measure`` with another Python."""
    command = [python, __file__, "--row", json.dumps([name, sampler, seed, quick])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"target": name, "sampler": sampler, "seed": str(seed), "failed": reason[:200]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def middle(rows: list[Row]) -> dict[str, float]:
    """Return the median of every measure, and the largest error of log Z."""
    columns = {k: [float(r[k]) for r in rows if r.get(k)] for k in MEASURES if k != "failed"}
    found = {key: statistics.median(values) for key, values in columns.items() if values}
    for key in ("error", "z"):
        if columns[key]:
            found[key] = max(columns[key], key=abs)
    return found


HEAD = """\
# Modes

This page is for users whose posteriors have several modes. It compares `pyro_flows.anneal` with pocoMC, both with their
defaults, on posteriors with known modes, shares and evidence. {summary} Reproduce with
`python benchmarks/modes.py`.

Versions: torch {torch}, Pyro {pyro}, Python {python}.

* *found*: the modes that have at least half of their share among the weighted draws; the smallest number of all seeds.
* *TV*: the total variation between the estimated and the known shares of the modes.
* *guide found*, *guide TV*: the same for unweighted draws of the guide that `anneal` returns.
* *log Z*: the known value.
* *log Z error*: the largest error of all seeds, in nats.
* *s.e.*: the standard error that the sampler states.
* *error / s.e.*: the largest error in standard errors, which combine the sampler's and that of the known value.
* *evaluations*: the points at which the model is evaluated. The fit of the guide is included.
* *CPU s*: CPU time of one thread.

Columns without another rule are medians of the seeds. –: the sampler has no guide, or the modes are not known.

"""
TITLES = "target", "D", "sampler", "seeds", "found", "TV", "guide found", "guide TV", "log Z", "log Z error", "s.e."
TITLES_AFTER = "error / s.e.", "evaluations", "CPU s"


def summary(rows: list[Row]) -> str:
    """Return how often each sampler finds all modes."""
    parts = []
    for sampler in SAMPLERS:
        known = [row for row in rows if row["sampler"] == sampler and row.get("found")]
        complete = sum(row["found"] == row["of"] for row in known)
        parts.append(f"{sampler} in {complete} of {len(known)} runs")
    return f"All modes are found by {' and by '.join(parts)} with known modes."


def table(rows: list[Row]) -> str:
    """Return the results as Markdown."""
    versions = {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}
    titles = TITLES + TITLES_AFTER
    rule = "|---|---:|---|" + "---:|" * (len(titles) - 3)
    lines = ["| " + " | ".join(titles) + " |", rule]
    for name in NAMES:
        for sampler in SAMPLERS:
            mine = [r for r in rows if (r["target"], r["sampler"]) == (name, sampler)]
            if mine:
                lines.append("| " + " | ".join(cells(name, sampler, mine)) + " |")
    return HEAD.format(**versions, summary=summary(rows)) + "\n".join(lines) + "\n"


def cells(name: str, sampler: str, rows: list[Row]) -> list[str]:
    """Return the cells of one target and sampler."""
    target, good = mode_targets.load(name), [r for r in rows if not r.get("failed")]
    head = [name, str(target.dim), f"**{sampler}**" if sampler == "anneal" else sampler, str(len(good))]
    if not good:
        reason = rows[0]["failed"].replace("|", "/")[:80]
        return [*head, f"failed: {reason}", *[""] * (len(TITLES + TITLES_AFTER) - len(head) - 1)]
    m = middle(good)

    def cell(key: str, form: str) -> str:
        return f"{m[key]:{form}}" if key in m else "–"

    def share(key: str) -> str:
        values = [int(r[key]) for r in good if r.get(key)]
        return f"{min(values)} of {len(target.shares)}" if values else "–"

    modes = [share("found"), cell("variation", ".3f"), share("guide_found"), cell("guide_variation", ".3f")]
    log_z = [f"{target.log_evidence:.3f}", cell("error", "+.3f"), cell("log_evidence_se", ".3f"), cell("z", "+.1f")]
    return [*head, *modes, *log_z, cell("evaluations", ",.0f"), cell("cpu_seconds", ".0f")]


def save(rows: list[Row], out: Path) -> None:
    """Write the rows as CSV and as Markdown, in the order of targets, samplers and seeds."""
    rows.sort(key=lambda r: (NAMES.index(r["target"]), SAMPLERS.index(r["sampler"]), int(r["seed"])))
    write_csv(rows, ["target", "sampler", "seed", *MEASURES], out / "modes.csv")
    write(table(rows), out / "modes.md")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one thread each")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the two files")
    parser.add_argument("--quick", action="store_true", help="one target, one seed, few particles: needs --out")
    parser.add_argument("--peer-python", default=sys.executable, help="Python of an environment with pocoMC and Pyro")
    parser.add_argument("--truth", action="store_true", help="check the known answers; run no sampler")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # used by ``elsewhere``
    options = parser.parse_args()
    if options.quick:
        if options.out == OUT:
            parser.error("--quick needs --out, so that its figures do not replace the results")
        options.targets, options.seeds = ["two-2"], [0]
    return options


def main() -> None:
    options = parse()
    if options.row:
        print(json.dumps(measure(*json.loads(options.row), sys.executable)))
        return
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    if options.truth:
        torch.set_num_threads(1)
        for name in (name for name in options.targets if name in mode_targets.NAMES):
            pyro.set_rng_seed(0)
            print("\n".join(mode_targets.report(name, 400_000)), flush=True)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if set(options.targets) & set(targets.NAMES):
        targets.folder()  # fail before the first run, not after hours
    rows = [row for row in read(options.out / "modes.csv") if not row.get("failed")]
    done = {(r["target"], r["sampler"], int(r["seed"])) for r in rows}
    wanted = [(name, kind, seed) for seed in options.seeds for name in options.targets for kind in options.samplers]
    tasks = [(*key, options.quick, options.peer_python) for key in wanted if key not in done]
    for row in side_by_side(measure, tasks, options.jobs):
        rows.append(row)
        save(rows, options.out)


if __name__ == "__main__":
    main()
