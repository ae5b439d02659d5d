"""Sums over discrete values in log space, whose gradient is a draw of these values.

The gradient of log Σ exp is the softmax, which holds marginals.  With one draw of the softmax in its place, the
gradients of a whole sum with respect to its terms mark the values of one joint draw.  This is forward filtering and
backward sampling by automatic differentiation: Torch-Struct: Deep Structured Prediction Library (Rush 2020,
arXiv:2002.00876).  Pyro's ``SampleRing`` fails for some models with several chains in a plate.

The module is a backend of ``opt_einsum``, which finds ``einsum``, ``tensordot`` and ``transpose`` by their names.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing
from torch import Tensor


class SamplingRing(LogRing):
    """Pyro's sums and products in log space, with draws as gradients."""

    _backend = __name__


class _LogSumExp(torch.autograd.Function):
    """log Σ exp over the last dimension, with a draw as gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.logsumexp(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        share = x.softmax(-1).nan_to_num(1.0)  # draws without a density get discrete values too, and any will do
        place = torch.multinomial(share.reshape(-1, x.shape[-1]), 1).reshape(gradient.shape)
        return torch.nn.functional.one_hot(place, x.shape[-1]) * gradient.unsqueeze(-1)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Sum operands over the dimensions that an equation names, and log-sum-exp over those that its output lacks."""
    inputs, output = equation.split("->")
    named = inputs.split(",")
    summed = sorted(set(inputs) - set(output) - {","})
    dims = [*output, *summed]
    total = sum(
        (_arranged(operand, names, dims) for operand, names in zip(operands, named, strict=True)), torch.zeros(())
    )
    return _LogSumExp.apply(total.flatten(len(output))) if summed else total


def _arranged(operand: Tensor, names: str, dims: list[str]) -> Tensor:
    """Return an operand with its dimensions in an order, and with size 1 for those that it lacks."""
    ordered = operand.permute([names.index(dim) for dim in dims if dim in names])
    return ordered.reshape([operand.shape[names.index(dim)] if dim in names else 1 for dim in dims])


def transpose(operand: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Permute the dimensions of an operand."""
    return operand.permute(axes)


tensordot = Tensordot(einsum)
