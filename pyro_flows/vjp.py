"""Vector–Jacobian products by autograd, and checks that hand-written ones may replace them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


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


def keeps(thing: object, kind: type, *methods: str) -> bool:
    """Return True if the class of an object has these methods of ``kind`` itself, and not others in their place.

    ``kind`` knows the derivatives of its own methods alone.
    """
    return all(getattr(type(thing), method) is getattr(kind, method) for method in methods)


def is_plain(modules: Iterable[nn.Module]) -> bool:
    """Return True if modules have no hooks and no parametrisations, so that their classes say what they compute."""
    return not any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or "parametrizations" in part._modules
        for module in modules
        for part in module.modules()
    )
