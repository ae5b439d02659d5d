"""The state of tensors at one time, to tell whether any has changed since: by contents, or by torch's own counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

Kind = tuple[torch.dtype, torch.device, bool]


class Snapshot:
    """Copies of all parameters and buffers of modules, and of other tensors.

    Versions of tensors, which torch counts, miss fused optimisers and assignments to ``.data``; contents miss nothing.
    Copying and comparing take some tenths of a millisecond for a guide of 50 tensors.

    Args:
        modules: The modules.
        others: The other tensors.
    """

    def __init__(self, modules: Iterable[nn.Module], others: Sequence[Tensor]) -> None:
        self._modules = [part for module in modules for part in module.modules()]
        self._others = others
        self._kept = self._contents()

    def holds(self) -> bool:
        """Return True if numbers, ``requires_grad`` and the modules' modes are what they were.

        Nothing is compared while ``torch.jit`` traces a program, whose one run nothing interrupts.
        """
        if self._kept is None:
            return bool(torch._C._get_tracing_state())
        now = self._contents()
        return (
            now is not None
            and now[0] == self._kept[0]
            and now[1].keys() == self._kept[1].keys()
            and all(torch.equal(now[1][kind], kept) for kind, kept in self._kept[1].items())
        )

    def _contents(self) -> tuple[list[bool], dict[Kind, Tensor]] | None:
        """Return the modes of the modules, and the numbers of all tensors, joined by kind."""
        if torch._C._get_tracing_state():
            return None
        found: dict[Kind, list[Tensor]] = {}
        for part in self._modules:
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None:
                    _add(found, tensor)
        for tensor in self._others:
            _add(found, tensor)
        joined = {kind: torch.cat(tensors) for kind, tensors in found.items()}
        return [part.training for part in self._modules], joined


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
        self._kept = self._counts()

    def holds(self) -> bool:
        """Return True if the tensors are the same and no change was counted."""
        return self._counts() == self._kept

    def _counts(self) -> list[tuple[int, int, bool]]:
        slots = [part._parameters for part in self._modules] + [part._buffers for part in self._modules]
        tensors = [tensor for slot in slots for tensor in slot.values() if tensor is not None]
        return [(id(t), -1 if t.is_inference() else t._version, t.requires_grad) for t in (*tensors, *self._others)]


def _add(found: dict[Kind, list[Tensor]], tensor: Tensor) -> None:
    found.setdefault((tensor.dtype, tensor.device, tensor.requires_grad), []).append(tensor.detach().reshape(-1))


def can_be_kept() -> bool:
    """Return False while compiling or mapping under ``torch.func``, where tensors have no contents to compare."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
