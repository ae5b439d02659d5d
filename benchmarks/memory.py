"""How much memory do our flows and those of zuko and nflows need?

    python benchmarks/memory.py            # all of it, a few minutes of one core
    python benchmarks/memory.py --quick    # small flows, few rows: a smoke run

Flows have two hidden layers of 128 and 8 bins, in float32.  There are four tasks, each a single call:

    score      score a batch, without gradients
    step       sample or score a batch, in the fast direction, and back-propagate to the parameters
    slow step  the same in the slow direction
    draw       sample a batch, without gradients

The benchmark reports the peak memory of the tensors that are alive at the same time.  Gradients of parameters count,
parameters and data do not.  It follows each operation of the forward and the backward pass, and the end of each storage
that it allocates.  The result is equal in every run and for every allocator, so one process measures all cases.

Temporary memory inside a kernel is not counted.  torch's profiler counts it, and agreed to 3 % on six cases, but needs
minutes for the slow direction.  For a million draws, a fresh process also measures the growth of the whole process.  On
a GPU (``--device cuda``) the measure is ``torch.cuda.max_memory_allocated``.

The peak is linear in the number of rows.  Each case is run at two small numbers of rows, and at all numbers that fit
into ``--limit``.  Other values are extrapolated.  The page states the largest error of the extrapolation.

Writes ``docs/benchmarks/memory.md`` and ``docs/benchmarks/memory.csv``.
"""

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
from pyro_flows.transforms import Solver

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
FLOWS, DIMS, LAYERS, ROWS = contenders.FLOWS, [8, 64, 256], [2, 5, 10], [512, 4096, 32768]
TASKS = ["score", "step", "slow step"]
SMALL = 256, 512  # from here on, activations need more memory than the gradients of parameters
SMALL_PEERS = {8: (32, 64), 64: (32, 64), 256: (8, 16)}
PEERS = {"zuko": speed_peers.zuko, "nflows": speed_peers.nflows}
DRAWS, CHUNK = 1_000_000, 10_000
Run = Callable[[], object]


class Case(NamedTuple):
    """Peak memory in bytes at a number of rows; extrapolated if ``run`` is False."""

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
    """Mode that adds up the bytes of all live storages that were allocated inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}  # bytes by storage; earlier storages count as zero
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
    """Return the peak memory of a call in bytes, minus the memory before it."""
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
    """Linear model of the bytes of a call by the number of rows."""

    start: float
    slope: float

    def at(self, rows: int) -> float:
        return self.start + self.slope * rows


def line_through(build: Callable[[int], Run], rows: tuple[int, int], device: str) -> tuple[Line, dict[int, int]]:
    peaks = {number: peak_of(build(number), device) for number in rows}
    slope = (peaks[rows[1]] - peaks[rows[0]]) / (rows[1] - rows[0])
    return Line(peaks[rows[0]] - slope * rows[0], slope), peaks


def tasks_of(flow: Flow, scores_fast: bool, shape: tuple[int, ...], device: str, task: str) -> Callable[[int], Run]:
    """Return a function that builds a call of the task for a number of rows."""
    flow = flow.to(device)

    def build(rows: int) -> Run:
        x = torch.randn(rows, *shape, device=device)
        run = contenders.contender(
            contenders.Case("maf" if scores_fast else "iaf", x),  # only the direction of the flow matters here
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
    """Yield the cases of recipes × features × layers × tasks × rows."""
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
    """Yield the slow steps of other libraries, which keep D graphs of one pass each."""
    for library in PEERS:
        if importlib.util.find_spec(library) is None or options.device != "cpu":
            continue
        for name in ("maf", "nsf_ar"):
            for dim in options.dims:
                if dim > 64 and name == "nsf_ar":
                    continue  # it needs gigabytes at 32 rows
                line, _ = line_through(peer(library, name, dim, "slow step"), SMALL_PEERS.get(dim, (8, 16)), "cpu")
                yield Case(library, name, dim, contenders.LAYERS, "slow step", 512, line.at(512), False)


def special(options: argparse.Namespace) -> Iterator[Case]:
    """Yield steps of flows with memory-saving options (``recompute``, ``adjoint``), and of cheap layers."""
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
            flow = recipe(8, hidden_dims=contenders.HIDDEN, solver=Solver("rk4", num_steps=20, adjoint=adjoint))
            name = f"{recipe.__name__}{', adjoint' if adjoint else ''}"
            line, _ = line_through(tasks_of(flow, True, (8,), options.device, "step"), (256, 512), options.device)
            yield Case("pyro_flows", name, 8, 1, "step", 4096, line.at(4096), False)
    for flow, name in ((flows.planar_flow(64), "planar_flow"), (flows.residual_flow(64), "residual_flow")):
        fast = name == "residual_flow"
        line, _ = line_through(tasks_of(flow, fast, (64,), options.device, "step"), (256, 512), options.device)
        number = 10 if name == "planar_flow" else 8
        yield Case("pyro_flows", name, 64, number, "step", 4096, line.at(4096), False)


def in_chunks(options: argparse.Namespace) -> Iterator[Case]:
    """Yield a million draws of nsf with D = 32, and a training step at 32768 rows, whole and in chunks."""
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
    """Return the growth in bytes of a fresh process that samples in chunks, and the case."""
    code = f"import memory; memory.grow({draws}, {device!r}, {torch.get_num_threads()})"
    answer = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    grown, peak = map(float, answer.stdout.split()[-2:])
    return grown, Case("pyro_flows", "nsf, chunks", 32, contenders.LAYERS, "draw", draws, peak, True)


def grow(draws: int, device: str, threads: int) -> None:
    """Run and print the measurement of :func:`growth`."""
    torch.set_num_threads(threads)
    flow = flows.nsf(32, num_transforms=contenders.LAYERS, hidden_dims=contenders.HIDDEN).to(device)
    peak_of(lambda: flow.sample((10,)), device)
    before = most_held()
    peak = peak_of(lambda: flow.sample((draws,), chunk_size=CHUNK), device)
    print(most_held() - before, peak)


def most_held() -> int:
    """Return the peak memory of this process in bytes.  On Linux, ``getrusage`` would include the parent's peak."""
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


def summary(found: dict[tuple[str, str, int, int, str, int], Case]) -> str:
    """Return the comparison with other libraries in a sentence, or nothing without them."""
    libraries = ("pyro_flows", "zuko", "nflows")
    peaks = [found.get((library, "maf", 64, 5, "slow step", 512)) for library in libraries]
    if None in peaks:
        return ""
    ours, zuko, nflows = map(megabytes, peaks)
    return (
        "With 64 features and 512 rows, a training step of `maf` in the slow direction needs "
        f"{ours} MB here, {zuko} MB in zuko and {nflows} MB in nflows. "
    )


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
        "This page is for users who plan the memory of a flow. It compares the peak memory of a call of our flows with",
        f"zuko and nflows. {summary(found)}Reproduce with `python benchmarks/memory.py`.",
        "",
        f"Flows have two hidden layers of 128 and {contenders.BINS} bins, in float32; torch "
        f"{torch.__version__.split('+')[0]}, Python {platform.python_version()}, {options.device}.",
        "One MB is 2²⁰ bytes. The peak counts the tensors that are alive during one call, with the gradients of",
        "parameters, without parameters and data. It is equal in every run.",
        "",
        "*score* has no gradients. *step* scores (iaf: samples) and back-propagates. *slow step* uses the other",
        "direction. Memory is linear in the number of rows, and values with ≈ are extrapolated. Where both values are",
        f"known, they agree to {max(worst, 1e-3):.1%}.",
        "",
        "## Bytes per number",
        "",
        "For *score* the unit is bytes per row and feature, because all layers use the same memory. For steps it is",
        "bytes per row, feature and layer, because the graph keeps all layers. The memory of a call is about this",
        "value × rows × D, and × layers for steps. Networks have 2 × 128 hidden units per row for every D, so these",
        "dominate at small D.",
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
        lines += ["", "## MB of the slow step, compared with other libraries, 5 layers, 512 rows", ""]
        lines += [
            "The others run the network once per feature, and keep all D graphs. pyro_flows computes each unit once."
        ]
        body = [
            [n, str(d), megabytes(own(n, d, 5, "slow step", 512))]
            + [megabytes(found.get((library, n, d, 5, "slow step", 512))) for library in names]
            for n in ("maf", "nsf_ar")
            for d in dims
        ]
        lines += table(["flow", "D", "pyro_flows", *names], body, 2)
    others = [c for c in cases if c.flow not in FLOWS and "chunks" not in c.flow]
    lines += ["", "## MB of a training step of other flows", ""]
    lines += ["cnf and ffjord take 20 steps of rk4. glow has its defaults. `recompute` computes activations again."]
    lines += table(["flow", "D", "rows", "MB"], [[c.flow, str(c.dim), str(c.rows), megabytes(c)] for c in others], 1)
    chunks = sorted((c for c in cases if c.dim == 32 and 32 not in dims), key=lambda c: (c.task, c.flow))
    lines += ["", "## chunk_size", ""]
    lines += [
        f"nsf, D = 32, {contenders.LAYERS} layers. Draws have chunks of {CHUNK:,}, and steps have chunks of 1,000."
    ]
    lines += table(["flow", "task", "rows", "MB"], [[c.flow, c.task, f"{c.rows:,}", megabytes(c)] for c in chunks], 2)
    both = f"{2 * options.draws * 32 * 4 / 2**20:,.0f} MB"
    lines += [
        "",
        f"A fresh process that makes these draws grows by {grown[0] / 2**20:,.0f} MB. "
        f"Draws and noise are {both} of it.",
        "",
        "## Limits",
        "",
        "The temporary memory inside a kernel is not counted. torch's profiler counts it, and agreed to 3 % on six "
        "cases.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help="numbers of features")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="numbers of layers")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="numbers of rows")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument(
        "--limit", type=float, default=100, help="largest MB of cases that are run; larger ones are extrapolated"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="number of threads; memory does not depend on it")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page and the CSV file")
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
