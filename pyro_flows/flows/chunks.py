"""Many events in chunks, so that what networks hold in between is that of a chunk, and not of all events.

f(x_1 … x_N) = f(x_1 … x_n), f(x_{n+1} … x_{2n}), …: what holds of each event on its own may be computed for some at a
time.  With gradients a chunk keeps its input alone and is computed again in the backward pass, as by Chen, Xu, Zhang,
Guestrin 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Size, Tensor

from ..arguments import check_integers
from ..transforms.recompute import recomputed

T = TypeVar("T", Tensor, tuple[Tensor, Tensor])


def in_chunks(
    function: Callable[..., T], chunk_size: int | None, value: Tensor, context: Tensor | None, event_dim: int
) -> T:
    """What a function makes of values and contexts, called with at most ``chunk_size`` of them at a time.

    The sizes of chunks differ by one at most.  Without gradients the answers are written into one place.

    Args:
        function: ``(value, context) -> result``, a tensor ``(*batch, ...)`` with one row for each event, or a tuple.
        chunk_size: The number of events in a chunk; None calls the function once, with what is there.
        value: ``(*batch, *event_shape)``.
        context: ``(*batch, context_dim)``, or None; it broadcasts with the values.
        event_dim: The number of dimensions of an event.

    Raises:
        ValueError: If ``chunk_size`` is no positive integer.
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
    values = _rows(value, event_dim, batch)
    contexts = (lambda rows: None) if context is None else _rows(context, 1, batch)
    pieces = math.ceil(number / chunk_size)
    edges = [number * piece // pieces for piece in range(pieces + 1)]
    chunks = [slice(*pair) for pair in pairwise(edges)]
    answers = (_parts(recomputed(function, values(rows), contexts(rows))) for rows in chunks)
    if torch.is_grad_enabled():
        whole = [torch.cat(parts) for parts in zip(*answers, strict=True)]
    else:  # each answer is kept once
        whole = []
        for rows, answer in zip(chunks, answers, strict=True):
            whole = whole or [part.new_empty(number, *part.shape[1:]) for part in answer]
            for result, part in zip(whole, answer, strict=True):
                result[rows] = part
    results = tuple(result.reshape(batch + result.shape[1:]) for result in whole)
    return results[0] if len(results) == 1 else results  # type: ignore[return-value]


def chunk_for(numbers: int) -> int:
    """Return a chunk size for events of so many numbers: what networks of usual widths compute fits into the cache."""
    return max(1, min(5000, 1_000_000 // max(1, numbers)))


def _rows(tensor: Tensor, trailing: int, batch: Size) -> Callable[[slice], Tensor]:
    """From some rows of a batch, laid out as one dimension, to the part of a tensor that belongs to them.

    A tensor of one row broadcasts with all; others are repeated for the rows of the chunk alone.
    """
    own = tensor.shape[: tensor.dim() - trailing]
    flat = tensor.reshape(-1, *tensor.shape[tensor.dim() - trailing :])
    if own.numel() == batch.numel():
        return lambda rows: flat[rows]
    if own.numel() == 1:
        return lambda rows: flat[0]
    place = torch.arange(own.numel(), device=tensor.device).reshape(own).expand(batch).reshape(-1)
    return lambda rows: flat.index_select(0, place[rows])


def _parts(answer: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)
