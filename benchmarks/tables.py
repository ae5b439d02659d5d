"""Test densities of flows on real tables: ours, zuko's and nflows', in one run.

    python benchmarks/tables.py                       # all, about three hours on one core
    python benchmarks/tables.py --only magic nsf maf  # some tables and some flows
    python benchmarks/tables.py --quick --out DIR     # a smoke run

*Tables*: magic, diamonds and protein, by the protocol of the MAF paper.  It drops discrete columns, and one of each
pair of columns with |correlation| > .98.  The split is 80/10/10, and the training rows set the standardisation.  All
columns of diamonds are integers or rounded, so diamonds is first dequantised within its steps.

*Regressions*: power-plant, kin8nm and concrete, with five canonical splits and one setting for all.

The same call trains all flows, ``pf.fit_density``.  So rows, batches, steps, step sizes, averages of states and early
stopping are the same.  A peer's flow is wrapped as one of our transforms.  Layers, hidden widths and bins are equal if
the peer has them.  The results are mean log-densities of the test rows in nats, ± 2 standard errors, and the mean
difference to the best peer per row.  The flows alternate for the time of an epoch, so that its ratios can be compared.
On magic all figures are means of three fits.  An interrupted run continues after its last finished fit.  Writes
``tables.md`` and ``tables.csv`` into ``docs/benchmarks``.
"""

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
from pyro_flows.training import Training
from pyro_flows.transforms import FlowTransform

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
DATA = Path(os.environ.get("PYRO_FLOWS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "tabular"
SOURCES = "UCI repository (magic, protein, power-plant, concrete), ggplot2 (diamonds) and DELVE (kin8nm)"
LAYERS, HIDDEN, BINS, BOUND = 5, (128, 128), 8, 5.0
BATCH, STEPS, EPOCHS, LR = 512, 3000, 100, 3e-3  # steps on tables, epochs on regressions
SEEDS = {"magic": 3, "diamonds": 1, "protein": 1}  # magic is small, so that its fits vary with the seed
MEMBERS = 3  # fits per ensemble

Recipe = Callable[[int, int], Flow]  # features, context features -> flow


# ------------------------------------------------------------ contenders


class Foreign(FlowTransform):
    """Peer's transform, from data to base, wrapped as one of ours, from base to data."""

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
    """Return the recipe of a flow of zuko."""

    def recipe(input_dim: int, context_dim: int) -> Flow:
        flow = build(input_dim, context_dim, transforms=LAYERS, hidden_features=HIDDEN, **options)
        return Flow([Foreign(flow.transform, input_dim, context_dim, "zuko")])

    return recipe


def of_nflows(input_dim: int, context_dim: int) -> Flow:
    """Return nflows' autoregressive neural spline flow; its networks have one hidden width for all layers."""
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
    """Return the arrays of a dataset."""
    path = DATA / f"{name}.npz"
    if not path.exists():
        raise SystemExit(
            f"open_npz: name must be a file in the data folder, but {path} is missing. Set PYRO_FLOWS_DATA to the "
            f"folder of the data. The originals: {SOURCES}."
        )
    with np.load(path) as found:
        return dict(found)


class Table(NamedTuple):
    """Standardised rows of the three parts, ``(N, D)`` each."""

    train: Tensor
    validation: Tensor
    test: Tensor


def read_table(name: str) -> Table:
    """Return a table, split and standardised."""
    x = open_npz(name)["x"].astype(np.float64)
    random = np.random.default_rng(0)
    if name == "diamonds":  # prices are integers, lengths and weights multiples of .01, depth and table of .1
        steps = [step_of(column) for column in x.T]
        x = x + random.random(x.shape) * steps
    correlation = np.corrcoef(x.T)
    keep = [i for i in range(x.shape[1]) if not (np.abs(correlation[i, :i]) > 0.98).any()]
    x = x[:, keep][np.random.RandomState(0).permutation(len(x))]  # the split of the published results
    first, second = int(0.8 * len(x)), int(0.9 * len(x))
    x = (x - x[:first].mean(0)) / x[:first].std(0)
    parts = torch.from_numpy(x).float().split([first, second - first, len(x) - second])
    return Table(*parts)


def step_of(column: np.ndarray) -> float:
    """Return the largest power of ten that divides all values."""
    return next(s for s in (1.0, 0.1, 0.01, 0.001) if np.allclose(column / s, np.round(column / s), atol=1e-3))


def gaussian(table: Table) -> Tensor:
    """Return the log-densities of the test rows under a full-covariance Gaussian."""
    normal = torch.distributions.MultivariateNormal(table.train.double().mean(0), torch.cov(table.train.double().T))
    return normal.log_prob(table.test.double())


# ------------------------------------------------------------ fits


class Store:
    """Store of scores on disk, by the name of the fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, compute: Callable[[], tuple[Tensor, float, int]]) -> tuple[Tensor, float, int]:
        """Return the scores of the test rows, the seconds of the fit and its epochs; compute them if needed."""
        path = self.folder / f"{key.replace(' ', '_').replace(',', '')}.pt"
        if not path.exists():
            torch.save(compute(), path.with_suffix(".draft"))
            os.replace(path.with_suffix(".draft"), path)
        return torch.load(path)


def fit_table(recipe: Recipe, table: Table, quick: bool, seed: int) -> tuple[Tensor, float, int]:
    """Fit a flow to a table and return the scores of the test rows, the seconds and the epochs."""
    torch.manual_seed(seed)
    flow = recipe(table.train.shape[1], 0)
    fit = pf.fit_density(
        flow,
        table.train,
        training=Training(validation=table.validation, standardize=False, heavy_tails=False),
        max_epochs=2 if quick else round(STEPS / (len(table.train) // BATCH)),
        batch_size=BATCH,
        lr=LR,
        progress=False,
    )
    return score(flow, table.test), fit.seconds, len(fit.held_out)


def fit_regression(recipe: Recipe, name: str, split: int, epochs: int, seed: int) -> tuple[Tensor, float, int]:
    """Fit a conditional flow to a split and return the scores of the test rows, the seconds and the epochs."""
    data = open_npz(name)
    train, test = data[f"train_{split}"], data[f"test_{split}"]
    x, y = (torch.from_numpy(data[part]).float() for part in ("x", "y"))
    loc, scale = (statistic(x[train], 0) for statistic in (torch.mean, torch.std))
    x, (mean, sd) = (x - loc) / scale, (y[train].mean(), y[train].std())
    y = ((y - mean) / sd).unsqueeze(-1)
    torch.manual_seed(seed)
    flow = recipe(1, x.shape[1])
    fit = pf.fit_density(
        flow, y[train], x[train], max_epochs=epochs, training=Training(standardize=False), progress=False
    )
    return score(flow, y[test], x[test]) - sd.log(), fit.seconds, len(fit.held_out)


@torch.no_grad()
def score(flow: Flow, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Return log-densities in double precision."""
    return flow.log_prob(x, context).double()


def time_epochs(recipes: dict[str, Recipe], table: Table, rounds: int, steps: int) -> dict[str, float]:
    """Return the median seconds of a training epoch over rounds; the flows alternate in each round."""
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
            if turn:  # the first round is a warm-up
                taken[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(times) * (len(table.train) // BATCH) for name, times in taken.items()}


# ------------------------------------------------------------ report

FIELDS = "data", "flow", "nats", "two_se", "gain", "gain_two_se", "epochs", "seconds", "seconds_per_epoch"


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean and two standard errors."""
    return values.mean().item(), 2 * values.std().item() / math.sqrt(len(values))


def rows_of_table(
    name: str, scores: dict[str, tuple[Tensor, float, int]], floor: Tensor, times: dict
) -> Iterator[dict]:
    """Yield the rows of a table: the Gaussian, and each flow with its gain on the best peer."""
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
    """Return the columns of a mean density, and of its gain on other scores."""
    mean, error = mean_and_error(values)
    found = {"nats": f"{mean:.3f}", "two_se": f"{error:.3f}"}
    if against is not None:
        gain, error = mean_and_error(values - against)
        found |= {"gain": f"{gain:+.3f}", "gain_two_se": f"{error:.3f}"}
    return found


def page(rows: list[dict], regressions: list[dict], paces: list[str]) -> str:
    """Return the page of the results."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    wins = [name for name in names if best_of(rows, name, peers=False) > best_of(rows, name, peers=True)]
    lines = [
        "# Densities of real tables",
        "",
        "This page is for users who choose a flow for tabular data. It compares our flows with those of zuko and",
        "nflows on real tables, trained by the same call on the same rows. The best of our flows has a higher test",
        f"density than the best peer on {len(wins)} of {len(names)} tables.",
        "",
        f"Reproduce with `python benchmarks/tables.py`. Flows have {LAYERS} layers, two hidden layers of {HIDDEN[0]},",
        f"and {BINS} bins. The batch size is {BATCH}, with at most {STEPS} steps and early stopping on the validation",
        "rows. There are three exceptions:",
        "",
        "* `bnaf` has 12 units per feature.",
        f"* `residual_flow`, `gaussianization` and `sylvester_flow` have {2 * LAYERS} layers.",
        f"* On magic, the smallest table, all figures are means of {SEEDS['magic']} fits.",
        "",
        "The columns:",
        "",
        "* *test nats*: the mean test log-density in nats, ± 2 standard errors.",
        "* *gain on the best peer*: the mean difference per row.",
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
    lines += ["", "Time of a training epoch on one thread, as a ratio of medians; the flows alternate:", "", *paces]
    lines += [
        "",
        "## Regressions",
        "",
        "A cell is the mean of -log p(y | x) over the test rows of five splits, in nats; smaller is better. y has its",
        f"original units. Flows have one layer and two hidden layers of {HIDDEN[0]}, with one setting for all data.",
        f"*{MEMBERS} mixed* is the mean density of {MEMBERS} fits with different seeds. Published results",
        "(arXiv:1612.01474): MC dropout 2.80 / -.95 / 3.04, deep ensembles 2.79 / -1.20 / 3.06.",
        "",
        "| flow | " + " | ".join(f"{name} (target {target:.2f})" for name, target in TARGETS.items()) + " |",
        "|---" * (len(TARGETS) + 1) + "|",
    ]
    for flow in dict.fromkeys(row["flow"] for row in regressions):
        cells = {row["data"]: row for row in regressions if row["flow"] == flow}
        found = [f"{cells[n]['nats']} ± {cells[n]['two_se']}" if n in cells else "" for n in TARGETS]
        lines.append(f"| {flow} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def best_of(rows: list[dict], name: str, *, peers: bool) -> float:
    """Return the highest test density on a table, of the peers or of our flows."""
    own = [row for row in rows if row["data"] == name and row["flow"] != "Gaussian"]
    return max((float(row["nats"]) for row in own if (row["flow"] in PEERS) == peers), default=-math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of tables and flows (default: all)")
    parser.add_argument("--quick", action="store_true", help="smoke run: two epochs")
    parser.add_argument("--fits", action="store_true", help="fit and keep the scores, without writing the page")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the two files")
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path(tempfile.gettempdir()) / "pyro_flows_tables",
        help="folder of finished fits",
    )
    wish = parser.parse_args()
    known = {*TABLES, *TARGETS, *FLOWS, *REGRESSORS}
    if unknown := set(wish.only) - known:
        parser.error(f"--only must name tables or flows of {sorted(known)}, got {sorted(unknown)}.")
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
