"""A picture of two tables side by side, by columns and by pairs of columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MOST = 6  # columns
POINTS = 3000  # of each table, in each panel, at most
BINS = 50  # at most
FAR = 5  # interquartile ranges beyond the quartiles, where axes end


def plot_pairs(data: np.ndarray, samples: np.ndarray, names: Sequence[str], most: int = MOST) -> Any:
    """Data beside the samples of a flow: pairs of columns of the data below the diagonal, of the samples above it.

    Axes span the middle of the data, 99 of 100 rows, and a margin, and no more than five interquartile ranges beyond
    the quartiles; what lies farther out is not seen.  As many samples are shown as rows.

    Args:
        data: ``(N, D)``.
        samples: ``(M, D)``.
        names: Those of the columns.
        most: How many columns are shown: the first ones.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width = min(most, data.shape[1])
    tables = [x[:, :width][np.isfinite(x[:, :width]).all(1)].astype(float) for x in (data, samples)]
    limits = [_limits(column) for column in tables[0].T]
    points = min(POINTS, *map(len, tables))
    bins = round(min(BINS, max(10, 2 * len(tables[0]) ** (1 / 3))))
    side = max(4.2, 1.9 * width)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots(width, width, squeeze=False)
    for row, column in np.ndindex(width, width):
        axis = axes[row, column]
        if row == column:
            low, high = limits[row]
            edges = np.linspace(low, high, bins + 1)
            counts = [np.histogram(x[:, row], edges)[0] / max(1, len(x)) for x in tables]
            axis.stairs(counts[0], edges, fill=True, color="C0", alpha=0.35)
            axis.stairs(counts[1], edges, color="C1", lw=1.4)
            axis.set_ylim(0, 1.1 * max(float(count.max()) for count in counts))
            axis.set_yticks([])
        else:
            above = row < column
            shown = tables[above][:points]
            style = {"s": 3, "alpha": min(1.0, 0.25 * (POINTS / max(1, points)) ** 0.5), "lw": 0, "rasterized": True}
            axis.scatter(shown[:, column], shown[:, row], color=f"C{int(above)}", **style)
            axis.set_ylim(*limits[row])
            axis.yaxis.set_major_locator(MaxNLocator(3))
            axis.yaxis.set_major_formatter(_tick)
        axis.set_xlim(*limits[column])
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.xaxis.set_major_formatter(_tick)
        first_row = row == 0 and column == width - 1 > 0  # whose own first panel has no ticks
        axis.tick_params(
            labelsize=8, labelbottom=row == width - 1, labelleft=column == 0, right=first_row, labelright=first_row
        )
        if row == width - 1:
            axis.set_xlabel(_short(names[column]))
        if column == 0 and width > 1:
            axis.set_ylabel(_short(names[row]))
    figure.align_labels()
    kept = f" (the first {width} of {data.shape[1]} columns)" if width < data.shape[1] else ""
    title = "Data (filled) and samples (line)"
    title += "" if width == 1 else "; in pairs, data below the diagonal and samples above it"
    figure.suptitle(title + kept, fontsize=11)
    return figure


def _limits(x: np.ndarray) -> tuple[float, float]:
    """Where the middle of a column lies, with a margin."""
    low, first, third, high = np.quantile(x, [0.005, 0.25, 0.75, 0.995])
    if low == high:
        low, high = x.min(), x.max()
    elif reach := FAR * (third - first):
        low, high = max(low, first - reach), min(high, third + reach)
    margin = 0.08 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _tick(value: float, _: int) -> str:
    """A number whole: powers of ten of a whole axis would lie between the panels."""
    return f"{value:.6g}".replace("e+0", "e").replace("e-0", "e-").replace("-", "−")


def _short(name: str, most: int = 20) -> str:
    short = name if len(name) <= most else f"{name[: most // 2]}…{name[most // 2 + 1 - most :]}"
    return short.replace("$", r"\$")  # which would begin a formula
