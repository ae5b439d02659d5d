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
from dataclasses import dataclass

import torch
from torch import Tensor

from ..transforms.linear import stretched

LEVELS = 3  # largest depth of a hierarchy; each level takes a run of the model
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

    @classmethod
    def of(cls, loc: Tensor, scale: Tensor) -> White:
        """Return the coordinates with a mean, ``(D,)``, and a Cholesky factor, ``(D, D)``, or deviations, ``(D,)``."""
        found = cls.__new__(cls)
        found.loc, found.scale = loc, scale
        return found

    @property
    def scale_tril(self) -> Tensor:
        """The matrix L of z = loc + L x, ``(D, D)``."""
        return self.scale if self.scale.dim() == 2 else self.scale.diag()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z, ``(N, D)``, and the log-determinant of dz/dx, ``(N,)``, given x, ``(N, D)``."""
        is_dense = self.scale.dim() == 2
        deviations = self.scale.diagonal() if is_dense else self.scale
        z = self.loc + (x @ self.scale.T if is_dense else x * self.scale)
        return z, deviations.log().sum().expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """Return x."""
        if self.scale.dim() == 1:
            return (z - self.loc) / self.scale
        return torch.linalg.solve_triangular(self.scale, (z - self.loc).T, upper=False).T

    def whitened(self, z: Tensor) -> White:
        """Return the same coordinates whitened by other draws z; other coordinates may ignore these."""
        return White(z)


@dataclass(frozen=True)
class Mapped:
    """Coordinates given by a pair of functions, such as the base coordinates of a guide.

    Attributes:
        forward: Returns z, ``(N, D)``, and the log-determinant of dz/dx, ``(N,)``, given x.
        inverse: Returns x, given z.
    """

    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    inverse: Callable[[Tensor], Tensor]

    def whitened(self, z: Tensor) -> Mapped:
        return self


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


@dataclass(frozen=True)
class Hierarchy:
    """Coordinates of a density whose priors have locations and scales that depend on other coordinates.

    Attributes:
        columns: The L coordinates with such a prior.
        parameters: Returns the locations and the scales, each ``(N, L)``, given z.
    """

    columns: Tensor
    parameters: Callable[[Tensor], tuple[Tensor, Tensor]]


class NonCentred:
    """Whitened coordinates of z after z = loc + scale x for each coordinate of a hierarchy.

    Args:
        hierarchy: The hierarchy.
        levels: Its depth.
        z: Draws, ``(N, D)``, that whiten the coordinates.
    """

    def __init__(self, hierarchy: Hierarchy, levels: int, z: Tensor) -> None:
        self._hierarchy, self._levels = hierarchy, levels
        self._white = White(self._units(z))

    @classmethod
    @torch.no_grad()
    def of(cls, hierarchy: Hierarchy, z: Tensor) -> NonCentred | None:
        """Return the non-centred coordinates of a hierarchy, given draws z; None if no scale depends on coordinates."""
        for levels in range(2, LEVELS + 1):
            found = cls(hierarchy, levels, z)
            again, log_det = found.forward(found.inverse(z))
            if bool(((again - z).abs() <= ROUND_OFF * (z.abs() + z.std(0))).all()):
                return found if bool(log_det.std() > ROUND_OFF) else None
        return None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        units, log_det = self._white.forward(x)
        columns, z = self._hierarchy.columns, units
        for _ in range(self._levels):  # each level needs the values of those above
            loc, scale = self._hierarchy.parameters(z)
            z = units.index_copy(1, columns, loc + scale * units[:, columns])
        return z, log_det + scale.log().sum(-1)

    def inverse(self, z: Tensor) -> Tensor:
        return self._white.inverse(self._units(z))

    def whitened(self, z: Tensor) -> NonCentred:
        return NonCentred(self._hierarchy, self._levels, z)

    def _units(self, z: Tensor) -> Tensor:
        (loc, scale), columns = self._hierarchy.parameters(z), self._hierarchy.columns
        return z.index_copy(1, columns, (z[:, columns] - loc) / scale)


Coordinates = White | Mapped | Stretched | NonCentred  # coordinates x, (N, D), of vectors z, (N, D)
GuideDensity = Callable[[Tensor, Tensor, Tensor], Tensor]  # the log-density of x, (N,), given x, z and log|dz/dx|
