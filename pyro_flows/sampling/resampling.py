"""Systematic resampling: N points u, u + 1/N, u + 2/N, … on the cumulated weights (Douc, Cappé, Moulines 2005)."""

from __future__ import annotations

import torch
from torch import Tensor


def systematic(weights: Tensor, number: int) -> Tensor:
    """Resample systematically by weights ``(*batch, S)``; return indices in increasing order, ``(*batch, number)``."""
    edges = weights.double().cumsum(-1)
    end = edges[..., -1:]
    offset, steps = torch.rand_like(end), torch.arange(number, device=end.device)
    # A point that is rounded up to the very end would lie beyond the last draw of positive weight.
    points = ((steps + offset) / number * end).minimum(end.nextafter(torch.zeros_like(end)))
    # Without any weight the edges are NaN, and no index is right.
    return torch.searchsorted(edges, points, right=True).clamp_max(weights.shape[-1] - 1)
