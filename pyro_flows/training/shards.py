"""The large tensors of a checkpoint, divided over files that several processes write at once.

Processes that train together hold the same tensors.  Each writes a part of the rows of every large one, such as the
vectors of a million rows.  The checkpoint names the files and is written last, so that it is always whole.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import distributed

SHARD = re.compile(r"\.([0-9a-f]{8})-\d+")
LARGE = 1_000_000  # numbers of a tensor that is divided


def divided(state: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """Take the large tensors out of a state that is the same in all processes.

    Returns:
        The state without them, with their places under ``"shards"``, and this process's rows of each.  One process has
        nothing to divide.
    """
    leaves, spec = tree_flatten(state)
    large = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.numel() >= LARGE]
    if distributed.alone() or not large:
        return state, []
    number, rank, own = distributed.size(), distributed.rank(), []
    for place in large:
        own.append(leaves[place].detach().tensor_split(number)[rank].clone())
        leaves[place] = torch.empty(0)
    return {**tree_unflatten(leaves, spec), "shards": {"names": [*state], "places": large, "number": number}}, own


def joined(content: dict[str, Any], read: Callable[[int], list[Tensor]]) -> dict[str, Any]:
    """Return the content of a file with its large tensors.

    Args:
        content: The content: a state that was divided, and other entries.
        read: Reads the rows that a process has written, given its number.
    """
    shards = content.pop("shards", None)
    if shards is None:
        return content
    parts = [read(rank) for rank in range(shards["number"])]
    leaves, spec = tree_flatten({name: content[name] for name in shards["names"]})
    for place, rows in zip(shards["places"], zip(*parts, strict=True), strict=True):
        leaves[place] = torch.cat(rows)
    return content | tree_unflatten(leaves, spec)


def shard_of(path: Path, name: str, rank: int) -> Path:
    """Return the file of a process next to a checkpoint."""
    return path.with_name(f"{path.name}.{name}-{rank}")


def remove_shards(path: Path, name: str) -> None:
    """Remove the files of processes next to a checkpoint, except those of a name."""
    for file in path.parent.glob(f"{glob.escape(path.name)}.*"):
        found = SHARD.fullmatch(file.name.removeprefix(path.name))
        if found and found[1] != name:
            file.unlink(missing_ok=True)
