"""Traces of single runs of a program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pyro import poutine
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from .program import Args, Function, Kwargs, inner_of


@contextmanager
def outside_plates() -> Iterator[None]:
    """Let a program enter plates as if its caller were in none."""
    entered, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = entered


def trace_of(program: Function, args: Args, kwargs: Kwargs) -> Trace:
    """Return the trace of a run."""
    return poutine.trace(program).get_trace(*args, **kwargs)


def leaves_of(trace: Trace, *programs: Function) -> list[Tensor]:
    """Return the tensors of a trace's param statements, unconstrained, and the parameters of modules among programs."""
    values = [site["value"] for site in trace.nodes.values() if site["type"] == "param"]
    found = [value.unconstrained() if hasattr(value, "unconstrained") else value for value in values]
    modules = [part for part in map(inner_of, programs) if isinstance(part, nn.Module)]
    return found + [parameter for module in modules for parameter in module.parameters()]


def trace_at(program: Function, values: dict[str, Tensor], args: Args, kwargs: Kwargs) -> Trace:
    """Return the trace of a run at some values, without gradients and hidden from the handlers outside."""
    with poutine.block(), torch.no_grad(), outside_plates():
        return trace_of(poutine.condition(program, data=values), args, kwargs)
