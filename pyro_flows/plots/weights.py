"""The importance weights of a guide's draws: how they spread, and how few draws hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from .panels import Picture, panels

FAR = 8.0  # nats, beyond which log-weights are shown at the edge


def weights(found: Any) -> Picture:
    """Picture log-weights, with k-hat, and the share of all weight that the heaviest draws hold.

    Args:
        found: What :func:`~pyro_flows.psis` or :func:`~pyro_flows.check` returns.

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
    histogram(left, psis)
    even = np.arange(1, len(psis.log_weights) + 1) / len(psis.log_weights)
    right.plot(even, _held(psis.log_weights), color="C1", lw=1.2, ls="--", label="raw")
    right.plot(even, _held(psis.smoothed), color="C0", lw=1.8, label="smoothed")
    right.plot(even, even, color="0.6", lw=0.8, ls=":", label="all weights equal")
    right.set(xscale="log", xlim=(even[0], 1), xlabel="share of the draws, the heaviest first")
    right.set(ylim=(0, 1), ylabel="share of the weight that they hold")
    right.set_title(f"ESS {psis.ess:.0f}", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    word = "reliable" if psis.reliable else "not reliable"
    picture.suptitle(
        f"k-hat {psis.khat:.2f}: weights are {word} (the limit is {psis.threshold:.2f}); "
        f"log evidence {psis.log_evidence:.3f} ± {psis.log_evidence_se:.3f} nats",
        fontsize=11,
    )
    return picture


def _held(log_weights: Tensor) -> np.ndarray:
    """Return the share of all weight that the heaviest draws hold, ``(N,)``."""
    share = (log_weights - log_weights.max()).exp().cpu().double().nan_to_num(0.0).sort(descending=True).values
    return (share.cumsum(0) / share.sum()).numpy()


def histogram(axis: Any, psis: Any) -> None:
    """Draw log-weights less the log evidence, those far away at the edges, and say how many these are."""
    raw = (psis.log_weights - psis.log_evidence).cpu().double().numpy()
    axis.hist(raw.clip(-FAR, FAR), bins=80, color="0.6")
    axis.axvline(0, color="0.3", lw=0.8)
    axis.set(xlabel="log-weight − log evidence (nats)", yscale="log", ylabel="draws")
    beyond = int((abs(raw) > FAR).sum() + np.isnan(raw).sum())
    told = f"; {beyond} beyond ±{FAR:.0f}" if beyond else ""
    axis.set_title(f"Log-weights of {len(raw)} draws{told}", fontsize=10)
