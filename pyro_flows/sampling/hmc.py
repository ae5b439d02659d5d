"""Hamiltonian Monte Carlo of many chains at once, which learn the size and number of their steps together.

A transition is a trajectory of L leapfrog steps of size ε, taken or left.  Each chain has a size of its own, ε times a
number between LEAST and MOST: so times of travel differ, none repeats itself, and some chains enter narrow places.
While they adapt, ε follows the mean acceptance, and the time of travel T climbs the *ChEES criterion*, the expected
square of the change in |x - mean|²: what it takes to carry a chain from the middle outwards and back.

Hybrid Monte Carlo (Duane, Kennedy, Pendleton, Roweth 1987); MCMC using Hamiltonian dynamics (Neal 2011,
arXiv:1206.1901); An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte Carlo (Hoffman, Radul,
Sountsov 2021).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..programs.log_density import LogDensity

TARGET = 0.8  # the mean acceptance that step sizes are adapted to
LEAST, MOST = 0.4, 1.2  # of a chain's own step size, in units of the common one
QUARTER = math.pi / 2 / 0.8  # the time of travel to begin with: a quarter of a turn of a normal, on average
DIVERGED = 1000.0  # nats by which the energy of a trajectory is wrong that has left the level of its start


class Coordinates(Protocol):
    """Coordinates x, ``(N, D)``, of vectors z; ``forward`` returns z and the log-determinant of dz/dx, ``(N,)``."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, z: Tensor) -> Tensor: ...


class HMC:
    """Moves N chains of a density over vectors z in one set of coordinates.

    Args:
        density: The log-density, ``(N, D) -> (N,)``; where it is not finite no chain goes.
        chart: The coordinates.
        dim: The number D of them.
        max_steps: The most leapfrog steps in a transition.

    Attributes:
        step: The step size ε.
        time: The time of travel T.
        acceptance: The mean acceptance of the latest move.
        gradients: How many gradients of all chains were taken.
        divergences: In how many trajectories, of all chains, the energy went astray.
    """

    def __init__(self, density: LogDensity, chart: Coordinates, dim: int, max_steps: int = 8) -> None:
        self.density, self.chart, self.max_steps = density, chart, max_steps
        self.step, self.time = 1.2 * dim**-0.25, QUARTER
        self.acceptance, self.divergences, self.gradients = math.nan, 0, 0
        self._count, self._first, self._second = 0, 0.0, 0.0
        self._latest: _State | None = None  # where the chains were left

    def turn_to(self, density: LogDensity, chart: Coordinates) -> None:
        """Move chains of another density in other coordinates, and adapt anew from the steps of before."""
        self.density, self.chart, self.time = density, chart, max(self.time, QUARTER)
        self._count, self._first, self._second = 0, 0.0, 0.0

    @torch.no_grad()
    def move(self, z: Tensor, *, adapt: bool) -> tuple[Tensor, Tensor]:
        """Make a transition from z, ``(N, D)``; return where the chains are, and the log-density there, ``(N,)``."""
        is_left = self._latest is not None and self._latest.z is z and self._latest.chart is self.chart
        start = self._latest if self._latest and is_left else self._state(self.chart.inverse(z))
        own = LEAST + (MOST - LEAST) * torch.rand(len(z), 1, dtype=z.dtype, device=z.device)
        count = min(self.max_steps, max(1, math.ceil(self.time / self.step)))
        size = min(self.step, self.time / count) * own  # (N, 1)
        self.gradients += 1 + count
        momentum = torch.randn_like(start.x)
        energy = start.log_p - momentum.square().sum(-1) / 2
        state = start
        for _ in range(count):
            momentum = momentum + size / 2 * state.score
            state = self._state(state.x + size * momentum)
            momentum = momentum + size / 2 * state.score
        error = (state.log_p - momentum.square().sum(-1) / 2 - energy).nan_to_num(-math.inf, math.inf, -math.inf)
        self.divergences += int((error < -DIVERGED).sum())
        chance = error.clamp_max(0).exp()
        taken = torch.rand_like(chance) < chance
        self.acceptance = float(chance.mean())
        if adapt:
            self._adapt(start.x, state.x, momentum, chance, count * size.squeeze(-1))
        self._latest = start.moved(taken, state)
        return self._latest.z, self._latest.log_p - self._latest.log_det

    def _adapt(self, x: Tensor, end: Tensor, momentum: Tensor, chance: Tensor, times: Tensor) -> None:
        """Learn from a move of all chains: the size of steps by its acceptance, the time by ascent with Adam."""
        self._count += 1
        self.step *= math.exp(1.5 * self._count**-0.5 * (self.acceptance - TARGET))
        usable = (chance > 0.01) & end.isfinite().all(-1)
        if usable.sum() < 8:
            return
        x, end, momentum, chance, times = (part[usable] for part in (x, end, momentum, chance, times))
        centre, other = x - x.mean(0), end - (chance.unsqueeze(-1) * end).sum(0) / chance.sum()
        change = other.square().sum(-1) - centre.square().sum(-1)
        slope = times * change * (other * momentum).sum(-1)
        ascent = float((chance * slope).sum() / chance.sum())
        self._first = 0.8 * self._first + 0.2 * ascent
        self._second = 0.95 * self._second + 0.05 * ascent**2
        ahead = self._first / (1 - 0.8**self._count)
        root = math.sqrt(self._second / (1 - 0.95**self._count)) + 1e-12
        time = self.time * math.exp(0.1 * min(1.0, max(-1.0, ahead / root)))
        self.time = min(max(time, self.step), MOST * self.max_steps * self.step)

    def _state(self, x: Tensor) -> _State:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            z, log_det = self.chart.forward(leaf)
            log_p = self.density(z) + log_det
            (score,) = torch.autograd.grad(log_p.where(log_p.isfinite(), 0).sum(), leaf)
        finite = log_p.isfinite() & score.isfinite().all(-1)
        log_p = log_p.detach().where(finite, -math.inf)
        return _State(x, z.detach(), log_p, log_det.detach(), score.where(finite[:, None], 0), self.chart)


class _State(NamedTuple):
    x: Tensor  # (N, D), in the coordinates of the chart
    z: Tensor  # (N, D)
    log_p: Tensor  # (N,), over x
    log_det: Tensor  # (N,)
    score: Tensor  # (N, D)
    chart: Coordinates

    def moved(self, taken: Tensor, other: _State) -> _State:
        """The other state where it is taken, ``(N,)``, and this one elsewhere."""
        rows = taken.unsqueeze(-1)
        return _State(
            torch.where(rows, other.x, self.x),
            torch.where(rows, other.z, self.z),
            torch.where(taken, other.log_p, self.log_p),
            torch.where(taken, other.log_det, self.log_det),
            torch.where(rows, other.score, self.score),
            self.chart,
        )
