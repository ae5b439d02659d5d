"""The look at a guide of up to 1,000 latents.

Importance weights and short chains follow all quantities, and a search looks for mass that the guide misses.  Many more
draws show whether a few lie where the posterior has no density.  A slow model gets few draws, and no search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..guides import AutoFlow
from ..programs.density import Density, Drawn
from ..sampling.coordinates import Coordinates, White
from .drift import TOLERANCE, Drift, DriftMeter, Shape, ShapeMeter, weighted_drift, weighted_shape
from .guide_space import guide_coordinates
from .importance import WEIGHING, Psis
from .measurements import Measurements, certainty, weighed
from .missing_modes import search
from .short_chains import SHORT_RUN, adapted
from .unreached import unreached


@dataclass(frozen=True)
class FewLatents:
    """Constants of a look at few latents.

    Attributes:
        at_once: The draws that run at once.
        chains: The chains.
        alone: The chains of a model that runs one draw at a time.
        block: The sweeps between two tests of whether the chains have run for long enough.
        spare: The standard errors by which an error must be right, unless weights and chains agree.
        draws: The draws among which rare ones are looked for.
        numbers: The most numbers in these draws.
        outermost: The draws of them at each end of each coordinate that the model runs at.
    """

    at_once: int = 1000
    chains: int = 256
    alone: int = 16
    block: int = 10
    spare: float = 1.5
    draws: int = 100_000
    numbers: int = 20_000_000
    outermost: int = 5


FEW_LATENTS = FewLatents()


def look(space: Density, num_samples: int | None, num_chains: int | None) -> Measurements:
    """Measure the errors of a guide of few latents.

    Args:
        space: The guide's space.
        num_samples: The number of weighted draws, or None.
        num_chains: The number of chains, or None.
    """
    alone, slow = space.task.runs_one_by_one, WEIGHING.too_slow(space.task)
    draws, psis = weighed(space, num_samples or WEIGHING.number(space.task, space.dim), FEW_LATENTS.at_once)
    # Whitened by themselves, draws would lie nearer to the middle than other draws of the guide do.
    charts, white = guide_coordinates(space, draws.z[::2])
    weighted = weighted_drift(draws.quantities, psis.smoothed)
    of_weights = weighted_shape(_with_distance(space, white, draws.quantities, draws.z), psis.smoothed)
    began = space.draw(num_chains or (FEW_LATENTS.alone if alone else FEW_LATENTS.chains))
    certain = certainty(psis, weighted)
    chains, directions, shape, acceptance = _followed(space, charts, white, draws, began, certain)
    missing = unreached(space.task) if slow else search(space, white, draws, psis.log_evidence)
    rare = torch.zeros_like(weighted.error) if alone or slow else outliers(space, draws, psis)
    scope = f"There was no search for other modes, since {slow}." if slow else ""
    measured = chains, directions, weighted, (shape, of_weights), space.read.names
    return Measurements(psis, *measured, missing, rare, acceptance, scope=scope)


@torch.no_grad()
def _followed(
    space: Density, charts: list[Coordinates], white: White, draws: Drawn, began: Drawn, certain: float
) -> tuple[Drift, Drift, Shape, list[float]]:
    """Run chains from draws of the guide until their drift is decided.

    Args:
        space: The guide's space.
        charts: The coordinates of the chains.
        white: Coordinates in which every second draw of the guide has mean 0 and the identity as covariance.
        draws: Draws of the guide.
        began: The draws that the chains start from.
        certain: The standard errors by which an error of the guide is certain.

    Returns:
        The errors of moments, those along directions, those of distribution functions, and the acceptance.
    """
    runs = space.task.budget(WEIGHING.seconds)
    chains, places = adapted(runs.counted(space.log_prob), charts, began.z)
    axes = _axes(white.inverse(places))
    if space.read.angles:  # because periodic coordinates have neither mean nor variance
        axes = axes[:, :0]
    others = Drawn(*(part[1::2] for part in draws))
    meter = DriftMeter(draws.quantities, began.quantities)
    shape = ShapeMeter(*(_with_distance(space, white, some.quantities, some.z) for some in (others, began)))
    compass = DriftMeter(*(white.inverse(some.z) @ axes for some in (others, began)))
    spare = 0.0 if certain > TOLERANCE.certain else FEW_LATENTS.spare
    for block in range(SHORT_RUN.sweeps // FEW_LATENTS.block):
        for z in chains.sweeps(FEW_LATENTS.block, adapt=False):
            quantities = space.quantities(z)
            meter.record(quantities)
            shape.record(_with_distance(space, white, quantities, z))
            compass.record(white.inverse(z) @ axes)
        drift = meter.drift()
        if drift.is_right(spare) or (block > 0 and bool(drift.flagged(certain).any())) or runs.is_spent:
            break
    along = compass.drift().unless_beyond(TOLERANCE.bent, compass.so_far())
    return drift, along, shape.shape(), chains.acceptance


def _with_distance(space: Density, white: White, quantities: Tensor, z: Tensor) -> Tensor:
    """Append the squared distance of z from the centre, ``(N, K) -> (N, K + 1)``, unless some latents are angles."""
    if space.read.angles:
        return quantities
    return torch.cat((quantities, white.inverse(z).square().sum(-1, keepdim=True)), -1)


def _axes(x: Tensor) -> Tensor:
    """Return all directions of whitened places ``(N, D)``, and the two in which they spread least and most."""
    covariance = torch.cov(x.T).reshape(x.shape[1], x.shape[1])
    extremes = torch.linalg.eigh(covariance).eigenvectors[:, [0, -1]]
    return torch.cat((torch.eye(len(covariance)).to(extremes), extremes), -1)


@torch.no_grad()
def outliers(space: Density, draws: Drawn, psis: Psis) -> Tensor:
    """Return the relative increase of each variance by rare draws where the posterior has almost no density, ``(K,)``.

    A flow may move one draw in 100,000 so far that this draw dominates a mean or a standard deviation.  10,000 weighted
    draws rarely contain one.  So many more are taken, in single precision, and the model runs at the outermost only.

    Args:
        space: The guide's space.
        draws: Draws of the guide.
        psis: Their weights.
    """
    more = min(FEW_LATENTS.draws, FEW_LATENTS.numbers // space.dim) - len(draws.z)
    z = torch.cat([draws.z, _drawn(space, more)]) if more > 0 else draws.z
    ends = [z.topk(FEW_LATENTS.outermost, 0, largest=largest).indices.flatten() for largest in (True, False)]
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


def _drawn(space: Density, number: int) -> Tensor:
    guide = space.task.guide.call
    if isinstance(guide, AutoFlow) and guide.draws_from_flow:
        return guide.sample_roughly(number)
    return space.vectors(number, 10 * FEW_LATENTS.at_once)
