"""The default flows for the rows of a plate: l = F(A_c(T_c(u))), with A_c an affine map by the context alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import flows
from ..bijectors import Affine
from ..conditioners import MLP, Given
from ..flows import Flow
from ..transforms import Elementwise, FixedAffine
from .couplings import affine_couplings
from .recipe import set_pace

# Of the map from a context to a row's place: it has to keep up with the encoder.  At 1 it learns less in the steps that
# people give an autoencoder, and without one a step of .03 throws the rows far away.
PLACE_PACE = 16.0


def local_flow(input_dim: int, context_dim: int) -> Flow:
    """The flow that :class:`AutoPlateFlow` gives to the rows of a plate when none is named.

    Its last layer is an affine map of the context alone, so that each row's place and scale are found first.
    """
    if input_dim == 1:
        layers = flows.nsf(1, context_dim, num_transforms=2, activation=nn.ELU).transforms
    else:
        layers = affine_couplings(input_dim, context_dim, num_transforms=4).transforms
    place = MLP(context_dim, input_dim, Affine().num_params, activation=nn.ELU, skip=True, pace=PLACE_PACE)
    return Flow([*layers, Elementwise(Affine(), input_dim, place)])


def autoencoder_flow(input_dim: int, context_dim: int) -> Flow:
    """Build a flow as :func:`local_flow` does, and spread the rows at the start by a random linear map of the context.

    If all rows started alike, a decoder that is trained with the guide would learn to do without their latents.
    """
    flow = local_flow(input_dim, context_dim)
    # A conditioner yields all scales of an affine map and then all shifts, here from the context's own columns.
    direct = flow.transforms[-1].conditioner.direct
    shift = direct.weight[input_dim : 2 * input_dim, :context_dim]
    nn.init.normal_(shift, std=context_dim**-0.5 / direct.unit)
    return flow


def assemble_local(flow: Flow, loc: Tensor, scale: float, *, by_row: bool) -> Flow:
    """A recipe's flow for the latents of a row, then an affine map that is fixed.

    With ``by_row`` there is another between them, whose parameters the context begins with.
    """
    set_pace(flow)
    dim = len(loc)
    fixed = FixedAffine(dim, dense=False)
    own = [Elementwise(Affine(), dim, Given(flow.context_dim, dim, Affine().num_params))] if by_row else []
    made = Flow([*flow.transforms, *own, fixed], flow.base).to(device=loc.device, dtype=loc.dtype)
    fixed.set(loc, torch.full_like(loc, scale))
    return made
