"""Programs vectorised over draws: one run for many of them, and the parts of its trace that belong to each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor


def side_by_side(program: Callable[..., Any], size: int, nesting: int) -> Callable[..., Any]:
    """A program that runs ``size`` draws at a time, under a plate left of ``nesting`` others."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate("_pyro_flows_draws", size, dim=-1 - nesting):
            return program(*args, **kwargs)

    return run


def log_prob_of_draws(
    trace: Trace, size: int, nesting: int | None, among: Callable[[str], bool] = lambda name: True
) -> Tensor:
    """The log-density of each draw, ``(size,)``: of the sites asked for, summed over all dimensions but the draws'."""
    trace.compute_log_prob(lambda name, _: among(name))
    parts = []
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and among(name):
            log_prob = site["log_prob"]
            many = nesting is not None and log_prob.dim() > nesting
            rows = log_prob.reshape(log_prob.shape[0] if many else 1, -1)
            parts.append(rows.sum(-1).expand(size))
    return sum(parts, torch.zeros(()))


def room_of(site: dict[str, Any], nesting: int) -> tuple[int, ...]:
    """Dimensions for the plates that a site does not lie in, between many draws and the shape of one."""
    return (1,) * (nesting + site["fn"].event_dim - site["value"].dim())


def rows_of(name: str, value: Tensor, shape: torch.Size, size: int) -> Tensor:
    """A site's tensor with its N draws in front and no dimensions of absent plates: ``(N, *shape)``.

    Args:
        name: The site, for the error.
        value: The tensor in the trace of N draws.
        shape: Its shape in the trace of a single draw.
        size: The number N of draws.
    """
    if value.numel() == size * shape.numel():
        return value.reshape(size, *shape)
    if value.numel() == shape.numel():  # it does not vary from draw to draw
        return value.reshape(shape).expand(size, *shape)
    raise ValueError(
        f"site {name!r} has shape {tuple(shape)} for one draw but {tuple(value.shape)} for {size} draws at once; let "
        "the model broadcast to the left of its plates, or use vectorize=False."
    )
