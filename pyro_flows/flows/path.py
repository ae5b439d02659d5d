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


def carried(transforms: Sequence[FlowTransform], x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Map draws of a base by transforms without contexts.

    Args:
        transforms: The transforms, at least one.
        x: The draws, ``(*batch, *event_shape)``.
        score: The gradient of the base's log-density at each.

    Returns:
        The draws y, ``(*batch, *event_shape)``, and the sum of the log-determinants, ``(*batch)``.  The gradient of
        minus the latter is the score of y times dy: the way through the draw alone.
    """
    trained = {p: None for transform in transforms for p in transform.parameters() if p.requires_grad}
    y, log_det = _Carried.apply(transforms, x, score, *trained)
    return y, log_det


def can_be_carried() -> bool:
    """Return True unless something looks into each operation: a trace, ``torch.func`` or autocast."""
    watched = torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active()
    return not (watched or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, transforms: Sequence[FlowTransform], x: Tensor, score: Tensor, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        pulls, total = [], torch.zeros(())
        y = x
        for transform in transforms:
            y, log_det, score, pull = transform.carry(y, score)
            pulls.append(pull)
            total = total + log_det
        ctx.pulls, ctx.score, ctx.places = pulls, score, {parameter: place for place, parameter in enumerate(trained)}
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor | None, of_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        g = torch.zeros_like(ctx.score) if of_y is None else of_y
        if of_log_det is not None:
            g = g - of_log_det.reshape(*of_log_det.shape, *(1,) * (g.dim() - of_log_det.dim())) * ctx.score
        found: list[Tensor | None] = [None] * len(ctx.places)
        for pull in reversed(ctx.pulls):
            g, gradients = pull(g)
            for parameter, gradient in gradients:
                if (place := ctx.places.get(parameter)) is not None:
                    known = found[place]
                    found[place] = gradient if known is None else known + gradient
        return None, g if ctx.needs_input_grad[1] else None, None, *found
