"""A budget for searches over models that run one draw at a time: as many runs as a time allows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..user_code import warn_user
from ..vjp import LogDensity

GRADIENT = 3  # runs that one with a gradient counts as


class RunBudget:
    """A number of runs, and those that are spent.

    Args:
        seconds: The time to spend.
        cost: The time of one run, in seconds; 0 for no limit.

    Attributes:
        number: The number of runs.
        cost: The time of one run.
    """

    def __init__(self, seconds: float, cost: float) -> None:
        self.number, self.cost = seconds / cost if cost else math.inf, cost
        self._spent, self._is_told = 0, False

    @property
    def is_spent(self) -> bool:
        """True if all runs are spent."""
        return self._spent > self.number

    def counted(self, density: LogDensity) -> LogDensity:
        """Return a log-density whose runs are counted."""

        def run(z: Tensor) -> Tensor:
            self._spent += len(z) * (GRADIENT if torch.is_grad_enabled() and z.requires_grad else 1)
            return density(z)

        return run

    def watched(self, watch: Callable[..., bool], caller: str) -> Callable[..., bool]:
        """Return a function that ends a search, as ``watch`` does, and warns, once all runs are spent."""

        def watch_runs(*words: str) -> bool:
            if self.is_spent and not self._is_told:
                self._is_told = True
                warn_user(f"{caller}: the search for a start ended after {self.number:.0f} runs, as {self.words}.")
            return watch(*words) or self.is_spent

        return watch_runs

    @property
    def words(self) -> str:
        """The reason for the budget, as a clause."""
        return f"the model runs one draw at a time, and a run takes {self.cost:.2g} s"
