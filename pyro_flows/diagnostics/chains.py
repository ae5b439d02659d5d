"""Many short Markov chains at once, which move in several coordinates in turn.

In each set of coordinates they make a step of Hamiltonian Monte Carlo, which leaves the density invariant.  The base of
a good guide turns the posterior into a normal, in which a step forgets where it started.  Directions that mix slowly
there, where the guide is bad, mix fast in whitened coordinates.

Hybrid Monte Carlo (Duane, Kennedy, Pendleton, Roweth 1987); MCMC using Hamiltonian dynamics (Neal 2011,
arXiv:1206.1901); in the coordinates of a flow: NeuTra (Hoffman et al. 2019, arXiv:1903.03704).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.utils import _sum_rightmost

from ..programs.log_density import LogDensity
from ..programs.space import Space

TARGET = 0.8  # the mean acceptance that step sizes are adapted to
FROZEN = 0.2  # the mean acceptance below which chains hardly move
MAX_STEPS = 8  # the most leapfrog steps in a transition


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


class Base:
    """The coordinates of an ``AutoContinuous`` guide's base distribution."""

    def __init__(self, space: Space) -> None:
        self._space = space

    @classmethod
    def of(cls, space: Space, z: Tensor) -> Base | None:
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


def charts_of(space: Space, z: Tensor) -> tuple[list[Chart], White]:
    """Return the coordinates that chains of a guide move in, given draws z, and the whitened ones among them."""
    white, base = White(z), Base.of(space, z[:100])
    return [base, white] if base else [white], white


class Chains:
    """N chains of a density over vectors z.

    Args:
        density: The log-density, ``(N, D) -> (N,)``; where it is not finite no chain goes.
        charts: The coordinates to move in: the first in each sweep, the others in every second one.
        z: Where the chains start, ``(N, D)``.

    Attributes:
        z: Where the chains are, ``(N, D)``.
        acceptance: The mean acceptance of the latest move in each of the charts.
    """

    def __init__(self, density: LogDensity, charts: list[Chart], z: Tensor) -> None:
        self.density, self.charts, self.z = density, charts, z
        self.acceptance = [math.nan] * len(charts)
        self._sweeps = 0
        self._steps = [1.2 * z.shape[1] ** -0.25] * len(charts)

    def sweep(self, *, adapt: bool) -> None:
        """Move in the charts' coordinates; step sizes are adapted, in all of them, while that is asked for."""
        self._sweeps += 1
        for number, chart in enumerate(self.charts if adapt or self._sweeps % 2 else self.charts[:1]):
            state = self._state(chart, chart.inverse(self.z))
            state, self.acceptance[number] = self._move(chart, state, self._steps[number])
            self.z = state.z
            if adapt:
                self._steps[number] *= math.exp(1.5 * (self.acceptance[number] - TARGET))

    def _move(self, chart: Chart, start: _State, size: float) -> tuple[_State, float]:
        """A trajectory of each chain, about a quarter of a turn of a normal, taken or left."""
        turn = math.pi / 2 * (0.75 + 0.5 * float(torch.rand(())))
        count = min(MAX_STEPS, max(1, round(turn / size)))
        step = size * (0.8 + 0.4 * torch.rand(len(start.x), 1, dtype=start.x.dtype, device=start.x.device))
        momentum = torch.randn_like(start.x)
        energy = start.log_p - momentum.square().sum(-1) / 2
        state = start
        for _ in range(count):
            momentum = momentum + step / 2 * state.score
            state = self._state(chart, state.x + step * momentum)
            momentum = momentum + step / 2 * state.score
        ratio = (state.log_p - momentum.square().sum(-1) / 2 - energy).nan_to_num(-math.inf, math.inf, -math.inf)
        taken = torch.rand_like(ratio).log() < ratio
        moved = _State(
            *(torch.where(taken.view(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in zip(state, start, strict=True))
        )
        return moved, float(ratio.clamp_max(0).exp().mean())

    def _state(self, chart: Chart, x: Tensor) -> _State:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            z, log_det = chart.forward(leaf)
            log_p = self.density(z) + log_det
            (score,) = torch.autograd.grad(log_p.where(log_p.isfinite(), 0).sum(), leaf)
        finite = log_p.isfinite() & score.isfinite().all(-1)
        return _State(x, z.detach(), log_p.detach().where(finite, -math.inf), score.where(finite[:, None], 0))


class _State(NamedTuple):
    x: Tensor  # (N, D), in the coordinates of a chart
    z: Tensor  # (N, D)
    log_p: Tensor  # (N,), over x
    score: Tensor  # (N, D)
