"""Modes of a density: where climbs lead, and which places belong together.

Two places are of one mode if the density does not fall between them.  It is looked at between each place and its
nearest neighbours only: so a ring is one mode, and so is anything else that is connected.  A place in a valley leads up
to several tops, and belongs to the one next to it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..programs.log_density import LogDensity, value_and_score
from .coordinates import White

CLIMB = 60  # steps of a climb
PATIENCE = 5  # steps after which a climb looks whether it is at a top
TOP = 0.002  # the square of the slope where a top is no more than .001 nats away
NEIGHBOURS = 6
SOME, NARROW, FAR = 256, 0.1, 0.2  # draws of the prior that climbs start from; their steps, in its sds, also far out
DIP = 1.0  # nats by which the density must fall between two places that are of two modes
BETWEEN = 6  # places where it is looked at, none at a fixed share of the way, where a lattice has further modes
BATCH = 4096  # places that are looked at together
WAYPOINTS, STEPS = 12, (0.5, 0.1, 0.02)  # on the way of a climb; the sizes of its steps, each for what leapt before


def climb(density: LogDensity, chart: White, z: Tensor, size: float = 0.5, least: float = -math.inf) -> Tensor:
    """The highest places on ways uphill in a chart, each coordinate at its own pace: Adam, with steps that shrink.

    Args:
        density: The log-density.
        chart: The coordinates.
        z: The places to start from, ``(N, D)``.
        size: How far each coordinate moves in the first step; a climb ends within 30 times that.
        least: The log-density to reach.  A climb ends if its way is too short for that at the slope of its best place.
    """
    x = chart.inverse(z)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    best, highest, uphill = x.clone(), torch.full_like(x[:, 0], -math.inf), torch.zeros_like(x)
    left = torch.arange(len(x), device=x.device)  # who still climbs
    for step in range(1, CLIMB + 1):
        height, score = _height_and_score(density, chart, x)
        is_higher = height > highest[left]
        higher = left[is_higher]
        best[higher], highest[higher], uphill[higher] = x[is_higher], height[is_higher], score[is_higher]
        first, second = 0.8 * first + 0.2 * score, 0.9 * second + 0.1 * score.square()
        ahead = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
        x = x + size * (1 - step / (CLIMB + 1)) * ahead
        if step % PATIENCE == 1:
            goes_on = ~_ends(density, chart, left, best, highest, uphill)
            way = size * (CLIMB - step) ** 2 / (2 * CLIMB)  # that is left to each coordinate
            goes_on &= highest[left] + way * uphill[left].abs().sum(-1) >= least
            left, x, first, second = left[goes_on], x[goes_on], first[goes_on], second[goes_on]
            if not len(left):
                break
    return chart.forward(best)[0]


def _ends(density: LogDensity, chart: White, left: Tensor, best: Tensor, highest: Tensor, uphill: Tensor) -> Tensor:
    """Try a step of Newton's from the best places of some climbs, ``left``, and return True where it ends a climb.

    Where the chart whitens the mode, the step leads to its top, and the slope vanishes.  In flat tails it does not.
    """
    x, before = best[left] + uphill[left], uphill[left].square().sum(-1)
    height, score = _height_and_score(density, chart, x)
    is_higher = height > highest[left]
    higher = left[is_higher]
    best[higher], highest[higher], uphill[higher] = x[is_higher], height[is_higher], score[is_higher]
    after = score.square().sum(-1)
    return is_higher & (after < before / 4) & (after < TOP)


def _height_and_score(density: LogDensity, chart: White, x: Tensor) -> tuple[Tensor, Tensor]:
    """The log-density, ``(N,)``, -inf where it is no number, and its gradient, ``(N, D)``, 0 where it is none."""
    height, score = value_and_score(lambda x: density(chart.forward(x)[0]), x)
    # Data in double precision give the log-density their dtype, whatever that of the latents.
    return height.to(x).nan_to_num(-math.inf, -math.inf, -math.inf), score.nan_to_num(0, 0, 0)


def ascend(density: LogDensity, chart: White, z: Tensor) -> Tensor:
    """Climb within modes: where a climb has leapt over a valley it is made again in shorter steps, or not at all."""
    ends = z.clone()
    left = torch.arange(len(z), device=z.device)
    for size in STEPS:
        found = climb(density, chart, z[left], size)
        ends[left] = found
        left = left[_leaps(density, z[left], found)]
        if not len(left):
            return ends
    ends[left] = z[left]
    return ends


@torch.no_grad()
def _leaps(density: LogDensity, z: Tensor, ends: Tensor) -> Tensor:
    """Return True, for each of N pairs of places, if the density falls on the way from the first to the second."""
    shares = torch.arange(1, WAYPOINTS).to(z) / WAYPOINTS
    ways = z + shares.view(-1, 1, 1) * (ends - z)
    heights = density(ways.flatten(0, 1)).view(len(shares), -1).nan_to_num(-math.inf, math.inf, -math.inf)
    return (heights < density(z).nan_to_num(-math.inf, math.inf, -math.inf) - DIP).any(0)


def ways_up(density: LogDensity, z: Tensor, least: float = -math.inf) -> Tensor:
    """Places to look for modes from that a population misses, given draws of the prior: the origin, the middle of the
    draws and places between that and some of them, where they climb to, and where places far around them climb to.

    Climbs end early if they cannot reach the log-density ``least``: see :func:`climb`.
    """
    z = z[z.isfinite().all(-1)]
    if len(z) < 3:
        return z
    middle, some = z.median(0).values, z[: len(z) // 8]
    between = middle + torch.rand(len(some), 1).to(z) * (some - middle)
    chart, few = White(z), torch.stack((torch.zeros_like(middle), middle))
    beyond = climb(density, chart, chart.forward(far(chart.inverse(some)))[0], FAR, least)
    return torch.cat((few, between, climb(density, chart, z, NARROW, least), beyond))


def far(x: Tensor) -> Tensor:
    """Vectors that are moved outwards by factors from 2 to 8."""
    return 2 * 4 ** torch.rand(len(x), 1, dtype=x.dtype, device=x.device) * x


@torch.no_grad()
def components(density: LogDensity, chart: White, z: Tensor) -> Tensor:
    """The number of the mode that each of some places belongs to, ``(N,)``; mode 0 has most of them.

    Args:
        density: The log-density.
        chart: Coordinates in which distances mean something.
        z: The places, ``(N, D)``: best the ends of climbs, as of many dimensions a line between two draws leads
            through places of more density than both, whatever modes they are of.
    """
    number, x = len(z), chart.inverse(z)
    if number == 1:
        return torch.zeros(1, dtype=torch.long, device=z.device)
    near = _nearest(x)
    one = torch.arange(number, device=z.device).unsqueeze(-1).expand_as(near)
    heights = density(z)
    joined = _joined(density, z, heights, one, near)
    rises = heights[near] - heights[one]
    is_top = ~(joined & (rises > DIP)).any(-1)
    level = joined & is_top[one] & is_top[near]
    up = joined & (rises > 0)
    nearest = up & (up.cumsum(-1) == 1)  # of the higher neighbours; they are sorted by distance
    kept = level | nearest
    labels = _connected(one[kept], near[kept], number)
    # Places that have climbed to one point may still fall into groups of nearest neighbours: their tops tell.
    tops = torch.stack([heights.where(labels == k, -math.inf).argmax() for k in range(int(labels.max()) + 1)])
    near = _nearest(x[tops])
    one = torch.arange(len(tops), device=z.device).unsqueeze(-1).expand_as(near)
    same = _joined(density, z, heights, tops[one], tops[near])
    found = _connected(one[same], near[same], len(tops))[labels]
    order = found.bincount().argsort(descending=True)
    return order.argsort()[found]


def _nearest(x: Tensor) -> Tensor:
    """The nearest neighbours of each of some places, ``(N, k)``."""
    count = min(NEIGHBOURS, len(x) - 1)
    rows = torch.arange(len(x), device=x.device)
    found = []
    for part in rows.split(BATCH):
        apart = torch.cdist(x[part], x)
        apart[torch.arange(len(part), device=x.device), part] = math.inf
        found.append(apart.topk(count, largest=False).indices)
    return torch.cat(found)


def _joined(density: LogDensity, z: Tensor, heights: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return True, for each pair of indices of places, if the density does not fall between the two."""
    if not one.numel():
        return torch.zeros(one.shape, dtype=torch.bool)
    first, second = one.flatten(), other.flatten()
    least = torch.minimum(heights[first], heights[second]) - DIP
    joined = torch.arange(len(first), device=z.device)
    for place in range(BETWEEN):
        kept = [joined[:0]]
        for part in joined.split(BATCH) if len(joined) else ():
            share = (place + torch.rand(len(part), 1).to(z)) / BETWEEN
            between = z[first[part]] + share * (z[second[part]] - z[first[part]])
            kept.append(part[density(between) > least[part]])
        joined = torch.cat(kept)
    found = torch.zeros(len(first), dtype=torch.bool, device=z.device)
    found[joined] = True
    return found.view(one.shape)


def _connected(one: Tensor, other: Tensor, number: int) -> Tensor:
    """The connected component of each of some places, ``(number,)``, where pairs of them are joined."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = one.cpu().numpy(), other.cpu().numpy()
    edges = coo_array((np.ones(len(ends[0]), dtype=bool), ends), shape=(number, number))
    return torch.as_tensor(connected_components(edges, directed=False)[1], dtype=torch.long, device=one.device)
