"""Coordinates x in which Markov chains move through vectors z, each with the log-determinant of dz/dx.

The base of a good guide turns the posterior into a normal, in which a step forgets where it started.  Directions that
mix slowly there, where the guide is bad, mix fast in whitened coordinates.

NeuTra (Hoffman et al. 2019, arXiv:1903.03704).
"""

from __future__ import annotations

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.utils import _sum_rightmost

from ..programs.latent_space import LatentSpace


class White:
    """Coordinates in which draws ``(N, D)`` have mean 0 and, where they are enough, the identity as covariance.

    Args:
        z: The draws.
        weights: What each counts, ``(N,)``; by default all count the same.
    """

    def __init__(self, z: Tensor, weights: Tensor | None = None) -> None:
        self.loc = z.mean(0) if weights is None else (weights.unsqueeze(-1) * z).sum(0) / weights.sum()
        enough = len(z) if weights is None else float(weights.sum().square() / weights.square().sum())
        covariance = torch.cov(z.T, aweights=weights).reshape(z.shape[1], z.shape[1])
        factor, failed = torch.linalg.cholesky_ex(covariance)
        self.scale_tril = covariance.diagonal().sqrt().diag() if failed or enough < 5 * z.shape[1] else factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc + x @ self.scale_tril.T, self.scale_tril.diagonal().log().sum().expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.scale_tril, (z - self.loc).T, upper=False).T


class Base:
    """The coordinates of an ``AutoContinuous`` guide's base distribution."""

    def __init__(self, space: LatentSpace) -> None:
        self._space = space

    @classmethod
    def of(cls, space: LatentSpace, z: Tensor) -> Base | None:
        """Return a guide's base coordinates, or None unless it has some that are invertible at its draws z."""
        if not isinstance(space.task.guide.call, AutoContinuous):
            return None
        found = cls(space)
        try:
            again, _ = found.forward(found.inverse(z))
        except (NotImplementedError, KeyError):  # no transform, or one without a way back
            return None
        return found if bool(((again - z).abs() <= 1e-3 * z.std(0)).all()) else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        transform = self._transform()
        z = transform(x)
        log_det = transform.log_abs_det_jacobian(x, z)
        return z, _sum_rightmost(log_det, log_det.dim() - 1).expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return self._transform().inv(z)

    def _transform(self) -> Transform:
        guide = self._space.task.guide
        return guide.call.get_transform(*guide.args, **guide.kwargs)  # type: ignore[attr-defined]


Chart = Base | White  # coordinates x, (N, D), for vectors z


def charts_of(space: LatentSpace, z: Tensor) -> tuple[list[Chart], White]:
    """Return the coordinates that chains of a guide move in, given draws z, and the whitened ones among them."""
    white, base = White(z), Base.of(space, z[:100])
    return [base, white] if base else [white], white
