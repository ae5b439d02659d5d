"""Elements of sets and steps of series: masks, lengths unlike those of training, and pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..compiler_state import is_traced
from ..user_code import warn_user
from .training_record import judges, records

TOLERANCE = 1.2  # lengths may leave the range of training by this factor and one element more


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


class Lengths(nn.Module):
    """The range of lengths in training, and a warning of lengths far outside of it.

    A network extrapolates to other lengths, and posteriors at its contexts are then wrong without a sign.  Only what a
    mask leaves counts.

    Args:
        owner: The name of the encoder, for warnings.
        element: The word for what is counted, such as ``"step"``.

    Attributes:
        seen: The least and the largest length in training, ``(2,)``; the least is larger before any training.
    """

    seen: Tensor

    def __init__(self, owner: str, element: str) -> None:
        super().__init__()
        self.owner, self.element = owner, element
        self.register_buffer("seen", torch.tensor([torch.iinfo(torch.long).max, 0]))

    def forward(self, there: Tensor) -> None:
        """Record the lengths of a batch in a fit, and judge them in use.

        Args:
            there: True for the elements that count, ``(*batch, n)``.

        Warns:
            UserWarning: If a length lies far outside of the range of training.
        """
        recording = records()
        if not (recording or judges()) or not there.shape[:-1].numel():
            return
        low, high = there.sum(-1).aminmax()
        if recording:
            self.seen.copy_(torch.stack((torch.minimum(low, self.seen[0]), torch.maximum(high, self.seen[1]))))
            return
        least, most = self.seen.tolist()
        is_short, is_long = TOLERANCE * (int(low) + 1) < least, int(high) > TOLERANCE * most + 1
        if least <= most and (is_short or is_long):
            known = f"{least}" if least == most else f"{least} to {most}"
            number = int(low if is_short else high)
            found = f"the data have {number} {self.element}{'s' * (number != 1)}, but training had {known}"
            warn_user(f"{self.owner}: {found}. Train on such data as well, or test the guide on them by calibrate.")


def pooling_weights(scores: Tensor, there: Tensor) -> Tensor:
    """Return the weights of elements in their mean, and under the attention of each query.

    Args:
        scores: The logits of Q queries, ``(*batch, n, Q)``.
        there: True for the elements that count, ``(*batch, n)``.

    Returns:
        Of shape ``(*batch, n, 1 + Q)``, the mean first.  Each column sums to 1, or to 0 if no element counts.
    """
    there = there.unsqueeze(-1)
    # The lowest finite number, not -inf: the softmax of an empty set would be NaN.  There the mask makes it zero.
    attention = scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(-2) * there
    size = there.sum(-2, keepdim=True).to(scores.dtype)  # (*batch, 1, 1)
    return torch.cat((there / size.clamp(min=1.0), attention), -1)
