"""The contract of a conditioner: a network (x, context) -> the parameters of a bijector."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conditioner(nn.Module, ABC):
    """A network that gives ``num_params`` parameters to each of ``output_dim`` features.

    Its last layer starts at zero, so that every bijector starts at the identity.  Parameter p of feature i is output
    ``p * output_dim + i``: each parameter of all features lies side by side, as the elementwise maps read them.
    """

    input_dim: int
    output_dim: int
    num_params: int
    context_dim: int

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Compute parameters.

        Args:
            x: Inputs of shape ``(*batch, input_dim)``.
            context: Contexts of shape ``(*batch, context_dim)``, broadcast with ``x``, or None if ``context_dim`` is 0.

        Returns:
            Parameters of shape ``(*batch, output_dim, num_params)``.
        """


class MaskedLinear(nn.Module):
    """y = (W ∘ M) x + b, where the 0/1 matrix M cuts connections; it starts as ``torch.nn.Linear`` does, or at zero."""

    mask: Tensor

    def __init__(self, in_features: int, out_features: int, *, zero: bool = False) -> None:
        super().__init__()
        start = nn.Linear(in_features, out_features)
        self.weight, self.bias = start.weight, start.bias
        self.register_buffer("mask", torch.ones(out_features, in_features), persistent=False)
        if zero:
            zero_(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def zero_(layer: nn.Module) -> nn.Module:
    """Set all parameters of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
