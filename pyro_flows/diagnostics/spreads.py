"""The spread of many latents about the middle, together.

The latents of a multivariate t share a random scale.  Hamiltonian Monte Carlo changes the mean square of D latents by
D^-1/2 of itself or so in a step, and each latent moves fast within it.  So chains that start from a normal guide of D
latents see no heavy tail in any single one.  The mean square itself shows that it is slow: if the means of chains
differ by more than their movements explain, its limit is unknown.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .drift import Mean, arrival


class Spreads(NamedTuple):
    """A guide's errors of the spread of each of S groups of latents.

    Attributes:
        names: The names of the groups.
        error: The posterior's root mean square over the guide's, minus one, to first order, ``(S,)``.
        noise: The standard error of ``error``.
        slowness: The variance of the means of chains, in units of that of means of independent sweeps, ``(S,)``.
    """

    names: list[str]
    error: Tensor
    noise: Tensor
    slowness: Tensor

    def are_clear(self, limit: float, slowest: float) -> Tensor:
        """Return True for each spread that is right to a limit, and not too slow to tell, ``(S,)``."""
        return (self.error.abs() + self.noise < limit) & (self.slowness < slowest)


class SpreadMeter:
    """Accumulator that compares the spreads of N chains with those of the guide.

    Args:
        names: The names of S groups of latents.
        reference: The mean square of each group at many draws of the guide, ``(M, S)``.
        start: The same at the starts of the chains, ``(N, S)``.
    """

    def __init__(self, names: list[str], reference: Tensor, start: Tensor) -> None:
        self._names, self._reference, self._start = names, reference.double(), start.double()
        self._powers, self._of_twins = Mean(), Mean()

    def record(self, squares: Tensor, of_twins: Tensor | None = None) -> None:
        """Add the current mean squares of the chains, ``(N, S)``, and always or never those of their twins."""
        self._powers.add(torch.stack((squares.double(), squares.double().square())))
        if of_twins is not None:
            self._of_twins.add(of_twins.double())

    def spreads(self) -> Spreads:
        """Return the errors that the chains show so far, after two sweeps at least."""
        if not self._names:
            return Spreads([], *self._start[:1].expand(3, 0))
        (first, second), number = self._powers(), self._powers.count
        twin = self._of_twins() if self._of_twins.count else None
        mean, noise = arrival(self._reference, self._start, first, second, twin)
        centre = self._reference.mean(0)
        within = (second - first.square()).mean(0) * number / (number - 1)
        slowness = number * first.var(0) / within.clamp_min(1e-30)
        return Spreads(self._names, (mean / centre - 1) / 2, noise / centre / 2, slowness)
