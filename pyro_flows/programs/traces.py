"""Traces of single runs of a program."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import _bound_partial
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

Function = Callable[..., Any]  # a Pyro program
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def signature_of(program: Function) -> inspect.Signature:
    """Return the signature of a program without the handlers around it; errors as for ``inspect.signature``."""
    while isinstance(program, _bound_partial):  # a handler around a program
        program = program.func.args[1]
    return inspect.signature(program.forward if isinstance(program, nn.Module) else program)


def outline_of(program: Function) -> inspect.Signature | None:
    """Return the names and kinds of a program's arguments, all of them optional; None if Python does not know them."""
    try:
        return outline((p.name, p.kind.name) for p in signature_of(program).parameters.values())
    except (TypeError, ValueError):
        return None


def outline(arguments: Iterable[tuple[str, str]]) -> inspect.Signature:
    """Return a signature of optional arguments from their names and kinds, such as ``"KEYWORD_ONLY"``."""
    found = []
    for name, kind in arguments:
        default = inspect.Parameter.empty if kind.startswith("VAR_") else None
        found.append(inspect.Parameter(name, getattr(inspect.Parameter, kind), default=default))
    return inspect.Signature(found)


def arguments_of(program: Function, args: Args, kwargs: Kwargs) -> Kwargs:
    """Return the arguments of a call by their names, defaults included; by their places if the names are unknown."""
    try:
        bound = signature_of(program).bind(*args, **kwargs)
    except (TypeError, ValueError):  # Python does not know the signature, or the arguments do not fit it
        return {**{f"argument {place}": value for place, value in enumerate(args)}, **kwargs}
    bound.apply_defaults()
    return dict(bound.arguments)


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
    return found + [parameter for part in programs if isinstance(part, nn.Module) for parameter in part.parameters()]


def trace_at(program: Function, values: dict[str, Tensor], args: Args, kwargs: Kwargs) -> Trace:
    """Return the trace of a run at some values, without gradients and hidden from the handlers outside."""
    with poutine.block(), torch.no_grad(), outside_plates():
        return trace_of(poutine.condition(program, data=values), args, kwargs)
