"""The errors of a guide that a check sees, quantity by quantity, and its weights."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import torch

from ..arguments import check_integers
from .columns import plain, shortened
from .panels import Picture, panels
from .weights import histogram


def check(found: Any, *, most: int = 30) -> Picture:
    """The errors of a guide that chains and weights see, and its weights.

    Args:
        found: What :func:`~pyro_flows.check` returns.
        most: How many quantities are shown: those with the largest errors.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If ``most`` is below 1.

    Example::

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import pyro_flows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> guide = pf.AutoFlow(model)
        >>> fit = pf.fit_svi(model, guide, steps=5, progress=False)
        >>> picture = check(pf.check(model, guide, num_samples=1000))
        >>> [label.get_text() for label in picture.axes[0].get_yticklabels()]
        ['x']
    """
    check_integers("check", most=most)
    chains, weighted = found.chains, found.weighted
    size = torch.maximum(chains.error.abs(), (chains.ratio - 1).abs())
    shown = size.argsort(descending=True)[:most].sort().values
    rows, names = np.arange(len(shown)), [shortened(found.names[i], 40) for i in shown.tolist()]
    picture, (left, middle, right) = panels(11, 2.6 + 0.2 * len(shown), 3, 3)
    errors = {
        "error of the mean (posterior sd)": (left, 0.0, -3.0, "error", "error_se"),
        "sd, guide / posterior": (middle, 1.0, 0.0, "ratio", "ratio_se"),
    }
    for label, (axis, truth, least, value, noise) in errors.items():
        reach = 0.4
        axis.axvspan(truth - 0.1, truth + 0.1, color="C2", alpha=0.15, lw=0)
        for drift, name, color, shift in ((chains, "chains", "C0", -0.15), (weighted, "weights", "C1", 0.15)):
            places = getattr(drift, value)[shown].cpu().numpy().clip(least, truth + 3)
            bars = 2 * getattr(drift, noise)[shown].cpu().numpy()
            reach = max(reach, float(abs(places - truth).max()) + 0.15)
            axis.errorbar(places, rows + shift, xerr=bars, fmt="o", ms=3.5, lw=1.2, color=color, label=name)
        axis.axvline(truth, color="0.4", lw=0.8)
        ends = max(truth - reach, least - 0.15), truth + reach  # errors may end far away
        axis.set(xlim=ends, xlabel=label, ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticks(rows, names if axis is left else [""] * len(rows), fontsize=8)
    left.legend(frameon=False, fontsize=8)
    histogram(right, found.psis)
    if len(found.names) > len(rows):
        picture.supxlabel(f"the {len(rows)} of {len(found.names)} quantities with the largest errors", fontsize=9)
    picture.suptitle(textwrap.fill(plain(f"{found.verdict}, k-hat {found.khat:.2f}: {found.reason}"), 130), fontsize=10)
    return picture
