"""The results of ``speed.py``: a CSV file with a row for each measurement, and the page ``speed.md``."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from speed_contenders import BINS, COMPILED, FLOOR, FLOWJAX, FLOWS, HIDDEN, LAYERS, OURS, TASKS
from speed_plots import LIBRARIES, Times, curves, plot, plot_scaling

Row = dict[str, object]
SETTING = "batch", "dtype", "threads", "device"
TITLES = {
    "main": "All flows",
    "float64": "Double precision",
    "batch 1": "One row",
    "batch 16384": "Many rows",
    "1 thread": "One thread",
    "wide": "Few and many features",
    "custom": "Settings of your own",
}
COLUMNS = "table", "flow", "dim", *SETTING, "task", "library", "version", "ms"


def append(rows: Iterable[Row], path: Path) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tables_of(rows: list[dict[str, str]]) -> dict[tuple[str, ...], Times]:
    """The times of each table and setting; what was measured twice counts as last measured."""
    tables: dict[tuple[str, ...], Times] = {}
    for row in rows:
        times = tables.setdefault((row["table"], *(row[c] for c in SETTING)), {})
        times.setdefault((row["flow"], int(row["dim"]), row["task"]), {})[row["library"]] = float(row["ms"])
    return tables


def report(out: Path) -> list[Path]:
    """Write the page and the plots that the CSV file has rows for."""
    rows = read(out / "speed.csv")
    tables = tables_of(rows)
    written = [out / "speed.md"]
    written[0].write_text(page(rows, tables))
    for (name, *_), times in tables.items():
        if name in ("main", "scaling"):
            path = out / {"main": "speed.png", "scaling": "speed_scaling.png"}[name]
            (plot if name == "main" else plot_scaling)(times, path)
            written.append(path)
    return written


# The page.


def page(rows: list[dict[str, str]], tables: dict[tuple[str, ...], Times]) -> str:
    versions = {row["library"]: row["version"] for row in rows if row["library"] != COMPILED}
    versions["torch"] = versions.pop(FLOOR, "")
    lines = [
        "# Speed",
        "",
        f"Medians in milliseconds; flows of {LAYERS} layers, hidden {' × '.join(map(str, HIDDEN))}, {BINS} bins. "
        + ", ".join(f"{name} {version}".strip() for name, version in sorted(versions.items()))
        + ". Reproduce with `python benchmarks/speed.py`, whose first lines say what the tasks are.",
        "",
        "Like is set beside like. **Parentheses are our time divided by theirs; below 1 we are faster:**",
        "",
        "* `pyro_flows`: our time without compiling.",
        "* `compiled`: our time after `flow.compile()`; in parentheses over flowjax's, which is compiled too.",
        "* `Pyro`, `zuko`, `nflows`: theirs, not compiled; in parentheses our time *without* compiling over theirs.",
        "* `flowjax (jit)`: theirs.",
        "* `floor`: the dense matrix products of our networks by torch and nothing else; in a step those of gradients "
        "too, in the slow direction those of one pass. Eager code of these networks cannot be much faster.",
        "",
        "A dash: the library lacks the flow, or its D passes would take minutes or not fit into memory. Our "
        "compiled slow steps are not measured; `flow.compile()` leaves the slow direction of `maf`, `iaf` and `nsf_ar` "
        "as it is, but for the last layer of `nsf_ar`. Our `nsf` and `nsf_ar` end with a spline of each feature that "
        "no peer has; its time is part of ours.",
        "",
        "Weights are the libraries' own initial ones. Each process may use as many cores as the table has threads.",
    ]
    mains = [key for key in tables if key[0] == "main"]
    others = [k for k in tables if k[0] not in ("main", "scaling") and not k[0].endswith("first call")]
    for key in mains + others:
        lines += ["", f"## {TITLES.get(key[0], key[0])}: {settings(key)}", ""]
        lines += comparison(tables[key])
    if mains:
        lines += ["", "![Times over D](speed.png)"]
    for key in tables:
        if key[0] == "scaling":
            lines += ["", "## How the slow direction grows", "", *scaling(tables[key], key)]
    firsts = [key for key in tables if key[0].endswith("first call")]
    if firsts:
        lines += ["", "## What compiling takes", "", *first_calls({key: tables[key] for key in firsts})]
    return "\n".join(lines) + "\n"


def settings(key: tuple[str, ...]) -> str:
    _, batch, dtype, threads, device = key
    where = f"{threads} thread{'s' if threads != '1' else ''}" if device == "cpu" else device
    return f"{dtype}, batch {batch}, {where}"


def comparison(times: Times) -> list[str]:
    """A row for each flow, D and task, a column for each library; D by D."""
    found = [name for name in LIBRARIES if any(name in cell for cell in times.values())]
    lines = []
    for dim in sorted({dim for _, dim, _ in times}):
        lines += ["", f"### D = {dim}", ""] if lines else [f"### D = {dim}", ""]
        lines.append("| flow | task | " + " | ".join("compiled" if n == COMPILED else n for n in found) + " |")
        lines.append("|---|---|" + "---:|" * len(found))
        for flow in FLOWS:
            for task in TASKS:
                if cells := times.get((flow, dim, task)):
                    lines.append(f"| {flow} | {task} | " + " | ".join(cell(cells, name) for name in found) + " |")
    return lines


def cell(times: dict[str, float], library: str) -> str:
    own = times.get(library)
    if own is None:
        return "–"
    if library in (OURS, FLOWJAX, FLOOR):
        return f"**{number(own)}**" if library == OURS else number(own)
    if library == COMPILED:
        ratio = f" ({own / times[FLOWJAX]:.2f})" if FLOWJAX in times else ""
        return f"**{number(own)}**{ratio}"
    return f"{number(own)} ({times[OURS] / own:.2f})" if OURS in times else number(own)


def number(ms: float) -> str:
    return f"{ms:.2f}" if ms < 1 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def exponent(points: dict[int, float]) -> str:
    """The slope of log time over log D, by least squares."""
    if len(points) < 2:
        return "–"
    return f"{np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0]:.2f}"


def scaling(times: Times, key: tuple[str, ...]) -> list[str]:
    dims = sorted({dim for _, dim, _ in times})
    lines = [
        f"Milliseconds; {settings(key)}, not compiled. One side of an autoregressive flow finds one feature after the "
        "other. Others run the whole network for each, D times the work for D features, and more as the network grows; "
        "here each unit is computed once. *Exponent*: p of the fit time ~ Dᵖ to all D of the row; *last*: from "
        "the largest D but one to the largest.",
        "",
        "| flow | task | library | " + " | ".join(f"D = {dim}" for dim in dims) + " | exponent | last |",
        "|---|---|---|" + "---:|" * (len(dims) + 2),
    ]
    for (flow, task, library), points in curves(times).items():
        cells = [number(points[dim]) if dim in points else "–" for dim in dims]
        last = exponent({dim: points[dim] for dim in list(points)[-2:]})
        own = (lambda text: f"**{text}**") if library == OURS else str
        lines.append(f"| {flow} | {task} | {library} | {' | '.join(cells)} | {own(exponent(points))} | {last} |")
    return [*lines, "", "![Times of the slow direction over D](speed_scaling.png)"]


def first_calls(tables: dict[tuple[str, ...], Times]) -> list[str]:
    lines = [
        "Seconds of the first call of each task, `flow.compile()` / flowjax, without caches and without a pool of "
        "compilers. Ours has a graph for each direction, with and without gradients, for batches of any size above 1; "
        "flowjax has one for each task and size. A task that has nothing left to compile takes no time.",
        "",
        "| settings | flow | D | " + " | ".join(TASKS) + " |",
        "|---|---|---:|" + "---:|" * len(TASKS),
    ]
    for key, times in tables.items():
        for dim in sorted({dim for _, dim, _ in times}):
            for flow in FLOWS:
                cells = [times.get((flow, dim, task), {}) for task in TASKS]
                if any(COMPILED in cell for cell in cells):
                    shown = [" / ".join(seconds(cell.get(name)) for name in (COMPILED, FLOWJAX)) for cell in cells]
                    lines.append(f"| {settings(key)} | {flow} | {dim} | {' | '.join(shown)} |")
    return lines


def seconds(ms: float | None) -> str:
    return "–" if ms is None else f"{ms / 1e3:.1f}"
