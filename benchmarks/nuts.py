"""Time to a posterior with a verdict: ``fit_svi`` and ``check``, compared with five ways to run NUTS.

    python benchmarks/nuts.py                                   # about two hours, half of it to compile
    python benchmarks/nuts.py --methods pyro_flows NumPyro      # half of that
    python benchmarks/nuts.py --quick --out DIR                 # two targets, short runs: a smoke run

Each run has a fresh process and both cores to itself, with the threads that each library chooses.  The time is wall
time, from the model to the answer.  It includes compilation and all imports on the way, but not the imports at the top
of a program.  NUTS has its defaults and four chains of 1,000 warm-up draws and 1,000 draws:

* *NumPyro*: ``MCMC(NUTS(model), ...).run(key)``, as a user writes it.  The chains run one after another, with the
  progress bar on (without the bar a run takes longer here).
* *NumPyro, parallel*: one device per chain, after ``numpyro.set_host_device_count(4)``.
* *NumPyro, one program*: all chains in one compiled loop.  This chain method is ours and NumPyro's fastest here.
* *nutpie*: parallel chains on the compiled log-density of the NumPyro model.
* *Pyro*: one chain, compiled.

``pyro_flows`` begins without compiled code; *pyro_flows, warm* is the same program again, once another process has
compiled all that it asked for.

Each NUTS is stopped after ``--limit`` seconds.

The ESS of pyro_flows is that of the 10,000 importance-weighted draws of ``check``.  Its errors are those of 10,000
unweighted draws.  The ESS of NUTS is ArviZ's, the smaller one of bulk and tail, the worst over all latents.  An
interrupted benchmark continues where it stopped.  Writes ``nuts.csv``, ``nuts.md`` and ``nuts.png``.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
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
from graph import wait_for_code
from posteriors import read, write, write_csv

import pyro_flows as pf

OUT = sample.OUT
OURS, WARM, NUTPIE, PYRO = "pyro_flows", "pyro_flows, warm", "nutpie", "Pyro"
NUMPYRO = {  # by the chain method
    "NumPyro": None,
    "NumPyro, parallel": "parallel",
    "NumPyro, one program": sample.one_program,
}
WAYS = {
    "NumPyro": "the chains run one after another, as in `MCMC(NUTS(model), ...)`, with the progress bar on.",
    "NumPyro, parallel": "the chains run in parallel, after `numpyro.set_host_device_count(4)`.",
    "NumPyro, one program": "one compiled loop runs all chains, by a chain method of the benchmark.",
    PYRO: "one chain.",
}
METHODS = OURS, WARM, *NUMPYRO, NUTPIE, PYRO
CODE = Path(tempfile.gettempdir()) / "pyro_flows_nuts"  # folders of compiled code, by target
CHAINS, WARMUP, DRAWS, JUDGED = 4, 1000, 1000, 10_000
CONVERGED = 1.01  # the largest R-hat of converged chains
LIMIT = 300  # seconds until a NUTS is stopped
QUICK = "wells", "eight_schools_centered"
KEYS = "target", "method", "seed"
MEASURES = "seconds", "fit_seconds", "ess", "r_hat", "worst_error", "low_sd", "high_sd", "khat", "verdict", "failed"

Row = dict[str, str]
Found = tuple[sample.Samples, dict[str, Any]]


def flows(name: str, seed: int, steps: int | None) -> Found:
    """Fit ``AutoFlow`` with its defaults and check it."""
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


def with_code(name: str, method: str, seed: int, steps: int | None) -> Found:
    """Fit and check in a program that finds no compiled code, or all code that the one before has asked for."""
    folder = CODE / name
    if method == OURS:
        shutil.rmtree(folder, ignore_errors=True)
    elif not folder.exists():
        raise FileNotFoundError(f"{folder}: run the method {OURS} first")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    found = flows(name, seed, steps)
    wait_for_code()
    return found


def numpyro(name: str, seed: int, warmup: int, draws: int, method: Any) -> Found:
    """Run NumPyro's NUTS with a chain method, or with its defaults."""
    samples, known = sample.nuts(name, seed, warmup, CHAINS * draws, False, method)
    return samples, {"seconds": known["seconds"]}


def nutpie(name: str, seed: int, warmup: int, draws: int) -> Found:
    """Run nutpie on a target."""
    import numpyro_models

    return with_nutpie(numpyro_models.load(name), seed, warmup, draws)


def with_nutpie(model: Any, seed: int, warmup: int, draws: int, **settings: Any) -> Found:
    """Run nutpie on the log-density of a NumPyro model, compiled by JAX."""
    import jax
    import nutpie
    from jax.flatten_util import ravel_pytree
    from numpyro.infer.util import initialize_model
    from nutpie.compiled_pyfunc import from_pyfunc

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
    trace = nutpie.sample(compiled, draws=draws, tune=warmup, chains=CHAINS, seed=seed, progress_bar=False, **settings)
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
    """Run one method on one target and send the row of results.  Needs a fresh process."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if NUMPYRO.get(method) == "parallel":
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={CHAINS}"
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    warnings.simplefilter("ignore")
    warmup, draws = (100, 100) if quick else (WARMUP, DRAWS)
    row: dict[str, Any] = {"target": name, "method": method, "seed": seed}
    try:
        if method in (OURS, WARM):
            samples, known = with_code(name, method, seed, 100 if quick else None)
        elif method in NUMPYRO:
            samples, known = numpyro(name, seed, warmup, draws, NUMPYRO[method])
        else:
            samples, known = (nutpie if method == NUTPIE else plain_pyro)(name, seed, warmup, draws)
        row |= known
        judged = sample.judge(name, samples)
        row |= {key: judged[key] for key in ("worst_error", "low_sd", "high_sd") if key in judged}
        if method not in (OURS, WARM):
            row |= {"ess": min(judged["ess_bulk"], judged["ess_tail"]), "r_hat": judged["r_hat"]}
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    pipe.send({key: f"{value:.5g}" if isinstance(value, float) else str(value) for key, value in row.items()})


def run(name: str, method: str, seed: int, quick: bool, limit: float) -> Row:
    """Run :func:`measure` in a new process.  ``limit`` is the largest number of seconds of a NUTS."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, method, seed, quick, theirs))
    process.start()
    theirs.close()
    try:
        if not mine.poll(None if method in (OURS, WARM) else limit):
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
        "This page is for users who choose between a fitted guide and NUTS. It compares the time from a model to its "
        "posterior: `fit_svi` with its defaults and `check`, or NUTS. "
        + " ".join(
            f"Compared with *{rival}*, ours is faster on {ahead_of(found, OURS, rival)} posteriors, and warm on "
            f"{ahead_of(found, WARM, rival)}."
            for rival in rivals[:2]
        ),
        "",
        f"Reproduce with `python benchmarks/nuts.py`. NUTS has {CHAINS} chains of {WARMUP:,} warm-up draws and "
        f"{DRAWS:,} draws. All runs are in double precision on {os.cpu_count()} cores, with {words}. "
        f"torch {torch.__version__}, {versions}, Python {platform.python_version()}.",
        "",
        "* *pyro_flows* begins without compiled code. *pyro_flows, warm* is the same program again, once the code that "
        "it asked for is compiled.",
        *(f"* *{method}*: {words}" for method, words in WAYS.items() if any(place[1] == method for place in found)),
        "* *s*: wall time from the model to the answer, with compilation, without the imports at the top of a program.",
        "* *ESS*: ours is that of 10,000 independent draws with importance weights. It is too high where k-hat is "
        "above .7. That of NUTS is for 4,000 draws of chains.",
        "* *worst error*, *sd ratio*: the error of a mean in standard deviations, and the ratios of standard "
        "deviations, against reference draws. Both are the worst over the quantities.",
        "* A dash: there is no reference, or no run.",
        "",
        "## Summary",
        "",
        "The ratio of times is our time over theirs. The ratio of ESS/s is our ESS/s over theirs.",
        "",
        *summary(found, rivals),
        "",
        "![Seconds of each method on each posterior](nuts.png)",
        "",
        "*Seconds to the answer, a row per posterior. Marks further to the left are faster; the circles are ours.*",
        "",
        "## All runs",
        "",
        "| target | D | method | s | fit s | ESS | ESS/s | worst error | sd ratio | k-hat or R-hat | verdict |",
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
    ours = method in (OURS, WARM)
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


def time_ratios(found: dict[tuple[str, str], dict[str, Any]], ours: str, rival: str) -> dict[str, float]:
    """Return our time over that of a NUTS, for each target with both."""
    return {
        name: found[name, ours]["seconds"] / found[name, rival]["seconds"]
        for name in targets.NAMES
        if "seconds" in found.get((name, ours), {}) and "seconds" in found.get((name, rival), {})
    }


def ahead_of(found: dict[tuple[str, str], dict[str, Any]], ours: str, rival: str) -> str:
    """Return in words the number of targets on which our time is shorter than that of a NUTS."""
    ratios = time_ratios(found, ours, rival).values()
    return f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"


def summary(found: dict[tuple[str, str], dict[str, Any]], rivals: list[str]) -> list[str]:
    """Return a row per NUTS: the number of targets on which ours is faster, the median ratios, and failures of NUTS."""
    lines = [
        "| ours | compared with | ours is faster on | median ratio of times | median ratio of ESS/s "
        "| ours is slower on (ratio of times) | R-hat above 1.01 |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for ours, rival in itertools.product((OURS, WARM), rivals):
        if ratios := time_ratios(found, ours, rival):
            behind = ", ".join(f"{name} ({ratio:.1f})" for name, ratio in ratios.items() if ratio >= 1)
            middle = statistics.median(ratios.values())
            draws = {name: [found[name, method]["ess"] for method in (ours, rival)] for name in ratios}
            rates = statistics.median(one / theirs / ratios[name] for name, (one, theirs) in draws.items())
            lost = ", ".join(name for name in ratios if found[name, rival]["r_hat"] > CONVERGED)
            shown = f"{ahead_of(found, ours, rival)} | {middle:.2f} | {rates:.1f}"
            lines.append(f"| {ours} | {rival} | {shown} | {behind or 'none'} | {lost or 'none'} |")
    return lines


def picture(rows: list[Row], path: Path) -> None:
    """Draw the seconds of each method on each target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = medians(rows)
    names = [name for name in targets.NAMES if (name, OURS) in found]
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(names) + 1.2), layout="constrained")
    for method, colour, mark in zip(METHODS, ("C3", "C6", "C0", "C9", "C4", "C2", "C1"), "oosDP^v", strict=True):
        places = [i for i, name in enumerate(names) if "seconds" in found.get((name, method), {})]
        seconds = [found[names[i], method]["seconds"] for i in places]
        if not places:
            continue
        axes.scatter(
            seconds, places, color=colour, marker=mark, label=method, zorder=3 if method in (OURS, WARM) else 2
        )
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
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds until a NUTS is stopped")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the three files")
    parser.add_argument("--quick", action="store_true", help="smoke run: two targets, short runs; needs --out")
    options = parser.parse_args()
    if options.quick and options.out == OUT:
        parser.error("--quick needs --out, because its figures are not results. Add --out DIR.")
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
