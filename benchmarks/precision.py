"""How exact are log-densities in float32, and when do they break?

    python benchmarks/precision.py                    # 15 minutes of one core
    python benchmarks/precision.py --quick --out DIR  # a smoke run

*Random weights*: flows whose weights were all moved by normal noise of growing scale.  *Trained*: flows of
``fit_density`` on magic, diamonds and protein, as in ``tables.py``, with early stopping, at their test rows.  *Bounds*:
``nsf`` whose splines have tighter bounds, at random weights, and what these bounds cost on magic.

For each flow: the condition number of dy/dx, the ratio of its extreme singular values, in float64; and in nats, how far
float32 is from float64 at the same values (``pf.round_off``), how far float32's score of its own draws is from the one
of the pass that drew them, and the same in float64.  Medians and 99 % quantiles over rows.  Writes ``precision.md``
into ``docs/benchmarks``.  Data: see ``tables.py``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path

import tables
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.bijectors import RationalQuadraticSpline
from pyro_flows.flows import Flow

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
BOUNDS = [
    {"min_bin": 0.01, "max_slope": 100.0},  # the default
    {"min_bin": 0.05, "max_slope": 100.0},
    {"min_bin": 0.05, "max_slope": 10.0},
    {"min_bin": 0.1, "max_slope": 5.0},
]
RECIPES = "nsf", "nsf_ar", "maf", "realnvp"
HEAD = """# Precision

How exact are log-densities in float32, and when do they break? *κ* is the condition number of dy/dx: the ratio of its
extreme singular values at a value y. *Rounding*: the difference between the log-density in float32 and the one that a
float64 copy of the flow gives at the same y (`pf.round_off`). *Own draws*: the difference between the score that came
with a draw (`rsample_and_log_prob`) and `log_prob` of that draw, in float32 and in float64. In nats, median / 99 %
quantile over rows. Reproduce with `python benchmarks/precision.py`.
"""
NOTES = """
## What to notice

* The error of float32 is at most some 10⁻⁷ κ: below 0.01 nats up to κ of some 10⁵, beyond 0.1 nats from some 10⁶ on.
  A value in float32 is known to one part in 10⁷ only, and where κ is large its neighbours have other densities. So the
  error is that of the number format and not of the algorithm. float64 has the same limit, further out.
* Tighter bounds on splines help where they already cost accuracy, for κ is a product over layers. So the default bounds
  stay.
* Trained flows stay far below. `fit_density` looks at its flow when it ends, and warns where more than 1 % of the rows
  are off by more than 0.1 nats.
* Scores that come with a draw are right at any κ, so guides, `psis` and `check` are not affected.
"""


def to_base(flow: Flow, y: Tensor) -> Tensor:
    for transform in reversed(flow.transforms):
        y, _ = transform.inverse_and_log_det(y)
    return y


def condition_numbers(flow: Flow, y: Tensor) -> Tensor:
    """κ at each row of y, in float64."""
    exact = copy.deepcopy(flow).double()
    jacobians = torch.func.vmap(torch.func.jacrev(lambda row: to_base(exact, row)))(y.double())
    singular = torch.linalg.svdvals(jacobians.detach())
    return singular[:, 0] / singular[:, -1]


def spread(values: Tensor) -> str:
    median, high = torch.quantile(values.double(), values.new_tensor([0.5, 0.99]).double()).tolist()
    return f"{median:.1e} / {high:.1e}"


@torch.no_grad()
def own_error(flow: Flow, number: int) -> Tensor:
    y, log_prob = flow.rsample_and_log_prob((number,))
    return (flow.log_prob(y) - log_prob).abs()


def row(label: str, flow: Flow, y: Tensor, number: int) -> str:
    cells = [
        spread(condition_numbers(flow, y[: number // 4])),
        spread(pf.round_off(flow, y[:number])),
        spread(own_error(flow, number)),
        spread(own_error(copy.deepcopy(flow).double(), number)),
    ]
    line = f"| {label} | " + " | ".join(cells) + " |"
    print(line, flush=True)
    return line


def header(first: str) -> list[str]:
    return [f"| {first} | κ | rounding | own draws | own draws, float64 |", "|---|---|---|---|---|"]


def random_weights(number: int) -> list[str]:
    lines = ["## Random weights", "", *header("flow, D, scale of the noise")]
    for name in RECIPES:
        for dim in (4, 16):
            for scale in (0.05, 0.1, 0.15, 0.2, 0.25, 0.5):
                torch.manual_seed(1)
                flow = getattr(flows, name)(dim)
                with torch.no_grad():
                    for parameter in flow.parameters():
                        parameter.add_(scale * torch.randn_like(parameter))
                y = flow().sample((number,))
                if not y.isfinite().all():
                    lines.append(f"| `{name}`, {dim}, {scale} | overflow | | | |")
                    break
                lines.append(row(f"`{name}`, {dim}, {scale}", flow, y, number))
    return lines


def fit(flow: Flow, rows: tables.Table, *, quick: bool) -> None:
    pf.fit_density(
        flow,
        rows.train,
        validation=rows.validation,
        max_epochs=1 if quick else round(tables.STEPS / (len(rows.train) // tables.BATCH)),
        batch_size=tables.BATCH,
        lr=tables.LR,
        progress=False,
    )


def trained(number: int, *, quick: bool) -> list[str]:
    lines = ["", "## Trained", "", *header("table, flow")]
    for table in ("magic",) if quick else ("magic", "diamonds", "protein"):
        rows = tables.read_table(table)
        for name in RECIPES:
            torch.manual_seed(0)
            flow = getattr(flows, name)(rows.train.shape[1], **tables.SIZES)
            fit(flow, rows, quick=quick)
            lines.append(row(f"{table}, `{name}`", flow, rows.test, number))
    return lines


def bounded(flow: Flow, bounds: dict[str, float]) -> Flow:
    """A flow whose splines have other bounds."""
    for part in flow.modules():
        if isinstance(spline := getattr(part, "bijector", None), RationalQuadraticSpline):
            part.bijector = dataclasses.replace(spline, **bounds)
    return flow


def bounds_of_splines(number: int, *, quick: bool) -> list[str]:
    """What tighter bounds do to `nsf`: its round-off at large random weights, and its fit."""
    lines = [
        "",
        "## Bounds of splines",
        "",
        "`nsf`; random weights with noise of scale 0.5, D = 4; fitted to magic.",
        "",
    ]
    lines += ["| least bin | largest slope | κ, random | rounding, random | test nats |", "|---|---|---|---|---|"]
    rows = tables.read_table("magic")
    for bounds in BOUNDS:
        torch.manual_seed(1)
        flow = bounded(flows.nsf(4), bounds)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        y = flow().sample((number,))
        cells = [spread(condition_numbers(flow, y[: number // 4])), spread(pf.round_off(flow, y))]
        torch.manual_seed(0)
        flow = bounded(flows.nsf(rows.train.shape[1], **tables.SIZES), bounds)
        fit(flow, rows, quick=quick)
        mean, error = tables.mean_and_error(tables.score(flow, rows.test))
        cells.append(f"{mean:.3f} ± {error:.3f}")
        lines.append(f"| {bounds['min_bin']} | {bounds['max_slope']:.0f} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows and epochs: a smoke run")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    number = 100 if options.quick else 1000
    lines = [HEAD, *random_weights(number), *trained(number, quick=options.quick)]
    lines += [*bounds_of_splines(number, quick=options.quick), NOTES]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "precision.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
