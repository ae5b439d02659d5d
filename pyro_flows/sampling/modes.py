"""Modes of a density: where climbs lead, and which places belong together.

Two places are of one mode if the density does not fall between them.  It is looked at between each place and its
nearest neighbours only: so a ring is one mode, and so is anything else that is connected.  A place in a valley leads up
to several tops, and belongs to the one next to it.
"""

from __future__ import annotations

import math

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..programs.log_density import LogDensity, score_of
from .charts import White

CLIMB = 60  # steps of a climb
NEIGHBOURS = 6
DIP = 1.0  # nats by which the density must fall between two places that are of two modes
BETWEEN = 0.25, 0.5, 0.75  # where it is looked at


def climb(density: LogDensity, chart: White, z: Tensor, size: float = 0.5) -> Tensor:
    """Steps uphill in a chart, each coordinate at its own pace: Adam, with a step size that falls.

    Args:
        density: The log-density.
        chart: The coordinates.
        z: The places to start from, ``(N, D)``.
        size: How far each coordinate moves in the first step; a climb ends within 30 times that.
    """
    x = chart.inverse(z)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, CLIMB + 1):
        score = score_of(lambda x: density(chart.forward(x)[0]), x).nan_to_num(0, 0, 0)
        first, second = 0.8 * first + 0.2 * score, 0.9 * second + 0.1 * score.square()
        ahead = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
        x = x + size * (1 - step / (CLIMB + 1)) * ahead
    return chart.forward(x)[0]


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
        return torch.zeros(1, dtype=torch.long)
    near = torch.cdist(x, x).fill_diagonal_(math.inf).topk(min(NEIGHBOURS, number - 1), largest=False).indices
    one = torch.arange(number, device=z.device).repeat_interleave(near.shape[1])
    other, heights = near.flatten(), density(z)
    least = torch.minimum(heights[one], heights[other])
    joined = torch.ones_like(least, dtype=torch.bool)
    for share in BETWEEN:
        joined &= density(z[one].lerp(z[other], share)) > least - DIP
    rises = (heights[other] - heights[one]).reshape(near.shape)
    joined = joined.reshape(near.shape)
    is_top = ~(joined & (rises > DIP)).any(-1)
    level = joined & is_top[one].reshape(near.shape) & is_top[near]
    up = joined & (rises > 0)
    nearest = up & (up.cumsum(-1) == 1)  # of the higher neighbours; they are sorted by distance
    joined = (level | nearest).flatten()
    edges = coo_array((joined.cpu().numpy(), (one.cpu().numpy(), other.cpu().numpy())), shape=(number, number))
    _, labels = connected_components(edges, directed=False)
    found = torch.as_tensor(labels, dtype=torch.long)
    order = found.bincount().argsort(descending=True)
    return order.argsort()[found]
