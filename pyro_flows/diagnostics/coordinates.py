"""Coordinates for the vectors that a guide draws: those of its base distribution, and whitened ones."""

from __future__ import annotations

from typing import Protocol

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.utils import _sum_rightmost

from ..programs.space import Space


class Chart(Protocol):
    """Coordinates x, ``(N, D)``, for vectors z."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors at x, and log|det dz/dx|, ``(N,)``."""

    def inverse(self, z: Tensor) -> Tensor:
        """The coordinates of z."""


class White:
    """Coordinates in which draws ``(N, D)`` have mean 0 and, where they are enough, the identity as covariance."""

    def __init__(self, z: Tensor) -> None:
        self.loc = z.mean(0)
        factor, failed = torch.linalg.cholesky_ex(torch.cov(z.T).reshape(z.shape[1], z.shape[1]))
        self.scale_tril = z.std(0).diag() if failed or len(z) < 5 * z.shape[1] else factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc + x @ self.scale_tril.T, self.scale_tril.diagonal().log().sum().expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.scale_tril, (z - self.loc).T, upper=False).T


def charts_of(space: Space, z: Tensor) -> tuple[list[Chart], White]:
    """All coordinates that chains of a guide move in, given draws z of it; and the whitened ones, the last of these."""
    white, base = White(z), Base.of(space, z[:100])
    return [base, white] if base else [white], white


class Base:
    """The coordinates of an ``AutoContinuous`` guide's base distribution."""

    def __init__(self, space: Space) -> None:
        self._space = space

    @classmethod
    def of(cls, space: Space, z: Tensor) -> Base | None:
        """Those of a guide, None where it has none or where its transform is not invertible at its draws z."""
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
        return z, _sum_rightmost(log_det, log_det.dim() - 1)

    def inverse(self, z: Tensor) -> Tensor:
        return self._transform().inv(z)

    def _transform(self) -> Transform:
        guide = self._space.task.guide
        return guide.call.get_transform(*guide.args, **guide.kwargs)  # type: ignore[attr-defined]
