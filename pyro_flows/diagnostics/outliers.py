"""Rare draws of a guide, far out, where the posterior has almost no density.

A flow may move one draw in 100,000 so far that this draw dominates a mean or a standard deviation.  10,000 weighted
draws rarely contain one.  So many more draws are taken, in single precision, and the model runs at the outermost only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..guides import AutoFlow
from ..programs.latent_space import LatentSpace, Scored
from ..programs.log_density import or_nan
from .importance import Psis

DRAWS, NUMBERS = 100_000, 20_000_000  # draws of the guide, limited by the count of their numbers
OUTERMOST = 5  # draws at each end of each coordinate
BATCH = 10_000


@torch.no_grad()
def outliers(space: LatentSpace, draws: Scored, psis: Psis) -> Tensor:
    """Return the relative increase of each variance by rare draws that the posterior lacks, ``(K,)``.

    Args:
        space: The guide's space.
        draws: Draws of the guide.
        psis: Their weights.
    """
    more = min(DRAWS, NUMBERS // space.dim) - len(draws.z)
    z = torch.cat([draws.z, _drawn(space, more)]) if more > 0 else draws.z
    ends = [z.topk(OUTERMOST, 0, largest=largest).indices.flatten() for largest in (True, False)]
    outer = z[torch.cat(ends).unique()]
    log_weights = or_nan(space.log_p)(outer) - space.log_q(outer) - psis.log_evidence
    lacks = (1 - log_weights.nan_to_num(0.0).exp()).clamp_min(0).double().unsqueeze(-1)
    quantities = draws.quantities.double()
    chances = psis.smoothed.exp() if psis.reliable else torch.full_like(psis.smoothed, 1 / len(draws.z))
    chances = chances.to(quantities).unsqueeze(-1)
    mean = (chances * quantities).sum(0)
    variance = (chances * (quantities - mean).square()).sum(0)
    excess = (lacks * (space.quantities(outer).double() - mean).square()).sum(0) / len(z)
    return (excess / variance).nan_to_num(0.0)


def _drawn(space: LatentSpace, number: int) -> Tensor:
    guide = space.task.guide.call
    if isinstance(guide, AutoFlow) and guide.draws_from_flow:
        return guide.sample_roughly(number)
    return space.draw_alone(number, BATCH)
