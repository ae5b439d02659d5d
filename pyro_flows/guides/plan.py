"""How a guide is trained where nothing else is asked for: each guide of this package answers for itself.

*Choosing a flow* in the docs tells how the numbers were found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..flows import Flow
from .contexts import RowContexts
from .encoding import initialize
from .nested import Nested
from .recipe import DENSE, FEW, is_untrained


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

    def schedule(self, *, near: bool = False) -> Schedule:
        """Return the schedule that suits the guide, which may start near the posterior already."""
        return Schedule()

    def matrices(self) -> list[Tensor]:
        """Return the weight matrices that Muon trains."""
        return []

    def prepare(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the data that the guide will be trained on set what depends on their scale."""


class JointPlan(Plan):
    """The answers of one flow over all latents.  Splines on circles have gradients of their own kind."""

    is_joint = True
    latent_dim: int
    flow: Flow
    _circular: list[bool]
    _init_scale: float

    @property
    def has_circles(self) -> bool:
        """Whether some latents are angles."""
        return any(self._circular)

    @property
    def is_fresh(self) -> bool:
        """Whether the guide is still untrained."""
        return is_untrained(self.flow, self._init_scale, self._circular)

    @property
    def starts_from_gaussian(self) -> bool:
        return not self.has_circles and self.latent_dim <= DENSE

    @property
    def takes_paths(self) -> bool:
        return not self.has_circles

    def schedule(self, *, near: bool = False) -> Schedule:
        """Many draws a step serve better than more steps with fewer.

        Some forty latents take the most steps: there a step is still cheap, and funnels of many dimensions take long to
        learn.  Where hardly anything is left to learn, half of the steps will do.
        """
        if self.has_circles:
            return Schedule(steps=2000, num_particles=256, lr=0.003)
        few = self.latent_dim <= FEW
        steps = 1000 if few else 2100 if self.latent_dim <= 64 else 1000
        return Schedule(steps // 2 if near else steps, num_particles=256, clip_norm=100.0 if few else 1.0)

    def matrices(self) -> list[Tensor]:
        if self.has_circles or self.latent_dim <= FEW:
            return []
        return [layer.weight for layer in self.flow.modules() if isinstance(layer, nn.Linear)]


class RowsPlan(Plan):
    """The answers of a flow for each row of a plate.

    The rows average themselves; the latents that they share need several draws.  Gradients grow with the plate, and
    clipping at any one norm would weigh minibatches by theirs.
    """

    posterior: Nested
    contexts: RowContexts
    full_size: int

    @property
    def is_fresh(self) -> bool:
        """Whether the guide is still untrained."""
        return self.posterior.is_fresh

    @property
    def has_globals(self) -> bool:
        """Whether some latents lie outside of the plate."""
        return self.posterior.shared.size > 0

    def schedule(self, *, near: bool = False) -> Schedule:
        return Schedule(4000, num_particles=8 if self.has_globals else 1, lr=0.005, clip_norm=1e3 * self.full_size)

    def prepare(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_fresh:
            initialize("fit_svi", self.contexts.encoder, model, args, kwargs)


def plan_of(guide: Any) -> Plan:
    """Return the answers of a guide."""
    return guide if isinstance(guide, Plan) else Plan()
