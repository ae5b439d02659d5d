"""Findings: the faults that a check sees in a guide's draws, as data, and the sentences that tell of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

VERDICTS = "trust", "reweight", "do not trust"  # from the best to the worst


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a guide's draws, or that cannot be told of them.

    ===============  ===================================  ==============================================
    kind             what is wrong                        size
    ===============  ===================================  ==============================================
    ``"mean"``       a mean                               its error, in sds of the posterior
    ``"sd"``         a standard deviation                 the guide's over the posterior's
    ``"shape"``      a distribution                       the error of its distribution function
    ``"weights"``    the draws count unequally            the total variation, by their weights
    ``"outside"``    draws have no density                their share of all draws
    ``"outliers"``   a few draws lie far outside          the sd with them over that without
    ``"mode"``       mass lies where the guide has none   its share of all
    ``"collapsed"``  so does it, and chains leave         its share of all
    ``"far"``        little mass, far away                as of a mean or sd
    ``"whitened"``   correlations or tails                as of a mean or sd, along a whitened direction
    ``"tails"``      the guide's tails are too short      k-hat
    ``"blind"``      modes could not be looked for        none
    ``"frozen"``     the chains hardly move               their acceptance
    ``"unclear"``    it cannot be told                    the noise or error of a mean or sd
    ``"doubt"``      the chains doubt a mean or sd        as of a mean or sd
    ``"evidence"``   another fit has found more           how much more, in nats
    ===============  ===================================  ==============================================

    Attributes:
        kind: What kind of thing it is.
        quantity: The quantity that it is about, or what else tells of it; else an empty string.
        size: How large it is.
        noise: The standard error of that, or NaN where it has none.
        verdict: What follows: ``"reweight"`` or ``"do not trust"``.
        of: For ``"whitened"``, ``"unclear"``, ``"doubt"`` and ``"far"``: ``"mean"`` or ``"sd"``, whichever is off.

    Example::

        >>> print(Finding("sd", "x", size=0.5, noise=0.02))
        The guide's draws are off (sd of x 0.50 ± 0.02 times the posterior's).
    """

    kind: str
    quantity: str = ""
    size: float = math.nan
    noise: float = math.nan
    verdict: str = "do not trust"
    of: str = ""

    @property
    def moment(self) -> str:
        """The quantity that is off, and by how much, in words."""
        if (self.of or self.kind) == "mean":
            return f"mean of {self.quantity} off by {self.size:+.2f} ± {self.noise:.2f} sd"
        if (self.of or self.kind) == "sd":
            return f"sd of {self.quantity} {self.size:.2f} ± {self.noise:.2f} times the posterior's"
        return f"distribution function of {self.quantity} off by {self.size:.2f} ± {self.noise:.2f}"

    def __str__(self) -> str:
        return WORDS[self.kind](self)


def worst(findings: Sequence[Finding]) -> str:
    """Return the verdict that follows from all findings."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index, default="trust")


WORDS = {
    "mean": lambda f: f"The guide's draws are off ({f.moment}).",
    "sd": lambda f: f"The guide's draws are off ({f.moment}).",
    "shape": lambda f: f"The shape of the guide's draws is off ({f.moment}), whatever their means and sds are.",
    "outside": lambda f: f"The model has no density at {f.size:.1%} of the draws.",
    "outliers": lambda f: (
        f"A few rare draws lie where the posterior has next to nothing (with them the sd of {f.quantity} is "
        f"{f.size:.2f} times as large)."
    ),
    "weights": lambda f: f"The guide's draws count unequally: by their weights {f.size:.0%} of the mass is misplaced.",
    "mode": lambda f: (
        f"A mode may be missing: {f.size:.0%} of the posterior's mass, as far as it was found, lies where the guide "
        "draws nothing."
    ),
    "far": lambda f: f"A little mass is missing, far away ({f.moment}).",
    "collapsed": lambda f: (
        f"The guide has collapsed or lies elsewhere: {f.size:.0%} of the posterior's mass, as far as it was found, "
        f"lies where the guide draws nothing, and chains drift ({f.quantity})."
    ),
    "whitened": lambda f: (
        f"The guide's correlations or tails are off ({f.moment}), though its means and sds are right."
    ),
    "tails": lambda f: f"The weights have no mean (k-hat {f.size:.2f}): the guide's tails are too short.",
    "blind": lambda f: "Hardly a draw of the prior has a density, so modes elsewhere could not be looked for.",
    "frozen": lambda f: (
        f"The chains hardly move (acceptance {f.size:.2f}): is the gradient of the model's density finite?"
    ),
    "unclear": lambda f: f"It cannot be told whether the draws are right ({f.moment}).",
    "doubt": lambda f: f"The chains doubt that the draws are right ({f.moment}).",
    "evidence": lambda f: f"Mass is missing: the rung {f.quantity!r} has found {f.size:.2f} nats more evidence.",
}
