"""The three tests of a calibration."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from .columns import plain, shortened
from .panels import Picture, panels


def calibration(found: Any) -> Picture:
    """The three tests of a calibration, each with the band that 95 % of exact guides stay in.

    Args:
        found: What :func:`~pyro_flows.calibrate` returns.

    Returns:
        A matplotlib figure.

    Example::

        >>> import torch
        >>> from pyro_flows import Calibration
        >>> u = torch.rand(100)
        >>> picture = calibration(Calibration(["theta"], u[:, None], u, u, torch.tensor([0.5]), 0.5, 0.5, 0.5))
        >>> picture.axes[0].get_title()
        'Ranks: p = 0.5'
    """
    picture, (left, middle, right) = panels(11, 3.9, 3, 3)
    number = len(found.ranks)
    level = np.linspace(0, 1, 201)
    band = 1.358 / np.sqrt(number)  # Kolmogorov's law at 5 %
    left.axhspan(-band, band, color="C2", alpha=0.15, lw=0)
    worst = int(found.rank_p.argmin())
    for column, ranks in enumerate(found.ranks.T.cpu().numpy()):
        chosen = column == worst
        label = f"{shortened(found.names[column], 40)} (worst)" if chosen else None
        style = {"color": "C3", "lw": 1.6, "zorder": 3} if chosen else {"color": "C0", "lw": 0.8, "alpha": 0.6}
        left.plot(level, (ranks[:, None] <= level).mean(0) - level, label=label, **style)
    left.set(xlabel="rank of the truth, as a share of the draws", ylabel="share of data sets below, less expected")
    left.set_title(f"Ranks: p = {found.sbc_p:.2g}", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    tests = (
        (middle, "Regions of highest density", found.coverage, found.coverage_p),
        (right, "TARP: balls around random points", found.tarp, found.tarp_p),
    )
    for axis, title, levels, p in tests:
        axis.fill_between(level, level - band, level + band, color="C2", alpha=0.15, lw=0)
        axis.plot(level, level, color="0.4", lw=0.8)
        axis.plot(level, (levels.cpu().numpy()[:, None] <= level).mean(0), color="C0", lw=1.6)
        axis.set(xlim=(0, 1), xlabel="nominal level", ylim=(0, 1), ylabel="share of data sets whose truth it holds")
        axis.set_title(f"{title}: p = {p:.2g}", fontsize=10)
    picture.suptitle(textwrap.fill(plain(found.reason), 130), fontsize=10)
    return picture
