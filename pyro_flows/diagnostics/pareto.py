"""Pareto-smoothed weights: the largest are replaced by quantiles of a generalised Pareto distribution fitted to them.

Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry 2015, arXiv:1507.02646).  Pyro fits the
distribution.  ArviZ has the same function, but it fails for equal weights and takes seconds to import.
"""

from __future__ import annotations

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

ROUND_OFF = 1e-4  # nats
FEWEST = 5  # weights in the tail


def smooth(log_weights: Tensor) -> tuple[Tensor, float]:
    """Smooth raw log-weights.

    If the largest weights are equal, up to the round-off of float32 log-densities, there is no tail to smooth and k-hat
    is -inf.

    Args:
        log_weights: ``(S,)``, in double precision; not all are -inf.

    Returns:
        The normalised log-weights, ``(S,)``, and k-hat, which is inf if too few weights of the tail are positive.
    """
    size = len(log_weights)
    relative, order = (log_weights - log_weights.max()).sort()
    number = math.ceil(min(size / 5, 3 * math.sqrt(size)))
    if -relative[-number] < ROUND_OFF:
        return log_weights.log_softmax(0), -math.inf
    cutoff = relative[-number - 1].clamp_min(math.log(torch.finfo(relative.dtype).tiny))
    above = relative > cutoff
    tail = relative[above].exp() - cutoff.exp()
    khat, sigma = fit_generalized_pareto(tail) if len(tail) >= FEWEST else (math.inf, 0.0)
    if not (math.isfinite(khat) and sigma > 0):
        return log_weights.log_softmax(0), math.inf if math.isnan(khat) else khat
    levels = torch.arange(0.5, len(tail), dtype=tail.dtype, device=tail.device) / len(tail)
    exponential = -torch.log1p(-levels)
    quantiles = exponential if khat == 0 else torch.expm1(khat * exponential) / khat
    smoothed = relative.clone()
    smoothed[above] = (sigma * quantiles + cutoff.exp()).log().clamp_max(0)
    return torch.empty_like(relative).scatter_(0, order, smoothed).log_softmax(0), khat
