"""The inverse of an autoregressive layer over tokens: one after the other, y_t -> x_t = f⁻¹(y_t; θ_t(x_<t)).

The transformer keeps the keys and values of the tokens that it knows, so that all T steps cost about one pass, of
which they are plain differentiable operations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bijectors import Bijector
from ..conditioners import CausalTransformer, Tokens


def invert_tokens(
    bijector: Bijector, net: CausalTransformer, y: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(*batch, T, D), (*batch, C) -> (*batch, T, D), (*batch)``."""
    batch = y.shape[:-2] if context is None else torch.broadcast_shapes(y.shape[:-2], context.shape[:-1])
    number = math.prod(batch)
    y = y.expand(*batch, *y.shape[-2:]).reshape(number, *y.shape[-2:])
    if context is not None:
        context = context.expand(*batch, context.shape[-1]).reshape(number, context.shape[-1])
    tokens, known = Tokens(net, context, number), None
    found: list[tuple[Tensor, Tensor]] = []
    for place in net.places:
        known, log_det = bijector.inverse_and_log_det(y[:, place], tokens.step(known))
        found.append((known, log_det))
    values, log_dets = zip(*found, strict=True)
    x = torch.stack(values, 1).index_select(1, net.order)
    return x.reshape(*batch, *x.shape[1:]), torch.stack(log_dets, 1).sum((1, 2)).reshape(batch)
