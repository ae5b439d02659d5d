"""A table of parameters, θ(c) = table + network(c): what depends on a context is added to it by a conditioner.

Conditioners start at zero, so a layer starts as its table does: with random parts, which a network alone cannot give.
"""

from __future__ import annotations

from torch import Tensor

from ..checks import CONDITIONER, check_kind
from ..conditioners import Conditioner


def check_table(owner: str, conditioner: Conditioner | None, input_dim: int, num_params: int) -> int:
    """Check that a conditioner yields one number for each of a table's; return the width of its contexts, 0 without."""
    if conditioner is None:
        return 0
    check_kind(owner, Conditioner, CONDITIONER, conditioner=conditioner)
    got, wanted = (conditioner.output_dim, conditioner.num_params), (1, num_params)
    if got != wanted:
        raise ValueError(
            f"{owner}: conditioner must have (output_dim, num_params) = {wanted} for {input_dim} features, got {got}."
        )
    return conditioner.input_dim


def read_table(owner: str, params: Tensor, conditioner: Conditioner | None, context: Tensor | None) -> Tensor:
    """The parameters at a context, ``(P)`` without a conditioner and ``(*batch, P)`` with one."""
    if conditioner is None:
        return params
    if context is None:
        raise ValueError(f"{owner}: context is missing; its width is {conditioner.input_dim}.")
    return params + conditioner(context).squeeze(-2)
