"""A loss and its gradients as one function of tensors, which a graph replaces where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..graphs import Traced


class RecordedLoss:
    """A loss whose value and gradients are those of a graph, where that is possible: see :class:`~..graphs.Traced`.

    Args:
        loss: A function of tensors without gradients.  It may draw random numbers.
        trained: The parameters.
    """

    def __init__(self, loss: Callable[..., Tensor], trained: Sequence[Tensor]) -> None:
        self._loss, self._trained = loss, list(trained)
        self._traced = Traced(self._value_and_gradients, draws=True)

    def __call__(self, *inputs: Tensor) -> Tensor:
        # Hooks of parameters would run in the graph, and again on the gradients that it gives.
        if not self._traced.is_traced or any(one._backward_hooks for one in self._trained):
            return self._loss(*inputs)
        value, *gradients = self._traced(*inputs)
        found: Tensor = _Known.apply(value, gradients, *self._trained)
        return found

    def _value_and_gradients(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            value = self._loss(*inputs)
            return value.detach(), *torch.autograd.grad(value, self._trained, allow_unused=True)


class _Known(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *trained: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if one is None else of_loss * one for one in ctx.gradients)
