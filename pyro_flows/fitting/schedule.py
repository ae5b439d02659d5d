"""How long, with how many draws and in what steps a guide is trained where nothing else is asked for.

*Choosing a flow* in the docs tells how these numbers were found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..guides import AutoFlow, AutoPlateFlow
from ..guides.recipe import FEW


class Schedule(NamedTuple):
    """What suits a guide."""

    steps: int
    num_particles: int
    lr: float
    clip_norm: float


def suited_to(guide: Any, *, near: bool = False) -> Schedule:
    """A schedule for a guide, which may start near the posterior already.

    Flows are trained with many draws a step, which serve better than more steps with fewer.  Some forty latents take
    the most steps: there a step is still cheap, and funnels of many dimensions take long to learn.  Where hardly
    anything is left to learn, half of the steps will do.
    """
    if isinstance(guide, AutoPlateFlow):
        # The rows of a plate average themselves; the latents that they share need several draws.  Gradients grow with
        # the plate, and clipping at any one norm would weigh minibatches by theirs.
        return Schedule(4000, num_particles=8 if guide.has_globals else 1, lr=0.005, clip_norm=1e3 * guide.full_size)
    if not isinstance(guide, AutoFlow):
        return Schedule(steps=3000, num_particles=64, lr=0.01, clip_norm=100.0)
    if guide.has_circles:
        return Schedule(steps=2000, num_particles=256, lr=0.003, clip_norm=100.0)
    few = guide.latent_dim <= FEW
    steps = 1000 if few else 2100 if guide.latent_dim <= 64 else 1000
    return Schedule(steps // 2 if near else steps, num_particles=256, lr=0.01, clip_norm=100.0 if few else 1.0)
