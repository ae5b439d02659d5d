"""The density of each quantity, of a guide's draws beside a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arguments import check_integers
from ..arviz_versions import kde
from .columns import Draws, as_array, beside, columns_of, shortened
from .panels import Picture, panels

COLUMNS = 4  # panels in a row
REACH = 0.003  # of the draws lie beyond either end of an axis


def marginals(
    draws: Draws,
    reference: Draws | None = None,
    *,
    truth: Mapping[str, Any] | None = None,
    labels: tuple[str, str] = ("guide", "reference"),
    most: int = 12,
) -> Picture:
    """Picture the marginal density of each quantity, by ArviZ's kernel density estimate.

    Draws that are not finite are left out.  Where nearly all are one number there is no density: a line shows it.

    Args:
        draws: Draws of sites, ``(N, *shape)`` each, as ``guide.sample(N)`` gives them; or a table ``(N, D)``.
        reference: Draws to compare with, such as those of NUTS, ``mcmc.get_samples()``; sites that ``draws`` lacks are
            left out.
        truth: Values that draws should cover, by the names of the sites: a line in each panel.
        labels: What the draws and the reference are called.
        most: How many quantities are shown: the first ones.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If there are no draws, sites differ in their number, the reference has none of the quantities, the
            truth has a site that the draws lack or one of another shape, or ``most`` is below 1.

    Example::

        >>> import torch
        >>> draws = {"mu": torch.randn(500), "theta": torch.randn(500, 2)}
        >>> picture = marginals(draws, {"mu": torch.randn(300)}, truth={"mu": 0.5})
        >>> [axis.get_title() for axis in picture.axes]
        ['mu', 'theta[0]', 'theta[1]']
    """
    check_integers("marginals", most=most)
    columns, others = beside("marginals", draws, reference)
    twice = {name: np.stack([as_array(value)] * 2) for name, value in (truth or {}).items()}  # as if drawn
    lines = columns_of("marginals", "truth", twice) if truth else {}
    if strange := [name for name in lines if name not in columns]:
        raise ValueError(f"marginals: the truth holds {strange}, and the draws {list(columns)}.")
    shown = dict(list(columns.items())[:most])
    width = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / width)
    picture, axes = panels(max(4.5, 2.3 * width), 1.1 + 1.7 * rows, len(shown), width)
    for axis, (name, own) in zip(axes, shown.items(), strict=True):
        other = others.get(name)
        known = [x[np.isfinite(x)] for x in ([own] if other is None else [own, other])]
        ends = [np.quantile(x, [REACH, 1 - REACH]) for x in known if len(x)]
        low, high = (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (0.0, 1.0)
        densities = [density_of(x, low, high) for x in known]
        axis.fill_between(*densities[0], color="C0", alpha=0.4, lw=0, label=labels[0])
        if other is not None:
            axis.plot(*densities[1], color="C1", lw=1.6, label=labels[1])
        for values, (_, density), color in zip(known, densities, ("C0", "C1"), strict=False):
            if len(values) and not density.any():
                axis.axvline(np.median(values), color=color, lw=1.6)
        if name in lines:
            axis.axvline(lines[name][0], color="0.2", lw=1.2, ls="--", label="truth")
        axis.set(ylim=(0, None), yticks=[])
        axis.spines["left"].set_visible(False)
        axis.set_title(shortened(name), fontsize=10)
        axis.tick_params(labelsize=8)
    handles, names = max((axis.get_legend_handles_labels() for axis in picture.axes), key=lambda found: len(found[1]))
    if len(names) > 1:
        picture.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9)
    if len(columns) > most:
        picture.supxlabel(f"the first {most} of {len(columns)} quantities", fontsize=9)
    return picture


def density_of(values: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """A grid between two ends, and an estimate of the density of values ``(N,)`` there; zero where nearly none lie."""
    inside = values[(low <= values) & (values <= high)]
    if len(inside) < 2 or inside.min() == inside.max():
        return np.array([low, high]), np.zeros(2)
    grid, density = kde(inside)
    return grid, density * len(inside) / len(values)
