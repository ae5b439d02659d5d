"""From what weights, chains and search have seen to a verdict in words.

A guide's draws are to be trusted if each mean is right to a tenth of a standard deviation, each standard deviation to a
tenth of itself, and hardly any mass is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chains import FROZEN
from .drift import Drift
from .importance import Psis
from .modes import Missing

LIMIT = 0.1  # errors beyond this, in standard deviations, are not to be trusted
BENT = 0.3  # the same along whitened directions, for which correlations and far tails count
FLAG, SURE = 0.08, 0.05  # what an error must exceed, and what it must exceed by three standard errors, to be a drift
DOUBT = 2.5  # how many standard errors an error beyond the limit must have that chains alone see
CALM = 0.5  # k-hat below which weights that see no error are believed more
WORST_KHAT = 1.0  # beyond this the weights have no mean


def _flagged(drift: Drift) -> Tensor:
    """Which errors are there for sure, ``(2, K)``."""
    return (drift.errors > FLAG) & (drift.errors - 3 * drift.noise > SURE)


def is_off(drift: Drift) -> bool:
    """Whether any error is there for sure."""
    return bool(_flagged(drift).any())


def judge(
    psis: Psis,
    chains: Drift,
    directions: Drift,
    weighted: Drift,
    names: list[str],
    missing: Missing,
    acceptance: list[float],
) -> tuple[str, str]:
    """The verdict and the reason for it."""
    off = next((drift for drift in (chains, weighted)[: 1 + psis.reliable] if is_off(drift)), None)
    words = off.worst(names, _flagged(off)) if off else ""
    if missing.is_grave:
        lost = (
            f"{missing.share:.0%} of the posterior's mass, as far as it was found, lies where the guide draws nothing"
        )
        if off is chains:
            return "do not trust", f"The guide has collapsed or lies elsewhere: {lost}, and chains drift ({words})."
        return "do not trust", f"A mode may be missing: {lost}."
    if max(acceptance) < FROZEN:
        frozen = f"The chains hardly move (acceptance {max(acceptance):.2f})"
        return "do not trust", f"{frozen}: is the gradient of the model's density finite?"
    if off and psis.reliable and _agree(chains, weighted):
        return "reweight", (
            f"The guide's draws are off ({words}), but their weights are reliable (k-hat {psis.khat:.2f}) and agree "
            "with the chains: resample the draws by their weights."
        )
    if off:
        return "do not trust", f"The guide's draws are off ({words})."
    bent = directions.errors - 3 * directions.noise > BENT
    if bool(bent.any()):
        words = directions.worst([f"whitened direction {i}" for i in range(len(directions.error))], bent)
        return (
            "do not trust",
            f"The guide's correlations or tails are off ({words}), though its means and sds are right.",
        )
    if psis.khat >= WORST_KHAT:
        return "do not trust", f"The weights have no mean (k-hat {psis.khat:.2f}): the guide's tails are too short."
    seen = chains.pooled_with(weighted) if psis.reliable else chains
    if not bool(
        (torch.maximum(seen.errors, seen.noise) <= LIMIT).all()
    ):  # nor where chains have overflown to no number
        return "do not trust", f"It cannot be told whether the draws are right ({seen.worst(names)})."
    doubtful = (chains.errors > LIMIT) & (chains.errors > DOUBT * chains.noise)
    doubtful[1] &= chains.variance > 1  # too narrow: what weights cannot see
    if bool(doubtful.any()):
        return "do not trust", f"The chains doubt that the draws are right ({chains.worst(names, doubtful)})."
    largest = max(0.01, float(seen.errors.max()))
    found = f"Weights, chains and search find no error of a mean or sd beyond {largest:.2f} sd."
    if not psis.reliable:
        found += f" Use the draws as they are: their weights are not reliable (k-hat {psis.khat:.2f})."
    return "trust", found


def _agree(chains: Drift, weighted: Drift) -> bool:
    """Whether chains and weights see the same errors."""
    signed = [torch.stack((drift.error, (drift.variance - 1) / 2)) for drift in (chains, weighted)]
    apart, noise = (signed[0] - signed[1]).abs(), chains.noise.hypot(weighted.noise)
    size = 1 + weighted.errors  # large errors need only be seen alike in proportion
    return not bool(((apart > FLAG * size) & (apart > 3 * noise)).any()) and bool((weighted.noise < LIMIT * size).all())
