"""What ``amortized.py`` measures: numbers in a CSV file, and the page made of them."""

from __future__ import annotations

import csv
import math
import platform
from importlib.metadata import version
from pathlib import Path

import pyro
import torch

COLUMNS = "part", "task", "method", "seed", "measure", "value"
TASKS = "two_moons", "gaussian_linear_uniform", "slcp"
METHODS = "AutoFlow", "AutoFlow, resampled", "AutoFlow, fit_svi", "sbi NPE", "sbi NPE, for sets"
ASKED = {"two_moons": 0.60, "gaussian_linear_uniform": 0.55, "slcp": 0.85}
PUBLISHED = {"two_moons": 0.606, "gaussian_linear_uniform": 0.553, "slcp": 0.901}


class Results:
    """Numbers in a CSV file, which are there as soon as they are measured."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.values: dict[tuple[str, ...], str] = {}
        if path.exists():
            with path.open(newline="") as file:
                self.values = {tuple(row[c] for c in COLUMNS[:-1]): row["value"] for row in csv.DictReader(file)}

    def has(self, *key: object) -> bool:
        return tuple(map(str, key)) in self.values

    def get(self, *key: object) -> float:
        return float(self.values.get(tuple(map(str, key)), "nan"))

    def add(self, *key: object, **measures: float) -> None:
        for measure, value in measures.items():
            self.values[(*map(str, key), measure)] = f"{value:.6g}"
            print(*key, measure, f"{value:.6g}", flush=True)
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS, *((*k, v) for k, v in sorted(self.values.items()))])

    def seeds(self, *key: str) -> list[str]:
        """The seeds of which there is something under a key's beginning."""
        return sorted({k[3] for k in self.values if k[: len(key)] == key}, key=int)


def page(results: Results, simulations: int) -> str:
    """The results as Markdown."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("sbi", "scikit-learn"))
    lines = [
        "# Amortised inference",
        "",
        "`fit_amortized` with the default flow of `AutoFlow`, beside the neural posterior estimation of sbi (`NPE`, "
        "neural spline flow, every setting its default). One thread of a machine that others use too: seconds of the "
        "processor are given beside those of the clock. Reproduce with `python benchmarks/amortized.py`; "
        f"torch {torch.__version__}, Pyro {pyro.__version__}, {packages}, Python {platform.python_version()}.",
    ]
    parts = posteriors(results, simulations), speed(results), calibration(results), hierarchy(results)
    return "\n".join([*lines, *(line for part in parts for line in part)]) + "\n"


def number(value: float, form: str = ".3f") -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


def head(*columns: str, text: int = 1) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * text + "---:|" * (len(columns) - text)]


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def mean_c2st(results: Results, task: str, method: str, seed: str) -> float:
    """The mean over five observations; NaN unless all are there."""
    return sum(results.get("posteriors", task, method, seed, f"c2st_{k}") for k in range(1, 6)) / 5


def posteriors(results: Results, simulations: int) -> list[str]:
    seeds = results.seeds("posteriors")
    if not seeds:
        return []
    lines = [
        "",
        "## Posteriors of simulators",
        "",
        f"Three tasks of sbibm (arXiv:2101.04653), {simulations:,} simulations, the same for all methods. A classifier "
        "tells 10,000 draws from 10,000 reference draws (C2ST, the accuracy of a network with two hidden layers of "
        "10 d units over five folds): .5 is perfect, 1 hopeless. *Asked* is the figure that amortised draws are to "
        "reach, *published* that of NPE in the paper; *sbi* is measured here, on the same simulations. "
        "The points of slcp are a set, which `AutoFlow` sees by a `SetEncoder`, and sbi as eight numbers or, *for "
        "sets*, by its permutation-invariant network. Training: seconds of the processor.",
        "",
        *head(
            *("task", "seed", "target", "published", "AutoFlow", "resampled", "fit_svi", "sbi", "sbi, for sets"),
            *("training cpu s", "sbi", "sbi, for sets"),
        ),
    ]
    for task in TASKS:
        for seed in seeds:
            means = [mean_c2st(results, task, method, seed) for method in METHODS]
            if math.isnan(means[0]):
                continue
            cells = [f"**{number(means[0])}**", *map(number, means[1:])]
            trained = METHODS[0], *METHODS[3:]
            took = [number(results.get("posteriors", task, m, seed, "cpu_seconds"), ".0f") for m in trained]
            lines.append(row(task, seed, f"{ASKED[task]:.2f}", f"{PUBLISHED[task]:.3f}", *cells, *took))
    lines += [
        "",
        "Each observation. *log q*: the mean log-density, in nats, of the truth of 10,000 new simulations given their "
        "data, for sbi that of its network, which puts some mass outside of the prior. *Resampled*: `resample`, from "
        "100,000 draws by their weights under the model's own likelihood, with the largest k-hat of the five. "
        "*fit_svi*: `guide.bind(x)` trained for 300 more steps on that observation alone, which may lose modes; none "
        "where the fit ends with an error, as where a likelihood has hard edges.",
        "",
        *head("task", "method", "seed", *"12345", "mean", "k-hat", "log q", "epochs", "s", "cpu s", text=2),
    ]
    for task in TASKS:
        for method in METHODS:
            for seed in results.seeds("posteriors", task, method):
                key = "posteriors", task, method, seed
                each = [number(results.get(*key, f"c2st_{k}")) for k in range(1, 6)]
                each.append(number(mean_c2st(results, task, method, seed)))
                khat = max(results.get(*key, f"khat_{k}") for k in range(1, 6))
                notes = [number(khat, ".2f"), number(results.get(*key, "log_q"))]
                took = [number(results.get(*key, m), ".0f") for m in ("epochs", "seconds", "cpu_seconds")]
                lines.append(row(task, method, seed, *each, *notes, *took))
    return lines


def speed(results: Results) -> list[str]:
    seeds = results.seeds("speed")
    if not seeds:
        return []
    lines = [
        "",
        "## Speed",
        "",
        "100,000 simulations run side by side (target: two_moons within 5 s). Milliseconds of the processor that a "
        "step of training takes on a batch of 256, loss, gradients and Adam, both in turn, medians of 200 (target: a "
        "ratio of at most 1).",
        "",
        *head("task", "100,000 simulations s", "step ms, AutoFlow", "step ms, sbi", "ratio"),
    ]
    for task in TASKS:
        for seed in results.seeds("speed", task)[:1]:
            steps = [number(results.get("speed", task, m, seed, "step"), ".1f") for m in (METHODS[0], METHODS[3])]
            simulated = number(results.get("speed", task, "100,000 simulations", seed, "seconds"), ".2f")
            ratio = number(results.get("speed", task, "ratio", seed, "step"), ".2f")
            lines.append(row(task, simulated, *steps, f"**{ratio}**"))
    return lines


def calibration(results: Results) -> list[str]:
    seeds = results.seeds("calibration")
    if not seeds:
        return []
    lines = [
        "",
        "## Calibration",
        "",
        "Two normal means, each seen once with noise of half the prior's sd: the posterior is known to be normal. "
        "`calibrate` on 1,000 new simulations, for the guide as trained, and for it with its draws' scale shrunk by "
        "20 % (target: p above .01 for the ranks of the one, and that the other is found out).",
        "",
        *head("guide", "seed", "ranks p", "coverage p", "TARP p", "truths in regions of 90 %"),
    ]
    for kind in ("trained", "shrunk"):
        for seed in seeds:
            key = "calibration", "conjugate", kind, seed
            p = [number(results.get(*key, m), ".2g") for m in ("sbc_p", "coverage_p", "tarp_p")]
            lines.append(row(kind, seed, *p, f"{100 * results.get(*key, 'in_90'):.1f} %"))
    return [*lines, "", "![As trained](calibration_trained.png)", "", "![Shrunk](calibration_shrunk.png)"]


def hierarchy(results: Results) -> list[str]:
    seeds = results.seeds("hierarchy")
    if not seeds:
        return []
    lines = [
        "",
        "## A plate of 2,000 groups",
        "",
        "Eight schools, but 2,000 of five pupils each, fitted by `AutoPlateFlow` and `fit_svi` with their defaults in "
        "minibatches of 100 groups, with an encoder of the groups' data and with learned rows. The exact posterior is "
        "normal given the mean and the spread of the population, which lie on a grid. Errors of means in posterior sd "
        "(target: at most .15 for every group, .1 for the population), and the ratios of sds.",
        "",
        *head(
            *("rows", "seed", "error of mu", "of tau", "of a group, typical", "worst"),
            *("sd of mu", "of tau", "of groups", "steps", "s", "cpu s"),
        ),
    ]
    for method in ("encoder", "learned rows"):
        for seed in results.seeds("hierarchy", "groups", method):
            key = "hierarchy", "groups", method, seed
            names = "mu_error", "tau_error", "theta_typical", "theta_error", "mu_low_sd", "tau_low_sd"
            cells = [number(results.get(*key, name)) for name in names]
            cells.append("–".join(number(results.get(*key, f"theta_{end}_sd"), ".2f") for end in ("low", "high")))
            took = [number(results.get(*key, m), ".0f") for m in ("steps", "seconds", "cpu_seconds")]
            lines.append(row(method, seed, *cells, *took))
    return lines
