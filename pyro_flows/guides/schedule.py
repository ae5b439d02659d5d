"""How a guide is trained where nothing else is asked for: each guide of this package answers for itself.

*Choosing a flow* in the docs tells how the numbers were found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Schedule(NamedTuple):
    """How long, with how many draws and in what steps a guide is trained."""

    steps: int = 3000
    num_particles: int = 64
    lr: float = 0.01
    clip_norm: float = 100.0


class Plan:
    """What a fit asks of a guide; the answers here are those for guides that are not of this package.

    Attributes:
        is_joint: Whether it is one flow over all latents, which can be built anew and compared with others.
    """

    is_joint = False

    @property
    def is_fresh(self) -> bool:
        """Whether the guide is still untrained, as far as that is known."""
        return False

    @property
    def starts_from_gaussian(self) -> bool:
        """Whether ``start_at(loc, scale_tril)`` lets it start from a Gaussian."""
        return False

    @property
    def takes_paths(self) -> bool:
        """Whether path gradients suit it."""
        return True

    def schedule(self, *, near: bool = False, alone: bool = True) -> Schedule:
        """Return the schedule that suits the guide.

        Args:
            near: True if the guide starts near the posterior already.
            alone: True if nothing but the guide is trained, by many draws a step: then SOAP takes the steps.
        """
        return Schedule()

    def by_soap(self) -> list[Tensor]:
        """Return the parameters that SOAP trains where nothing else is trained, by many draws a step."""
        return []

    def by_muon(self) -> list[Tensor]:
        """Return the weight matrices that Muon trains."""
        return []

    def prepare(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the data that the guide will be trained on set what depends on their scale."""


def plan_of(guide: Any) -> Plan:
    """Return the answers of a guide."""
    return guide if isinstance(guide, Plan) else Plan()
