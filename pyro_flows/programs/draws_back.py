"""Sums over discrete values in log space, whose gradient is a draw of these values.

The gradient of log Σ exp is the softmax, which holds marginals.  With one draw of the softmax in its place, the
gradients with respect to the terms of a whole sum mark the values of one joint draw.  This is forward filtering,
backward sampling by automatic differentiation.  Torch-Struct: Deep Structured Prediction Library (Rush 2020,
arXiv:2002.00876).

The module is a backend for ``opt_einsum``, which looks up ``einsum``, ``tensordot`` and ``transpose`` by name.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.ops.einsum.torch_log import transpose as transpose
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing
from torch import Tensor


class DrawingRing(LogRing):
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
        share = x.softmax(-1).nan_to_num(1.0)  # if all values are impossible, the draw is uniform
        place = torch.multinomial(share.reshape(-1, x.shape[-1]), 1).reshape(gradient.shape)
        return torch.nn.functional.one_hot(place, x.shape[-1]) * gradient.unsqueeze(-1)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Add operands with named dimensions, and take log Σ exp over the dimensions that the output lacks."""
    inputs, output = equation.split("->")
    summed = sorted(set(inputs) - set(output) - {","})
    dims = [*output, *summed]
    total = torch.zeros(())
    for operand, names in zip(operands, inputs.split(","), strict=True):
        ordered = operand.permute([names.index(dim) for dim in dims if dim in names])
        total = total + ordered.reshape([operand.shape[names.index(dim)] if dim in names else 1 for dim in dims])
    return _LogSumExp.apply(total.flatten(len(output))) if summed else total


tensordot = Tensordot(einsum)
