"""The spread of many latents about the middle, together.

The latents of a multivariate t share a random scale.  Hamiltonian Monte Carlo changes the mean square of D latents by
D^-1/2 of itself or so in a step, and each latent moves fast within it.  So chains that start from a normal guide of D
latents see no heavy tail in any single one.  The mean square itself shows that it is slow: if the means of chains
differ by more than their movements explain, its limit is unknown.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .drift import TOLERANCE
from .short_chains import Meter, arrival

SLOWEST = 10.0  # the variance of means of chains, in units of independent sweeps, beyond which a spread is unknown


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

    @property
    def is_slow(self) -> Tensor:
        """True for each spread that is too slow to tell, ``(S,)``."""
        return self.slowness >= SLOWEST

    @property
    def are_clear(self) -> Tensor:
        """True for each spread that is right, and not too slow to tell, ``(S,)``."""
        return (self.error.abs() + self.noise < TOLERANCE.right) & ~self.is_slow


class SpreadMeter(Meter):
    """Accumulator of the spreads of N chains.

    Args:
        names: The names of S groups of latents.
        reference: The mean square of each group at many draws of the guide, ``(M, S)``.
        start: The same at the starts of the chains, ``(N, S)``.
    """

    def __init__(self, names: list[str], reference: Tensor, start: Tensor) -> None:
        self._names = names
        super().__init__(reference, start, powers=2)

    def function(self, quantities: Tensor) -> Tensor:
        """Return the mean squares themselves."""
        return quantities.double()

    def spreads(self) -> Spreads:
        """Return the errors that the chains show so far, after two sweeps at least."""
        if not self._names:
            return Spreads([], *self.start[:1].expand(3, 0))
        (first, second), twin = self.powers, None if self.twins is None else self.twins[0]
        mean, noise = arrival(self.reference, self.start, first, second, twin)
        centre = self.reference.mean(0)
        within = (second - first.square()).mean(0) * self.count / (self.count - 1)
        slowness = self.count * first.var(0) / within.clamp_min(1e-30)
        return Spreads(self._names, (mean / centre - 1) / 2, noise / centre / 2, slowness)
