"""What are several processes worth, and do they find what one finds?

    python benchmarks/processes.py            # about 7 minutes on 2 cores, which must be free
    python benchmarks/processes.py --quick    # few steps: a smoke run

Throughput: ``fit_density`` on a made-up table, with fixed numbers of rows to each process in a step, so that the batch
grows with the processes, and one thread to each.  Beside one process and N by torchrun, N that know nothing of each
other say what the machine itself allows.  The three take turns, so a machine whose speed drifts treats them alike; a
figure is the batch divided by the median time from step to step, and the median of the rounds.

Loss curves: the same batch in one process and divided among N, from the same start.

Writes ``docs/benchmarks/processes.md``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.objectives import Likelihood

COLUMNS, HIDDEN = 16, (128, 128)
FIRST = 20  # steps before much is made of round-off
FLOWS = {"nsf": flows.nsf, "maf": flows.maf}
Rates = dict[str, dict[tuple[str, int], list[float]]]  # how it was run -> flow and rows -> rows a second
OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


class Timed(Likelihood):
    """The likelihood, which notes when it is asked for in training."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def forward(self, flow: Any, x: Tensor, context: Any = None) -> Tensor:
        if torch.is_grad_enabled():
            self.times.append(time.perf_counter())
        return super().forward(flow, x, context)


def table(rows: int) -> Tensor:
    """Correlated columns along a curve."""
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(rows, COLUMNS, generator=seeded) @ torch.randn(COLUMNS, COLUMNS, generator=seeded)
    x[:, ::2] += 0.3 * x[:, 1::2].square()
    return x


def work(options: argparse.Namespace) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    (rows,) = options.rows
    size = int(os.environ.get("WORLD_SIZE", 1))
    found: dict[str, Any] = {}
    for name, recipe in FLOWS.items():
        if options.curves:
            for dtype in (torch.float32, torch.float64):
                torch.manual_seed(0)
                flow = recipe(COLUMNS, hidden_dims=HIDDEN).to(dtype)
                x = table(10 * rows)
                epochs = max(1, options.steps // 9)
                fit = pf.fit_density(flow, x, batch_size=rows, max_epochs=epochs, progress=False)
                found[f"{name} {dtype}"] = (fit.losses, fit.held_out)
        else:
            torch.manual_seed(0)
            flow, timed = recipe(COLUMNS, hidden_dims=HIDDEN), Timed()
            x, batch = table(size * rows * options.steps), size * rows
            judge = x[: 2 * COLUMNS]
            pf.fit_density(flow, x, validation=judge, objective=timed, batch_size=batch, max_epochs=1, progress=False)
            steps = torch.tensor(timed.times).double().diff()[5:]  # the first find the memory that they need
            found[name] = batch / steps.median().item()
    torch.save(found, options.worker / f"found_{os.environ.get('RANK', os.getpid())}")


def launch(
    options: argparse.Namespace, rows: int, processes: int, *, apart: bool = False, curves: bool = False
) -> list[Any]:
    """What each of some processes has found, from the first on."""
    with tempfile.TemporaryDirectory() as folder:
        own = [__file__, "--worker", folder, "--rows", str(rows), "--steps", str(options.steps)]
        own += ["--curves"] if curves else []
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        commands = [[sys.executable, *own]] * processes if apart else [[*torchrun, *own]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [subprocess.Popen(command, env=environment) for command in commands]
        statuses = [one.wait() for one in running]
        if any(statuses):
            raise SystemExit("a process has failed")
        return [torch.load(file, weights_only=False) for file in sorted(Path(folder).iterdir())]


def page(rates: Rates, curves: list[Any], options: argparse.Namespace) -> str:
    """The table of throughputs and that of loss curves."""
    number = options.processes
    lines = [
        "# Several processes",
        "",
        f"`fit_density` on a made-up table of {COLUMNS} columns, default flows with hidden {HIDDEN[0]} × {HIDDEN[1]}, "
        f"one thread to a process, on the CPU (gloo); torch {torch.__version__}, "
        f"Python {platform.python_version()}, pyro_flows {pf.__version__}. Medians of {options.rounds} rounds.",
        f"Reproduce with `python benchmarks/processes.py` on {number} free cores.",
        "",
        "## Throughput",
        "",
        f"Rows per second; in parentheses the ratio to one process. Those apart are {number} runs that know nothing of "
        "each other: what the machine allows.",
        "",
        f"| flow | rows to a process in a step | one process | {number} by torchrun | {number} apart |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, rows in rates["one"]:
        one, *more = (statistics.median(rates[how][name, rows]) for how in ("one", "torchrun", "apart"))
        lines.append(
            f"| {name} | {rows} | {one:,.0f} | " + " | ".join(f"{r:,.0f} ({r / one:.2f})" for r in more) + " |"
        )
    lines += [
        "",
        "## Loss curves",
        "",
        f"The same batches of {options.rows[0]} rows in one process and divided among {number}, from the same start: "
        f"the largest difference of a step's loss in the first {FIRST} steps and in all, and the held-out loss at the "
        "end, in nats. Sums are taken in another order, and the fit makes more of the round-off from step to step.",
        "",
        f"| flow | dtype | steps | difference, first {FIRST} | all | held-out, one | held-out, divided |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for key, (losses, held) in curves[0].items():
        name, dtype = key.split()
        other, other_held = curves[1][key]
        gaps = (losses - other).abs()
        gap = f"{gaps[:FIRST].max():.1e} | {gaps.max():.1e}"
        ends = f"{held.min().item():.6f} | {other_held.min().item():.6f}"
        lines.append(f"| {name} | {dtype.removeprefix('torch.')} | {len(losses)} | {gap} | {ends} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many, beside one")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048], help="rows to a process in a step")
    parser.add_argument("--steps", type=int, default=150, help="steps of a fit")
    parser.add_argument("--rounds", type=int, default=3, help="how often the three take turns")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--curves", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if options.quick:
        options.steps, options.rounds = 30, 1
    cases = [(name, rows) for rows in options.rows for name in FLOWS]
    rates: Rates = {how: {case: [] for case in cases} for how in ("one", "torchrun", "apart")}
    for number in range(options.rounds):
        for rows in options.rows:
            found = {
                "one": launch(options, rows, 1)[:1],
                "torchrun": launch(options, rows, options.processes)[:1],
                "apart": launch(options, rows, options.processes, apart=True),
            }
            for how, all_of_them in found.items():
                for name in FLOWS:
                    rate = sum(one[name] for one in all_of_them)
                    rates[how][name, rows].append(rate)
                    print(f"round {number + 1}  {how:9} {name:5} {rows:6} {rate:9,.0f} rows/s", flush=True)
    curves = [launch(options, options.rows[0], number, curves=True)[0] for number in (1, options.processes)]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "processes.md").write_text(page(rates, curves, options))
    print((options.out / "processes.md").read_text())


if __name__ == "__main__":
    main()
