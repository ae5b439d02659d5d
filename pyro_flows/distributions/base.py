"""The standard normal base of a flow, as a module that moves with it."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class StandardNormal(nn.Module):
    """Builds N(0, I) over events of a given shape, in the dtype and on the device of the flow that holds it.

    Args:
        event_shape: The shape of an event.

    Example::

        >>> StandardNormal((3,))().event_shape
        torch.Size([3])
    """

    zeros: Tensor

    def __init__(self, event_shape: tuple[int, ...] | torch.Size) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        self.register_buffer("zeros", torch.zeros(self.event_shape), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        ones = torch.ones_like(self.zeros)
        return dist.Normal(self.zeros, ones, validate_args=False).to_event(self.zeros.dim())
