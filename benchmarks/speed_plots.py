"""Plots of ``speed.py``: a panel per flow and task, and the growth of the slow direction with D."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from speed_contenders import COMPILED, FLOOR, FLOWJAX, FLOWS, OURS, TASKS

LIBRARIES = [OURS, COMPILED, "Pyro", "zuko", "nflows", FLOWJAX, FLOOR]
COLOURS = dict(zip(LIBRARIES, ("C3", "C3", "C0", "C2", "C1", "C4", "0.5"), strict=True))
Times = dict[tuple[str, int, str], dict[str, float]]  # (flow, D, task) -> library -> ms


def curves(times: Times) -> dict[tuple[str, str, str], dict[int, float]]:
    """Return the times by D, for each flow, task and library."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for (flow, dim, task), cells in sorted(times.items(), key=lambda item: item[0][1]):
        for library, ms in cells.items():
            found.setdefault((flow, task, library), {})[dim] = ms
    return dict(sorted(found.items(), key=lambda item: (TASKS.index(item[0][1]) == 3, FLOWS.index(item[0][0]))))


def figure_of(rows: int, columns: int, width: float, height: float) -> tuple:
    """Return a figure with a grid of axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), sharex=True, squeeze=False)


def log_axes(axis: object, dims: list[int]) -> None:
    """Set logarithmic axes with readable ticks."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(xscale="log", yscale="log")
    axis.set_xticks(dims, [str(d) for d in dims])
    low, high = axis.get_ylim()
    decades = np.log10(high / low)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)


def style(library: str) -> dict[str, object]:
    """Return the line style of a library."""
    mine = library in (OURS, COMPILED)
    dashes = {COMPILED: (0, (3, 1.5)), FLOOR: "dotted"}.get(library, "solid")
    return {"color": COLOURS[library], "lw": 2.2 if mine else 1.2, "zorder": 3 if mine else 2, "linestyle": dashes}


def plot(times: Times, path: Path) -> None:
    """Plot the times over D, a panel per flow and task."""
    dims = sorted({dim for _, dim, _ in times})
    names = [name for name in FLOWS if any(key[0] == name for key in times)]
    found = curves(times)
    figure, axes = figure_of(len(TASKS), len(names), max(2.7 * len(names) + 0.6, 11), 9)
    for row, task in zip(axes, TASKS, strict=True):
        for axis, name in zip(row, names, strict=True):
            for library in LIBRARIES:
                points = found.get((name, task, library), {})
                axis.plot(list(points), list(points.values()), marker="o", ms=3, label=library, **style(library))
            if any((name, dim, task) in times for dim in dims):
                log_axes(axis, dims)
        row[0].set_ylabel(f"{task}  [ms]")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name)
    for axis in axes[-1]:
        axis.set_xlabel("D")
    finish(figure, axes[0, 0], path)


def plot_scaling(times: Times, path: Path) -> None:
    """Plot the times of the slow direction over D."""
    dims = sorted({dim for _, dim, _ in times})
    figure, axes = figure_of(1, 2, 9, 4.6)
    sides: list[tuple[str, Callable[[str], bool]]] = [
        ("draw (iaf: score), no gradient", lambda task: task != "slow step"),
        ("slow step", lambda task: task == "slow step"),
    ]
    for axis, (title, belongs) in zip(axes[0], sides, strict=True):
        for (flow, task, library), points in curves(times).items():
            if belongs(task):
                look = {"color": f"C{FLOWS.index(flow)}", "linestyle": "solid" if library == OURS else "dashed"}
                axis.plot(list(points), list(points.values()), marker="o", ms=3, label=f"{flow}, {library}", **look)
        low = min(ms for (_, task, _), points in curves(times).items() if belongs(task) for ms in points.values())
        for power in (1, 2):
            guide = [low / 1.5 * (dim / dims[0]) ** power for dim in dims]
            axis.plot(dims, guide, color="0.4", lw=1, linestyle="dotted", label="_")
            axis.annotate(
                f"~ D{'²' if power == 2 else ''}",
                (dims[-1], guide[-1]),
                (-4, 4),
                textcoords="offset points",
                ha="right",
            )
        log_axes(axis, dims)
        axis.set(title=title, xlabel="D")
    axes[0, 0].set_ylabel("ms")
    finish(figure, axes[0, 0], path, columns=3, top=0.89)


def finish(figure: object, axis: object, path: Path, columns: int = 7, top: float = 0.95) -> None:
    """Add the legend and save the figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=columns, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(path, dpi=130)
