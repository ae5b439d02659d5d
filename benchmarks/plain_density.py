"""Flows trained on real tables by a plain Adam loop, at several step sizes: ours, zuko's and nflows'.

    python benchmarks/plain_density.py                                # all, about three hours on one core
    python benchmarks/plain_density.py --only magic maf --rates 1e-3  # some tables, recipes and rates
    python benchmarks/plain_density.py --quick --out DIR              # a smoke run

The loop is ``torch.optim.Adam(flow.parameters(), lr)`` at a constant step size, without warm-up, clipping or averages.
It runs 15 epochs with minibatches of 512.  The data are the first 16,000 training rows of magic, diamonds and protein,
read and standardised as in ``tables.py``.  All flows see the same rows in the same order.  They have 5 layers, two
hidden layers of 128 and 8 bins where there are bins.  All other options are the defaults of each library.  Couplings of
nflows accept only residual networks, which have one more hidden layer.  zuko's UNAF is left out, because its integrals
take seconds per step.  So ``umnn`` has no peer.

The results are mean log-densities of the test rows in nats, averaged over the states after each of the last five
epochs.  The differences to each peer are taken per row, ± 2 standard errors.  At a constant step size a single state is
noisy, so five states per seed give a stable mean.  The CSV file also has the last states, and those with the best
validation loss.  An interrupted run continues after its last finished fit, and keeps the rows of other runs.  Writes
``plain_density.md`` and ``plain_density.csv`` into ``docs/benchmarks``.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import nflows.flows
import nflows.transforms as nt
import torch
import zuko
from posteriors import read, write, write_csv
from tables import (
    BATCH,
    BINS,
    HIDDEN,
    LAYERS,
    OUT,
    PEERS,
    SIZES,
    TABLES,
    Foreign,
    Recipe,
    Store,
    Table,
    mean_and_error,
    of_zuko,
    read_table,
    score,
)
from torch import Tensor

from pyro_flows import flows
from pyro_flows.flows import Flow

ROWS, EPOCHS, LAST = 16000, 15, 5
RATES = 3e-4, 1e-3, 3e-3, 8e-3
AFFINE = "maf", "iaf.inv", "realnvp", "nice"  # cheap recipes, fitted with several seeds
SEEDS = 2
COLUMNS = (
    "data",
    "recipe",
    "flow",
    "rate",
    "seeds",
    "nats",
    "two_se",
    "seed_sd",
    "last",
    "best",
    "gain",
    "gain_two_se",
    "seconds",
)


def of_nflows(kind: str) -> Recipe:
    """Return the recipe of an affine flow of nflows; its masked networks have the hidden layers of ours."""

    def recipe(input_dim: int, context_dim: int) -> Flow:
        if kind == "MAF":
            made = nflows.flows.MaskedAutoregressiveFlow(
                input_dim, HIDDEN[0], LAYERS, len(HIDDEN) - 1, use_residual_blocks=False
            )
        else:
            made = nflows.flows.SimpleRealNVP(
                input_dim, HIDDEN[0], LAYERS, len(HIDDEN) - 1, use_volume_preserving=kind == "NICE"
            )
        assert isinstance(made._transform, nt.CompositeTransform)
        return Flow([Foreign(made._transform, input_dim, context_dim, "nflows")])

    return recipe


ADDITIVE = {"univariate": zuko.transforms.AdditiveTransform, "shapes": [()]}  # by default zuko's NICE also scales
FLOWS: dict[str, dict[str, Recipe]] = {  # ours comes first, then its peers
    "maf": {
        "maf": lambda d, c: flows.maf(d, c, **SIZES),
        "zuko MAF": PEERS["zuko MAF"],
        "nflows MAF": of_nflows("MAF"),
    },
    "iaf.inv": {"iaf.inv": lambda d, c: flows.iaf(d, c, **SIZES).inv, "zuko MAF": PEERS["zuko MAF"]},
    "realnvp": {
        "realnvp": lambda d, c: flows.realnvp(d, c, **SIZES),
        "zuko RealNVP": of_zuko(zuko.flows.RealNVP),
        "nflows RealNVP": of_nflows("RealNVP"),
    },
    "nice": {
        "nice": lambda d, c: flows.nice(d, c, **SIZES),
        "zuko NICE": of_zuko(zuko.flows.NICE, **ADDITIVE),
        "nflows NICE": of_nflows("NICE"),
    },
    "nsf": {
        "nsf": lambda d, c: flows.nsf(d, c, bins=BINS, **SIZES),
        "zuko NSF, coupling": PEERS["zuko NSF, coupling"],
    },
    "nsf_ar": {
        "nsf_ar": lambda d, c: flows.nsf_ar(d, c, bins=BINS, **SIZES),
        "zuko NSF": PEERS["zuko NSF"],
        "nflows NSF": PEERS["nflows NSF"],
    },
    "sospf": {"sospf": lambda d, c: flows.sospf(d, c, **SIZES), "zuko SOSPF": of_zuko(zuko.flows.SOSPF)},
    "bpf": {"bpf": lambda d, c: flows.bpf(d, c, **SIZES), "zuko BPF": of_zuko(zuko.flows.BPF)},
    "gaussianization": {
        "gaussianization": lambda d, c: flows.gaussianization(d, c, num_transforms=LAYERS),
        "zuko GF": of_zuko(zuko.flows.GF),
    },
    "naf": {"naf": lambda d, c: flows.naf(d, c, **SIZES), "zuko NAF": of_zuko(zuko.flows.NAF)},
    "umnn": {"umnn": lambda d, c: flows.umnn(d, c, **SIZES)},
}


def fit(recipe: Recipe, table: Table, rate: float, seed: int, quick: bool) -> tuple[Tensor, float, int]:
    """Fit a flow and return the scores of the test rows, the seconds taken and the best epoch.

    The scores, ``(3, N)``, are the mean over the states of the last epochs, the score of the last state, and the score
    of the state with the best validation loss.
    """
    torch.manual_seed(seed)
    flow = recipe(table.train.shape[1], 0)
    x = table.train[: 4 * BATCH if quick else ROWS]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
    judged, scores = [], []
    start = time.perf_counter()
    for _ in range(1 if quick else EPOCHS):
        flow.train()
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            (-flow.log_prob(x[rows]).mean()).backward()
            optimizer.step()
        flow.eval()
        judged.append(score(flow, table.validation).mean().nan_to_num(-math.inf).item())
        scores.append(score(flow, table.test))
    seconds, best = time.perf_counter() - start, max(range(len(judged)), key=judged.__getitem__)
    return torch.stack((torch.stack(scores[-LAST:]).mean(0), scores[-1], scores[best])), seconds, best


def rows_of(data: str, recipe: str, rate: float, found: dict[str, list[tuple[Tensor, float, int]]]) -> Iterator[dict]:
    """Yield a row for our flow and a row per peer, with the gain of ours over it, from the fits of all seeds."""
    scores = {name: torch.stack([values for values, _, _ in fits]) for name, fits in found.items()}  # (S, 3, N)
    for name, values in scores.items():
        nats, two_se = mean_and_error(values[:, 0].mean(0))
        single, (_, last, best) = values[:, 0].mean(-1), values.mean((0, 2)).tolist()
        row = {"data": data, "recipe": recipe, "flow": name, "rate": f"{rate:g}", "seeds": len(values)}
        row |= {"nats": f"{nats:.3f}", "two_se": f"{two_se:.3f}", "last": f"{last:.3f}", "best": f"{best:.3f}"}
        row |= {"seed_sd": f"{single.std().item():.3f}"} if len(single) > 1 else {}
        if name != recipe:
            gain, two_se = mean_and_error((scores[recipe] - values)[:, 0].mean(0))
            row |= {"gain": f"{gain:+.3f}", "gain_two_se": f"{two_se:.3f}"}
        yield row | {"seconds": f"{sum(seconds for _, seconds, _ in found[name]) / len(values):.0f}"}


def page(rows: list[dict]) -> str:
    """Return the page of the results."""
    seeds = sorted(int(row["seeds"]) for row in rows)
    spreads = torch.tensor([float(row["seed_sd"]) for row in rows if row.get("seed_sd")])
    gains = [(float(row["gain"]), float(row["gain_two_se"])) for row in rows if row.get("gain")]
    better, worse = sum(gain > error for gain, error in gains), sum(gain < -error for gain, error in gains)
    lines = [
        "# Flows in a plain training loop",
        "",
        "This page is for users who train a flow in their own loop. It shows which step sizes work, and compares our",
        f"recipes with those of zuko and nflows at the same step size. There are {len(gains)} comparisons. By more",
        f"than 2 standard errors, our recipe has the higher test density in {better} and the lower one in {worse}.",
        "",
        "Reproduce with `python benchmarks/plain_density.py`. The loop is Adam at a constant step size, without",
        f"warm-up, clipping or averages. It runs {EPOCHS} epochs over the first {ROWS:,} training rows, with",
        f"minibatches of {BATCH}. Flows have {LAYERS} layers, two hidden layers of {HIDDEN[0]}, and {BINS} bins.",
        "",
        "Columns are step sizes. A cell is the mean test log-density in nats, averaged over the states after each of",
        f"the last {LAST} epochs. Brackets in the rows of peers hold the gain of our recipe, ± 2 standard errors over",
        f"test rows. A cell is the mean of {seeds[0]} to {seeds[-1]} fits; `plain_density.csv` has the number.",
    ]
    if len(spreads):
        lines += [
            f"The standard deviation between seeds is {spreads.median():.3f} nats in the median cell and",
            f"{spreads.quantile(0.9):.3f} nats in the ninth decile. Large values come from a few rows with very low",
            "densities.",
        ]
    rates = sorted({row["rate"] for row in rows}, key=float)
    for data in dict.fromkeys(row["data"] for row in rows):
        lines += ["", f"## {data}", "", "| flow | " + " | ".join(rates) + " |", "|---" * (len(rates) + 1) + "|"]
        here = [row for row in rows if row["data"] == data]
        for recipe, name in dict.fromkeys((row["recipe"], row["flow"]) for row in here):
            cells = {row["rate"]: row for row in here if (row["recipe"], row["flow"]) == (recipe, name)}
            title = f"`{name}`" if name == recipe else name
            lines.append(f"| {title} | " + " | ".join(cell(cells.get(rate)) for rate in rates) + " |")
    return "\n".join(lines) + "\n"


def cell(row: dict | None) -> str:
    """Return the cell of a row, or an empty text if there is no row."""
    if row is None:
        return ""
    gain = f" ({row['gain']} ± {row['gain_two_se']})" if row.get("gain") else ""
    return f"{row['nats']}{gain}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of tables and recipes (default: all)")
    parser.add_argument("--rates", nargs="*", type=float, default=RATES, help="step sizes")
    parser.add_argument("--seeds", type=int, help=f"fits per flow (default: {SEEDS} for affine recipes, else 1)")
    parser.add_argument("--quick", action="store_true", help="smoke run: one epoch of few rows")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the two files")
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path(tempfile.gettempdir()) / "pyro_flows_plain_density",
        help="folder of finished fits",
    )
    wish = parser.parse_args()
    if unknown := set(wish.only) - {*TABLES, *FLOWS}:
        parser.error(f"--only must name tables or recipes of {[*TABLES, *FLOWS]}, got {sorted(unknown)}.")
    torch.set_num_threads(1)
    wish.out.mkdir(parents=True, exist_ok=True)
    store = Store(wish.keep / ("quick" if wish.quick else "full"))
    tables = {name: read_table(name) for name in TABLES if name in wish.only or not {*TABLES} & {*wish.only}}
    file = wish.out / "plain_density.csv"
    rows = {place_of(row): row for row in read(file)}
    for recipe in [name for name in FLOWS if name in wish.only] or FLOWS:
        seeds = 1 if wish.quick else wish.seeds or (SEEDS if recipe in AFFINE else 1)
        for rate, (data, table) in product(wish.rates, tables.items()):
            found = {}
            for name, build in FLOWS[recipe].items():
                fits = [partial(fit, build, table, rate, seed, wish.quick) for seed in range(seeds)]
                found[name] = [store.get(f"{data} {name} {rate:g} {s}", run) for s, run in enumerate(fits)]
            for row in rows_of(data, recipe, rate, found):
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                rows[place_of(row)] = row
            save([rows[place] for place in sorted(rows)], file)


def place_of(row: dict) -> tuple[int, int, int, float]:
    """Return the place of a row in the table; no two rows share one."""
    peers = list(FLOWS[row["recipe"]])
    return (
        TABLES.index(row["data"]),
        list(FLOWS).index(row["recipe"]),
        peers.index(row["flow"]),
        float(row["rate"]),
    )


def save(rows: list[dict], file: Path) -> None:
    """Write the rows as CSV and the page as Markdown."""
    write_csv(rows, COLUMNS, file)
    write(page(rows), file.with_suffix(".md"))


if __name__ == "__main__":
    main()
