"""The state of tensors at one time, to tell whether any has changed since: by contents, or by torch's own counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Kind = tuple[torch.dtype, torch.device, bool]


class Counters:
    """The tensors of modules and torch's counts of their changes: quick to compare, for what is scored at once.

    Fused optimisers and assignments to ``.data`` leave no count.

    Args:
        modules: The modules.
        others: Other tensors.
    """

    def __init__(self, modules: Iterable[nn.Module], others: Sequence[Tensor]) -> None:
        self._modules = [part for module in modules for part in module.modules()]
        self._others = others
        self._kept = self._state()

    def holds(self) -> bool:
        """Return True if the tensors are the same and no change was counted."""
        return self._state() == self._kept

    def _state(self) -> Any:
        return [(id(t), -1 if t.is_inference() else t._version, t.requires_grad) for t in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        slots = [part._parameters for part in self._modules] + [part._buffers for part in self._modules]
        return [*(tensor for slot in slots for tensor in slot.values() if tensor is not None), *self._others]


class Snapshot(Counters):
    """Copies of all parameters and buffers of modules, and of other tensors.

    Versions of tensors, which torch counts, miss fused optimisers and assignments to ``.data``; contents miss nothing.
    Copying and comparing take some tenths of a millisecond for a guide of 50 tensors.

    Args:
        modules: The modules.
        others: The other tensors.
    """

    def holds(self) -> bool:
        """Return True if numbers, ``requires_grad`` and the modules' modes are what they were.

        Nothing is compared while ``torch.jit`` traces a program, whose one run nothing interrupts.
        """
        now = self._state()
        if self._kept is None or now is None:
            return self._kept is None and bool(torch._C._get_tracing_state())
        (modes, contents), (kept_modes, kept_contents) = now, self._kept
        return (
            modes == kept_modes
            and contents.keys() == kept_contents.keys()
            and all(torch.equal(contents[kind], kept) for kind, kept in kept_contents.items())
        )

    def _state(self) -> tuple[list[bool], dict[Kind, Tensor]] | None:
        """Return the modes of the modules, and the numbers of all tensors, joined by kind."""
        if torch._C._get_tracing_state():
            return None
        found: dict[Kind, list[Tensor]] = {}
        for t in self._tensors():
            found.setdefault((t.dtype, t.device, t.requires_grad), []).append(t.detach().reshape(-1))
        joined = {kind: torch.cat(tensors) for kind, tensors in found.items()}
        return [part.training for part in self._modules], joined


def can_be_kept() -> bool:
    """Return False while compiling or mapping under ``torch.func``, where tensors have no contents to compare."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
