"""One ridge bends a line: k = z + s tanh z, which increases if s > -1; planar and Sylvester transforms are made of it.

Here log(1 + s) = B tanh(raw / B) for a free number: zero is the identity, and slopes stay within exp(±B).

The map is odd, and convex (s < 0) or concave on z > 0; there Newton's iteration runs monotonically to the root from the
better of the two points where the tangents at zero and at infinity meet the right-hand side.  Slopes are bounded, so a
fixed number of steps reaches the last bit.  The root's derivatives are those of the implicit function.

Variational Inference with Normalizing Flows (Rezende, Mohamed 2015, arXiv:1505.05770, appendix A).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bijectors.base import bounded

MAX_LOG_SLOPE = 4.0  # B
STEPS = 6  # With the two differentiable ones that follow, one more than any slope within the bound needs in float64.


def bounded_slope(raw: Tensor) -> Tensor:
    """The number s > -1 of a ridge from a free number, with log(1 + s) within ±B; near zero it stays what it is."""
    return torch.expm1(bounded(raw, MAX_LOG_SLOPE))


def root(s: Tensor, k: Tensor) -> Tensor:
    """The root z of z + s tanh z = k, for s > -1, with first and second derivatives."""
    with torch.no_grad():
        size = k.abs()
        of_zero, of_infinity = size / (1 + s), size - s
        z = torch.where(s < 0, torch.minimum(of_zero, of_infinity), torch.maximum(of_zero, of_infinity))
        for _ in range(STEPS):
            z = _newton(z, s, size)
        z = torch.copysign(z, k)
    return _newton(_newton(z, s, k), s, k)  # each step doubles the order of the derivatives that are right


def _newton(z: Tensor, s: Tensor, k: Tensor) -> Tensor:
    t = torch.tanh(z)
    return z - (z + s * t - k) / (1 + s * (1 - t * t))
