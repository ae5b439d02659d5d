"""Short Markov chains from a guide's draws, and the limits to which means along them tend.

Chains leave the posterior invariant, so they drift if and only if the guide is not the posterior.  They need not
converge: if a function f decays as E[f_t | f_0] = μ + β (f_0 - μ), with β the slope of f_t in f_0, its limit is
μ = (E[f_t] - β E[f_0]) / (1 - β).  The mean along the chains is extrapolated to this limit, with a standard error that
grows if the chains are slow.

A model that takes long to run has few chains.  Each then has a *twin*, a chain of the guide's density with the same
start and random numbers, and a known mean.  It is a control variate: if the guide is nearly right, both have nearly the
same noise.

Coupling Control Variates for Markov Chain Monte Carlo (Goodman, Lin 2009, Journal of Computational Physics 228).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sampling.chains import MOVES, Chains
from ..sampling.coordinates import Coordinates, GuideDensity
from ..vjp import LogDensity


@dataclass(frozen=True)
class ShortRun:
    """Constants of a run of short chains.

    Attributes:
        adapt: The sweeps that adapt the step sizes.
        tries: Times ``adapt``, the most sweeps to adapt steps that are far too long.
        sweeps: The most sweeps afterwards.
        slowest: A larger slope tells nothing about the limit of a chain.
        slow: A larger slope is not known well enough to compare a chain with its twin.
    """

    adapt: int = 4
    tries: int = 4
    sweeps: int = 50
    slowest: float = 0.95
    slow: float = 0.8


SHORT_RUN = ShortRun()


def adapted(
    density: LogDensity, charts: Sequence[Coordinates], z: Tensor, twin: GuideDensity | None = None
) -> tuple[Chains, Tensor]:
    """Start chains at vectors z, ``(N, D)``, and adapt their steps; return them with all places on their way."""
    chains, places = Chains(density, charts, z, twin=twin), list[Tensor]()
    for place in chains.sweeps(SHORT_RUN.tries * SHORT_RUN.adapt, adapt=True):
        places.append(place)
        if len(places) >= SHORT_RUN.adapt and max(chains.acceptance) > MOVES.frozen:
            break
    return chains, torch.cat(places)


class Meter(ABC):
    """Accumulator that compares the means of a function along N chains with those at draws of the guide.

    Args:
        reference: The quantities at many draws of the guide, ``(M, K)``.
        start: The quantities at the starts of the chains, ``(N, K)``.
        powers: The number of powers of the function whose means are recorded.

    Attributes:
        reference: The function at the draws of the guide.
        start: The function at the starts of the chains.
        count: The number of sweeps so far.
    """

    def __init__(self, reference: Tensor, start: Tensor, powers: int) -> None:
        self.reference, self.start, self.count = self.function(reference), self.function(start), 0
        self._exponents, self._totals = range(1, powers + 1), list[Tensor]()  # of chains, and of twins

    @abstractmethod
    def function(self, quantities: Tensor) -> Tensor:
        """Return the function of quantities, ``(N, K) -> (N, L)``, in double precision."""

    def record(self, *quantities: Tensor) -> None:
        """Add the current quantities of the chains, ``(N, K)``, and always or never those of their twins."""
        self.count += 1
        values = [torch.stack([self.function(part) ** power for power in self._exponents]) for part in quantities]
        self._totals = [new + old for new, old in zip(values, self._totals, strict=True)] if self._totals else values

    @property
    def powers(self) -> Tensor:
        """The means of the function's powers along each chain, ``(powers, N, L)``."""
        return self._totals[0] / self.count

    @property
    def twins(self) -> Tensor | None:
        """The same along each twin; None without twins."""
        return self._totals[1] / self.count if len(self._totals) > 1 else None


def arrival(
    reference: Tensor, start: Tensor, now: Tensor, square: Tensor, twin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the limit of a function's mean along chains, ``(K,)``, and its standard error.

    Args:
        reference: The function at draws of the guide, ``(M, K)``.
        start: The function at the starts of the chains, ``(N, K)``.
        now: The mean of the function along each chain, ``(N, K)``.
        square: The mean of its square along each chain, ``(N, K)``.
        twin: The mean of the function along each twin, ``(N, K)``.
    """
    off, scale = start - start.mean(0), start.var(0, correction=0).clamp_min(1e-12)
    slope, left = _left(now, off, scale)
    rest, mean_of_start = 1 - slope, start.mean(0)
    mean, centre, share = (now.mean(0) - slope * mean_of_start) / rest, mean_of_start, torch.zeros_like(slope)
    scatter = of_slope = left.var(0)
    if twin is not None:
        slope_of_twin, left_of_twin = _left(twin, off, scale)
        known, rest_of_twin = reference.mean(0), 1 - slope_of_twin
        by = (left * left_of_twin).sum(0) / left_of_twin.square().sum(0).clamp_min(1e-12)
        by = by.where(slope < SHORT_RUN.slow, 0.0)
        share = by * rest_of_twin / rest
        mean = mean - share * ((twin.mean(0) - slope_of_twin * mean_of_start) / rest_of_twin - known)
        scatter, centre = (left - by * left_of_twin).var(0), torch.lerp(mean_of_start, known, by)
    # Twins have the same error of the slope, which matters as far as the mean is off.
    scatter = scatter + (mean - centre).square() * of_slope / scale
    # Few chains may miss the rare large values that make the variance of a heavy tail; the many draws contain them.
    seen = (square.mean(0) - now.mean(0).square()).clamp_min(1e-12)
    scatter = scatter * (reference.var(0) / seen).clamp_min(1) / rest**2 / len(start)
    return mean, (scatter + (1 - share).square() * reference.var(0) / len(reference)).sqrt()


def _left(now: Tensor, off: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slope of a function in its start, ``(K,)``, and what is left of each chain's deviation, ``(N, K)``."""
    moved = now - now.mean(0)
    slope = ((off * moved).mean(0) / scale).clamp(0, SHORT_RUN.slowest)
    return slope, moved - slope * off
