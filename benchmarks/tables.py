"""How well do flows fit real tables, beside zuko's and nflows', in one run?

    python benchmarks/tables.py                       # all of it, some three hours of one core
    python benchmarks/tables.py --only magic nsf maf  # some tables and some flows
    python benchmarks/tables.py --quick --out DIR     # a smoke run

*Tables*: magic, diamonds and protein by the protocol of the MAF paper (discrete columns and one of each pair of columns
with |correlation| > .98 dropped, 80/10/10 split, standardised by the training rows); diamonds, all of whose columns are
integers or rounded, is dequantised within its steps first.  *Regressions*: power-plant, kin8nm and concrete, five
canonical splits, one setting for all.

All flows of one run, ours and the peers', are trained by the same call, ``pf.fit_density``: the same rows, batches,
steps, step sizes, averages of states and early stopping; a peer's flow takes part as a transform of ours.  Layers,
hidden widths and bins are equal where a peer has the like.  Reported are mean log-densities of the test rows in nats,
± 2 standard errors, the difference to the best peer row by row, and the time of an epoch, for which all flows take
turns, so that only ratios count.  On magic they are means of three fits.  A run that was stopped goes on after its last
finished fit.  Writes ``tables.md`` and ``tables.csv`` into ``docs/benchmarks``.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nflows.transforms as nt
import numpy as np
import torch
import zuko
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.flows import Flow
from pyro_flows.transforms import FlowTransform

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
DATA = Path(os.environ.get("PYRO_FLOWS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "tabular"
SOURCES = "UCI repository (magic, protein, power-plant, concrete), ggplot2 (diamonds) and DELVE (kin8nm)"
LAYERS, HIDDEN, BINS, BOUND = 5, (128, 128), 8, 5.0
BATCH, STEPS, EPOCHS, LR = 512, 3000, 100, 3e-3  # steps on tables, epochs on regressions
SEEDS = {"magic": 3, "diamonds": 1, "protein": 1}  # magic is small: which states a fit finds is left to chance
MEMBERS = 3  # of an ensemble

Recipe = Callable[[int, int], Flow]  # features, context features -> flow


# ------------------------------------------------------------ contenders


class Foreign(FlowTransform):
    """A peer's transform, from data to base, as one of ours from base to data."""

    def __init__(self, module: nn.Module, input_dim: int, context_dim: int, peer: str) -> None:
        super().__init__((input_dim,), context_dim)
        self.module, self.peer = module, peer

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.peer == "nflows":
            return self.module(y, context)
        transform = self.module(context)
        return transform.call_and_ladj(y)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.peer == "nflows":
            return self.module.inverse(x, context)
        return self.module(context).inv.call_and_ladj(x)


def of_zuko(build: Callable[..., nn.Module], **options: object) -> Recipe:
    def recipe(input_dim: int, context_dim: int) -> Flow:
        flow = build(input_dim, context_dim, transforms=LAYERS, hidden_features=HIDDEN, **options)
        return Flow([Foreign(flow.transform, input_dim, context_dim, "zuko")])

    return recipe


def of_nflows(input_dim: int, context_dim: int) -> Flow:
    """nflows' autoregressive neural spline flow; its networks take one hidden width for all layers."""
    layers: list[nn.Module] = []
    for layer in range(LAYERS):
        layers += [nt.ReversePermutation(input_dim)] if layer else []
        layers += [
            nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                features=input_dim,
                hidden_features=HIDDEN[0],
                context_features=context_dim or None,
                num_bins=BINS,
                tails="linear",
                tail_bound=BOUND,
                num_blocks=len(HIDDEN) - 1,
                use_residual_blocks=False,
            )
        ]
    return Flow([Foreign(nt.CompositeTransform(layers), input_dim, context_dim, "nflows")])


SIZES = {"hidden_dims": HIDDEN, "num_transforms": LAYERS}
OURS: dict[str, Recipe] = {
    "maf": lambda d, c: flows.maf(d, c, **SIZES),
    "nsf": lambda d, c: flows.nsf(d, c, bins=BINS, **SIZES),
    "nsf, linear": lambda d, c: flows.nsf(d, c, bins=BINS, linear=True, **SIZES),
    "nsf_ar": lambda d, c: flows.nsf_ar(d, c, bins=BINS, **SIZES),
    "naf": lambda d, c: flows.naf(d, c, **SIZES),
    "umnn": lambda d, c: flows.umnn(d, c, **SIZES),
    "bnaf": lambda d, c: flows.bnaf(d, c, num_transforms=LAYERS, hidden_dims=(12, 12)),
    "residual_flow": lambda d, c: flows.residual_flow(d, c, hidden_dims=HIDDEN, num_transforms=2 * LAYERS),
    "sospf": lambda d, c: flows.sospf(d, c, **SIZES),
    "bpf": lambda d, c: flows.bpf(d, c, **SIZES),
    "flowpp": lambda d, c: flows.flowpp(d, c, **SIZES),
    "gaussianization": lambda d, c: flows.gaussianization(d, c, num_transforms=2 * LAYERS),
    "sylvester_flow": lambda d, c: flows.sylvester_flow(d, c, num_transforms=2 * LAYERS).inv,
}
PEERS: dict[str, Recipe] = {
    "zuko MAF": of_zuko(zuko.flows.MAF),
    "zuko NSF": of_zuko(zuko.flows.NSF, bins=BINS),
    "zuko NSF, coupling": of_zuko(zuko.flows.NSF, bins=BINS, passes=2),
    "nflows NSF": of_nflows,
}
FLOWS = {**OURS, **PEERS}
COUNTERPARTS = {"maf": "zuko MAF", "nsf": "zuko NSF, coupling", "nsf_ar": "zuko NSF"}
REGRESSORS: dict[str, Recipe] = {
    "nsf": lambda d, c: flows.nsf(d, c, num_transforms=1, hidden_dims=HIDDEN),
    "naf": lambda d, c: flows.naf(d, c, num_transforms=1, hidden_dims=HIDDEN),
    "bpf": lambda d, c: flows.bpf(d, c, num_transforms=1, hidden_dims=HIDDEN),
    "zuko NSF": lambda d, c: Flow(
        [Foreign(zuko.flows.NSF(d, c, transforms=1, hidden_features=HIDDEN, bins=BINS).transform, d, c, "zuko")]
    ),
}


# ------------------------------------------------------------ data

TABLES = "magic", "diamonds", "protein"
TARGETS = {"power-plant": 2.79, "kin8nm": -1.10, "concrete": 3.10}


def open_npz(name: str) -> dict[str, np.ndarray]:
    path = DATA / f"{name}.npz"
    if not path.exists():
        raise SystemExit(f"{path} is missing. Set PYRO_FLOWS_DATA to the data's folder; the originals: {SOURCES}.")
    with np.load(path) as found:
        return dict(found)


class Table(NamedTuple):
    """Standardised rows, ``(N, D)`` each."""

    train: Tensor
    validation: Tensor
    test: Tensor


def read_table(name: str) -> Table:
    x = open_npz(name)["x"].astype(np.float64)
    random = np.random.default_rng(0)
    if name == "diamonds":  # prices are integers, lengths and weights multiples of .01, depth and table of .1
        steps = [step_of(column) for column in x.T]
        x = x + random.random(x.shape) * steps
    correlation = np.corrcoef(x.T)
    keep = [i for i in range(x.shape[1]) if not (np.abs(correlation[i, :i]) > 0.98).any()]
    x = x[:, keep][np.random.RandomState(0).permutation(len(x))]  # the split of the quoted floors
    first, second = int(0.8 * len(x)), int(0.9 * len(x))
    x = (x - x[:first].mean(0)) / x[:first].std(0)
    parts = torch.from_numpy(x).float().split([first, second - first, len(x) - second])
    return Table(*parts)


def step_of(column: np.ndarray) -> float:
    """The largest power of ten of which all values are multiples."""
    return next(s for s in (1.0, 0.1, 0.01, 0.001) if np.allclose(column / s, np.round(column / s), atol=1e-3))


def gaussian(table: Table) -> Tensor:
    """What a full-covariance Gaussian says of the test rows."""
    normal = torch.distributions.MultivariateNormal(table.train.double().mean(0), torch.cov(table.train.double().T))
    return normal.log_prob(table.test.double())


# ------------------------------------------------------------ fits


class Store:
    """Scores of rows that were computed before, by the name of the fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, compute: Callable[[], tuple[Tensor, float, int]]) -> tuple[Tensor, float, int]:
        """The scores of the test rows, the seconds that the fit took and its epochs."""
        path = self.folder / f"{key.replace(' ', '_').replace(',', '')}.pt"
        if not path.exists():
            torch.save(compute(), path.with_suffix(".draft"))
            os.replace(path.with_suffix(".draft"), path)
        return torch.load(path)


def fit_table(recipe: Recipe, table: Table, quick: bool, seed: int) -> tuple[Tensor, float, int]:
    torch.manual_seed(seed)
    flow = recipe(table.train.shape[1], 0)
    fit = pf.fit_density(
        flow,
        table.train,
        validation=table.validation,
        max_epochs=2 if quick else round(STEPS / (len(table.train) // BATCH)),
        batch_size=BATCH,
        lr=LR,
        standardize=False,
        heavy_tails=False,
        progress=False,
    )
    return score(flow, table.test), fit.seconds, len(fit.held_out)


def fit_regression(recipe: Recipe, name: str, split: int, epochs: int, seed: int) -> tuple[Tensor, float, int]:
    data = open_npz(name)
    train, test = data[f"train_{split}"], data[f"test_{split}"]
    x, y = (torch.from_numpy(data[part]).float() for part in ("x", "y"))
    loc, scale = (statistic(x[train], 0) for statistic in (torch.mean, torch.std))
    x, (mean, sd) = (x - loc) / scale, (y[train].mean(), y[train].std())
    y = ((y - mean) / sd).unsqueeze(-1)
    torch.manual_seed(seed)
    flow = recipe(1, x.shape[1])
    fit = pf.fit_density(flow, y[train], x[train], max_epochs=epochs, standardize=False, progress=False)
    return score(flow, y[test], x[test]) - sd.log(), fit.seconds, len(fit.held_out)


@torch.no_grad()
def score(flow: Flow, x: Tensor, context: Tensor | None = None) -> Tensor:
    return flow.log_prob(x, context).double()


def time_epochs(recipes: dict[str, Recipe], table: Table, rounds: int, steps: int) -> dict[str, float]:
    """Seconds of an epoch of training, all flows in turn in each round: the median over rounds."""
    made, taken = {}, {name: [] for name in recipes}
    for name, recipe in recipes.items():
        torch.manual_seed(0)
        flow = recipe(table.train.shape[1], 0)
        made[name] = flow, torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=1e-4, foreach=True)
    for turn in range(rounds + 1):
        for name, (flow, optimizer) in made.items():
            start = time.perf_counter()
            for step in range(steps):
                rows = table.train[step * BATCH % (len(table.train) - BATCH) :][:BATCH]
                optimizer.zero_grad()
                (-flow.log_prob(rows).mean()).backward()
                optimizer.step()
            if turn:  # the first one warms up
                taken[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(times) * (len(table.train) // BATCH) for name, times in taken.items()}


# ------------------------------------------------------------ report

FIELDS = "data", "flow", "nats", "two_se", "gain", "gain_two_se", "epochs", "seconds", "seconds_per_epoch"


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean and two of its standard errors."""
    return values.mean().item(), 2 * values.std().item() / math.sqrt(len(values))


def rows_of_table(
    name: str, scores: dict[str, tuple[Tensor, float, int]], floor: Tensor, times: dict
) -> Iterator[dict]:
    peers = [flow for flow in PEERS if flow in scores]
    best = max(peers, key=lambda flow: scores[flow][0].mean().item()) if peers else None
    yield {"data": name, "flow": "Gaussian", **entry(floor, None)}
    for flow, (values, seconds, epochs) in scores.items():
        against = None if best is None or flow == best else scores[best][0]
        pace = f"{times[flow]:.2f}" if flow in times else ""
        yield {
            "data": name,
            "flow": flow,
            **entry(values, against),
            "epochs": epochs,
            "seconds": f"{seconds:.0f}",
            "seconds_per_epoch": pace,
        }


def entry(values: Tensor, against: Tensor | None) -> dict[str, str]:
    mean, error = mean_and_error(values)
    found = {"nats": f"{mean:.3f}", "two_se": f"{error:.3f}"}
    if against is not None:
        gain, error = mean_and_error(values - against)
        found |= {"gain": f"{gain:+.3f}", "gain_two_se": f"{error:.3f}"}
    return found


def page(rows: list[dict], regressions: list[dict], paces: list[str]) -> str:
    lines = [
        "# Exact densities of real tables",
        "",
        "One run of `python benchmarks/tables.py`: ours and the peers' flows, trained by the same call on the same",
        f"rows, {LAYERS} layers, two hidden layers of {HIDDEN[0]}, {BINS} bins, batch {BATCH}, at most {STEPS}",
        "steps, early stopping on the validation rows. Mean test log-density in nats, ± 2 standard errors; *gain* is",
        "the mean over rows of the difference to the best peer. `bnaf` has 12 units a feature; `residual_flow`,",
        f"`gaussianization` and `sylvester_flow` have {2 * LAYERS} layers. On magic, the smallest table, all figures",
        f"are means of {SEEDS['magic']} fits.",
    ]
    for name in dict.fromkeys(row["data"] for row in rows):
        lines += ["", f"## {name}", "", "| flow | test nats | gain on the best peer | epochs | s / epoch |"]
        lines += ["|---|---|---|---|---|"]
        for row in (row for row in rows if row["data"] == name):
            gain = f"{row['gain']} ± {row['gain_two_se']}" if row.get("gain") else ""
            title = row["flow"] if row["flow"] in PEERS or row["flow"] == "Gaussian" else f"`{row['flow']}`"
            lines.append(
                f"| {title} | {row['nats']} ± {row['two_se']} | {gain} | {row.get('epochs', '')} "
                f"| {row.get('seconds_per_epoch', '')} |"
            )
    lines += ["", "Time of a training epoch, all flows in turn on one thread (ratio of medians):", "", *paces]
    lines += [
        "",
        "## Regressions",
        "",
        "Mean of -log p(y | x) over the test rows of five splits, in nats of y as given; one layer, two hidden layers",
        f"of {HIDDEN[0]}, one setting for all. *{MEMBERS} mixed* is the mean density of {MEMBERS} fits by other seeds.",
        "Published (arXiv:1612.01474): MC dropout 2.80 / -.95 / 3.04, deep ensembles 2.79 / -1.20 / 3.06.",
        "",
        "| flow | " + " | ".join(f"{name} (target {target:.2f})" for name, target in TARGETS.items()) + " |",
        "|---" * (len(TARGETS) + 1) + "|",
    ]
    for flow in dict.fromkeys(row["flow"] for row in regressions):
        cells = {row["data"]: row for row in regressions if row["flow"] == flow}
        found = [f"{cells[n]['nats']} ± {cells[n]['two_se']}" if n in cells else "" for n in TARGETS]
        lines.append(f"| {flow} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of tables and flows (default: all)")
    parser.add_argument("--quick", action="store_true", help="two epochs: a smoke run")
    parser.add_argument("--fits", action="store_true", help="fit and keep the scores, and write no page")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "pyro_flows_tables")
    wish = parser.parse_args()
    known = {*TABLES, *TARGETS, *FLOWS, *REGRESSORS}
    if unknown := set(wish.only) - known:
        parser.error(f"--only: unknown {sorted(unknown)}; known are {sorted(known)}")
    torch.set_num_threads(1)
    epochs = 2 if wish.quick else EPOCHS
    store = Store(wish.keep / ("quick" if wish.quick else "full"))
    chosen = [name for name in (*TABLES, *TARGETS) if name in wish.only] or [*TABLES, *TARGETS]
    picked = [flow for flow in FLOWS if flow in wish.only] or list(FLOWS)
    rows, regressions, paces = [], [], []
    for name in (name for name in chosen if name in TABLES):
        table, scores = read_table(name), {}
        for flow in picked:
            found = []
            for seed in range(1 if wish.quick else SEEDS[name]):
                fit = partial(fit_table, FLOWS[flow], table, wish.quick, seed)
                found.append(store.get(f"{name} {flow} {seed}", fit))
            values, seconds, lengths = zip(*found, strict=True)
            scores[flow] = torch.stack(values).mean(0), statistics.mean(seconds), round(statistics.mean(lengths))
            mean, error = mean_and_error(scores[flow][0])
            print(f"{name:12} {flow:20} {mean:8.3f} ± {error:.3f} nats, {scores[flow][1]:.0f} s", flush=True)
        times = {} if wish.fits else time_epochs({f: FLOWS[f] for f in picked}, table, 2 if wish.quick else 7, 10)
        rows += rows_of_table(name, scores, gaussian(table), times)
        paces += [
            f"* {name}: `{ours}` {times[ours] / times[theirs]:.2f} of {theirs}"
            for ours, theirs in COUNTERPARTS.items()
            if ours in times and theirs in times
        ]
    for name in (name for name in chosen if name in TARGETS):
        for flow in [flow for flow in REGRESSORS if flow in wish.only] or list(REGRESSORS):
            members = []  # (splits, members) of scores
            for split in range(5):
                members.append([])
                for seed in range(1 if wish.quick else MEMBERS):
                    fit = partial(fit_regression, REGRESSORS[flow], name, split, epochs, seed)
                    members[-1].append(store.get(f"{name} {flow} {split} {seed}", fit)[0])
            singles = [-torch.stack(of_split).mean().item() for of_split in members]
            mixed = [-(torch.stack(m).logsumexp(0) - math.log(len(m))).mean().item() for m in members]
            for title, losses in ((flow, singles), (f"{flow}, {MEMBERS} mixed", mixed)):
                mean, error = mean_and_error(torch.tensor(losses))
                regressions.append({"data": name, "flow": title, "nats": f"{mean:.3f}", "two_se": f"{error:.3f}"})
                print(f"{name:12} {title:20} {mean:8.3f} ± {error:.3f} nats", flush=True)
    if wish.fits:
        return
    wish.out.mkdir(parents=True, exist_ok=True)
    (wish.out / "tables.md").write_text(page(rows, regressions, paces))
    with (wish.out / "tables.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows + regressions)


if __name__ == "__main__":
    main()
