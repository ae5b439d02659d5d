"""Many Markov chains at once, which move in several coordinates in turn, and by draws of the guide.

In each set of coordinates they make a step of Hamiltonian Monte Carlo.  Draws of the guide are proposed too, each
accepted with the chance min(1, w' / w), where w = p / q: a good guide's carry a chain anywhere in one step.  All leave
the density invariant.

A hierarchy has a narrow neck where its scales are small: the steps that fit elsewhere do not enter it.  The effects in
units of their priors' scales have none (non-centred parametrisation).

A General Framework for the Parametrization of Hierarchical Models (Papaspiliopoulos, Roberts, Sköld 2007); To Center or
Not to Center (Yu, Meng 2011); Monte Carlo Sampling Methods Using Markov Chains and Their Applications (Hastings 1970);
Adaptive Monte Carlo augmented with normalizing flows (Gabrié, Rotskoff, Vanden-Eijnden 2021, arXiv:2105.12603).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import Cauchy, Laplace, Normal
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..programs.engines import Site, Values, View
from ..programs.log_density import LogDensity, is_breakdown
from ..programs.quantities import innermost
from ..programs.space import Scored, Space
from .charts import White
from .hmc import HMC, Coordinates

FROZEN = 0.2  # the mean acceptance below which chains hardly move
LEVELS = 3  # the most levels of a hierarchy: each takes a run of the model
ROUND_OFF = 1e-4  # the largest relative error of a way back


class Chains:
    """N chains of a density over vectors z.

    Args:
        density: The log-density, ``(N, D) -> (N,)``; where it is not finite no chain goes.
        charts: The coordinates to move in: the first in each sweep, the others in every second one.
        z: Where the chains start, ``(N, D)``.
        max_steps: The most leapfrog steps in a transition.

    Attributes:
        z: Where the chains are, ``(N, D)``.
        log_p: The log-density there, ``(N,)``.
        excess: The log-weights log p - log q there, after the latest proposals, less the logarithm of these' mean.
        kernels: What moves them, one in each of the charts.
    """

    def __init__(self, density: LogDensity, charts: Sequence[Coordinates], z: Tensor, max_steps: int = 8) -> None:
        self.z, self.log_p = z, torch.full(z.shape[:1], math.nan).to(z)
        self.kernels = [HMC(density, chart, z.shape[1], max_steps) for chart in charts]
        self.excess = torch.zeros_like(self.log_p)
        self._sweeps = 0

    @property
    def acceptance(self) -> list[float]:
        """The mean acceptance of the latest move in each of the charts."""
        return [kernel.acceptance for kernel in self.kernels]

    @property
    def divergences(self) -> int:
        """In how many trajectories the energy went astray."""
        return sum(kernel.divergences for kernel in self.kernels)

    def sweep(self, *, adapt: bool) -> None:
        """Move in the charts' coordinates; steps are adapted, in all of them, while that is asked for."""
        self._sweeps += 1
        for kernel in self.kernels if adapt or self._sweeps % 2 else self.kernels[:1]:
            self.z, self.log_p = kernel.move(self.z, adapt=adapt)

    @torch.no_grad()
    def propose(self, draw: Callable[[int], Scored], log_q: LogDensity, times: int) -> tuple[list[Tensor], float]:
        """Propose draws of a guide to each chain, a number of times.

        Args:
            draw: Draws of the guide.
            log_q: Its log-density, ``(N, D) -> (N,)``.
            times: How often.

        Returns:
            Where the chains were after each time, and the mean chance of a draw to be taken.
        """
        proposals, number, chances = draw(times * len(self.z)), len(self.z), []
        log_weights = (proposals.log_p - proposals.log_q).nan_to_num(-math.inf, -math.inf, -math.inf)
        own = self.log_p - log_q(self.z).nan_to_num(-math.inf, math.inf, -math.inf)
        places = []
        for z, log_p, log_weight in zip(
            proposals.z.split(number), proposals.log_p.split(number), log_weights.split(number), strict=True
        ):
            chance = (log_weight - own).clamp_max(0).exp()
            taken = torch.rand_like(chance) < chance
            self.z = torch.where(taken.unsqueeze(-1), z, self.z)
            self.log_p, own = torch.where(taken, log_p, self.log_p), torch.where(taken, log_weight, own)
            places.append(self.z)
            chances.append(float(chance.mean()))
        self.excess = own - (log_weights.logsumexp(0) - math.log(len(log_weights)))
        return places, sum(chances) / times


class NonCentred:
    """Coordinates x of hierarchical models: z = loc + scale x for each real latent whose prior has these parameters.

    The parameters depend on other latents.  The x are whitened too.

    Args:
        space: The space.
        names: The latents.
        levels: How many levels the hierarchy has.
        z: Draws, ``(N, D)``, by which x is whitened.
    """

    def __init__(self, space: Space, names: list[str], levels: int, z: Tensor) -> None:
        self._space, self._names, self._levels = space, names, levels
        columns = [torch.tensor([own == name for own in space.coordinates]).nonzero().squeeze(-1) for name in names]
        self._columns = torch.cat(columns).to(z.device)
        self._white = White(self._units(z))

    @classmethod
    @torch.no_grad()
    def of(cls, space: Space, z: Tensor) -> NonCentred | None:
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
