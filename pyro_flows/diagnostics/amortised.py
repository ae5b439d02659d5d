"""Checks that take an amortised guide, and its posteriors of simulated data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..arguments import check_program
from ..guides import AutoPlateFlow
from ..guides.amortised import OfDatasets
from ..guides.guide_call import Call, Found, RowMasks, masks_of_all
from ..programs.simulator import Simulator


def check_amortised(caller: str, guide: Any) -> None:
    """Raise ValueError unless a guide is amortised and trained.

    Args:
        caller: The name of the public function.
        guide: The guide.
    """
    if isinstance(guide, type):
        check_program(guide=guide)
    if not getattr(guide, "is_amortised", False):
        kind = type(guide).__name__ + (" without one" if hasattr(guide, "is_amortised") else "")
        must = "an AutoFlow with an encoder, or an AutoPlateFlow with a global_encoder"
        raise ValueError(f"{caller}: guide must be {must}, got {kind}.")
    if guide.prototype_trace is None:
        raise ValueError(f"{caller}: the guide was never trained. Fit it first: fit_amortized(model, guide).")


def check_model(guide: Any, simulator: Simulator, data: dict[str, Tensor]) -> Found:
    """Raise ValueError unless a model has the latents of an amortised guide; return its sites for a dataset."""
    args, kwargs = simulator.arguments(data)
    call = Call(simulator.caller, simulator.model.call, args, kwargs, guide.prototype_trace, guide.row_plates)
    return cast(Found, guide.check_same(call))


def simulator_of(
    caller: str,
    model: Callable[..., Any],
    guide: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observed: dict[str, Tensor],
) -> Simulator:
    """Return the simulator of a model for the test of an observation by an amortised guide.

    Raises:
        ValueError: Unless the guide is amortised and trained, and the observation is one dataset of the guide's model,
            without rows that a mask hides.  Simulated datasets have all rows, and so other posteriors.
    """
    check_amortised(caller, guide)
    simulator = Simulator(caller, model, args, kwargs)
    simulator.check_data("observed", observed)
    found = check_model(guide, simulator, observed)
    if isinstance(guide, AutoPlateFlow) and masks_of_all(found).get((guide.plate,), RowMasks()).rows is not True:
        fault = f"observed must have all rows of plate {guide.plate!r}, but the model masks some"
        raise ValueError(f"{caller}: {fault}. Leave absent rows out of the data and of the plate.")
    return simulator


@torch.no_grad()
def posteriors(guide: Any, simulator: Simulator, data: dict[str, Tensor]) -> OfDatasets:
    """Return the posteriors of M datasets, given by the model's arguments, each ``(M, *shape)``."""
    args, kwargs = simulator.arguments(data)
    found: OfDatasets = guide.of_datasets(*args, **kwargs)
    return found
