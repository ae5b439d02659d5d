"""The gradient of one step, summed over all processes and clipped.

One all-reduce of one flat vector serves parameters of modules and of Pyro's store, and objectives that fill in
gradients themselves.  The vector also holds the loss and the wishes of each process, so that all processes skip, save
and stop at the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..programs.log_density import NonFiniteDraw, is_breakdown
from . import distributed


class Backward(NamedTuple):
    """The outcome of one evaluation of the loss.

    Attributes:
        loss: Its value, NaN if it or any gradient is not finite.
        error: The reason, if this process knows it.
        unsolved: True if an equation could not be solved.
        wishes: For each wish, True if a process has it; empty if there is one process only.
    """

    loss: float
    error: Exception | None
    unsolved: bool
    wishes: list[bool]


def backward(
    loss: Callable[[], Tensor],
    share: Callable[[], float],
    parameters: list[Tensor],
    clip_norm: float,
    wishes: Callable[[], list[bool]],
) -> Backward:
    """Compute the loss and its clipped gradients.

    Args:
        loss: Computes the loss on this process's rows or draws.
        share: Returns their share of all rows or draws; called after the loss.
        parameters: The tensors that need gradients.
        clip_norm: The largest norm of all gradients together.
        wishes: Returns the wishes of this process; called after the loss.

    Raises:
        Exception: Any error of the loss, unless it says that a draw was too far out.
    """
    value, error = torch.tensor(math.nan), None
    try:
        found = loss()
        found.backward()
        value = found.detach()
    except NonFiniteDraw:
        pass  # the loss would not be finite: it counts as NaN
    except Exception as raised:
        if not is_breakdown(raised):
            raise
        error = raised
    unsolved, wished = isinstance(error, FloatingPointError), []
    if distributed.alone():
        total = value.item()
    else:
        distributed.barrier()
        total, *flags = _add_up(parameters, value, share(), [unsolved, *wishes()])
        unsolved, *wished = map(bool, flags)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    return Backward(total if norm.isfinite() else math.nan, error, unsolved, wished)


@torch.no_grad()
def _add_up(parameters: list[Tensor], value: Tensor, share: float, flags: list[bool]) -> list[float]:
    """Replace gradients by their weighted sum over all processes, or None if no process has one.

    Returns:
        The weighted sum of the losses, and for each flag the number of processes that raised it.
    """
    gradients = [parameter.grad for parameter in parameters]
    parts = [
        (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    own = torch.cat([*parts, value.reshape(1).to(parts[0].device)]).mul_(share)
    raised = torch.tensor([*(gradient is not None for gradient in gradients), *flags])
    flat = torch.cat((own, raised.to(own)))
    with distributed.reaching():
        dist.all_reduce(flat)
    *sums, rest = flat.split([*(len(part) for part in parts), 1 + len(raised)])
    total, *counts = rest.tolist()
    for parameter, part, count in zip(parameters, sums, counts, strict=False):
        parameter.grad = part.reshape(parameter.shape).to(parameter.dtype) if count else None
    return [total, *counts[len(parameters) :]]
