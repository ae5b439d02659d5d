"""The look at a guide of up to 1,000 latents.

Importance weights and short chains follow all quantities, and a search looks for mass that the guide misses.  Many more
draws show whether a few lie where the posterior has no density.  A slow model gets few draws, and no search.
"""

import torch
from torch import Tensor

from ..guides import AutoFlow
from ..programs.density import Density, Drawn
from .drift import weighted_drift, weighted_shape
from .guide_space import guide_coordinates
from .importance import WEIGHING, Psis
from .measurements import SHORT_RUN, Measurements, certainty, follow, weighed
from .missing_modes import further_draws, search
from .unreached import unreached

DRAWS = 100_000  # among which rare ones are looked for
OUTERMOST = 5  # of them at each end of each coordinate, that the model runs at


def look(space: Density, num_samples: int | None, num_chains: int | None) -> Measurements:
    """Measure the errors of a guide of few latents.

    Args:
        space: The guide's space.
        num_samples: The number of weighted draws, or None.
        num_chains: The number of chains, or None.
    """
    alone, slow = space.task.runs_one_by_one, WEIGHING.too_slow(space.task)
    draws, psis = weighed(space, num_samples or WEIGHING.number(space.task, space.dim), WEIGHING.batch)
    # Whitened by themselves, draws would lie nearer to the middle than other draws of the guide do.
    charts, white = guide_coordinates(space, draws.z[::2])

    def shaped(quantities: Tensor, z: Tensor) -> Tensor:
        """Append the squared distance of z from the centre, ``(N, K + 1)``, unless some latents are angles."""
        if space.read.angles:
            return quantities
        return torch.cat((quantities, white.inverse(z).square().sum(-1, keepdim=True)), -1)

    weighted = weighted_drift(draws.quantities, psis.smoothed)
    of_weights = weighted_shape(shaped(draws.quantities, draws.z), psis.smoothed)
    began = space.draw(num_chains or (SHORT_RUN.alone if alone else SHORT_RUN.chains))
    chains, along, shape, acceptance, _ = follow(space, charts, draws, began, certainty(psis, weighted), shaped)
    rare = torch.zeros_like(weighted.error)
    if slow:
        missing = unreached(space.task)
    else:
        others = further_draws(space, draws)
        missing = search(space, white, draws, others, psis.log_evidence)
        rare = rare if alone else outliers(space, draws, others.z, psis)
    scope = f"There was no search for other modes, since {slow}." if slow else ""
    scope = f"The search for other modes ended early, since {missing.cut}." if missing.cut else scope
    measured = psis, chains, along, weighted, (shape, of_weights), space.read.names, missing, rare, acceptance
    return Measurements(*measured, scope=scope)


@torch.no_grad()
def outliers(space: Density, draws: Drawn, others: Tensor, psis: Psis) -> Tensor:
    """Return the relative increase of each variance by rare draws where the posterior has almost no density, ``(K,)``.

    A flow may move one draw in 100,000 so far that this draw dominates a mean or a standard deviation.  10,000 weighted
    draws rarely contain one.  So many more are taken, in single precision, and the model runs at the outermost only.

    Args:
        space: The guide's space.
        draws: Draws of the guide.
        others: The vectors of further draws, ``(n, D)``.
        psis: Their weights.
    """
    z, guide = torch.cat((draws.z, others)), space.task.guide.call
    more = min(DRAWS, WEIGHING.held // space.dim) - len(z)
    if more > 0 and isinstance(guide, AutoFlow) and guide.draws_from_flow:
        z = torch.cat((z, guide.sample_roughly(more)))
    elif more > 0:
        z = torch.cat((z, space.vectors(more, 10 * WEIGHING.batch)))
    ends = [z.topk(OUTERMOST, 0, largest=largest).indices.flatten() for largest in (True, False)]
    outer = z[torch.cat(ends).unique()]
    log_weights = space.log_prob(outer) - space.log_q(outer) - psis.log_evidence
    lacks = (1 - log_weights.nan_to_num(0.0).exp()).clamp_min(0).double().unsqueeze(-1)
    quantities = draws.quantities.double()
    chances = psis.smoothed.exp() if psis.reliable else torch.full_like(psis.smoothed, 1 / len(draws.z))
    chances = chances.to(quantities).unsqueeze(-1)
    mean = (chances * quantities).sum(0)
    variance = (chances * (quantities - mean).square()).sum(0)
    excess = (lacks * (space.quantities(outer).double() - mean).square()).sum(0) / len(z)
    return (excess / variance).nan_to_num(0.0)
