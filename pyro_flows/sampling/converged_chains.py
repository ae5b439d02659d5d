"""Chains of a guide's posterior that run until they have converged.

The chains start from draws of the guide.  A warm-up adapts step sizes and coordinates, and measures how often draws of
the guide are accepted.  After it nothing adapts, so the chains are exact.  They run in rounds of growing length until
R-hat and effective sample sizes reach the goal.  Thinned draws are less correlated, and short chains of independent
draws have an R-hat of 1.  So it is cheapest to run many chains and keep few draws of each.  Draws that chains recorded
while they still drifted are dropped.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .annealed_population import systematic
from .chains import Chains, Target
from .convergence import FEWEST, Convergence, convergence
from .coordinates import White


@dataclass(frozen=True)
class Rules:
    """Rules of a run.

    Attributes:
        rhat: R-hat of converged chains.
        short: Sweeps of the warm-up with a good guide.
        long: Those with any other.
        good: The mean acceptance of draws of a good guide.
        fair: That of a fair one, below which no draws are proposed.
        few: Proposed draws of the guide per chain and cycle; also the sweeps before a guide counts as good.
        many: The most of them, since large batches are fastest if many draws are asked for.
        least: Recorded draws per chain with a good guide.
        sweeps: The least number of cycles with a good guide.
        starts: Draws of the guide per chain, for its start.
        spread: The effective share of these from which they are resampled by their weights.
        heavy: The share of the posterior at weights so large that proposals alone may not visit it.
        visits: Departures from such places, per chain that is always there, from which their mass is known.
        again: Sweeps that adapt again after a drift.
        kept: The largest number of recorded draws per chain, unless more are asked for.
        known: Normal draws that estimate a standard deviation to 1 %.
        many_chains: Chains from which their scatter estimates the error of a standard deviation.
        worst: Quantities that are tested first: those furthest from convergence so far.
        batch: Draws whose quantities are computed together.
    """

    rhat: float = 1.01
    short: int = 16
    long: int = 60
    good: float = 0.5
    fair: float = 0.01
    few: int = 8
    many: int = 32
    least: int = 160
    sweeps: int = 20
    starts: int = 20
    spread: float = 0.1
    heavy: float = 0.01
    visits: float = 20.0
    again: int = 10
    kept: int = 400
    known: int = 5000
    many_chains: int = 64
    worst: int = 16
    batch: int = 4096


RULES = Rules()


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


@dataclass(frozen=True)
class Samples:
    """Draws of a posterior by Markov chains, and how far they have converged: the result of :func:`~pyro_flows.sample`.

    Attributes:
        draws: Draws of latents and deterministic sites: name -> ``(chains, draws, *site_shape)``.
        names: The names of the K tested quantities; angles count as their cosine and sine.
        rhat: Rank-normalised split R-hat, ``(K,)``.
        ess_bulk: The effective sample size of the bulk, ``(K,)``.
        ess_tail: The effective sample size of the tails, the smaller of the two, ``(K,)``.
        converged: True if every R-hat is at most 1.01 and every effective sample size at least as large as asked for.
        divergences: The number of divergent trajectories after the warm-up.
        acceptance: The mean acceptance of the chains' transitions, between 0 and 1, per set of coordinates.
        chance: The mean acceptance of draws of the guide, between 0 and 1.
        sweeps: The number of sweeps, those of the warm-up included.
        seconds: The wall time.
        guide: The guide that the chains started from.

    Example::

        >>> import pyro, pyro_flows as pf
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> found = pf.sample(model, model, num_draws=1000, progress=False)
        >>> found.converged, found.names, found.rhat.shape, len(found.flat["x"]) >= 1000
        (True, ['x'], torch.Size([1]), True)
    """

    draws: dict[str, Tensor]
    names: list[str]
    rhat: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    converged: bool
    divergences: int
    acceptance: list[float]
    chance: float
    sweeps: int
    seconds: float
    guide: Any

    @property
    def flat(self) -> dict[str, Tensor]:
        """The draws of all chains together, by site, each ``(chains * draws, *site_shape)``."""
        return {name: value.flatten(0, 1) for name, value in self.draws.items()}

    @property
    def worst(self) -> str:
        """The largest R-hat and the smallest effective sample size, in words."""
        ess = self.ess_bulk.minimum(self.ess_tail)
        highest, lowest = int(self.rhat.argmax()), int(ess.argmin())
        return (
            f"R-hat <= {float(self.rhat[highest]):.3f} ({self.names[highest]}), "
            f"ESS >= {float(ess[lowest]):,.0f} ({self.names[lowest]})"
        )

    def __repr__(self) -> str:
        chains, draws = next(iter(self.draws.values())).shape[:2]
        return (
            f"Samples({chains} chains x {draws} draws, {'converged' if self.converged else 'NOT converged'}, "
            f"{self.worst}, {self.divergences} divergences, {self.seconds:.1f} s)"
        )


class NoDensity(ValueError):
    """The model has no finite density at any draw of the guide."""


class ChainRun:
    """A run of chains of a posterior.

    Args:
        target: The posterior, and the guide that the chains start from.
        num_chains: The number C of chains.
        goal: The goal.
        watch: Called after each sweep with the state of the chains in words; True ends the run early.
        others: Starts of a quarter of the chains, ``(n, D)``, to see whether these mix with the others; None to start
            all chains from draws of the guide.

    Attributes:
        chains: The chains.
        record: Their draws.
        converged: True if the goal is reached.
        divergences: The number of divergent trajectories after the warm-up.
        acceptance: The mean acceptance of the chains' transitions, per set of coordinates.
        chance: The mean acceptance of draws of the guide.
    """

    def __init__(
        self, target: Target, num_chains: int, goal: Goal, watch: Callable[[str], bool], others: Tensor | None
    ) -> None:
        self.target, self.goal, self._watch, self._is_stopped = target, goal, watch, False
        z, start = self._starts(num_chains)
        if others is not None:
            quarter = start[: num_chains // 4]
            quarter.copy_(others[torch.arange(len(quarter)) % len(others)])
        self.chains = Chains(target.log_p, target.coordinates(z), start, max_steps=16)
        self.record = Record(target.quantities, max(RULES.kept, math.ceil(2 * goal.num_draws / num_chains)))
        self.chance, self.converged, self.acceptance, self._words = math.nan, False, list[float](), "warm-up"
        self.divergences = self._times = self._proposed = 0
        self._heavy, self._records_all = list[Tensor](), False  # per cycle, chains at places of large weight, (C,)

    def _starts(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Return draws of the guide, and the starts of the chains, resampled by weights if the guide is good.

        Weights are truncated (Ionides 2008), so that no draw starts many chains.
        """
        per_chain = 4 if self.target.is_slow else RULES.starts
        z, log_p, log_q = self.target.draw(max(num_chains * per_chain, 10 * self.target.dim))
        sound = log_p.isfinite() & log_q.isfinite() & z.isfinite().all(-1)
        if not sound.any():
            raise NoDensity("the model has no finite density at any draw of the guide; train the guide first.")
        z, log_weights = z[sound], (log_p - log_q)[sound].double()
        weights = (log_weights - log_weights.max()).exp()
        weights = weights.clamp_max(float(weights.mean()) * math.sqrt(len(z)))
        if float(weights.sum().square() / weights.square().sum()) < RULES.spread * len(z):
            return z, z[torch.arange(num_chains) % len(z)]
        return z, z[systematic(weights, num_chains)[torch.randperm(num_chains, device=z.device)]]

    def run(self) -> Convergence:
        """Warm up, and run until the chains have converged, ``watch`` returns True, or the sweeps are used up.

        Returns:
            The convergence of all quantities.
        """
        self._warm_up()
        before, converged_at, wanted, accepted = self.chains.divergences, 0, self._least, list[list[float]]()
        while True:
            self._extend(wanted, accepted)
            found, self.converged, growth = self.record.judge(self.goal)
            if self.converged and self._is_short():
                self.converged, growth = False, 2.0
            if self.converged:
                converged_at, growth = converged_at or self.chains.count, 1.5
                is_known = (found.ess_sd >= min(self.goal.num_draws, RULES.known)).all()
                few = len(self.chains.z) < RULES.many_chains  # too few to tell
                if few or is_known or self.chains.count >= self.goal.longest * converged_at:
                    break
            if self._is_over():
                break
            self._words = f"R-hat {float(found.rhat.max()):.3f}, ESS {float(found.ess.min()):.0f}"
            if found.drifts:  # drop the first half of the draws, and adapt again
                self.record.drop_half()
                self._whiten(self.record.z().flatten(0, 1))
                for _ in range(RULES.again):
                    if not self._is_over():
                        self._sweep(adapt=True)
            wanted = math.ceil(len(self.record) * growth)
        self.divergences = self.chains.divergences - before
        self.acceptance = [statistics.fmean(values) for values in zip(*accepted, strict=True)]
        return self.record.complete(found)

    @property
    def _least(self) -> int:
        """The least number of recorded draws per chain."""
        least = RULES.least if self._records_all else 2 * FEWEST
        return max(least, math.ceil(1.2 * self.goal.num_draws / len(self.chains.z)))

    def _is_short(self) -> bool:
        """True if much of the posterior lies at weights above the number of proposals, and chains rarely enter there.

        By proposals alone a chain stays at a place of weight w = p / q for about w proposals, and finds it as rarely.
        """
        if not self._records_all:
            return False
        heavy = torch.stack(self._heavy)  # (cycles, C)
        departures, visits = int((heavy[:-1] & ~heavy[1:]).sum()), int(heavy[:-1].sum())
        return bool(heavy.double().mean() > RULES.heavy) and departures * len(heavy) < RULES.visits * visits

    def _is_over(self) -> bool:
        return self.chains.count >= self.goal.max_sweeps or self._is_stopped

    def _sweep(self, *, adapt: bool) -> None:
        self.chains.sweep(adapt=adapt)
        self._is_stopped = self._watch(self._words)

    def _propose(self, times: int) -> list[Tensor]:
        places, self.chance = self.chains.propose(self.target.draw, self.target.log_q, times)
        self._proposed += times
        self._heavy.append(self.chains.excess > math.log(self._proposed))
        return places

    def _warm_up(self) -> None:
        """Adapt step sizes and coordinates, and choose how often draws of the guide are proposed."""
        chances, visited = list[float](), list[Tensor]()
        for sweep in range(1, RULES.long + 1):
            self._sweep(adapt=True)
            # Many proposals reach places where the guide rarely draws.
            self._propose(RULES.few if self.chance > RULES.fair else 1)
            chances.append(self.chance)
            visited.append(self.chains.z)
            self.chance = statistics.fmean(chances[-5:])
            is_good = self.chance > RULES.good
            if is_good and sweep >= RULES.few:  # steps in the base are longer than in whitened coordinates
                kernels = self.chains.kernels
                self.chains.kernels = [one for one in kernels if not isinstance(one.coordinates, White)] or kernels
            is_last = self.chains.count >= self.goal.max_sweeps - FEWEST  # the recorded draws take sweeps too
            if is_last or self._is_stopped or (sweep >= RULES.short and is_good):
                break
            if sweep in (RULES.long // 6, RULES.long // 3, RULES.long // 2):
                self._whiten(torch.cat(visited[sweep // 2 :]))
        # With a good guide each proposal is recorded; large batches are fastest if many draws are asked for.
        self._records_all, self._heavy = self.chance > RULES.good, []
        many = max(RULES.few, self._least // RULES.sweeps) if self._records_all else RULES.few
        self._times = min(RULES.many, many) if self.chance > RULES.fair else 0

    def _whiten(self, z: Tensor) -> None:
        for kernel in self.chains.kernels:
            kernel.whiten(z)

    def _extend(self, wanted: int, accepted: list[list[float]]) -> None:
        """Run until a number of draws per chain is recorded, and add the mean acceptances of the transitions."""
        while len(self.record) < wanted and not (self._is_over() and len(self.record) >= FEWEST):
            self._sweep(adapt=False)
            accepted.append(self.chains.acceptance)
            places = self._propose(self._times) if self._times else [self.chains.z]
            for z in places if self._records_all else places[-1:]:
                if self.record.keep(z):
                    wanted = math.ceil(wanted / 2)


class Record:
    """The draws of chains at a bounded number of times.

    Args:
        quantities: Returns the K quantities to test, ``(N, K)``, given vectors, ``(N, D)``.
        most: The largest number of draws per chain; beyond it every second draw is dropped.
    """

    def __init__(self, quantities: Callable[[Tensor], Tensor], most: int) -> None:
        self._of, self._most, self._every, self._since = quantities, most, 1, 0
        self._z, self._quantities = list[Tensor](), list[Tensor]()  # (C, D) each; and (C, K), of the first of these
        self._worst = torch.arange(0)  # the quantities furthest from convergence

    def __len__(self) -> int:
        return len(self._z)

    def keep(self, z: Tensor) -> bool:
        """Record the places of the chains; return True if every second draw was dropped."""
        self._since += 1
        if self._since < self._every:
            return False
        self._z.append(z)
        self._since, is_full = 0, len(self._z) > self._most
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

        The worst quantities are tested first, and the others if these have converged.

        Returns:
            The convergence of all quantities, or of the worst; True if the goal is reached, in which case only the
            tested draws are kept; and the factor by which more draws are needed.
        """

        def is_reached(found: Convergence) -> bool:
            return bool((found.rhat <= RULES.rhat).all() and (found.ess >= goal.num_draws).all()) and not found.drifts

        quantities, chains, growth, step, tests = self._all_quantities(), len(self._z[0]), 2.0, 1, list[Convergence]()
        while step == 1 or (len(self) // step >= 2 * FEWEST and len(self) // step * chains >= goal.num_draws):
            some = quantities[:, (len(self) - 1) % step :: step]
            found = convergence(some[..., self._worst]) if len(self._worst) else None
            if found is None or is_reached(found):
                found = convergence(some)
                lacks = torch.maximum((found.rhat - 1) / (RULES.rhat - 1), goal.num_draws / found.ess.clamp_min(1))
                self._worst = lacks.topk(RULES.worst).indices if len(lacks) > RULES.worst else torch.arange(0)
            tests.append(found)
            if is_reached(found):
                self._thin(step)
                return found, True, 1.0
            excess = (float(found.rhat.max()) ** 2 - 1) / (RULES.rhat**2 - 1)
            growth = min(growth, 1.1 * max(excess, goal.num_draws / max(1.0, float(found.ess.min()))))
            step *= 2
        return tests[0], False, max(1.25, growth)

    def complete(self, found: Convergence) -> Convergence:
        """Return the convergence of all quantities, given that of all or of the worst."""
        return found if len(found.rhat) == self._quantities[0].shape[-1] else convergence(self._all_quantities())

    def _all_quantities(self) -> Tensor:
        """Return the quantities, ``(C, n, K)``; only those of new draws are computed."""
        chains = len(self._z[0])
        while len(self._quantities) < len(self._z):
            part = self._z[len(self._quantities) :][: max(1, RULES.batch // chains)]
            self._quantities += self._of(torch.cat(part)).split(chains)
        return torch.stack(self._quantities, 1)
