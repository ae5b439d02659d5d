"""Detection of code that is compiled, recorded or mapped rather than run, and the settings of torch's compiler."""

import inspect
from contextvars import ContextVar
from typing import Any

import torch

COMPILE_SETTINGS = frozenset(inspect.signature(torch.compile).parameters)
NEW_COMPILER = "recompile_limit" in COMPILE_SETTINGS  # as torch 2.13 has it, and torch 2.6 does not


CALLS: ContextVar[list[Any] | None] = ContextVar("calls", default=None)  # of operations, while they are listed


def is_recording() -> bool:
    """Return True while :mod:`.graphs` lists the operations of a function."""
    return not torch.compiler.is_compiling() and CALLS.get() is not None  # torch cannot compile reads of variables


def is_traced() -> bool:
    """Return True if operations are being recorded or mapped rather than run."""
    return is_mapped() or is_recording()


def is_mapped() -> bool:
    """Return True while torch compiles, traces or maps operations."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )
