"""The hierarchy of a model: latents whose priors have locations and scales that depend on other latents.

Locations and logarithms of scales are taken as linear around the start of a guide.  For scales that are latents
themselves, or products of such, this is exact.
"""

from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import LogNormal

from ..programs.program import outside_plates, trace_of
from ..programs.sites import innermost, loc_and_scale_of
from ..transforms import NonCentred
from .guide_call import Call
from .packing import Packing

DEEPEST = 4  # scales in a chain; each takes a pass over all latents


def units_of(call: Call, packing: Packing) -> NonCentred | None:
    """Return the non-centred coordinates of a model.

    None if no scale depends on latents, or in a chain that is too long, or if the model does not run with gradients.
    """
    try:
        found = _dependences(call, packing)
    except Exception:  # a user's program may raise anything, for example where it leaves torch
        return None
    return None if found is None else _solved(*found)


def _dependences(call: Call, packing: Packing) -> tuple[Tensor, Tensor] | None:
    """Return derivatives of locations and of log-scales of latents in all latents, each ``(D, D)``."""
    _, model = call.model.args  # without the handler that initialises latents
    with torch.enable_grad(), poutine.block(), outside_plates(), call.same_draws():
        z = packing.start.clone().requires_grad_()
        nodes = trace_of(poutine.condition(model, data=packing.values(z)), call.args, call.kwargs).nodes
        first, found = 0, dict[int, tuple[Tensor, Tensor]]()
        for name, part in packing.parts.items():
            if name in nodes and part.present is None and (known := _loc_and_scale(nodes[name]["fn"])) is not None:
                loc, scale = (value.expand(part.start.shape).reshape(-1) for value in known)
                if scale.requires_grad and scale.numel() == part.size:
                    found[first] = loc, scale.log()
            first += part.size
        rows = torch.tensor([row for first, (loc, _) in found.items() for row in range(first, first + len(loc))])
        if not len(rows):
            return None
        pull, log_scale = (
            torch.zeros_like(z).repeat(len(z), 1).index_copy(0, rows, _jacobian(torch.cat(of), z))
            for of in zip(*found.values(), strict=True)
        )
    return pull, log_scale


def _solved(pull: Tensor, log_scale: Tensor) -> NonCentred | None:
    """Return the coordinates, given the derivatives; in a model's order, latents depend on earlier ones."""
    pull, log_scale = pull.tril(-1), log_scale.tril(-1)
    if not (log_scale.any() and pull.isfinite().all() and log_scale.isfinite().all()):
        return None
    eye = torch.eye(len(pull)).to(pull)
    loc = torch.linalg.solve_triangular(eye - pull, eye, upper=False, unitriangular=True)
    log_scale = log_scale @ loc
    levels, reached = 0, (log_scale != 0).to(eye)
    while reached.any() and levels <= DEEPEST:
        levels, reached = levels + 1, ((log_scale != 0).to(eye) @ reached).clamp_max(1)
    if levels > DEEPEST:
        return None
    units = NonCentred(len(loc), levels).to(loc)
    units.set(loc, log_scale)
    return units


def _loc_and_scale(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Return the location and the scale of each unconstrained number of a distribution, if it has both."""
    fn = innermost(fn)
    return loc_and_scale_of(fn.base_dist if isinstance(fn, LogNormal) else fn)


def _jacobian(values: Tensor, z: Tensor) -> Tensor:
    """Return the Jacobian of L values in D numbers, ``(L, D)``."""
    if not values.requires_grad:
        return values.new_zeros(len(values), len(z))
    found = torch.autograd.grad(
        values, z, torch.eye(len(values)).to(z), is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    return found[0]
