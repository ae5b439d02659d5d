"""What a joint guide cannot answer for is refused by name, before any training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from pyro import validation_enabled
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to, constraints

from ..programs.latents import is_discrete, named
from ..programs.program import Program
from ..programs.traces import trace_at
from .look import Found, look


@contextlib.contextmanager
def missing_arguments(owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Say why the model is called at all, when it asks for arguments and none are given."""
    try:
        yield
    except TypeError as error:
        if args or kwargs or str(error).startswith(f"{owner}: "):  # such as that of a recipe, in words of its own
            raise
        raise TypeError(
            f"{owner}: this guide is new, and to set it up the model is called with what is given here: {error}. Fit "
            "the guide first, or give the model's arguments here too."
        ) from error


def check_latents(owner: str, prototype: Trace, plate: str | None = None) -> None:
    """Refuse discrete latents, latents without room to move and latents of subsampled plates but for one plate."""
    _check_continuous(owner, prototype)
    for name, site in prototype.iter_stochastic_nodes():
        if _is_empty(site["fn"].support):
            raise ValueError(
                f"{owner}: the support of latent site {name!r}, {site['fn'].support}, has no volume: low must be less "
                f"than high. Where they are equal, write {name} = pyro.deterministic({name!r}, value)."
            )
        for frame in site["cond_indep_stack"]:
            if frame.name != plate and frame.full_size is not None and frame.size < frame.full_size:
                raise ValueError(
                    f"{owner}: latent site {name!r} lies in plate {frame.name!r}, which is subsampled ({frame.size} "
                    f"of {frame.full_size} rows); one joint flow would tie its dimensions to whatever rows come first. "
                    f"Let the plate run over all rows, or use AutoPlateFlow(model, {frame.name!r}), which gives each "
                    "row a posterior of its own."
                )


def _check_continuous(owner: str, prototype: Trace) -> None:
    """Refuse discrete latents, all at once: those that can be summed out are hidden from the guide."""
    names = [name for name, site in prototype.iter_stochastic_nodes() if is_discrete(site["fn"])]
    if names:
        several = len(names) > 1
        raise ValueError(
            f"{owner}: latent site{'s' * several} {named(names)} {'are' if several else 'is'} discrete, and cannot "
            "be enumerated: values are infinitely many, more than 1000 in one event, or not listed by Pyro. "
            f"Sum {'each' if several else 'it'} out by hand (a Poisson "
            "whose rate is Gamma is a GammaPoisson), cut it off at a Categorical, or condition on it."
        )


def _is_empty(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    return low is not None and high is not None and bool((torch.as_tensor(low) >= torch.as_tensor(high)).any())


def check_density(
    owner: str,
    model: Callable[..., Any],
    prototype: Trace,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    program: Program | None = None,
) -> None:
    """Refuse a model without a finite density at the start; a program sums over its discrete latents, if it has any."""
    latents = dict(prototype.iter_stochastic_nodes())
    start = {name: site["value"].detach() for name, site in latents.items()}
    with validation_enabled(False):  # its errors would come first, with less to say
        if program:
            _check_sum(owner, float(program.log_prob({name: value.unsqueeze(0) for name, value in start.items()}, 1)))
            return
        trace = trace_at(model, start, args, kwargs)
        trace.compute_log_prob()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["log_prob"].isfinite().all():
            continue
        value: Any = site["value"]
        if name not in latents and isinstance(value, Tensor) and not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise ValueError(f"{owner}: observed site {name!r} holds NaN or inf ({bad} of {value.numel()} numbers).")
        raise ValueError(
            f"{owner}: the log-density of site {name!r} is {_worst(site['log_prob'])} at the guide's start; give a "
            "better one with init_loc_fn=init_to_value(values={...})."
        )


def _check_sum(owner: str, log_density: float) -> None:
    if not math.isfinite(log_density):
        raise ValueError(
            f"{owner}: the model's log-density, with discrete latents summed out, is {log_density} at the guide's "
            "start; give a better one with init_loc_fn=init_to_value(values={...})."
        )


def moving_supports(
    model: Callable[..., Any],
    prototype: Trace,
    scale: float,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[str]:
    """Return the latents whose supports move with another latent."""
    latents = dict(prototype.iter_stochastic_nodes())
    start = {name: site["value"].detach() for name, site in latents.items()}
    transforms = {name: biject_to(site["fn"].support) for name, site in latents.items()}
    places = {name: transform.inv(start[name]) for name, transform in transforms.items()}
    moved = {name: transforms[name](place + scale) for name, place in places.items()}
    found = []
    for name, site in trace_at(model, moved, args, kwargs).nodes.items():
        if name in latents:
            there = biject_to(site["fn"].support)(places[name])
            if there.shape != start[name].shape or not torch.allclose(there, transforms[name](places[name])):
                found.append(name)
    return found


def check_supports(owner: str, names: list[str], prototype: Trace) -> None:
    """Refuse latents whose supports move with another latent."""
    for name in names:
        raise ValueError(
            f"{owner}: the support of latent site {name!r}, {prototype.nodes[name]['fn'].support}, depends on another "
            f"latent. Draw it on a fixed scale and stretch it: u ~ Uniform(0, 1), "
            f"{name} = pyro.deterministic({name!r}, low + (high - low) * u)."
        )


def check_same(
    owner: str, model: Callable[..., Any], prototype: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse arguments with which the latents have other shapes or supports than those that a guide was built for."""
    if model is None:
        return  # a guide that was saved
    found = look(model, args, kwargs)
    check_shapes(owner, prototype, found)
    for name, site in prototype.iter_stochastic_nodes():
        support = found.latents[name]["fn"].support
        place = biject_to(site["fn"].support).inv(site["value"].detach())
        if not torch.allclose(biject_to(support)(place), site["value"].detach(), rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"{owner}: with these arguments latent site {name!r} has the support {support}, and not that of the "
                "arguments that the guide was built for. Draw it on a fixed scale and stretch it."
            )


def check_shapes(owner: str, prototype: Trace, found: Found, plate: str | None = None) -> None:
    """Refuse a model without the latents of a guide, or with other shapes, but for the number of a plate's rows."""
    for name, site in prototype.iter_stochastic_nodes():
        shape = list(site["value"].shape)
        for frame in site["cond_indep_stack"]:
            if frame.name == plate and found.rows:
                shape[frame.dim - site["fn"].event_dim] = found.rows.size
        if name not in found.latents:
            how = "observed" if name in found.observed else "not in the model"
            raise ValueError(
                f"{owner}: with these arguments latent site {name!r} is {how}, but the guide was built for one of "
                f"shape {tuple(shape)}. Build another guide, or let the model draw the same sites for all data: pad "
                "series to one length, and mask the observed sites only."
            )
        if (there := tuple(found.latents[name]["value"].shape)) != tuple(shape):
            raise ValueError(
                f"{owner}: with these arguments latent site {name!r} has shape {there}, but the guide was built for "
                f"{tuple(shape)}. Build another, or give each row a posterior of its own: AutoPlateFlow."
            )


def check_no_more(owner: str, prototype: Trace, found: Found, observed: Collection[str]) -> None:
    """Refuse latents that a guide was not built for, but sites that were data then and are to be predicted now."""
    for name, site in found.latents.items():
        if name not in prototype.nodes and name not in observed:
            raise ValueError(
                f"{owner}: with these arguments the model has the latent site {name!r} of shape "
                f"{tuple(site['value'].shape)}, which it had not with those that the guide was built for. Build "
                "another guide, or let the model draw the same sites for all data."
            )


def _worst(log_prob: Tensor) -> float:
    return log_prob[~log_prob.isfinite()].flatten()[0].item()
