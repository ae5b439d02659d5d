"""A draw of a flow and its path gradient in one pass, without a graph of autograd's across the layers.

Each layer maps the draw and carries the score along; on the way back each turns the gradient at its results into those
at its inputs and at its parameters.  Fast and Unified Path Gradient Estimators for Normalizing Flows (Vaitl, Winkler,
Richter, Kessel 2024, arXiv:2403.15881).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..transforms import FlowTransform
from ..transforms.base import carried_along
from ..vjp import is_plain


def carried(transforms: Sequence[FlowTransform], x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Map draws of a base by transforms without contexts.

    Args:
        transforms: The transforms, at least one.
        x: The draws, ``(*batch, *event_shape)``.
        score: The gradient of the base's log-density at each.

    Returns:
        The draws y, ``(*batch, *event_shape)``; and, without gradients, the sum of the log-determinants, ``(*batch)``,
        and the scores of the draws.
    """
    trained = {p: None for transform in transforms for p in transform.parameters() if p.requires_grad}
    if not (trained or x.requires_grad):
        x = x.requires_grad_()  # so that the log-density has a gradient at the draws of a frozen flow too
    return _Carried.apply(transforms, x, score, *trained)


def can_be_carried(transforms: Sequence[FlowTransform]) -> bool:
    """Return True unless something looks into each operation: a trace, ``torch.func``, autocast, or hooks of a part."""
    watched = torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active()
    cast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return not (watched or cast) and is_plain(transforms)


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, transforms: Sequence[FlowTransform], x: Tensor, score: Tensor, *trained: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, total, score, ctx.pull = carried_along(transforms, x, score)
        ctx.places = {parameter: place for place, parameter in enumerate(trained)}
        ctx.save_for_backward(*trained)
        ctx.mark_non_differentiable(total, score)
        return y, total, score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.saved_tensors)  # which are as they were in the forward pass
        g, gradients = ctx.pull(g)
        for parameter, gradient in gradients:
            if (place := ctx.places.get(parameter)) is not None:
                known = found[place]
                found[place] = gradient if known is None else known + gradient
        return None, g if ctx.needs_input_grad[1] else None, None, *found
