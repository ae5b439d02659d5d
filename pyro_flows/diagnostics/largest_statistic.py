"""The largest of several statistics, brought to one scale among exchangeable ones, so that its rank is a p-value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Statistic(NamedTuple):
    """A statistic of N exchangeable objects, ``(N,)``, and the fault that a large value shows, in words.

    A fault of less weight is told only if the others are clearly smaller.
    """

    value: Tensor
    fault: str
    weight: float = 1.0


class Largest(NamedTuple):
    """The largest of several statistics, as in :class:`ObservationTest`."""

    statistic: float
    null: Tensor
    p_value: float
    level: float
    fault: str


@dataclass(frozen=True)
class ObservationTest(ABC):
    """A test of one observation by the largest of several statistics."""

    names: list[str]
    statistic: float
    null: Tensor
    p_value: float
    level: float
    fault: str

    @property
    def passed(self) -> bool:
        """True if the p-value is above the level, as without a fault it is with probability ``1 - level``."""
        return self.p_value > self.level

    @property
    @abstractmethod
    def reason(self) -> str:
        """The result in words."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(passed={self.passed}, p_value={self.p_value:.3g}): {self.reason}"


def largest(scores: Sequence[Statistic], place: int, level: float) -> Largest:
    """Return the largest statistic of the object at a place, ranked among those of all objects."""
    values = torch.stack([scaled(score.value) for score in scores])
    told = values[:, place] * torch.tensor([score.weight for score in scores]).to(values)
    together = values.amax(0)
    others = torch.arange(len(together), device=together.device) != place % len(together)
    return Largest(
        statistic=float(together[place]),
        null=together[others],
        p_value=p_value(together, place),
        level=level,
        fault=scores[int(told.argmax())].fault,
    )


def scaled(value: Tensor) -> Tensor:
    """Return statistics ``(N,)`` such that their median is 0 and their 98 % quantile 1; NaN counts as 0."""
    value = value.nan_to_num(0.0)  # a rank needs an order, and any number keeps the p-value exact
    middle, high = torch.quantile(value, torch.tensor([0.5, 0.98]).to(value))
    return (value - middle) / (high - middle).clamp(min=1e-12)


def p_value(value: Tensor, place: int) -> float:
    """Return the share of N exchangeable statistics that are at least the one at a place."""
    return float((value >= value[place]).double().mean())
