"""A limit on what building a flow may cost, given what its file holds: a few bytes can ask for a layer of terabytes.

How large the result of a function will be is estimated from its arguments, before it takes any memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

FREE_BYTES, TIMES_BYTES = 2**25, 32  # beside and per byte of tensors in the file: initialisers take some
TIMES_SQUARES = 16  # bytes per square of a matrix's longer side: the masks of autoregressive networks
MOST_SQUARES = 256  # bytes per byte in the file, at most, for these
FREE_TENSORS, TIMES_TENSORS = 500, 100
FREE_NUMBER = 2**20  # that a size may be, whatever the file holds
COUNTED = "arange", "range", "linspace", "logspace", "randperm", "tril_indices", "triu_indices"  # sized by a number
PRODUCTS = "mm", "bmm", "addmm", "matmul", "__matmul__", "__rmatmul__", "linear", "cdist"
SQUARES = "diag", "diag_embed", "diagflat", "outer", "ger", "kron", "cov", "block_diag", "cartesian_prod"
TAKEN = "__getitem__", "index_select", "gather", "embedding", "take"
UNSIZED = "flows.Dequantized", "guides.AutoPlateFlow", "guides.Site"  # where a number may be of levels, or of rows
ASKED = {  # of tensors, or views of them
    *("__get__", "__set__", "__len__", "__bool__", "size", "dim", "numel", "stride", "is_floating_point", "is_complex"),
    *("has_names", "tolist", "item", "detach", "data_ptr", "is_shared", "expand", "expand_as", "broadcast_to", "view"),
}


class Allowance(TorchFunctionMode):
    """Lets tensors be made as long as they are not many more, or far larger, than those of a file.

    Args:
        nbytes: The bytes of the tensors in the file.
        tensors: Their number.
        squares: The longer sides of matrices among them, squared and added up.

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
        if name in ASKED or (name.endswith("_") and name != "resize_" and not name.startswith("__")):
            return func(*args, **kwargs)  # which makes nothing
        if _size_of(name, args, kwargs) > self.bytes_left:
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


def _size_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Estimate the bytes of what a function returns, rather too many than too few."""
    values = (*args, *kwargs.values())
    tensors = list(_tensors_in(values))
    width = max((t.itemsize for t in tensors), default=8)
    if not tensors:
        return width * _size_from_numbers(name, values)
    first, sizes = tensors[0], _size_from_lists(values)
    if name in ("repeat", "tile"):
        return width * first.numel() * sizes
    if name.startswith("new_") or name in ("resize_", "one_hot"):
        return width * sizes * (first.numel() if name == "one_hot" else 1)
    if name == "pad":
        room = sum(abs(n) for v in values if isinstance(v, list | tuple) for n in v if isinstance(n, int))
        return width * math.prod(n + room for n in first.shape)
    if name in PRODUCTS:
        left, right = tensors[:2] if name != "addmm" else tensors[1:]
        return width * max(1, left.numel() // max(1, *left.shape[-1:])) * max(1, *right.shape[-2:])
    if name in SQUARES:
        return width * max(sum(t.numel() for t in tensors) ** 2, math.prod(t.numel() for t in tensors))
    if name in TAKEN:
        return width * first.numel() // max(1, *first.shape[:1]) * max((t.numel() for t in tensors[1:]), default=1)
    if name == "bincount":
        return 8 * max(sizes, int(first.max()) + 1 if first.numel() else 0)
    if name == "repeat_interleave":
        return width * first.numel() * max(sizes, int(tensors[-1].sum()) if tensors[1:] else 1)
    return width * (sum(t.numel() for t in tensors) if len(tensors) > 3 else _broadcast(tensors))


def _size_from_numbers(name: str, values: tuple[Any, ...]) -> int:
    """Estimate the numbers that a function without tensors returns."""
    numbers = [abs(math.ceil(v)) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if name == "eye":
        return numbers[0] * numbers[-1]
    if name in COUNTED:
        step = min([1.0, *(abs(v) for v in values[2:3] if isinstance(v, float) and v)])
        return math.ceil(2 * sum(numbers) / step)
    return 1 if name in ("tensor", "as_tensor", "scalar_tensor") else _size_from_lists(values)


def _size_from_lists(values: tuple[Any, ...]) -> int:
    """The product of numbers that a size is given by, at once or one by one, none of them negative."""
    lists = [v for v in values if isinstance(v, list | tuple) and all(isinstance(n, int) for n in v)]
    numbers = [v for v in values if type(v) is int] if not lists else []
    return math.prod(max(0, n) for n in [*numbers, *(n for part in lists for n in part)])


def _tensors_in(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (part for part in value if isinstance(part, Tensor))


def _broadcast(tensors: list[Tensor]) -> int:
    """Count the numbers of tensors that are broadcast with one another."""
    if len(tensors) == 1:
        return tensors[0].numel()
    shapes = [tuple(t.shape)[::-1] for t in tensors]
    depth = max(map(len, shapes))
    return math.prod(max((s[i] for s in shapes if i < len(s)), default=1) for i in range(depth))


def check_numbers(spec: Any, nbytes: int) -> None:
    """Refuse sizes in a spec that are beyond all that its file holds: loops would count to them.

    The number of rows of a plate, and that of levels of integers, are no sizes.
    """
    limit, waiting = max(FREE_NUMBER, nbytes), [("", "the spec", spec)]
    while waiting:
        owner, place, value = waiting.pop()
        if isinstance(value, dict) and list(value) == ["class", "arguments"] and isinstance(value["arguments"], dict):
            waiting.extend((str(value["class"]), name, part) for name, part in value["arguments"].items())
        elif isinstance(value, list | tuple):
            waiting.extend((owner, place, part) for part in value)
        elif isinstance(value, int) and (value < -FREE_NUMBER or value > (math.inf if owner in UNSIZED else limit)):
            shown = value if abs(value) < 2**63 else f"a number of {value.bit_length()} bits"
            raise ValueError(
                f"{owner:.60}: {place} holds {shown}, far beyond the {nbytes} bytes of tensors in the file"
            )
