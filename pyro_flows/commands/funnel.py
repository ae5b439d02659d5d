"""The picture of the eight schools: marginals, and the funnel."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..plots.marginals import density_of


def plot_funnel(mean: Tensor, scale: Tensor, effects: dict[str, Tensor]) -> Any:
    """The posterior of a hierarchical model: its marginals, and the funnel of a group's deviation against log scale.

    Args:
        mean: Draws of the population mean, ``(N,)``.
        scale: Draws of the population scale, ``(N,)``, positive.
        effects: Draws of each group's effect, ``(N,)``.

    Returns:
        A matplotlib figure.
    """
    from ..plots.picture import Picture

    picture = Picture(10.5, 4.8)
    left, right = picture.grid(2, 2, width_ratios=(1.15, 1))
    rows = {"mu": mean, "tau": scale, **effects}
    colors = ["C3", "C2"] + ["C0"] * len(effects)
    low, high = -15.0, 27.0
    for row, (values, color) in enumerate(zip(rows.values(), colors, strict=True)):
        height = len(rows) - 1 - row
        draws = values.cpu().numpy()
        places, density = density_of(draws, low, high)
        left.fill_between(places, height, height + 0.85 * density / (density.max() or 1), color=color, alpha=0.45, lw=0)
        left.plot(np.quantile(draws, [0.05, 0.95]), [height, height], color=color, lw=2.2, solid_capstyle="butt")
        left.plot(draws.mean(), height, "o", color=color, ms=4.5)
    left.set_yticks(range(len(rows)), list(rows)[::-1])
    left.set_xlim(low, high)
    left.set_xlabel("value (points of the test)")
    left.set_title("Marginals: density, mean and 90 % interval", fontsize=11)
    left.grid(axis="x", alpha=0.3)
    left.spines["left"].set_visible(False)
    name, effect = next(iter(effects.items()))
    right.scatter((effect - mean).cpu(), scale.log().cpu(), s=5, alpha=0.25, color="C0", lw=0, rasterized=True)
    right.set_xlabel(f"{name} − mu")
    right.set_ylabel("log tau")
    right.set_title("The funnel: the smaller tau, the less the schools differ", fontsize=11)
    right.grid(alpha=0.3)
    return picture
