"""Hamiltonian Monte Carlo for many chains at once, in several sets of coordinates, with proposals from a guide.

A transition proposes the end of a trajectory of L leapfrog steps of size ε.  Each chain multiplies ε by a random factor
between 0.4 and 1.2.  So travel times differ, no trajectory is periodic, and some chains enter narrow regions.
During adaptation ε follows the mean acceptance.  The travel time T ascends the *ChEES criterion*, the expected squared
change in |x - mean|²: a transition should carry a chain from the centre to the tails and back.

The chains alternate between sets of coordinates.  Draws of the guide are proposed too, each accepted with probability
min(1, w' / w), where w = p / q.  A good guide's draws carry a chain anywhere in one step.  All transitions leave the
density invariant.

Monte Carlo Sampling Methods Using Markov Chains and Their Applications (Hastings 1970); Hybrid Monte Carlo (Duane,
Kennedy, Pendleton, Roweth 1987); MCMC using Hamiltonian dynamics (Neal 2011, arXiv:1206.1901); An Adaptive-MCMC Scheme
for Setting Trajectory Lengths in Hamiltonian Monte Carlo (Hoffman, Radul, Sountsov 2021); Adaptive Monte Carlo
augmented with normalizing flows (Gabrié, Rotskoff, Vanden-Eijnden 2021, arXiv:2105.12603).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graphs import Traced
from ..vjp import LogDensity
from .coordinates import Coordinates, GuideDensity, White

Twin = GuideDensity | None
Draw = Callable[[int], tuple[Tensor, Tensor, Tensor]]  # draws z, (N, D), and log p and log q there, (N,)


@dataclass(frozen=True)
class Moves:
    """Settings of Hamiltonian Monte Carlo.

    Attributes:
        frozen: The mean acceptance below which chains hardly move.
        target: The mean acceptance that adaptation aims at.
        least: The least factor of a chain's step size, in units of the common one.
        most: The largest.
        first: The first travel time: on average a quarter of the period of a standard normal.
        diverged: The energy error, in nats, of a divergent trajectory.
    """

    frozen: float = 0.2
    target: float = 0.8
    least: float = 0.4
    most: float = 1.2
    first: float = math.pi / 2 / 0.8
    diverged: float = 1000.0


MOVES = Moves()


@dataclass(frozen=True)
class Target:
    """A posterior p and a guide q that proposes draws, as functions of vectors, ``(N, D)``.

    Attributes:
        dim: The number D of dimensions.
        log_p: The log-density of p, NaN where the model breaks down.
        log_q: That of q.
        draw: Samples q.
        coordinates: Returns coordinates for chains, given draws of q.
        quantities: Returns the K quantities that must converge, ``(N, K)``.
        is_slow: True if the model runs one draw at a time.
    """

    dim: int
    log_p: LogDensity
    log_q: LogDensity
    draw: Draw
    coordinates: Callable[[Tensor], list[Coordinates]]
    quantities: Callable[[Tensor], Tensor]
    is_slow: bool = False


class HMC:
    """Transition kernel for N chains of a density over vectors z, in one set of coordinates.

    Args:
        density: The log-density, ``(N, D) -> (N,)``.  Chains never move to places where it is not finite.
        coordinates: The coordinates.
        dim: The number D of dimensions.
        max_steps: The largest number of leapfrog steps per transition.
        twin: The log-density of twins over x, given x, z and log|dz/dx|; None for chains without twins.  The second
            half of the N chains are the twins.  They share the random numbers of the first half.
        graphs: Graphs that kernels share; by default the kernel has its own.

    Attributes:
        step: The step size ε.
        time: The travel time T.
        acceptance: The mean acceptance of the latest transition.
        gradients: The number of gradients so far; one evaluation for all chains counts as one.
        divergences: The number of divergent trajectories so far, summed over chains.

    Steps adapt to chains that are no twins.  ``acceptance`` and ``divergences`` are those of such chains.
    """

    def __init__(
        self,
        density: LogDensity,
        coordinates: Coordinates,
        dim: int,
        max_steps: int = 8,
        twin: Twin = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.coordinates, self.max_steps, self.twin = coordinates, max_steps, twin
        self.step, self.time, self.acceptance = 1.2 * dim**-0.25, MOVES.first, math.nan
        self.divergences = self.gradients = self._count = 0
        self._first = self._second = 0.0
        self._latest: _State | None = None
        self._latest_in = coordinates
        self._graphs = Graphs() if graphs is None else graphs
        self._density: Callable[..., Tensor] = density
        self._given: tuple[Tensor, ...] = ()

    def retarget(self, density: Callable[..., Tensor], coordinates: Coordinates, *given: Tensor) -> None:
        """Set another density and other coordinates, and restart adaptation from the present step size.

        Args:
            density: The log-density of vectors, and of further tensors.
            coordinates: The coordinates.
            *given: These tensors, such as a temperature.
        """
        self._density, self._given = density, given
        self.coordinates, self.time = coordinates, max(self.time, MOVES.first)
        self._count, self._first, self._second = 0, 0.0, 0.0
        self._graphs.forget_refused()

    def whiten(self, z: Tensor) -> None:
        """Whiten the coordinates by draws z, ``(N, D)``."""
        self.coordinates = self.coordinates.whitened(z)

    @torch.no_grad()
    def move(self, z: Tensor, *, adapt: bool) -> tuple[Tensor, Tensor]:
        """Make a transition from z, ``(N, D)``; return the new z and the log-density there, ``(N,)``."""
        start = self._latest
        if start is None or start.z is not z or self._latest_in is not self.coordinates:
            start = self._state(self.coordinates.inverse(z))
        first = len(z) if self.twin is None else len(z) // 2
        factor = MOVES.least + (MOVES.most - MOVES.least) * self._shared(torch.rand_like(start.x[:first, :1]))
        count = min(self.max_steps, max(1, math.ceil(self.time / self.step)))
        size = min(self.step, self.time / count) * factor  # (N, 1)
        self.gradients += 1 + count
        momentum = self._shared(torch.randn_like(start.x[:first]))
        energy = start.log_p - momentum.square().sum(-1) / 2
        end = start
        for _ in range(count):
            momentum = momentum + size / 2 * end.score
            end = self._state(end.x + size * momentum)
            momentum = momentum + size / 2 * end.score
        error = (end.log_p - momentum.square().sum(-1) / 2 - energy).nan_to_num(-math.inf, math.inf, -math.inf)
        self.divergences += int((error[:first] < -MOVES.diverged).sum())
        chance = error.clamp_max(0).exp()
        taken = self._shared(torch.rand_like(chance[:first])) < chance
        self.acceptance = float(chance[:first].mean())
        if adapt:
            times = count * size.squeeze(-1)
            self._adapt(*(part[:first] for part in (start.x, end.x, momentum, chance, times)))
        self._latest, self._latest_in = start.replaced(taken, end), self.coordinates
        return self._latest.z, self._latest.log_p - self._latest.log_det

    def _shared(self, numbers: Tensor) -> Tensor:
        """Return random numbers of chains for all, twins included."""
        return numbers if self.twin is None else torch.cat((numbers, numbers))

    def _adapt(self, x: Tensor, end: Tensor, momentum: Tensor, chance: Tensor, times: Tensor) -> None:
        """Adapt the step size to the acceptance, and the travel time by a step of Adam."""
        self._count += 1
        self.step *= math.exp(1.5 * self._count**-0.5 * (self.acceptance - MOVES.target))
        usable = (chance > 0.01) & end.isfinite().all(-1)
        if usable.sum() < 8:
            return
        x, end, momentum, chance, times = (part[usable] for part in (x, end, momentum, chance, times))
        centred, moved = x - x.mean(0), end - (chance.unsqueeze(-1) * end).sum(0) / chance.sum()
        change = moved.square().sum(-1) - centred.square().sum(-1)
        slope = times * change * (moved * momentum).sum(-1)
        ascent = float((chance * slope).sum() / chance.sum())
        self._first = 0.8 * self._first + 0.2 * ascent
        self._second = 0.95 * self._second + 0.05 * ascent**2
        root = math.sqrt(self._second / (1 - 0.95**self._count)) + 1e-12
        direction = self._first / (1 - 0.8**self._count) / root
        time = self.time * math.exp(0.1 * min(1.0, max(-1.0, direction)))
        self.time = min(max(time, self.step), MOVES.most * self.max_steps * self.step)

    def _state(self, x: Tensor) -> _State:
        chart = self.coordinates
        fixed, numbers = (None, (chart.loc, chart.scale)) if isinstance(chart, White) else (chart, ())
        scored = self._graphs.of(self._density, fixed, self.twin)
        return _State(x, *map(torch.as_tensor, scored(x, *numbers, *self._given)))


class _State(NamedTuple):
    x: Tensor  # (N, D)
    z: Tensor  # (N, D)
    score: Tensor  # (N, D), over x
    log_p: Tensor  # (N,), over x
    log_det: Tensor  # (N,)

    def replaced(self, taken: Tensor, other: _State) -> _State:
        """Replace the rows that are ``taken``, ``(N,)`` of bool, by those of another state."""
        pairs = zip(other, self, strict=True)
        return _State(*(torch.where(taken.unsqueeze(-1) if new.dim() > 1 else taken, new, old) for new, old in pairs))


class Graphs:
    """Log-densities with gradients over coordinates, which graphs replace.

    The numbers of whitened coordinates are inputs of a graph, so that it serves all whitened coordinates.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Traced] = {}

    def of(self, density: Callable[..., Tensor], chart: Coordinates | None, twin: Twin) -> Traced:
        """Return a function of x, of the numbers of whitened coordinates, and of what else the density needs.

        Args:
            density: The log-density of vectors, and of further tensors.
            chart: The coordinates; None for whitened ones.
            twin: The log-density of twins, or None.
        """
        key = density, chart, twin
        if key not in self._known:
            self._known[key] = Traced(functools.partial(_scored, density, chart, twin), first=1)
        return self._known[key]

    def forget_refused(self) -> None:
        """Forget the functions that no graph may replace, since they may have met draws far out."""
        self._known = {key: traced for key, traced in self._known.items() if not traced.refusal}


def _scored(
    density: Callable[..., Tensor], chart: Coordinates | None, twin: Twin, x: Tensor, *given: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return all of the state at x but x itself."""
    if chart is None:
        chart, given = White.of(*given[:2]), given[2:]
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        z, log_det = chart.forward(leaf)
        if twin is None:
            log_p = density(z, *given) + log_det
        else:
            (_, own_z, own_det), twins = zip(*(part.chunk(2) for part in (leaf, z, log_det)), strict=True)
            log_p = torch.cat((density(own_z, *given) + own_det, twin(*twins)))
        (score,) = torch.autograd.grad(log_p.where(log_p.isfinite(), 0).sum(), leaf)
    finite = log_p.isfinite() & score.isfinite().all(-1)
    log_p = log_p.detach().where(finite, -math.inf)
    return z.detach(), score.where(finite[:, None], 0), log_p, log_det.detach()


class Chains:
    """N chains of a density over vectors z.

    Args:
        density: The log-density, ``(N, D) -> (N,)``.  Chains never move to places where it is not finite.
        coordinates: The coordinates to move in: the first set in each sweep, the others in every second sweep.
        z: The chains' starts, ``(N, D)``.
        max_steps: The largest number of leapfrog steps per transition.
        twin: The log-density of twins, as for :class:`HMC`, in the only set of coordinates.

    Attributes:
        z: The chains' current places, ``(N, D)``.
        log_p: The log-density there, ``(N,)``.
        excess: The log-weights log p - log q there after the latest proposals, minus the log mean weight of these.
        kernels: The transition kernels, one per set of coordinates.
        count: The number of sweeps so far.
    """

    def __init__(
        self, density: LogDensity, coordinates: Sequence[Coordinates], z: Tensor, max_steps: int = 8, twin: Twin = None
    ) -> None:
        self.kernels = [HMC(density, one, z.shape[1], max_steps, twin) for one in coordinates]
        self.z, self.log_p, self.count = z, torch.full(z.shape[:1], math.nan).to(z), 0
        self.excess = torch.zeros_like(self.log_p)

    @property
    def acceptance(self) -> list[float]:
        """The mean acceptance of the latest transition, per set of coordinates."""
        return [kernel.acceptance for kernel in self.kernels]

    @property
    def divergences(self) -> int:
        """The number of divergent trajectories."""
        return sum(kernel.divergences for kernel in self.kernels)

    def sweep(self, *, adapt: bool) -> None:
        """Make a transition in each set of coordinates; step sizes adapt in all of them if asked for."""
        self.count += 1
        for kernel in self.kernels if adapt or self.count % 2 else self.kernels[:1]:
            self.z, self.log_p = kernel.move(self.z, adapt=adapt)

    def sweeps(self, number: int, *, adapt: bool) -> Iterator[Tensor]:
        """Sweep a number of times; yield z after each sweep."""
        for _ in range(number):
            self.sweep(adapt=adapt)
            yield self.z

    @torch.no_grad()
    def propose(self, draw: Draw, log_q: LogDensity, times: int) -> tuple[list[Tensor], float]:
        """Propose a number of draws of a guide to each chain.

        Args:
            draw: Returns draws z of the guide, and the log-densities log p and log q there.
            log_q: The guide's log-density, ``(N, D) -> (N,)``.
            times: The number of proposals per chain.

        Returns:
            The chains' places after each proposal, and the mean acceptance probability.
        """
        proposed, of_p, of_q = draw(times * len(self.z))
        log_weights = (of_p - of_q).nan_to_num(-math.inf, -math.inf, -math.inf)
        own = self.log_p - log_q(self.z).nan_to_num(-math.inf, math.inf, -math.inf)
        places, chances = [], []
        columns = (column.split(len(self.z)) for column in (proposed, of_p, log_weights))
        for z, log_p, log_weight in zip(*columns, strict=True):
            chance = (log_weight - own).clamp_max(0).exp()
            taken = torch.rand_like(chance) < chance
            self.z = torch.where(taken.unsqueeze(-1), z, self.z)
            self.log_p, own = torch.where(taken, log_p, self.log_p), torch.where(taken, log_weight, own)
            places.append(self.z)
            chances.append(float(chance.mean()))
        self.excess = own - (log_weights.logsumexp(0) - math.log(len(log_weights)))
        return places, sum(chances) / times
