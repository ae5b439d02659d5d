"""How long until there is a posterior that can be trusted?  ``fit_svi`` and ``check`` beside four NUTS.

    python benchmarks/nuts.py                                   # about an hour
    python benchmarks/nuts.py --methods pyro_flows NumPyro      # a quarter of that
    python benchmarks/nuts.py --quick --out DIR                 # two targets, short runs: a smoke run

Each run has a fresh process and both cores to itself, with the threads that each library chooses.  The time is that of
the wall, from the model at hand to the answer, with compilation and all that is imported on the way, without the
imports at the top of a program.  NUTS has its defaults and four chains of 1,000 warm-up draws and 1,000 draws:

* *NumPyro*: as a user writes it, ``MCMC(NUTS(model), ...).run(key)``, which runs the chains one after another and
  shows its progress (without that it takes longer here);
* *NumPyro, parallel*: each chain on a device of its own, after ``numpyro.set_host_device_count(4)``;
* *NumPyro, one program*: all chains in one compiled loop, a chain method of ours and NumPyro's fastest here;
* *nutpie*: its chains in parallel, on the compiled log-density of the NumPyro model;
* *Pyro*: one chain, compiled.

Each NUTS is stopped after ``--limit`` seconds.

The effective draws of pyro_flows are those of the 10,000 draws that ``check`` has weighed, and its errors those of as
many draws, not weighed; those of NUTS are ArviZ's, the smaller of bulk and tail, the worst over all latents.  An
interrupted benchmark continues where it stopped.  Writes ``nuts.csv``, ``nuts.md`` and ``nuts.png``.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import platform
import statistics
import warnings
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import sample
import targets
import torch
from posteriors import read, write, write_csv

import pyro_flows as pf

OUT = sample.OUT
OURS, NUTPIE, PYRO = "pyro_flows", "nutpie", "Pyro"
NUMPYRO = {  # by the chain method
    "NumPyro": None,
    "NumPyro, parallel": "parallel",
    "NumPyro, one program": sample.one_program,
}
METHODS = OURS, *NUMPYRO, NUTPIE, PYRO
CHAINS, WARMUP, DRAWS, JUDGED = 4, 1000, 1000, 10_000
CONVERGED = 1.01  # the R-hat that chains must come to
LIMIT = 300  # seconds that a NUTS may take
QUICK = "wells", "eight_schools_centered"
KEYS = "target", "method", "seed"
MEASURES = "seconds", "fit_seconds", "ess", "r_hat", "worst_error", "low_sd", "high_sd", "khat", "verdict", "failed"

Row = dict[str, str]
Found = tuple[sample.Samples, dict[str, Any]]


def flows(name: str, seed: int, steps: int | None) -> Found:
    """Fit ``AutoFlow`` by its defaults and check it."""
    pyro.set_rng_seed(seed)
    model = targets.load(name).model
    start = sample.clocks()
    guide = pf.AutoFlow(model)
    pf.fit_svi(model, guide, steps=steps, progress=False)
    fitted = sample.elapsed(start)["seconds"]
    check = pf.check(model, guide)
    known = sample.elapsed(start)
    draws = {key: value.unsqueeze(0).numpy() for key, value in guide.sample(JUDGED).items()}
    seen = {"ess": check.psis.ess, "khat": check.khat, "verdict": check.verdict, "fit_seconds": fitted}
    return draws, {"seconds": known["seconds"], **seen}


def numpyro(name: str, seed: int, warmup: int, draws: int, method: Any) -> Found:
    """Run NumPyro's NUTS by a chain method, or by its defaults."""
    samples, known = sample.nuts(name, seed, warmup, CHAINS * draws, False, method)
    return samples, {"seconds": known["seconds"]}


def nutpie(name: str, seed: int, warmup: int, draws: int) -> Found:
    """Run nutpie on the log-density of the NumPyro model, compiled by JAX."""
    import jax
    import numpyro_models
    import nutpie
    from jax.flatten_util import ravel_pytree
    from numpyro.infer.util import initialize_model
    from nutpie.compiled_pyfunc import from_pyfunc

    model = numpyro_models.load(name)
    start = sample.clocks()
    known = initialize_model(jax.random.PRNGKey(seed), model)
    first, unravel = ravel_pytree(known.param_info.z)
    both = jax.jit(jax.value_and_grad(lambda z: -known.potential_fn(unravel(z))))

    def make_logp(**_: Any) -> Any:
        def logp(z: np.ndarray, **_: Any) -> tuple[float, np.ndarray]:
            value, slope = both(z)
            return float(value), np.asarray(slope)

        return logp

    compiled = from_pyfunc(
        ndim=len(first),
        make_logp_fn=make_logp,
        make_expand_fn=lambda *_, **__: lambda z, **_: {"z": np.asarray(z)},
        expanded_dtypes=[np.dtype(np.float64)],
        expanded_shapes=[(len(first),)],
        expanded_names=["z"],
        make_initial_point_fn=lambda seed: (
            np.asarray(first) + 0.1 * np.random.default_rng(seed).normal(size=len(first))
        ),
    )
    trace = nutpie.sample(compiled, draws=draws, tune=warmup, chains=CHAINS, seed=seed, progress_bar=False)
    flat = np.asarray(trace.posterior["z"])
    seconds = sample.elapsed(start)["seconds"]
    constrain = jax.jit(jax.vmap(lambda z: known.postprocess_fn(unravel(z))))
    values = constrain(flat.reshape(-1, flat.shape[-1]))
    samples = {key: np.asarray(value).reshape(*flat.shape[:2], *value.shape[1:]) for key, value in values.items()}
    return samples, {"seconds": seconds}


def plain_pyro(name: str, seed: int, warmup: int, draws: int) -> Found:
    """Run one chain of Pyro's NUTS."""
    from pyro.infer import MCMC, NUTS

    pyro.set_rng_seed(seed)
    model = targets.load(name).model
    start = sample.clocks()
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run()
    seconds = sample.elapsed(start)["seconds"]
    samples = {key: value.numpy() for key, value in mcmc.get_samples(group_by_chain=True).items()}
    return samples, {"seconds": seconds}


def measure(name: str, method: str, seed: int, quick: bool, pipe: Connection) -> None:
    """Send a row of results: one run of one method on one target.  It needs a fresh process."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if NUMPYRO.get(method) == "parallel":
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={CHAINS}"
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    warnings.simplefilter("ignore")
    warmup, draws = (100, 100) if quick else (WARMUP, DRAWS)
    row: dict[str, Any] = {"target": name, "method": method, "seed": seed}
    try:
        if method == OURS:
            samples, known = flows(name, seed, 100 if quick else None)
        elif method in NUMPYRO:
            samples, known = numpyro(name, seed, warmup, draws, NUMPYRO[method])
        else:
            samples, known = (nutpie if method == NUTPIE else plain_pyro)(name, seed, warmup, draws)
        row |= known
        judged = sample.judge(name, samples)
        row |= {key: judged[key] for key in ("worst_error", "low_sd", "high_sd") if key in judged}
        if method != OURS:
            row |= {"ess": min(judged["ess_bulk"], judged["ess_tail"]), "r_hat": judged["r_hat"]}
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    pipe.send({key: f"{value:.5g}" if isinstance(value, float) else str(value) for key, value in row.items()})


def run(name: str, method: str, seed: int, quick: bool, limit: float) -> Row:
    """Run :func:`measure` in a process of its own, for so many seconds at most where it is NUTS."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, method, seed, quick, theirs))
    process.start()
    theirs.close()
    try:
        if not mine.poll(None if method == OURS else limit):
            return {"target": name, "method": method, "seed": str(seed), "failed": f"stopped after {limit:.0f} s"}
        return mine.recv()
    except EOFError:
        return {"target": name, "method": method, "seed": str(seed), "failed": "the process died"}
    finally:
        process.kill()
        process.join()


def medians(rows: list[Row]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the median over seeds of each measure, and the verdicts, by target and method."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["method"]), []).append(row)
    found = {}
    for place, mine in groups.items():
        numbers = {
            measure: statistics.median(float(row[measure]) for row in mine)
            for measure in MEASURES[:-2]
            if all(row.get(measure) for row in mine)
        }
        words = {key: ", ".join(sorted({row[key] for row in mine if row.get(key)})) for key in MEASURES[-2:]}
        found[place] = {**numbers, **words}
    return found


def table(rows: list[Row]) -> str:
    """Return the results as Markdown."""
    found, seeds = medians(rows), sorted({row["seed"] for row in rows}, key=int)
    words = f"medians of the seeds {' '.join(seeds)}" if len(seeds) > 1 else f"one seed, {seeds[0]}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpyro", "jax", "nutpie", "pyro-ppl"))
    rivals = [m for m in (*NUMPYRO, NUTPIE) if any(place[1] == m for place in found)]
    lines = [
        "# Time to a posterior",
        "",
        f"`fit_svi` with its defaults and `check`, beside NUTS ({CHAINS} chains of {WARMUP:,} + {DRAWS:,} draws), "
        f"{words}, in double precision on {os.cpu_count()} cores; torch {torch.__version__}, "
        f"{versions}, Python {platform.python_version()}.",
        "Seconds are those of the wall, from the model to the answer, with compilation, without the imports at the top "
        "of a program. NumPyro's chains run one after another, as `MCMC(NUTS(model), ...)` does, its progress bar on; "
        "in parallel, after `numpyro.set_host_device_count(4)`; or in one "
        "compiled loop, by a chain method of our own. Pyro runs one chain. Errors of means and ratios of sds are "
        "against reference draws, the worst over the quantities; a dash: there is no reference, or no run. Ours are "
        "effective draws of 10,000 independent ones that are weighed, an estimate too high where k-hat is above .7; "
        "those of NUTS are of 4,000 draws of chains. A ratio is our time over theirs, or our ESS/s.",
        "Reproduce with `python benchmarks/nuts.py`.",
        "",
        *summary(found, rivals),
        "",
        "![Seconds of each method on each posterior](nuts.png)",
        "",
        "| target | D | method | s | fit, s | ESS | ESS/s | worst error | sd | k-hat or R-hat | verdict |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name in targets.NAMES:
        for method in METHODS:
            if m := found.get((name, method)):
                lines.append("| " + " | ".join([name, str(targets.DIMS[name]), *cells(method, m)]) + " |")
    return "\n".join(lines) + "\n"


def cells(method: str, m: dict[str, Any]) -> list[str]:
    """Return the cells of one method on one target."""
    if "seconds" not in m:
        return [method, *["–"] * 7, m["failed"].replace("|", "/")[:60]]
    errors = [f"{m['worst_error']:.3f}", f"{m['low_sd']:.2f}–{m['high_sd']:.2f}"] if "low_sd" in m else ["–"] * 2
    ours = method == OURS
    return [
        f"**{method}**" if ours else method,
        f"{m['seconds']:.1f}",
        f"{m['fit_seconds']:.1f}" if ours else "",
        f"{m['ess']:,.0f}",
        f"{m['ess'] / m['seconds']:,.0f}",
        *errors,
        f"{m['khat']:.2f}" if ours else "–" if math.isnan(m["r_hat"]) else f"{m['r_hat']:.3f}",
        m["verdict"],
    ]


def summary(found: dict[tuple[str, str], dict[str, Any]], rivals: list[str]) -> list[str]:
    """Return a line for each NUTS: on how many targets ours is ahead, the median ratios, and where NUTS fails."""
    lines = [
        "| beside | ahead in time on | median ratio of times | of ESS/s | behind on | R-hat above 1.01 |",
        "|---|---:|---:|---:|---|---|",
    ]
    for rival in rivals:
        ratios = {
            name: found[name, OURS]["seconds"] / found[name, rival]["seconds"]
            for name in targets.NAMES
            if "seconds" in found.get((name, OURS), {}) and "seconds" in found.get((name, rival), {})
        }
        if ratios:
            behind = ", ".join(f"{name} ({ratio:.1f})" for name, ratio in ratios.items() if ratio >= 1)
            ahead = sum(ratio < 1 for ratio in ratios.values())
            middle = statistics.median(ratios.values())
            draws = {name: [found[name, method]["ess"] for method in (OURS, rival)] for name in ratios}
            rates = statistics.median(ours / theirs / ratios[name] for name, (ours, theirs) in draws.items())
            lost = ", ".join(name for name in ratios if found[name, rival]["r_hat"] > CONVERGED)
            shown = f"{ahead} of {len(ratios)} | {middle:.2f} | {rates:.1f}"
            lines.append(f"| {rival} | {shown} | {behind or 'none'} | {lost or 'none'} |")
    return lines


def picture(rows: list[Row], path: Path) -> None:
    """Draw the seconds of each method on each target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = medians(rows)
    names = [name for name in targets.NAMES if (name, OURS) in found]
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(names) + 1.2), layout="constrained")
    for method, colour, mark in zip(METHODS, ("C3", "C0", "C9", "C4", "C2", "C1"), "osDP^v", strict=True):
        places = [i for i, name in enumerate(names) if "seconds" in found.get((name, method), {})]
        seconds = [found[names[i], method]["seconds"] for i in places]
        if not places:
            continue
        axes.scatter(seconds, places, color=colour, marker=mark, label=method, zorder=3 if method == OURS else 2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds to the answer")
    axes.grid(axis="both", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(targets.NAMES), choices=targets.NAMES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a NUTS may take")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the three files")
    parser.add_argument("--quick", action="store_true", help="two targets, short runs: needs --out")
    options = parser.parse_args()
    if options.quick and options.out == OUT:
        parser.error("--quick needs --out: its figures are no results")
    if options.quick:
        options.targets = list(QUICK)
    options.out.mkdir(parents=True, exist_ok=True)
    targets.folder()
    rows = read(options.out / "nuts.csv")
    done = {tuple(row[key] for key in KEYS) for row in rows}
    for seed in options.seeds:
        for name in options.targets:
            for method in options.methods:
                if (name, method, str(seed)) in done:
                    continue
                row = run(name, method, seed, options.quick, options.limit)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                rows.append(row)
                write_csv(rows, [*KEYS, *MEASURES], options.out / "nuts.csv")
    write(table(rows), options.out / "nuts.md")
    picture(rows, options.out / "nuts.png")


if __name__ == "__main__":
    main()
