"""Activations with their slopes, a -> (a(x), a'(x)), for networks that know their own derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ValueAndSlope = Callable[[Tensor], tuple[Tensor, Tensor]]


def _tanh(a: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(a)
    return h, 1 - h * h


def _silu(a: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(a)
    h = a * gate
    return h, gate + h * (1 - gate)


def _elu(a: Tensor) -> tuple[Tensor, Tensor]:
    h = F.elu(a)
    return h, h.clamp_max(0) + 1


def _relu(a: Tensor) -> tuple[Tensor, Tensor]:
    h = F.relu(a)
    return h, h.sign()


SMOOTH: dict[type[nn.Module], ValueAndSlope] = {
    nn.ELU: _elu,
    nn.SiLU: _silu,
    nn.Softplus: lambda a: (F.softplus(a), torch.sigmoid(a)),
    nn.Tanh: _tanh,
}
KNOWN = {**SMOOTH, nn.ReLU: _relu}
