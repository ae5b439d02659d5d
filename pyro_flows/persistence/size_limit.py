"""Limit on the cost of building a flow, given the size of its file: a few bytes can ask for a layer of terabytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

FREE_BYTES, TIMES_BYTES = 2**25, 32  # in all, and per byte of tensors in the file: initialisers take some
TIMES_SQUARES = 16  # bytes per square of a matrix's longer side: the masks of autoregressive networks
MOST_SQUARES = 256  # bytes per byte in the file, at most, for these
FREE_TENSORS, TIMES_TENSORS = 500, 100
FREE_NUMBER = 2**20  # a size that any file may ask for
SQUARES = {"eye", "diag", "diag_embed", "diagflat", "combinations"}  # results beyond the product of the sizes given
SMALL = {  # functions that return properties, views or summaries of tensors
    *("__get__", "__set__", "__len__", "__bool__", "__int__", "size", "dim", "numel", "stride", "data_ptr", "tolist"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_shared", "has_names", "item", "all", "any", "detach"),
    *("expand", "expand_as", "broadcast_to", "view", "_set_grad_enabled"),
}


class Allowance(TorchFunctionMode):
    """Mode that lets functions make few more, and not far larger, tensors than a file holds.

    Args:
        nbytes: The bytes of the tensors in the file.
        tensors: Their number.
        squares: The sum of the squared longer sides of matrices.

    Raises:
        ValueError: From the function that would exceed it, before it takes any memory.
    """

    def __init__(self, nbytes: int, tensors: int, squares: int) -> None:
        super().__init__()
        self.bytes_left = FREE_BYTES + TIMES_BYTES * nbytes + min(TIMES_SQUARES * squares, MOST_SQUARES * nbytes)
        self.tensors_left = FREE_TENSORS + TIMES_TENSORS * tensors
        self._held = nbytes

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in SMALL or (name.endswith("_") and name != "resize_" and not name.startswith("__")):
            return func(*args, **kwargs)
        bound = math.inf if name in SQUARES else _bound(args, kwargs)
        if bound > self.bytes_left and _size_of(func, args, kwargs) > self.bytes_left:
            self._refuse("larger")
        made = func(*args, **kwargs)
        if isinstance(made, Tensor):
            self.bytes_left -= made.nbytes
            self.tensors_left -= 1
            if self.tensors_left < 0:
                self._refuse("more")
        return made

    def _refuse(self, kind: str) -> None:
        raise ValueError(f"its spec asks for {kind} tensors than a file with {self._held} bytes of them can need")


def _bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return an upper bound of the bytes of a result: 16 times the product of all sizes and numbers of the arguments.

    A small bound makes :func:`_size_of` unnecessary, whose first run imports sympy and takes most of a second.
    """
    bound = 16.0
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            bound *= max(1, leaf.numel())
            if not leaf.is_floating_point() and leaf.numel():
                bound *= max(1.0, float(leaf.double().abs().max()))
        elif isinstance(leaf, int | float) and leaf:
            number = float(min(abs(leaf), 2**62))
            bound *= max(number, 1 / number)
        elif isinstance(leaf, Sequence) and not isinstance(leaf, str):  # a range, whose numbers are not looked at
            return math.inf
    return bound


def _size_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return the bytes of a function's result, found by a run on tensors of the device "meta", which have no memory."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), (args, kwargs))
    if "device" in kwargs or not tensors:
        kwargs["device"] = "meta"
    if "generator" in kwargs:
        kwargs["generator"] = None
    try:
        made = func(*args, **kwargs)
    except Exception as error:
        if not tensors:  # a function that takes no device makes no tensor, and others fail at sizes beyond all memory
            return 0 if isinstance(error, TypeError) else math.inf
        # The size depends on the values, as that of bincount does, and grows with the largest integer.
        integers = [tensor for tensor in tensors if not tensor.is_floating_point() and tensor.numel()]
        largest = max((int(tensor.max()) for tensor in integers), default=0)
        return sum(tensor.nbytes for tensor in tensors) * (1 + largest)
    return sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
