"""Chains of a guide's posterior that run until they have converged.

They start from draws of the guide.  A warm-up adapts steps and coordinates, and measures with what chance draws of the
guide are accepted; after it nothing changes any more, so that the chains are exact.  Then they run in rounds, each
longer than the one before, until R-hat and effective sample sizes are as asked for.  Draws that are kept further apart
depend less on each other, and short chains of independent draws have an R-hat of 1: so with many chains it is cheapest
to keep few of each.  What chains record while they still drift is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..programs.latent_space import LatentSpace
from ..programs.log_density import or_nan
from .chains import Chains
from .convergence import FEWEST, Convergence, convergence
from .coordinates import White
from .non_centred import NonCentred, coordinates_of

RHAT = 1.01  # where chains have converged
SHORT, LONG = 16, 60  # sweeps of a warm-up: for a guide whose draws are mostly accepted, and for any other
GOOD, FAIR = 0.5, 0.01  # mean chances of a draw of the guide to be accepted
FEW, MANY = 8, 32  # draws of such guides that are proposed to each chain in a cycle
LEAST = 160  # draws of each chain of a good guide
SWEEPS = 20  # between which the draws of such a guide are proposed, at least
STARTS = 20  # draws of the guide for each chain's start
SPREAD = 0.1  # the effective share of these by which they are resampled
HEAVY = 0.01  # the share of the posterior that draws of the guide may need longer to reach or to leave than chains run
VISITS = 20.0  # how often a chain must have left such places, had it been there all the time, to know what they hold
AGAIN = 10  # sweeps that adapt once more, where chains have moved on
KEPT = 400  # draws of each chain that are kept at most, unless more are asked for
KNOWN = 5000  # normal draws that tell a standard deviation to 1 %
HEAVY_TAILED = 10  # times as many sweeps, at most, as convergence takes, where a standard deviation is still unknown
MANY_CHAINS = 64  # from which on their scatter tells how well a standard deviation is known
WORST = 16  # quantities that are looked at first, those that were furthest from convergence before
BATCH = 4096  # draws of the guide, or values of draws, that are computed at once


class Goal(NamedTuple):
    """The goal of a run of chains.

    Attributes:
        num_draws: The least effective sample size of each quantity, of its bulk and of its tails.  Chains run on, up to
            ten times as long, until each standard deviation is known as well as from so many normal draws, or to 1 %.
        max_sweeps: How often chains are moved at most.
    """

    num_draws: int
    max_sweeps: int


@dataclass(frozen=True)
class Outcome:
    """The result of a run of chains.

    Attributes:
        z: Draws, ``(C, n, D)``.
        convergence: How far they have converged, for each of the K quantities of the space.
        converged: True if each of them is as asked for.
        acceptance: The mean acceptance of the moves, in each of the coordinates.
        chance: The mean chance of a draw of the guide to be accepted.
        divergences: In how many trajectories after the warm-up the energy went astray.
        sweeps: How often the chains were moved.
    """

    z: Tensor
    convergence: Convergence
    converged: bool
    acceptance: list[float]
    chance: float
    divergences: int
    sweeps: int


class Run:
    """Chains of a guide's space that run until they have converged.

    Args:
        space: The space.
        num_chains: The number C of chains.
        goal: What is asked of them.
        tell: Is told after each sweep, in words, how far the chains are.
        stopped: Asked after each sweep; True to end early.
        others: Places where a quarter of the chains start, ``(n, D)``, to tell whether all come from there to where the
            guide is; None to start all of them from the guide's draws.
    """

    def __init__(
        self,
        space: LatentSpace,
        num_chains: int,
        goal: Goal,
        tell: Callable[[str], None],
        stopped: Callable[[], bool],
        others: Tensor | None = None,
    ) -> None:
        self.space, self.goal, self._tell, self._stopped = space, goal, tell, stopped
        self._draw = partial(space.draw, batch_size=BATCH)
        z, start = self._starts(num_chains)
        if others is not None:
            quarter = start[: num_chains // 4]
            quarter.copy_(others[torch.arange(len(quarter)) % len(others)])
        self.chains = Chains(or_nan(space.log_p), coordinates_of(space, z), start, max_steps=16)
        self.record = Record(space, max(KEPT, math.ceil(2 * goal.num_draws / num_chains)))
        self.sweeps, self.chance, self.times, self._words = 0, math.nan, 0, "warm-up"
        self._records_all, self._proposed = False, 0
        self._accepted: list[list[float]] = []
        self._heavy: list[float] = []
        self._was_heavy, self._visits = torch.zeros(num_chains, dtype=torch.bool, device=z.device), (0, 0)

    def _starts(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Draws of the guide, and where the chains start: at draws resampled by their weights, if the guide is good.

        Weights are truncated (Ionides 2008), so that no draw starts many chains.
        """
        most = 4 if self.space.task.runs_one_by_one else STARTS
        guide = self._draw(max(num_chains * most, 10 * self.space.dim))
        sound = guide.log_p.isfinite() & guide.log_q.isfinite() & guide.z.isfinite().all(-1)
        if not sound.any():
            raise ValueError("the model has no finite density at any draw of the guide; train the guide first.")
        z, log_weights = guide.z[sound], (guide.log_p - guide.log_q)[sound].double()
        weights = (log_weights - log_weights.max()).exp()
        weights = weights.clamp_max(float(weights.mean()) * math.sqrt(len(z)))
        if float(weights.sum().square() / weights.square().sum()) < SPREAD * len(z):
            return z, z[torch.arange(num_chains) % len(z)]
        points = (torch.arange(num_chains, device=z.device) + torch.rand((), device=z.device)) / num_chains
        places = torch.searchsorted(weights.cumsum(0) / weights.sum(), points.double()).clamp_max(len(z) - 1)
        return z, z[places[torch.randperm(num_chains, device=z.device)]]

    def run(self) -> Outcome:
        """Warm up, and run until the chains have converged, or as long as they may."""
        self._warm_up()
        before, reached = self.chains.divergences, 0
        wanted = self._least
        while True:
            self._extend(wanted)
            found, is_enough, growth = self.record.judge(self.goal)
            if is_enough and self._is_short():
                is_enough, growth = False, 2.0
            if is_enough:
                reached = reached or self.sweeps  # when the chains had converged
                if self._knows_sds(found) or self.sweeps >= HEAVY_TAILED * reached:
                    break
                growth = 1.5
            if self._is_over():
                break
            self._words = f"R-hat {float(found.rhat.max()):.3f}, ESS {float(found.ess.min()):.0f}"
            if self.record.drifts(found):
                self.record.drop_half()
                self._adapt_again()
            wanted = math.ceil(len(self.record) * growth)
        return Outcome(
            self.record.z(),
            self.record.convergence() if len(found.rhat) < len(self.space.read.names) else found,
            is_enough,
            [sum(values) / len(values) for values in zip(*self._accepted, strict=True)],
            self.chance,
            self.chains.divergences - before,
            self.sweeps,
        )

    @property
    def _least(self) -> int:
        """The number of draws of each chain that may do."""
        least = LEAST if self._records_all else 2 * FEWEST
        return max(least, math.ceil(1.2 * self.goal.num_draws / len(self.chains.z)))

    def _knows_sds(self, found: Convergence) -> bool:
        """True if each standard deviation is known as well as is asked for, or chains are too few to tell."""
        return len(self.chains.z) < MANY_CHAINS or bool((found.ess_sd >= min(self.goal.num_draws, KNOWN)).all())

    def _is_short(self) -> bool:
        """True if much of the posterior has weights w = p / q above the number of draws proposed to each chain, and
        chains come and go there seldom.

        By proposals alone a chain stays at a place of weight w for about w of them, and takes as long to find it.
        """
        if not self._records_all or sum(self._heavy) <= HEAVY * len(self._heavy):
            return False
        there, stayed = self._visits
        return (there - stayed) * len(self._heavy) < VISITS * there

    def _is_over(self) -> bool:
        return self.sweeps >= self.goal.max_sweeps or self._stopped()

    def _sweep(self, *, adapt: bool) -> None:
        self.chains.sweep(adapt=adapt)
        self.sweeps += 1
        self._tell(self._words)

    def _propose(self, times: int) -> list[Tensor]:
        places, self.chance = self.chains.propose(self._draw, or_nan(self.space.log_q), times)
        self._proposed += times
        heavy = self.chains.excess > math.log(self._proposed)
        if self._heavy:  # else there was no cycle before
            there, stayed = self._visits
            self._visits = there + int(self._was_heavy.sum()), stayed + int((self._was_heavy & heavy).sum())
        self._heavy.append(float(heavy.double().mean()))
        self._was_heavy = heavy
        return places

    def _warm_up(self) -> None:
        """Adapt steps and coordinates, and decide how often draws of the guide are proposed."""
        chances: list[float] = []
        visited: list[Tensor] = []
        for sweep in range(1, LONG + 1):
            self._sweep(adapt=True)
            self._propose(FEW if self.chance > FAIR else 1)  # what the guide draws too rarely takes many
            chances.append(self.chance)
            visited.append(self.chains.z)
            self.chance = sum(chances[-5:]) / len(chances[-5:])
            if self.chance > GOOD and sweep >= FEW:  # the base's steps go further
                self._leave_white()
            is_last = self.sweeps >= self.goal.max_sweeps - FEWEST  # the draws that are recorded take sweeps too
            if is_last or self._stopped() or (sweep >= SHORT and self.chance > GOOD):
                break
            if sweep in (LONG // 6, LONG // 3, LONG // 2):
                self._whiten(torch.cat(visited[sweep // 2 :]))
        # Good draws are recorded one by one: where many are asked for, large batches of them are fastest.
        self._records_all = self.chance > GOOD
        self._heavy, self._visits = [], (0, 0)
        many = min(MANY, max(FEW, self._least // SWEEPS)) if self._records_all else FEW
        self.times = many if self.chance > FAIR else 0

    def _leave_white(self) -> None:
        """Move no more in whitened coordinates, where there are others."""
        others = [kernel for kernel in self.chains.kernels if not isinstance(kernel.chart, White)]
        self.chains.kernels = others or self.chains.kernels

    def _whiten(self, z: Tensor) -> None:
        white = White(z)
        for kernel in self.chains.kernels:
            if isinstance(kernel.chart, White):
                kernel.chart = white
            elif isinstance(kernel.chart, NonCentred):
                kernel.chart = kernel.chart.whitened(z)

    def _adapt_again(self) -> None:
        """Adapt once more, to where the chains are now."""
        self._whiten(self.record.z().flatten(0, 1))
        for _ in range(AGAIN):
            if not self._is_over():
                self._sweep(adapt=True)

    def _extend(self, wanted: int) -> None:
        """Run until a number of draws of each chain is recorded."""
        while len(self.record) < wanted and not (self._is_over() and len(self.record) >= FEWEST):
            self._sweep(adapt=False)
            self._accepted.append(self.chains.acceptance)
            places = self._propose(self.times) if self.times else [self.chains.z]
            for z in places if self._records_all else places[-1:]:
                if self.record.keep(z):
                    wanted = math.ceil(wanted / 2)


class Record:
    """The draws of chains, at a bounded number of times.

    Args:
        space: The space in which they are drawn.
        most: How many are kept of each chain; where there are more, every second one is dropped.
    """

    def __init__(self, space: LatentSpace, most: int) -> None:
        self._space, self._most, self._every, self._since = space, most, 1, 0
        self._z: list[Tensor] = []  # (C, D) each
        self._numbers: list[Tensor] = []  # (C, K) each, of the first ones
        self._worst = torch.arange(0)

    def __len__(self) -> int:
        return len(self._z)

    def keep(self, z: Tensor) -> bool:
        """Record where the chains are; True if every second one was dropped."""
        self._since += 1
        if self._since < self._every:
            return False
        self._z.append(z)
        self._since = 0
        if len(self._z) <= self._most:
            return False
        self._thin(2)
        return True

    def _thin(self, step: int) -> None:
        start = (len(self._z) - 1) % step  # the last one stays
        self._z, self._numbers, self._every = self._z[start::step], self._numbers[start::step], self._every * step

    def drop_half(self) -> None:
        """Forget the first half."""
        half = len(self._z) // 2
        self._z, self._numbers = self._z[half:], self._numbers[half:]

    def z(self) -> Tensor:
        """All draws, ``(C, n, D)``."""
        return torch.stack(self._z, 1)

    def judge(self, goal: Goal) -> tuple[Convergence, bool, float]:
        """Look at all draws, and at those that are left if only every second, fourth, … is kept.

        Returns:
            How far these have converged, or at least those quantities that lag behind; whether that is enough, and
            then only the draws that were looked at are left; and by what factor more are needed.
        """
        numbers, chains = self._all_numbers(), len(self._z[0])
        growth, step, first = 2.0, 1, None
        while step == 1 or (len(self) // step >= 2 * FEWEST and len(self) // step * chains >= goal.num_draws):
            found, is_whole = self._look(numbers[:, (len(self) - 1) % step :: step], goal)
            first = first or found
            if is_whole and self._is_enough(found, goal):
                self._thin(step)
                return found, True, 1.0
            excess = (float(found.rhat.max()) ** 2 - 1) / (RHAT**2 - 1)
            growth = min(growth, 1.1 * max(excess, goal.num_draws / max(1.0, float(found.ess.min()))))
            step *= 2
        assert first is not None
        return first, False, max(1.25, growth)

    def convergence(self) -> Convergence:
        """How far all draws have converged, for each quantity."""
        return convergence(self._all_numbers())

    def drifts(self, found: Convergence) -> bool:
        """True if the chains still move away from where they started, by more than chance explains."""
        tests = 2 * max(1, found.drift.numel())
        return bool((found.drift > torch.special.ndtri(torch.tensor(1 - 0.0005 / tests, dtype=torch.float64))).any())

    def _is_enough(self, found: Convergence, goal: Goal) -> bool:
        return bool((found.rhat <= RHAT).all() and (found.ess >= goal.num_draws).all()) and not self.drifts(found)

    def _look(self, numbers: Tensor, goal: Goal) -> tuple[Convergence, bool]:
        """Look at the worst quantities first, and at the others where these have converged; True where at all."""
        if len(self._worst):
            found = convergence(numbers[..., self._worst])
            if not self._is_enough(found, goal):
                return found, False
        found = convergence(numbers)
        lacks = torch.maximum((found.rhat - 1) / (RHAT - 1), goal.num_draws / found.ess.clamp_min(1))
        self._worst = lacks.topk(WORST).indices if len(lacks) > WORST else torch.arange(0)
        return found, True

    def _all_numbers(self) -> Tensor:
        """The quantities, ``(C, n, K)``; those of new draws are computed."""
        chains = len(self._z[0])
        while len(self._numbers) < len(self._z):
            part = self._z[len(self._numbers) :][: max(1, BATCH // chains)]
            self._numbers += self._space.quantities(torch.cat(part)).split(chains)
        return torch.stack(self._numbers, 1)
