"""Modes of a density: climbs to their tops, and the assignment of places to modes.

Two places belong to one mode if the density does not fall between them.  Only the lines between each place and its
nearest neighbours are examined, so any connected region is one mode, a ring for example.  A place in a valley is
connected to several tops, and belongs to the nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..vjp import LogDensity, value_and_score
from .coordinates import White


@dataclass(frozen=True)
class Climbs:
    """Settings of climbs and of the assignment to modes.

    Attributes:
        steps: Steps of a climb.
        patience: Steps between the tests that end climbs.
        top: The squared slope that leaves at most 0.001 nats to the top.
        neighbours: Neighbours of each place to which the line is examined.
        some: Starts drawn from the prior.
        narrow: The step size from there, in standard deviations of the prior.
        far: That from places far out.
        dip: Nats by which the density must fall between places of different modes.
        between: Evaluations between two places, at random fractions: at fixed ones a lattice may have further modes.
        batch: Places per evaluation.
        waypoints: Evaluations along a climb that must not cross a valley.
        sizes: The step sizes of such a climb, tried in turn.
    """

    steps: int = 60
    patience: int = 5
    top: float = 0.002
    neighbours: int = 6
    some: int = 256
    narrow: float = 0.1
    far: float = 0.2
    dip: float = 1.0
    between: int = 6
    batch: int = 4096
    waypoints: int = 12
    sizes: tuple[float, ...] = (0.5, 0.1, 0.02)


CLIMBS = Climbs()


def climb(density: LogDensity, coordinates: White, z: Tensor, size: float = 0.5, least: float = -math.inf) -> Tensor:
    """Climb by Adam with decreasing step sizes; return the highest place on each path, ``(N, D)``.

    Every few steps a Newton step from the best place is tried.  If the coordinates whiten the mode, it leads to the top
    and ends the climb.  In flat tails it does not.

    Args:
        density: The log-density.
        coordinates: The coordinates to climb in.
        z: The starts, ``(N, D)``.
        size: The first step of each coordinate; a climb moves at most 30 times as far.
        least: The log-density to reach.  A climb ends if the slope at its best place is too small to reach it.
    """
    x = coordinates.inverse(z)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    best, highest, slope = x.clone(), torch.full_like(x[:, 0], -math.inf), torch.zeros_like(x)
    left = torch.arange(len(x), device=x.device)  # the climbs that continue

    def visit(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score at the places x of the climbs, and True for each that is its climb's highest so far."""
        height, score = value_and_score(lambda x: density(coordinates.forward(x)[0]), x)
        # Data in double precision give the log-density their dtype, whatever that of the latents.
        height, score = height.to(x).nan_to_num(-math.inf, -math.inf, -math.inf), score.nan_to_num(0, 0, 0)
        is_higher = height > highest[left]
        higher = left[is_higher]
        best[higher], highest[higher], slope[higher] = x[is_higher], height[is_higher], score[is_higher]
        return score, is_higher

    for step in range(1, CLIMBS.steps + 1):
        score, _ = visit(x)
        first, second = 0.8 * first + 0.2 * score, 0.9 * second + 0.1 * score.square()
        direction = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
        x = x + size * (1 - step / (CLIMBS.steps + 1)) * direction
        if step % CLIMBS.patience == 1:
            before = slope[left].square().sum(-1)
            score, is_higher = visit(best[left] + slope[left])
            after = score.square().sum(-1)
            goes_on = ~(is_higher & (after < before / 4) & (after < CLIMBS.top))
            reach = size * (CLIMBS.steps - step) ** 2 / (2 * CLIMBS.steps)  # the remaining path of each coordinate
            goes_on &= highest[left] + reach * slope[left].abs().sum(-1) >= least
            left, x, first, second = left[goes_on], x[goes_on], first[goes_on], second[goes_on]
            if not len(left):
                break
    return coordinates.forward(best)[0]


@torch.no_grad()
def ascend(density: LogDensity, coordinates: White, z: Tensor) -> Tensor:
    """Climb within modes.

    A climb that has crossed a valley is repeated with smaller steps.  Places whose last climb still crosses one stay.
    """
    ends, left = z.clone(), torch.arange(len(z), device=z.device)
    shares = torch.arange(1, CLIMBS.waypoints).to(z).view(-1, 1, 1) / CLIMBS.waypoints
    for size in CLIMBS.sizes:
        start, end = z[left], climb(density, coordinates, z[left], size)
        path = density((start + shares * (end - start)).flatten(0, 1)).view(len(shares), -1)
        lowest = path.nan_to_num(-math.inf, math.inf, -math.inf).amin(0)
        crosses = lowest < density(start).nan_to_num(-math.inf, math.inf, -math.inf) - CLIMBS.dip
        ends[left[~crosses]] = end[~crosses]
        left = left[crosses]
        if not len(left):
            break
    return ends


def ways_up(density: LogDensity, z: Tensor, least: float = -math.inf) -> Tensor:
    """Return places to look for modes that a population misses, given draws z of the prior.

    These are the origin, the median of the draws, places between that and some draws, and the ends of climbs from all
    draws and from places far around them.  Climbs end early if they cannot reach the log-density ``least``.
    """
    z = z[z.isfinite().all(-1)]
    if len(z) < 3:
        return z
    middle, some = z.median(0).values, z[: len(z) // 8]
    between = middle + torch.rand(len(some), 1).to(z) * (some - middle)
    white, few = White(z), torch.stack((torch.zeros_like(middle), middle))
    beyond = climb(density, white, white.forward(far(white.inverse(some)))[0], CLIMBS.far, least)
    return torch.cat((few, between, climb(density, white, z, CLIMBS.narrow, least), beyond))


def far(x: Tensor) -> Tensor:
    """Multiply each vector by a random factor from 2 to 8."""
    return 2 * 4 ** torch.rand(len(x), 1, dtype=x.dtype, device=x.device) * x


@torch.no_grad()
def components(density: LogDensity, coordinates: White, z: Tensor) -> Tensor:
    """Return the index of each place's mode, ``(N,)``; mode 0 has the most places.

    Args:
        density: The log-density.
        coordinates: Coordinates with a meaningful distance.
        z: The places, ``(N, D)``, preferably the ends of climbs.  In many dimensions the density may be higher between
            two draws than at both, whatever their modes.
    """
    number, x = len(z), coordinates.inverse(z)
    if number == 1:
        return torch.zeros(1, dtype=torch.long, device=z.device)
    heights = density(z)
    one, near = _neighbours(x)
    joined = _joined(density, z, heights, one, near)
    rises = heights[near] - heights[one]
    is_top = ~(joined & (rises > CLIMBS.dip)).any(-1)
    level = joined & is_top[one] & is_top[near]
    up = joined & (rises > 0)
    nearest = up & (up.cumsum(-1) == 1)  # neighbours are sorted by distance
    kept = level | nearest
    labels = _connected(one[kept], near[kept], number)
    # Ends of climbs at one top may fall into several groups of nearest neighbours, which are joined by their tops.
    tops = highest_of_each(labels, heights)
    one, near = _neighbours(x[tops])
    same = _joined(density, z, heights, tops[one], tops[near])
    found = _connected(one[same], near[same], len(tops))[labels]
    order = found.bincount().argsort(descending=True)
    return order.argsort()[found]


def highest_of_each(labels: Tensor, heights: Tensor) -> Tensor:
    """Return the index of the highest place of each mode, given labels 0, 1, …, ``(N,)``, and log-densities."""
    return torch.stack([heights.where(labels == k, -math.inf).argmax() for k in range(int(labels.max()) + 1)])


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of all places and of the nearest neighbours of each, both ``(N, k)``."""
    rows, parts = torch.arange(len(x), device=x.device), []
    for part in rows.split(CLIMBS.batch):
        distances = torch.cdist(x[part], x)
        distances[rows[: len(part)], part] = math.inf
        parts.append(distances.topk(min(CLIMBS.neighbours, len(x) - 1), largest=False).indices)
    near = torch.cat(parts)
    return rows.unsqueeze(-1).expand_as(near), near


def _joined(density: LogDensity, z: Tensor, heights: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return True, for each pair of indices of places, if the density does not fall between the two."""
    first, second = one.flatten(), other.flatten()
    least = torch.minimum(heights[first], heights[second]) - CLIMBS.dip
    joined = torch.arange(len(first), device=z.device)
    for place in range(CLIMBS.between):
        kept = [joined[:0]]
        for part in joined.split(CLIMBS.batch) if len(joined) else ():
            share = (place + torch.rand(len(part), 1).to(z)) / CLIMBS.between
            between = z[first[part]] + share * (z[second[part]] - z[first[part]])
            kept.append(part[density(between) > least[part]])
        joined = torch.cat(kept)
    found = torch.zeros(len(first), dtype=torch.bool, device=z.device)
    found[joined] = True
    return found.view(one.shape)


def _connected(one: Tensor, other: Tensor, number: int) -> Tensor:
    """Return the connected component of each of some places, ``(number,)``, given joined pairs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = one.cpu().numpy(), other.cpu().numpy()
    edges = coo_array((np.ones(len(ends[0]), dtype=bool), ends), shape=(number, number))
    return torch.as_tensor(connected_components(edges, directed=False)[1], dtype=torch.long, device=one.device)
