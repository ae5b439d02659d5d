"""What do continuous flows, ours and zuko's, cost and gain, compared with splines?

    python benchmarks/continuous.py                         # all parts, about an hour on 2 cores
    python benchmarks/continuous.py --only steps            # planes, magic, posteriors or steps
    python benchmarks/continuous.py --quick --out DIR       # few steps: a smoke run

*Planes*: eight Gaussians, a checkerboard and two spirals, with 20,000 training rows and 10,000 test rows.

*Magic*: the table of ``tables.py``.

*Posteriors*: two posteriors of ``posteriors.py``, with the flow inside an ``AutoFlow``.

The continuous flows of a part have the same field, with three Fourier modes of time and SiLU.  Fits by likelihood have
the same tolerances (1e-5 relative, 1e-6 absolute), steps and step sizes.  zuko's flow is wrapped as one of our
transforms.  Flow matching takes more and shorter steps.

Reported are test nats and training time.  Three more figures use the defaults of each library: the evaluations of the
field per density, the time of 10,000 densities, and the round trip, which is the largest |x' - x| / (1 + |x|).

*Steps*: the time of a training step, with equal fields, solvers, tolerances and rows.  Our steps and zuko's alternate.

Each fit has one thread, and times are seconds of its core.  An interrupted run resumes after its last fit.  Writes
``continuous.csv`` and ``continuous.md`` into ``docs/benchmarks``.
"""

import argparse
import csv
import functools
import io
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pyro
import targets
import torch
import zuko
from posteriors import write
from tables import Foreign, read_table
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.flows import Flow
from pyro_flows.objectives import FlowMatching, Likelihood
from pyro_flows.training import Training
from pyro_flows.transforms import Continuous, Solver

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
ROWS, TEST, DRAWS = 20_000, 10_000, 10_000
TOLERANCES = {"rtol": 1e-5, "atol": 1e-6}  # the defaults of zuko
STEPS = {"planes": 1000, "magic": 600, "posteriors": 300}  # by likelihood
MATCHED = {"planes": 15_000, "magic": 10_000}
WIDTHS = {"planes": (64, 64, 64), "magic": (128, 128), "posteriors": (64, 64)}
FIELDS = (
    *("part", "data", "model", "nats", "two_se", "khat", "steps", "seconds"),
    *("evaluations", "scoring", "round_trip", "ours", "zuko"),
)
PENALTY = 0.02

Row = dict[str, str]
Label = tuple[str, str, str]


# ------------------------------------------------------------ data


def eight_gaussians(number: int, generator: torch.Generator) -> Tensor:
    angles = torch.randint(0, 8, (number,), generator=generator) * math.pi / 4
    return 2.83 * torch.stack((angles.cos(), angles.sin()), -1) + 0.354 * torch.randn(number, 2, generator=generator)


def checkerboard(number: int, generator: torch.Generator) -> Tensor:
    """Return rows from the uniform distribution over eight squares of side 2."""
    x, y = torch.rand(2, number, generator=generator)
    column, row = (4 * x).floor(), torch.randint(0, 2, (number,), generator=generator)
    return torch.stack((8 * x - 4, 2 * y + 4 * row - 4 + 2 * (column % 2)), -1)


def spirals(number: int, generator: torch.Generator) -> Tensor:
    angle = 3 * math.pi * torch.rand(number, generator=generator).sqrt()
    arm = 2 * torch.randint(0, 2, (number,), generator=generator) - 1
    points = torch.stack((-angle.cos(), angle.sin()), -1) * (arm * angle / 3).unsqueeze(-1)
    return points + 0.1 * torch.randn(number, 2, generator=generator)


PLANES = {"eight Gaussians": eight_gaussians, "checkerboard": checkerboard, "spirals": spirals}
ENTROPY = {"eight Gaussians": "2.84", "checkerboard": "3.47"}  # lower bounds on the test nats


def data_of(name: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return training rows, held-out rows if the data have any, and test rows."""
    if name in PLANES:
        source = torch.Generator().manual_seed(0)
        return PLANES[name](ROWS, source), None, PLANES[name](TEST, source)
    table = read_table(name)
    return table.train, table.validation, table.test


# ------------------------------------------------------------ flows


def cnf(part: str, dim: int) -> Flow:
    return flows.cnf(dim, hidden_dims=WIDTHS[part], solver=Solver(**TOLERANCES))


def of_zuko(part: str, dim: int) -> Flow:
    flow = zuko.flows.CNF(dim, hidden_features=WIDTHS[part], activation=nn.SiLU, **TOLERANCES)
    return Flow([Foreign(flow.transform, dim, 0, "zuko")])


def nsf(part: str, dim: int) -> Flow:
    return flows.nsf(dim)


BUILDERS: dict[str, Callable[[str, int], Flow]] = {
    "cnf": cnf,
    "cnf, penalties": cnf,
    "cnf, flow matching": cnf,
    "cnf, flow matching, optimal pairs": cnf,
    "zuko CNF": of_zuko,
    "nsf": nsf,
}


def fit_rows(part: str, data: str, model: str, quick: bool) -> Row:
    """Fit a flow to training rows, and score test rows."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    train, validation, test = data_of(data)
    flow = BUILDERS[model](part, train.shape[1])
    matched = "matching" in model
    size = 512 if matched or model == "nsf" else 256
    steps = MATCHED[part] if matched else 3 * STEPS[part] if model == "nsf" else STEPS[part]
    steps = steps // 2 if "optimal" in model else steps  # optimal pairs take longer per step
    objective: nn.Module = Likelihood()
    if matched:
        objective = FlowMatching(pairing="optimal" if "optimal" in model else "independent")
    elif "penalties" in model:
        objective = Likelihood(kinetic=PENALTY, jacobian=PENALTY)
    epochs = 1 if quick else round(steps / ((len(train) if validation is not None else 0.9 * len(train)) // size))
    start = time.process_time()
    fit = pf.fit_density(
        flow,
        train,
        training=Training(
            validation=validation,
            objective=objective,
            patience=epochs if part == "planes" else 20,
            ema_decay=0.999 if matched else 0.99,
            heavy_tails=False,
        ),
        max_epochs=epochs,
        batch_size=size,
        lr=2e-2 if matched else 8e-3 if model == "nsf" else 1e-2,
        progress=False,
    )
    seconds = time.process_time() - start
    return {"steps": str(fit.steps), "seconds": f"{seconds:.0f}", **judged(flow, test)}


@torch.no_grad()
def judged(flow: Flow, x: Tensor) -> Row:
    """Return test nats, and the cost of a density with the defaults of each library."""
    for part in flow.transforms:
        if isinstance(part, Continuous):
            part.solver = Solver()
    counts = counted(flow)
    start = time.process_time()
    values = -flow.log_prob(x)
    scoring = (time.process_time() - start) * TEST / len(x)
    evaluations = counts[0]
    z = x
    for part in reversed(flow.transforms):
        z, _ = part.inverse_and_log_det(z)
    for part in flow.transforms:
        z, _ = part.forward_and_log_det(z)
    trip = ((z - x).abs() / (1 + x.abs())).max()
    return {
        "nats": f"{values.mean():.3f}",
        "two_se": f"{2 * values.std() / len(values) ** 0.5:.3f}",
        "evaluations": str(evaluations) if evaluations else "",
        "scoring": f"{scoring:.2f}",
        "round_trip": f"{trip:.0e}",
    }


def counted(flow: Flow) -> list[int]:
    """Return a list that counts the evaluations of the fields of a flow from now on."""
    counts = [0]

    def add(*_: object) -> None:
        counts[0] += 1

    for part in flow.transforms:
        if isinstance(part, Continuous):
            part.field.output.register_forward_hook(add)
        elif isinstance(part, Foreign):
            part.module.ode.register_forward_hook(add)
    return counts


def fit_posterior(part: str, data: str, model: str, quick: bool) -> Row:
    """Fit a guide to a posterior, and weight its draws."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    target = targets.load(data)
    guide = pf.AutoFlow(target.model, flow=functools.partial(BUILDERS[model], part))
    start = time.process_time()
    fit = pf.fit_svi(target.model, guide, steps=20 if quick else STEPS[part], progress=False)
    seconds = time.process_time() - start
    start = time.process_time()
    psis = pf.psis(target.model, guide, num_samples=1000 if quick else DRAWS)
    scoring = time.process_time() - start
    gap = targets.evidence(data) - psis.log_weights
    with torch.no_grad():
        more = judged(guide.flow, guide.flow().sample((DRAWS,)))
    return {
        **more,
        "nats": f"{gap.mean():.3f}",
        "two_se": f"{2 * gap.std() / len(gap) ** 0.5:.3f}",
        "khat": f"{psis.khat:.2f}",
        "steps": str(fit.steps),
        "seconds": f"{seconds:.0f}",
        "scoring": f"{scoring * DRAWS / len(gap):.2f}",
    }


# ------------------------------------------------------------ steps


def step_times(repetitions: int) -> list[Row]:
    """Return the milliseconds of a training step: 256 rows, two hidden layers of 64, zuko's weights in both flows."""
    rows = []
    for dim, exact in ((2, True), (10, True), (10, False)):
        torch.manual_seed(0)
        theirs = zuko.flows.CNF(dim, hidden_features=(64, 64), activation=nn.SiLU, exact=exact, **TOLERANCES)
        wrapped = Flow([Foreign(theirs.transform, dim, 0, "zuko")])
        adam = torch.optim.Adam(theirs.parameters(), 1e-2)
        for _ in range(3 if repetitions < 5 else 60):
            step(wrapped, bent(dim))
            adam.step()
        contenders = {"ours": with_weights_of(theirs, dim, exact), "zuko": wrapped}
        x, times = bent(dim), {name: [] for name in contenders}
        for _ in range(repetitions + 1):
            for name, flow in contenders.items():
                start = time.perf_counter()
                step(flow, x)
                times[name].append(time.perf_counter() - start)
        found = {name: f"{1e3 * statistics.median(values[1:]):.0f}" for name, values in times.items()}
        rows.append({"part": "steps", "data": f"D = {dim}", "model": "exact" if exact else "estimated", **found})
    return rows


def bent(dim: int, number: int = 256) -> Tensor:
    """Return a banana in two features; the scales of the other features depend on the first."""
    z = torch.randn(number, dim)
    return torch.cat((z[:, :1], 0.5 * z[:, 1:2] + z[:, :1] ** 2 - 1, z[:, 2:] * (1 + 0.5 * z[:, :1].tanh())), -1)


def step(flow: Flow, x: Tensor) -> None:
    flow.zero_grad()
    (-flow.log_prob(x).mean()).backward()


def with_weights_of(theirs: Any, dim: int, exact: bool) -> Flow:
    """Return our flow with zuko's field, which maps data at time 0 to the base at time 1."""
    ours = flows.ffjord(dim, hidden_dims=(64, 64), exact=exact, solver=Solver(**TOLERANCES))
    field = ours.transforms[0].field
    first, second, last = (layer for layer in theirs.transform.ode if hasattr(layer, "weight"))
    with torch.no_grad():
        field.from_time.weight.copy_(first.weight[:, :6])
        field.hidden[0].weight.copy_(first.weight[:, 6:])
        field.hidden[0].bias.copy_(first.bias)
        for mine, its in ((field.hidden[1], second), (field.output, last)):
            mine.load_state_dict(its.state_dict())
    flow = ours.inv
    if exact:  # both flows have the same density, up to the tolerances
        x = bent(dim)
        assert (flow.log_prob(x) - theirs().log_prob(x)).abs().max() < 0.01
    return flow


# ------------------------------------------------------------ report

COLUMNS = {
    "nats": "nats",
    "khat": "k-hat",
    "steps": "steps",
    "seconds": "training, s",
    "evaluations": "evaluations",
    "scoring": "10,000 densities, s",
    "round_trip": "round trip",
}
TITLES = {
    "planes": (
        "Planes",
        "*nats*: the mean of -log p over 10,000 test rows, ± 2 standard errors. Fields have three hidden layers of 64, "
        f"and the training set has 20,000 rows. *penalties*: kinetic and Jacobian, {PENALTY} each.",
    ),
    "magic": ("Magic", "The table has ten features. Fields have two hidden layers of 128."),
    "posteriors": (
        "Posteriors",
        f"*nats*: log Z - ELBO, ± 2 standard errors, from {DRAWS:,} draws. All flows take the same number of steps. "
        "Fields have two hidden layers of 64. *10,000 densities*: draws, with the densities of guide and model.",
    ),
}


def save(rows: list[Row], out: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write(text.getvalue(), out / "continuous.csv")
    write(page(rows), out / "continuous.md")


def summary(rows: list[Row]) -> str:
    """Return the main results in two sentences."""
    tables: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["part"] in ("planes", "magic"):
            tables.setdefault(row["data"], {})[row["model"]] = float(row["nats"])
    best = sum(min(nats, key=lambda model: nats[model]) == "nsf" for nats in tables.values())
    ratios = [float(row["ours"]) / float(row["zuko"]) for row in rows if row["part"] == "steps"]
    if not (tables and ratios):
        return "Some parts have not been run."
    return (
        f"`nsf` has the lowest test nats on {best} of {len(tables)} tables. A training step of `cnf` takes "
        f"{min(ratios):.2f} to {max(ratios):.2f} times as long as zuko's."
    )


def page(rows: list[Row]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Continuous flows",
        "",
        "This page is for users who consider a continuous flow. It compares our `cnf`, zuko's CNF and our spline flow "
        f"`nsf` on small tables and posteriors. {summary(rows)} Reproduce with `python benchmarks/continuous.py`.",
        "",
        f"Each fit runs once, on one core ({platform.machine()}, torch {torch.__version__}, zuko {zuko.__version__}). "
        "Rows of `cnf` and of zuko's CNF are trained by likelihood unless they name another method. *evaluations*: how "
        "often a density evaluates the field. *round trip*: the largest `|x' - x| / (1 + |x|)`, where x' is x after "
        "both directions.",
    ]
    for part, (title, text) in TITLES.items():
        mine = [row for row in rows if row["part"] == part]
        shown = [key for key in COLUMNS if any(row.get(key) for row in mine)]
        if mine:
            lines += ["", f"## {title}", "", text]
        for data in dict.fromkeys(row["data"] for row in mine):
            known = f" (lower bound {ENTROPY[data]})" if data in ENTROPY else ""
            lines += ["", f"**{data}**{known}", "", f"| flow | {' | '.join(COLUMNS[key] for key in shown)} |"]
            lines.append("|---|" + "---:|" * len(shown))
            for row in (row for row in mine if row["data"] == data):
                cells = [f"{row[key]} ± {row['two_se']}" if key == "nats" else row.get(key, "") for key in shown]
                lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    if times := [row for row in rows if row["part"] == "steps"]:
        lines += ["", "## Training steps", "", "Medians of alternating steps, 256 rows, two hidden layers of 64.", ""]
        lines += ["| features | divergence | ours, ms | zuko, ms | ratio |", "|---|---|---:|---:|---:|"]
        for row in times:
            ratio = float(row["ours"]) / float(row["zuko"])
            lines.append(f"| {row['data']} | {row['model']} | {row['ours']} | {row['zuko']} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def label_of(row: Row) -> Label:
    return row["part"], row["data"], row["model"]


def alone() -> None:
    """Limit the process of a fit to one core."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["planes", "magic", "posteriors", "steps"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="parallel fits; default: one per core")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the files")
    parser.add_argument("--quick", action="store_true", help="few steps: needs --out")
    options = parser.parse_args()
    if options.quick and options.out == OUT:
        parser.error("--quick needs --out, so that its figures do not replace the results")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "continuous.csv"
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    jobs: dict[Label, Callable[..., Row]] = {("planes", d, m): fit_rows for d in PLANES for m in BUILDERS}
    jobs |= {("magic", "magic", m): fit_rows for m in ("cnf", "cnf, flow matching", "zuko CNF", "nsf")}
    jobs |= {
        ("posteriors", d, m): fit_posterior for d in ("eight_schools", "garch") for m in ("cnf", "zuko CNF", "nsf")
    }
    places = {label: place for place, label in enumerate(jobs)}
    done = set(map(label_of, rows))
    todo = {label: job for label, job in jobs.items() if label not in done and label[0] in options.only}
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), alone) as pool:
        fits = {pool.submit(job, *label, options.quick): label for label, job in todo.items()}
        for fit in as_completed(fits):
            try:
                rows.append(dict(zip(FIELDS, fits[fit], strict=False)) | fit.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            rows.sort(key=lambda row: places.get(label_of(row), len(places)))
            save(rows, options.out)
    if "steps" in options.only:
        alone()
        rows = [row for row in rows if row["part"] != "steps"] + step_times(2 if options.quick else 15)
        save(rows, options.out)


if __name__ == "__main__":
    main()
