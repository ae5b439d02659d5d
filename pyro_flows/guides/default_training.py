"""Training of guides by default: the schedule and the optimisers that suit a guide, as the guide itself says.

*Choosing a flow* in the docs says how the numbers were found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .guide_call import Call
from .guide_flow import LIMITS


class Schedule(NamedTuple):
    """The number of steps and of draws per step, the step size, and the largest norm of a gradient."""

    steps: int = 3000
    num_particles: int = 64
    lr: float = 0.01
    clip_norm: float = 100.0


def schedule_of_many(number: int, *, near: bool) -> Schedule:
    """Return the schedule that suits one flow over more than 32 latents.

    Guides with about forty latents take the most steps.  A step is still cheap there, and funnels of many dimensions
    train slowly.  A guide that starts near the posterior needs half as many, or 100 beyond 4096 latents, where a
    step is dear.
    """
    steps = 2100 if number <= 64 else 1000
    if near:
        steps = steps // 2 if number <= LIMITS.dense else 100
    return Schedule(steps, num_particles=256, clip_norm=1.0)


class Plan:
    """The properties of a guide that its training depends on.  These are the defaults for guides of other packages.

    Attributes:
        is_joint: True if the guide is one flow over all latents, which can be compared with others.
    """

    is_joint = False

    @property
    def is_fresh(self) -> bool:
        """True if the guide is known to be untrained."""
        return False

    @property
    def takes_paths(self) -> bool:
        """True if path gradients suit the guide."""
        return True

    def schedule(self, *, near: bool = False, alone: bool = True, share: float = 1.0) -> Schedule:
        """Return the schedule that suits the guide.

        Args:
            near: True if the guide starts near the posterior.
            alone: True if only the guide is trained, by many draws per step, so that SOAP takes the steps.
            share: The share of the rows of a batch that this process has.
        """
        return Schedule()

    def by_soap(self) -> list[Tensor]:
        """Return the parameters that SOAP trains if only the guide is trained, by many draws per step."""
        return []

    def by_muon(self) -> list[Tensor]:
        """Return the weight matrices that Muon trains."""
        return []

    def prepare(self, call: Call) -> None:
        """Initialise, from the data that the guide will be trained on, layers that depend on their scale."""


def plan_of(guide: Any) -> Plan:
    """Return a guide itself if it is a plan, else the default plan."""
    return guide if isinstance(guide, Plan) else Plan()
