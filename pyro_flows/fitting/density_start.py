"""The start of a new flow: standardised data and contexts, a base with similar tails, layers initialised from data.

Efficient BackProp (LeCun, Bottou, Orr, Müller 1998, section 4.3).  Outliers are left to the base, since the output of a
network is arbitrary far from its training data.  A standard normal base then costs z²/2 nats, a Student's t about
log z.  Marginal Tail-Adaptive Normalizing Flows (Laszkiewicz, Lederer, Fischer 2022, arXiv:2206.10311).
"""

from __future__ import annotations

import contextlib
from typing import cast

import torch
from torch import Tensor, nn

from ..distributions import CircularBase, StandardNormal, StudentTBase
from ..encoders import Standardize
from ..encoders.base import at_rest, learning
from ..flows import Flow
from ..guides.guide_flow import permutes
from ..transforms import FixedAffine, PerPixel

INITIAL = 5000  # rows from which layers such as ActNorm start
FEW = 512  # images from which they start, since each is many rows
Moments = tuple[Tensor, Tensor]


@torch.no_grad()
def start(flow: Flow, x: Tensor, context: Tensor | None, moments: Moments | None, *, heavy_tails: bool) -> None:
    """Prepare a new flow, which at most permutes or rotates; leave any other flow unchanged.

    To standardise, a fixed affine map is appended, or set if the last layer is one.  A flow that takes contexts without
    an encoder gets a ``Standardize``.  Layers that start from data are initialised, also those of an encoder.

    Args:
        flow: The flow.
        x: Some of the rows, on the flow's device, ``(N, *event_shape)``.
        context: Their contexts, ``(N, ...)``.
        moments: The mean and the standard deviation of each column, ``(D,)``, or of each channel; None to leave x and
            contexts unscaled.
        heavy_tails: True to replace a standard normal base by a Student's t.
    """
    if not permutes(flow.transforms, x.new_zeros(flow.event_shape)):
        return
    if heavy_tails and type(flow.base) is StandardNormal:
        flow.base = StudentTBase(flow.event_shape).to(x)
    if moments:
        loc, scale = moments
        if isinstance(flow.base, CircularBase):  # angles keep their scale
            angles = flow.base.circular.to(loc.device)
            loc, scale = loc.masked_fill(angles, 0.0), scale.masked_fill(angles, 1.0)
        last = flow.transforms[-1]
        fixed = last.inner if isinstance(last, PerPixel) else last  # acts on columns, or on the channels of each pixel
        if not isinstance(fixed, FixedAffine):
            columns, *size = flow.event_shape
            fixed = FixedAffine(columns, dense=False).to(x)
            cast(nn.ModuleList, flow.transforms).append(PerPixel(fixed, size) if size else fixed)
        fixed.set(loc, scale)
        if flow.context_dim and flow.encoder is None:
            flow.encoder = Standardize((flow.context_dim,)).to(x)
    with at_rest(flow):
        if flow.encoder is not None:
            parts = [part for part in flow.encoder.modules() if isinstance(part, Standardize) and part.is_fresh]
            if fresh := [part for part in parts if part.scale.requires_grad]:
                with learning(fresh):
                    flow.encoder(context)
        number = INITIAL if len(flow.event_shape) == 1 else FEW
        with contextlib.suppress(NotImplementedError):  # the inverse of such a layer cannot start from data
            flow.initialize(x[:number], None if context is None else context[:number])


@torch.no_grad()
def culprit(model: nn.Module, flow: Flow, x: Tensor, context: Tensor | None) -> str:
    """Return words for the first part of a flow, from the data to the base, that is not finite or makes a row so.

    Args:
        model: The trained module: the flow, or the module that holds it.
        flow: The flow over real numbers.
        x: Some of the rows, in the coordinates of the flow.
        context: Their contexts.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the flow's parameter {name} is not finite"
    density = flow(context)
    for place, view in reversed(list(enumerate(density.transforms))):
        x, log_det = view.transform.inverse_and_log_det(x, view.context)
        if not (x.isfinite().all() and log_det.isfinite().all()):
            return f"transforms[{place}] of the flow, {type(view.transform).__name__}, maps data to NaN or inf"
    if not density.base_dist.log_prob(x).isfinite().all():
        return f"the base {type(flow.base).__name__} has a log-density that is not finite"
    return f"all layers are finite on {len(x)} rows, so the gradient is at fault"
