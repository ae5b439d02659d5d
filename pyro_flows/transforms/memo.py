"""One evaluation of a verb pair, remembered for the question that usually follows: the way back of its own result.

Correctness never depends on it.  It answers only for the very tensor that was computed, unchanged, in the grad mode
that computed it, with unchanged contexts and parameters.  It never answers for a leaf that requires grad, whose
gradient would be lost, and keeps nothing while compiling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Pair(NamedTuple):
    """What a verb has computed: y from x or x from y, and log|dy/dx|."""

    x: Tensor
    y: Tensor
    log_det: Tensor


class Memo:
    """Remembers one evaluation, on what lives for one use: a view or a distribution, never on a module.

    Args:
        modules: What the evaluation depends on.
        contexts: What else it depends on.
    """

    def __init__(self, modules: Sequence[nn.Module], contexts: Sequence[Tensor | None]) -> None:
        self._modules = modules
        self._contexts = [context for context in contexts if context is not None]
        self._tensors: list[Tensor] | None = None
        self._kept: tuple[bool, Pair, tuple[bool, int]] | None = None

    def keep(self, pair: Pair, *, forward: bool) -> None:
        """Remember a pair, of which y was computed from x, or else x from y."""
        self._kept = None
        if not torch.compiler.is_compiling():
            with contextlib.suppress(RuntimeError):  # tensors made in inference mode have no version: nothing is kept
                self._kept = forward, pair, self._stamp(pair)

    def made(self, value: Tensor, *, forward: bool) -> Pair | None:
        """The pair whose result is a value: y of an evaluation of y, or x of one of x."""
        if self._kept is None or self._kept[0] is not forward or (value.is_leaf and value.requires_grad):
            return None
        pair = self._kept[1]
        return pair if (pair.y if forward else pair.x) is value and self._holds() else None

    def of(self, x: Tensor, y: Tensor) -> Pair | None:
        """The pair of two values."""
        if self._kept is None:
            return None
        pair = self._kept[1]
        return pair if pair.x is x and pair.y is y and self._holds() else None

    def forget(self) -> None:
        self._kept = None

    def _holds(self) -> bool:
        assert self._kept is not None
        return self._kept[2] == self._stamp(self._kept[1])

    def _stamp(self, pair: Pair) -> tuple[bool, int]:
        """Changes when the grad mode, a value, a context, a parameter or a buffer does (fused optimisers go unseen).

        Versions only grow, so their sum tells whether one has.
        """
        if self._tensors is None:
            self._tensors = [t for module in self._modules for t in (*module.parameters(), *module.buffers())]
        version = sum([2 * t._version + t.requires_grad for t in self._tensors])
        return torch.is_grad_enabled(), version + 2 * sum([t._version for t in (pair.x, pair.y, *self._contexts)])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}
