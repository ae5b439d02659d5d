"""The state of a run: parameters, optimisers, losses, and the best of what was seen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Run:
    """What changes from step to step, as one state: parameters, optimisers, losses, the best state so far."""

    def __init__(self, parameters: list[Tensor], optimizers: list[torch.optim.Optimizer], companion: Any) -> None:
        self.parameters = parameters
        self.optimizers = optimizers
        self.companion = companion if hasattr(companion, "load_state_dict") else None
        self.losses: list[float] = []
        self.best = Best(parameters)
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "companion": self.companion.state_dict() if self.companion else None,
            "losses": self.losses,
            "best": self.best.state_dict(),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for parameter, kept in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(kept)
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        if self.companion:
            self.companion.load_state_dict(state["companion"])
        self.losses[:] = state["losses"]
        self.best.load_state_dict(state["best"])
        self.seconds = state["seconds"]


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
            self.mean, self.step = self.latest, step
            for kept, parameter in zip(self._state, self._parameters, strict=True):
                kept.copy_(parameter.detach())

    def restore(self) -> None:
        with torch.no_grad():
            for kept, parameter in zip(self._state, self._parameters, strict=True):
                parameter.copy_(kept)
