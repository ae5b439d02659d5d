"""Masks of data: True for what is there; what is missing is ignored, NaN included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compiler_state import is_traced


def as_mask(caller: str, x: Tensor, mask: Tensor | None, *shapes: Sequence[int]) -> Tensor:
    """Return a mask as bools; without one, everything in the data is there.

    A model that draws its mask from a Bernoulli distribution has a mask of the numbers 0 and 1.

    Args:
        caller: The name of the encoder, for errors.
        x: The data.
        mask: Bools, or the numbers 0 and 1.
        *shapes: The shapes that a mask may have; without a mask the first.

    Raises:
        ValueError: If the mask has another shape, or holds other numbers.  ``torch.compile`` and ``torch.func`` skip
            the check of the numbers.
    """
    if mask is None:
        return torch.ones(tuple(shapes[0]), dtype=torch.bool, device=x.device)
    there = mask.bool()
    if tuple(mask.shape) not in map(tuple, shapes):
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        got = f"for data of shape {tuple(x.shape)}, got {tuple(mask.shape)}"
        raise ValueError(f"{caller}: mask must have shape {wanted}, {got}.")
    if not (is_traced() or mask.dtype == torch.bool) and (wrong := mask[mask != there]).numel():
        raise ValueError(f"{caller}: mask must hold True and False, or 1 and 0, got {wrong[0].item():g}.")
    return there
