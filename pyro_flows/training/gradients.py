"""The gradient of one step, added up over all processes and clipped.

One sum of one flat vector does for parameters of modules and of Pyro's store and for objectives that fill in gradients
themselves.  It also holds the loss and what each process has to say, so that all skip, save and stop at the same steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..programs.log_density import NonFiniteDraw, is_breakdown
from . import distributed


class Backward(NamedTuple):
    """What came of a step's loss.

    Attributes:
        loss: Its value, NaN if it or any gradient is not finite.
        error: Why, if that is known in this process.
        unsolved: Whether an equation could not be solved.
        wishes: Of each wish, whether a process has it; none are asked for where there is but one.
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
    """Compute loss and clipped gradients.

    Args:
        loss: Computes the loss of this process's rows or draws.
        share: What share of all they are, asked for afterwards.
        parameters: What needs gradients.
        clip_norm: The largest norm of all gradients together.
        wishes: What this process wishes, asked for afterwards.

    Raises:
        Exception: What the loss raises, unless a draw was too far out; ``Parted`` in the other processes.
    """
    value, error = torch.tensor(math.nan), None
    try:
        found = loss()
        found.backward()
        value = found.detach()
    except NonFiniteDraw:
        pass  # the loss would not be finite: it counts as NaN
    except Exception as raised:
        error = raised
        if distributed.alone() and not is_breakdown(error):
            raise
    unsolved, wished = isinstance(error, FloatingPointError), []
    if distributed.alone():
        total = value.item()
    else:
        distributed.barrier(None if error is None or is_breakdown(error) else error)
        total, *flags = _add_up(parameters, value, share(), [unsolved, *wishes()])
        unsolved, *wished = map(bool, flags)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    return Backward(total if norm.isfinite() else math.nan, error, unsolved, wished)


@torch.no_grad()
def _add_up(parameters: list[Tensor], value: Tensor, share: float, flags: list[bool]) -> list[float]:
    """Let gradients be their weighted sum over all processes, none where none has one; that of losses, and how many
    processes have raised each flag."""
    gradients = [parameter.grad for parameter in parameters]
    dtype = functools.reduce(torch.promote_types, {parameter.dtype for parameter in parameters})
    device = parameters[0].device
    parts = [
        (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1).to(dtype)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    told = [float(gradient is not None) for gradient in gradients] + [float(flag) for flag in flags]
    own = torch.cat([*parts, value.reshape(1).to(device, dtype)]).mul_(share)
    flat = torch.cat((own, torch.tensor(told, dtype=dtype, device=device)))
    with distributed.reaching():
        dist.all_reduce(flat)
    *sums, rest = flat.split([*(len(part) for part in parts), 1 + len(told)])
    total, *counts = rest.tolist()
    for parameter, part, count in zip(parameters, sums, counts, strict=False):
        parameter.grad = part.reshape(parameter.shape).to(parameter.dtype) if count else None
    return [total, *counts[len(parameters) :]]
