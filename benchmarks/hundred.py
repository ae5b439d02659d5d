"""``pf.posterior`` on more than a hundred posteriors, compared with references and with NumPyro's NUTS.

    python benchmarks/hundred.py reference               # find the references, many hours of one core
    python benchmarks/hundred.py run --half tune         # our answers on the half that the code is tuned on
    python benchmarks/hundred.py nuts                    # NumPyro's answers
    python benchmarks/hundred.py table                   # the page alone
    python benchmarks/hundred.py run --names rats seeds  # some posteriors, again

The models are Pyro programs as users write them.  ``hundred_numpyro.py`` loads the same files for NumPyro, and
``hundred_reference.py`` finds the references.  A hash of its name puts a posterior into one of two halves: the code is
tuned on one, and the other is only reported.

Each run has a fresh process and is stopped after ``--limit`` seconds.  ``cold`` is ``pf.posterior`` with its defaults,
without compiled code; ``warm`` is the same program again, once the code that it asked for is compiled.  ``NumPyro`` is
NUTS with four parallel chains of 1,000 warm-up draws and 1,000 draws.  Until R-hat is at most 1.01 and every ESS at
least 400, it is run again with twice as many of both, and all runs count.  An interrupted command continues where it
stopped.  Writes ``hundred_reference.csv``, ``hundred.csv``, ``hundred.md`` and ``hundred.png``.
"""

import argparse
import math
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hundred_reference as references
import numpy as np
import pyro
import torch
from graph import LIMIT as CODE_LIMIT
from graph import wait_for_code
from hundred_registry import is_reported
from posteriors import read, write, write_csv

import pyro_flows as pf

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
CODE = Path(tempfile.gettempdir()) / "pyro_flows_hundred"  # folders of compiled code, by posterior
COLD, WARM, NUMPYRO = METHODS = "cold", "warm", "NumPyro"
KEYS = "posterior", "method", "seed"
MEASURES = (
    *("seconds", "fit_seconds", "check_seconds", "guide", "khat", "first_verdict", "stages", "verdict", "log_evidence"),
    *("worst_error", "worst_number", "low_sd", "high_sd", "wrong", "ess", "r_hat", "draws", "threads", "megabytes"),
    *("reason", "failed"),
)
DRAWS, CHAINS, CONVERGED, ENOUGH = 4000, 4, 1.01, 400
ERROR, RATIO, SURE, RELIABLE = 0.1, 0.1, 4.0, 0.7
HALVES = {"tune": (False,), "report": (True,), "both": (False, True)}

Row = dict[str, str]
Samples = dict[str, np.ndarray]


def judged(name: str, draws: Samples, ess: float) -> dict[str, Any]:
    """Return the errors of draws against the reference, in its standard deviations; empty without a reference.

    A number is wrong if its mean or its standard deviation is, beyond four standard errors of both.
    """
    found: dict[str, Any] = {"worst_error": -1.0, "low_sd": math.inf, "high_sd": 0.0, "wrong": ""}
    worst = 0.0
    known, numbers = references.references(name), references.numbers_of(name, draws)
    for key, one in known.items():
        values = one.judged(numbers[key].astype(float))
        error, ratio = abs(float(values.mean()) - one.mean) / one.sd, float(values.std()) / one.sd
        kurtosis = float(((values - values.mean()) ** 4).mean() / max(values.var(), 1e-300) ** 2)
        of_mean = math.hypot(1 / math.sqrt(ess), one.mcse_mean / one.sd)
        of_sd = math.hypot(math.sqrt(max(kurtosis - 1, 1) / 4 / ess), one.mcse_sd / one.sd)
        excess = max(error - ERROR - SURE * of_mean, abs(ratio - 1) - RATIO - SURE * of_sd)
        if not excess <= worst:
            worst, found["wrong"] = excess, key
        if not error <= found["worst_error"]:
            found |= {"worst_error": error, "worst_number": key}
        found |= {"low_sd": min(found["low_sd"], ratio), "high_sd": max(found["high_sd"], ratio)}
    return found if known else {}


def ours(name: str, method: str, seed: int, threads: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """Sample a posterior with the defaults, and tell the measures."""
    from pyro_flows.answers import stages

    folder, checks, check = CODE / name, [], stages.check
    if method == COLD:
        shutil.rmtree(folder, ignore_errors=True)
    elif not folder.exists():
        raise FileNotFoundError(f"{folder}: run the method {COLD} first")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    pyro.enable_validation(False)
    pyro.set_rng_seed(seed)
    model, args = references.load(name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        checks.append(check(*args, **kwargs))
        return checks[-1]

    stages.check = recorded
    start = time.perf_counter()
    answer = pf.posterior(model, *args, num_draws=DRAWS, progress=False)
    row: dict[str, Any] = {"seconds": time.perf_counter() - start}
    row |= {"megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "threads": threads}
    timed = {step.name: step.seconds for step in reversed(answer.steps)}
    row |= {f"{step}_seconds": timed[step] for step in ("fit", "check") if step in timed}
    row |= {"stages": " ".join(step.name for step in answer.steps), "verdict": answer.verdict, "reason": answer.reason}
    row |= {"log_evidence": answer.log_evidence, "guide": answer.steps[0].said.split(",")[0]}
    ess = float(DRAWS)
    if checks:
        row |= {"khat": checks[0].khat, "first_verdict": checks[0].verdict}
    if answer.chains is not None and "chains have" in answer.reason.lower():
        ess = min(ess, float(answer.chains.ess_bulk.min()))
    elif answer.resampled:
        psis = checks[-1].psis
        ess = 1 / (1 / DRAWS + len(psis.log_weights) / psis.ess / (2 * DRAWS))
    draws = {key: value.numpy() for key, value in answer.draws.items()}
    tell(row | {"ess": ess, "draws": DRAWS} | judged(name, draws, max(ess, 1.0)))
    if method == COLD:
        wait_for_code()


def numpyro(name: str, method: str, seed: int, threads: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """Run NumPyro's NUTS as its users do, and again with twice as many draws until it has converged."""
    import hundred_numpyro
    import jax
    from numpyro.infer import MCMC, NUTS

    (model, args), draws, start = hundred_numpyro.load(name), 1000, time.perf_counter()
    while True:
        mcmc = MCMC(NUTS(model), num_warmup=draws, num_samples=draws, num_chains=CHAINS, progress_bar=False)
        mcmc.run(jax.random.PRNGKey(seed), *args)
        samples = {key: np.asarray(value) for key, value in mcmc.get_samples(group_by_chain=True).items()}
        row: dict[str, Any] = {"seconds": time.perf_counter() - start, "draws": CHAINS * draws, "threads": threads}
        numbers = references.by_chain(name, samples)
        numbers = {key: value for key, value in numbers.items() if value.std() > references.FLAT}
        ess, r_hat = references.statistics(numbers, "bulk").min(), references.statistics(numbers, "rhat").max()
        row |= {"megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "ess": ess, "r_hat": r_hat}
        is_done = r_hat <= CONVERGED and ess >= ENOUGH
        flat = {key: value.reshape(-1, *value.shape[2:]) for key, value in samples.items()}
        row |= judged(name, flat, float(max(ess, 1.0)))
        tell(row | {"verdict": "converged" if is_done else "not converged"})
        if is_done:
            return
        draws *= 2


def within(work: Callable[..., None], arguments: tuple[Any, ...], limit: float, threads: int, chains: int) -> Any:
    """Run work in a fresh process, and return what it told last, None if nothing, and how it failed, or ``""``.

    Once our answer without compiled code is there, the process may wait until the code is compiled.
    """
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=deliver, args=(work, arguments, threads, chains, theirs))
    process.start()
    theirs.close()
    told, failed, end = None, "", time.monotonic() + limit
    try:
        while True:
            if not mine.poll(max(0.0, end - time.monotonic())):
                failed = f"stopped after {limit:.0f} s"
                break
            kind, value = mine.recv()
            if kind != "told":
                failed = value
                break
            told = value
            end += CODE_LIMIT * (COLD in arguments)
    except EOFError:
        failed = "the process died"
    process.kill()
    process.join()
    return told, failed


def deliver(work: Callable[..., None], arguments: tuple[Any, ...], threads: int, chains: int, pipe: Connection) -> None:
    """Do the work, and send what it tells and how it ends.  Needs a fresh process."""
    references.prepare(threads, chains)
    try:
        work(*arguments, lambda value: pipe.send(("told", value)))
        pipe.send(("ended", ""))
    except Exception as error:
        pipe.send(("ended", f"{type(error).__name__}: {error}".splitlines()[0][:200]))


def texts(row: dict[str, Any]) -> Row:
    """Return a row of text."""
    return {key: f"{value:.5g}" if isinstance(value, float) else str(value) for key, value in row.items()}


def find_references(names: list[str], options: argparse.Namespace) -> None:
    """Find references, and store each when it is found."""
    known = {row["posterior"] for row in read(references.FACTS)}
    for name in names:
        if name in known and not options.names:
            continue
        given = name, options.limit
        told, failed = within(references.find, given, 3 * options.limit, 1, 1)
        facts, found = told or ({"posterior": name, "failed": failed}, {})
        if failed:
            facts["failed"] = facts.get("failed") or failed
        references.save(texts(facts), found)
        print("  ".join(f"{key} {value}" for key, value in texts(facts).items()), flush=True)


def runs(names: list[str], methods: Iterable[str], options: argparse.Namespace) -> None:
    """Run methods on posteriors, and store a row per run."""
    path = options.out / "hundred.csv"
    tasks = [(name, method, seed) for seed in options.seeds for name in names for method in methods]
    done = {tuple(row[key] for key in KEYS) for row in read(path)} if not options.names else set()
    for name, method, seed in tasks:
        if (name, method, str(seed)) in done:
            continue
        work, chains = (numpyro, CHAINS) if method == NUMPYRO else (ours, 1)
        told, failed = within(work, (name, method, seed, options.threads), options.limit, options.threads, chains)
        row = texts({"posterior": name, "method": method, "seed": seed} | (told or {}))
        if failed and (method == NUMPYRO or told is None):
            row["failed"] = failed
        rows = [old for old in read(path) if any(old[key] != row[key] for key in KEYS)]
        write_csv([*rows, row], [*KEYS, *MEASURES], path)
        print("  ".join(f"{key} {value}" for key, value in row.items() if key != "reason"), flush=True)


def middle(rows: list[Row], key: str) -> float:
    """Return the median of a measure over rows, NaN if no row has it."""
    values = [float(row[key]) for row in rows if row.get(key)]
    return statistics.median(values) if values else math.nan


def seconds_of(rows: list[Row]) -> float:
    """Return the median time of a method; infinite if a run failed, NaN if there is none."""
    return math.inf if any(row["failed"] for row in rows) else middle(rows, "seconds")


def answered(found: dict[str, list[Row]]) -> list[Row]:
    """Return our warm rows of a posterior, or the cold ones if there are no others."""
    return found[WARM] or found[COLD]


def is_wrong(row: Row) -> bool:
    """True if draws are trusted and wrong."""
    return row["verdict"] == "trust" and bool(row["wrong"])


def grouped(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """Return the rows by posterior, in their order, and method."""
    found = {name: {method: [] for method in METHODS} for name in references.entries()}
    for row in rows:
        if row["posterior"] in found:
            found[row["posterior"]][row["method"]].append(row)
    return found


def quantiles(values: list[float], form: str) -> str:
    """Return the median, the upper quartile, the 90 % quantile and the largest value in words."""
    levels = [0.5, 0.75, 0.9, 1.0]
    ranked = sorted(values)
    found = [ranked[math.ceil(level * len(ranked)) - 1] for level in levels] if ranked else []
    return " / ".join(f"{value:{form}}" if math.isfinite(value) else "stopped" for value in found) or "–"


def summary(names: list[str], found: dict[str, dict[str, list[Row]]]) -> list[str]:
    """Return the figures of a half: a label and a value each."""
    mine = {name: answered(found[name]) for name in names}
    mine = {name: rows for name, rows in mine.items() if rows}
    all_rows = [row for rows in mine.values() for row in rows]
    judged_rows = [row for row in all_rows if row["worst_error"]]
    trusted = [row for row in all_rows if row["verdict"] == "trust"]
    wrong = sorted({row["posterior"] for row in all_rows if is_wrong(row)})
    times = [(seconds_of(rows), seconds_of(found[name][NUMPYRO])) for name, rows in mine.items()]
    ratios = [mine_of / theirs for mine_of, theirs in times if not (mine_of == theirs == math.inf)]
    ratios = [ratio for ratio in ratios if not math.isnan(ratio)]
    small = sum(bool(row["khat"]) and float(row["khat"]) < RELIABLE for row in all_rows)
    stages = [row for row in trusted if row["stages"] in ("fit check", "fit check draws")]
    return [
        f"{len(mine)} of {len(names)}",
        f"{small} of {len(all_rows)}",
        f"{len(stages)} of {len(all_rows)}",
        f"{len(trusted)} of {len(all_rows)}",
        f"{len(wrong)} of {len(judged_rows)}{': ' * bool(wrong)}{', '.join(wrong)}",
        str(sum(bool(row["failed"]) for row in all_rows)),
        quantiles([seconds_of(found[name][COLD]) for name in names if found[name][COLD]], ".0f"),
        quantiles([seconds_of(found[name][WARM]) for name in names if found[name][WARM]], ".0f"),
        quantiles([seconds_of(found[name][NUMPYRO]) for name in names if found[name][NUMPYRO]], ".0f"),
        f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}",
        f"{statistics.median(ratios):.2f}" if ratios else "–",
    ]


LABELS = (
    "posteriors with an answer",
    "runs whose first fit has a k-hat below .7",
    "runs that the first fit and its check answer",
    "trusted runs",
    "posteriors with a trusted answer that is wrong",
    "failed runs",
    "seconds, cold: median / 75 % / 90 % / largest",
    "seconds, warm",
    "seconds, NumPyro",
    "posteriors on which ours is faster than NumPyro",
    "median ratio of times, ours over NumPyro",
)


def line(name: str, found: dict[str, list[Row]], facts: Row) -> str:
    """Return the line of a posterior."""
    mine = answered(found)
    family, half = references.entries()[name].family, "report" if is_reported(name) else "tune"
    how = facts.get("how", "–") + " only" * (facts.get("failed") == references.ONE_SAMPLER)
    cells = [name, family, facts.get("latents", ""), half, how if references.is_sound(facts) else "none"]
    failed = next((row["failed"] for row in mine if row["failed"]), "")
    errors = [row for row in mine if row["worst_error"]]
    cells += [f"{middle(mine, 'khat'):.2f}", ", ".join(sorted({row["stages"] for row in mine}))]
    verdict = ", ".join(sorted({row["verdict"] for row in mine if row["verdict"]})) or failed.replace("|", "/")[:60]
    cells += [verdict + ", **wrong**" * any(is_wrong(row) for row in mine)]
    if errors:
        cells += [f"{max(float(row['worst_error']) for row in errors):.3f}"]
        low, high = min(float(row["low_sd"]) for row in errors), max(float(row["high_sd"]) for row in errors)
        cells += [f"{low:.2f}–{high:.2f}"]
    else:
        cells += ["–", "–"]
    times = {method: seconds_of(found[method]) for method in METHODS}
    cells += [f"{times[method]:.1f}" for method in METHODS]
    ratio = seconds_of(mine) / times[NUMPYRO] if math.isfinite(times[NUMPYRO]) else math.nan
    cells += [f"{ratio:.2f}", f"{middle(mine, 'megabytes'):.0f}"]
    return "| " + " | ".join("–" if cell in ("nan", "inf", "") else cell for cell in cells) + " |"


def page(rows: list[Row]) -> str:
    """Return the page of the results."""
    found, names = grouped(rows), list(references.entries())
    facts = {row["posterior"]: row for row in read(references.FACTS)}
    halves = {half: [name for name in names if is_reported(name) is flag] for half, (flag,) in list(HALVES.items())[:2]}
    figures = [summary(of_half, found) for of_half in halves.values()]
    threads = sorted({row["threads"] for row in rows if row["threads"]})
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpyro", "jax", "nutpie", "pyro-ppl"))
    one_sampler = sum(facts.get(name, {}).get("failed") == references.ONE_SAMPLER for name in names)
    without = [name for name in names if not references.is_sound(facts.get(name, {}))]
    return "\n".join(
        [
            "# A hundred posteriors",
            "",
            "This page is for users who ask how often `pf.posterior` finds the posterior of a model like theirs, and "
            f"in which time. It has {len(names)} posteriors: regressions, hierarchies, series, mixtures and others. "
            "The code is tuned on one half; the other half is only reported.",
            "",
            "Reproduce with `python benchmarks/hundred.py run` and `python benchmarks/hundred.py nuts`. All runs are "
            f"in double precision on {os.cpu_count()} cores, with {' or '.join(threads)} thread(s). torch "
            f"{torch.__version__}, {versions}, Python {platform.python_version()}.",
            "",
            "* *k-hat*: that of the first fit.",
            "* *stages*: the stages of `pf.posterior` that ran.",
            "* *wrong*: the answer is trusted, but a mean is off by more than .1 sd, or an sd by more than 10 %, "
            "beyond four standard errors.",
            "* *worst error*, *sd ratio*: the largest error of a mean, in sds of the reference, and the ratios of sds, "
            "over all numbers. They include the standard errors of 4,000 draws.",
            "* *cold*, *warm*, *NumPyro*: seconds from the model to the answer; ours are warm if an earlier run has "
            "compiled the graphs. The ratio takes *warm*, or *cold* without a warm run. NumPyro runs four chains, in "
            "sequence with one thread, and again with twice as many draws until R-hat is at most 1.01 and the ESS at "
            "least 400. It runs loops over time as the model has them, without `scan`. Our runs of the two halves "
            "shared the two cores with each other and, for some of the time, with tests.",
            "* *MB*: the largest memory of the process.",
            "* A dash: there is no reference, no run, or a run was stopped.",
            "",
            "## Summary",
            "",
            "| figure | tuned half | reported half |",
            "|---|---|---|",
            *(f"| {label} | {one} | {other} |" for label, one, other in zip(LABELS, *figures, strict=True)),
            "",
            "![Seconds of ours and of NumPyro, and errors](hundred.png)",
            "",
            "*Left: seconds of ours and of NumPyro; below the line ours is faster. Right: the largest error of "
            "a mean and k-hat of the first fit. Hollow marks are the tuned half.*",
            "",
            "## Posteriors",
            "",
            "| posterior | family | latents | half | reference | k-hat | stages | verdict | worst error | sd ratio "
            "| cold | warm | NumPyro | ours / NumPyro | MB |",
            "|---|---|---:|---|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
            *(line(name, found[name], facts.get(name, {})) for name in names),
            "",
            "## Limits",
            "",
            "* A reference is exact, comes from posteriordb, or from a NUTS with an ESS of 4,000 that nutpie confirms.",
            f"* {len(without)} have no reference; of {one_sampler} of them only one sampler has ended.",
            "* Of a site with more than 300 numbers, 300 are compared.",
            "* Numbers with heavy tails are compared after an asinh, since their standard deviation may be infinite.",
            "",
        ]
    )


def picture(rows: list[Row], path: Path) -> None:
    """Plot our times and errors, a mark per posterior."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for name, found in grouped(rows).items():
        mine = answered(found)
        filled = {"facecolors": "C0" if is_reported(name) else "none", "edgecolors": "C0"}
        left.scatter(seconds_of(found[NUMPYRO]), seconds_of(mine), **filled)
        right.scatter(middle(mine, "khat"), middle(mine, "worst_error"), **filled)
    left.axline((10, 10), (20, 20), color="0.6", lw=1)
    left.set(xscale="log", yscale="log", xlabel="NumPyro, seconds", ylabel="pf.posterior, seconds")
    right.axhline(ERROR, color="0.6", lw=1, ls=":")
    right.axvline(RELIABLE, color="0.6", lw=1, ls=":")
    right.set(yscale="log", xlabel="k-hat of the first fit", ylabel="largest error of a mean (sd)")
    figure.savefig(path, dpi=120)


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("reference", "run", "nuts", "table"))
    parser.add_argument("--half", choices=HALVES, default="both", help="posteriors of one half")
    parser.add_argument("--names", nargs="+", help="posteriors, which are run again if there are results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", choices=(COLD, WARM), default=[COLD, WARM], help="methods of run")
    parser.add_argument("--limit", type=float, default=references.LIMIT, help="seconds until a run is stopped")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results of runs")
    options = parser.parse_args()
    if wrong := set(options.names or ()) - set(references.entries()):
        parser.error(f"--names: no posterior is named {', '.join(sorted(wrong))}. Use names of the page.")
    return options


def main() -> None:
    options = parsed()
    torch.set_default_dtype(torch.float64)
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.names or [name for name in references.entries() if is_reported(name) in HALVES[options.half]]
    if options.command == "reference":
        return find_references(names if options.names else sorted(names, key=references.latents), options)
    if options.command != "table":
        runs(names, options.methods if options.command == "run" else (NUMPYRO,), options)
    rows = read(options.out / "hundred.csv")
    write(page(rows), options.out / "hundred.md")
    return picture(rows, options.out / "hundred.png")


if __name__ == "__main__":
    main()
