"""Effective draws per second of ``pf.sample``, compared with NUTS.

    python benchmarks/sample.py                                    # the full table, several hours on one core
    python benchmarks/sample.py --targets wells funnel --seeds 0
    python benchmarks/sample.py --samplers NUTS                    # one of the samplers
    python benchmarks/sample.py --quick --out DIR                  # two targets, few draws: a smoke run

NUTS is NumPyro's with its defaults: four chains of 1,000 warm-up draws and 1,000 draws, in double precision.
``pf.sample`` fits an ``AutoFlow`` with its defaults and returns 4,000 draws in one run and ``--draws`` in another.  A
long run shares the cost of the fit among more draws.  So does a long run of NUTS with the cost of warm-up and
compilation: ``--long-nuts`` adds one with ``--draws``.  "NUTS, dense" is NUTS with a dense metric
(``dense_mass=True``), which suits correlated posteriors.  It runs if ``--samplers`` names it.  The targets are those of
``targets.py`` and Neal's funnel: v ~ N(0, 3) and nine x ~ N(0, exp(v / 2)).

The seconds are those of the whole call, on one core.  They include the fit, the warm-up, the compilation by JAX and the
diagnostics of ``pf.sample``.  They exclude imports and the reading of data.  ESS and R-hat are ArviZ's for both
samplers, the worst over all latents and deterministic sites.  ESS per second is the smaller one of bulk and tail ESS,
divided by the seconds.  Each run has a new process, and the runs on one target follow each other on one core.
On a busy machine ``--clock cpu`` divides by the CPU seconds of the process, which other processes hardly change.
An interrupted benchmark continues where it stopped.  Writes ``sample.csv`` (a row per run) and ``sample.md`` into
``docs/benchmarks``.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pyro
import targets
import torch
from neutra import neal
from posteriors import UNRELATED, read, write, write_csv

import pyro_flows as pf

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
SEEDS, CHAINS, WARMUP, DRAWS, MANY = (0, 1, 2), 4, 1000, 1000, 100_000
CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
TARGETS = *targets.NAMES, "funnel"
SAMPLERS = "NUTS", "NUTS, dense", "pf.sample"
DEFAULT = "NUTS", "pf.sample"
QUICK = "wells", "funnel"
# The site and the threshold of each funnel's neck.  P(v < -6) = Phi(-2).
NECKS = {"funnel": ("v", -6.0), "eight_schools": ("tau", 1.0), "eight_schools_centered": ("tau", 1.0)}
FUNNEL_NECK, FUNNEL_SD = 0.02275013, 3.0
KEYS = "target", "sampler", "draws", "seed"
MEASURES = (
    "ess_bulk",
    "ess_tail",
    "r_hat",
    "worst_error",
    "low_sd",
    "high_sd",
    "neck",
    "neck_sd",
    "divergences",
    "converged",
    "fit_seconds",
    "seconds",
    "cpu_seconds",
    "ess_per_second",
)

Row = dict[str, str]
Samples = dict[str, np.ndarray]  # a site's draws, (chains, draws, *shape)


def one_program(chain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Compile one program that runs NumPyro's chains one after another.

    NumPyro's "sequential" compiles the program again for every chain.  Its "vectorized" lets every chain wait for the
    longest trajectory.  On one core both have fewer effective draws per second.
    """
    import jax

    return jax.jit(lambda chains: jax.lax.map(chain, chains))


def nuts(
    name: str, seed: int, warmup: int, draws: int, dense: bool, method: Any = one_program
) -> tuple[Samples, dict[str, Any]]:
    """Run NumPyro's NUTS on a target and return its draws and the measures of the run.

    ``method`` is the chain method.  None means NumPyro's default chain method, with its progress bar.
    """
    import jax
    import numpyro_models
    from numpyro.infer import MCMC, NUTS

    model = numpyro_models.load(name)
    start = clocks()
    mcmc = MCMC(
        NUTS(model, dense_mass=dense),
        num_warmup=warmup,
        num_samples=draws // CHAINS,
        num_chains=CHAINS,
        **({} if method is None else {"chain_method": method, "progress_bar": False}),
    )
    mcmc.run(jax.random.PRNGKey(seed))
    samples = {key: np.asarray(value) for key, value in mcmc.get_samples(group_by_chain=True).items()}
    known = elapsed(start)
    divergences = int(mcmc.get_extra_fields()["diverging"].sum())
    return samples, known | {"divergences": divergences, "fit_seconds": 0.0}


def ours(name: str, seed: int, steps: int | None, draws: int) -> tuple[Samples, dict[str, Any]]:
    """Fit a flow to a target, sample with ``pf.sample``, and return the draws and the measures of the run."""
    pyro.enable_validation(False)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = load(name)[0]
    start, guide = clocks(), None
    if steps is not None:
        guide = pf.AutoFlow(model)
        pf.fit_svi(model, guide, steps=steps, progress=False)
    found = pf.sample(model, guide, num_draws=draws)
    known: dict[str, Any] = elapsed(start)
    samples = {key: value.detach().cpu().numpy() for key, value in found.draws.items()}
    known |= {"divergences": int(found.divergences), "converged": str(bool(found.converged))}
    return samples, known | {"fit_seconds": known["seconds"] - float(found.seconds)}


def clocks() -> tuple[float, float]:
    """Return the wall time and the CPU time of this process."""
    return time.perf_counter(), time.process_time()


def elapsed(start: tuple[float, float]) -> dict[str, float]:
    """Return the seconds since a start, of both clocks."""
    return dict(zip(CLOCKS.values(), (now - then for now, then in zip(clocks(), start, strict=True)), strict=True))


def load(name: str) -> tuple[Callable[[], None], Callable[[targets.Draws], targets.Draws]]:
    """Return the Pyro model of a target and the map from its draws to the quantities of the reference."""
    if name == "funnel":
        return neal, lambda draws: {"v": draws["v"]}
    target = targets.load(name)
    return target.model, target.quantities


def measure(name: str, sampler: str, draws: int, seed: int, warmup: int, steps: int | None, core: int | None) -> Row:
    """Run one sampler on one target and return the row of results.  Needs a fresh process."""
    if core is not None:  # XLA has a thread per core that the process may use
        os.sched_setaffinity(0, {core})
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    row: dict[str, Any] = dict(zip(KEYS, (name, sampler, str(draws), str(seed)), strict=True))
    start = clocks()
    try:
        if sampler == "pf.sample":
            found = ours(name, seed, steps, draws)
        else:
            found = nuts(name, seed, warmup, draws, sampler == "NUTS, dense")
        row |= found[1] | judge(name, found[0])
    except Exception as error:
        row |= elapsed(start)
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in row.items()}


def judge(name: str, samples: Samples) -> dict[str, float]:
    """Return the diagnostics of draws, and their errors against the reference, if it exists."""
    found = diagnostics(samples)
    flat = {key: torch.as_tensor(value.reshape(-1, *value.shape[2:])) for key, value in samples.items()}
    quantities = {key: value.numpy() for key, value in load(name)[1](flat).items()}
    if moments := reference_moments(name):
        errors = [abs(quantities[key].mean() - mean) / sd for key, (mean, sd) in moments.items()]
        ratios = [quantities[key].std() / sd for key, (_, sd) in moments.items()]
        found |= {"worst_error": max(errors), "low_sd": min(ratios), "high_sd": max(ratios)}
    if name in NECKS:
        found["neck"], spread = neck(name, quantities)
        found["neck_sd"] = spread / true_neck(name)[1]
    return {key: float(value) for key, value in found.items()}


def diagnostics(samples: Samples) -> dict[str, float]:
    """Return the smallest ESS and the largest R-hat of ArviZ, over all elements of all sites."""
    import arviz
    import xarray

    columns = np.concatenate([value.reshape(*value.shape[:2], -1) for value in samples.values()], -1)
    data = xarray.Dataset({"all": (("chain", "draw", "element"), columns.astype(np.float64))})
    return {
        "ess_bulk": arviz.ess(data, method="bulk")["all"].min().item(),
        "ess_tail": arviz.ess(data, method="tail")["all"].min().item(),
        "r_hat": arviz.rhat(data)["all"].max().item(),
    }


def reference_moments(name: str) -> dict[str, tuple[float, float]]:
    """Return the reference's mean and standard deviation of each quantity; empty if there is no reference."""
    if name == "funnel":
        return {"v": (0.0, FUNNEL_SD)}
    return {} if name in UNRELATED else targets.reference_moments(name)


def neck(name: str, quantities: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return the probability of a funnel's neck and the standard deviation of the logarithm of its scale."""
    site, threshold = NECKS[name]
    values = quantities[site]
    return float((values < threshold).mean()), float((np.log(values) if site == "tau" else values).std())


def true_neck(name: str) -> tuple[float, float]:
    """Return the exact result of ``neck``."""
    return (FUNNEL_NECK, FUNNEL_SD) if name == "funnel" else schools_neck()


def schools_neck() -> tuple[float, float]:
    """Return P(tau < 1) and the standard deviation of log tau in the eight schools, by quadrature.

    Given tau, the model is Gaussian in all other latents, so that they are integrated out exactly.
    """
    with open(targets.folder() / f"{targets.STEM['eight_schools']}.data.json") as file:
        data = {k: np.array(v, dtype=float) for k, v in json.load(file).items()}
    log_tau = np.linspace(-30, 10, 200_001)
    tau = np.exp(log_tau)
    weight = 1 / (data["sigma"] ** 2 + tau[:, None] ** 2)
    precision, slope = weight.sum(-1) + 1 / 25, weight @ data["y"]  # of mu given tau, with its prior N(0, 5)
    log_p = (np.log(weight).sum(-1) - weight @ data["y"] ** 2 + slope**2 / precision - np.log(precision)) / 2
    log_p += log_tau - np.log1p(tau**2 / 25)  # the half-Cauchy prior and the Jacobian
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    return float(p[log_tau < 0].sum()), float(np.sqrt(p @ log_tau**2 - (p @ log_tau) ** 2))


def fresh(task: Callable[..., Row], *arguments: Any) -> Row:
    """Run a function in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def runs(groups: list[list[tuple[Any, ...]]], jobs: int) -> Iterator[Row]:
    """Yield a row per run.  The runs of one group follow each other on one core; ``jobs`` groups run at a time."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores: Queue[int | None] = Queue()
    for index in range(jobs):
        cores.put(allowed[index % len(allowed)] if allowed else None)

    def follow(group: list[tuple[Any, ...]]) -> list[Row]:
        core = cores.get()
        try:
            return [fresh(measure, *task, core) for task in group]
        finally:
            cores.put(core)

    with ThreadPoolExecutor(jobs) as threads:
        for future in as_completed([threads.submit(follow, group) for group in groups]):
            yield from future.result()


def key(row: Row) -> tuple[Any, ...]:
    """Return the place of a row in the table.  Rows of one run have equal keys."""
    return TARGETS.index(row["target"]), SAMPLERS.index(row["sampler"]), int(row["draws"]), int(row["seed"])


def rated(row: Row, clock: str) -> Row:
    """Return a row with the number of effective draws per second by one of the clocks."""
    if row.get("failed"):
        return row
    rate = min(float(row["ess_bulk"]), float(row["ess_tail"])) / float(row[CLOCKS[clock]])
    return {**row, "ess_per_second": f"{rate:.6g}"}


def medians(rows: list[Row]) -> dict[tuple[int, int, int], dict[str, float]]:
    """Return the median over the seeds of each measure, for each target, sampler and number of draws."""
    groups: dict[tuple[int, int, int], list[Row]] = {}
    for row in sorted(rows, key=key):
        if not row.get("failed"):
            groups.setdefault(key(row)[:3], []).append(row)
    return {
        place: {
            measure: statistics.median(float(r[measure]) for r in mine)
            for measure in MEASURES
            if measure != "converged" and all(r.get(measure) for r in mine)
        }
        for place, mine in groups.items()
    }


def table(rows: list[Row], clock: str) -> str:
    """Return the results as Markdown."""
    seeds = " ".join(sorted({r["seed"] for r in rows}, key=int))
    found = medians(rows)
    lines = [
        "# Sampling",
        "",
        "This page is for users who choose between `pf.sample` and NUTS. It compares their effective draws per second. "
        f"At the same number of draws, `pf.sample` with its defaults is ahead of NumPyro's NUTS {wins(found)}.",
        "",
        f"Reproduce with `python benchmarks/sample.py --seeds {seeds}`. NUTS has {CHAINS} chains with {WARMUP:,} "
        "warm-up draws. All runs are in double precision on one core. Figures are medians over the seeds "
        f"({seeds}). pyro-flows {pf.__version__}, torch {torch.__version__}, NumPyro {version('numpyro')}, JAX "
        f"{version('jax')}, Python {platform.python_version()}.",
        "",
        "* *ESS*, *R-hat*: those of ArviZ, the worst over all latents and deterministic sites.",
        "* *worst error*, *sd ratio*: the error of a mean in standard deviations, and the ratios of standard "
        "deviations, against reference draws. Both are the worst over the quantities. A dash: there is no reference.",
        f"* *s*: seconds (clock: {clock}) with the fit of the flow, the warm-up and the compilation. *fit s*: seconds "
        "of the fit.",
        "* *ESS/s*: the smaller one of bulk and tail ESS, divided by the seconds.",
        "* *ratio*: ESS/s over that of NUTS with as many draws, or else with its fewest. It means little where an "
        "R-hat is above 1.01.",
        "",
        "| target | D | sampler | draws | ESS bulk | ESS tail | R-hat | worst error | sd ratio | divergences | fit s "
        "| s | ESS/s | ratio |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *speed_lines(rows, found, clock),
        "",
        "## Necks of funnels",
        "",
        "The neck is the region of a small scale. *sd ratio*: the standard deviation of v (funnel) or log tau (eight "
        "schools) over the exact one.",
        "",
        "| target | neck | true probability | sampler | draws | probability | sd ratio |",
        "|---|---|---:|---|---:|---:|---:|",
        *neck_lines(found),
    ]
    return "\n".join(lines) + "\n"


def wins(found: dict[tuple[int, int, int], dict[str, float]]) -> str:
    """Return in words the number of targets on which ``pf.sample`` has the higher ESS/s at the same number of draws."""
    ours, theirs = SAMPLERS.index("pf.sample"), SAMPLERS.index("NUTS")
    pairs = [
        (m["ess_per_second"], found[index, theirs, draws]["ess_per_second"])
        for (index, sampler, draws), m in found.items()
        if sampler == ours and (index, theirs, draws) in found
    ]
    return f"in {sum(own > other for own, other in pairs)} of {len(pairs)} comparisons"


def speed_lines(rows: list[Row], found: dict[tuple[int, int, int], dict[str, float]], clock: str) -> list[str]:
    """Return the lines of the main table: one per target, sampler and number of draws."""
    lines, dims = [], {**targets.DIMS, "funnel": 10}
    for place in sorted({key(r)[:3] for r in rows}):
        name, sampler, draws = TARGETS[place[0]], SAMPLERS[place[1]], place[2]
        cells = [name, str(dims[name]), sampler, f"{draws:,}"]
        failures = [r["failed"] for r in rows if key(r)[:3] == place and r.get("failed")]
        if m := found.get(place):
            rivals = {n: other["ess_per_second"] for (i, kind, n), other in found.items() if (i, kind) == (place[0], 0)}
            cells += [f"{m['ess_bulk']:,.0f}", f"{m['ess_tail']:,.0f}", f"{m['r_hat']:.3f}"]
            cells += (
                [f"{m['worst_error']:.3f}", f"{m['low_sd']:.2f}–{m['high_sd']:.2f}"] if "low_sd" in m else ["–"] * 2
            )
            cells += [f"{m['divergences']:.0f}", f"{m['fit_seconds']:.0f}", f"{m[CLOCKS[clock]]:.1f}"]
            cells += [f"{m['ess_per_second']:.3g}" + (f" ({len(failures)} failed)" if failures else "")]
            rival = rivals.get(draws, rivals[min(rivals)]) if rivals else None
            cells += [f"**{m['ess_per_second'] / rival:.2g}**" if sampler != "NUTS" and rival else ""]
        else:
            cells += [f"failed: {failures[0][:60]}".replace("|", "/"), *[""] * 9]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def neck_lines(found: dict[tuple[int, int, int], dict[str, float]]) -> list[str]:
    """Return the lines of the table of necks."""
    lines = []
    for (index, sampler, draws), m in found.items():
        name = TARGETS[index]
        if "neck" in m:
            site, threshold = NECKS[name]
            cells = [name, f"{site} < {threshold:g}", f"{true_neck(name)[0]:.4f}", SAMPLERS[sampler], f"{draws:,}"]
            lines.append("| " + " | ".join([*cells, f"{m['neck']:.4f}", f"{m['neck_sd']:.2f}"]) + " |")
    return lines


def save(rows: list[Row], out: Path, clock: str) -> None:
    """Write the rows as CSV and as Markdown."""
    rows = [rated(row, clock) for row in sorted(rows, key=key)]
    write_csv(rows, [*KEYS, *MEASURES, "failed"], out / "sample.csv")
    write(table(rows, clock), out / "sample.md")


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--samplers", nargs="+", default=list(DEFAULT), choices=SAMPLERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--draws", type=int, default=MANY, help="draws of the long runs")
    parser.add_argument("--long-nuts", action="store_true", help="run NUTS with --draws too")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="clock of the seconds in ESS/s")
    parser.add_argument("--jobs", type=int, default=1, help="parallel targets, one core each")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the two files")
    parser.add_argument("--quick", action="store_true", help="smoke run: two targets, few draws; needs --out")
    options = parser.parse_args()
    options.short, options.warmup, options.steps = CHAINS * DRAWS, WARMUP, None
    if options.quick:
        if options.out == OUT:
            parser.error("--quick needs --out, because its figures are not results. Add --out DIR.")
        options.targets, options.seeds, options.draws = list(QUICK), [0], 800
        options.short, options.warmup, options.steps = 400, 100, 100
    return options


def main() -> None:
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    targets.folder()
    rows = read(options.out / "sample.csv")
    done = {tuple(r[k] for k in KEYS) for r in rows}
    both = [options.short, options.draws]
    both_or_short = both if options.long_nuts else both[:1]
    lengths = {"NUTS": both_or_short, "NUTS, dense": both_or_short, "pf.sample": both}
    groups = [
        [
            (name, sampler, draws, seed, options.warmup, options.steps)
            for sampler in options.samplers
            for draws in lengths[sampler]
            if (name, sampler, str(draws), str(seed)) not in done
        ]
        for seed in options.seeds
        for name in options.targets
    ]
    for row in runs(groups, options.jobs):
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        rows.append(row)
        save(rows, options.out, options.clock)


if __name__ == "__main__":
    main()
