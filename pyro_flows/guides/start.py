"""The start of a guide where none is asked for: the prior's centre, or the origin of the unconstrained space.

The centre is the better one where priors know something.  Where they are as wide as LogNormal(-20, 5) it may be absurd:
a scale of e⁻²⁰ makes any data impossible.  So the joint density decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import validation_enabled
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from .checks import check_density, trace_at
from .look import same_draws


def settle_start(
    owner: str,
    model: Callable[..., Any],
    prototype: Trace,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    choose: bool,
) -> None:
    """Check that a model has a finite density where the latents of its prototype are.

    Args:
        owner: The guide's class, for errors.
        model: The model.
        prototype: A trace of it.
        args: Its arguments.
        kwargs: Its keyword arguments.
        choose: Whether to move the latents to the origin first, if the joint density is higher there.
    """
    if choose:
        _choose(model, prototype, args, kwargs)
    check_density(owner, model, prototype, args, kwargs)


def _choose(model: Callable[..., Any], prototype: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Both densities are those of unconstrained latents, with one subsample of data; no random numbers are used up."""
    latents = dict(prototype.iter_stochastic_nodes())
    transforms = {name: biject_to(site["fn"].support) for name, site in latents.items()}
    centre = {name: transforms[name].inv(site["value"].detach()) for name, site in latents.items()}
    origin = {name: torch.zeros_like(value) for name, value in centre.items()}

    def log_density(free: dict[str, Tensor]) -> float:
        values = {name: transforms[name](value) for name, value in free.items()}
        with same_draws(latents.values()), validation_enabled(False):
            total = trace_at(model, values, args, kwargs).log_prob_sum()
        for name, value in values.items():
            total = total + transforms[name].log_abs_det_jacobian(free[name], value).sum()
        return float(total)

    found = log_density(origin)
    if math.isfinite(found) and not log_density(centre) >= found:
        for name, site in latents.items():
            site["value"] = transforms[name](origin[name])
