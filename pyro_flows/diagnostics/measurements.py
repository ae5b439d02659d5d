"""The measurements of a look at a guide's draws, before they are judged.

There are two looks.  With up to 1,000 latents (:mod:`.few_latents`) all quantities are followed, and there is a search
for mass that the guide misses.  With more (:mod:`.many_latents`) the most suspect quantities are followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

from torch import Tensor

from ..programs.density import Density, Drawn
from .drift import TOLERANCE, Drift, Shape, Spreads
from .importance import Psis, weigh
from .row_weights import RowWeights
from .unreached import Missing

CALM = 0.5  # k-hat below which weights that show no error count for more


@dataclass(frozen=True)
class Measurements:
    """The measurements of a look at a guide's draws.  :class:`~pyro_flows.Check` describes the attributes."""

    psis: Psis
    chains: Drift
    directions: Drift
    weighted: Drift
    shapes: tuple[Shape, Shape]
    names: list[str]
    missing: Missing
    outliers: Tensor
    acceptance: list[float]
    spreads: Spreads | None = None
    scope: str = ""
    rows: tuple[RowWeights, ...] = ()

    @property
    def moments(self) -> Drift:
        """The errors shown by chains, pooled with those of the weights if these are reliable."""
        return self.chains.pooled_with(self.weighted) if self.psis.reliable else self.chains


def weighed(space: Density, number: int, at_once: int) -> tuple[Drawn, Psis]:
    """Return weighted draws of a guide, without the quantities that are constant or not finite.

    Args:
        space: The guide's space, which then leaves out these quantities.
        number: The number of draws.
        at_once: The number of draws that run at once.

    Raises:
        ValueError: If the guide is a point in some site.
    """
    draws = space.draw(number, at_once)
    psis = weigh(draws.log_p - draws.log_q, "check", space.task, lambda index: space.constrain(draws.z[index]))
    quantities = draws.quantities.double()
    varies = quantities.std(0) > 1e-6 * quantities.mean(0).abs().clamp_min(1e-12)
    for name in space.task.latents:
        if name not in compress(space.read.sites, varies.tolist()):
            raise ValueError(f"the guide's site {name!r} is a point: it has the same value in all draws.")
    used = varies & quantities.isfinite().all(0)
    space.read.keep(used)
    return draws._replace(quantities=draws.quantities[:, used]), psis


def certainty(psis: Psis, weighted: Drift) -> float:
    """Return the standard errors that chains must show: more of them if reliable weights show no error."""
    is_calm = (psis.khat < CALM or psis.even) and bool((weighted.errors + 2 * weighted.noise < TOLERANCE.sure).all())
    return TOLERANCE.certain + TOLERANCE.contrary * is_calm
