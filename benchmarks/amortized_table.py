"""Results of ``amortized.py``: the CSV file, and the page that is made from it."""

import csv
import math
import platform
from importlib.metadata import version
from pathlib import Path

import pyro
import torch

COLUMNS = "part", "task", "method", "seed", "measure", "value"
TASKS = "two_moons", "gaussian_linear_uniform", "slcp"
METHODS = (
    "AutoFlow",
    "AutoFlow, resampled",
    "AutoFlow, fit_svi",
    "sbi NPE",
    "sbi NPE, for sets",
    "fit_likelihood, AutoFlow",
    "fit_likelihood, sample",
    "AutoFlow, rounds",
)
ASKED = {"two_moons": 0.54, "gaussian_linear_uniform": 0.54, "slcp": 0.65, "slcp, 30,000": 0.6}
PUBLISHED = {"two_moons": 0.606, "gaussian_linear_uniform": 0.553, "slcp": 0.901}


class Results:
    """Numbers in a CSV file, saved as soon as they are measured."""

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
        """Return the seeds with a value whose key begins in this way."""
        return sorted({k[3] for k in self.values if k[: len(key)] == key}, key=int)


def page(results: Results, simulations: int) -> str:
    """Return the results as Markdown."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("sbi", "scikit-learn"))
    lines = [
        "# Amortised inference",
        "",
        "This page is for users who train one guide for many datasets. It compares `fit_amortized` and the default "
        "flow of `AutoFlow` with sbi's neural posterior estimation (NPE). "
        f"{summary(results)} Reproduce with `python benchmarks/amortized.py`.",
        "",
        "NPE is a neural spline flow with default settings. All runs use one thread of a shared machine, so CPU time "
        "is given next to wall time. Versions: "
        f"torch {torch.__version__}, Pyro {pyro.__version__}, {packages}, Python {platform.python_version()}.",
    ]
    parts = posteriors(results, simulations), speed(results), calibration(results), hierarchy(results), levels(results)
    return "\n".join([*lines, *(line for part in parts for line in part)]) + "\n"


def summary(results: Results) -> str:
    """Return the main result in a sentence."""
    runs = [(task, seed) for task in TASKS for seed in results.seeds("posteriors", task, METHODS[0])]
    lower = sum(mean_c2st(results, t, METHODS[0], s) < mean_c2st(results, t, METHODS[3], s) for t, s in runs)
    ratios = [results.get("speed", t, "ratio", s, "step") for t in TASKS for s in results.seeds("speed", t)]
    if not (runs and ratios):
        return "Some parts have not been run."
    return (
        f"The draws of `AutoFlow` are closer to the reference (mean C2ST) in {lower} of {len(runs)} runs. Its training "
        f"steps take {number(min(ratios), '.2f')} to {number(max(ratios), '.2f')} times the CPU time of NPE's."
    )


def number(value: float, form: str = ".3f") -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


def head(*columns: str, text: int = 1) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * text + "---:|" * (len(columns) - text)]


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def order(label: str) -> tuple[int, str]:
    """Return the place of a task, or of a task with another number of simulations, in a table."""
    return TASKS.index(label.split(",")[0]), label


def mean_c2st(results: Results, task: str, method: str, seed: str) -> float:
    """Return the mean over five observations, or NaN if one is missing."""
    return sum(results.get("posteriors", task, method, seed, f"c2st_{k}") for k in range(1, 6)) / 5


def spent(results: Results, *key: str, measure: str) -> float:
    """Return a cost of training, or its mean over observations if each has a guide of its own."""
    if results.has(*key, measure):
        return results.get(*key, measure)
    return sum(results.get(*key, f"{measure}_{k}") for k in range(1, 6)) / 5


def posteriors(results: Results, simulations: int) -> list[str]:
    seeds = results.seeds("posteriors")
    if not seeds:
        return []
    lines = [
        "",
        "## Posteriors of simulators",
        "",
        f"Three tasks of sbibm (arXiv:2101.04653); all methods train on the same {simulations:,} simulations, or on as "
        "many as the name of the task says. The score is C2ST: the accuracy of a classifier between 10,000 draws and "
        "10,000 reference draws. 0.5 is perfect, 1 is worst. The classifier is a network with two hidden layers of 10 "
        "d units, over five folds.",
        "",
        "*target*: the score that amortised draws should reach. *published*: NPE in the paper of sbibm. *sbi*: NPE "
        "trained here. The data of slcp are a set of points. `AutoFlow` reads them through a "
        "`SetEncoder`. *sbi* reads the points as eight numbers, and *sbi, for sets* uses sbi's permutation-invariant "
        "network.",
        "",
        "*emulated*: `fit_likelihood` learns the density of a point from the same simulations. An `AutoFlow` is then "
        "trained on six times as many draws from that density, for at most 20 epochs. *learned, sample*: `sample` "
        "draws from the posterior with that density; its chains start from the emulated guide, whose training counts. "
        "Its targets are 0.52 for two_moons and 0.60 for slcp. *rounds*: a guide for each observation, by "
        "`fit_amortized(..., datasets=Observed(..., rounds=5))`, from as many simulations.",
        "",
        *head(
            *("task", "seed", "target", "published", "AutoFlow", "resampled", "fit_svi", "sbi", "sbi, for sets"),
            *("emulated", "learned, sample", "rounds"),
        ),
    ]
    labels = sorted({key[1] for key in results.values if key[0] == "posteriors"}, key=order)
    for task in labels:
        for seed in seeds:
            cells = [number(mean_c2st(results, task, method, seed)) for method in METHODS]
            if any(cell != "–" for cell in cells):
                asked, published = ASKED.get(task, math.nan), PUBLISHED.get(task, math.nan)
                lines.append(row(task, seed, number(asked, ".2f"), number(published), *cells))
    lines += [
        "",
        "The next table has the scores of the five observations. *resampled*: `resample` selects from 100,000 draws by "
        "their weights under the model's likelihood; *k-hat* is the largest of the five. *fit_svi*: `guide.bind(x)` is "
        "trained for 300 more steps on one observation, which may lose modes. Its score is – if the fit ends with an "
        "error, for example because a likelihood has hard edges.",
        "",
        "*log q*: the mean log-density of the true latents of 10,000 new simulations, given their data, in nats. For "
        "sbi it is the density of its network, which puts some mass outside the prior. *s*, *CPU s*: the training, in "
        "rounds the mean of five.",
        "",
        *head("task", "method", "seed", *"12345", "mean", "k-hat", "log q", "epochs", "s", "CPU s", text=2),
    ]
    for task in labels:
        for method in METHODS:
            for seed in results.seeds("posteriors", task, method):
                key = "posteriors", task, method, seed
                each = [number(results.get(*key, f"c2st_{k}")) for k in range(1, 6)]
                each.append(number(mean_c2st(results, task, method, seed)))
                khat = max(results.get(*key, f"khat_{k}") for k in range(1, 6))
                notes = [number(khat, ".2f"), number(results.get(*key, "log_q"))]
                took = [number(spent(results, *key, measure=m), ".0f") for m in ("epochs", "seconds", "cpu_seconds")]
                mark = " †" if results.has(*key, "earlier") else ""
                lines.append(row(task, method + mark, seed, *each, *notes, *took))
    if any(key[-1] == "earlier" for key in results.values):
        lines += ["", "† Measured with earlier defaults."]
    return lines


def speed(results: Results) -> list[str]:
    seeds = results.seeds("speed")
    if not seeds:
        return []
    lines = [
        "",
        "## Speed",
        "",
        "*simulations*: the time of 100,000 simulations, vectorised over draws (target: at most 5 s for two_moons). "
        "*step*: CPU milliseconds of a training step with a batch of 256: loss, gradients and Adam. The steps of both "
        "methods alternate, and the table has medians of 200 (target: a ratio of at most 1).",
        "",
        *head("task", "simulations, s", "step, AutoFlow, ms", "step, sbi, ms", "ratio"),
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
        "The model has two normal means. Each is observed once, with noise of half the prior's standard deviation, so "
        "the posterior is normal. `calibrate` tests the trained guide on 1,000 new simulations. It then tests the same "
        "guide with its scale reduced by 20 %.",
        "",
        "The target is a p-value of the ranks above 0.01 for the trained guide, and a rejection of the shrunk guide.",
        "",
        *head("guide", "seed", "ranks, p", "coverage, p", "TARP, p", "true values in 90 % regions"),
    ]
    for kind in ("trained", "shrunk"):
        for seed in seeds:
            key = "calibration", "conjugate", kind, seed
            p = [number(results.get(*key, m), ".2g") for m in ("sbc_p", "coverage_p", "tarp_p")]
            lines.append(row(kind, seed, *p, f"{100 * results.get(*key, 'in_90'):.1f} %"))
    return [
        *lines,
        "",
        "![Calibration of the trained guide](calibration_trained.png)",
        "",
        "The trained guide, first seed. Look at whether the curves stay within the bands.",
        "",
        "![Calibration of the shrunk guide](calibration_shrunk.png)",
        "",
        "The same guide with its scale reduced by 20 %. Look for curves that leave the bands.",
    ]


def hierarchy(results: Results) -> list[str]:
    seeds = results.seeds("hierarchy")
    if not seeds:
        return []
    lines = [
        "",
        "## A plate of 2,000 groups",
        "",
        "The model of eight schools, with 2,000 schools of five pupils each. `AutoPlateFlow` and `fit_svi` have their "
        "defaults, with minibatches of 100 groups. *rows* says where the parameters of a group come from: an encoder "
        "of its data, or a learned row of a table.",
        "",
        "*error of*: errors of means, in standard deviations of the posterior (target: at most 0.15 for every group, "
        "0.1 for the population). *sd of*: the ratio of standard deviations to the posterior's. In the exact "
        "posterior, mean and scale of the population lie on a grid, and groups are normal given both.",
        "",
        *head(
            *("rows", "seed", "error of mu", "error of tau", "error of a group, typical", "error of a group, worst"),
            *("sd of mu", "sd of tau", "sd of groups", "steps", "s", "CPU s"),
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


def levels(results: Results) -> list[str]:
    """Return the tables of the model of two levels."""
    seeds = results.seeds("two levels")
    if not seeds:
        return []
    lines = [
        "",
        "## Groups of rows, of any number",
        "",
        "A normal model of two levels: groups have means of their own, theta, with mean mu and standard deviation tau. "
        "Each has 1 to 50 rows. One `AutoPlateFlow` with a `global_encoder` is trained by `fit_amortized` on 40,000 "
        "simulations. Each step sees 4 to 128 of the 128 simulated groups. Exact posteriors lie on a grid of tau.",
        "",
        "*error*: errors of means over 20 datasets, in standard deviations of the posterior, root mean square and "
        "worst (target: at most 0.1). *sd*: the median ratio of standard deviations to the posterior's, with the range "
        "of 90 % (target: 0.95 to 1.05). *p*: the smallest p-value of `calibrate`, for mu, tau and one theta "
        "(target: above 0.0033). *k-hat*: the largest of 20 datasets, and the number of those below 0.7.",
        "",
    ]
    for part, method, title in (
        ("two levels", "AutoPlateFlow", "Amortised, one guide"),
        ("two levels", "AutoPlateFlow, resampled", "4,000 of 20,000 of its draws, resampled by the model's density"),
        ("likelihood", "fit_likelihood", "Learned likelihood of a row, then `AutoFlow` and `fit_svi`, three datasets"),
        (
            "likelihood",
            "least squares",
            "The posterior under a normal density that least squares fits to the same rows, 20 datasets",
        ),
    ):
        seeds = results.seeds(part, "training")
        if not seeds:
            continue
        spent = [results.get(part, "training", method.split(",")[0], seed, "cpu_seconds") for seed in seeds]
        took = ", ".join(f"{seconds:.0f}" for seconds in spent if not math.isnan(seconds))
        lines += [f"{title}{f' (training {took} CPU seconds)' if took else ''}:", ""]
        sites = "mu", "tau", "theta"
        what = (f"{what} of {site}" for what in ("error", "sd") for site in sites)
        lines += head("groups", "seed", *what, "p", "k-hat")
        groups = sorted({int(key[1]) for key in results.values if key[0] == part and key[1].isdigit()})
        for key in ((part, group, method, seed) for group in groups for seed in seeds):

            def pair(site: str, *measures: str, form: str = ".2f") -> list[str]:
                return [number(results.get(*key, f"{site}_{measure}"), form) for measure in measures]  # noqa: B023

            cells = ["{} ({})".format(*pair(site, "typical", "worst")) for site in sites]
            cells += ["{} ({}–{})".format(*pair(site, "sd", "low_sd", "high_sd")) for site in sites]
            tests = [results.get(*key, f"{name}_p") for name in ("sbc", "coverage", "tarp")]
            khat, good = number(results.get(*key, "khat"), ".2f"), number(results.get(*key, "good"), ".0f")
            weights = f"{khat} ({good})" if results.has(*key, "khat") else khat
            lines.append(row(str(key[1]), key[3], *cells, number(min(tests), ".2g"), weights))
        lines.append("")
    return lines[:-1]
