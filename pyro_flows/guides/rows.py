"""The rows of a subsampled plate: which come next, their data, and whether data and rows belong together."""

from __future__ import annotations

from typing import Any

import torch
from pyro import validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from ..programs.minibatches import Shuffled
from .guide_call import Call
from .prototype import Found, Rows


def places_of(given: Tensor, full_size: int) -> Tensor | None:
    """Return the indices of the rows that a plate is given as ``subsample=``, None if they cannot be told.

    They may be indices, or, as Pyro allows, the rows' data themselves: all of them in their order, or some.
    """
    order = torch.arange(full_size, device=given.device)
    whole = len(given) == full_size
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
        return order if whole else None
    if whole:
        indices = torch.equal(given, order) or torch.equal(given.sort().values, order)
    else:
        indices = bool(((given >= 0) & (given < full_size)).all())
    return given if indices else order if whole else None


def data_plates(found: Found) -> list[str]:
    """Return the plates that a model gives their rows' data as ``subsample=``, and not indices."""
    return [name for name, (size, given) in found.given.items() if places_of(given, size) is not given]


class InTurn(Messenger):
    """Lets a plate that is subsampled take its rows in turn, unless its rows are given or replayed."""

    def __init__(self, name: str, rows: Shuffled) -> None:
        super().__init__()
        self.name, self.rows = name, rows

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if msg["name"] == self.name and isinstance(fn, _Subsample) and (fn.subsample_size or fn.size) < fn.size:
            fn.sample = lambda *_: self.rows.next(fn.size, fn.subsample_size)


def take_rows(call: Call, indices: Tensor, full_size: int) -> Call:
    """Return a call with some rows only of the tensors that have one row for each of the plate's."""

    def take(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == full_size:
            return value[indices.to(value.device)]
        return value

    kwargs = {name: take(value) for name, value in call.kwargs.items()}
    return call._replace(args=tuple(map(take, call.args)), kwargs=kwargs)


def check_tied(call: Call, name: str, rows: Rows) -> None:
    """Refuse a subsampled plate whose rows are not those of its indices: nothing could be learned row by row."""
    if rows.chosen is not None or rows.size == rows.full_size:
        return
    latents, seen = call.start, []
    for _ in range(10):  # a few rows may be alike
        indices = torch.randperm(rows.full_size)[: rows.size]
        with validation_enabled(False):
            trace = call.trace_at({**latents, name: indices})
        inside = (s for s in trace.nodes.values() if any(f.name == name for f in s.get("cond_indep_stack", ())))
        seen.append([s["value"] for s in inside if s["is_observed"] and s["name"] not in latents])
    if seen[0] and all(torch.equal(a, b) for other in seen for a, b in zip(seen[0], other, strict=True)):
        part = f"plate {name!r} is subsampled ({rows.size} of {rows.full_size} rows)"
        fault = f"{part}, but its data are the same whatever its indices"
        way = f"take rows by its indices, `with pyro.plate({name!r}, ...) as i: ... obs=y[i]`, or by subsample=i"
        raise ValueError(f"AutoPlateFlow: {fault}. Use an encoder, or {way}.")
