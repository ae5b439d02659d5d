"""Record of what the layers of an encoder have seen in training, to tell other data in use from it.

Fits record it.  Outside of fits layers judge their data by the record, except in tests of a guide on simulations, which
measure what a warning could only guess.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn

from ..compiler_state import is_traced
from ..user_code import warn_user

TOLERANCE = 1.2  # lengths may leave the range of training by this factor and one element more
RECORD, JUDGE, IGNORE = "record", "judge", "ignore"
_mode = ContextVar("mode", default=JUDGE)


@contextlib.contextmanager
def _in_mode(mode: str) -> Iterator[None]:
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


recorded = partial(_in_mode, RECORD)  # a block that records the data of passes with gradients, as a fit does
unjudged = partial(_in_mode, IGNORE)  # a block that neither records nor judges data


def records() -> bool:
    """True if a layer must record its data now."""
    return not is_traced() and _mode.get() == RECORD and torch.is_grad_enabled()


def judges() -> bool:
    """True if a layer must judge its data now.  Compiled, mapped and traced code hides their numbers."""
    return not is_traced() and _mode.get() == JUDGE


class Lengths(nn.Module):
    """The range of lengths in training, and a warning of lengths far outside of it.

    A network extrapolates to other lengths, and posteriors at its contexts are then wrong without a sign.  Only what a
    mask leaves counts.

    Args:
        owner: The name of the encoder, for warnings.

    Attributes:
        seen: The least and the largest length in training, ``(2,)``; the least is larger before any training.
    """

    seen: Tensor

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner
        self.register_buffer("seen", torch.tensor([torch.iinfo(torch.long).max, 0]))

    def forward(self, there: Tensor) -> None:
        """Record the lengths of a batch in a fit, and judge them in use.

        Args:
            there: True for the elements that count, ``(*batch, n)``.

        Warns:
            UserWarning: If a length lies far outside of the range of training.
        """
        if not (records() or judges()) or not there.shape[:-1].numel():
            return
        low, high = there.sum(-1).aminmax()
        if records():
            self.seen.copy_(torch.stack((torch.minimum(low, self.seen[0]), torch.maximum(high, self.seen[1]))))
            return
        least, most = self.seen.tolist()
        is_short, is_long = TOLERANCE * (int(low) + 1) < least, int(high) > TOLERANCE * most + 1
        if least <= most and (is_short or is_long):
            known = f"{least}" if least == most else f"{least} to {most}"
            number = int(low if is_short else high)
            found = f"the data have {number} element{'s' * (number != 1)}, but training had {known}"
            warn_user(f"{self.owner}: {found}. Train on such data as well, or test the guide on them by calibrate.")
