"""Diagnostics of a guide and its model: checks, weights, calibration, and tests of one observation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .panels import Picture, head, panels, shortened

MOST = 30  # quantities or entries with names: those with the largest errors
BINS = np.linspace(-4, 4, 33)  # of standardised latents
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
    shown = _largest(torch.maximum(chains.error.abs(), (chains.ratio - 1).abs()))
    rows, names = np.arange(len(shown)), [found.names[i] for i in shown.tolist()]
    picture, (left, middle, right) = panels(11, 2.6 + 0.2 * len(shown), 3, 3)
    labels = ("error of the mean (posterior sd)", "sd, guide / posterior")
    errors = zip(labels, (left, middle), (0.0, 1.0), (-3.0, 0.0), ("error", "ratio"), strict=True)
    for label, axis, truth, least, value in errors:
        reach = 0.4
        axis.axvspan(truth - 0.1, truth + 0.1, color="C2", alpha=0.15, lw=0)
        for drift, name, color, shift in (chains, "chains", "C0", -0.15), (weighted, "weights", "C1", 0.15):
            places = getattr(drift, value)[shown].cpu().numpy().clip(least, truth + 3)
            se = getattr(drift, f"{value}_se")[shown].cpu().numpy()
            reach = max(reach, float(abs(places - truth).max()) + 0.15)
            axis.errorbar(places, rows + shift, xerr=2 * se, fmt="o", ms=3.5, lw=1.2, color=color, label=name)
        axis.axvline(truth, color="0.4", lw=0.8)
        ends = max(truth - reach, least - 0.15), truth + reach  # error bars may end far away
        axis.set(xlim=ends, xlabel=label)
        _name_rows(axis, names if axis is left else [""] * len(rows), 40)
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
    regions = middle, "Regions of highest density", found.coverage, found.coverage_p
    balls = right, "TARP: balls around random points", found.tarp, found.tarp_p
    for axis, title, levels, p in (regions, balls):
        axis.fill_between(level, level - band, level + band, color="C2", alpha=0.15, lw=0)
        axis.plot(level, level, color="0.4", lw=0.8)
        axis.plot(level, _share_below(levels, level), color="C0", lw=1.6)
        axis.set(xlim=(0, 1), xlabel="nominal level", ylim=(0, 1), ylabel="share of datasets whose truth is inside")
        axis.set_title(f"{title}: p = {p:.2g}", fontsize=10)
    head(picture, found.reason)
    return picture


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
    shown = _largest(size)
    rows = np.arange(len(shown))
    middle.axvspan(-2, 2, color="C2", alpha=0.15, lw=0)
    middle.axvline(0, color="0.4", lw=0.8)
    for value, color, shift, label in (found.location, "C0", -0.12, "location"), (found.spread, "C1", 0.12, "spread"):
        middle.plot(value[shown].cpu().numpy(), rows + shift, "o", ms=4, color=color, label=label)
    _name_rows(middle, [found.names[i] for i in shown.tolist()])
    middle.set(xlabel="true latents minus draws (standard errors)")
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
    middle.axvspan(-np.log10(found.level), 4, color="C3", alpha=0.1, lw=0)
    middle.barh(np.arange(len(found.names)), -np.log10(found.p_values.cpu().numpy()), color="C0", height=0.6)
    _name_rows(middle, found.names, 30)
    middle.set(xlabel="−log10 of the p-value", xlim=(0, 4))
    middle.set_title("Each statistic alone", fontsize=10)
    _against_null(right, found, "data of the model")
    head(picture, found.reason)
    return picture


def _largest(size: Tensor) -> Tensor:
    """Return the places of the largest of some sizes, ``(n,)``, in their order."""
    return size.argsort(descending=True)[:MOST].sort().values


def _name_rows(axis: Any, names: Sequence[str], most: int = 20) -> None:
    """Name the rows of a panel, from the top."""
    axis.set_yticks(np.arange(len(names)), [shortened(name, most) for name in names], fontsize=8)
    axis.set(ylim=(len(names) - 0.5, -0.5))


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


def _against_null(axis: Any, found: Any, what: str) -> None:
    """Draw the null distribution of the largest statistic, and its value."""
    axis.hist(found.null.cpu().numpy(), bins=40, color="0.7", label=what)
    axis.axvline(found.statistic, color="C0" if found.passed else "C3", lw=1.8, label="observed")
    axis.set(xlabel="largest statistic", ylabel="number")
    axis.set_title(f"p = {found.p_value:.2g}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
