"""Page ``training.md``, made from the rows of ``training.csv``."""

import itertools
import math
import platform
import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyro
import torch
from amortized_table import head
from amortized_table import row as line
from posteriors import Row, mark
from training_ablation import BEFORE, DEFAULT

OURS, PEER, NORMAL = ("AutoFlow", "AutoPlateFlow"), ("AutoIAFNormal", "own guide"), "AutoNormal"
USUAL = 0.03  # the largest step size at which every run must stay finite
BOUND = 3.0  # the largest ratio to AutoIAFNormal that meets the target
HUGE = 1e4  # larger numbers are shown by their order of magnitude


def page(rows: list[Row]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Guides in plain SVI",
        "",
        "This page is for users who already have a loop of "
        '`SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())`. It tests whether training stays stable '
        "at all usual step sizes, and compares the final ELBO of our guides with that of Pyro's. " + result(rows),
        "",
        "Reproduce with `python benchmarks/training.py`. All guides have their defaults. No run has warm-up, clipping "
        "(except ClippedAdam's own), decay or restarts. The models are those of Pyro's tutorials and examples. Data "
        "that the tutorials download are simulated; `benchmarks/programs.py` describes each model. "
        f"torch {torch.__version__.split('+')[0]}, Pyro {pyro.__version__}, Python {platform.python_version()}.",
    ]
    parts = {"hold": hold, "elbo": elbo, "short": short, "recipes": recipes, "ablation": ablation}
    for name, section in parts.items():
        if own := [row for row in rows if row["part"] == name]:
            lines += ["", *section(own, rows)]
    return "\n".join([*lines, "", *LIMITS]) + "\n"


def result(rows: list[Row]) -> str:
    """Return a sentence with the number of our runs that did not stay finite; empty without runs of *hold*."""
    own = [row for row in rows if row["part"] == "hold" and row["guide"] in OURS and float(row["lr"]) <= USUAL]
    bad = sum(not held(row) for row in own)
    return f"Up to a step size of {USUAL:g}, {bad} of {len(own)} runs of our guides are not finite." if own else ""


LIMITS = (
    "## Limits",
    "",
    "* `AutoIAFNormal` has one layer of Pyro's default size. Beyond 1,000 latents it takes .6 s per step, so it was "
    "not trained there.",
    "* `lda`, `stable`, the forecasts and the regression have simulated data.",
    "* A run is one seed on one machine. Another version of torch gives other draws.",
)


def value(row: Row, name: str) -> float:
    """Return a measure of a run; NaN if it is missing, for example because the guide could not be built."""
    return float(row.get(name) or "nan")


def held(row: Row) -> bool:
    """True if all losses and the parameters at the end were finite."""
    return row["ended"] == row["steps"]


def number(x: float, form: str = ".1f", huge: float = HUGE) -> str:
    """Return a number as text: a dash for NaN, and only the order of magnitude of a large number."""
    if math.isnan(x):
        return "–"
    if math.isinf(x):
        return "not finite"
    return f"{x:{form}}" if abs(x) < huge else f"{x:.0e}"


def ordered(rows: Iterable[Row], name: str) -> list[str]:
    """Return the distinct values of a column, in their order."""
    return list(dict.fromkeys(row[name] for row in rows))


def counts(rows: list[Row]) -> str:
    """Return the number of runs that did not stay finite, of all runs."""
    return f"{sum(not held(row) for row in rows)} / {len(rows)}" if rows else "–"


def floor(model: str, rows: list[Row]) -> float:
    """Return the lowest loss that a guide reached on a model: by its ELBO, or at the end of the runs of *hold*."""
    ends: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["model"] == model and row["part"] in ("hold", "elbo") and held(row):
            key = tuple(row[name] for name in ("part", "guide", "optimiser", "lr", "particles"))
            ends.setdefault(key, []).append(-value(row, "elbo") if row["part"] == "elbo" else value(row, "end"))
    return min(map(statistics.median, ends.values()), default=math.nan)


def hold(own: list[Row], rows: list[Row]) -> list[str]:
    """Return the section on the largest losses."""
    lines = [
        "## Stability",
        "",
        f"The runs have Adam and ClippedAdam, step sizes {sizes(own)}, and {own[0]['steps']} steps. Models with fewer "
        "runs have Adam alone at some of the step sizes. The target is no run that is not finite, and ratios of at "
        f"most {BOUND:g}.",
        "",
        "* *floor*: the lowest loss that any guide reached on the model.",
        f"* *not finite*: runs with a loss, or parameters at the end, that are not finite, at step sizes up to "
        f"{USUAL:g}. *ours beyond*: our runs at larger step sizes.",
        "* *ratio*: the largest loss after step 20 over that of Pyro's flow guide, `AutoIAFNormal`, on the same seed. "
        f"Both are excesses over the floor, at step sizes up to {USUAL:g}. If that guide is missing or not finite, the "
        "ratio is to `AutoNormal`.",
        "* *literal*: the ratio of the losses themselves, if both are positive.",
        "* *to AutoNormal*: the ratio of excesses to `AutoNormal`, which has the same start. `AutoIAFNormal` starts "
        "from a standard normal.",
        f"* *at most {BOUND:g}*: the share of ratios that meet the target.",
        "* On `vae` the peer is the example's own guide.",
        "",
        *head(
            *("model", "latents", "particles", "seeds", "floor"),
            *("not finite: ours", "AutoIAFNormal", "AutoNormal", "ours beyond"),
            *("worst ratio", "median ratio", f"at most {BOUND:g}", "worst literal", f"at most {BOUND:g}"),
            *("worst to AutoNormal", f"at most {BOUND:g}"),
        ),
    ]
    return [*lines, *itertools.starmap(holding, grouped(own, rows))]


def grouped(own: list[Row], rows: list[Row]) -> Iterator[tuple[str, str, list[Row], float]]:
    """Yield each model with each number of particles, their runs, and the model's floor."""
    for model in ordered(own, "model"):
        low = floor(model, rows)
        for count in sorted({row["particles"] for row in own if row["model"] == model}, key=int):
            yield model, count, [row for row in own if (row["model"], row["particles"]) == (model, count)], low


def holding(model: str, count: str, mine: list[Row], low: float) -> str:
    """Return the row of a model and a number of particles in the table of stability."""
    usual = [row for row in mine if float(row["lr"]) <= USUAL]
    groups = [[row for row in usual if row["guide"] in kind] for kind in (OURS, PEER, (NORMAL,))]
    beyond = [row for row in mine if row["guide"] in OURS and float(row["lr"]) > USUAL]
    peers, normals = ({setting(row): row for row in group} for group in groups[1:])
    ratios, literal, to_normal = [], [], []
    for row in groups[0]:
        normal, peer = normals.get(setting(row)), peers.get(setting(row))
        if normal and held(normal):
            to_normal.append(excess(row, low) / excess(normal, low))
        if peer := peer if peer and held(peer) else normal:
            ratios.append(excess(row, low) / excess(peer, low))
            if value(row, "worst") > 0 and value(peer, "worst") > 0:
                literal.append(value(row, "worst") / value(peer, "worst"))
    latents = next((row["latents"] for row in mine if row["latents"]), "–")
    cells = [*map(counts, [*groups, beyond]), number(max(ratios, default=math.nan))]
    cells += [number(statistics.median(ratios) if ratios else math.nan), share(ratios)]
    for found in (literal, to_normal):
        cells += [number(max(found, default=math.nan)), share(found)]
    return line(model, latents, count, str(len(ordered(mine, "seed"))), number(low), *cells)


def excess(row: Row, low: float) -> float:
    """Return the largest loss of a run minus the floor, at least a tenth of a nat."""
    return max(value(row, "worst") - low, 0.1)


def setting(row: Row) -> tuple[str, ...]:
    """Return the settings that runs of different guides share."""
    return tuple(row[name] for name in ("optimiser", "lr", "particles", "seed"))


def share(ratios: list[float]) -> str:
    """Return the share of ratios within the bound."""
    return f"{sum(ratio <= BOUND for ratio in ratios) / len(ratios):.0%}" if ratios else "–"


def sizes(rows: list[Row]) -> str:
    """Return the step sizes of rows in words."""
    return ", ".join(f"{lr:g}" for lr in sorted({float(row["lr"]) for row in rows}))


def seeds(rows: list[Row]) -> str:
    """Return the first and the last seed in words."""
    found = sorted({int(row["seed"]) for row in rows})
    return f"seeds {found[0]} to {found[-1]}" if len(found) > 1 else f"seed {found[0]}"


def elbo(own: list[Row], rows: list[Row]) -> list[str]:
    """Return the section on the ELBO."""
    lines = [
        "## Final ELBO",
        "",
        f"The ELBO in nats after {own[0]['steps']} steps of Adam, as a mean over seeds. It has 1,000 draws, or 200 on "
        f"models that do not broadcast. The first seed tries the step sizes {sizes(own)}, or some of "
        "them on larger models with more particles. Each guide takes its best one for the other seeds, which "
        "favours all guides a little. The target is no difference below zero, within its error.",
        "",
        "* *lost*: runs that are not finite. The mean omits them, and brackets give their number.",
        f"* *not finite*: our lost runs at step sizes up to {USUAL:g}.",
        "* *difference*: ours minus the best of Pyro's, ± its standard error over seeds, or over draws if there is one "
        "seed.",
        "* On `vae` the ELBO is that of the first minibatch, and Pyro's guide is the example's own.",
        "",
        *head(
            *(
                "model",
                "particles",
                "seeds",
                "not finite: ours",
                "ours",
                "step size",
                "best of Pyro's",
                "its guide",
                "step size",
                "difference",
            ),
            *("AutoIAFNormal", "AutoNormal"),
        ),
    ]
    return [*lines, *(ending(model, count, mine) for model, count, mine, _ in grouped(own, rows))]


def ending(model: str, count: str, own: list[Row]) -> str:
    """Return the row of a model and a number of particles in the table of ELBOs."""
    found: dict[str, End] = {}
    for guide in ordered(own, "guide"):
        rates = [[row for row in own if (row["guide"], row["lr"]) == (guide, lr)] for lr in ordered(own, "lr")]
        most = max(map(len, rates))  # the rate of all seeds, or any rate of a single seed
        found[guide] = max(end_of(mine) for mine in rates if len(mine) == most)
    nothing = End(-math.inf, math.nan, "–", 0)
    ours = max((end for guide, end in found.items() if guide in OURS), default=nothing)
    peers = ((guide, end) for guide, end in found.items() if guide not in OURS)
    name, best = max(peers, key=lambda pair: pair[1], default=("–", nothing))
    difference, error = ours.elbo - best.elbo, math.hypot(ours.error, best.error)
    comparable = math.isfinite(difference) and not ours.lost
    text = mark(f"{difference:+.2f} ± {error:.2f}", True) if comparable else "–"
    two = [found[guide].text() if guide in found else "–" for guide in ("AutoIAFNormal", NORMAL)]
    usual = [row for row in own if row["guide"] in OURS and float(row["lr"]) <= USUAL]
    cells = ours.text(), ours.lr, best.text(), name, best.lr, text
    return line(model, count, str(len(ordered(own, "seed"))), counts(usual), *cells, *two)


class End(NamedTuple):
    """Final ELBO of a guide at one step size: the mean of the runs that were not lost."""

    elbo: float
    error: float
    lr: str
    lost: int

    def text(self) -> str:
        """Return the cell, with the number of lost runs."""
        lost = f" ({self.lost} lost)" if self.lost and math.isfinite(self.elbo) else ""
        return number(self.elbo, ".2f", 1e6) + lost


def end_of(rows: list[Row]) -> End:
    """Return the mean ELBO of runs with its standard error: over seeds, or over the draws of a single seed."""
    kept = [row for row in rows if held(row) and math.isfinite(value(row, "elbo"))]
    if not kept:
        return End(-math.inf, math.nan, "–", len(rows))
    values = [value(row, "elbo") for row in kept]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else value(kept[0], "elbo_se")
    return End(statistics.fmean(values), error, rows[0]["lr"], len(rows) - len(kept))


def short(own: list[Row], rows: list[Row]) -> list[str]:
    """Return the section on many seeds."""
    lines = [
        "## A thousand short fits",
        "",
        f"`AutoFlow` takes {own[0]['steps']} steps of Adam with step size {sizes(own)} and one particle. The "
        f"{seeds(own)} are spread over ten models. Loss and all parameters are tested after every step. The target "
        "is no state that is not finite.",
        "",
        *head("model", "fits", "not finite", "largest loss after step 20", "median loss at the end"),
    ]
    for model in ordered(own, "model"):
        mine = [row for row in own if row["model"] == model]
        bad = sum(not held(row) for row in mine)
        worst, end = max(value(row, "worst") for row in mine), statistics.median(value(row, "end") for row in mine)
        lines.append(line(model, str(len(mine)), str(bad), number(worst), number(end)))
    return [*lines, line("all", str(len(own)), str(sum(not held(row) for row in own)), "", "")]


def recipes(own: list[Row], rows: list[Row]) -> list[str]:
    """Return the section on other flows."""
    lines = [
        "## Other recipes",
        "",
        f"The guides are `AutoFlow(model, flows.maf)` and the like. They take {own[0]['steps']} steps of Adam with one "
        f"particle. A cell is the largest loss after step 20, the worst of {seeds(own)}. Brackets give the runs that "
        "were not finite. `AutoIAFNormal` starts from a standard normal, and all others start where `AutoNormal` "
        f"starts. The target is at most {BOUND:g} times the loss of Pyro's `AutoIAFNormal`.",
        "",
    ]
    return [*lines, *grid(own)]


def ablation(own: list[Row], rows: list[Row]) -> list[str]:
    """Return the section on the causes."""
    lines = [
        "## Ablation",
        "",
        f"A cell is the largest loss after step 20 of {own[0]['steps']} steps of Adam with one particle, the worst of "
        f"{seeds(own)}. Brackets give the runs that were not finite. *Default* is the default guide, with centred "
        "networks and a pace. *Before* is the earlier guide, with torch's weights and a full matrix for the learned "
        "affine map. Each row makes one change to one of them. The loss includes the starting loss of the guide, so "
        "compare the rows of one group.",
        "",
    ]
    return [*lines, *grid(own)]


def grid(own: list[Row]) -> list[str]:
    """Return a table of the worst losses, a row per guide."""
    columns = list(itertools.product(ordered(own, "model"), sorted({float(row["lr"]) for row in own})))
    lines = head("guide", *(f"{model}, {lr:g}" for model, lr in columns))
    for label in ordered(own, "guide"):
        mine = [row for row in own if row["guide"] == label]
        cells = (cell([row for row in mine if (row["model"], float(row["lr"])) == column]) for column in columns)
        lines.append(line(mark(label, label in (DEFAULT, BEFORE, *PEER, NORMAL)), *cells))
    return lines


def cell(rows: list[Row]) -> str:
    """Return the worst loss of the finite runs, and the number of runs that were not finite."""
    bad = sum(not held(row) for row in rows)
    worst = number(max((value(row, "worst") for row in rows if held(row)), default=math.nan))
    return f"{worst} ({bad} / {len(rows)})" if bad else worst
