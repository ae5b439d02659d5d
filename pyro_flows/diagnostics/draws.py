"""Draws of a guide, scored by model and guide: the raw material of every diagnostic.

Guide and model are run together, many draws at a time, under one outer plate to the left of all plates of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from .. import checks
from .alongside import log_prob_of_draws, rows_of, side_by_side
from .noise import warn_of_noise


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
    frames = [
        frame
        for trace in (guide_trace, model_trace)
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return model_trace, guide_trace, max((-frame.dim for frame in frames), default=0)


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
) -> Draws:
    """One batch of draws, side by side under a plate left of ``nesting`` others, or a single one without a plate."""
    if nesting is not None:
        model, guide = side_by_side(model, size, nesting), side_by_side(guide, size, nesting)
    with poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
    log_p, log_q = (log_prob_of_draws(trace, size, nesting) for trace in (model_trace, guide_trace))
    return Draws(log_p, log_q, model_trace, single, nesting)


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
    _check_match(single, prune_subsample_sites(guide_trace))
    plate = subsampled_plate(single)
    if plate:
        raise ValueError(f"{plate}: draws would be weighed against different data. Let the plate run over all rows.")
    return single, nesting


def _check_match(model: Trace, guide: Trace) -> None:
    """Refuse a guide that is a point, and latents that only one of the two has: their weights mean nothing."""
    drawn = dict(guide.iter_stochastic_nodes())
    if drawn and all(isinstance(site["fn"], dist.Delta) for site in drawn.values()):
        raise ValueError("the guide is a point (every site is a Delta) and not a distribution; it cannot be weighed.")
    for name, _ in prune_subsample_sites(model).iter_stochastic_nodes():
        if name not in drawn:
            raise ValueError(
                f"latent site {name!r} of the model is not in the guide; sum it out of the model, or give it a guide."
            )
    for name, site in drawn.items():
        if name not in model.nodes and not site["infer"].get("is_auxiliary"):
            raise ValueError(f"site {name!r} of the guide is not in the model; is it the guide of another model?")


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
    """Refuse a model that means something else when draws run side by side: one that sums over all it sees, say.

    A number of draws are scored under the plate, and two of them alone, with the same rows of subsampled plates; the
    log-densities must agree.  Returned is the standard deviation of those that are estimates, or 0.
    """
    noise = 0.0
    way_out = (
        "Let the model broadcast to the left of its plates, with (x * w).sum(-1) in place of x @ w, say, or run one "
        "draw at a time: vectorize=False in psis, to_arviz and fit_amortized, num_particles=1 or "
        "objective=Trace_ELBO(num_particles=n) in fit_svi."
    )
    with pyro.validation_enabled(False):
        single, guide_trace, nesting = single_trace(model, guide, args, kwargs)
        rows = {name: site["value"] for name, site in single.nodes.items() if site_is_subsample(site)}
        if subsampled_plate(single):
            model, guide = poutine.condition(model, data=rows), poutine.condition(guide, data=rows)
        try:
            draws = _run(model, guide, args, kwargs, number, nesting, single)
        except (RuntimeError, IndexError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"the model does not run with draws side by side ({reason:.200}). {way_out}") from error
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
                f"the model's log-density of one draw is {float(alone):.4g}, but {float(together):.4g} with "
                f"{number} draws side by side. {way_out}"
            )
    return noise


def _log_density(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with poutine.block():
        return torch.as_tensor(poutine.trace(model).get_trace(*args, **kwargs).log_prob_sum()).double()
