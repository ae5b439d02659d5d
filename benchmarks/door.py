"""Does ``posterior`` find the posterior, or report that it does not, and how long does it take?

    python benchmarks/door.py                                  # all posteriors, about two hours on one core
    python benchmarks/door.py --kinds curved modes --seeds 0   # some classes of posteriors
    python benchmarks/door.py --only kidiq funnel --out DIR    # posteriors whose names contain one of these words
    python benchmarks/door.py --quick --out DIR                # one target, ten seconds: a smoke run

*posteriors* are the targets of ``targets.py``.  *modes* are two Gaussians 8 sd apart, named by the weight of the first.
*curved* are bananas, a Student t and funnels.  *attacks* are posteriors of each class of ``attacks.py``.  The function
gets the model and the number of draws.

An answer is *right* if all means are within .1 sd, all sds within 10 %, and the total variation of all marginals is at
most .2.  Posteriors with published moments have no marginals to compare.  A wrong answer that is trusted is a failure.

*By hand* is what the docs advise, from the same seed in the same process: ``fit_svi`` and ``check``; the guide's draws,
``resample`` or ``sample`` as the verdict says; and ``anneal`` first if a mode is missing.  Times are those of the
processor, which do not depend on what else the machine does.

An interrupted run resumes.  Writes ``door.csv`` and ``door.md`` into ``docs/benchmarks``.
"""

import argparse
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import posteriors
import targets
import torch
from attacks import ATTACKS, banana, free_of, student, variation
from neutra import neal
from objectives import two_modes
from torch import Tensor

import pyro_flows as pf
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task

KINDS = {
    "posteriors": "posteriors of data",
    "modes": "two Gaussians, 8 sd apart",
    "curved": "curved and heavy-tailed posteriors",
    "attacks": "posteriors that fool simpler checks",
}
ATTACKED = (
    *("two clusters", "three clusters", "three squared weights", "a frequency", "product 1 ± 0.1", "a magnitude"),
    *("spike of 0.01 and slab, 10-D", "spike of 0.05 and slab, 3-D", "spike within a slab, 2-D"),
    *("4% of sd 1 at 20, 1-D", "4% of sd 1 at 20, 10-D", "1% of sd 1 at 100, 2-D"),
    *("two boxes, 2-D", "two boxes, 10-D", "normal and truncated mode", "half-space, 3-D"),
    *("a ring", "two narrow modes, 1-D", "two narrow modes, 3-D", "exponential", "a cross", "soft checkerboard"),
    *("one bimodal of 10", "two angles", "scales of 1e-3 and 10", "two corners of a simplex", "enumerated labels"),
)
KEYS = "kind", "target", "seed"
MEASURES = (
    *("stages", "verdict", "right", "log_evidence", "worst_error", "low_sd", "high_sd", "variation", "seconds"),
    *("by_hand", "hand_error", "hand_seconds", "reason", "failed"),
)
ERROR, RATIO, VARIATION = 0.1, 0.1, 0.2
DRAWS, KEPT, FLAT = 100_000, 20_000, 1e-9  # exact draws, those of an answer, and the sd of a constant
REFUSALS = "ValueError: ", "FloatingPointError: "
Row = dict[str, str]


@dataclass(frozen=True)
class Case:
    """Posterior, with a function that judges draws.

    Attributes:
        model: The Pyro model, without arguments.
        judge: Maps draws of the latents to errors, by keys of ``MEASURES``.
    """

    model: Callable[[], None]
    judge: Callable[[targets.Draws], dict[str, float]]


def summed_up(errors: list[float], ratios: list[float]) -> dict[str, float]:
    """Return the largest error of each kind."""
    return {"worst_error": float(max(errors)), "low_sd": float(min(ratios)), "high_sd": float(max(ratios))}


def of_data(name: str) -> Case:
    """Return a posterior of ``targets.py``, judged by its reference moments."""
    target = targets.load(name)
    moments = {} if name in posteriors.UNRELATED else targets.reference_moments(name)

    def judge(draws: targets.Draws) -> dict[str, float]:
        ours = target.quantities(draws)
        errors = [abs(float(ours[key].mean()) - mean) / sd for key, (mean, sd) in moments.items()]
        return summed_up(errors, [float(ours[key].std()) / sd for key, (_, sd) in moments.items()]) if moments else {}

    return Case(target.model, judge)


def joined(draws: targets.Draws) -> Tensor:
    """Return all coordinates of draws, ``(N, K)``."""
    return torch.cat([draws[name].reshape(len(draws[name]), -1) for name in sorted(draws)], -1)


def of_truth(
    model: Callable[[], None],
    truth: Callable[[int], targets.Draws],
    numbers: Callable[[targets.Draws], Tensor] = joined,
) -> Case:
    """Return a posterior that is judged by exact draws; ``numbers`` maps draws to the compared quantities."""

    def judge(draws: targets.Draws) -> dict[str, float]:
        exact = truth(DRAWS)
        ours, theirs = numbers(draws), numbers(exact)
        varies = theirs.std(0) > FLAT
        ours, theirs = ours[:, varies], theirs[:, varies]
        errors, ratios = (ours.mean(0) - theirs.mean(0)).abs() / theirs.std(0), ours.std(0) / theirs.std(0)
        worst = max(variation(a, b) for a, b in zip(ours.T, theirs.T, strict=True))
        return summed_up(errors.tolist(), ratios.tolist()) | {"variation": worst}

    return Case(model, judge)


def of_modes(weight: float) -> Case:
    """Return the two Gaussians of ``objectives.py``, with the given weight of the first."""

    def truth(number: int) -> targets.Draws:
        z = torch.randn(number, 2)
        z[:, 0] += torch.where(torch.rand(number) < weight, -4.0, 4.0)
        return {"z": z}

    return of_truth(two_modes(weight), truth)


def of_attack(name: str) -> Case:
    """Return a posterior of ``attacks.py``."""
    target = ATTACKS[name].model()
    exact = Density(Task(target.model, target.exact, (), {}).check())
    return of_truth(target.model, target.truth, exact.read.numbers)  # angles count as cosine and sine


def of_funnel() -> Case:
    """Return Neal's funnel in ten dimensions."""

    case = of_truth(lambda: None, lambda number: {"v": 3 * torch.randn(number)})
    # Only v is judged: the sds of the other latents depend on a few extreme draws.
    return Case(neal, lambda draws: case.judge({"v": draws["v"]}))


def of_law(law: Callable[[], Any]) -> Case:
    """Return a posterior that equals a given distribution."""
    target = free_of(law)
    return of_truth(target.model, target.truth)


def cases() -> dict[tuple[str, str], Callable[[], Case]]:
    """Return all posteriors, by class and name."""
    found: dict[tuple[str, str], Callable[[], Case]] = {
        **{("posteriors", name): partial(of_data, name) for name in targets.NAMES},
        **{("modes", f"{weight:g}"): partial(of_modes, weight) for weight in (0.5, 0.2)},
        ("curved", "banana of 0.5"): partial(of_law, partial(banana, 0.5)),
        ("curved", "banana of 3"): partial(of_law, partial(banana, 3.0)),
        ("curved", "Student t of 5 df, 5-D"): partial(of_law, partial(student, 5.0, 5)),
        ("curved", "funnel, 10-D"): of_funnel,
    }
    return found | {("attacks", name): partial(of_attack, name) for name in ATTACKED}


def is_right(row: dict[str, Any]) -> bool:
    """True if no known error is above its limit."""
    return (
        row.get("worst_error", 0.0) <= ERROR
        and row.get("low_sd", 1.0) >= 1 - RATIO
        and row.get("high_sd", 1.0) <= 1 + RATIO
        and row.get("variation", 0.0) <= VARIATION
    )


def by_hand(model: Callable[[], None]) -> tuple[str, targets.Draws]:
    """Return the name of the last remedy that the docs advise, and draws by it."""
    guide = pf.AutoFlow(model)
    pf.fit_svi(model, guide, progress=False)
    found = pf.check(model, guide)
    if found.misses_a_mode:
        annealed = pf.anneal(model, progress=False).guide
        assert annealed is not None
        guide, found = annealed, pf.check(model, annealed)
    if found.trusted:
        return "guide", guide.sample(KEPT)
    if found.verdict == "reweight":
        return "resample", pf.resample(model, guide, num_samples=KEPT, num_weighed=4 * KEPT)
    return "sample", pf.sample(model, guide, num_draws=KEPT, progress=False).flat


def measure(kind: str, name: str, seed: int, seconds: float | None) -> Row:
    """Ask for a posterior once, and return a row of results."""
    posteriors.prepare(seed)
    warnings.simplefilter("ignore", UserWarning)
    row: dict[str, Any] = dict(zip(KEYS, (kind, name, seed), strict=True))
    case, start = cases()[kind, name](), time.process_time()
    try:
        found = pf.posterior(case.model, num_draws=KEPT, seconds=seconds, progress=False)
        row["seconds"] = time.process_time() - start
        row |= {"stages": " → ".join(step.name for step in found.steps), "verdict": found.verdict}
        row |= {"log_evidence": found.log_evidence, "reason": found.reason} | case.judge(found.draws)
        row["right"] = is_right(row)
        if kind != "attacks" and not seconds:
            posteriors.prepare(seed)
            start = time.process_time()
            row["by_hand"], draws = by_hand(case.model)
            row |= {"hand_seconds": time.process_time() - start, "hand_error": case.judge(draws).get("worst_error", "")}
    except Exception as error:
        row["seconds"] = time.process_time() - start
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return {key: f"{value:.5g}" if isinstance(value, float) else str(value) for key, value in row.items()}


def outcome(row: Row) -> str:
    """Return the outcome of a run in a word.  An error that names the fault counts as a refusal."""
    if row.get("failed"):
        return "refused" if row["failed"].startswith(REFUSALS) else "failed"
    return "refused" if row["verdict"] != "trust" else "right" if row["right"] == "True" else "wrong"


def table(rows: list[Row]) -> str:
    """Return the results as Markdown."""

    def counted(word: str) -> int:
        return sum(outcome(row) == word for row in rows)

    refused = "; ".join(row["target"] for row in rows if outcome(row) == "refused")
    lines = [
        "# The door",
        "",
        "This page is for users who ask how far they can rely on `pf.posterior`. It compares its draws with known "
        f"posteriors. Of {len(rows)} runs, {counted('right')} are right, "
        f"{counted('refused')} refused, {counted('wrong')} wrong and {counted('failed')} failed. Reproduce with "
        "`python benchmarks/door.py`.",
        "",
        f"`pf.posterior` gets the model alone, and returns {KEPT:,} draws. A run is *refused* if their verdict is "
        f'"do not trust" (here: {refused or "none"}). Two Gaussians are named by the '
        "weight of the first.",
        "",
        "*error*: the largest error of a mean, in sd of the posterior. *sds*: the ratios of sds to the posterior's. "
        "*variation*: the largest total variation of a marginal. A run is *right* if errors are at most "
        f"{ERROR:g}, ratios are {1 - RATIO:g} to {1 + RATIO:g}, and variations are at most {VARIATION:g}. "
        "–: no reference exists. *s*: seconds of the processor. *by hand*: the ratio of the times, ours over those of "
        "`fit_svi`, `check` and the remedy that the docs advise, and the error of that answer.",
        "",
        "| posteriors | runs | right | refused | wrong | failed | median s |",
        "|---|" + "---:|" * 6,
    ]
    for kind, words in KINDS.items():
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            counts = [sum(outcome(row) == word for row in mine) for word in ("right", "refused", "wrong", "failed")]
            seconds = statistics.median(float(row["seconds"]) for row in mine)
            lines.append(f"| {words} | {len(mine)} | {' | '.join(map(str, counts))} | {seconds:.0f} |")
    for kind, words in KINDS.items():
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            head = "| posterior | seed | stages | outcome | error | sds | variation | s | by hand | ratio | error |"
            title = words[0].upper() + words[1:]
            lines += ["", f"## {title}", "", head, "|---|---:|---|---|" + "---:|" * 4 + "---|---:|---:|"]
            lines += [line(row) for row in mine]
    return "\n".join(lines) + "\n"


def line(row: Row) -> str:
    """Return a row of the table of runs."""

    def text(key: str, form: str) -> str:
        return f"{float(row[key]):{form}}" if row.get(key) else "–"

    sds = f"{text('low_sd', '.3f')}–{text('high_sd', '.3f')}" if row.get("low_sd") else "–"
    word = f"**{outcome(row)}**" if outcome(row) in ("wrong", "failed") else outcome(row)
    cells = [row["target"], row["seed"], row.get("stages", row.get("failed", "")), word]
    cells += [text("worst_error", ".3f"), sds, text("variation", ".3f"), text("seconds", ".0f")]
    ratio = f"{float(row['seconds']) / float(row['hand_seconds']):.2f}" if row.get("hand_seconds") else "–"
    cells += [row.get("by_hand") or "–", ratio, text("hand_error", ".3f")]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def save(rows: list[Row], out: Path) -> None:
    """Write both files, each atomically."""
    order = {place: i for i, place in enumerate(cases())}
    rows.sort(key=lambda row: (order[row["kind"], row["target"]], int(row["seed"])))
    posteriors.write_csv(rows, [*KEYS, *MEASURES], out / "door.csv")
    posteriors.write(table(rows), out / "door.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of posteriors")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: three for two modes, one for the others")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, one thread each")
    parser.add_argument("--out", type=Path, default=posteriors.OUT, help="folder of the two files")
    parser.add_argument("--quick", action="store_true", help="one target, ten seconds: needs --out")
    options = parser.parse_args()
    seconds = None
    if options.quick:
        if options.out == posteriors.OUT:
            parser.error("--quick needs --out, so that its figures do not replace the results")
        options.kinds, options.only, options.seeds, seconds = ["modes"], ["0.5"], [0], 10.0
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = posteriors.read(options.out / "door.csv")
    done = {tuple(row[key] for key in KEYS) for row in rows}
    todo = [
        (kind, name, seed)
        for kind, name in cases()
        if kind in options.kinds and any(part in name for part in options.only)
        for seed in options.seeds or (posteriors.SEEDS if kind == "modes" else (0,))
        if (kind, name, str(seed)) not in done
    ]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(measure, *task, seconds) for task in todo]):
            row = future.result()
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            rows.append(row)
            save(rows, options.out)


if __name__ == "__main__":
    main()
