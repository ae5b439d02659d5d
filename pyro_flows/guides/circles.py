"""Supports of latents that torch maps no real numbers onto: circles, and supports of mixtures.

Sites on circles are von Mises, or have an interval as support and are marked ``infer={"periodic": True}``.  In the
unconstrained space such a site is an angle, up to full turns; constraining wraps it around.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.constraints import sphere
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from ..programs.latents import innermost, states_support, support_of


class Circle(constraints.interval):
    """The interval [low, high) whose ends are one point."""


class Wrap(Transform):
    """The map from angles in radians, modulo 2π, onto [low, high); it takes -π to ``low``."""

    domain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, low: float | Tensor, high: float | Tensor) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.codomain = Circle(low, high)

    def _call(self, x: Tensor) -> Tensor:
        turns = (x + math.pi) / (2 * math.pi)
        y = self.low + (self.high - self.low) * (turns - turns.floor())
        return torch.where(y < self.high, y, self.low)  # just below -π the fraction is rounded to a whole turn

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.low) / (self.high - self.low) * (2 * math.pi) - math.pi

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        width = torch.as_tensor(self.high - self.low, dtype=x.dtype, device=x.device)
        return (width / (2 * math.pi)).log().expand(x.shape)


class MarkCircles(Messenger):
    """Handler that gives latents on circles the support ``Circle``, and latents without a support the real numbers.

    A flat distribution replaces the site's own, since a guide needs the support alone.
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or type(fn).__name__ == "_Subsample":
            return
        if isinstance(innermost(fn), dist.VonMises | torch.distributions.VonMises):
            support: Any = Circle(-math.pi, math.pi)
        elif msg["infer"] and msg["infer"].get("periodic"):
            interval = scalar_support(fn.support)
            if not isinstance(interval, constraints.interval):
                fault = f"is marked periodic, but its support is {fn.support} and no interval"
                raise ValueError(f"AutoFlow: latent site {msg['name']!r} {fault}.")
            support = Circle(interval.lower_bound, interval.upper_bound)
        elif states_support(fn):
            return
        else:
            support = support_of(fn)
        msg["fn"] = dist.ImproperUniform(support, fn.batch_shape, fn.event_shape)


def is_circular(support: Any) -> bool:
    """True if a support holds angles."""
    return isinstance(scalar_support(support), Circle)


def scalar_support(support: Any) -> Any:
    """Return the support of the single numbers of an event."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def bijection_onto(owner: str, name: Any, support: Any) -> Transform:
    """Return torch's bijection onto the support of a site, or raise NotImplementedError with a way out."""
    try:
        found: Transform = biject_to(support)
    except NotImplementedError as error:
        fault = f"torch maps no real vectors onto {support}, the support of latent site {name!r}"
        way = "Write the site another way, such as a covariance as scales and an LKJCholesky"
        if support is sphere:
            reparam = f"poutine.reparam(model, {{{name!r}: ProjectedNormalReparam()}})"
            way = f"Draw it from a ProjectedNormal, and use {reparam} in place of the model"
        raise NotImplementedError(f"{owner}: {fault}. {way}.") from error
    return found


@biject_to.register(Circle)  # type: ignore[untyped-decorator]
def _onto_circle(constraint: Circle) -> Wrap:
    return Wrap(constraint.lower_bound, constraint.upper_bound)


def _onto_mixture(support: Any) -> Transform:
    shared = support.base_constraint
    inner = scalar_support(shared)
    if any(isinstance(bound, Tensor) and bound.dim() for bound in vars(inner).values()):
        raise NotImplementedError(f"components may differ in their support, {inner}")
    return biject_to(shared)


if hasattr(constraints, "MixtureSameFamilyConstraint"):  # older versions use the support of the components
    biject_to.register(constraints.MixtureSameFamilyConstraint, _onto_mixture)
