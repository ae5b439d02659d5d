"""How much memory do flows take, beside zuko and nflows where each feature costs them a graph?

    python benchmarks/memory.py            # all of it, some minutes of one core
    python benchmarks/memory.py --quick    # small flows, few rows: a smoke run

Two hidden layers of 128, 8 bins, float32.  Four tasks, each of them one call:

    score      score a batch, no gradient
    step       draw or score a batch, whichever is fast, back-propagate to the parameters
    slow step  the same through the other direction
    draw       draw a batch, no gradient

What is reported is the peak of the tensors that are alive at a time, on top of parameters and data, with the gradients
of parameters: each operation of a call and of its backward pass is watched, and the end of each storage that it made.
That is the same in every run and for every allocator, so that one process measures all cases.  It leaves out what a
kernel takes for itself while it runs: on six cases torch's profiler, which counts that too but takes minutes for the
many small steps of the slow direction, agreed to 3 %.  How much a whole process grows is measured for the million
draws, in a fresh one.  On a GPU (``--device cuda``) it is ``torch.cuda.max_memory_allocated``.

The peak is a line in the number of rows: each case is run at two small numbers and at those that fit into ``--limit``;
others are read off the line, and the report says how far the line was from what was run.

Writes ``docs/benchmarks/memory.md`` and ``docs/benchmarks/memory.csv``.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import math
import platform
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import speed_contenders as contenders
import speed_peers
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_flows import flows
from pyro_flows.flows import Flow

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
FLOWS, DIMS, LAYERS, ROWS = contenders.FLOWS, [8, 64, 256], [2, 5, 10], [512, 4096, 32768]
TASKS = ["score", "step", "slow step"]
SMALL = 256, 512  # enough for activations to outweigh the gradients of parameters, as they do from there on
SMALL_PEERS = {8: (32, 64), 64: (32, 64), 256: (8, 16)}
PEERS = {"zuko": speed_peers.zuko, "nflows": speed_peers.nflows}
DRAWS, CHUNK = 1_000_000, 10_000
Run = Callable[[], object]


class Case(NamedTuple):
    """What was measured: bytes at a number of rows, read off the line where it was not run."""

    library: str
    flow: str
    dim: int
    layers: int
    task: str
    rows: int
    peak: float
    run: bool
    line: float = math.nan


class Alive(TorchDispatchMode):
    """Adds up the bytes of the storages that are made while it is on, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}  # the storages, those from before with no bytes
        self.held = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.meet(tensor.untyped_storage(), new=False)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.meet(tensor.untyped_storage(), new=True)
        return made

    def meet(self, storage: torch.UntypedStorage, new: bool) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes() if new else 0
            self.held += self.known[key]
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self.part, key)

    def part(self, key: int) -> None:
        self.held -= self.known.pop(key)


def peak_of(function: Run, device: str) -> int:
    """The largest number of bytes that a call holds at a time, on top of what was there before."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with Alive() as alive:
        function()
    return alive.most


class Line(NamedTuple):
    """Bytes of a call at any number of rows."""

    start: float
    slope: float

    def at(self, rows: int) -> float:
        return self.start + self.slope * rows


def line_through(build: Callable[[int], Run], rows: tuple[int, int], device: str) -> tuple[Line, dict[int, int]]:
    peaks = {number: peak_of(build(number), device) for number in rows}
    slope = (peaks[rows[1]] - peaks[rows[0]]) / (rows[1] - rows[0])
    return Line(peaks[rows[0]] - slope * rows[0], slope), peaks


def tasks_of(flow: Flow, scores_fast: bool, shape: tuple[int, ...], device: str, task: str) -> Callable[[int], Run]:
    """From a number of rows to a call of the task."""
    flow = flow.to(device)

    def build(rows: int) -> Run:
        x = torch.randn(rows, *shape, device=device)
        run = contenders.contender(
            contenders.Case("maf" if scores_fast else "iaf", x),  # of either only the direction counts
            flow.log_prob,
            lambda: flow.sample((rows,)),
            lambda: flow.rsample_and_log_prob((rows,))[1],
            list(flow.parameters()),
        )
        return run[{"score": "log-prob", "draw": "sample"}.get(task, task)]

    return build


def ours(name: str, dim: int, layers: int, task: str, device: str) -> Callable[[int], Run]:
    sizes = {"bins": contenders.BINS, "bound": contenders.BOUND} if name.startswith("nsf") else {}
    flow = getattr(flows, name)(dim, num_transforms=layers, hidden_dims=contenders.HIDDEN, **sizes)
    return tasks_of(flow, name != "iaf", (dim,), device, task)


def peer(library: str, name: str, dim: int, task: str) -> Callable[[int], Run]:
    def build(rows: int) -> Run:
        return PEERS[library](contenders.Case(name, torch.randn(rows, dim)))[task]

    return build


def grid(options: argparse.Namespace) -> Iterator[Case]:
    """Recipes x features x layers x tasks x rows."""
    for name in FLOWS:
        for dim in options.dims:
            for layers in options.layers:
                for task in TASKS:
                    if layers != 5 and (dim != 64 or task == "slow step"):
                        continue
                    build = ours(name, dim, layers, task, options.device)
                    line, peaks = line_through(build, SMALL, options.device)
                    for rows in options.rows:
                        fits = line.at(rows) < options.limit * 2**20 and task != "slow step"
                        if fits and rows not in peaks:
                            peaks[rows] = peak_of(build(rows), options.device)
                        known = peaks.get(rows, line.at(rows))
                        yield Case("pyro_flows", name, dim, layers, task, rows, known, rows in peaks, line.at(rows))


def slow_peers(options: argparse.Namespace) -> Iterator[Case]:
    """The slow direction's step of other libraries: D graphs of one pass each."""
    for library in PEERS:
        if importlib.util.find_spec(library) is None or options.device != "cpu":
            continue
        for name in ("maf", "nsf_ar"):
            for dim in options.dims:
                if dim > 64 and name == "nsf_ar":
                    continue  # gigabytes at 32 rows
                line, _ = line_through(peer(library, name, dim, "slow step"), SMALL_PEERS.get(dim, (8, 16)), "cpu")
                yield Case(library, name, dim, contenders.LAYERS, "slow step", 512, line.at(512), False)


def special(options: argparse.Namespace) -> Iterator[Case]:
    """Flows with ways of their own to take less: images computed again, and adjoint equations; and cheap layers."""
    shapes = [(1, 28, 28)] if options.quick else [(1, 28, 28), (3, 32, 32)]
    for shape in shapes:
        for recompute in (False, True):
            flow = flows.glow(shape, recompute=recompute)
            name = f"glow {'x'.join(map(str, shape))}{', recompute' if recompute else ''}"
            build = tasks_of(flow, True, shape, options.device, "step")
            line, _ = line_through(build, (16, 32), options.device)
            number = len(flow.transforms)
            yield Case("pyro_flows", name, torch.Size(shape).numel(), number, "step", 64, line.at(64), False)
    for recipe in (flows.cnf, flows.ffjord):
        for adjoint in (False, True):
            flow = recipe(8, hidden_dims=contenders.HIDDEN, solver="rk4", num_steps=20, adjoint=adjoint)
            name = f"{recipe.__name__}{', adjoint' if adjoint else ''}"
            line, _ = line_through(tasks_of(flow, True, (8,), options.device, "step"), (256, 512), options.device)
            yield Case("pyro_flows", name, 8, 1, "step", 4096, line.at(4096), False)
    for flow, name in ((flows.planar_flow(64), "planar_flow"), (flows.residual_flow(64), "residual_flow")):
        fast = name == "residual_flow"
        line, _ = line_through(tasks_of(flow, fast, (64,), options.device, "step"), (256, 512), options.device)
        number = 10 if name == "planar_flow" else 8
        yield Case("pyro_flows", name, 64, number, "step", 4096, line.at(4096), False)


def in_chunks(options: argparse.Namespace) -> Iterator[Case]:
    """A million draws of nsf, D = 32, at once and in chunks; and a training step at 32768 rows."""
    flow = flows.nsf(32, num_transforms=contenders.LAYERS, hidden_dims=contenders.HIDDEN).to(options.device)
    line, _ = line_through(tasks_of(flow, True, (32,), options.device, "draw"), (2048, 4096), options.device)
    yield Case("pyro_flows", "nsf", 32, contenders.LAYERS, "draw", options.draws, line.at(options.draws), False)
    line, _ = line_through(tasks_of(flow, True, (32,), options.device, "step"), (256, 512), options.device)
    rows = 32768 if not options.quick else 2048
    yield Case("pyro_flows", "nsf", 32, contenders.LAYERS, "step", rows, line.at(rows), False)
    x = torch.randn(rows, 32, device=options.device)
    peak = peak_of(lambda: flow.log_prob(x, chunk_size=1000).mean().backward(), options.device)
    yield Case("pyro_flows", "nsf, chunks", 32, contenders.LAYERS, "step", rows, peak, True)


def growth(draws: int, device: str) -> tuple[float, Case]:
    """How much a fresh process grows by drawing in chunks, in bytes; and the case."""
    code = f"import memory; memory.grow({draws}, {device!r}, {torch.get_num_threads()})"
    answer = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    grown, peak = map(float, answer.stdout.split()[-2:])
    return grown, Case("pyro_flows", "nsf, chunks", 32, contenders.LAYERS, "draw", draws, peak, True)


def grow(draws: int, device: str, threads: int) -> None:
    """What :func:`growth` runs."""
    torch.set_num_threads(threads)
    flow = flows.nsf(32, num_transforms=contenders.LAYERS, hidden_dims=contenders.HIDDEN).to(device)
    peak_of(lambda: flow.sample((10,)), device)
    before = most_held()
    peak = peak_of(lambda: flow.sample((draws,), chunk_size=CHUNK), device)
    print(most_held() - before, peak)


def most_held() -> int:
    """The bytes that this process has held at most; by ``getrusage`` Linux counts its parent's in."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def megabytes(case: Case | None) -> str:
    if case is None:
        return "–"
    amount = case.peak / 2**20
    text = f"{amount:,.1f}" if amount < 10 else f"{amount:,.0f}"
    return text if case.run else f"≈ {text}"


def report(cases: list[Case], grown: tuple[float, Case], options: argparse.Namespace) -> str:
    found = {case[:6]: case for case in cases}
    worst = max((abs(case.line / case.peak - 1) for case in cases if case.run and not math.isnan(case.line)), default=0)
    dims, layers, rows = options.dims, options.layers, options.rows
    middle = 5 if 5 in layers else layers[0]

    def own(name: str, dim: int, depth: int, task: str, number: int) -> Case | None:
        return found.get(("pyro_flows", name, dim, depth, task, number))

    def per_number(name: str, dim: int, depth: int, task: str) -> str:
        low, high = own(name, dim, depth, task, rows[0]), own(name, dim, depth, task, rows[-1])
        if low is None or high is None:
            return "–"
        slope = (high.peak - low.peak) / (rows[-1] - rows[0]) / dim
        return f"{slope / (1 if task == 'score' else depth):,.0f}"

    def table(head: list[str], body: list[list[str]], words: int) -> list[str]:
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * words + "---:|" * (len(head) - words)]
        return ["", *lines, *("| " + " | ".join(row) + " |" for row in body)]

    lines = [
        "# Memory",
        "",
        f"Two hidden layers of 128, {contenders.BINS} bins, float32; torch {torch.__version__.split('+')[0]}, Python "
        f"{platform.python_version()}, {options.device}.",
        "MB (2²⁰ bytes): the peak of the tensors alive during one call, on top of parameters and data, with",
        "gradients of parameters; the same in every run. *Score* is without gradient, a *step* scores (iaf: draws),",
        "back-propagates; the *slow step* takes the other direction. Memory is a line in the number of rows, and",
        f"≈ was read off it: where both are known, they agree to {max(worst, 1e-3):.1%}.",
        "Reproduce with `python benchmarks/memory.py`.",
        "",
        "## Bytes for each number",
        "",
        "By row and feature for *score*, where layers follow one another in the same memory; by row, feature and layer",
        "for steps, whose graph holds all layers. Memory is about this × rows × D (× layers). Networks have 2 × 128",
        "hidden units a row whatever D is, so at small D these are the larger part.",
    ]
    head = ["flow", *(f"{task}, D = {dim}" for task in TASKS for dim in dims)]
    body = [[name, *(per_number(name, dim, middle, task) for task in TASKS for dim in dims)] for name in FLOWS]
    lines += table(head, body, 1)
    lines += ["", f"## MB by rows, {middle} layers"]
    head = ["flow", "D", *(f"{task}, {number:,}" for task in TASKS for number in rows)]
    body = [
        [n, str(d), *(megabytes(own(n, d, middle, task, number)) for task in TASKS for number in rows)]
        for n in FLOWS
        for d in dims
    ]
    lines += table(head, body, 2)
    at, dim = rows[min(1, len(rows) - 1)], 64 if 64 in dims else dims[0]
    lines += ["", f"## MB by layers, D = {dim}, {at:,} rows"]
    head = ["flow", *(f"{task}, {depth}" for task in TASKS[:2] for depth in layers)]
    body = [[n, *(megabytes(own(n, dim, depth, task, at)) for task in TASKS[:2] for depth in layers)] for n in FLOWS]
    lines += table(head, body, 1)
    peers = [case for case in cases if case.library != "pyro_flows"]
    if peers:
        names = sorted({case.library for case in peers}, reverse=True)
        lines += ["", "## MB of the slow step beside other libraries, 5 layers, 512 rows", ""]
        lines += ["They run the network once for each feature and keep all D graphs; here a unit is computed once."]
        body = [
            [n, str(d), megabytes(own(n, d, 5, "slow step", 512))]
            + [megabytes(found.get((library, n, d, 5, "slow step", 512))) for library in names]
            for n in ("maf", "nsf_ar")
            for d in dims
        ]
        lines += table(["flow", "D", "pyro_flows", *names], body, 2)
    others = [c for c in cases if c.flow not in FLOWS and "chunks" not in c.flow]
    lines += ["", "## MB of a training step of other flows", ""]
    lines += ["cnf and ffjord by 20 steps of rk4; glow with its defaults; `recompute` computes layers again."]
    lines += table(["flow", "D", "rows", "MB"], [[c.flow, str(c.dim), str(c.rows), megabytes(c)] for c in others], 1)
    chunks = sorted((c for c in cases if c.dim == 32 and 32 not in dims), key=lambda c: (c.task, c.flow))
    lines += ["", "## chunk_size", ""]
    lines += [f"nsf, D = 32, {contenders.LAYERS} layers; draws in chunks of {CHUNK:,}, a step in chunks of 1,000."]
    lines += table(["", "task", "rows", "MB"], [[c.flow, c.task, f"{c.rows:,}", megabytes(c)] for c in chunks], 2)
    both = f"{2 * options.draws * 32 * 4 / 2**20:,.0f} MB"
    lines += [
        "",
        f"A fresh process grows by {grown[0] / 2**20:,.0f} MB as it makes them; they and their noise are {both}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help="numbers of features")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="numbers of layers")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="numbers of rows")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--limit", type=float, default=100, help="MB up to which cases are run as they are")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="memory does not depend on them")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the report and the table")
    options = parser.parse_args()
    if options.quick:
        options.dims, options.layers, options.rows, options.draws = [8], [5], [512, 2048], 20_000
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases: list[Case] = []
    began = time.perf_counter()
    for part in (grid, slow_peers, special, in_chunks):
        for case in part(options):
            cases.append(case)
            print(
                f"{time.perf_counter() - began:5.0f} s  {'  '.join(map(str, case[:6]))}  {megabytes(case)}", flush=True
            )
    grown = growth(options.draws, options.device)
    cases.append(grown[-1])
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "memory.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Case._fields[:6], "bytes", "run"])
        writer.writerows([*case[:6], round(case.peak), case.run] for case in cases)
    (options.out / "memory.md").write_text(report(cases, grown, options))
    print(f"wrote {options.out / 'memory.md'} and {options.out / 'memory.csv'}")


if __name__ == "__main__":
    main()
