"""What a joint guide cannot answer for is refused by name, before any training."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from pyro import validation_enabled
from torch import Tensor
from torch.distributions import biject_to

from ..programs.error_text import place_of, quoted
from ..programs.latents import is_discrete, named
from ..programs.program import Program
from .circles import innermost
from .guide_call import Call
from .nonfinite import worst
from .prototype import Found, frame_of


def setup_error(owner: str, error: Exception, has_arguments: bool) -> Exception | None:
    """Return an error of a guide's setup that says why the model is run at all, None where its own words will do."""
    if isinstance(error, TypeError) and not has_arguments and not str(error).startswith(f"{owner}: "):
        fault = f"this guide is new, and to set it up the model is called with what is given here: {error}"
        return TypeError(f"{owner}: {fault}. Fit the guide first, or give the model's arguments here too.")
    breaks = isinstance(error, RuntimeError) and place_of(error)  # not such as Pyro's own, that latents lack
    if breaks or isinstance(error, AssertionError | IndexError | KeyError):
        fault = f"the model fails where it is run to find its latents: {quoted(error)}"
        return ValueError(f"{owner}: {fault}. Give it arguments with which it runs by itself.")
    return None


def stretched(name: str) -> str:
    """Say how to draw a latent whose support is not fixed."""
    drawn = f"{name} = pyro.deterministic({name!r}, low + (high - low) * u)"
    return f"Draw it on a fixed scale and stretch it: u ~ Uniform(0, 1), {drawn}."


def check_latents(call: Call) -> None:
    """Refuse discrete latents, latents without room to move and latents of subsampled plates but for one plate."""
    if names := [name for name, site in call.latents.items() if is_discrete(site["fn"])]:
        which = f"sites {named(names)} are" if len(names) > 1 else f"site {named(names)} is"
        why = "values are infinitely many, more than 1000 in one event, or not listed by Pyro"
        way = "Sum out by hand (a Poisson of Gamma rate is a GammaPoisson), cut off at a Categorical, or condition"
        raise ValueError(f"{call.owner}: latent {which} discrete, and cannot be enumerated: {why}. {way}.")
    for name, site in call.latents.items():
        if _is_empty(site["fn"].support):
            fault = f"the support of latent site {name!r}, {site['fn'].support}, has no volume: low must be below high"
            raise ValueError(f"{call.owner}: {fault}. Where they are equal, write pyro.deterministic({name!r}, value).")
        for frame in site["cond_indep_stack"]:
            if frame.name != call.plate and frame.full_size is not None and frame.size < frame.full_size:
                rows = f"which is subsampled ({frame.size} of {frame.full_size} rows)"
                way = f"Let it run over all rows, or use AutoPlateFlow(model, {frame.name!r})"
                raise ValueError(f"{call.owner}: latent site {name!r} lies in plate {frame.name!r}, {rows}. {way}.")


def _is_empty(support: Any) -> bool:
    low, high = (getattr(innermost(support), name, None) for name in ("lower_bound", "upper_bound"))
    return low is not None and high is not None and bool((torch.as_tensor(low) >= torch.as_tensor(high)).any())


def check_density(call: Call, program: Program | None) -> None:
    """Refuse a model without a finite density at the start; a program sums over its discrete latents, if it has any."""
    with validation_enabled(False):  # its errors would come first, with less to say
        if program:
            values = {name: value.unsqueeze(0) for name, value in call.start.items()}
            _check_finite(call.owner, "the model, discrete latents summed out,", program.log_prob(values, 1))
            return
        trace = call.trace_at(call.start)
        trace.compute_log_prob()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["log_prob"].isfinite().all():
            continue
        value: Any = site["value"]
        if name not in call.latents and isinstance(value, Tensor) and not value.isfinite().all():
            bad = f"{int((~value.isfinite()).sum())} of {value.numel()} numbers"
            raise ValueError(f"{call.owner}: observed site {name!r} holds NaN or inf ({bad}).")
        _check_finite(call.owner, f"site {name!r}", site["log_prob"])


def _check_finite(owner: str, what: str, log_prob: Tensor) -> None:
    if not log_prob.isfinite().all():
        fault = f"the log-density of {what} is {worst(log_prob)} at the guide's start"
        raise ValueError(f"{owner}: {fault}; give a better one with init_loc_fn=init_to_value(values={{...}}).")


def moving_supports(call: Call, scale: float) -> list[str]:
    """Return the latents whose supports move with another latent."""
    start, transforms = call.start, call.transforms
    places = {name: transform.inv(start[name]) for name, transform in transforms.items()}
    moved = {name: transforms[name](place + scale) for name, place in places.items()}
    found = []
    for name, site in call.trace_at(moved).nodes.items():
        if name in places:
            there = biject_to(site["fn"].support)(places[name])
            if there.shape != start[name].shape or not torch.allclose(there, transforms[name](places[name])):
                found.append(name)
    return found


def check_supports(call: Call, moving: list[str]) -> None:
    """Refuse latents whose supports move with another latent."""
    if moving:
        name, support = moving[0], call.latents[moving[0]]["fn"].support
        fault = f"the support of latent site {name!r}, {support}, depends on another latent"
        raise ValueError(f"{call.owner}: {fault}. {stretched(name)}")


def other_support(owner: str, name: str, there: Any, here: Any) -> ValueError:
    """Return an error that says that with other arguments a latent has another support."""
    fault = f"latent site {name!r} has another support ({there}) than the guide was built for ({here})"
    return ValueError(f"{owner}: with these arguments {fault}. {stretched(name)}")


def check_shapes(call: Call, found: Found) -> None:
    """Refuse a model without the latents of a guide, or with other shapes, but for the number of a plate's rows."""
    for name, site in call.latents.items():
        shape = list(site["value"].shape)
        if (frame := frame_of(site, call.plate)) and found.rows:
            shape[frame.dim - site["fn"].event_dim] = found.rows.size
        now = found.latents.get(name)
        if now is None or tuple(now["value"].shape) != tuple(shape):
            there = "is observed" if name in found.observed else "is not in the model"
            if now:
                there = f"has shape {tuple(now['value'].shape)}"
            built = tuple(shape) if now else f"one of shape {tuple(shape)}"
            fault = f"latent site {name!r} {there}, but the guide was built for {built}"
            way = "Build another, pad series to one length and mask the observed sites only, or use AutoPlateFlow"
            raise ValueError(f"{call.owner}: with these arguments {fault}. {way}.")


def check_no_more(call: Call, found: Found, observed: Collection[str]) -> None:
    """Refuse latents that a guide was not built for, but sites that were data then and are to be predicted now."""
    for name, site in found.latents.items():
        if name not in call.prototype.nodes and name not in observed:
            fault = f"the model has the latent site {name!r} of shape {tuple(site['value'].shape)}, which it had not"
            way = "Build another guide, or let the model draw the same sites for all data"
            raise ValueError(f"{call.owner}: {fault} when the guide was built. {way}.")
