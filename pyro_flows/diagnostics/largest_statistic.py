"""The largest of several statistics, brought to one scale among exchangeable ones, so that its rank is a p-value."""

from __future__ import annotations

import torch
from torch import Tensor

QUANTILES = 0.5, 0.98  # of a statistic, which become 0 and 1


def scaled(value: Tensor) -> Tensor:
    """Return statistics ``(N,)`` such that their median is 0 and their 98 % quantile 1; NaN counts as 0."""
    value = value.nan_to_num(0.0)  # a rank needs an order, and any number keeps the p-value exact
    middle, high = torch.quantile(value, torch.tensor(QUANTILES).to(value))
    return (value - middle) / (high - middle).clamp(min=1e-12)


def p_value(value: Tensor, place: int) -> float:
    """Return the share of N exchangeable statistics that are at least the one at a place."""
    return float((value >= value[place]).double().mean())
