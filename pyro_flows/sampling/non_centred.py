"""Coordinates of hierarchical models: effects in units of their priors' scales, z = loc + scale x.

A hierarchy has a narrow neck where its scales are small: the steps that fit elsewhere do not enter it.  In these
coordinates there is none, wherever the data do not fix the effects (the non-centred parametrisation).

A General Framework for the Parametrization of Hierarchical Models (Papaspiliopoulos, Roberts, Sköld 2007); To Center or
Not to Center (Yu, Meng 2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Cauchy, Laplace, Normal
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..programs.engines import Site, Values, View
from ..programs.latent_space import LatentSpace
from ..programs.latents import innermost
from ..programs.log_density import is_breakdown
from .coordinates import White, charts_of
from .hmc import Coordinates

LEVELS = 3  # the most levels of a hierarchy: each takes a run of the model
FIRST = 4096  # draws that tell whether there are such
ROUND_OFF = 1e-4  # the largest relative error of a way back


class NonCentred:
    """Coordinates x of hierarchical models: z = loc + scale x for each real latent whose prior has these parameters.

    The parameters depend on other latents.  The x are whitened too.

    Args:
        space: The space.
        names: The latents.
        levels: How many levels the hierarchy has.
        z: Draws, ``(N, D)``, by which x is whitened.
    """

    def __init__(self, space: LatentSpace, names: list[str], levels: int, z: Tensor) -> None:
        self._space, self._names, self._levels = space, names, levels
        columns = [torch.tensor([own == name for own in space.coordinates]).nonzero().squeeze(-1) for name in names]
        self._columns = torch.cat(columns).to(z.device)
        self._white = White(self._units(z))

    @classmethod
    @torch.no_grad()
    def of(cls, space: LatentSpace, z: Tensor) -> NonCentred | None:
        """Return the coordinates of a model, or None if no prior's scale depends on latents, given draws z."""
        model, latents = space.task.model, space.task.latents
        names = [name for name in latents if _has_loc_and_scale(model.single.nodes[name])]
        if not names or model.enumerated or space.task.runs_one_by_one:
            return None
        values = space.values(z)
        for name in names:
            own = z[:, [place for place, other in enumerate(space.coordinates) if other == name]]
            if own.shape[1] != values[name][0].numel() or not torch.allclose(own, values[name].reshape(len(z), -1)):
                return None
        for levels in range(2, LEVELS + 1):
            found = cls(space, names, levels, z)
            again, log_det = found.forward(found.inverse(z))
            if bool(((again - z).abs() <= ROUND_OFF * (z.abs() + z.std(0))).all()):
                return found if bool(log_det.std() > ROUND_OFF) else None
        return None

    def whitened(self, z: Tensor) -> NonCentred:
        """The same coordinates, whitened by other draws z."""
        return NonCentred(self._space, self._names, self._levels, z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        units, log_det = self._white.forward(x)
        z = units
        try:
            for _ in range(self._levels):  # each level needs the values of those above
                loc, scale = self._parameters(z)
                z = units.index_copy(1, self._columns, loc + scale * units[:, self._columns])
        except (ValueError, LinAlgError, FloatingPointError) as error:
            if not is_breakdown(error):
                raise
            return x * math.nan, log_det
        return z, log_det + scale.log().sum(-1)

    def inverse(self, z: Tensor) -> Tensor:
        return self._white.inverse(self._units(z))

    def _units(self, z: Tensor) -> Tensor:
        loc, scale = self._parameters(z)
        return z.index_copy(1, self._columns, (z[:, self._columns] - loc) / scale)

    def _parameters(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The priors' locations and scales, given all latents, each ``(N, L)``."""

        def parameter(what: str) -> Callable[[Site], Tensor]:
            return lambda site: torch.as_tensor(getattr(innermost(site["fn"]), what))

        def read(view: View) -> Values:
            return {f"{what} {n}": view.read(n, parameter(what)) for n in self._names for what in ("loc", "scale")}

        found = self._space.task.model.run(read, self._space.latents(z), len(z))
        loc, scale = (
            torch.cat([found[f"{what} {name}"].reshape(len(z), -1) for name in self._names], -1)
            for what in ("loc", "scale")
        )
        return loc.to(z), scale.to(z)


def _has_loc_and_scale(site: Site) -> bool:
    """True if values of a site are loc + scale times numbers whose distribution has no parameters that vary."""
    fn = innermost(site["fn"])
    return isinstance(fn, Normal | Laplace | Cauchy) and fn.loc.shape == site["value"].shape == fn.scale.shape


def coordinates_of(space: LatentSpace, z: Tensor) -> list[Coordinates]:
    """The coordinates in which chains move, given draws z, ``(N, D)``: those of the model's hierarchy first, if any."""
    charts, _ = charts_of(space, z)
    found = NonCentred.of(space, z[:FIRST])
    return [found, charts[0]] if found else list(charts)
