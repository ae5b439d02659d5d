"""Findings: the faults of a guide's draws as data, a sentence for each, and the rules that find them.

The verdict is a fold over findings: the worst that follows from any of them.  To add a finding, add a line to the table
of kinds, its words to ``WORDS``, a remedy to ``NEXT``, and a rule to ``FAULTS``, or to ``_doubts`` for a question that
remains open.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import NormalDist

import torch
from torch import Tensor

from ..sampling.chains import MOVES
from .drift import TOLERANCE, Drift
from .measurements import Measurements, certainty

VERDICTS = "trust", "reweight", "do not trust"  # from the best to the worst


@dataclass(frozen=True)
class Judgement:
    """Limits of the judgement.

    Attributes:
        doubt: The standard errors of an error that chains alone must show, beyond those that certainty adds.
        outside: The share of draws without a density that numerical overflow may explain.
        unequal: The total variation distance beyond which reliable weights must be used.
        lost: The largest share of the posterior's mass that a trusted guide may miss.
        collapsed: The missing share from which a guide that lacks a neck lacks the rest as well.
        khat: The k-hat beyond which weights have no mean.
        chance: The chance that chains and weights that agree are taken to differ.
    """

    doubt: float = 2.5
    outside: float = 0.002
    unequal: float = 0.4
    lost: float = 0.05
    collapsed: float = 0.5
    khat: float = 1.0
    chance: float = 0.0027


JUDGEMENT = Judgement()


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
        """The quantity and its error in words, with two to four decimals as the noise needs."""
        of, digits = self.of or self.kind, 2
        if 0 < self.noise < 0.01:
            digits = min(4, math.ceil(-math.log10(self.noise)))
        error = f"{self.size:{'+' if of == 'mean' else ''}.{digits}f} ± {self.noise:.{digits}f}"
        if of == "sd":
            return f"sd of {self.quantity} {error} times the posterior's"
        what = f"{'mean' if of == 'mean' else 'distribution function'} of {self.quantity}"
        return f"{what} off by {error}{' sd' if of == 'mean' else ''}"

    @property
    def missed(self) -> str:
        """The share of the posterior's mass that is missing, in words."""
        share = self.share if self.kind == "far" else self.size
        if math.isnan(share):
            return "an unknown part"
        return "nearly all" if share > 0.995 else f"{share:.{0 if share >= 0.05 else 2}%}"

    @property
    def next(self) -> str:
        """The next step, in a sentence."""
        return NEXT[self.kind]

    def __str__(self) -> str:
        return WORDS[self.kind].format(f=self)


def worst(findings: Sequence[Finding]) -> str:
    """Return the verdict that follows from all findings."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index, default="trust")


OFF = "The guide's draws are off ({f.moment})."
WORDS = {  # for each kind of finding f
    "mean": OFF,
    "sd": OFF,
    "shape": "The shape of the guide's draws is off ({f.moment}), whatever their means and sds are.",
    "outside": "The model has no density at {f.size:.1%} of the draws.",
    "outliers": "A few rare draws lie where the posterior has next to nothing (with them the sd of {f.quantity} is "
    "{f.size:.2f} times as large).",
    "weights": "The guide's draws count unequally: by their weights {f.size:.0%} of the mass is misplaced.",
    "mode": "A mode may be missing: the guide draws nothing where {f.missed} of the posterior's mass was found.",
    "support": "The support of the guide's {f.quantity} leaves out {f.missed} of the posterior's mass.",
    "neck": "The guide draws nothing in the neck of {f.quantity}, where {f.missed} of the posterior's mass was found.",
    "far": "A little mass is missing, far away: {f.missed} of the posterior's ({f.moment}).",
    "collapsed": "The guide has collapsed or lies elsewhere: it draws nothing where {f.missed} of the posterior's mass "
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
EXACT = "Use pf.sample for exact draws, or pf.posterior."
DOOR = "Use pf.posterior, which goes on until draws can be trusted."
ANNEAL = "Use pf.anneal, which finds modes and needs no guide."
AGAIN = "Check again with num_samples=40_000 and num_chains=1024."
NEXT = {  # the first remedy of docs/trust.md for each kind of draws that cannot be trusted
    **dict.fromkeys(("mean", "sd", "shape", "whitened"), EXACT),
    **dict.fromkeys(("outside", "collapsed"), DOOR),
    **dict.fromkeys(("mode", "far"), ANNEAL),
    **dict.fromkeys(("unclear", "doubt"), AGAIN),
    "outliers": "Use medians and quantiles.",
    "weights": "Use pf.resample(model, guide, ...).",
    "support": "Give the site a distribution over the model's support, or use AutoFlow(model).",
    "neck": "Non-centre the latents of this scale by poutine.reparam and LocScaleReparam(0.0), or use pf.sample for "
    "exact draws.",
    "tails": "Fit with more steps=, or give AutoFlow a base with wider tails.",
    "blind": "Choose a prior closer to what the data allow.",
    "frozen": "Remove hard edges of the model, or gradients that are not finite.",
    "slow": "Give AutoFlow a base with wider tails, or use pf.sample for exact draws, or pf.posterior.",
    "evidence": "Use that fit, or pf.anneal, which finds modes and needs no guide.",
}


def judge(seen: Measurements) -> list[Finding]:
    """Return all faults that measurements show, or the gravest doubt if it shows none."""
    return [fault for rule in FAULTS for fault in rule(seen)] or [*islice(_doubts(seen), 1)]


def worst_moment(drift: Drift, names: Sequence[str], among: Tensor | None = None, kind: str = "") -> Finding:
    """Return a finding of the largest error, or of the most significant one among some errors, ``(2, K)``."""
    clear = drift.errors if among is None else (drift.errors / drift.noise.clamp_min(1e-12)).where(among, -1)
    is_sd, i = divmod(int(clear.argmax()), len(names))
    size, noise = (drift.ratio, drift.ratio_se) if is_sd else (drift.error, drift.error_se)
    of = "sd" if is_sd else "mean"
    return Finding(kind or of, names[i], float(size[i]), float(noise[i]), of=of)


def _flags(seen: Measurements) -> tuple[Tensor, Tensor]:
    """Return True for each certain error, ``(2, K)``: of chains, and of weights."""
    of_weights = seen.weighted.flagged(TOLERANCE.certain) & seen.psis.reliable
    return seen.chains.flagged(certainty(seen.psis, seen.weighted)), of_weights


def _elsewhere(seen: Measurements) -> Iterator[Finding]:
    """Yield findings of mass that the guide misses."""
    share, noise, _, error, _, neck, outside, *_ = seen.missing
    if outside and not share <= max(JUDGEMENT.lost, noise):  # also if the share is unknown
        yield Finding("support", outside, share, noise)
    elif share > max(JUDGEMENT.lost, noise):  # mass within its noise still counts
        flags, _ = _flags(seen)
        if neck and share < JUDGEMENT.collapsed:
            yield Finding("neck", neck, share, noise)
        elif bool(flags.any()):
            yield Finding("collapsed", worst_moment(seen.chains, seen.names, flags).moment, share, noise)
        else:
            yield Finding("mode", "", share, noise)
    elif error is not None and share > noise:
        far = (error.errors > TOLERANCE.right) & (error.errors > 2 * error.noise)
        if bool(far.any()):
            found = replace(worst_moment(error, seen.names, far, "far"), share=share)
            yield Finding("neck", f"{neck} ({found.moment})", share, noise) if neck else found


def _failed(seen: Measurements) -> Iterator[Finding]:
    """Yield findings of a search and of chains that failed."""
    if seen.missing.is_blind:
        yield Finding("blind")
    if max(seen.acceptance) < MOVES.frozen:
        yield Finding("frozen", "", max(seen.acceptance))


def _off(seen: Measurements) -> Iterator[Finding]:
    """Yield the most significant certain error of a moment."""
    for drift, flags in zip((seen.chains, seen.weighted), _flags(seen), strict=True):
        if bool(flags.any()):
            mended = seen.psis.reliable and _agree(seen.chains, seen.weighted)
            yield replace(worst_moment(drift, seen.names, flags), verdict="reweight" if mended else "do not trust")
            return


def _agree(chains: Drift, weighted: Drift) -> bool:
    """Return True if chains and weights show the same errors."""
    apart, noise = (chains.signed - weighted.signed).abs(), chains.noise.hypot(weighted.noise)
    size = 1 + weighted.errors  # large errors need only agree in proportion
    level = NormalDist().inv_cdf(1 - JUDGEMENT.chance / 2 / apart.numel())  # one of many numbers may be apart by 3
    is_apart = (apart > TOLERANCE.flag * size) & (apart > level * noise)
    return not bool(is_apart.any()) and bool((weighted.noise < TOLERANCE.right * size).all())


def _in_rows(seen: Measurements) -> Iterator[Finding]:
    """Yield the certain errors of means that the weights of single rows show, for each set of plates."""
    for rows in seen.rows:
        if rows.is_off(TOLERANCE.right):
            yield Finding("mean", rows.name, rows.error, rows.noise)


def _outside(seen: Measurements) -> Iterator[Finding]:
    """Yield findings of draws without a density, and of rare draws that spoil a moment."""
    verdict = "reweight" if seen.psis.reliable else "do not trust"
    outside = float((seen.psis.log_weights == -torch.inf).double().mean())
    if outside > JUDGEMENT.outside:
        yield Finding("outside", "", outside, verdict=verdict)
    ratios = (1 + seen.outliers).sqrt()
    if bool((ratios > 1 + TOLERANCE.right).any()):
        i = int(ratios.argmax())
        yield Finding("outliers", seen.names[i], float(ratios[i]), verdict=verdict)


def _misshapen(seen: Measurements) -> Iterator[Finding]:
    """Yield the most significant error of a distribution function that is certain."""
    of_chains, of_weights = seen.shapes
    told = seen.psis.reliable and bool(of_weights.flagged.any())
    shape, verdict = (of_weights, "reweight") if told else (of_chains, "do not trust")
    if bool(shape.flagged.any()):
        i = int(shape.significance.argmax())
        name = [*seen.names, "the distance from the middle"][i]
        yield Finding("shape", name, float(shape.error[i]), float(shape.error_se[i]), verdict)


def _unequal(seen: Measurements) -> Iterator[Finding]:
    """Yield reliable weights that are very unequal; those of many latents always are, as small errors add up."""
    weights = seen.psis.smoothed.exp() * len(seen.psis.smoothed)
    apart = float((weights - 1).abs().mean()) / 2  # the total variation distance between guide and posterior
    if seen.psis.reliable and apart > JUDGEMENT.unequal and not seen.spreads:
        yield Finding("weights", "", apart, verdict="reweight")


FAULTS = _elsewhere, _failed, _off, _in_rows, _outside, _misshapen, _unequal  # the rules


def _doubts(seen: Measurements) -> Iterator[Finding]:
    """Yield doubts about draws without a certain error, the gravest first."""
    psis, chains, directions = seen.psis, seen.chains, seen.directions
    labels = [f"whitened direction {i}" for i in range(len(directions.error))]
    if bool((bent := directions.beyond(TOLERANCE.bent)).any()):
        yield worst_moment(directions, labels, bent, "whitened")
    if psis.khat >= JUDGEMENT.khat and not psis.even and not seen.spreads:
        yield Finding("tails", "", psis.khat)
    if seen.spreads and not psis.even:
        for name, error, noise, slowness in zip(*seen.spreads, strict=True):
            if slowness >= TOLERANCE.slow:
                yield Finding("slow", name, float(slowness))
            if error.abs() + noise >= TOLERANCE.right:
                yield Finding("unclear", f"all of {name}", 1 / (1 + float(error)), float(noise), of="sd")
    told = torch.maximum(seen.moments.errors, seen.moments.noise) <= TOLERANCE.right  # False for NaN, from overflow
    if not bool(told.all()):
        yield worst_moment(seen.moments, seen.names, kind="unclear")
    dim = (directions.noise > TOLERANCE.bent) & (directions.variance > 1)
    if seen.spreads and bool(dim.any()):
        yield worst_moment(directions, labels, dim, "unclear")
    more = JUDGEMENT.doubt + certainty(psis, seen.weighted) - TOLERANCE.certain
    doubtful = (chains.errors > TOLERANCE.right) & (chains.errors > more * chains.noise)
    doubtful[1] &= chains.variance > 1  # guides that are too narrow, which weights cannot show
    if bool(doubtful.any()):
        yield worst_moment(chains, seen.names, doubtful, "doubt")
