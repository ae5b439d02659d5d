"""The contract of an elementwise map: one verb pair, no tensors of its own.

A bijector is a strictly increasing map of the real line onto itself whose shape is set by ``num_params`` real
numbers for each scalar.  A transform supplies these numbers: from a network (coupling, autoregressive) or from a
table of its own (elementwise).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Bijector(ABC):
    """An increasing map R -> R with ``num_params`` parameters for each scalar.

    Concrete bijectors are frozen dataclasses of hyper-parameters.  Each obeys the laws of ``tests/laws.py``: zero
    parameters are the identity, the two verbs undo each other, the log-determinant is the logarithm of autograd's
    derivative, and the map is defined and increasing on all of R.
    """

    @property
    @abstractmethod
    def num_params(self) -> int:
        """The number P of parameters for each scalar."""

    @abstractmethod
    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map x to y.

        Args:
            x: Values of shape ``(*s)``.
            params: Parameters of shape ``(*s, P)``, or any shape whose leading part broadcasts with ``x``.

        Returns:
            ``(y, log|dy/dx|)``, each of shape ``(*s)``; the log-determinant is in nats.
        """

    @abstractmethod
    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map y back to x.  Shapes as in :meth:`forward_and_log_det`.

        Returns:
            ``(x, log|dx/dy|)``.
        """


def split_params(params: Tensor) -> tuple[Tensor, ...]:
    """The P parameters of shape ``(*s)`` each, so that their gradients are put together in the conditioners' order."""
    return params.mT.unbind(-2) if params.dim() > 1 else params.unbind(-1)


def bounded(raw: Tensor, limit: float) -> Tensor:
    """A real number as one between -limit and limit, smoothly; near zero it stays what it is."""
    return limit * torch.tanh(raw / limit)
