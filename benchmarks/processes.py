"""Throughput and loss curves of ``fit_density`` in several processes, compared with one.

    python benchmarks/processes.py            # about 7 minutes on 2 free cores
    python benchmarks/processes.py --quick    # few steps: a smoke run

*Throughput*: ``fit_density`` on a simulated table.  Every process has one thread and a fixed number of rows per step.
So the batch grows with the number of processes.  One process is compared with N processes of torchrun, and with N
independent runs, which show what the machine allows.  The three alternate, so that a drift of the machine's speed
affects all.  A rate is the batch divided by the median time between steps, and the median over rounds.

*Loss curves*: the same batch in one process and divided among N, from the same start.

Writes ``docs/benchmarks/processes.md``.
"""

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
from pyro_flows.training import Training

COLUMNS, HIDDEN = 16, (128, 128)
FIRST = 20  # steps before round-off has grown
FLOWS = {"nsf": flows.nsf, "maf": flows.maf}
Rates = dict[str, dict[tuple[str, int], list[float]]]  # way to run -> flow and rows -> rows per second
OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


class Timed(Likelihood):
    """Likelihood that records the time of each call in training."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def forward(self, flow: Any, x: Tensor, context: Any = None) -> Tensor:
        if torch.is_grad_enabled():
            self.times.append(time.perf_counter())
        return super().forward(flow, x, context)


def table(rows: int) -> Tensor:
    """Return a table with correlated, curved columns."""
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(rows, COLUMNS, generator=seeded) @ torch.randn(COLUMNS, COLUMNS, generator=seeded)
    x[:, ::2] += 0.3 * x[:, 1::2].square()
    return x


def work(options: argparse.Namespace) -> None:
    """Run the fits of one process and save their rates, or their loss curves."""
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
            pf.fit_density(
                flow,
                x,
                training=Training(validation=judge, objective=timed),
                batch_size=batch,
                max_epochs=1,
                progress=False,
            )
            steps = torch.tensor(timed.times).double().diff()[5:]  # the first steps allocate memory
            found[name] = batch / steps.median().item()
    torch.save(found, options.worker / f"found_{os.environ.get('RANK', os.getpid())}")


def launch(
    options: argparse.Namespace, rows: int, processes: int, *, apart: bool = False, curves: bool = False
) -> list[Any]:
    """Run several processes and return the result of each, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        own = [__file__, "--worker", folder, "--rows", str(rows), "--steps", str(options.steps)]
        own += ["--curves"] if curves else []
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        commands = [[sys.executable, *own]] * processes if apart else [[*torchrun, *own]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [subprocess.Popen(command, env=environment) for command in commands]
        statuses = [one.wait() for one in running]
        if any(statuses):
            raise SystemExit("launch: all processes must succeed, but one has failed. See its error above.")
        return [torch.load(file, weights_only=False) for file in sorted(Path(folder).iterdir())]


def page(rates: Rates, curves: list[Any], options: argparse.Namespace) -> str:
    """Return the page: the table of throughputs and that of loss curves."""
    number = options.processes
    middle = {how: {case: statistics.median(found) for case, found in cases.items()} for how, cases in rates.items()}
    gains = [middle["torchrun"][case] / one for case, one in middle["one"].items()]
    lines = [
        "# Several processes",
        "",
        "This page is for users who train one flow in several processes. It compares the throughput and the result of "
        f"`fit_density` in one process and in {number}. On {number} cores, {number} processes are {min(gains):.2f} to "
        f"{max(gains):.2f} times as fast as one. In float64 both find the same flow.",
        "",
        f"Reproduce with `python benchmarks/processes.py` on {number} free cores. The data are a simulated table of "
        f"{COLUMNS} columns. Flows are default ones with hidden {HIDDEN[0]} × {HIDDEN[1]}. Every process has one "
        f"thread of the CPU (gloo). Rates are medians of {options.rounds} rounds. torch {torch.__version__}, Python "
        f"{platform.python_version()}, pyro_flows {pf.__version__}.",
        "",
        "## Throughput",
        "",
        f"Rows per second, with the ratio to one process in brackets. The last column is for {number} independent "
        "runs, which show what the machine allows.",
        "",
        f"| flow | rows per process and step | one process | {number} by torchrun | {number} independent |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, rows in rates["one"]:
        one, *more = (middle[how][name, rows] for how in ("one", "torchrun", "apart"))
        lines.append(
            f"| {name} | {rows} | {one:,.0f} | " + " | ".join(f"{r:,.0f} ({r / one:.2f})" for r in more) + " |"
        )
    lines += [
        "",
        "## Loss curves",
        "",
        f"The same batches of {options.rows[0]} rows, in one process and divided among {number}, from the same start. "
        f"*Difference*: the largest one of a step's loss, in the first {FIRST} steps and in all. *Held-out*: the loss "
        "at the end. All are in nats. Two processes sum in another order, and the fit amplifies this round-off from "
        "step to step.",
        "",
        f"| flow | dtype | steps | difference, first {FIRST} | difference, all | held-out, one | held-out, {number} |",
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
    parser.add_argument("--processes", type=int, default=2, help="number of processes to compare with one")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048], help="rows per process and step")
    parser.add_argument("--steps", type=int, default=150, help="steps per fit")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of all runs")
    parser.add_argument("--quick", action="store_true", help="smoke run with few steps")
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
