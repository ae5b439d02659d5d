"""Memory for time: activations of a transform are computed again in the backward pass in place of being kept.

Training Deep Nets with Sublinear Memory Cost (Chen, Xu, Zhang, Guestrin 2016, arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .base import FlowTransform


class Recomputed(FlowTransform):
    """A transform of which only the input is kept for the gradient; it takes about a third more time to train.

    Args:
        inner: The transform.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear
        >>> Recomputed(LULinear(3))(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(self, inner: FlowTransform) -> None:
        super().__init__(inner.event_shape, inner.context_dim)
        self.inner = inner
        self.domain, self.codomain = inner.domain, inner.codomain

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _run(self.inner.forward_and_log_det, x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _run(self.inner.inverse_and_log_det, y, context)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        self.inner.initialize(y, context)


def _run(
    verb: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]], x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return verb(x, context)
    return checkpoint(verb, x, context, use_reentrant=False)
