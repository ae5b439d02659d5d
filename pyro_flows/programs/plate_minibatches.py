"""Minibatches without replacement of the rows of a subsampled plate."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Shuffled(nn.Module):
    """Minibatches without replacement until all rows were seen, so that their noise cancels.

    All rows are equally likely, as in Pyro's own minibatches, which are drawn independently of each other.
    """

    order: Tensor
    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.zeros(0, dtype=torch.long), persistent=False)
        self.register_buffer("place", torch.zeros((), dtype=torch.long), persistent=False)

    def next(self, full_size: int, size: int) -> Tensor:
        """Return the next ``size`` rows out of ``full_size``."""
        if torch._C._get_tracing_state():  # a traced program would repeat the same rows for ever
            return torch.randperm(full_size, device=self.order.device)[:size]
        start = int(self.place)
        if len(self.order) != full_size or start + size > full_size:
            start = 0
            self.order.resize_(full_size).copy_(torch.randperm(full_size))
        self.place.fill_(start + size)
        return self.order[start : start + size].clone()  # the next shuffle is in place
