"""Pairs of quantities, of draws beside a reference: a table against the samples of a flow, a guide against NUTS."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

from ..arguments import check_integers
from .columns import Draws, beside, shortened
from .panels import Picture, blank

POINTS = 3000  # of each table, in each panel, at most
BINS = 50  # at most
FAR = 5  # interquartile ranges beyond the quartiles, where axes end


def pairs(
    draws: Draws,
    reference: Draws | None = None,
    *,
    names: Sequence[str] | None = None,
    labels: tuple[str, str] = ("draws", "reference"),
    most: int = 6,
) -> Picture:
    """Picture pairs of quantities, the draws below the diagonal and the reference above it; on it, each on its own.

    Axes span the middle of the draws, 99 of 100, and a margin, and no more than five interquartile ranges beyond
    the quartiles; what lies farther out is not seen, nor what is not finite.  Of both as many points are shown.

    Args:
        draws: A table ``(N, D)``, or draws of sites, ``(N, *shape)`` each, as ``guide.sample(N)`` gives them.
        reference: The same of what they are compared with; of sites, those of the same names.
        names: Those of a table's columns.
        labels: What the draws and the reference are called.
        most: How many quantities are shown: the first ones.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If there are no draws, or none of finite numbers, sites differ in their number, names in that of the
            columns, the reference has none of the quantities, or ``most`` is below 1.

    Example::

        >>> import torch
        >>> picture = pairs(torch.randn(500, 3), torch.randn(400, 3), names=["a", "b", "c"], labels=("data", "flow"))
        >>> print(picture.get_suptitle())
        data (filled) and flow (line); in pairs, data below the
        diagonal and flow above it
    """
    from matplotlib.ticker import MaxNLocator

    check_integers("pairs", most=most)
    columns, others = beside("pairs", draws, reference, names)
    common = [name for name in columns if name in others or not others]
    shown = common[:most]
    width = len(shown)
    tables = [np.stack([table[name] for name in shown], -1) for table in (columns, others) if table]
    tables = [x[np.isfinite(x).all(1)] for x in tables]
    if not len(tables[0]):
        raise ValueError(f"pairs: draws must be finite, and in none are all of {shown}.")
    limits = [_limits(column) for column in tables[0].T]
    points = min(POINTS, *map(len, tables))
    style = {"s": 3, "alpha": min(1.0, 0.25 * (POINTS / max(1, points)) ** 0.5), "lw": 0, "rasterized": True}
    bins = round(min(BINS, max(10, 2 * len(tables[0]) ** (1 / 3))))
    inches = max(4.2, 1.9 * width)
    picture = blank(inches, inches)
    axes = picture.subplots(width, width, squeeze=False)
    for row, column in np.ndindex(width, width):
        axis, above = axes[row, column], row < column
        if above and len(tables) == 1:
            axis.set_axis_off()
            continue
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(3))
            side.set_major_formatter(_tick)
        if row == column:
            low, high = limits[row]
            edges = np.linspace(low, high, bins + 1)
            counts = [np.histogram(x[:, row], edges)[0] / max(1, len(x)) for x in tables]
            axis.stairs(counts[0], edges, fill=True, color="C0", alpha=0.35)
            for count in counts[1:]:
                axis.stairs(count, edges, color="C1", lw=1.4)
            axis.set(ylim=(0, 1.1 * max(float(count.max()) for count in counts)), yticks=[])
        else:
            dots = tables[above][:points]
            axis.scatter(dots[:, column], dots[:, row], color=f"C{int(above)}", **style)
            axis.set_ylim(*limits[row])
        axis.set_xlim(*limits[column])
        axis.tick_params(labelsize=8, labelbottom=row == width - 1, labelleft=column == 0)
        if row == 0 and column == width - 1 > 0:  # as the first panel of its row has no ticks
            axis.tick_params(right=True, labelright=True)
        if row == width - 1:
            axis.set_xlabel(shortened(shown[column]))
        if column == 0 and width > 1:
            axis.set_ylabel(shortened(shown[row]))
    picture.align_labels()
    title, other = labels
    if len(tables) == 2:
        words = f"; in pairs, {title} below the diagonal and {other} above it" if width > 1 else ""
        title = f"{title} (filled) and {other} (line){words}"
    title += f" (the first {width} of {len(common)} columns)" if width < len(common) else ""
    picture.suptitle(textwrap.fill(title, round(11 * inches)), fontsize=11)
    return picture


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
