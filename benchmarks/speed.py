"""Speed of our flows, compared with Pyro, zuko, nflows, flowjax and the bare matrix products, in one run.

    python benchmarks/speed.py                                # all tables, three quarters of an hour on 2 cores
    python benchmarks/speed.py --tables main "1 thread"       # some of them
    python benchmarks/speed.py --batch 64 --dims 8 --flows maf nsf --libraries pyro_flows zuko   # your settings
    python benchmarks/speed.py --report                       # the page and the plots, from the CSV file alone
    python benchmarks/speed.py --quick                        # D = 8, short, into a temporary folder: a smoke run

All flows have the same architecture: 5 layers, two hidden layers of 128, 8 bins.  There are four tasks:

    log-prob   score a batch, no gradient
    step       score a batch, back-propagate to the parameters
    sample     draw a batch, no gradient
    slow step  the training step in the other direction: draw a batch, score it, back-propagate
               (for iaf, which draws in its fast direction: score a batch, back-propagate)

The libraries alternate within each repetition, so that a drift of the machine's speed affects all.  Times are medians.
Each short run follows an untimed one, so that the threads of the previous library are idle.  Compiled code is warmed up
first, and the seconds of its first call have a separate table.  Each table runs in a new process, on as many cores as
the table has threads.  So jax, which sizes its pool by the available cores, has the same number.  Peers that are not
installed are left out (``pip install -e '.[bench]'``).

Each cell is appended to ``docs/benchmarks/speed.csv`` when it ends, and an interrupted run continues after it.  Delete
the file to measure everything again.  ``speed.md``, ``speed.png`` and ``speed_scaling.png`` are made from it.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from speed_contenders import (
    AUTOREGRESSIVE,
    COMPILED,
    FLOOR,
    FLOWJAX,
    FLOWS,
    OURS,
    TASKS,
    Case,
    Contender,
    is_slow,
    is_too_large,
)
from speed_peers import LIBRARIES
from speed_table import Row, append, read, report

LONG = 5.0  # seconds above which a task runs only once
BRIEF = 0.5  # seconds below which each timed run follows an untimed one
OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
EAGER = [OURS, "Pyro", "zuko", "nflows"]


@dataclass(frozen=True)
class Table:
    """Settings of one table: its flows, tasks and dims, at one batch, dtype, device and number of threads."""

    name: str
    flows: Sequence[str] = tuple(FLOWS)
    tasks: Sequence[str] = tuple(TASKS)
    dims: Sequence[int] = (32,)
    batch: int = 512
    dtype: str = "float32"
    threads: int = 2
    device: str = "cpu"
    libraries: Sequence[str] = (*EAGER, FLOOR)

    def cells(self) -> Iterator[tuple[int, str, list[str]]]:
        """Yield each D and flow with its tasks."""
        for dim in self.dims:
            for flow in self.flows:
                tasks = [t for t in self.tasks if self.name != "scaling" or is_slow(flow, t)]
                if tasks:
                    yield dim, flow, tasks


TABLES = [
    Table("main", dims=(8, 32, 128), libraries=tuple(LIBRARIES)),
    Table("float64", ("maf", "nsf"), dtype="float64", libraries=tuple(LIBRARIES)),
    Table("batch 1", ("maf", "nsf"), ("log-prob", "step"), batch=1, libraries=tuple(LIBRARIES)),
    Table("batch 16384", ("maf", "nsf", "realnvp"), ("log-prob", "step"), batch=16384, libraries=tuple(LIBRARIES)),
    Table("1 thread", ("maf", "nsf"), threads=1, libraries=tuple(LIBRARIES)),
    Table("wide", ("maf", "nsf", "realnvp"), ("log-prob", "step"), dims=(16, 512)),
    Table("scaling", AUTOREGRESSIVE, dims=(16, 32, 64, 128, 256, 512), libraries=(OURS, "zuko")),
    Table("GPU", dims=(32, 128), device="cuda", libraries=tuple(LIBRARIES)),
]


def clock(function: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(contenders: dict[str, Contender], task: str, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median seconds of each contender at one task, and the seconds of first calls.

    The contenders alternate until the time is up.
    """
    compiles = {library: clock(contenders[library][task]) for library in (COMPILED, FLOWJAX) if library in contenders}
    times: dict[str, list[float]] = {library: [] for library in contenders}
    gc.collect()
    gc.disable()
    first = {library: clock(tasks[task]) for library, tasks in contenders.items()}  # warm up
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or min(map(len, times.values())) < 3:
        for library, tasks in contenders.items():
            # A long task is not slow because of a missing warm-up, so one run is enough.
            if first[library] < BRIEF:
                clock(tasks[task])  # wakes up its threads while those of the previous library become idle
            times[library].append(first[library] if first[library] > LONG else clock(tasks[task]))
    gc.enable()
    return {library: statistics.median(values) for library, values in times.items()}, compiles


def run(table: Table, seconds: float, path: Path) -> None:
    """Measure one table, except for cells that are already in the file.  Needs a fresh process."""
    if hasattr(os, "sched_setaffinity"):  # before jax starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: table.threads])
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # jax would take most of a GPU's memory
    torch.set_num_threads(table.threads)
    torch.set_default_dtype(getattr(torch, table.dtype))
    torch.manual_seed(0)
    torch.compiler.config.force_disable_caches = True  # so that the seconds of first calls include compiling
    torch._inductor.config.compile_threads = 1  # a pool of workers would disturb the timings
    torch._dynamo.config.cache_size_limit = 64

    device = torch.cuda.get_device_name() if table.device == "cuda" else table.device
    libraries = [name for name in table.libraries if importlib.util.find_spec(LIBRARIES[name].module)]
    setting = {"batch": table.batch, "dtype": table.dtype, "threads": table.threads, "device": device}
    done = {tuple(row[c] for c in ("table", "flow", "dim", "task", "library", *setting)) for row in read(path)}

    def is_done(flow: str, dim: int, task: str, library: str) -> bool:
        return tuple(map(str, (table.name, flow, dim, task, library, *setting.values()))) in done

    for dim, flow, tasks in table.cells():
        case = Case(flow, torch.randn(table.batch, dim, device=table.device))
        if all(is_done(flow, dim, task, OURS) for task in tasks):
            continue
        built = {library: LIBRARIES[library].build(case) for library in libraries}
        contenders = {library: functions for library, functions in built.items() if functions is not None}
        for task in tasks:
            left_out = {COMPILED} if task == "slow step" else set()  # each would need one more compiled graph
            if is_too_large(case, task):
                left_out |= {*EAGER[1:], FLOWJAX}
            able = {library: functions for library, functions in contenders.items() if library not in left_out}
            if all(is_done(flow, dim, task, library) for library in able):
                continue
            times, compiles = measure(able, task, seconds)
            where = {"flow": flow, "dim": dim, **setting, "task": task}
            rows: list[Row] = [
                {"table": name, **where, "library": library, "version": version(library), "ms": f"{1e3 * value:.4g}"}
                for name, values in ((table.name, times), (f"{table.name}, first call", compiles))
                for library, value in values.items()
            ]
            append(rows, path)
            shown = "  ".join(f"{library} {1e3 * value:.1f}" for library, value in times.items())
            took = "".join(f"  [{library}: first {value:.1f} s]" for library, value in compiles.items())
            print(f"{table.name}: D={dim:<4} {flow:8} {task:10} {shown}{took}", flush=True)


def version(library: str) -> str:
    """Return the version of a library, with that of jax for flowjax."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        own = importlib.metadata.version(LIBRARIES[library].package)
        return f"{own} (jax {importlib.metadata.version('jax')})" if library == FLOWJAX else own
    return ""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [table.name for table in TABLES]
    made.add_argument("--tables", nargs="+", choices=names, help="tables to measure (default: all)")
    made.add_argument("--dims", type=int, nargs="+", help="numbers of features")
    made.add_argument("--flows", nargs="+", choices=FLOWS)
    made.add_argument("--tasks", nargs="+", choices=TASKS)
    made.add_argument("--libraries", nargs="+", choices=list(LIBRARIES))
    made.add_argument("--batch", type=int)
    made.add_argument("--dtype", choices=["float32", "float64"])
    made.add_argument("--threads", type=int)
    made.add_argument("--device", choices=["cpu", "cuda"])
    made.add_argument("--seconds", type=float, default=1.5, help="minimum time per task and flow")
    made.add_argument("--quick", action="store_true", help="smoke run: D = 8, into a temporary folder")
    made.add_argument("--report", action="store_true", help="make page and plots from the CSV file, without measuring")
    made.add_argument("--out", type=Path, help="folder of the results")
    return made


def chosen(options: argparse.Namespace) -> list[Table]:
    """Return the requested tables; settings without a table change the main table."""
    given: dict[str, Any] = {f.name: getattr(options, f.name, None) for f in fields(Table)}
    given = {name: value for name, value in given.items() if value is not None}
    if options.quick:
        given = {"dims": [8], "threads": 1, **given}
    if given and not options.tables and not options.quick:
        return [replace(TABLES[0], **{"name": "custom", **given})]
    tables = [replace(t, **given) for t in TABLES if not options.tables or t.name in options.tables]
    return [table for table in tables if table.device == "cpu" or torch.cuda.is_available()]


def main() -> None:
    options = parser().parse_args()
    if options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="speed-")) if options.quick else OUT
    options.out.mkdir(parents=True, exist_ok=True)
    tables = [] if options.report else chosen(options)
    if len(tables) == 1:
        run(tables[0], 0.1 if options.quick else options.seconds, options.out / "speed.csv")
    for table in tables if len(tables) > 1 else []:
        # Each table runs in a child process, which gets the same options with one table.
        rest = [a for a in sys.argv[1:] if a != "--tables" and a not in (options.tables or [])]
        command = [sys.executable, __file__, *rest, "--out", str(options.out), "--tables", table.name]
        subprocess.run(command, check=True)
    for path in report(options.out):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
