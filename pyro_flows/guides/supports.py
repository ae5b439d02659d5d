"""From supports to unconstrained space; torch knows no bijection for a mixture's, which is that of its components."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from .circles import innermost


def _of_mixture(support: Any) -> Transform:
    shared = support.base_constraint
    inner = innermost(shared)
    if any(isinstance(bound, Tensor) and bound.dim() for bound in vars(inner).values()):
        raise NotImplementedError(f"components may differ in their support, {inner}")
    return biject_to(shared)


if hasattr(constraints, "MixtureSameFamilyConstraint"):  # before, a mixture's support was that of its components
    biject_to.register(constraints.MixtureSameFamilyConstraint, _of_mixture)
