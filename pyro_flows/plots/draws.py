"""Draws against a reference: marginal densities, and pairs of quantities."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..arviz_versions import kde
from ..programs.sites import labels_of
from .panels import Picture, panels, shortened

MARGINALS, COLUMNS = 12, 4  # the most marginals, and those in a row
PAIRED = 6  # the most quantities in pairs
POINTS, BINS = 3000, 50  # the most points of a table in a panel, and the most bins

Draws: TypeAlias = Mapping[str, Tensor | np.ndarray] | Tensor | np.ndarray
Names: TypeAlias = Sequence[str] | None
Labels: TypeAlias = tuple[str, str]


def marginals(draws: Draws, reference: Draws | None = None, *, labels: Labels = ("guide", "reference")) -> Picture:
    """Plot the marginal density of each quantity, at most the first twelve, by ArviZ's kernel density estimate.

    Draws that are not finite are left out.  If nearly all draws are equal, a line replaces the density.

    Args:
        draws: Draws of sites, ``(N, *shape)`` each, as ``guide.sample(N)`` returns them; or a table ``(N, D)``.
        reference: Draws to compare with, such as those of NUTS, ``mcmc.get_samples()``; sites that ``draws`` lacks are
            left out.
        labels: The names of the draws and of the reference.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If there are no draws, sites differ in their number of draws, or the reference shares no quantity
            with the draws.

    Example::

        >>> import torch
        >>> draws = {"mu": torch.randn(500), "theta": torch.randn(500, 2)}
        >>> picture = marginals(draws, {"mu": torch.randn(300)})
        >>> [axis.get_title() for axis in picture.axes]
        ['mu', 'theta[0]', 'theta[1]']
    """
    columns, others = _compared("marginals", draws, reference)
    shown = list(columns)[:MARGINALS]
    width = min(COLUMNS, len(shown))
    picture, axes = panels(max(4.5, 2.3 * width), 1.1 + 1.7 * math.ceil(len(shown) / width), len(shown), width)
    for axis, name in zip(axes, shown, strict=True):
        samples = [table[name][np.isfinite(table[name])] for table in (columns, others) if name in table]
        ends = [np.quantile(x, [0.003, 0.997]) for x in samples if len(x)] or [(0.0, 1.0)]
        for place, x in enumerate(samples):
            grid, density = density_of(x, np.min(ends), np.max(ends))
            style = {"color": "C1", "lw": 1.6} if place else {"color": "C0", "alpha": 0.4, "lw": 0}
            (axis.plot if place else axis.fill_between)(grid, density, label=labels[place], **style)
            if len(x) and not density.any():
                axis.axvline(np.median(x), color=f"C{place}", lw=1.6)
        axis.set(ylim=(0, None), yticks=[])
        axis.spines["left"].set_visible(False)
        axis.set_title(shortened(name), fontsize=10)
        axis.tick_params(labelsize=8)
    handles, names = max((axis.get_legend_handles_labels() for axis in axes), key=lambda found: len(found[1]))
    if len(names) > 1:
        picture.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9)
    if len(columns) > len(shown):
        picture.supxlabel(f"the first {len(shown)} of {len(columns)} quantities", fontsize=9)
    return picture


def density_of(values: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a grid between two ends, and the density of values ``(N,)`` on it, 0 if they are equal or too few."""
    inside = values[(low <= values) & (values <= high)]
    if len(inside) < 2 or inside.min() == inside.max():
        return np.array([low, high]), np.zeros(2)
    grid, density = kde(inside)
    return grid, density * len(inside) / len(values)


def pairs(
    draws: Draws,
    reference: Draws | None = None,
    *,
    names: Names = None,
    labels: Labels = ("draws", "reference"),
) -> Picture:
    """Plot pairs of quantities: the draws below the diagonal, the reference above it, and histograms on it.

    The first six quantities are shown.
    An axis spans the central 99 % of the draws and a margin, and at most five interquartile ranges beyond the
    quartiles.  Points farther out, or not finite, are not shown.  Draws and reference have equally many points.

    Args:
        draws: A table ``(N, D)``, or draws of sites, ``(N, *shape)`` each, as ``guide.sample(N)`` returns them.
        reference: A table or draws to compare with; only sites of the same names are shown.
        names: The names of the columns of a table.
        labels: The names of the draws and of the reference.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If there are no finite draws, sites differ in their number of draws, or ``names`` are not one per
            column.  Also if the reference shares no quantity with the draws.

    Example::

        >>> import torch
        >>> picture = pairs(torch.randn(500, 3), torch.randn(400, 3), names=["a", "b", "c"], labels=("data", "flow"))
        >>> print(picture.get_suptitle())
        data (filled) and flow (line); in pairs, data below the
        diagonal and flow above it
    """
    columns, others = _compared("pairs", draws, reference, names)
    common = [name for name in columns if name in others or not others]
    shown = common[:PAIRED]
    width = len(shown)
    tables = [np.stack([table[name] for name in shown], -1) for table in (columns, others) if table]
    tables = [x[np.isfinite(x).all(1)] for x in tables]
    if not len(tables[0]):
        raise ValueError(f"pairs: draws must be finite, and in none are all of {shown}.")
    inches = max(4.2, 1.9 * width)
    picture, axes = panels(inches, inches, width**2, width)
    _draw_pairs(np.reshape(axes, (width, width)), tables, [shortened(name) for name in shown])
    picture.align_labels()
    title, other = labels
    if len(tables) == 2:
        words = f"; in pairs, {title} below the diagonal and {other} above it" if width > 1 else ""
        title = f"{title} (filled) and {other} (line){words}"
    title += f" (the first {width} of {len(common)} columns)" if width < len(common) else ""
    picture.suptitle(textwrap.fill(title, round(11 * inches)), fontsize=11)
    return picture


def _draw_pairs(axes: np.ndarray, tables: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Draw the panels of all pairs of columns of one or two tables ``(N, D)``."""
    from matplotlib.ticker import MaxNLocator

    points = min(POINTS, *map(len, tables))
    style = {"s": 3, "alpha": min(1.0, 0.25 * (POINTS / max(1, points)) ** 0.5), "lw": 0, "rasterized": True}
    bins = round(min(BINS, max(10, 2 * len(tables[0]) ** (1 / 3))))
    limits = [_limits(column) for column in tables[0].T]
    for (row, column), axis in np.ndenumerate(axes):
        above = row < column
        if above and len(tables) == 1:
            axis.set_axis_off()
            continue
        axis.spines[["top", "right"]].set_visible(True)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(3))
            side.set_major_formatter(_tick)
        axis.set(xlim=limits[column], xlabel=names[column], ylim=limits[row])
        axis.tick_params(labelsize=8)
        if len(names) > 1:
            axis.set_ylabel(names[row])
        axis.label_outer()
        if row == column:
            low, high = limits[row]
            edges = np.linspace(low, high, bins + 1)
            filled, *lines = [np.histogram(x[:, row], edges)[0] / max(1, len(x)) for x in tables]
            axis.stairs(filled, edges, fill=True, color="C0", alpha=0.35)
            for line in lines:
                axis.stairs(line, edges, color="C1", lw=1.4)
            axis.set(ylim=(0, 1.1 * max(float(counts.max()) for counts in (filled, *lines))), yticks=[])
        else:
            dots = tables[above][:points]
            axis.scatter(dots[:, column], dots[:, row], color=f"C{int(above)}", **style)
        if row == 0 and column == len(names) - 1 > 0:  # since the first panel of its row has no ticks
            axis.tick_params(right=True, labelright=True)


def _limits(x: np.ndarray) -> tuple[float, float]:
    """Return the ends of the axis of a column."""
    low, first, third, high = np.quantile(x, [0.005, 0.25, 0.75, 0.995])
    if low == high:
        low, high = x.min(), x.max()
    elif reach := 5 * (third - first):  # interquartile ranges
        low, high = max(low, first - reach), min(high, third + reach)
    margin = 0.08 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _tick(value: float, _: int) -> str:
    """Return a tick label of the whole number: a common power of ten of an axis would lie between the panels."""
    return f"{value:.6g}".replace("e+0", "e").replace("e-0", "e-").replace("-", "−")


def _columns_of(caller: str, argument: str, draws: Draws, names: Names = None) -> dict[str, np.ndarray]:
    """Return named columns ``(N,)`` of draws of sites ``(N, *shape)`` or of a table ``(N, D)``.

    Raises:
        ValueError: If there are no draws, sites differ in their number of draws, or names are not one per column.
    """
    if isinstance(draws, Mapping):
        sites = {name: _as_array(values) for name, values in draws.items()}
    else:
        table = _as_array(draws)
        if table.ndim != 2:
            got = table.shape or type(draws).__name__
            must = f"must be a dict of sites, such as guide.sample(1000), or of shape (N, D), got {got}"
            raise ValueError(f"{caller}: {argument} {must}.")
        labels = [f"x[{i}]" for i in range(table.shape[1])] if names is None else [str(name) for name in names]
        sites = dict(zip(labels, table.T, strict=False))
        if not len(sites) == len(labels) == table.shape[1]:
            raise ValueError(f"{caller}: names must be {table.shape[1]} different ones, got {labels}.")
    sites = {name: values for name, values in sites.items() if 0 not in values.shape[1:]}
    lengths = {name: len(values) if values.ndim else 0 for name, values in sites.items()}
    if len(set(lengths.values())) != 1 or min(lengths.values()) < 2:
        raise ValueError(f"{caller}: {argument} must hold two draws or more, as many of each site; it holds {lengths}.")
    columns: dict[str, np.ndarray] = {}
    for name, values in sites.items():
        flat = values.reshape(len(values), -1).astype(float)
        shape = torch.Size(values.shape[1:] if flat.shape[1] > 1 else ())  # Pyro's (N, 1) is one number too
        columns.update(zip(labels_of(name, shape), flat.T, strict=True))
    return columns


def _compared(
    caller: str, draws: Draws, reference: Draws | None, names: Names = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the columns of draws and of a reference, the latter empty without a reference.

    Raises:
        ValueError: If the draws or the reference are not valid, or have no column in common.
    """
    columns = _columns_of(caller, "draws", draws, names)
    others = {} if reference is None else _columns_of(caller, "reference", reference, names)
    if others and not columns.keys() & others.keys():
        raise ValueError(f"{caller}: the reference holds {list(others)}, and none of {list(columns)}.")
    return columns, others


def _as_array(values: Any) -> np.ndarray:
    """Return numbers on the CPU, without a gradient and, since numpy has no bfloat16, in another dtype than that."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy()
