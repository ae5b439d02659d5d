"""Memory for time: the backward pass computes activations of a transform again, and they are not kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..arguments import TRANSFORM, check_kind
from .base import FlowTransform

T = TypeVar("T")


class Recomputed(FlowTransform):
    """A transform that keeps only its input for the gradient; training takes about a third more time.

    Values, log-determinants and gradients are those of the inner transform, which is run again in the backward pass.

    Training Deep Nets with Sublinear Memory Cost (Chen, Xu, Zhang, Guestrin 2016, arXiv:1604.06174).

    Args:
        inner: The transform, of events of any shape.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear
        >>> inner, x = LULinear(3), torch.randn(5, 3)
        >>> torch.equal(Recomputed(inner)(x), inner(x))
        True
    """

    def __init__(self, inner: FlowTransform) -> None:
        check_kind("Recomputed", FlowTransform, TRANSFORM, inner=inner)
        super().__init__(inner.event_shape, inner.context_dim)
        self.inner = inner
        self.domain, self.codomain = inner.domain, inner.codomain

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return recomputed(self.inner.forward_and_log_det, x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return recomputed(self.inner.inverse_and_log_det, y, context)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        self.inner.initialize(y, context)


def recomputed(function: Callable[..., T], *args: Any) -> T:
    """Call a function and keep only its arguments for the gradient; the backward pass calls it again."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function(*args)
    from torch.utils.checkpoint import checkpoint  # which loads a compiler on torch 2.4

    return checkpoint(function, *args, use_reentrant=False)
