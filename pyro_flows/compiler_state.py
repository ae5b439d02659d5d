"""Detection of code that is compiled, recorded or mapped rather than run, and the settings of torch's compiler."""

import inspect

import torch

COMPILE_SETTINGS = frozenset(inspect.signature(torch.compile).parameters)
NEW_COMPILER = "recompile_limit" in COMPILE_SETTINGS  # as torch 2.13 has it, and torch 2.6 does not


def is_traced() -> bool:
    """Return True if operations are being recorded or mapped rather than run."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )
