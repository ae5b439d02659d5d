"""Evaluation of many events in chunks, which bounds the memory of the networks in between.

f(x_1 … x_N) = f(x_1 … x_n), f(x_{n+1} … x_{2n}), …, since events do not depend on one another.  With gradients only the
inputs of a chunk are kept, and the chunk is computed again in the backward pass: Training Deep Nets with Sublinear
Memory Cost (Chen, Xu, Zhang, Guestrin 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import TypeVar

import torch
from torch import Size, Tensor

from ..arguments import check_integers
from ..transforms.wrapped import recomputed

T = TypeVar("T", Tensor, tuple[Tensor, Tensor])


def in_chunks(
    function: Callable[..., T], chunk_size: int | None, value: Tensor, context: Tensor | None, event_dim: int
) -> T:
    """Apply a function to values and contexts, at most ``chunk_size`` of them at a time.

    The sizes of chunks differ by at most one.

    Args:
        function: ``(value, context) -> result``, a tensor ``(*batch, ...)`` with one row per event, or a tuple of such.
        chunk_size: The number of events in a chunk; None calls the function once.
        value: ``(*batch, *event_shape)``.
        context: ``(*batch, context_dim)``, or None; it broadcasts with the values.
        event_dim: The number of dimensions of an event.

    Raises:
        ValueError: If ``chunk_size`` is not a positive integer.
    """
    if chunk_size is None:
        return function(value, context)
    check_integers("Flow", chunk_size=chunk_size)
    batch = value.shape[: value.dim() - event_dim]
    if context is not None:
        batch = torch.broadcast_shapes(batch, context.shape[:-1])
    number = batch.numel()
    if number <= chunk_size:
        return function(value, context)
    pieces = math.ceil(number / chunk_size)
    contexts = repeat(None, pieces) if context is None else _split(context, 1, batch, pieces)
    chunks = zip(_split(value, event_dim, batch, pieces), contexts, strict=True)
    found = (recomputed(function, *chunk) for chunk in chunks)
    answers = (answer if isinstance(answer, tuple) else (answer,) for answer in found)
    if torch.is_grad_enabled():
        whole = [torch.cat(parts) for parts in zip(*answers, strict=True)]
    else:  # written into one place, so that memory holds each result once
        whole, start = [], 0
        for answer in answers:
            whole = whole or [part.new_empty(number, *part.shape[1:]) for part in answer]
            for result, part in zip(whole, answer, strict=True):
                result[start : start + len(part)] = part
            start += len(answer[0])
    first, *others = (result.reshape(batch + result.shape[1:]) for result in whole)
    return (first, *others) if others else first  # type: ignore[return-value]


def chunk_for(numbers: int) -> int:
    """Return a chunk size for events of so many numbers: the activations of networks of usual widths fit the cache."""
    return max(1, min(5000, 1_000_000 // max(1, numbers)))


def _split(tensor: Tensor, trailing: int, batch: Size, pieces: int) -> Iterable[Tensor]:
    """Split a tensor that broadcasts with a batch into the parts of consecutive chunks of its rows.

    A tensor of one row broadcasts with each chunk; other rows are repeated for one chunk at a time.
    """
    own = tensor.shape[: tensor.dim() - trailing]
    flat = tensor.reshape(-1, *tensor.shape[tensor.dim() - trailing :])
    if own.numel() == batch.numel():
        return flat.tensor_split(pieces)
    if own.numel() == 1:
        return repeat(flat[0], pieces)
    place = torch.arange(own.numel(), device=tensor.device).reshape(own).expand(batch).reshape(-1)
    return (flat.index_select(0, chosen) for chosen in place.tensor_split(pieces))
