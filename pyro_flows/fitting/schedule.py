"""How long, with how many draws and in what steps a guide is trained where nothing else is asked for.

*Choosing a flow* in the docs tells how these numbers were found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..guides import AutoFlow


class Schedule(NamedTuple):
    """What suits a guide."""

    steps: int
    num_particles: int
    lr: float


def suited_to(guide: Any) -> Schedule:
    """A schedule for a guide.

    Small flows are trained with many draws, which cost little and make the tails right; large ones, whose steps cost
    more, take more of them with fewer draws.
    """
    if not isinstance(guide, AutoFlow):
        return Schedule(steps=3000, num_particles=64, lr=0.01)
    lr = 0.003 if guide.has_circles else 0.01
    if guide.latent_dim <= 32:
        return Schedule(steps=2000, num_particles=256, lr=lr)
    return Schedule(steps=5000, num_particles=128, lr=lr / 2)
