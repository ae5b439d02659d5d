"""Test of the verdicts of ``check`` on good and bad fits, against reference answers.

    python benchmarks/trust.py                        # all parts, about two hours on 2 cores
    python benchmarks/trust.py --parts broken modes   # some parts
    python benchmarks/trust.py --quick --out DIR      # one target, few steps: a smoke run

The parts:

* *guides*: ``AutoFlow`` (three seeds) and Pyro's guides (one seed) on the posteriors of ``posteriors.py``, fitted as
  there.
* *broken*: guides that are wrong on purpose, and spline couplings that have collapsed into the neck of a funnel.
* *modes*: two Gaussians 8 sd apart, fitted by the plain ELBO, which keeps one.

The true errors are those of 100,000 draws against the reference: the worst error of a mean in sd, and the ratios of
sds.  If there is no reference, they are against importance-weighted draws of the default ``AutoFlow``.  A guide is
*well fitted* if its means are within .05 sd, its ratios within .95 to 1.05, and its k-hat below .7.  It is *accurate*
if its means are within .1 sd and its ratios within .9 to 1.1.  The folder of ``--fits`` keeps the fits for later runs.
Writes ``trust.csv`` and ``trust.md`` into ``docs/benchmarks``.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import posteriors
import pyro
import pyro.distributions as dist
import targets
import torch
from objectives import two_modes
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task

OUT = posteriors.OUT
FUNNEL, REGRESSION = "eight_schools_centered", "nes1972"
UNTRAINED = 30  # steps of a fit that stops too early
SLOW = "electric_1c_chr", "hepatitis"  # AutoNormalizingFlow takes up to 45 minutes on these
COLUMNS = (
    *("part", "target", "guide", "seed", "verdict", "khat", "drift", "low_seen", "high_seen", "missing", "worst_error"),
    *("low_sd", "high_sd", "fit_seconds", "check_seconds", "reason"),
)
Row = dict[str, Any]


# Fits, kept in a folder.


def build(model: Callable[[], None], guide_name: str) -> Any:
    """Return an untrained guide."""
    if guide_name == "AutoFlow":
        return pf.AutoFlow(model).setup()
    if guide_name == "splines":
        return pf.AutoFlow(model, functools.partial(pf.flows.nsf, num_transforms=6)).setup()
    guide = posteriors.PEERS[guide_name][0](model)
    guide()
    return guide


def fitted(name: str, guide_name: str, seed: int, steps: int | None, folder: Path) -> tuple[Any, Any, float]:
    """Return a target, its guide and the seconds of the fit; train the guide unless the folder has it."""
    posteriors.prepare(seed)
    target, path = targets.load(name), folder / f"{name}.{guide_name}.{seed}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        guide = build(target.model, guide_name)
        guide.load_state_dict(kept["state"])
        return target, guide, kept["seconds"]
    start = time.perf_counter()
    if guide_name == "splines":
        guide = build(target.model, guide_name)
        pf.fit_svi(target.model, guide, steps=steps, warm_start=False, progress=False)
    else:
        guide = posteriors.fit(target, guide_name, steps)
    seconds = time.perf_counter() - start
    torch.save({"state": {k: v.detach().clone() for k, v in guide.state_dict().items()}, "seconds": seconds}, path)
    return target, guide, seconds


def truth(target: targets.Target, guide: Any, steps: int | None, folder: Path, draws: int) -> Row:
    """Return the true errors of a guide's draws."""
    moments = {} if target.name in posteriors.UNRELATED else targets.reference_moments(target.name)
    if moments:
        ours = {k: v.numpy() for k, v in target.quantities(posteriors.draw(guide, draws)).items()}
        errors = [abs(ours[name].mean() - mean) / sd for name, (mean, sd) in moments.items()]
        ratios = [ours[name].std() / sd for name, (_, sd) in moments.items()]
    else:
        mean, sd = weighed_moments(target.name, steps, folder, draws)
        values = Density(Task(target.model, guide, (), {})).draw(draws).quantities
        errors = ((values.mean(0) - mean).abs() / sd).tolist()
        ratios = (values.std(0) / sd).tolist()
    return {"worst_error": float(max(errors)), "low_sd": float(min(ratios)), "high_sd": float(max(ratios))}


def weighed_moments(name: str, steps: int | None, folder: Path, draws: int) -> tuple[Tensor, Tensor]:
    """Return the means and standard deviations of all quantities, by weighted draws of the default guide."""
    path = folder / f"{name}.moments.pt"
    if not path.exists():
        target, guide, _ = fitted(name, "AutoFlow", 0, steps, folder)
        found = Density(Task(target.model, guide, (), {})).draw(draws)
        share = torch.softmax(found.log_p - found.log_q, 0).unsqueeze(-1)
        mean = (share * found.quantities).sum(0)
        torch.save((mean, (share * (found.quantities - mean).square()).sum(0).sqrt()), path)
    return torch.load(path, weights_only=True)


def judged(model: Callable[[], None], guide: Any) -> Row:
    """Return the row of ``check``, with its seconds."""
    torch.manual_seed(1)
    found = pf.check(model, guide)
    return {**seen(found), "check_seconds": found.seconds}


def seen(found: pf.Check) -> Row:
    """Return a check as a row."""
    low, high = found.sd_ratios
    row = {"verdict": found.verdict, "khat": found.khat, "drift": found.drift, "low_seen": low, "high_seen": high}
    return {**row, "missing": found.missing.share, "reason": found.reason}


# The parts.


def guides(name: str, guide_name: str, seed: int, steps: int | None, folder: Path, draws: int) -> list[Row]:
    """Return the row of a guide of the benchmark."""
    target, guide, seconds = fitted(name, guide_name, seed, steps, folder)
    found = {**judged(target.model, guide), "fit_seconds": seconds}
    return [{**found, **truth(target, guide, steps, folder, draws)}]


class Clipped(nn.Module):
    """Base distribution: the standard normal, truncated at 1.3 sd."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(dim))

    def forward(self) -> dist.TorchDistribution:
        return ClippedNormal(self.zeros)


class ClippedNormal(dist.TorchDistribution):
    """Standard normal, truncated at 1.3 sd in each dimension."""

    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.real_vector
    has_rsample = True
    bound = 1.3

    def __init__(self, zeros: Tensor) -> None:
        self.zeros, self.normal = zeros, torch.distributions.Normal(0.0, 1.0)
        self.low = self.normal.cdf(torch.tensor(-self.bound)).item()
        super().__init__(zeros.shape[:-1], zeros.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ClippedNormal:
        return ClippedNormal(self.zeros.expand(*batch_shape, *self.event_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        level = torch.rand(*sample_shape, *self.zeros.shape)
        return self.normal.icdf(self.low + (1 - 2 * self.low) * level)

    def log_prob(self, value: Tensor) -> Tensor:
        density = self.normal.log_prob(value) - np.log(1 - 2 * self.low)
        return torch.where(value.abs() <= self.bound, density, -torch.inf).sum(-1)


def moved(guide: pf.AutoFlow, matrix: Tensor, shift: Tensor) -> None:
    """Change the draws z of a guide to m + s A (z - m) / s + s shift, with its mean m and its sds s."""
    z = guide.flow().sample((20_000,))
    mean, sd = z.mean(0), z.std(0)
    fixed = guide.flow.fixed
    scaled = sd.unsqueeze(-1) * matrix / sd
    with torch.no_grad():
        scale = fixed.scale.tril() if fixed.dense else fixed.scale.diag()
        fixed.loc.copy_(mean + scaled @ (fixed.loc - mean) + sd * shift)
        fixed.scale.copy_(scaled @ scale)  # the matrices are diagonal, so that it stays triangular


def breaks(dim: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ways to break a guide: a matrix and a shift each, in units of its sds."""
    one, none, first = torch.ones(dim), torch.zeros(dim), torch.eye(dim)[0]
    signs = torch.where(torch.arange(dim) % 2 == 0, 1.0, -1.0)
    return {
        "all sds a fifth": ((one / 5).diag(), none),
        "one sd a fifth": ((one - 0.8 * first).diag(), none),
        "all sds doubled": ((2 * one).diag(), none),
        "all means off by 2 sd": (one.diag(), 2 * one),
        "one mean off by 2 sd": (one.diag(), 2 * first),
        "correlations of the wrong sign": (signs.diag(), none),
    }


def broken(name: str, kind: str, seed: int, steps: int | None, folder: Path, draws: int) -> list[Row]:
    """Return the row of a guide that is wrong on purpose."""
    start = time.perf_counter()
    if kind == "collapsed splines":
        target, guide, seconds = fitted(name, "splines", seed, steps, folder)
    elif kind == "funnel neck":  # the fit has a prior of tau with a scale fifty times smaller
        posteriors.prepare(seed)
        target = targets.load(name)
        guide = pf.AutoFlow(narrow_prior(target.model))
        pf.fit_svi(guide.model, guide, steps=steps, progress=False)
        seconds = time.perf_counter() - start
    elif kind in ("stopped early", "tails cut"):
        posteriors.prepare(seed)
        target = targets.load(name)
        guide = pf.AutoFlow(target.model)
        if kind == "stopped early":
            pf.fit_svi(target.model, guide, steps=UNTRAINED, warm_start=False, progress=False)
        else:
            pf.fit_svi(target.model, guide, steps=steps, progress=False)
            guide.flow.base = Clipped(guide.latent_dim)
        seconds = time.perf_counter() - start
    else:
        target, guide, seconds = fitted(name, "AutoFlow", seed, steps, folder)
        moved(guide, *breaks(target.dim)[kind])
    found = {**judged(target.model, guide), "fit_seconds": seconds}
    return [{**found, **truth(target, guide, steps, folder, draws)}]


def narrow_prior(model: Callable[[], None]) -> Callable[[], None]:
    """Return the centred eight schools with a half-Cauchy prior of scale .1 for tau."""

    class Narrow(pyro.poutine.messenger.Messenger):
        def _pyro_sample(self, msg: dict[str, Any]) -> None:
            if msg["name"] == "tau":
                msg["fn"] = dist.HalfCauchy(torch.tensor(0.1))

    return Narrow()(model)


BROKEN = (*breaks(2), "tails cut", "funnel neck", "stopped early", "collapsed splines")


def modes(name: str, guide_name: str, seed: int, steps: int | None, folder: Path, draws: int) -> list[Row]:
    """Return the row of a fit to two modes by the plain ELBO, which keeps one; the name is the weight of the first."""
    posteriors.prepare(seed)
    model, start = two_modes(float(name)), time.perf_counter()
    guide = pf.AutoFlow(model)
    pf.fit_svi(model, guide, steps=steps, progress=False)
    seconds = time.perf_counter() - start
    kept = float((guide.sample(draws)["z"][:, 0] < 0).double().mean())
    return [{**judged(model, guide), "fit_seconds": seconds, "worst_error": abs(kept - float(name))}]


def measure(part: str, name: str, guide_name: str, seed: int, steps: int | None, folder: Path, draws: int) -> list[Row]:
    """Run one task and return its rows, or a row with the error."""
    key = {"part": part, "target": name, "guide": guide_name, "seed": seed}
    try:
        found = {"guides": guides, "broken": broken, "modes": modes}[part](name, guide_name, seed, steps, folder, draws)
    except Exception as error:
        found = [{"verdict": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}]
    rows = [{**key, **row} for row in found]
    return [{k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]


def tasks(part: str, names: list[str]) -> list[tuple[str, str, str, int]]:
    """Return the tasks of a part."""
    if part == "guides":
        flows = [(part, name, "AutoFlow", seed) for seed in posteriors.SEEDS for name in names]
        return flows + [
            (part, name, guide, 0)
            for guide in posteriors.PEERS
            for name in names
            if not (guide == "AutoNormalizingFlow" and name in SLOW)
        ]
    if part == "broken":
        plans = [(part, name, kind, 0) for kind in breaks(2) for name in (FUNNEL, REGRESSION)]
        plans += [(part, REGRESSION, "tails cut", 0), (part, FUNNEL, "funnel neck", 0)]
        plans += [(part, name, "stopped early", 0) for name in (FUNNEL, REGRESSION)]
        return plans + [(part, FUNNEL, "collapsed splines", seed) for seed in posteriors.SEEDS]
    return [(part, weight, "AutoFlow", seed) for weight in ("0.5", "0.2") for seed in posteriors.SEEDS]


# The page.


def number(row: Row, key: str) -> float:
    """Return a number of a row, NaN if it is missing."""
    return float(row[key]) if row.get(key) else float("nan")


def within(row: Row, error: float, ratio: float) -> bool:
    """True if the true errors of a guide are within bounds."""
    return (
        number(row, "worst_error") <= error
        and number(row, "low_sd") >= 1 - ratio
        and number(row, "high_sd") <= 1 + ratio
    )


def quality(row: Row) -> str:
    """Return the true quality of a guide."""
    if within(row, 0.05, 0.05) and number(row, "khat") < 0.7:
        return "well fitted"
    return "accurate" if within(row, 0.1, 0.1) else "wrong"


def table(rows: list[Row]) -> str:
    """Return the results as Markdown."""
    benchmark = [row for row in rows if row["part"] == "guides" and row["verdict"] != "failed"]
    groups = {
        f"of the benchmark, {kind}": [r for r in benchmark if quality(r) == kind]
        for kind in ("well fitted", "accurate", "wrong")
    }
    groups["broken on purpose, or collapsed"] = [row for row in rows if row["part"] == "broken"]
    groups["one of two modes lost"] = [row for row in rows if row["part"] == "modes"]
    good, bad = groups["of the benchmark, well fitted"], [row for group in list(groups.values())[2:] for row in group]
    lines = [
        "# Reliability of the verdict",
        "",
        "This page is for users who ask whether they can rely on `check`. It compares the verdicts with the true "
        f"errors of good and bad guides. `check` trusts {trusted(good)} of {len(good)} well-fitted guides, and "
        f"{trusted(bad)} of {len(bad)} guides that are wrong, broken or lack a mode.",
        "",
        "Reproduce with `python benchmarks/trust.py`. True errors are those of 100,000 draws against the reference. "
        "Posteriors without a reference are compared with weighted draws of the default guide.",
        "",
        "* *well fitted*: errors of means within .05, ratios of sds within .95 to 1.05, and k-hat below .7.",
        "* *accurate*: errors of means within .1, and ratios of sds within .9 to 1.1.",
        "* *wrong*: all other guides.",
        "",
        "## Verdicts",
        "",
        "| guides | number | trust | reweight | do not trust |",
        "|---|---:|---:|---:|---:|",
    ]
    for label, group in groups.items():
        counts = [sum(row["verdict"] == verdict for row in group) for verdict in ("trust", "reweight", "do not trust")]
        lines.append(f"| {label} | {len(group)} | " + " | ".join(map(str, counts)) + " |")
    titles = {
        "guides": ("Guides of the benchmark", COLUMNS_SAY),
        "broken": ("Broken guides", ""),
        "modes": (
            "Two distant modes",
            "The modes are 8 sd apart, and the fit is by the plain ELBO. The target is the weight of the first mode.",
        ),
    }
    for part, (title, text) in titles.items():
        mine = [row for row in rows if row["part"] == part]
        if not mine:
            continue
        lines += ["", f"## {title}", "", *([text, ""] if text else []), *header()]
        lines += [line(row) for row in mine]
    return "\n".join(lines) + "\n"


COLUMNS_SAY = (
    "Errors of means are in sd of the posterior, and sds are ratios to those of the posterior. *Error seen*, *sds "
    "seen* and *missing* come from the chains of `check`. *True error* and *true sds* come from the reference."
)


def trusted(rows: list[Row]) -> int:
    """Return the number of guides that ``check`` trusts."""
    return sum(row["verdict"] == "trust" for row in rows)


def header() -> list[str]:
    """Return the first two lines of a table of guides."""
    columns = "target", "guide", "seed", "verdict", "k-hat", "error seen", "sds seen"
    columns += "missing", "true error", "true sds", "fit s", "check s"
    return ["| " + " | ".join(columns) + " |", "|---|---|---:|---|" + "---:|" * 8]


def line(row: Row) -> str:
    """Return the table row of a guide."""

    def text(key: str, form: str) -> str:
        return f"{float(row[key]):{form}}" if row.get(key) else "–"

    seen = f"{text('low_seen', '.2f')}–{text('high_seen', '.2f')}"
    real = f"{text('low_sd', '.2f')}–{text('high_sd', '.2f')}" if row.get("low_sd") else "–"
    cells = [row["target"], row["guide"], row["seed"], row["verdict"], text("khat", ".2f"), text("drift", ".2f"), seen]
    cells += [text("missing", ".2f"), text("worst_error", ".3f"), real, text("fit_seconds", ".0f")]
    return "| " + " | ".join([*map(str, cells), text("check_seconds", ".1f")]) + " |"


def save(rows: list[Row], out: Path) -> None:
    """Write the rows as CSV and as Markdown, each atomically."""
    order = {name: i for i, name in enumerate(("guides", "broken", "modes", *targets.NAMES))}
    guides_first = {name: i for i, name in enumerate((*posteriors.GUIDES, *BROKEN))}
    rows.sort(
        key=lambda r: (
            *(order[r["part"]], order.get(r["target"], 0)),
            *(guides_first.get(r["guide"], 0), int(r["seed"])),
        )
    )
    posteriors.write_csv(rows, COLUMNS, out / "trust.csv")
    posteriors.write(table(rows), out / "trust.md")


def main() -> None:
    parts = ("guides", "broken", "modes")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts)
    parser.add_argument("--targets", nargs="+", default=list(targets.NAMES), choices=targets.NAMES)
    parser.add_argument("--fits", type=Path, help="folder of finished fits (default: a temporary one)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the two files")
    parser.add_argument("--quick", action="store_true", help="smoke run: one target, 30 steps; needs --out")
    options = parser.parse_args()
    steps, draws = None, posteriors.DRAWS
    if options.quick:
        if options.out == OUT:
            parser.error("--quick needs --out, because its figures are not results. Add --out DIR.")
        options.targets, steps, draws = [FUNNEL], 30, 5_000
    targets.folder()
    folder = options.fits or Path(tempfile.mkdtemp())
    for path in (options.out, folder):
        path.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = posteriors.read(options.out / "trust.csv")
    done = {(r["part"], r["target"], r["guide"], int(r["seed"])) for r in rows}
    todo = [task for part in options.parts for task in tasks(part, options.targets) if task not in done]
    if options.quick:
        todo = [task for task in todo if task[1] in (FUNNEL, "0.5") and task[3] == 0]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measure, *task, steps, folder, draws) for task in todo]):
            for row in future.result():
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
                rows.append(row)
            save(rows, options.out)
    save(rows, options.out)


if __name__ == "__main__":
    main()
