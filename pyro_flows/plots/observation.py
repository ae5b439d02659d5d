"""Checks of one observation: of an amortised posterior near it, and of the model that should have made it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .panels import Picture, head, panels, shortened

MOST = 30  # latents or entries with names
BINS = np.linspace(-4, 4, 33)


def local_c2st(found: Any) -> Picture:
    """Plot true latents near an observation against a guide's draws, and the statistic of their difference.

    Args:
        found: The result of :func:`~pyro_flows.local_c2st`.

    Returns:
        A matplotlib figure.

    Example::

        >>> import torch
        >>> from pyro_flows.diagnostics import LocalC2ST
        >>> z, null = torch.randn(100, 1), torch.rand(99)
        >>> found = LocalC2ST(["a"], 0.3, null, 0.5, 0.01, "", z[0], z[1], z[0], z[1], z, z, torch.rand(100))
        >>> local_c2st(found).axes[2].get_title()
        'p = 0.5'
    """
    picture, (left, middle, right) = panels(11, 3.9, 3, 3)
    size = torch.maximum(found.location.abs(), found.spread.abs())
    worst = int(size.argmax())
    told = {"density": True, "bins": BINS}
    left.hist(found.draws[:, worst].cpu().numpy(), color="0.7", label="draws of the guide", **told)
    left.hist(found.truths[:, worst].cpu().numpy(), histtype="step", color="C0", lw=1.6, label="true latents", **told)
    left.set(xlabel=f"{shortened(found.names[worst], 40)}, standardised by the guide", ylabel="density")
    left.set_title(f"{len(found.truths)} datasets near the observation", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    shown = size.argsort(descending=True)[:MOST].sort().values
    rows = np.arange(len(shown))
    middle.axvspan(-2, 2, color="C2", alpha=0.15, lw=0)
    middle.axvline(0, color="0.4", lw=0.8)
    for value, color, shift, label in (found.location, "C0", -0.12, "location"), (found.spread, "C1", 0.12, "spread"):
        middle.plot(value[shown].cpu().numpy(), rows + shift, "o", ms=4, color=color, label=label)
    middle.set_yticks(rows, [shortened(found.names[i]) for i in shown.tolist()], fontsize=8)
    middle.set(xlabel="true latents minus draws (standard errors)", ylim=(len(rows) - 0.5, -0.5))
    middle.legend(frameon=False, fontsize=8)
    _against_null(right, found, "exact guides")
    head(picture, found.reason)
    return picture


def misspecification(found: Any) -> Picture:
    """Plot an observation against its posterior predictive replicates, and statistics of their difference.

    Args:
        found: The result of :func:`~pyro_flows.misspecification`.

    Returns:
        A matplotlib figure.

    Example::

        >>> import torch
        >>> from pyro_flows.diagnostics import Misspecification
        >>> p, null = torch.tensor([0.5]), torch.rand(99)
        >>> found = Misspecification(["spread"], 0.3, null, 0.5, 0.05, "", p, ["x[0]", "x[1]"], torch.randn(2))
        >>> misspecification(found).axes[2].get_title()
        'p = 0.5'
    """
    picture, (left, middle, right) = panels(11, 3.9, 3, 3)
    places = np.arange(len(found.entries))
    left.axhspan(-2, 2, color="C2", alpha=0.15, lw=0)
    left.axhline(0, color="0.4", lw=0.8)
    left.plot(places, found.residuals.cpu().numpy(), "o", ms=3.5, color="C0")
    if len(places) <= MOST:
        left.set_xticks(places, [shortened(name) for name in found.entries], fontsize=8, rotation=90)
    left.set(xlabel="entry of the data", ylabel="residual (sd of the replicates)")
    left.set_title("Data minus replicates", fontsize=10)
    rows = np.arange(len(found.names))
    middle.axvspan(-np.log10(found.level), 4, color="C3", alpha=0.1, lw=0)
    middle.barh(rows, -np.log10(found.p_values.cpu().numpy()), color="C0", height=0.6)
    middle.set_yticks(rows, [shortened(name, 30) for name in found.names], fontsize=8)
    middle.set(xlabel="−log10 of the p-value", xlim=(0, 4), ylim=(len(rows) - 0.5, -0.5))
    middle.set_title("Each statistic alone", fontsize=10)
    _against_null(right, found, "data of the model")
    head(picture, found.reason)
    return picture


def _against_null(axis: Any, found: Any, what: str) -> None:
    """Draw the null distribution of the largest statistic, and its value."""
    null: Tensor = found.null
    axis.hist(null.cpu().numpy(), bins=40, color="0.7", label=what)
    axis.axvline(found.statistic, color="C0" if found.passed else "C3", lw=1.8, label="observed")
    axis.set(xlabel="largest statistic", ylabel="number")
    axis.set_title(f"p = {found.p_value:.2g}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
