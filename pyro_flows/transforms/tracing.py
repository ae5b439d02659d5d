"""Whether code runs on numbers, or is looked at by what compiles, records or maps it."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether operations are being recorded or mapped rather than run."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )
