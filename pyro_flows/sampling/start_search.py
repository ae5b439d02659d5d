"""Common parts of the searches for a Gaussian near a density: its ELBO, and the steps that may be taken."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Watch = Callable[[], bool]  # called after each round of a search; True ends it.  bool() is False
SLACK = 0.5  # nats by which the ELBO may fall in a step, which is noise of the draws


def log_weights(log_p: Tensor, noise: Tensor, log_det: Tensor | float) -> Tensor:
    """Return log p - log q of draws, ``(N,)``, given their standard normal noise, ``(N, D)``, and log|dz/dw|."""
    log_q = -noise.square().sum(-1) / 2 - noise.shape[-1] / 2 * math.log(2 * math.pi)
    return log_p - (log_q - log_det)


def elbo_of(weights: Tensor) -> float:
    """Return the mean of some log-weights, -inf if it is NaN."""
    return float(weights.mean().nan_to_num(-math.inf, math.inf, -math.inf))


def is_no_worse(elbo: float, start: float, dtype: torch.dtype) -> bool:
    """True if a step to an ELBO may be taken; large sums have round-off, too."""
    return elbo >= start - SLACK - 16 * torch.finfo(dtype).eps * abs(start) or not math.isfinite(start)
