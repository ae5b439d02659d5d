"""Diagnostics of a guide: its errors by a check, its importance weights, and its calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .panels import Picture, head, panels, shortened

MOST = 30  # quantities of a check: those with the largest errors
FAR = 8.0  # nats beyond which log-weights are shown at the edge
KOLMOGOROV = 1.358  # the 95 % quantile of Kolmogorov's distribution


def check(found: Any) -> Picture:
    """Plot the errors of a guide that chains and weights find, and its weights.

    Args:
        found: The result of :func:`~pyro_flows.check`.

    Returns:
        A matplotlib figure.

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
    chains, weighted = found.chains, found.weighted
    size = torch.maximum(chains.error.abs(), (chains.ratio - 1).abs())
    shown = size.argsort(descending=True)[:MOST].sort().values
    rows, names = np.arange(len(shown)), [shortened(found.names[i], 40) for i in shown.tolist()]
    picture, (left, middle, right) = panels(11, 2.6 + 0.2 * len(shown), 3, 3)
    errors = {
        "error of the mean (posterior sd)": (left, 0.0, -3.0, "error"),
        "sd, guide / posterior": (middle, 1.0, 0.0, "ratio"),
    }
    for label, (axis, truth, least, value) in errors.items():
        reach = 0.4
        axis.axvspan(truth - 0.1, truth + 0.1, color="C2", alpha=0.15, lw=0)
        for drift, name, color, shift in (chains, "chains", "C0", -0.15), (weighted, "weights", "C1", 0.15):
            places = getattr(drift, value)[shown].cpu().numpy().clip(least, truth + 3)
            se = getattr(drift, f"{value}_se")[shown].cpu().numpy()
            reach = max(reach, float(abs(places - truth).max()) + 0.15)
            axis.errorbar(places, rows + shift, xerr=2 * se, fmt="o", ms=3.5, lw=1.2, color=color, label=name)
        axis.axvline(truth, color="0.4", lw=0.8)
        ends = max(truth - reach, least - 0.15), truth + reach  # error bars may end far away
        axis.set(xlim=ends, xlabel=label, ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticks(rows, names if axis is left else [""] * len(rows), fontsize=8)
    left.legend(frameon=False, fontsize=8)
    _histogram(right, found.psis)
    if len(found.names) > len(rows):
        picture.supxlabel(f"the {len(rows)} of {len(found.names)} quantities with the largest errors", fontsize=9)
    head(picture, f"{found.verdict}, k-hat {found.khat:.2f}: {found.reason}")
    return picture


def weights(found: Any) -> Picture:
    """Plot log-weights, with k-hat, and the share of the total weight that the heaviest draws hold.

    Args:
        found: The result of :func:`~pyro_flows.psis` or :func:`~pyro_flows.check`.

    Returns:
        A matplotlib figure.

    Example::

        >>> import pyro.distributions as dist
        >>> import pyro, torch
        >>> from pyro_flows import AutoFlow, psis
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(2), 1).to_event(1))
        >>> picture = weights(psis(model, AutoFlow(model, init_scale=0.9), num_samples=500))
        >>> picture.axes[1].get_xlabel()
        'share of the draws, the heaviest first'
    """
    psis = getattr(found, "psis", found)
    picture, (left, right) = panels(9, 3.6, 2, 2)
    _histogram(left, psis)
    even = np.arange(1, len(psis.log_weights) + 1) / len(psis.log_weights)
    right.plot(even, _held(psis.log_weights), color="C1", lw=1.2, ls="--", label="raw")
    right.plot(even, _held(psis.smoothed), color="C0", lw=1.8, label="smoothed")
    right.plot(even, even, color="0.6", lw=0.8, ls=":", label="all weights equal")
    right.set(xscale="log", xlim=(even[0], 1), xlabel="share of the draws, the heaviest first")
    right.set(ylim=(0, 1), ylabel="share of the weight that they hold")
    right.set_title(f"ESS {psis.ess:.0f}", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    word = "reliable" if psis.reliable else "not reliable"
    title = f"k-hat {psis.khat:.2f}: weights are {word} (the limit is {psis.threshold:.2f}); "
    title += f"log evidence {psis.log_evidence:.3f} ± {psis.log_evidence_se:.3f} nats"
    picture.suptitle(title, fontsize=11)
    return picture


def calibration(found: Any) -> Picture:
    """Plot the three tests of a calibration, each with the band that contains 95 % of exact guides.

    Args:
        found: The result of :func:`~pyro_flows.calibrate`.

    Returns:
        A matplotlib figure.

    Example::

        >>> import torch
        >>> from pyro_flows.diagnostics import Calibration
        >>> u = torch.rand(100)
        >>> picture = calibration(Calibration(["theta"], u[:, None], u, u, torch.tensor([0.5]), 0.5, 0.5, 0.5))
        >>> picture.axes[0].get_title()
        'Ranks: p = 0.5'
    """
    picture, (left, middle, right) = panels(11, 3.9, 3, 3)
    level = np.linspace(0, 1, 201)
    band = KOLMOGOROV / np.sqrt(len(found.ranks))
    left.axhspan(-band, band, color="C2", alpha=0.15, lw=0)
    worst = int(found.rank_p.argmin())
    for column, ranks in enumerate(found.ranks.T):
        label = f"{shortened(found.names[column], 40)} (worst)" if column == worst else None
        style = {"color": "C3", "lw": 1.6, "zorder": 3} if label else {"color": "C0", "lw": 0.8, "alpha": 0.6}
        left.plot(level, _share_below(ranks, level) - level, label=label, **style)
    left.set(xlabel="rank of the truth, as a share of the draws", ylabel="share of datasets below, minus expected")
    left.set_title(f"Ranks: p = {found.sbc_p:.2g}", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    tests = (
        (middle, "Regions of highest density", found.coverage, found.coverage_p),
        (right, "TARP: balls around random points", found.tarp, found.tarp_p),
    )
    for axis, title, levels, p in tests:
        axis.fill_between(level, level - band, level + band, color="C2", alpha=0.15, lw=0)
        axis.plot(level, level, color="0.4", lw=0.8)
        axis.plot(level, _share_below(levels, level), color="C0", lw=1.6)
        axis.set(xlim=(0, 1), xlabel="nominal level", ylim=(0, 1), ylabel="share of datasets whose truth is inside")
        axis.set_title(f"{title}: p = {p:.2g}", fontsize=10)
    head(picture, found.reason)
    return picture


def _share_below(values: Tensor, level: np.ndarray) -> np.ndarray:
    """Return the share of values ``(N,)`` that are at most each level, ``(L,)``."""
    return (values.cpu().numpy()[:, None] <= level).mean(0)


def _held(log_weights: Tensor) -> np.ndarray:
    """Return the share of the total weight that the heaviest draws hold, ``(N,)``."""
    share = (log_weights - log_weights.max()).exp().cpu().double().nan_to_num(0.0).sort(descending=True).values
    return (share.cumsum(0) / share.sum()).numpy()


def _histogram(axis: Any, psis: Any) -> None:
    """Draw log-weights minus the log evidence; the title counts those that are shown at the edges."""
    raw = (psis.log_weights - psis.log_evidence).cpu().double().numpy()
    axis.hist(raw.clip(-FAR, FAR), bins=80, color="0.6")
    axis.axvline(0, color="0.3", lw=0.8)
    axis.set(xlabel="log-weight − log evidence (nats)", yscale="log", ylabel="draws")
    beyond = int((abs(raw) > FAR).sum() + np.isnan(raw).sum())
    told = f"; {beyond} beyond ±{FAR:.0f}" if beyond else ""
    axis.set_title(f"Log-weights of {len(raw)} draws{told}", fontsize=10)
