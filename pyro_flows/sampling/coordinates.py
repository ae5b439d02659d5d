"""Coordinates x in which Markov chains move through vectors z, each with the log-determinant of dz/dx.

In the base coordinates of a good guide the posterior is nearly normal, and a transition forgets where it started.
Where the guide is poor, directions that mix slowly in its base mix fast in whitened coordinates.  Wide directions of
many latents are stretched.

A hierarchy has a narrow neck where its scales are small, and step sizes that suit the rest are too large to enter it.
The non-centred parametrisation measures effects in units of their priors' scales.  It has no neck, unless the data
determine the effects.

NeuTra (Hoffman et al. 2019, arXiv:1903.03704); A General Framework for the Parametrization of Hierarchical Models
(Papaspiliopoulos, Roberts, Sköld 2007); To Center or Not to Center (Yu, Meng 2011).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Cauchy, Laplace, Normal, Transform
from torch.distributions.utils import _sum_rightmost

from ..programs.engines import Site
from ..programs.latent_space import LatentSpace
from ..programs.latents import innermost
from ..programs.log_density import or_nan
from ..transforms.linear import stretched

LEVELS = 3  # largest depth of a hierarchy; each level takes a run of the model
FIRST = 4096  # draws by which a hierarchy is recognised
ROUND_OFF = 1e-4  # largest relative error of a round trip


class White:
    """Coordinates in which draws ``(N, D)`` have mean 0 and identity covariance.

    With few draws for D dimensions they have unit variances only.

    Args:
        z: The draws.
        weights: The weights of the draws, ``(N,)``; equal by default.
    """

    def __init__(self, z: Tensor, weights: Tensor | None = None) -> None:
        share = z.new_full((len(z),), 1 / len(z)) if weights is None else weights / weights.sum()
        self.loc = z.mean(0) if weights is None else share @ z
        effective = len(z) if weights is None else 1 / float(share.square().sum())
        self.scale = (share @ (z - self.loc).square() / (1 - 1 / effective)).sqrt()
        if effective >= 5 * z.shape[1]:
            covariance = torch.cov(z.T, aweights=weights).reshape(z.shape[1], z.shape[1])
            factor, failed = torch.linalg.cholesky_ex(covariance)
            self.scale = self.scale if failed else factor

    @property
    def scale_tril(self) -> Tensor:
        """The matrix L of z = loc + L x, ``(D, D)``."""
        return self.scale if self.scale.dim() == 2 else self.scale.diag()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z, ``(N, D)``, and the log-determinant of dz/dx, ``(N,)``, given x, ``(N, D)``."""
        if self.scale.dim() == 1:
            return self.loc + x * self.scale, self.scale.log().sum().expand(len(x))
        return self.loc + x @ self.scale.T, self.scale.diagonal().log().sum().expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """Return x."""
        if self.scale.dim() == 1:
            return (z - self.loc) / self.scale
        return torch.linalg.solve_triangular(self.scale, (z - self.loc).T, upper=False).T

    def whitened(self, z: Tensor) -> White:
        """Return the same coordinates whitened by other draws z; other coordinates may ignore these."""
        return White(z)


class Base:
    """Coordinates of the base distribution of a guide with a method ``get_transform``, as each ``AutoContinuous``."""

    def __init__(self, space: LatentSpace) -> None:
        self._space = space

    @classmethod
    def of(cls, space: LatentSpace, z: Tensor) -> Base | None:
        """Return a guide's base coordinates; None if it has no base, or its transform is not invertible at draws z."""
        if not hasattr(space.task.guide.call, "get_transform"):
            return None
        found = cls(space)
        try:
            again, _ = found.forward(found.inverse(z))
        except (NotImplementedError, KeyError):  # no transform, or no inverse
            return None
        return found if bool(((again - z).abs() <= 1e-3 * z.std(0)).all()) else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        transform = self._transform()
        z = transform(x)
        log_det = transform.log_abs_det_jacobian(x, z)
        return z, _sum_rightmost(log_det, log_det.dim() - 1).expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return self._transform().inv(z)

    def whitened(self, z: Tensor) -> Base:
        return self

    def _transform(self) -> Transform:
        guide = self._space.task.guide
        return guide.call.get_transform(*guide.args, **guide.kwargs)  # type: ignore[attr-defined]


class Stretched:
    """Coordinates x of vectors that have C x in other coordinates, where C stretches orthonormal directions.

    Args:
        chart: The other coordinates.
        directions: The directions, ``(D, R)``.
        by: The stretch of each, ``(R,)``.
    """

    def __init__(self, chart: Coordinates, directions: Tensor, by: Tensor) -> None:
        self.chart, self._directions, self._by = chart, directions, by

    def inwards(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the other coordinates, and the log-determinant of the change."""
        return stretched(x, self._directions, self._by), self._by.log().sum()

    def outwards(self, x: Tensor) -> Tensor:
        """Return these coordinates, given the others."""
        return stretched(x, self._directions, 1 / self._by)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        own, change = self.inwards(x)
        z, log_det = self.chart.forward(own)
        return z, log_det + change

    def inverse(self, z: Tensor) -> Tensor:
        return self.outwards(self.chart.inverse(z))

    def whitened(self, z: Tensor) -> Stretched:
        return self


class NonCentred:
    """Whitened coordinates of z after z = loc + scale x for each real latent whose prior has these parameters.

    The parameters depend on other latents.

    Args:
        space: The space.
        names: The latents.
        levels: The depth of the hierarchy.
        z: Draws, ``(N, D)``, that whiten the coordinates.
    """

    def __init__(self, space: LatentSpace, names: list[str], levels: int, z: Tensor) -> None:
        self._space, self._names, self._levels = space, names, levels
        self._columns = _columns(space, names).to(z.device)
        self._white = White(self._units(z))

    @classmethod
    @torch.no_grad()
    def of(cls, space: LatentSpace, z: Tensor) -> NonCentred | None:
        """Return a model's non-centred coordinates, given draws z; None if no prior's scale depends on latents."""
        model = space.task.model
        names = [name for name in space.task.latents if _has_loc_and_scale(model.single.nodes[name])]
        if not names or model.enumerated or space.task.runs_one_by_one:
            return None
        latents, columns = space.latents(z), _columns(space, names).to(z.device)
        values = torch.cat([latents[name].reshape(len(z), -1) for name in names], -1)
        if values.shape[1] != len(columns) or not torch.allclose(z[:, columns], values):
            return None
        for levels in range(2, LEVELS + 1):
            found = cls(space, names, levels, z)
            again, log_det = found.forward(found.inverse(z))
            if bool(((again - z).abs() <= ROUND_OFF * (z.abs() + z.std(0))).all()):
                return found if bool(log_det.std() > ROUND_OFF) else None
        return None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        units, log_det = self._white.forward(x)
        found = or_nan(self._centred, x.shape[1] + 1)(units)
        return found[:, :-1], log_det + found[:, -1]

    def inverse(self, z: Tensor) -> Tensor:
        return self._white.inverse(self._units(z))

    def whitened(self, z: Tensor) -> NonCentred:
        return NonCentred(self._space, self._names, self._levels, z)

    def _centred(self, units: Tensor) -> Tensor:
        """Return z, and the log-determinant of dz/du as a last column, given units u, ``(N, D) -> (N, D + 1)``."""
        z = units
        for _ in range(self._levels):  # each level needs the values of those above
            loc, scale = self._parameters(z)
            z = units.index_copy(1, self._columns, loc + scale * units[:, self._columns])
        return torch.cat((z, scale.log().sum(-1, keepdim=True)), -1)

    def _units(self, z: Tensor) -> Tensor:
        loc, scale = self._parameters(z)
        return z.index_copy(1, self._columns, (z[:, self._columns] - loc) / scale)

    def _parameters(self, z: Tensor) -> tuple[Tensor, ...]:
        """Return the locations and the scales of the priors, given all latents, each ``(N, L)``."""
        model, latents = self._space.task.model, self._space.latents(z)
        found = model.run(lambda view: {name: view.read(name, _loc_and_scale) for name in self._names}, latents, len(z))
        return torch.cat([found[name].reshape(len(z), -1, 2) for name in self._names], 1).to(z).unbind(-1)


Coordinates = White | Base | Stretched | NonCentred  # coordinates x, (N, D), of vectors z, (N, D)
GuideDensity = Callable[[Tensor, Tensor, Tensor], Tensor]  # the log-density of x, (N,), given x, z and log|dz/dx|


def _columns(space: LatentSpace, names: list[str]) -> Tensor:
    """Return the dimensions of some latents among the coordinates of a space."""
    places = [place for name in names for place, own in enumerate(space.coordinates) if own == name]
    return torch.tensor(places, dtype=torch.long)


def _loc_and_scale(site: Site) -> Tensor:
    """Return the location and the scale of each value of a site, ``(*shape, 2)``."""
    fn = innermost(site["fn"])
    return torch.stack((fn.loc, fn.scale), -1)


def _has_loc_and_scale(site: Site) -> bool:
    """True if each value of a site has its own location and scale: it is loc + scale times a standardised variable."""
    fn = innermost(site["fn"])
    return isinstance(fn, Normal | Laplace | Cauchy) and fn.loc.shape == site["value"].shape == fn.scale.shape


def guide_density(space: LatentSpace, coordinates: Coordinates) -> GuideDensity | None:
    """Return the guide's log-density over coordinates; None if it is unknown at vectors that the guide did not draw.

    In base coordinates it needs no inverse, which some flows find one dimension after another.
    """
    inner = coordinates.chart if isinstance(coordinates, Stretched) else coordinates
    guide = space.task.guide
    if isinstance(inner, Base) and hasattr(guide.call, "get_base_dist"):

        def of_base(x: Tensor, z: Tensor, log_det: Tensor) -> Tensor:
            own, change = coordinates.inwards(x) if isinstance(coordinates, Stretched) else (x, 0.0)
            log_prob = guide.call.get_base_dist().log_prob(own)  # type: ignore[attr-defined]
            return _sum_rightmost(log_prob, log_prob.dim() - 1) + change

        return of_base
    log_q = or_nan(space.log_q)
    return (lambda x, z, log_det: log_q(z) + log_det) if space.has_log_q else None


def guide_coordinates(space: LatentSpace, z: Tensor) -> tuple[list[Coordinates], White]:
    """Return base coordinates, if any, and whitened ones, given draws z, ``(N, D)``; also the latter alone."""
    white, base = White(z), Base.of(space, z[:100])
    return [base, white] if base else [white], white


def chain_coordinates(space: LatentSpace, z: Tensor) -> list[Coordinates]:
    """Return the coordinates for chains, given draws z, ``(N, D)``: non-centred ones first if the model has them."""
    found, (others, _) = NonCentred.of(space, z[:FIRST]), guide_coordinates(space, z)
    return [found, others[0]] if found else others
