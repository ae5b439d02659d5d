"""Record of what the layers of an encoder have seen in training, to tell other data in use from it.

Fits record it.  Outside of fits layers judge their data by the record, except in tests of a guide on simulations, which
measure what a warning could only guess.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial

import torch

from ..compiler_state import is_traced

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
