"""Parts of the state of a run: the average of the parameters, and the best state so far."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """The methods of an optimiser that a run calls: an optimiser of torch, or of this package."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@torch.no_grad()
def fill(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Set tensors to values; tensors without gradients also take the shapes of their values."""
    for tensor, value in zip(tensors, values, strict=True):
        (tensor if tensor.shape == value.shape else tensor.resize_(value.shape)).copy_(value)


class Average:
    """Exponential moving average of parameters, which generalises better than any single state.

    Acceleration of Stochastic Approximation by Averaging (Polyak, Juditsky 1992).  Early states count less than the
    decay alone would give them.
    """

    def __init__(self, parameters: list[Tensor], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the parameters after a step."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self._parameters], weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Set the parameters to their average for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        kept = [parameter.detach().clone() for parameter in self._parameters]
        fill(self._parameters, self.values)
        fill(self.values, kept)


class Best:
    """The best state so far, judged by the mean loss of a window of steps.

    Losses are noisy: a later state replaces an earlier one unless it is worse than the lowest mean by more than two
    standard errors.

    Attributes:
        mean: The loss at the state that is kept.
        latest: The loss at the state that was judged last.
        step: The step after which the kept state was reached.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._state = [parameter.detach().clone() for parameter in parameters]
        self._lowest, self._noise = math.inf, math.inf
        self.mean, self.latest, self.step = math.nan, math.nan, 0

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_parameters"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def offer(self, losses: list[float], step: int, *, comparable: bool = True) -> None:
        """Keep the present state unless it is worse, or in any case if losses are not comparable."""
        recent = torch.tensor([value for value in losses if math.isfinite(value)], dtype=torch.float64)
        if not len(recent):
            return
        self.latest = recent.mean().item()
        error = recent.std().item() / math.sqrt(len(recent)) if len(recent) > 1 else math.inf
        if not comparable or self.latest <= self._lowest + 2 * min(error, self._noise):
            if comparable and self.latest < self._lowest:
                self._lowest, self._noise = self.latest, error
            self._keep(step)

    def improve(self, mean: float, step: int) -> None:
        """Keep the present state if its loss on held-out data, which are the same each time, is lower."""
        self.latest = mean
        if mean < self._lowest:
            self._lowest = mean
            self._keep(step)

    def _keep(self, step: int) -> None:
        self.mean, self.step = self.latest, step
        fill(self._state, self._parameters)

    def restore(self) -> None:
        """Set the parameters to the kept state."""
        fill(self._parameters, self._state)
