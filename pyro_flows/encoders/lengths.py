"""The lengths of series, or the sizes of sets, that an encoder has been trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..user_code import warn_user
from .training_record import judges, records

TOLERANCE = 1.2  # lengths may leave the range of training by this factor and one element more


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
        self.register_buffer("seen", torch.tensor([1, 0]))

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
            fresh = self.seen[0] > self.seen[1]
            self.seen[0] = torch.where(fresh, low, torch.minimum(low, self.seen[0]))
            self.seen[1] = torch.maximum(high, self.seen[1])
            return
        least, most = self.seen.tolist()
        is_short, is_long = TOLERANCE * (int(low) + 1) < least, int(high) > TOLERANCE * most + 1
        if least <= most and (is_short or is_long):
            known = f"{least}" if least == most else f"{least} to {most}"
            number = int(low if is_short else high)
            found = f"the data have {number} {self.element}{'s' * (number != 1)}, but training had {known}"
            warn_user(f"{self.owner}: {found}. Train on such data as well, or test the guide on them by calibrate.")
