"""When are fixed-point passes faster than incremental evaluation?

    python benchmarks/fixed_point.py          # 3 minutes on one core
    python benchmarks/fixed_point.py --quick  # a smoke run

``maf`` and ``nsf_ar`` (5 layers, two hidden layers of 128) are trained on a synthetic table with dependent columns,
because untrained flows need only one pass.  The timed tasks use the slow direction: draws, and training steps with
draws.  Runs with ``fixed_point=False`` and ``True`` alternate.  Times are CPU seconds of one thread.  Passes are
counted for each of the five layers.  Writes ``docs/benchmarks/fixed_point.md``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows import Flow, flows
from pyro_flows.conditioners import MADE
from pyro_flows.transforms import Autoregressive

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


def table(rows: int, dim: int) -> Tensor:
    """Return a nonlinear random walk: each column depends on all previous columns."""
    walk = torch.randn(rows, dim).cumsum(1)
    return walk + 0.5 * torch.sin(3 * walk.roll(1, 1))


def set_fixed_point(flow: Flow, value: bool) -> None:
    for part in flow.modules():
        if isinstance(part, Autoregressive):
            part.fixed_point = value


def passes(flow: Flow, task: Callable[[], object]) -> list[int]:
    """Return the number of passes of each layer's network in a task."""
    counts = {net: 0 for net in flow.modules() if isinstance(net, MADE)}

    def count(net: torch.nn.Module, *_: object) -> None:
        counts[net] += 1  # type: ignore[index]

    hooks = [net.register_forward_hook(count) for net in counts]
    task()
    for hook in hooks:
        hook.remove()
    return list(counts.values())


def milliseconds(flow: Flow, task: Callable[[], object], seconds: float) -> dict[bool, float]:
    times: dict[bool, list[float]] = {False: [], True: []}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[True]) < 3:
        for value, found in times.items():
            set_fixed_point(flow, value)
            start = time.process_time()
            task()
            found.append(time.process_time() - start)
    return {value: 1e3 * statistics.median(found) for value, found in times.items()}


def introduction(ratios: dict[int, list[float]]) -> list[str]:
    """Return the text above the table, with the range of ratios for each number of rows."""
    one, many = (f"{min(found):.2f} to {max(found):.2f}" for found in ratios.values())
    return [
        "# Fixed points",
        "",
        "This page is for users of autoregressive flows who choose `fixed_point`. It times the slow direction of",
        "trained flows in two ways: feature by feature (incremental evaluation), and by passes over all features until",
        f"none changes (fixed point). The fixed point takes {one} times as long for 1 row, and {many} times",
        "as long for 512 rows. Reproduce with `python benchmarks/fixed_point.py`.",
        "",
        "Times are CPU milliseconds of one thread. *passes*: the smallest and the largest number over the five layers.",
        "*ratio*: fixed point divided by feature by feature.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128], help="numbers of features")
    parser.add_argument("--quick", action="store_true", help="a smoke run, which writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, epochs, seconds = (300, 2, 0.2) if options.quick else (4000, 30, 1.5)
    ratios: dict[int, list[float]] = {1: [], 512: []}
    lines = [
        "| flow | D | rows | task | passes | feature by feature, ms | fixed point, ms | ratio |",
        "|---|---:|---:|---|---|---:|---:|---:|",
    ]
    for dim in [8] if options.quick else options.dims:
        for name in ("maf", "nsf_ar"):
            torch.manual_seed(0)
            flow = getattr(flows, name)(dim, num_transforms=5, hidden_dims=(128, 128))
            pf.fit_density(flow, table(rows, dim), max_epochs=epochs, progress=False)
            for number in ratios:

                def draw(flow: Flow = flow, number: int = number) -> None:
                    with torch.no_grad():
                        flow().sample((number,))

                def step(flow: Flow = flow, number: int = number) -> None:
                    flow.zero_grad()
                    flow.rsample_and_log_prob((number,))[1].mean().backward()

                for label, task in (("draw", draw), ("step", step)):
                    set_fixed_point(flow, True)
                    counts = passes(flow, task)
                    times = milliseconds(flow, task, seconds)
                    cells = f"{times[False]:.1f} | {times[True]:.1f} | {times[True] / times[False]:.2f}"
                    spread = f"{min(counts)} to {max(counts)}"
                    lines.append(f"| {name} | {dim} | {number} | {label} | {spread} | {cells} |")
                    ratios[number].append(times[True] / times[False])
                    print(lines[-1], flush=True)
    if not options.quick:
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "fixed_point.md").write_text("\n".join([*introduction(ratios), *lines]) + "\n")


if __name__ == "__main__":
    main()
