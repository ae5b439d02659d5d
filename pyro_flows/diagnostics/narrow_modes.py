"""The search for modes much narrower than the guide, within its draws and around them.

A population of few particles does not meet a narrow mode, and gradient ascents of log p end in the broad mode that
surrounds it.  The ratio h = log p - log q tells more: it is nearly constant where the guide q is right, so nothing
hides the slope of a narrow mode.  Here h is computed at many draws of the guide and at draws spread more widely.  The
largest values at each distance from the centre start ascents of h.

A narrow mode is a normal distribution with a share w of the mass and s times the guide's standard deviations in D
dimensions.  At its centre c, in coordinates where the guide is standard normal, it exceeds the guide by

    L = log(w / (1 - w)) - D log s + |c|² / 2

nats.  Its excess at a distance r is L - r² / (2 s²), and is visible up to the radius R = s √(2 (L + V)).  If h varies
by itself, as that of a trained guide does, V is about 0.  If the guide is exact apart from the mode, only rounding
limits it, and V is about 34 nats in double precision, 14 in single.  So N draws contain about

    N (2 π)^(-D/2) exp(-|c|² / 2) π^(D/2) / Γ(D/2 + 1) R^D

that show the mode.  No method that evaluates h at N draws finds a mode where this number is far below 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..programs.density import Density, Drawn
from ..sampling.coordinates import White
from ..vjp import LogDensity, value_and_score


@dataclass(frozen=True)
class NarrowModes:
    """Constants of the search for narrow modes.

    Attributes:
        draws: The places to look at.
        numbers: The most numbers that model and guide compute there.
        wide: The share of places that are spread more widely.
        widest: The largest factor by which they are.
        dims: The dimensions beyond which places lie too far apart.
        shells: Ranges of distances from the centre.
        tops: Ascents from each.
        steps: Steps of an ascent.
        longest: The length of the first step, in whitened units.
        shortest: That of the last.
        at_once: The places that run at once.
        share: The share of the mass of a mode that ``narrowest`` is about.
        shown: The draws that must show it, for a chance of 95 %.
    """

    draws: int = 100_000
    numbers: int = 20_000_000
    wide: float = 0.4
    widest: float = 4.0
    dims: int = 16
    shells: int = 16
    tops: int = 6
    steps: int = 40
    longest: float = 0.15
    shortest: float = 0.003
    at_once: int = 5000
    share: float = 0.1
    shown: float = 3.0


NARROW_MODES = NarrowModes()


def number_of_places(space: Density) -> int:
    """Return the number of places to look at in addition to given draws; 0 if a search is hopeless or too slow."""
    if space.task.runs_one_by_one or space.dim > NARROW_MODES.dims:
        return 0
    return min(NARROW_MODES.draws, NARROW_MODES.numbers // (space.task.model.largest + space.task.guide.largest))


def peaks(space: Density, density: LogDensity, white: White, draws: Drawn) -> Tensor:
    """Return the ends of ascents of log p - log q from the places where it is largest, ``(n, D)``.

    Args:
        space: The guide's space.
        density: The model's log-density.
        white: Coordinates in which the guide's draws have mean 0 and the identity as covariance.
        draws: Draws of the guide.
    """
    number = number_of_places(space)
    if not number:
        return draws.z[:0]

    def ratio(x: Tensor) -> Tensor:
        z, _ = white.forward(x)
        return density(z) - space.log_q(z)

    more = white.inverse(space.vectors(number, 2 * NARROW_MODES.at_once))
    wide = int(NARROW_MODES.wide * number)
    more[:wide] *= NARROW_MODES.widest ** torch.rand(wide, 1).to(more)
    with torch.no_grad():
        found = torch.cat([draws.log_p - draws.log_q, *map(ratio, more.split(NARROW_MODES.at_once))])
    x, found = torch.cat((white.inverse(draws.z), more)), found.nan_to_num(-math.inf, -math.inf, -math.inf)
    # In each shell by itself, because the ratio of a good guide may be largest in its tails.
    shells = x.norm(dim=-1).argsort().tensor_split(NARROW_MODES.shells)
    starts = torch.cat([shell[found[shell].topk(min(NARROW_MODES.tops, len(shell))).indices] for shell in shells])
    return white.forward(_ascended(ratio, x[starts]))[0]


def _ascended(ratio: LogDensity, x: Tensor) -> Tensor:
    """Return the highest places on paths uphill, with steps of given lengths since slopes differ by many magnitudes."""
    best, highest = x.clone(), torch.full_like(x[:, 0], -math.inf)
    for step in range(NARROW_MODES.steps):
        height, slope = value_and_score(ratio, x)
        is_higher = height.to(x) > highest
        best[is_higher], highest[is_higher] = x[is_higher], height.to(x)[is_higher]
        slope = slope.nan_to_num(0, 0, 0)
        shortest = NARROW_MODES.shortest / NARROW_MODES.longest
        length = NARROW_MODES.longest * shortest ** (step / (NARROW_MODES.steps - 1))
        x = x + length * slope / slope.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return best


def narrowest(space: Density, drawn: int) -> float:
    """Return the scale of the narrowest mode that the search finds with a chance of 95 %, given a number of draws."""
    places = number_of_places(space)
    return narrowest_shown(space.dim, drawn + places - int(NARROW_MODES.wide * places)) if places else 1.0


def narrowest_shown(dim: int, number: int) -> float:
    """Return the scale of the narrowest mode that a number of draws shows with a chance of 95 %.

    It is relative to the guide's standard deviations.  The mode has a tenth of the mass, and lies where the guide has
    its mean log-density.  Guides whose ratio to the posterior is exactly constant elsewhere show narrower ones.
    """

    def shown(scale: float) -> float:
        excess = math.log(NARROW_MODES.share / (1 - NARROW_MODES.share)) - dim * math.log(scale) + dim / 2
        radius = scale * math.sqrt(2 * max(excess, 0.0))
        return number * math.exp(-dim / 2) * (radius / math.sqrt(2)) ** dim / math.gamma(dim / 2 + 1)

    scales = [0.001 * 1.05**step for step in range(142)]  # up to about 1
    return next((scale for scale in scales if shown(scale) > NARROW_MODES.shown), 1.0)
