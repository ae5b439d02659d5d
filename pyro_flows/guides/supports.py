"""Supports that torch knows no bijection for: a mixture's is that of its components."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Transform, biject_to, constraints


def _of_mixture(support: constraints.MixtureSameFamilyConstraint) -> Transform:
    shared = inner = support.base_constraint
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    if any(isinstance(bound, Tensor) and bound.dim() for bound in vars(inner).values()):
        raise NotImplementedError(f"components may differ in their support, {inner}")
    return biject_to(shared)


biject_to.register(constraints.MixtureSameFamilyConstraint, _of_mixture)
