"""Pictures of a posterior."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import torch
from torch import Tensor


def plot_funnel(mean: Tensor, scale: Tensor, effects: dict[str, Tensor]) -> Any:
    """The posterior of a hierarchical model: its marginals, and the funnel of a group's deviation against log scale.

    Args:
        mean: Draws of the population mean, ``(N,)``.
        scale: Draws of the population scale, ``(N,)``, positive.
        effects: Draws of each group's effect, ``(N,)``.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    rows = {"mu": mean, "tau": scale, **effects}
    colors = ["C3", "C2"] + ["C0"] * len(effects)
    grid = np.linspace(-15, 27, 400)
    for row, (values, color) in enumerate(zip(rows.values(), colors, strict=True)):
        height = len(rows) - 1 - row
        draws = values.cpu().numpy()
        density, edges = np.histogram(draws, bins=120, range=(grid[0], grid[-1]), density=True)
        smooth = np.convolve(np.pad(density, 4, mode="constant"), np.hanning(9) / np.hanning(9).sum(), mode="valid")
        centres = (edges[1:] + edges[:-1]) / 2
        left.fill_between(centres, height, height + 0.85 * smooth / smooth.max(), color=color, alpha=0.45, lw=0)
        left.plot(np.quantile(draws, [0.05, 0.95]), [height, height], color=color, lw=2.2, solid_capstyle="butt")
        left.plot(draws.mean(), height, "o", color=color, ms=4.5)
    left.set_yticks(range(len(rows)), list(rows)[::-1])
    left.set_xlim(grid[0], grid[-1])
    left.set_xlabel("value (points of the test)")
    left.set_title("Marginals: density, mean and 90 % interval", fontsize=11)
    left.grid(axis="x", alpha=0.3)
    left.spines[["top", "right", "left"]].set_visible(False)
    name, effect = next(iter(effects.items()))
    right.scatter((effect - mean).cpu(), scale.log().cpu(), s=5, alpha=0.25, color="C0", lw=0, rasterized=True)
    right.set_xlabel(f"{name} − mu")
    right.set_ylabel("log tau")
    right.set_title("The funnel: the smaller tau, the less the schools differ", fontsize=11)
    right.grid(alpha=0.3)
    right.spines[["top", "right"]].set_visible(False)
    return figure


def plot_check(check: Any, most: int = 30) -> Any:
    """The errors of a guide that chains and weights see, and its weights.

    Args:
        check: What :func:`~pyro_flows.check` returns.
        most: How many quantities are shown: those with the largest errors.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    chains, weighted = check.chains, check.weighted
    size = torch.maximum(chains.error.abs(), (chains.ratio - 1).abs())
    shown = size.argsort(descending=True)[:most].sort().values
    rows = np.arange(len(shown))
    figure = Figure(figsize=(11, 2.6 + 0.2 * len(shown)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1))
    panels = {
        "error of the mean (posterior sd)": (left, 0.0, "error", "error_se"),
        "sd, guide / posterior": (middle, 1.0, "ratio", "ratio_se"),
    }
    for label, (axis, truth, value, noise) in panels.items():
        axis.axvspan(truth - 0.1, truth + 0.1, color="C2", alpha=0.15, lw=0)
        for drift, name, color, shift in ((chains, "chains", "C0", -0.15), (weighted, "weights", "C1", 0.15)):
            places = getattr(drift, value)[shown].cpu().numpy().clip(truth - 1.5, truth + 3)
            errors = 2 * getattr(drift, noise)[shown].cpu().numpy().clip(0, 2)
            axis.errorbar(places, rows + shift, xerr=errors, fmt="o", ms=3.5, lw=1.2, color=color, label=name)
        axis.axvline(truth, color="0.4", lw=0.8)
        axis.set_xlabel(label)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_yticks(
            rows, [check.names[i] for i in shown.tolist()] if axis is left else [""] * len(rows), fontsize=8
        )
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    log_weights = (check.psis.log_weights - check.log_evidence).cpu().numpy()
    right.hist(log_weights.clip(-6, 6), bins=80, color="0.6")
    right.set_yscale("log")
    right.axvline(0, color="0.4", lw=0.8)
    right.set_xlabel("log-weight − log evidence (nats)")
    right.set_ylabel("draws")
    right.set_title(f"k-hat {check.khat:.2f}", fontsize=10)
    right.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{check.verdict}: " + "\n".join(textwrap.wrap(check.reason, 110)), fontsize=10)
    return figure


def plot_calibration(calibration: Any) -> Any:
    """The three tests of a calibration, each with the band that 95 % of exact guides stay in.

    Args:
        calibration: What :func:`~pyro_flows.calibrate` returns.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    number = len(calibration.ranks)
    level = np.linspace(0, 1, 201)
    band = 1.358 / np.sqrt(number)  # Kolmogorov's law at 5 %
    left.axhspan(-band, band, color="C2", alpha=0.15, lw=0)
    worst = int(calibration.rank_p.argmin())
    for column, ranks in enumerate(calibration.ranks.T.cpu().numpy()):
        chosen = column == worst
        label = f"{calibration.names[column]} (worst)" if chosen else None
        style = {"color": "C3", "lw": 1.6, "zorder": 3} if chosen else {"color": "C0", "lw": 0.8, "alpha": 0.6}
        left.plot(level, (ranks[:, None] <= level).mean(0) - level, label=label, **style)
    left.set_xlabel("rank of the truth, as a share of the draws")
    left.set_ylabel("share of data sets below, less expected")
    left.set_title(f"Ranks: p = {calibration.sbc_p:.2g}", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    tests = (
        (middle, "Regions of highest density", calibration.coverage, calibration.coverage_p),
        (right, "TARP: balls around random points", calibration.tarp, calibration.tarp_p),
    )
    for axis, title, levels, p in tests:
        axis.fill_between(level, level - band, level + band, color="C2", alpha=0.15, lw=0)
        axis.plot(level, level, color="0.4", lw=0.8)
        axis.plot(level, (levels.cpu().numpy()[:, None] <= level).mean(0), color="C0", lw=1.6)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.set_xlabel("nominal level")
        axis.set_ylabel("share of data sets whose truth it holds")
        axis.set_title(f"{title}: p = {p:.2g}", fontsize=10)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(textwrap.wrap(calibration.reason, 120)), fontsize=10)
    return figure
