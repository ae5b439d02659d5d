"""The question whether any number has changed that a kept value depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = tuple[list[Any], list[Tensor]]  # facts, and copies of numbers


def unchanged_from_now(
    modules: Iterable[nn.Module], others: Sequence[Tensor], *, by_counts: bool = False
) -> Callable[[], bool]:
    """Return a function that returns True while tensors, their graphs and the grad mode are as they are now.

    By default it compares copies of all numbers, which show every change.  Copying and comparing take some tenths of a
    millisecond for a guide of 50 tensors.

    Args:
        modules: Modules with the tensors.
        others: Other tensors.
        by_counts: True to compare torch's counts of changes: fast, for a value that is scored in the same step.  Fused
            optimisers and assignments to ``.data`` leave no count.
    """
    parts = [part for module in modules for part in module.modules()]

    def state() -> State:
        slots = [part._parameters for part in parts] + [part._buffers for part in parts]
        tensors = [*(tensor for slot in slots for tensor in slot.values() if tensor is not None), *others]
        facts, numbers = _counts(tensors) if by_counts else _contents(parts, tensors)
        return [torch.is_grad_enabled(), *(tensor.grad_fn for tensor in others), *facts], numbers

    def holds() -> bool:
        facts, numbers = state()
        return facts == before[0] and all(map(torch.equal, numbers, before[1]))

    before = state()
    return holds


def _counts(tensors: list[Tensor]) -> State:
    """Return the identities of tensors, with torch's counts of their changes."""
    return [(id(t), -1 if t.is_inference() else t._version, t.requires_grad) for t in tensors], []


def _contents(parts: list[nn.Module], tensors: list[Tensor]) -> State:
    """Return the modes of modules with the kinds of tensors, and the numbers of each kind in one tensor.

    Nothing is compared while ``torch.jit`` traces a program, since its one run is not interrupted.
    """
    if torch._C._get_tracing_state():
        return [], []
    found: dict[tuple[torch.dtype, torch.device, bool], list[Tensor]] = {}
    for t in tensors:
        found.setdefault((t.dtype, t.device, t.requires_grad), []).append(t.detach().reshape(-1))
    return [[part.training for part in parts], *found], [torch.cat(of_kind) for of_kind in found.values()]


def can_be_kept() -> bool:
    """Return False while compiling or mapping under ``torch.func``, where tensors have no contents to compare."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
