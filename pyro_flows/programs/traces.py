"""Traces of single runs of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .engines import apart


def trace_of(program: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Return the trace of a run."""
    return poutine.trace(program).get_trace(*args, **kwargs)


def trace_at(
    program: Callable[..., Any], values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Trace:
    """Return the trace of a run with some sites held at values, without gradients, unseen by the handlers outside."""
    with poutine.block(), torch.no_grad(), apart():
        return trace_of(poutine.condition(program, data=values), args, kwargs)
