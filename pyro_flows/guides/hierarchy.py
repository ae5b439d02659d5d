"""The hierarchy of a model: effects whose normal priors have scales or correlations that depend on other latents.

Locations, logarithms of scales and unconstrained correlations are taken as linear around the start of a guide.  This
is exact for scales that are latents themselves, or products of such, and for correlations from an ``LKJCholesky``.
"""

from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import CorrCholeskyTransform, LogNormal, MultivariateNormal

from ..programs.program import outside_plates, trace_of
from ..programs.sites import innermost, loc_and_scale_of
from ..transforms import NonCentred
from .guide_call import Call
from .packing import Packing

DEEPEST = 4  # effects in a chain; each takes a pass over all latents
LARGEST = 4  # numbers of an effect that has correlations; more are effects of one number each
WIDEST = 256  # numbers of a multivariate normal; of more the scales take too long to differentiate


class Prior(NamedTuple):
    """The priors of R effects of d numbers.

    Attributes:
        columns: The packed latents of each effect, ``(R, d)``.
        coefficients: Those of locations, log-scales and correlations in the D latents and in 1, ``(R, K, D + 1)``.
    """

    columns: Tensor
    coefficients: Tensor

    @property
    def depends(self) -> Tensor:
        """True for each number of the priors that depends on each latent, ``(R, K, D)``."""
        return self.coefficients[..., :-1] != 0


def units_of(call: Call, packing: Packing) -> NonCentred | None:
    """Return a map from effects in units of their priors to the latents of a model.

    None if no scale or correlation depends on latents, or in a chain that is too long, or if the model does not run
    with gradients.
    """
    try:
        found = _priors(call, packing)
    except Exception:  # a user's program may raise anything, for example where it leaves torch
        return None
    found = [prior for prior in found if prior.depends[:, prior.columns.shape[1] :].any()]
    return _map_of(found, packing.size) or _map_of(*_chained(found, packing.size)) if found else None


def _priors(call: Call, packing: Packing) -> list[Prior]:
    """Return the priors of all latents that have locations and scales."""
    _, model = call.model.args  # without the handler that initialises latents
    with torch.enable_grad(), poutine.block(), outside_plates(), call.same_draws():
        z = packing.start.clone().requires_grad_()
        nodes = trace_of(poutine.condition(model, data=packing.values(z)), call.args, call.kwargs).nodes
        first, found = 0, list[Prior]()
        for name, part in packing.parts.items():
            numbers = _numbers(nodes[name]["fn"], part.start) if name in nodes and part.present is None else None
            if numbers is not None:
                columns = torch.arange(first, first + part.size).reshape(len(numbers), -1)
                found.append(Prior(columns, _linear(numbers, z)))
            first += part.size
        return found


def _numbers(fn: Any, value: Tensor) -> Tensor | None:
    """Return the locations, log-scales and correlations of effects, ``(R, d (d + 3) / 2)``; None if they have none."""
    fn = innermost(fn)
    fn = fn.base_dist if isinstance(fn, LogNormal) else fn
    known = loc_and_scale_of(fn)
    is_joint = isinstance(fn, MultivariateNormal)
    if known is None or (is_joint and value.shape[-1] > WIDEST):
        return None
    loc, scale = (part.expand(value.shape) for part in known)
    if not is_joint or (size := value.shape[-1]) > LARGEST:
        return torch.stack([loc.reshape(-1), scale.log().reshape(-1)], -1)
    parts = [loc.reshape(-1, size), scale.log().reshape(-1, size)]
    factor = (fn.scale_tril / known[1].unsqueeze(-1)).expand(*value.shape, size).reshape(-1, size, size)
    return torch.cat([*parts, CorrCholeskyTransform().inv(factor)] if size > 1 else parts, -1)


def _linear(numbers: Tensor, z: Tensor) -> Tensor:
    """Return the coefficients of numbers, ``(R, K)``, in the D latents and in 1, ``(R, K, D + 1)``.

    Two backward passes per latent that matters are fewer than one per number, and import nothing large.
    """
    flat = numbers.reshape(-1)
    slopes = flat.new_zeros(len(flat), len(z))
    if flat.requires_grad:
        share = torch.arange(1.0, len(flat) + 1).to(flat).sqrt().requires_grad_()  # no sums of such roots cancel
        (pull,) = torch.autograd.grad((flat * share).sum(), z, create_graph=True, materialize_grads=True)
        for column in pull.nonzero().ravel().tolist():
            (slopes[:, column],) = torch.autograd.grad(pull[column], share, retain_graph=True)
    level = flat.detach() - slopes @ z.detach()
    return torch.cat([slopes, level.unsqueeze(-1)], -1).reshape(*numbers.shape, -1)


def _chained(priors: list[Prior], dim: int) -> tuple[list[Prior], int, Tensor]:
    """Return the priors of deviations from locations that are linear in the deviations before, and the way back."""
    pull, eye = priors[0].coefficients.new_zeros(dim, dim), torch.eye(dim).to(priors[0].coefficients)
    for prior in priors:
        pull[prior.columns] = prior.coefficients[:, : prior.columns.shape[1], :-1]
    loc = torch.linalg.solve_triangular(eye - pull.tril(-1), eye, upper=False, unitriangular=True)
    found = list[Prior]()
    for prior in priors:
        size, coefficients = prior.columns.shape[1], prior.coefficients.clone()
        coefficients[..., :-1] = coefficients[..., :-1] @ loc
        coefficients[:, :size, :-1] = 0
        found.append(prior._replace(coefficients=coefficients))
    return found, dim, loc


def _depth(priors: list[Prior], dim: int) -> int:
    """Return the most effects in a chain whose priors depend on the one before, or one more than the limit."""
    depends = torch.zeros(dim, dim)
    for prior in priors:
        depends[prior.columns] = prior.depends.any(1).unsqueeze(1).to(depends)
    levels, reached = 0, depends
    while reached.any() and levels <= DEEPEST:
        levels, reached = levels + 1, (depends @ reached).clamp_max(1)
    return levels


def _map_of(priors: list[Prior], dim: int, loc: Tensor | None = None) -> NonCentred | None:
    """Return the map of effects with some priors; None if their chains are too long, or a number is not finite."""
    levels = _depth(priors, dim)
    if levels > DEEPEST or not all(prior.coefficients.isfinite().all() for prior in priors):
        return None
    parents = torch.stack([prior.depends.flatten(0, 1).any(0) for prior in priors]).any(0).nonzero().flatten()
    effects = [row for prior in priors for row in prior.columns.tolist()]
    units = NonCentred(dim, effects, parents.tolist(), levels, chained=loc is not None).to(priors[0].coefficients)
    kept = torch.cat([parents, torch.tensor([dim]).to(parents)])  # the last coefficient is that of 1
    with torch.no_grad():
        if units.loc is not None and loc is not None:
            units.loc.copy_(loc)
        for group in units.groups:
            size = len(group.columns)
            of_size = torch.cat([prior.coefficients for prior in priors if prior.columns.shape[1] == size])
            group.prior.copy_(of_size[..., kept].movedim(0, 1))
    return units
