"""Guides in training: in training mode, and without the units of their networks.

The settings of ``fit_svi``, its warm-up, decay and clipping, were tuned for weights as torch initialises and scales
them.  Guides store their networks in units that are safe with any optimiser; training puts these aside.  The parameters
of each row take larger steps than shared ones, since each row is seen once in many steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..conditioners.base import Paced
from ..guides.base import holders
from ..guides.contexts import RowContexts
from .elbo_loss import forget_compiled

OF_ROWS = 32.0  # the unit of the parameters of rows, unless the rows start near the posterior


@contextlib.contextmanager
def in_training(guide: Any, parameters: list[Tensor], objective: Any, *, rows_near: bool = False) -> Iterator[None]:
    """Put a guide into training mode, without paces; afterwards into evaluation mode, with its own.

    The outputs of the guide stay the same, bit for bit.

    Args:
        guide: The guide.
        parameters: The tensors that are trained.
        objective: The loss, whose compiled functions are dropped, since units are constants in them.
        rows_near: True if rows of plates start near their posteriors.
    """
    with contextlib.ExitStack() as stack:
        for one in guides_of(guide, parameters):
            stack.callback(one.eval)
            one.train()
        stack.callback(forget_compiled, objective)
        for part in parts_of(guide, parameters):
            if isinstance(part, Paced):
                stack.callback(part.set_unit, part.unit)
                part.set_unit(OF_ROWS if isinstance(part, RowContexts) and not rows_near else 1.0)
        forget_compiled(objective)
        yield


def guides_of(guide: Any, parameters: list[Tensor]) -> list[Any]:
    """Return a guide that is a module; guides that a function calls are found by their parameters."""
    return [guide] if isinstance(guide, nn.Module) else holders(parameters)


def parts_of(guide: Any, parameters: list[Tensor]) -> list[nn.Module]:
    """Return all modules of a guide."""
    return [part for one in guides_of(guide, parameters) for part in one.modules()]
