"""Results of ``speed.py``: a CSV file with a row per measurement, and the page ``speed.md``."""

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
    "custom": "Your settings",
}
COLUMNS = "table", "flow", "dim", *SETTING, "task", "library", "version", "ms"


def append(rows: Iterable[Row], path: Path) -> None:
    """Append rows to the CSV file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of the CSV file, or none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tables_of(rows: list[dict[str, str]]) -> dict[tuple[str, ...], Times]:
    """Return the times of each table and setting; the last of several measurements counts."""
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


def page(rows: list[dict[str, str]], tables: dict[tuple[str, ...], Times]) -> str:
    """Return the page of the results."""
    versions = {row["library"]: row["version"] for row in rows if row["library"] != COMPILED}
    versions["torch"] = versions.pop(FLOOR, "")
    lines = [
        "# Speed",
        "",
        "This page is for users who choose a library by its speed. It compares the times of our flows with those of "
        "the same flows in other libraries. " + wins(tables),
        "",
        f"Reproduce with `python benchmarks/speed.py`. Flows have {LAYERS} layers, hidden "
        f"{' × '.join(map(str, HIDDEN))}, {BINS} bins. Weights are the initial ones of each library. "
        + ", ".join(f"{name} {version}".strip() for name, version in sorted(versions.items()))
        + ".",
        "",
        "The tasks:",
        "",
        "* *log-prob*: score a batch, without gradients.",
        "* *step*: score a batch and back-propagate to the parameters.",
        "* *sample*: draw a batch, without gradients.",
        "* *slow step*: a training step in the other direction. It draws a batch, scores it and back-propagates; for "
        "`iaf` it scores a batch and back-propagates.",
        "",
        "The columns have medians in milliseconds. **Brackets are our time divided by theirs; below 1 we are faster:**",
        "",
        "* `pyro_flows`: our time without compiling.",
        "* `compiled`: our time after `flow.compile()`. The bracket compares it with flowjax, which is compiled too.",
        "* `Pyro`, `zuko`, `nflows`: their times, not compiled. The bracket has our time *without* compiling.",
        "* `flowjax (jit)`: its time.",
        "* `floor`: the dense matrix products of our networks in torch and nothing else. A step includes the "
        "products of the gradients. The slow direction counts as one pass. Eager code of these networks cannot be "
        "much faster.",
        "",
        "A dash: the library lacks the flow, or its D passes would take minutes or exceed the memory. Our compiled "
        "slow steps are not measured. Each process runs on as many cores as the table has threads.",
    ]
    mains = [key for key in tables if key[0] == "main"]
    others = [k for k in tables if k[0] not in ("main", "scaling") and not k[0].endswith("first call")]
    for key in mains + others:
        lines += ["", f"## {TITLES.get(key[0], key[0])}: {settings(key)}", ""]
        lines += comparison(tables[key])
    if mains:
        lines += ["", "![Times over D](speed.png)", "", "*Milliseconds over D. Red lines are ours; lower is faster.*"]
    for key in tables:
        if key[0] == "scaling":
            lines += ["", "## Growth of the slow direction", "", *scaling(tables[key], key)]
    firsts = [key for key in tables if key[0].endswith("first call")]
    if firsts:
        lines += ["", "## Compile times", "", *first_calls({key: tables[key] for key in firsts})]
    return "\n".join([*lines, "", *LIMITS]) + "\n"


LIMITS = (
    "## Limits",
    "",
    "* `flow.compile()` does not compile the slow direction of `maf`, `iaf` and `nsf_ar`, except for the last layer of "
    "`nsf_ar`.",
    "* Our `nsf` and `nsf_ar` end with an elementwise spline that no peer has. Its time is part of ours.",
)


def wins(tables: dict[tuple[str, ...], Times]) -> str:
    """Return a sentence with the number of comparisons that our eager flows win; empty without main tables."""
    cells = [cell for key, times in tables.items() if key[0] == "main" for cell in times.values() if OURS in cell]
    pairs = [(cell[OURS], cell[name]) for cell in cells for name in ("Pyro", "zuko", "nflows") if name in cell]
    faster = sum(own < other for own, other in pairs)
    text = f"In the main tables ours is faster than Pyro, zuko or nflows in {faster} of {len(pairs)} comparisons."
    return text if pairs else ""


def settings(key: tuple[str, ...]) -> str:
    """Return the settings of a table in words."""
    _, batch, dtype, threads, device = key
    where = f"{threads} thread{'s' if threads != '1' else ''}" if device == "cpu" else device
    return f"{dtype}, batch {batch}, {where}"


def comparison(times: Times) -> list[str]:
    """Return a table per D, with a row per flow and task and a column per library."""
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
    """Return the time of a library with its ratio."""
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
    """Return milliseconds as text."""
    return f"{ms:.2f}" if ms < 1 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def exponent(points: dict[int, float]) -> str:
    """Return the slope of log time over log D, by least squares."""
    if len(points) < 2:
        return "–"
    return f"{np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0]:.2f}"


def scaling(times: Times, key: tuple[str, ...]) -> list[str]:
    """Return the section on the growth of the slow direction with D."""
    dims = sorted({dim for _, dim, _ in times})
    lines = [
        f"Milliseconds; {settings(key)}, not compiled. One direction of an autoregressive flow computes one feature "
        "after the other. Other libraries run the whole network D times for D features. "
        "Our flows compute each unit once. *Exponent*: p of a fit of time ~ Dᵖ to all D of the row. *Last*: p between "
        "the two largest D.",
        "",
        "| flow | task | library | " + " | ".join(f"D = {dim}" for dim in dims) + " | exponent | last |",
        "|---|---|---|" + "---:|" * (len(dims) + 2),
    ]
    for (flow, task, library), points in curves(times).items():
        cells = [number(points[dim]) if dim in points else "–" for dim in dims]
        last = exponent({dim: points[dim] for dim in list(points)[-2:]})
        own = (lambda text: f"**{text}**") if library == OURS else str
        lines.append(f"| {flow} | {task} | {library} | {' | '.join(cells)} | {own(exponent(points))} | {last} |")
    caption = "*Milliseconds over D, against dotted lines of slope 1 and 2. Flatter lines grow more slowly.*"
    return [*lines, "", "![Times of the slow direction over D](speed_scaling.png)", "", caption]


def first_calls(tables: dict[tuple[str, ...], Times]) -> list[str]:
    """Return the section on the seconds of first calls."""
    lines = [
        "Seconds of the first call of each task, `flow.compile()` / flowjax, without caches, on one compiler thread. "
        "Ours has a graph per direction, with and without gradients, for batches of any size above 1. flowjax has one "
        "per task and batch size. A task takes no time if nothing is left to compile.",
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
    """Return milliseconds as seconds, or a dash."""
    return "–" if ms is None else f"{ms / 1e3:.1f}"
