"""Errors of a guide's moments, of its distribution functions, and of the scales that many latents share.

Short Markov chains start from the guide's draws.  They leave the posterior invariant, so they drift if and only if the
guide is not the posterior.  They need not converge: if a function f decays as E[f_t | f_0] = μ + β (f_0 - μ), with β
the slope of f_t in f_0, its limit is μ = (E[f_t] - β E[f_0]) / (1 - β).  The mean along the chains is extrapolated to
this limit, with a standard error that grows if the chains are slow.

A model that takes long to run has few chains.  Each then has a *twin*, a chain of the guide's density with the same
start and random numbers, and a known mean.  It is a control variate: if the guide is nearly right, both have nearly the
same noise.

Weights of the guide's draws estimate the same errors.

Coupling Control Variates for Markov Chain Monte Carlo (Goodman, Lin 2009, Journal of Computational Physics 228).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SLOW, SLOWEST = 0.8, 0.95  # slopes beyond which a twin does not help, and beyond which a chain's limit is unknown
LEVELS = 0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975  # the quantiles at which distribution functions are compared
DRAWS = 2000  # of the guide, that estimate the noise of its distribution functions


@dataclass(frozen=True)
class Tolerance:
    """Sizes of errors, in standard deviations, and of their noise, in standard errors.

    Attributes:
        right: The largest error of trusted draws.
        bent: The same along whitened directions, which show correlations and far tails.
        flag: An error that is certain exceeds this.
        sure: It also exceeds this, which is sure to be right, by some standard errors.
        certain: These standard errors.
        contrary: Additional ones that chains must show if reliable weights show no error.
        shape: An error of a distribution function that is certain exceeds this.
        sure_shape: It also exceeds this by some standard errors.
        certain_shape: These standard errors.
        slow: The variance of means of chains, in units of independent sweeps, beyond which a spread is unknown.
    """

    right: float = 0.1
    bent: float = 0.3
    flag: float = 0.08
    sure: float = 0.05
    certain: float = 3.0
    contrary: float = 2.0
    shape: float = 0.06
    sure_shape: float = 0.03
    certain_shape: float = 4.0
    slow: float = 10.0


TOLERANCE = Tolerance()


class Meter:
    """Accumulator that compares the means of a function along N chains with those at draws of the guide.

    Args:
        function: The function of quantities, ``(N, K) -> (N, L)``, in double precision.
        reference: The quantities at many draws of the guide, ``(M, K)``.
        start: The quantities at the starts of the chains, ``(N, K)``.
        powers: The number of powers of the function whose means are recorded.

    Attributes:
        reference: The function at the draws of the guide.
        start: The function at the starts of the chains.
        count: The number of sweeps so far.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], reference: Tensor, start: Tensor, powers: int) -> None:
        self.reference, self.start, self.count = function(reference), function(start), 0
        self._function, self._exponents = function, range(1, powers + 1)
        self._totals: list[Tensor] = []  # of chains, and of twins

    def record(self, *quantities: Tensor) -> None:
        """Add the current quantities of the chains, ``(N, K)``, and always or never those of their twins."""
        self.count += 1
        values = [torch.stack([self._function(part) ** power for power in self._exponents]) for part in quantities]
        self._totals = [new + old for new, old in zip(values, self._totals, strict=True)] if self._totals else values

    @property
    def powers(self) -> Tensor:
        """The means of the function's powers along each chain, ``(powers, N, L)``."""
        return self._totals[0] / self.count

    @property
    def twins(self) -> list[Tensor | None]:
        """The same along each twin; None for each power without twins."""
        return [*self._totals[1] / self.count] if len(self._totals) > 1 else [None for _ in self._exponents]


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
    mean_of_start, scale = start.mean(0), start.var(0, correction=0).clamp_min(1e-12)
    off = start - mean_of_start

    def fitted(now: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the slope, what is left of each chain's deviation, ``(N, K)``, and the limit of the mean."""
        moved = now - now.mean(0)
        slope = ((off * moved).mean(0) / scale).clamp(0, SLOWEST)
        return slope, moved - slope * off, (now.mean(0) - slope * mean_of_start) / (1 - slope)

    slope, left, mean = fitted(now)
    centre, share, scatter, of_slope = mean_of_start, torch.zeros_like(slope), left.var(0), left.var(0)
    if twin is not None:
        (slope_of_twin, left_of_twin, mean_of_twin), known = fitted(twin), reference.mean(0)
        by = (left * left_of_twin).sum(0) / left_of_twin.square().sum(0).clamp_min(1e-12)
        by = by.where(slope < SLOW, 0.0)
        share = by * (1 - slope_of_twin) / (1 - slope)
        mean = mean - share * (mean_of_twin - known)
        scatter, centre = (left - by * left_of_twin).var(0), torch.lerp(mean_of_start, known, by)
    # Twins have the same error of the slope, which matters as far as the mean is off.
    scatter = scatter + (mean - centre).square() * of_slope / scale
    # Few chains may miss the rare large values that make the variance of a heavy tail; the many draws contain them.
    seen = (square.mean(0) - now.mean(0).square()).clamp_min(1e-12)
    scatter = scatter * (reference.var(0) / seen).clamp_min(1) / (1 - slope) ** 2 / len(start)
    return mean, (scatter + (1 - share).square() * reference.var(0) / len(reference)).sqrt()


class Drift(NamedTuple):
    """A guide's errors for each of K quantities, as estimated by chains or by weights.

    Attributes:
        error: The error of the guide's mean, in standard deviations of the posterior, ``(K,)``.
        error_se: The standard error of ``error``.
        variance: The posterior's variance over the guide's, ``(K,)``.
        variance_se: The standard error of ``variance``.
    """

    error: Tensor
    error_se: Tensor
    variance: Tensor
    variance_se: Tensor

    @classmethod
    def of(cls, mean: Tensor, mean_se: Tensor, variance: Tensor, variance_se: Tensor) -> Drift:
        """Return the errors, given the posterior's moments in units of the guide's."""
        return cls(-mean / variance.sqrt(), mean_se / variance.sqrt(), variance, variance_se)

    @property
    def ratio(self) -> Tensor:
        """The guide's standard deviation over the posterior's, ``(K,)``."""
        return self.variance.rsqrt()

    @property
    def ratio_se(self) -> Tensor:
        """The standard error of ``ratio``."""
        return self.variance_se * self.ratio**3 / 2

    @property
    def signed(self) -> Tensor:
        """The errors, ``(2, K)``: of means, and of standard deviations (half the variance's error)."""
        return torch.stack((self.error, (self.variance - 1) / 2))

    @property
    def errors(self) -> Tensor:
        """The sizes of the errors, ``(2, K)``."""
        return self.signed.abs()

    @property
    def noise(self) -> Tensor:
        """The standard errors of ``errors``, ``(2, K)``."""
        return torch.stack((self.error_se, self.variance_se / 2))

    def flagged(self, times: float) -> Tensor:
        """Return True for each error that is certain by some standard errors, ``(2, K)``."""
        return (self.errors > TOLERANCE.flag) & (self.errors - times * self.noise > TOLERANCE.sure)

    def beyond(self, limit: float) -> Tensor:
        """Return True for each error that certainly exceeds a limit, ``(2, K)``."""
        return self.errors - TOLERANCE.certain * self.noise > limit

    def unless_beyond(self, limit: float, other: Drift) -> Drift:
        """Return these errors, but another's where those are certain to exceed a limit."""
        beyond = other.beyond(limit).repeat_interleave(2, 0)  # of the errors and their noise, then of variances
        return Drift(*(new.where(of, old) for new, of, old in zip(other, beyond, self, strict=True)))

    def pooled_with(self, other: Drift) -> Drift:
        """Return the precision-weighted mean of two independent estimates."""
        share = self.noise.square() / (self.noise.square() + other.noise.square()).clamp_min(1e-30)  # of other
        values = torch.stack(self[::2]).lerp(torch.stack(other[::2]), share)
        noise = ((1 - share) * self.noise).hypot(share * other.noise)
        return Drift(values[0], noise[0], values[1], 2 * noise[1])


class DriftMeter(Meter):
    """Accumulator of the moments of N chains, standardised by the guide's draws."""

    def __init__(self, reference: Tensor, start: Tensor) -> None:
        loc = reference.double().mean(0)
        scale = reference.double().std(0) if len(loc) else loc  # because torch warns of the variance of no columns
        scale = scale.where(scale > 0, 1.0)
        super().__init__(lambda quantities: (quantities.double() - loc) / scale, reference, start, powers=4)

    def drift(self) -> Drift:
        """Return the errors that the chains show so far."""
        if not self.start.shape[1]:
            return Drift(*self.start[:1].expand(4, 0))
        first, second, third, fourth = self.powers  # (N, K) each
        twin, square, *_ = self.twins
        m, mean_se = arrival(self.reference, self.start, first, second, twin)
        variance, variance_se = arrival(  # of squares about the mean, whose decay does not depend on the mean
            (self.reference - m).square(),
            (self.start - m).square(),
            second - 2 * m * first + m**2,
            fourth - 4 * m * third + 6 * m**2 * second - 4 * m**3 * first + m**4,
            None if twin is None or square is None else square - 2 * m * twin + m**2,
        )
        variance_se = variance_se.hypot(3 * mean_se.square())  # an error of m of k standard errors adds k² mean_se²
        here = second.mean(0) - first.mean(0).square()  # for chains too slow to show the limit
        variance = variance.where(variance > 2 * variance_se, torch.maximum(variance, here)).clamp_min(1e-12)
        return Drift.of(m, mean_se, variance, variance_se)

    def so_far(self) -> Drift:
        """Return the errors without extrapolation, which are smaller if the chains have not arrived."""
        if not self.start.shape[1]:
            return self.drift()
        first, second, *_ = self.powers
        m = first.mean(0)
        squares, of_guide = second - 2 * m * first + m**2, (self.reference - m).square()
        mean_se, variance_se = (
            (here.var(0) / len(here) + there.var(0) / len(there)).sqrt()
            for here, there in ((first, self.reference), (squares, of_guide))
        )
        return Drift.of(m, mean_se, squares.mean(0).clamp_min(1e-12), variance_se)


def weighted_drift(quantities: Tensor, log_weights: Tensor) -> Drift:
    """Return a guide's errors as estimated by the weights of its draws.

    Args:
        quantities: The quantities at M draws of the guide, ``(M, K)``.
        log_weights: The normalised log-weights of the draws, ``(M,)``.
    """
    quantities, share = quantities.double(), log_weights.double().exp().unsqueeze(-1)  # (M, K), (M, 1)
    scale = quantities.std(0)
    standard = (quantities - quantities.mean(0)) / scale.where(scale > 0, 1.0)
    mean = (share * standard).sum(0)
    squares = (standard - mean).square()
    variance = (share * squares).sum(0).clamp_min(1e-12)
    excess = share - 1 / len(share)  # the difference that the weights make, which has all of the noise
    mean_se, variance_se = ((excess * part).norm(dim=0) for part in (standard - mean, squares - variance))
    return Drift.of(mean, mean_se, variance, variance_se)


class Shape(NamedTuple):
    """The errors of a guide's distribution functions, for each of K quantities at its most significant quantile.

    Attributes:
        error: The posterior's distribution function minus the guide's, ``(K,)``.
        error_se: The standard error, ``(K,)``.
    """

    error: Tensor
    error_se: Tensor

    @property
    def significance(self) -> Tensor:
        """The sizes of the errors, some standard errors subtracted from each, of the shape of ``error``."""
        return self.error.abs() - TOLERANCE.certain_shape * self.error_se

    @property
    def flagged(self) -> Tensor:
        """True for each error that is certain, ``(K,)``."""
        return (self.error.abs() > TOLERANCE.shape) & (self.significance > TOLERANCE.sure_shape)

    @property
    def clearest(self) -> Shape:
        """The most significant error of each quantity, from the errors at all levels ``(L, K)``."""
        level = self.significance.argmax(0, keepdim=True)
        return Shape(self.error.gather(0, level)[0], self.error_se.gather(0, level)[0])


class ShapeMeter(Meter):
    """Accumulator of the shares of N chains below quantiles of the guide's draws."""

    def __init__(self, reference: Tensor, start: Tensor) -> None:
        levels = _quantiles(reference)
        super().__init__(lambda x: (x.unsqueeze(1) <= levels).flatten(1).double(), reference[:DRAWS], start, powers=1)

    def shape(self) -> Shape:
        """Return the errors that the chains show so far."""
        (mean,), (twin,) = self.powers, self.twins
        found, noise = arrival(self.reference, self.start, mean, mean, twin)
        return Shape(*(x.reshape(len(LEVELS), -1) for x in (found - self.reference.mean(0), noise))).clearest


def weighted_shape(quantities: Tensor, log_weights: Tensor) -> Shape:
    """Return a guide's errors as estimated by the weights of its draws.

    Args:
        quantities: The quantities at M draws of the guide, ``(M, K)``.
        log_weights: The normalised log-weights of the draws, ``(M,)``.
    """
    excess = (log_weights.double().exp() - 1 / len(quantities)).unsqueeze(-1)
    errors, noise = [], []
    for level in _quantiles(quantities):
        below = (quantities <= level).double()
        errors.append((excess * below).sum(0))
        noise.append((excess * (below - below.mean(0))).norm(dim=0))
    return Shape(torch.stack(errors), torch.stack(noise)).clearest


def _quantiles(quantities: Tensor) -> Tensor:
    """Return the quantiles of each quantity, ``(L, K)``, as values of draws, which is right for repeated values too."""
    return quantities.sort(0).values[[min(int(level * len(quantities)), len(quantities) - 1) for level in LEVELS]]


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
    def are_clear(self) -> Tensor:
        """True for each spread that is right, and not too slow to tell, ``(S,)``."""
        return (self.error.abs() + self.noise < TOLERANCE.right) & (self.slowness < TOLERANCE.slow)


class SpreadMeter(Meter):
    """Accumulator of the spreads of N chains.

    Args:
        names: The names of S groups of latents.
        reference: The mean square of each group at many draws of the guide, ``(M, S)``.
        start: The same at the starts of the chains, ``(N, S)``.
    """

    def __init__(self, names: list[str], reference: Tensor, start: Tensor) -> None:
        self._names = names
        super().__init__(torch.Tensor.double, reference, start, powers=2)

    def spreads(self) -> Spreads:
        """Return the errors that the chains show so far, after two sweeps at least."""
        if not self._names:
            return Spreads([], *self.start[:1].expand(3, 0))
        (first, second), (twin, _) = self.powers, self.twins
        mean, noise = arrival(self.reference, self.start, first, second, twin)
        centre = self.reference.mean(0)
        within = (second - first.square()).mean(0) * self.count / (self.count - 1)
        slowness = self.count * first.var(0) / within.clamp_min(1e-30)
        return Spreads(self._names, (mean / centre - 1) / 2, noise / centre / 2, slowness)
