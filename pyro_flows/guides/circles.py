"""Latents on circles: von Mises sites, and interval sites that are marked ``infer={"periodic": True}``.

The unconstrained space of such a site is the angle, any representative of it; constraining wraps it around.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from ..arguments import check_program
from ..programs.latents import states_support, support_of
from .init import bare


class Circle(constraints.interval):
    """The interval [low, high) whose ends are one point."""


class Wrap(Transform):
    """From angles in radians, any representative, onto [low, high): the angle -π goes to ``low``."""

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


@biject_to.register(Circle)  # type: ignore[untyped-decorator]
def _onto_circle(constraint: Circle) -> Wrap:
    return Wrap(constraint.lower_bound, constraint.upper_bound)


class MarkCircles(Messenger):
    """Shows latents on circles as such, and those whose law states no support as real: a flat law stands for each."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        circle = _circle_of(msg["name"], msg["fn"], bool(msg["infer"] and msg["infer"].get("periodic")))
        if circle or not states_support(msg["fn"]):
            support = circle or support_of(msg["fn"])
            msg["fn"] = dist.ImproperUniform(support, msg["fn"].batch_shape, msg["fn"].event_shape)


def mark_circles(model: Callable[..., Any]) -> Callable[..., Any]:
    """A model for the guide to look at; the densities of its circular sites are left out."""
    check_program(model=model)
    return MarkCircles()(model)


def is_circular(support: Any) -> bool:
    """True if a support of a marked model is that of angles."""
    return isinstance(innermost(support), Circle)


def _circle_of(name: str, fn: Any, periodic: bool) -> Circle | None:
    if isinstance(bare(fn), dist.VonMises | torch.distributions.VonMises):
        return Circle(-math.pi, math.pi)
    if not periodic:
        return None
    support = innermost(fn.support)
    if not isinstance(support, constraints.interval):
        fault = f"latent site {name!r} is marked periodic, but its support is {fn.support} and no interval"
        raise ValueError(f"AutoFlow: {fault}.")
    return Circle(support.lower_bound, support.upper_bound)


def innermost(support: Any) -> Any:
    """Return the support of the single numbers of an event."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support
