"""What a new flow starts from: standardised data and contexts, a base with tails like theirs, layers that saw some.

Efficient BackProp (LeCun, Bottou, Orr, Müller 1998, section 4.3).  Outliers are for the base to bear: what a network
says of places where it never was can be anything, and a normal density makes that -z²/2 nats, a Student's t some
-log z.  Marginal Tail-Adaptive Normalizing Flows (Laszkiewicz, Lederer, Fischer 2022, arXiv:2206.10311).
"""

from __future__ import annotations

import contextlib
from typing import cast

import torch
from torch import Tensor, nn

from ..distributions import CircularBase, StandardNormal, StudentTBase
from ..encoders import Standardize
from ..encoders.base import at_rest
from ..encoders.standardize import learning
from ..flows import Flow
from ..guides.recipe import permutes
from ..transforms import FixedAffine, PerPixel

INITIAL = 5000  # rows that layers such as ActNorm start from
FEW = 512  # images, of which each is many rows
Moments = tuple[Tensor, Tensor]


@torch.no_grad()
def start(flow: Flow, x: Tensor, context: Tensor | None, moments: Moments | None, *, heavy_tails: bool) -> None:
    """Prepare a flow that does no more than permute, beyond rotations that it starts from; leave any other as it is.

    To standardise, a fixed affine map is put at its end, or set if it is there, and a ``Standardize`` before its
    transforms where they take contexts as they are.  Layers that start from data, an encoder's too, see some.

    Args:
        flow: The flow.
        x: Some of the rows, on the flow's device, ``(N, *event_shape)``.
        context: Their contexts, ``(N, ...)``.
        moments: The mean and the standard deviation of each column, ``(D,)``, or of each channel; None to leave x and
            contexts as they are.
        heavy_tails: Whether the base, where it is the standard normal, shall be a Student's t.
    """
    if not permutes(flow.transforms, x.new_zeros(flow.event_shape)):
        return
    if heavy_tails and type(flow.base) is StandardNormal:
        flow.base = StudentTBase(flow.event_shape).to(x)
    if moments:
        loc, scale = moments
        if isinstance(flow.base, CircularBase):  # angles have a scale of their own
            angles = flow.base.circular.to(loc.device)
            loc, scale = loc.masked_fill(angles, 0.0), scale.masked_fill(angles, 1.0)
        last = flow.transforms[-1]
        fixed = last.inner if isinstance(last, PerPixel) else last  # of columns, or of the channels of each pixel
        if not isinstance(fixed, FixedAffine):
            columns, *size = flow.event_shape
            fixed = FixedAffine(columns, dense=False).to(x)
            cast(nn.ModuleList, flow.transforms).append(PerPixel(fixed, size) if size else fixed)
        fixed.set(loc, scale)
        if flow.context_dim and flow.encoder is None:
            flow.encoder = Standardize((flow.context_dim,)).to(x)
    with at_rest(flow):
        if flow.encoder is not None and (fresh := _fresh_parts(flow.encoder)):
            with learning(fresh):
                flow.encoder(context)
        with contextlib.suppress(NotImplementedError):  # by an inverse of such a layer
            number = INITIAL if len(flow.event_shape) == 1 else FEW
            flow.initialize(x[:number], None if context is None else context[:number])


def _fresh_parts(encoder: nn.Module) -> list[Standardize]:
    """The parts of an encoder that standardise and have seen no data yet, unless they are frozen."""
    parts = [part for part in encoder.modules() if isinstance(part, Standardize)]
    return [part for part in parts if part.is_fresh and part.scale.requires_grad]


@torch.no_grad()
def culprit(model: nn.Module, flow: Flow, x: Tensor, context: Tensor | None) -> str:
    """Name the first part of a flow, from the data to the base, that is not finite or makes some rows so.

    Args:
        model: What is trained: the flow, or what holds it.
        flow: The flow over real numbers.
        x: Some of the rows, as the flow sees them.
        context: Their contexts.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the flow's parameter {name} is not finite"
    density = flow(context)
    for place, view in reversed(list(enumerate(density.transforms))):
        x, log_det = view.transform.inverse_and_log_det(x, view.context)
        if not (x.isfinite().all() and log_det.isfinite().all()):
            return f"transforms[{place}] of the flow, {type(view.transform).__name__}, takes data to what is not finite"
    if not density.base_dist.log_prob(x).isfinite().all():
        return f"the base {type(flow.base).__name__} has a log-density that is not finite"
    return f"all layers are finite on {len(x)} rows, so the gradient is at fault"
