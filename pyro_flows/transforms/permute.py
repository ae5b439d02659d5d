"""Permutation of features: y_i = x_{π(i)}, log-determinant zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import as_order
from .base import FlowTransform


class Permute(FlowTransform):
    """A fixed permutation π of the features of a vector ``(*batch, D)``, y_i = x_{π(i)}, with log-determinant zero.

    It is a buffer: it is saved, loaded and moved with the flow.

    Args:
        permutation: ``permutation[i]`` is the feature of x that becomes feature i of y.

    Raises:
        ValueError: If ``permutation`` is empty or not a permutation of 0 … D - 1.

    Example::

        >>> import torch
        >>> Permute([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0])).tolist()
        [30.0, 10.0, 20.0]
    """

    permutation: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        order = as_order("Permute", "permutation", permutation)
        super().__init__((len(order),))
        self.register_buffer("permutation", torch.tensor(order, device=getattr(permutation, "device", None)))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.permutation), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y.index_select(-1, torch.argsort(self.permutation)), y.new_zeros(y.shape[:-1])
