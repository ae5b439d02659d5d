"""The arguments of a call, remembered so that the very same ones are known again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

PLAIN = bool | int | float | complex | str | bytes | None | torch.Size | torch.dtype | torch.device


class Arguments:
    """Positional and keyword arguments, whose tensors are held so that no other can take their identity.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.versions = [_version(leaf) for leaf in self.leaves]

    def are(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True if others are the same objects, unchanged; never where an object could have changed unseen."""
        leaves, spec = tree_flatten((args, kwargs))
        return spec == self.spec and all(map(_same, self.leaves, self.versions, leaves))


def are_used_up(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if some argument is an iterator, which a second run of the model would find used up."""
    return any(isinstance(leaf, Iterator) for leaf in tree_flatten((args, kwargs))[0])


def _version(leaf: Any) -> int | None:
    """The version of a tensor, which grows whenever it is written to; inference tensors have none."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None


def _same(left: Any, version: int | None, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left is right and version is not None and version == _version(right)
    if isinstance(left, PLAIN):
        return type(left) is type(right) and left == right
    return left is right and callable(left)
