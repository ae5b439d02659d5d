"""From supports to unconstrained space; torch knows no bijection for a mixture's, which is that of its components."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.utils import _sum_rightmost

from .circles import is_circular


def _of_mixture(support: Any) -> Transform:
    shared = inner = support.base_constraint
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    if any(isinstance(bound, Tensor) and bound.dim() for bound in vars(inner).values()):
        raise NotImplementedError(f"components may differ in their support, {inner}")
    return biject_to(shared)


if hasattr(constraints, "MixtureSameFamilyConstraint"):  # before, a mixture's support was that of its components
    biject_to.register(constraints.MixtureSameFamilyConstraint, _of_mixture)


def unconstrain(name: str, site: dict[str, Any], value: Tensor) -> tuple[Tensor, Tensor]:
    """Values of a latent, ``(*batch, *site_shape)``: unconstrained and flat, ``(*batch, n)``, and log|det|, ``batch``.

    The latter is -inf outside of the support.
    """
    shape, support = site["value"].shape, site["fn"].support
    batch = value.shape[: value.dim() - len(shape)]
    if value.shape != batch + shape:
        raise ValueError(
            f"AutoFlow.log_prob: values[{name!r}] must have shape (*batch, *{tuple(shape)}), got {tuple(value.shape)}."
        )
    inside = support.check(value).reshape(*batch, -1).all(-1) | is_circular(site)  # any representative of an angle
    held = value.where(inside.reshape(batch + (1,) * len(shape)), site["value"].detach())
    inverse = biject_to(support).inv
    free = inverse(held)
    change = inverse.log_abs_det_jacobian(held, free)
    log_det = _sum_rightmost(change, change.dim() - len(batch))
    return free.reshape(*batch, -1), log_det.where(inside, -math.inf)
