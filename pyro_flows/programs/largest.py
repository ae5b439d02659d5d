"""The size of the largest tensor that a run computes from its latents, such as the mean of each row of data."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Largest(TorchFunctionMode):
    """Watches a run whose latents require gradients.

    Attributes:
        size: The number of elements of the largest tensor that depends on a latent; at least 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, tuple) else (found,):
            if isinstance(part, Tensor) and part.requires_grad:
                self.size = max(self.size, part.numel())
        return found
