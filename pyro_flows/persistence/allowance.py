"""Limit on the cost of building a flow, given the size of its file: a few bytes can ask for a layer of terabytes."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SQUARES = {"eye", "diag_embed"}  # results of the square of a size given


class Allowance(TorchDispatchMode):
    """Mode that lets operations make few more, and not far larger, tensors than a file holds.

    In all they may take 32 MB and 32 times the bytes of the file, since initialisers take some.  The masks of
    autoregressive networks take the square of a matrix's longer side; 16 bytes each are allowed, up to 256 times the
    bytes of the file.

    Args:
        tensors: The tensors in the file.

    Attributes:
        held: Their bytes.

    Raises:
        ValueError: From the operation that would exceed it, before it takes any memory.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        held = list(tensors)
        self.held = sum(tensor.nbytes for tensor in held)
        squares = sum(max(tensor.shape) ** 2 for tensor in held if tensor.ndim > 1 and tensor.numel())
        self.bytes_left = 2**25 + 32 * self.held + min(16 * squares, 256 * self.held)
        self.tensors_left = 2500 + 500 * len(held)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, so that torch does not import its compiler, which takes most of a second."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or (func._schema.is_mutable and not name.startswith("resize")):
            return func(*args, **kwargs)
        bound = _bound((args, kwargs)) ** (2 if name in SQUARES else 1)
        if bound > self.bytes_left and _size_of(func, args, kwargs) > self.bytes_left:
            self._refuse("larger")
        made = func(*args, **kwargs)
        self.bytes_left -= sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        self.tensors_left -= 1
        if self.tensors_left < 0:
            self._refuse("more")
        return made

    def _refuse(self, kind: str) -> None:
        raise ValueError(f"its spec asks for {kind} tensors than a file with {self.held} bytes of them can need")


def _bound(arguments: Any) -> float:
    """Return an upper bound of the bytes of a result: 16 times the product of all sizes and numbers of the arguments.

    A small bound makes :func:`_size_of` unnecessary, whose first run imports sympy and takes some tenths of a second.
    """
    bound = 16.0
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor):
            bound *= max(1, leaf.numel())
            if not leaf.is_floating_point() and leaf.numel():
                bound *= max(1.0, float(leaf.double().abs().max()))
        elif isinstance(leaf, int | float) and leaf:
            number = float(min(abs(leaf), 2**62))
            bound *= max(number, 1 / number)
    return bound


def _size_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return the bytes of an operation's result, found by a run on the device "meta", whose tensors have no memory."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = "meta"
    if "generator" in kwargs:
        kwargs["generator"] = None
    try:
        made = func(*args, **kwargs)
    except Exception:  # the size depends on the values, as that of bincount does, or is beyond all memory
        integers = [tensor for tensor in tensors if not tensor.is_floating_point() and tensor.numel()]
        largest = max((int(tensor.max()) for tensor in integers), default=0)
        return sum(tensor.nbytes for tensor in tensors) * (1 + largest) if tensors else math.inf
    return sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
