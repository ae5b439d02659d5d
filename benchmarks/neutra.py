"""Comparison of NeuTra and plain NUTS on funnels: effective draws per gradient.

    python benchmarks/neutra.py                       # about an hour on 2 cores
    python benchmarks/neutra.py --seeds 0             # about 20 minutes
    python benchmarks/neutra.py --quick --out DIR     # one target, few draws: a smoke run

All samplers are Pyro's NUTS with its defaults, in double precision.  Each run has four chains of 300 warm-up draws and
500 draws.  The samplers differ in the space that they move in:

* *NUTS*: the latents of the model.  The chains start where Pyro starts them.
* *NeuTra, AutoFlow*: the base of an ``AutoFlow``, fitted with its defaults.  The chains start from draws of the guide.
* *NeuTra, AutoMultivariateNormal*: the base of that guide, fitted in 3,000 steps of 64 draws with step size .05.

One target is Neal's funnel: v ~ N(0, 3) and nine x ~ N(0, exp(v / 2)).  Its v has a known distribution.  The other is
the centred eight schools.  Its log tau is compared with the reference draws of posteriordb.

The cost is the number of points at which the density of the model and its gradient are evaluated, warm-up included.
A second figure adds the evaluations of the fit, where a batch of n draws counts n times.  ESS and r-hat are ArviZ's,
the worst over all latents.  Writes ``neutra.csv`` (a row per run) and ``neutra.md`` into ``docs/benchmarks``.
"""

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import targets
import torch
from posteriors import prepare, read, side_by_side, write, write_csv
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.poutine.messenger import Messenger

import pyro_flows as pf
from pyro_flows.guides import init_to_center

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
TARGETS = "funnel", "eight_schools_centered"
SAMPLERS = "NUTS", "NeuTra, AutoFlow", "NeuTra, AutoMultivariateNormal"
SEEDS, CHAINS, WARMUP, DRAWS = (0, 1, 2), 4, 300, 500
MEASURES = (
    "verdict",
    "fit_gradients",
    "gradients",
    "ess_bulk",
    "ess_tail",
    "r_hat",
    "divergences",
    "error",
    "sd_ratio",
    "fit_seconds",
    "seconds",
)

Row = dict[str, str]


@dataclass(frozen=True)
class Funnel:
    """Funnel-shaped target: the model, its scale site, the map from draws of that site, and the true mean and sd."""

    model: Callable[[], None]
    site: str
    read: Callable[[Any], Any]
    mean: float
    sd: float


def neal() -> None:
    """Sample from Neal's funnel."""
    zero = torch.zeros(())
    v = pyro.sample("v", dist.Normal(zero, 3.0))
    with pyro.plate("row", 9):
        pyro.sample("x", dist.Normal(zero, (v / 2).exp()))


def load(name: str) -> Funnel:
    """Return a target by name."""
    if name == "funnel":
        return Funnel(neal, "v", np.asarray, 0.0, 3.0)
    reference = np.log(targets.reference_draws(name)["tau"])
    return Funnel(targets.load(name).model, "tau", np.log, float(reference.mean()), float(reference.std()))


class Counter(Messenger):
    """Counter of the points at which a model is evaluated: the number of values of a scalar site."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site, self.count = site, 0

    def _pyro_post_sample(self, message: dict[str, Any]) -> None:
        if message["name"] == self.site:
            self.count += message["value"].numel()


def fit(model: Callable[[], None], sampler: str, steps: int | None) -> Any:
    """Return the trained guide of a sampler."""
    if sampler == "NeuTra, AutoFlow":
        guide = pf.AutoFlow(model)
        pf.fit_svi(model, guide, steps=steps, progress=False)
        return guide
    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_center)
    guide()  # the first call creates the parameters
    objective = Trace_ELBO(64, vectorize_particles=True)
    pf.fit_svi(model, guide, steps=steps or 3000, lr=0.05, objective=objective, progress=False)
    return guide


def measure(name: str, sampler: str, seed: int, steps: int | None, chains: int, warmup: int, draws: int) -> Row:
    """Run the chains of one sampler on one target and return their diagnostics."""
    prepare(seed)
    warnings.simplefilter("ignore", UserWarning)
    target = load(name)
    counter = Counter(target.site)

    def model() -> None:
        with counter:
            target.model()

    row: dict[str, Any] = {"target": name, "sampler": sampler, "seed": str(seed)}
    start, found, kept = time.perf_counter(), None, []
    if sampler != "NUTS":
        guide = fit(model, sampler, steps)
        row |= {"fit_gradients": counter.count, "fit_seconds": time.perf_counter() - start}
        row["verdict"] = pf.check(target.model, guide).verdict
        found = pf.neutra(model, guide, check=False)
    start, counter.count, divergences = time.perf_counter(), 0, 0
    for _ in range(chains):
        mcmc = MCMC(
            NUTS(found.model if found else model),
            draws,
            warmup,
            initial_params=found.initial() if found else None,
            disable_progbar=True,
        )
        mcmc.run()
        divergences += sum(map(len, mcmc.diagnostics()["divergences"].values()))
        samples = mcmc.get_samples()
        kept.append(found.transform(samples) if found else samples)
    row |= {"gradients": counter.count, "divergences": divergences, "seconds": time.perf_counter() - start}
    row |= judge(target, {key: torch.stack([chain[key] for chain in kept]).numpy() for key in kept[0]})
    return {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in row.items()}


def judge(target: Funnel, samples: dict[str, np.ndarray]) -> dict[str, float]:
    """Return ESS, r-hat and errors of chains, ``(chains, draws, *shape)`` per site."""
    import arviz

    samples[target.site] = known = target.read(samples[target.site])
    columns = np.concatenate([value.reshape(*value.shape[:2], -1) for value in samples.values()], -1)
    rows = {f"q{i}": columns[..., i] for i in range(columns.shape[-1])}
    table = arviz.summary(rows if hasattr(arviz, "psislw") else arviz.from_dict({"posterior": rows}), round_to="none")
    return {
        "ess_bulk": float(table["ess_bulk"].min()),
        "ess_tail": float(table["ess_tail"].min()),
        "r_hat": float(table["r_hat"].max()),
        "error": float((known.mean() - target.mean) / target.sd),
        "sd_ratio": float(known.std() / target.sd),
    }


def table(rows: list[Row]) -> str:
    """Return the results as Markdown."""
    seeds = " ".join(sorted({r["seed"] for r in rows}))
    lines = [
        "# NeuTra",
        "",
        "This page is for users who sample funnels with NUTS. It compares Pyro's NUTS on the latents of the model with "
        "NUTS on the base of a fitted guide (`pyro_flows.neutra`). With an `AutoFlow`, NeuTra yields more effective "
        "draws per gradient than plain NUTS on both targets, even if the gradients of the fit count.",
        "",
        f"Reproduce with `python benchmarks/neutra.py --seeds {seeds}`. Each run has {CHAINS} chains of {WARMUP} "
        f"warm-up draws and {DRAWS} draws. torch {torch.__version__}, Pyro {pyro.__version__}, Python "
        f"{platform.python_version()}.",
        "",
        "* *check*: the verdict of `check` on the guide.",
        "* *ESS*: the smallest over all latents. *Per 1,000*: bulk ESS per 1,000 gradients of the chains, warm-up "
        "included. *With fit*: the gradients of the fit count too.",
        "* *r-hat*: the largest over all latents.",
        "* *error*: the error of the mean of v (funnel) or log tau (eight schools), in standard deviations. *sd "
        "ratio*: the standard deviation over the true one.",
        "* *fit s*, *s*: seconds of the fit and of the chains on one core of two, both busy.",
        "",
        "| target | sampler | seed | check | gradients, fit | gradients, chains | ESS bulk | ESS tail "
        "| bulk ESS per 1,000 | with fit | r-hat | divergences | error | sd ratio | fit s | s |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        price, fitted, ess = int(r["gradients"]), int(r.get("fit_gradients") or 0), float(r["ess_bulk"])
        cells = [r["target"], r["sampler"], r["seed"], r.get("verdict") or "–", f"{fitted:,}" if fitted else "–"]
        cells += [f"{price:,}", f"{ess:.0f}", f"{float(r['ess_tail']):.0f}", f"**{1000 * ess / price:.2f}**"]
        cells += [f"{1000 * ess / (price + fitted):.2f}", f"{float(r['r_hat']):.3f}", r["divergences"]]
        cells += [f"{float(r['error']):+.2f}", f"{float(r['sd_ratio']):.2f}"]
        cells += [f"{float(r.get('fit_seconds') or 0):.0f}", f"{float(r['seconds']):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *NOTES]) + "\n"


NOTES = (
    "## What to notice",
    "",
    "* Only the chains with an `AutoFlow` have an r-hat below 1.01.",
    "* A Gaussian guide does not remove the funnel, so its chains mix slowly too.",
    "* A fit costs more gradients than the chains. It pays off because plain NUTS does not converge.",
)


def save(rows: list[Row], out: Path) -> None:
    """Write the rows as CSV and as Markdown, in the order of targets, samplers and seeds."""
    rows.sort(key=lambda r: (TARGETS.index(r["target"]), SAMPLERS.index(r["sampler"]), int(r["seed"])))
    write_csv(rows, ["target", "sampler", "seed", *MEASURES], out / "neutra.csv")
    write(table(rows), out / "neutra.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs, one thread each")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the two files")
    parser.add_argument("--quick", action="store_true", help="smoke run of the funnel, 100 steps; needs --out")
    options = parser.parse_args()
    size: tuple[int | None, int, int, int] = (None, CHAINS, WARMUP, DRAWS)
    if options.quick:
        if options.out == OUT:
            parser.error("--quick needs --out, because its figures are not results. Add --out DIR.")
        options.targets, options.seeds, size = ["funnel"], [0], (100, 2, 20, 30)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = read(options.out / "neutra.csv")
    done = {(r["target"], r["sampler"], int(r["seed"])) for r in rows}
    wanted = [(name, kind, seed) for seed in options.seeds for name in options.targets for kind in SAMPLERS]
    for row in side_by_side(measure, [(*key, *size) for key in wanted if key not in done], options.jobs):
        rows.append(row)
        save(rows, options.out)


if __name__ == "__main__":
    main()
