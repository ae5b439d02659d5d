"""A limit on what building a flow may cost, given what its file holds: a few bytes can ask for a layer of terabytes.

The size of what an operation returns is found on torch's meta device, before it takes any memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FREE_BYTES, TIMES_BYTES = 2**25, 32  # beside and per byte of tensors in the file: initialisers take some
TIMES_SQUARES = 16  # bytes per square of a matrix's longer side: the masks of autoregressive networks
MOST_SQUARES = 256  # bytes per byte in the file, at most, for these
FREE_TENSORS, TIMES_TENSORS = 500, 100
FREE_NUMBER = 2**20  # that a size may be, whatever the file holds
SIZED_BY_VALUES = torch.ops.aten.bincount, torch.ops.aten.repeat_interleave
UNSIZED = "flows.Dequantized", "guides.AutoPlateFlow", "guides.Site"  # where a number may be of levels, or of rows


class Allowance(TorchDispatchMode):
    """Let tensors be made as long as they are not many more, or far larger, than those of a file.

    Args:
        nbytes: The bytes of the tensors in the file.
        tensors: Their number.
        squares: The longer sides of matrices among them, squared and added up.

    Raises:
        ValueError: From the operation that would exceed it, before it takes any memory.
    """

    def __init__(self, nbytes: int, tensors: int, squares: int) -> None:
        super().__init__()
        self.bytes_left = FREE_BYTES + TIMES_BYTES * nbytes + min(TIMES_SQUARES * squares, MOST_SQUARES * nbytes)
        self.tensors_left = FREE_TENSORS + TIMES_TENSORS * tensors
        self._held = nbytes
        self._sizes: dict[Any, int] = {}  # of results found before, since layers are alike

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(value.alias_info for value in func._schema.returns):
            return func(*args, **kwargs)  # a view, or in place: it makes nothing
        given = tree_leaves((args, kwargs))
        key = func, *((value.shape, value.dtype) if isinstance(value, Tensor) else value for value in given)
        if key not in self._sizes or func.overloadpacket in SIZED_BY_VALUES:
            self._sizes[key] = _size_of(func, args, kwargs)
        if self._sizes[key] > self.bytes_left:
            self._refuse("larger")
        made = func(*args, **kwargs)
        for value in _tensors_in(made):
            self.bytes_left -= value.nbytes
            self.tensors_left -= 1
        if self.tensors_left < 0:
            self._refuse("more")
        return made

    def _refuse(self, kind: str) -> None:
        raise ValueError(f"its spec asks for {kind} tensors than a file with {self._held} bytes of them can need")


def _size_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the bytes of what an operation makes; where they depend on the numbers in tensors, estimate them."""
    given = _tensors_in((args, kwargs))
    meta_args, meta_kwargs = tree_map_only(Tensor, lambda value: value.to("meta"), (args, kwargs))
    if not given:
        meta_kwargs["device"] = "meta"
    try:
        return sum(value.nbytes for value in _tensors_in(func(*meta_args, **meta_kwargs)))
    except Exception:  # there is no such operation on the meta device, or it refuses its arguments
        sizes = [value.numel() * (value.dim() + 1) for value in given]
        if func.overloadpacket in SIZED_BY_VALUES:
            sizes += [int(value.double().abs().sum()) for value in given]
        return 8 * sum(sizes)


def _tensors_in(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


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
