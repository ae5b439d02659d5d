"""The state of a run: parameters, optimisers, losses, and the best of what was seen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """The methods of an optimiser that a run calls: those of torch, or of this package."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None: ...
    def step(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


HISTORY = "losses", "held_out", "seconds", "stopped"  # the plain attributes of a run that its state holds


@dataclass(frozen=True)
class HeldOut:
    """How a run is judged on held-out data.

    Attributes:
        loss: Computes the loss on them, in nats, given how often it was computed, this time included.
        every: After how many steps it is asked for.
        patience: After how many times without an improvement the run ends.
        decay: Of the average of the parameters, which is what is judged and kept.
    """

    loss: Callable[[int], float]
    every: int
    patience: int
    decay: float = 0.99


class Run:
    """What changes from step to step, as one state: parameters, optimisers, losses, the best state so far.

    Args:
        parameters: What is trained.
        optimizers: What trains it.
        companion: What has a state beside them, with ``state_dict`` and ``load_state_dict``.
        buffers: What else the trained modules hold and change.
        decay: Of the average of the parameters, a share a step; None where no average is kept.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        optimizers: Sequence[Optimizer],
        companion: Any,
        buffers: list[Tensor],
        decay: float | None,
    ) -> None:
        self.parameters = parameters
        self.optimizers = optimizers
        self.companion = companion if hasattr(companion, "load_state_dict") else None
        self.buffers = buffers
        self.average = None if decay is None else Average(parameters, decay)
        self.losses: list[float] = []
        self.held_out: list[float] = []
        self.best = Best([*parameters, *(buffer for buffer in buffers if buffer.is_floating_point())])
        self.seconds = 0.0
        self.stopped = ""

    @property
    def own(self) -> tuple[str, ...]:
        """Which entries of the state each of several processes has to itself: it differs with what each has drawn."""
        return () if getattr(self.companion, "in_common", False) else ("companion", "buffers")

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "companion": self.companion.state_dict() if self.companion else None,
            "buffers": self.buffers,
            "average": self.average.values if self.average else [],
            "best": self.best.state_dict(),
            **{name: getattr(self, name) for name in HISTORY},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.parameters, self.buffers, self.average.values if self.average else []
        with torch.no_grad():
            for name, tensors in zip(("parameters", "buffers", "average"), own, strict=True):
                for tensor, kept in zip(tensors, state[name], strict=True):
                    (tensor if tensor.shape == kept.shape else tensor.resize_(kept.shape)).copy_(kept)
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        if self.companion:
            self.companion.load_state_dict(state["companion"])
        self.best.load_state_dict(state["best"])
        for name in HISTORY:
            setattr(self, name, state[name])


class Average:
    """The exponential moving average of parameters, which generalises better than any one of their states.

    Acceleration of Stochastic Approximation by Averaging (Polyak, Juditsky 1992).
    """

    def __init__(self, parameters: list[Tensor], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after a step; early ones weigh less than the decay alone would let them."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self._parameters], share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters be the average for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, parameter in zip(self.values, self._parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


class Best:
    """The best state seen so far, judged by the mean loss of a window of steps.

    Losses are noisy: a later state replaces an earlier one unless it is worse than the lowest mean by more than two
    standard errors.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._state = [parameter.detach().clone() for parameter in parameters]
        self._lowest, self._noise = math.inf, math.inf
        self.mean, self.latest, self.step = math.nan, math.nan, 0

    def state_dict(self) -> dict[str, Any]:
        names = "_state", "_lowest", "_noise", "mean", "latest", "step"
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def offer(self, losses: list[float], step: int, *, comparable: bool = True) -> None:
        """Take the present state unless it is worse; where losses are not comparable, in any case."""
        recent = torch.tensor([value for value in losses if math.isfinite(value)], dtype=torch.float64)
        if not len(recent):
            return
        self.latest = recent.mean().item()
        error = recent.std().item() / math.sqrt(len(recent)) if len(recent) > 1 else math.inf
        if not comparable or self.latest <= self._lowest + 2 * min(error, self._noise):
            if comparable and self.latest < self._lowest:
                self._lowest, self._noise = self.latest, error
            self._take(step)

    def improve(self, mean: float, step: int) -> None:
        """Take the present state if it is better, as a loss on held-out data says, which is the same data each time."""
        self.latest = mean
        if mean < self._lowest:
            self._lowest, self._noise = mean, 0.0
            self._take(step)

    def _take(self, step: int) -> None:
        self.mean, self.step = self.latest, step
        for kept, parameter in zip(self._state, self._parameters, strict=True):
            kept.copy_(parameter.detach())

    def restore(self) -> None:
        with torch.no_grad():
            for kept, parameter in zip(self._state, self._parameters, strict=True):
                parameter.copy_(kept)
