"""Chains of a guide's posterior that run until they have converged.

The chains start from draws of the guide.  A warm-up adapts step sizes and coordinates, and measures how often draws of
the guide are accepted.  After it nothing adapts, so the chains are exact.  They run in rounds of growing length until
R-hat and effective sample sizes reach the goal.  Thinned draws are less correlated, and short chains of independent
draws have an R-hat of 1.  So it is cheapest to run many chains and keep few draws of each.  Draws that chains recorded
while they still drifted are dropped.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..programs.latent_space import LatentSpace
from ..programs.latents import check_likelihood
from ..programs.log_density import or_nan
from .annealed_population import systematic
from .chains import Chains
from .convergence import FEWEST, Convergence, convergence
from .coordinates import White, chain_coordinates
from .samples import Samples

RHAT = 1.01  # of converged chains
SHORT, LONG = 16, 60  # sweeps of the warm-up, with a good guide and with any other
GOOD, FAIR = 0.5, 0.01  # mean acceptance of draws of a good guide, and of a fair one
FEW, MANY = 8, 32  # proposed draws of the guide per chain and cycle
LEAST = 160  # recorded draws per chain with a good guide
SWEEPS = 20  # least number of cycles with a good guide
STARTS = 20  # draws of the guide per chain, for its start
SPREAD = 0.1  # effective share of these from which they are resampled by their weights
HEAVY = 0.01  # share of the posterior at weights so large that proposals alone may not visit it
VISITS = 20.0  # departures from such places, per chain that is always there, from which their mass is known
AGAIN = 10  # sweeps that adapt again after a drift
KEPT = 400  # largest number of recorded draws per chain, unless more are asked for
KNOWN = 5000  # normal draws that estimate a standard deviation to 1 %
MANY_CHAINS = 64  # chains from which their scatter estimates the error of a standard deviation
WORST = 16  # quantities that are tested first: those furthest from convergence so far
BATCH = 4096  # draws per run of the model


class Goal(NamedTuple):
    """The goal of a run of chains.

    Attributes:
        num_draws: The least effective sample size of each quantity, of its bulk and of its tails.  Chains run longer
            until each standard deviation is as well known as from so many normal draws, or to 1 %.
        max_sweeps: The largest number of sweeps.
        longest: The largest factor by which unknown standard deviations, as those of heavy tails, lengthen a run.
    """

    num_draws: int
    max_sweeps: int
    longest: float = 10.0


class Run:
    """A run of chains of a guide's space.

    Args:
        space: The space.
        num_chains: The number C of chains.
        goal: The goal.
        watch: Called after each sweep with the state of the chains in words; True ends the run early.
        others: Starts of a quarter of the chains, ``(n, D)``, to see whether these mix with the others; None to start
            all chains from draws of the guide.
    """

    def __init__(
        self, space: LatentSpace, num_chains: int, goal: Goal, watch: Callable[[str], bool], others: Tensor | None
    ) -> None:
        self.space, self.goal, self._watch, self._is_stopped = space, goal, watch, False
        self._draw, self._began = partial(space.draw, batch_size=BATCH), time.perf_counter()
        z, start = self._starts(num_chains)
        if others is not None:
            quarter = start[: num_chains // 4]
            quarter.copy_(others[torch.arange(len(quarter)) % len(others)])
        self.chains = Chains(or_nan(space.log_p), chain_coordinates(space, z), start, max_steps=16)
        self.record = Record(space, max(KEPT, math.ceil(2 * goal.num_draws / num_chains)))
        self.chance, self._times, self._words = math.nan, 0, "warm-up"
        self._records_all, self._proposed = False, 0
        self._accepted: list[list[float]] = []
        self._heavy: list[Tensor] = []  # per cycle, True for chains at places of large weight, (C,)

    def _starts(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Return draws of the guide, and the starts of the chains, resampled by weights if the guide is good.

        Weights are truncated (Ionides 2008), so that no draw starts many chains.
        """
        per_chain = 4 if self.space.task.runs_one_by_one else STARTS
        guide = self._draw(max(num_chains * per_chain, 10 * self.space.dim))
        sound = guide.log_p.isfinite() & guide.log_q.isfinite() & guide.z.isfinite().all(-1)
        if not sound.any():
            check_likelihood("sample", self.space.task.traces[0])
            raise ValueError("the model has no finite density at any draw of the guide; train the guide first.")
        z, log_weights = guide.z[sound], (guide.log_p - guide.log_q)[sound].double()
        weights = (log_weights - log_weights.max()).exp()
        weights = weights.clamp_max(float(weights.mean()) * math.sqrt(len(z)))
        if float(weights.sum().square() / weights.square().sum()) < SPREAD * len(z):
            return z, z[torch.arange(num_chains) % len(z)]
        places = systematic(weights, num_chains)
        return z, z[places[torch.randperm(num_chains, device=z.device)]]

    def run(self) -> Samples:
        """Warm up, and run until the chains have converged, ``watch`` returns True, or the sweeps are used up."""
        self._warm_up()
        before, converged_at = self.chains.divergences, 0
        wanted = self._least
        while True:
            self._extend(wanted)
            found, converged, growth = self.record.judge(self.goal)
            if converged and self._is_short():
                converged, growth = False, 2.0
            if converged:
                converged_at, growth = converged_at or self.chains.count, 1.5
                if self._knows_sds(found) or self.chains.count >= self.goal.longest * converged_at:
                    break
            if self._is_over():
                break
            self._words = f"R-hat {float(found.rhat.max()):.3f}, ESS {float(found.ess.min()):.0f}"
            if found.drifts:
                self.record.drop_half()
                self._whiten(self.record.z().flatten(0, 1))
                for _ in range(AGAIN):
                    if not self._is_over():
                        self._sweep(adapt=True)
            wanted = math.ceil(len(self.record) * growth)
        z, names = self.record.z(), self.space.read.names
        rhat, ess_bulk, ess_tail, *_ = found if len(found.rhat) == len(names) else self.record.convergence()
        return Samples(
            draws={k: v.unflatten(0, z.shape[:2]) for k, v in self.space.drawn_back(z.flatten(0, 1), BATCH).items()},
            names=names,
            rhat=rhat,
            ess_bulk=ess_bulk,
            ess_tail=ess_tail,
            converged=converged,
            divergences=self.chains.divergences - before,
            acceptance=[statistics.fmean(values) for values in zip(*self._accepted, strict=True)],
            chance=self.chance,
            sweeps=self.chains.count,
            seconds=time.perf_counter() - self._began,
            guide=self.space.task.guide.call,
        )

    @property
    def _least(self) -> int:
        """The least number of recorded draws per chain."""
        least = LEAST if self._records_all else 2 * FEWEST
        return max(least, math.ceil(1.2 * self.goal.num_draws / len(self.chains.z)))

    def _knows_sds(self, found: Convergence) -> bool:
        """True if each standard deviation is as well known as asked for, or there are too few chains to tell."""
        return len(self.chains.z) < MANY_CHAINS or bool((found.ess_sd >= min(self.goal.num_draws, KNOWN)).all())

    def _is_short(self) -> bool:
        """True if much of the posterior lies at weights above the number of proposals, and chains rarely enter there.

        By proposals alone a chain stays at a place of weight w = p / q for about w proposals, and finds it as rarely.
        """
        if not self._records_all:
            return False
        heavy = torch.stack(self._heavy)  # (cycles, C)
        departures, visits = int((heavy[:-1] & ~heavy[1:]).sum()), int(heavy[:-1].sum())
        return bool(heavy.double().mean() > HEAVY) and departures * len(heavy) < VISITS * visits

    def _is_over(self) -> bool:
        return self.chains.count >= self.goal.max_sweeps or self._is_stopped

    def _sweep(self, *, adapt: bool) -> None:
        self.chains.sweep(adapt=adapt)
        self._is_stopped = self._watch(self._words)

    def _propose(self, times: int) -> list[Tensor]:
        places, self.chance = self.chains.propose(self._draw, or_nan(self.space.log_q), times)
        self._proposed += times
        self._heavy.append(self.chains.excess > math.log(self._proposed))
        return places

    def _warm_up(self) -> None:
        """Adapt step sizes and coordinates, and choose how often draws of the guide are proposed."""
        chances: list[float] = []
        visited: list[Tensor] = []
        for sweep in range(1, LONG + 1):
            self._sweep(adapt=True)
            self._propose(FEW if self.chance > FAIR else 1)  # many proposals reach places where the guide rarely draws
            chances.append(self.chance)
            visited.append(self.chains.z)
            self.chance = statistics.fmean(chances[-5:])
            kernels = self.chains.kernels
            if self.chance > GOOD and sweep >= FEW:  # steps in the base are longer than in whitened coordinates
                others = [kernel for kernel in kernels if not isinstance(kernel.coordinates, White)]
                self.chains.kernels = others or kernels
            is_last = self.chains.count >= self.goal.max_sweeps - FEWEST  # the recorded draws take sweeps too
            if is_last or self._is_stopped or (sweep >= SHORT and self.chance > GOOD):
                break
            if sweep in (LONG // 6, LONG // 3, LONG // 2):
                self._whiten(torch.cat(visited[sweep // 2 :]))
        # With a good guide each proposal is recorded; large batches are fastest if many draws are asked for.
        self._records_all, self._heavy = self.chance > GOOD, []
        many = min(MANY, max(FEW, self._least // SWEEPS)) if self._records_all else FEW
        self._times = many if self.chance > FAIR else 0

    def _whiten(self, z: Tensor) -> None:
        for kernel in self.chains.kernels:
            kernel.coordinates = kernel.coordinates.whitened(z)

    def _extend(self, wanted: int) -> None:
        """Run until a number of draws per chain is recorded."""
        while len(self.record) < wanted and not (self._is_over() and len(self.record) >= FEWEST):
            self._sweep(adapt=False)
            self._accepted.append(self.chains.acceptance)
            places = self._propose(self._times) if self._times else [self.chains.z]
            for z in places if self._records_all else places[-1:]:
                if self.record.keep(z):
                    wanted = math.ceil(wanted / 2)


class Record:
    """The draws of chains at a bounded number of times.

    Args:
        space: The space of the draws.
        most: The largest number of draws per chain; beyond it every second draw is dropped.
    """

    def __init__(self, space: LatentSpace, most: int) -> None:
        self._space, self._most, self._every, self._since = space, most, 1, 0
        self._z: list[Tensor] = []  # (C, D) each
        self._quantities: list[Tensor] = []  # (C, K) each, of the first of these draws
        self._worst = torch.arange(0)  # the quantities furthest from convergence

    def __len__(self) -> int:
        return len(self._z)

    def keep(self, z: Tensor) -> bool:
        """Record the places of the chains; return True if every second draw was dropped."""
        self._since += 1
        if self._since < self._every:
            return False
        self._z.append(z)
        self._since = 0
        is_full = len(self._z) > self._most
        if is_full:
            self._thin(2)
        return is_full

    def _thin(self, step: int) -> None:
        kept = slice((len(self._z) - 1) % step, None, step)  # with the last draw
        self._z, self._quantities, self._every = self._z[kept], self._quantities[kept], self._every * step

    def drop_half(self) -> None:
        """Drop the first half."""
        half = len(self._z) // 2
        self._z, self._quantities = self._z[half:], self._quantities[half:]

    def z(self) -> Tensor:
        """Return all draws, ``(C, n, D)``."""
        return torch.stack(self._z, 1)

    def judge(self, goal: Goal) -> tuple[Convergence, bool, float]:
        """Test all draws, and the draws that remain if only every second, fourth, … is kept.

        Returns:
            The convergence of all quantities, or of the worst; True if the goal is reached, in which case only the
            tested draws are kept; and the factor by which more draws are needed.
        """
        quantities, chains = self._all_quantities(), len(self._z[0])
        growth, step, first = 2.0, 1, None
        while step == 1 or (len(self) // step >= 2 * FEWEST and len(self) // step * chains >= goal.num_draws):
            found, is_reached = self._test(quantities[:, (len(self) - 1) % step :: step], goal)
            first = first or found
            if is_reached:
                self._thin(step)
                return found, True, 1.0
            excess = (float(found.rhat.max()) ** 2 - 1) / (RHAT**2 - 1)
            growth = min(growth, 1.1 * max(excess, goal.num_draws / max(1.0, float(found.ess.min()))))
            step *= 2
        assert first is not None
        return first, False, max(1.25, growth)

    def convergence(self) -> Convergence:
        """Return the convergence of all quantities."""
        return convergence(self._all_quantities())

    def _test(self, quantities: Tensor, goal: Goal) -> tuple[Convergence, bool]:
        """Test the worst quantities first, and the others if these have converged."""

        def is_reached(found: Convergence) -> bool:
            return bool((found.rhat <= RHAT).all() and (found.ess >= goal.num_draws).all()) and not found.drifts

        if len(self._worst):
            found = convergence(quantities[..., self._worst])
            if not is_reached(found):
                return found, False
        found = convergence(quantities)
        lacks = torch.maximum((found.rhat - 1) / (RHAT - 1), goal.num_draws / found.ess.clamp_min(1))
        self._worst = lacks.topk(WORST).indices if len(lacks) > WORST else torch.arange(0)
        return found, is_reached(found)

    def _all_quantities(self) -> Tensor:
        """Return the quantities, ``(C, n, K)``; only those of new draws are computed."""
        chains = len(self._z[0])
        while len(self._quantities) < len(self._z):
            part = self._z[len(self._quantities) :][: max(1, BATCH // chains)]
            self._quantities += self._space.quantities(torch.cat(part)).split(chains)
        return torch.stack(self._quantities, 1)
