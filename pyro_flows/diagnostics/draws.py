"""Draws of a guide, scored by model and guide: the raw material of every diagnostic.

Guide and model are run together, many draws at a time, under one outer plate to the left of all plates of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor


class Draws(NamedTuple):
    """A batch of N draws.

    ``log_p`` and ``log_q`` are the log-densities of model and guide, ``(N,)`` in nats; ``model`` is the model's trace,
    to be read through :func:`rows_of`; ``single`` is the trace of one draw, which shows what shape each site has.
    """

    log_p: Tensor
    log_q: Tensor
    model: Trace
    single: Trace


def single_trace(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Trace, int]:
    """Run guide and model once: the model's trace, and how many dimensions the plates take."""
    with poutine.block(), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    frames = [
        frame
        for trace in (guide_trace, model_trace)
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return model_trace, max((-frame.dim for frame in frames), default=0)


@torch.no_grad()
def draw(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    *,
    batch_size: int = 1000,
    vectorize: bool = True,
) -> Iterator[Draws]:
    """Yield ``num_samples`` draws in batches of at most ``batch_size``, or one at a time without ``vectorize``."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    with pyro.validation_enabled(False):  # a draw of no density is for the weights to show
        yield from _batches(model, guide, args, kwargs, num_samples, batch_size if vectorize else 1, vectorize)


def _batches(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    batch_size: int,
    vectorize: bool,
) -> Iterator[Draws]:
    single, nesting = single_trace(model, guide, args, kwargs)
    for name, site in single.nodes.items():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size is not None and frame.size < frame.full_size:
                raise ValueError(
                    f"site {name!r} lies in plate {frame.name!r}, which is subsampled ({frame.size} of "
                    f"{frame.full_size} rows): draws would be weighed against different data. Let the plate run over "
                    "all rows."
                )
    remaining = num_samples
    while remaining > 0:
        size = min(batch_size, remaining)
        remaining -= size
        run_model, run_guide = model, guide
        if vectorize:
            run_model, run_guide = _plated(model, size, nesting), _plated(guide, size, nesting)
        with poutine.block():
            guide_trace = poutine.trace(run_guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(run_model, trace=guide_trace)).get_trace(*args, **kwargs)
        check_model_guide_match(model_trace, guide_trace)
        guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        log_p, log_q = (_total(trace, size, nesting) for trace in (model_trace, guide_trace))
        yield Draws(log_p, log_q, model_trace, single)


def _plated(program: Callable[..., Any], size: int, nesting: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate("_pyro_flows_draws", size, dim=-1 - nesting):
            return program(*args, **kwargs)

    return run


def _total(trace: Trace, size: int, nesting: int) -> Tensor:
    """The log-density of each draw: every site's, summed over all dimensions but that of the draws."""
    trace.compute_log_prob()
    total = torch.zeros(size)
    for site in trace.nodes.values():
        if site["type"] == "sample":
            log_prob = site["log_prob"]
            rows = log_prob.reshape(log_prob.shape[0], -1) if log_prob.dim() > nesting else log_prob.reshape(1, -1)
            total = total.to(rows) + rows.sum(-1)
    return total


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
        f"site {name!r} has shape {tuple(shape)} for one draw but {tuple(value.shape)} for {size} draws side by side; "
        "let the model broadcast to the left of its plates, or use vectorize=False."
    )
