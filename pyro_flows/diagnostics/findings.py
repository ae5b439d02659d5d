"""Findings: the faults that a check finds in a guide's draws, as data, and a sentence for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LITTLE = 0.05  # share of the mass below which two decimals of a percentage are shown
VERDICTS = "trust", "reweight", "do not trust"  # from the best to the worst


@dataclass(frozen=True)
class Finding:
    """One fault of a guide's draws, or one question that a check could not answer.

    ===============  ===================================  ==============================================
    kind             fault                                size
    ===============  ===================================  ==============================================
    ``"mean"``       a wrong mean                         its error, in sds of the posterior
    ``"sd"``         a wrong standard deviation           the guide's over the posterior's
    ``"shape"``      a wrong distribution function        its error
    ``"weights"``    very unequal weights                 the total variation distance
    ``"outside"``    draws without a density              their share of all draws
    ``"outliers"``   a few draws far outside              the sd with them over the sd without them
    ``"mode"``       a missing mode                       its share of the posterior's mass
    ``"collapsed"``  a missing mode, and drifting chains  its share of the posterior's mass
    ``"neck"``       a missing neck of a scale            its share of the posterior's mass
    ``"support"``    a support narrower than the model's  the share of the posterior's mass outside
    ``"far"``        little mass missing, far away        as for ``"mean"`` or ``"sd"``
    ``"whitened"``   wrong correlations or tails          as for ``"mean"`` or ``"sd"``, along a direction
    ``"tails"``      tails that are too short             k-hat
    ``"blind"``      no search for modes was possible     NaN
    ``"frozen"``     chains that hardly move              their acceptance
    ``"unclear"``    an undecided mean or sd              its error or noise
    ``"slow"``       a common scale that is undecided     variance of chains' means, 1 if they are fast
    ``"doubt"``      a mean or sd that chains doubt       as for ``"mean"`` or ``"sd"``
    ``"evidence"``   more evidence by another fit         the difference, in nats
    ===============  ===================================  ==============================================

    Attributes:
        kind: The kind of fault, from the table.
        quantity: The quantity concerned, or a further detail; may be empty.
        size: The size of the fault.
        noise: The standard error of the size, or NaN.
        verdict: The verdict that follows: ``"reweight"`` or ``"do not trust"``.
        of: For ``"whitened"``, ``"unclear"``, ``"doubt"`` and ``"far"``: whether it is a ``"mean"`` or an ``"sd"``.
        share: For ``"far"``: the share of the posterior's mass that is missing.

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
    share: float = math.nan

    @property
    def moment(self) -> str:
        """The quantity and its error, in words."""
        if (self.of or self.kind) == "mean":
            return f"mean of {self.quantity} off by {measured(self.size, self.noise, sign='+')} sd"
        if (self.of or self.kind) == "sd":
            return f"sd of {self.quantity} {measured(self.size, self.noise)} times the posterior's"
        return f"distribution function of {self.quantity} off by {measured(self.size, self.noise)}"

    @property
    def _share(self) -> str:
        share = self.share if self.kind == "far" else self.size
        if math.isnan(share):
            return "an unknown part"
        return "nearly all" if share > 0.995 else f"{share:.{0 if share >= LITTLE else 2}%}"

    def __str__(self) -> str:
        return WORDS[self.kind].format(f=self)


def measured(size: float, noise: float, sign: str = "") -> str:
    """Return a number with its standard error, in at least two decimals and as many as the error needs, up to four."""
    digits = min(4, math.ceil(-math.log10(noise))) if 0 < noise < 0.01 else 2
    return f"{size:{sign}.{digits}f} ± {noise:.{digits}f}"


def worst(findings: Sequence[Finding]) -> str:
    """Return the verdict that follows from all findings."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index, default="trust")


WORDS = {
    "mean": "The guide's draws are off ({f.moment}).",
    "sd": "The guide's draws are off ({f.moment}).",
    "shape": "The shape of the guide's draws is off ({f.moment}), whatever their means and sds are.",
    "outside": "The model has no density at {f.size:.1%} of the draws.",
    "outliers": "A few rare draws lie where the posterior has next to nothing (with them the sd of {f.quantity} is "
    "{f.size:.2f} times as large).",
    "weights": "The guide's draws count unequally: by their weights {f.size:.0%} of the mass is misplaced.",
    "mode": "A mode may be missing: the guide draws nothing where {f._share} of the posterior's mass was found.",
    "support": "The support of the guide's {f.quantity} leaves out {f._share} of the posterior's mass.",
    "neck": "The guide draws nothing in the neck of {f.quantity}, where {f._share} of the posterior's mass was found.",
    "far": "A little mass is missing, far away: {f._share} of the posterior's ({f.moment}).",
    "collapsed": "The guide has collapsed or lies elsewhere: it draws nothing where {f._share} of the posterior's mass "
    "was found, and chains drift ({f.quantity}).",
    "whitened": "The guide's correlations or tails are off ({f.moment}), though its means and sds are right.",
    "tails": "The weights have no mean (k-hat {f.size:.2f}): the guide's tails are too short.",
    "blind": "Hardly a draw of the prior has a density, so modes elsewhere could not be looked for.",
    "frozen": "The chains hardly move (acceptance {f.size:.2f}): is the gradient of the model's density finite?",
    "unclear": "It cannot be told whether the draws are right ({f.moment}).",
    "slow": "It cannot be told whether the draws are right: all numbers of {f.quantity!r} seem to share a scale, which "
    "chains change slowly.",
    "doubt": "The chains doubt that the draws are right ({f.moment}).",
    "evidence": "Mass is missing: the stage {f.quantity!r} has found {f.size:.2f} nats more evidence.",
}
EXACT = "pf.sample for exact draws, or pf.posterior"
SEARCH = "pf.anneal, which finds modes and needs no guide"
NEXT = {  # the first remedies of docs/trust.md, for draws that cannot be trusted
    "mean": f"Use {EXACT}.",
    "sd": f"Use {EXACT}.",
    "shape": f"Use {EXACT}.",
    "whitened": f"Use {EXACT}.",
    "outside": "Use pf.posterior, which goes on until draws can be trusted.",
    "outliers": "Use medians and quantiles.",
    "weights": "Use pf.resample(model, guide, ...).",
    "mode": f"Use {SEARCH}.",
    "neck": "Non-centre the latents of this scale by poutine.reparam and LocScaleReparam(0.0), or use pf.sample for "
    "exact draws.",
    "support": "Give the site a distribution over the model's support, or use AutoFlow(model).",
    "far": f"Use {SEARCH}.",
    "evidence": f"Use that fit, or {SEARCH}.",
    "collapsed": "Use pf.posterior, which goes on until draws can be trusted.",
    "tails": "Fit with more steps=, or give AutoFlow a base with wider tails.",
    "blind": "Choose a prior closer to what the data allow.",
    "frozen": "Remove hard edges of the model, or gradients that are not finite.",
    "slow": f"Give AutoFlow a base with wider tails, or use {EXACT}.",
    "unclear": "Check again with num_samples=40_000 and num_chains=1024.",
    "doubt": "Check again with num_samples=40_000 and num_chains=1024.",
}
