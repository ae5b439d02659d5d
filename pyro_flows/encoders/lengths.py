"""The lengths of series, or the sizes of sets, that an encoder has been trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..user_code import warn_user
from .masks import is_traced

TOLERANCE = 1.2  # the factor by which a length may leave the range of training without a warning


class Lengths(nn.Module):
    """The range of lengths in training, and a warning of lengths outside of it.

    A network extrapolates to other lengths, and posteriors at its contexts are then wrong without a sign.  Only what a
    mask leaves counts.  ``torch.compile`` and ``torch.func`` skip this layer.

    Args:
        owner: The name of the encoder, for warnings.
        elements: The word for what is counted, such as ``"steps"``.

    Attributes:
        seen: The least and the largest length in training, ``(2,)``; the least is larger before any training.
    """

    seen: Tensor

    def __init__(self, owner: str, elements: str) -> None:
        super().__init__()
        self.owner, self.elements = owner, elements
        self.register_buffer("seen", torch.tensor([1, 0]))

    def forward(self, there: Tensor) -> None:
        """Note the lengths of a batch in training, in passes with gradients, and judge them in other passes.

        Args:
            there: True for the elements that count, ``(*batch, n)``.

        Warns:
            UserWarning: If a length lies far outside of the range of training.
        """
        if is_traced() or not there.shape[:-1].numel():
            return
        low, high = there.sum(-1).aminmax()
        if self.training and torch.is_grad_enabled():
            fresh = self.seen[0] > self.seen[1]
            self.seen[0] = torch.where(fresh, low, torch.minimum(low, self.seen[0]))
            self.seen[1] = torch.maximum(high, self.seen[1])
            return
        least, most = self.seen.tolist()
        if least > most:
            return
        is_short, is_long = bool(TOLERANCE * low < least), bool(high > TOLERANCE * most)
        if is_short or is_long:
            known = f"{least}" if least == most else f"{least} to {most}"
            found = f"the data have {int(low if is_short else high)} {self.elements}, but training had {known}"
            warn_user(f"{self.owner}: {found}. Train on such data as well, or test the guide on them by calibrate.")
