"""Checks of an amortised guide and its posteriors of simulated data, and tests of one observation by them.

A test of one observation has several statistics.  The largest of them, brought to one scale among exchangeable
objects, has a rank that is a p-value.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..arguments import check_program
from ..guides import AutoPlateFlow
from ..guides.amortised import OfDatasets
from ..guides.guide_call import Call, Found, RowMasks, masks_of_all
from ..programs.program import Args, Function, Kwargs
from ..programs.simulator import Simulator


def simulator_of(caller: str, model: Function, guide: Any, args: Args, kwargs: Kwargs) -> Simulator:
    """Return the simulator of a model, or raise ValueError unless a guide is amortised and trained."""
    if isinstance(guide, type):
        check_program(guide=guide)
    if not getattr(guide, "is_amortised", False):
        kind = type(guide).__name__ + (" without one" if hasattr(guide, "is_amortised") else "")
        must = "an AutoFlow with an encoder, or an AutoPlateFlow with a global_encoder"
        raise ValueError(f"{caller}: guide must be {must}, got {kind}.")
    if guide.prototype_trace is None:
        raise ValueError(f"{caller}: the guide was never trained. Fit it first: fit_amortized(model, guide).")
    return Simulator(caller, model, args, kwargs)


def check_model(guide: Any, simulator: Simulator, data: dict[str, Tensor]) -> Found:
    """Raise ValueError unless a model has the latents of an amortised guide; return its sites for a dataset."""
    args, kwargs = simulator.arguments(data)
    call = Call(simulator.caller, simulator.model.call, args, kwargs, guide.prototype_trace, guide.row_plates)
    return cast(Found, guide.check_same(call))


def check_observed(guide: Any, simulator: Simulator, observed: dict[str, Tensor]) -> None:
    """Raise ValueError unless an observation is one dataset of the guide's model, without rows that a mask hides.

    Simulated datasets have all rows, and so other posteriors.
    """
    simulator.check_data("observed", observed)
    found = check_model(guide, simulator, observed)
    if isinstance(guide, AutoPlateFlow) and masks_of_all(found).get((guide.plate,), RowMasks()).rows is not True:
        fault = f"observed must have all rows of plate {guide.plate!r}, but the model masks some"
        raise ValueError(f"{simulator.caller}: {fault}. Leave absent rows out of the data and of the plate.")


@torch.no_grad()
def posteriors(guide: Any, simulator: Simulator, data: dict[str, Tensor]) -> OfDatasets:
    """Return the posteriors of M datasets, given by the model's arguments, each ``(M, *shape)``."""
    args, kwargs = simulator.arguments(data)
    found: OfDatasets = guide.of_datasets(*args, **kwargs)
    return found


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


class Statistic(NamedTuple):
    """A statistic of N exchangeable objects, ``(N,)``, and the fault that a large value shows, in words.

    A fault of less weight is told only if the others are clearly smaller.
    """

    value: Tensor
    fault: str
    weight: float = 1.0


def largest(scores: Sequence[Statistic], place: int, level: float) -> tuple[float, Tensor, float, float, str]:
    """Return ``statistic`` to ``fault`` of :class:`ObservationTest`, for the object at a place among all objects."""
    values = torch.stack([scaled(score.value) for score in scores])
    told = values[:, place] * torch.tensor([score.weight for score in scores]).to(values)
    together = values.amax(0)
    null = together[torch.arange(len(together), device=together.device) != place % len(together)]
    return float(together[place]), null, p_value(together, place), level, scores[int(told.argmax())].fault


def scaled(value: Tensor) -> Tensor:
    """Return statistics ``(N,)`` such that their median is 0 and their 98 % quantile 1; NaN counts as 0."""
    value = value.nan_to_num(0.0)  # a rank needs an order, and any number keeps the p-value exact
    middle, high = torch.quantile(value, torch.tensor([0.5, 0.98]).to(value))
    return (value - middle) / (high - middle).clamp(min=1e-12)


def p_value(value: Tensor, place: int) -> float:
    """Return the share of N exchangeable statistics that are at least the one at a place; NaN counts as 0."""
    value = value.nan_to_num(0.0)
    return float((value >= value[place]).double().mean())
