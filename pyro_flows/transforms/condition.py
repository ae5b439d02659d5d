"""A transform at one context, as a module: y = t(x | c) with c held fixed, or trained."""

from __future__ import annotations

from torch import Tensor, nn

from ..arguments import TRANSFORM, check_kind
from .base import FlowTransform, Scored


class Conditioned(FlowTransform):
    """What ``transform.condition(context)`` is for one use, to keep: the context is a parameter like any other.

    Args:
        transform: A transform that takes contexts.
        context: One context, ``(context_dim,)``; its values are copied, but a ``torch.nn.Parameter`` is kept as it is,
            and may be shared.

    Raises:
        ValueError: If the context is not one vector of the transform's width.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> layer = flows.nsf(2, context_dim=3).transforms[0]
        >>> held = Conditioned(layer, torch.zeros(3))
        >>> held.context_dim, held(torch.ones(5, 2)).shape, held.context.requires_grad
        (0, torch.Size([5, 2]), True)
    """

    def __init__(self, transform: FlowTransform, context: Tensor | nn.Parameter) -> None:
        check_kind("Conditioned", FlowTransform, TRANSFORM, transform=transform)
        check_kind("Conditioned", Tensor, "a tensor", context=context)
        super().__init__(transform.event_shape)
        wanted, got = (transform.context_dim,), tuple(context.shape)
        if got != wanted:
            raise ValueError(f"Conditioned: context must have shape {wanted}, got {got}.")
        self.transform = transform
        shared = isinstance(context, nn.Parameter)
        self.context = context if shared else nn.Parameter(context.detach().clone())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_log_det(x, self.context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_log_det(y, self.context)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        return self.transform.forward_and_score(x, score, self.context)
