"""Vector–Jacobian products by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def vjp(outputs: Sequence[Tensor], sources: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of sources from those of what was computed of them, zero where nothing depends on one.

    The graph is kept.  ``torch.autograd.grad`` takes gradients of outputs too, but imports sympy for them, in half a
    second.
    """
    with torch.enable_grad():
        parts = [(output * g).sum() for output, g in zip(outputs, gradients, strict=True) if output.requires_grad]
        if not parts:
            return tuple(torch.zeros_like(source) for source in sources)
        found = torch.autograd.grad(sum(parts[1:], parts[0]), sources, retain_graph=True, materialize_grads=True)
    return tuple(part.detach() for part in found)  # on torch 2.4 zeros that are put for None require gradients
