"""Draws of a guide, scored by model and guide: the raw material of every diagnostic.

Guide and model are run together, many draws at a time, under one outer plate to the left of all plates of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from .. import checks
from .alongside import log_prob_of_draws, rows_of, side_by_side
from .latents import check_match
from .nesting import nesting_of
from .noise import warn_of_noise
from .quoting import quoted

WAY_OUT = (
    "Let the model broadcast to the left of its plates, with (x * w).sum(-1) in place of x @ w, say; give "
    "max_plate_nesting where it has dimensions of its own to the left of its plates; or run one draw at a time: "
    "vectorize=False in psis, to_arviz and fit_amortized, num_particles=1 or objective=Trace_ELBO(num_particles=n) in "
    "fit_svi."
)


class Draws(NamedTuple):
    """A batch of N draws.

    ``log_p`` and ``log_q`` are the log-densities of model and guide, ``(N,)`` in nats; ``model`` is the model's trace,
    to be read through :func:`rows_of`; ``single`` is the trace of one draw, which shows what shape each site has;
    ``nesting`` is the number of dimensions that the plates take, None for a draw without the plate of the draws.
    """

    log_p: Tensor
    log_q: Tensor
    model: Trace
    single: Trace
    nesting: int | None


def single_trace(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Trace, Trace, int]:
    """Run guide and model once: the model's trace, the guide's, and how many dimensions the plates take."""
    checks.check_program(model=model, guide=guide)
    with poutine.block(), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return model_trace, guide_trace, nesting_of(guide_trace, model_trace)


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
    if not checks.is_integer(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}.")
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
    single, nesting = check_guide(model, guide, args, kwargs)
    if vectorize:
        warn_of_noise(check_side_by_side(model, guide, args, kwargs))
    remaining = num_samples
    while remaining > 0:
        size = min(batch_size, remaining)
        remaining -= size
        yield _run(model, guide, args, kwargs, size, nesting if vectorize else None, single)


def _run(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    nesting: int | None,
    single: Trace,
    watch: Callable[[str], contextlib.AbstractContextManager[None]] = lambda program: contextlib.nullcontext(),
) -> Draws:
    """One batch of draws, vectorised under a plate left of ``nesting`` others, or a single one without a plate."""
    if nesting is not None:
        model, guide = side_by_side(model, size, nesting), side_by_side(guide, size, nesting)
    with poutine.block(), watch("guide"):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    with poutine.block(), watch("model"):
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        model_trace = prune_subsample_sites(model_trace)
        log_p = log_prob_of_draws(model_trace, size, nesting)
    with watch("guide"):
        log_q = log_prob_of_draws(prune_subsample_sites(guide_trace), size, nesting)
    return Draws(log_p, log_q, model_trace, single, nesting)


@contextlib.contextmanager
def _vectorised(program: str) -> Iterator[None]:
    """Say that a program, which runs for a single draw, does not run vectorised over draws, and where it fails."""
    try:
        yield
    except Exception as error:  # a user's program may raise anything
        raise ValueError(f"the {program} does not run vectorised over draws: {quoted(error)}. {WAY_OUT}") from error


def check_trained(caller: str, guide: Any) -> None:
    """Refuse a guide that was never trained, where that shows."""
    if getattr(guide, "is_fresh", False) or getattr(guide, "prototype_trace", guide) is None:
        kind = type(guide).__name__
        raise ValueError(f"{caller}: the {kind} was never trained; fit it first: fit_svi(model, guide, ...).")


def check_integers(caller: str, **numbers: tuple[Any, int]) -> None:
    """Refuse arguments that are no integers, or less than they must be: each comes with its least value."""
    for name, (value, least) in numbers.items():
        checks.check_integers(caller, least, **{name: value})


def check_guide(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Trace, int]:
    """Refuse guides whose draws cannot be weighed; return the model's trace and how many dimensions the plates take."""
    single, guide_trace, nesting = single_trace(model, guide, args, kwargs)
    check_match(single, guide_trace)
    plate = subsampled_plate(single)
    if plate:
        raise ValueError(f"{plate}: draws would be weighed against different data. Let the plate run over all rows.")
    return single, nesting


def subsampled_plate(trace: Trace) -> str:
    """Words for the first plate of a trace that runs over a part of its rows, or an empty string."""
    for name, site in trace.nodes.items():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size is not None and frame.size < frame.full_size:
                rows = f"{frame.size} of {frame.full_size} rows"
                return f"site {name!r} lies in plate {frame.name!r}, which is subsampled ({rows})"
    return ""


@torch.no_grad()
def check_side_by_side(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    number: int = 2,
) -> float:
    """Refuse a model that fails or means something else vectorised over draws: one that sums over all it sees, say.

    A number of draws are scored under the plate, and two of them alone, with the same rows of subsampled plates; the
    log-densities must agree.  Returned is the standard deviation of those that are estimates, or 0.
    """
    noise = 0.0
    names = {"guide": "model" if guide is model else "guide", "model": "model"}
    with pyro.validation_enabled(False):
        single, guide_trace, nesting = single_trace(model, guide, args, kwargs)
        rows = {name: site["value"] for name, site in single.nodes.items() if site_is_subsample(site)}
        if subsampled_plate(single):
            model, guide = poutine.condition(model, data=rows), poutine.condition(guide, data=rows)
        draws = _run(model, guide, args, kwargs, number, nesting, single, lambda which: _vectorised(names[which]))
        sites = dict(prune_subsample_sites(draws.model).iter_stochastic_nodes())
        if not sites.keys() <= guide_trace.nodes.keys():
            return noise  # what the guide leaves to the model's own randomness is drawn anew each time
        shapes = {name: single.nodes[name]["value"].shape for name in sites}
        latents = {name: rows_of(name, s["value"], shapes[name], number) for name, s in sites.items()}
        for row in range(2):
            held = poutine.condition(model, data={name: value[row] for name, value in latents.items()})
            together, alone = draws.log_p[row].double(), _log_density(held, args, kwargs)
            if not together.isfinite() or not alone.isfinite() or torch.isclose(together, alone, rtol=1e-3, atol=1e-2):
                continue
            # An estimate, as that of dequantised images, is another one each time: by how much?
            several = torch.stack([alone, *(_log_density(held, args, kwargs) for _ in range(9))])
            noise = max(noise, float(several.std()))
            if (together - several.mean()).abs() <= 10 * several.std():
                continue
            raise ValueError(
                f"the model's log-density of one draw is {float(alone):.4g}, but {float(together):.4g} "
                f"vectorised over {number} draws. {WAY_OUT}"
            )
    return noise


def _log_density(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with poutine.block():
        return torch.as_tensor(poutine.trace(model).get_trace(*args, **kwargs).log_prob_sum()).double()
