"""A transform at a context, for torch's own classes, and the watch over tensors that guards what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

if TYPE_CHECKING:
    from .base import FlowTransform


class View(Transform):
    """A transform at a context, as torch's :class:`~torch.distributions.TransformedDistribution` wants it.

    torch asks for a value and then for the log-determinant of the pair (x, y).  So a view keeps the log-determinant of
    its last pair.  It returns this once, if asked about the same two tensors while every number that it depends on is
    unchanged.  Values are always computed.

    Args:
        transform: The transform.
        context: ``(*batch, context_dim)``, or None.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear
        >>> view, x = View(LULinear(3)), torch.ones(5, 3)
        >>> y = view(x)
        >>> view.log_abs_det_jacobian(x, y).shape  # without a second evaluation
        torch.Size([5])
    """

    bijective = True

    def __init__(self, transform: FlowTransform, context: Tensor | None = None) -> None:
        super().__init__()
        self.domain, self.codomain = transform.domain, transform.codomain
        self.transform = transform
        self.context = context
        # The last pair y = t(x), its log|det dy/dx|, and a watch over the tensors that it depends on.
        self._pair: tuple[Tensor, Tensor, Tensor, Callable[[], bool]] | None = None

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self.transform.forward_and_log_det(x, self.context)
        self._keep(x, y, log_det)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self.transform.inverse_and_log_det(y, self.context)
        self._keep(x, y, -log_det)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        pair, self._pair = self._pair, None
        if pair is not None:
            of_x, of_y, log_det, unchanged = pair
            if of_x is x and of_y is y and unchanged():
                return log_det
        return self.transform.log_abs_det_jacobian(x, y, self.context)

    def with_cache(self, cache_size: int = 1) -> View:
        """Return the view itself: it always keeps the log-determinant of one pair."""
        return self

    def _keep(self, x: Tensor, y: Tensor, log_det: Tensor) -> None:
        if can_be_kept():
            depends = [x, y] if self.context is None else [x, y, self.context]
            self._pair = x, y, log_det, watch([self.transform], depends)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pair": None}


State = tuple[list[Any], list[Tensor]]  # facts, and copies of numbers


def watch(modules: Iterable[nn.Module], others: Sequence[Tensor], *, by_counts: bool = False) -> Callable[[], bool]:
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
