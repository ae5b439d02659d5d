"""The drift of Markov chains that start from a guide's draws.

Chains leave the posterior invariant, so they drift if and only if the guide is not the posterior.  They need not
converge: if a function f decays as E[f_t | f_0] = μ + β (f_0 - μ), with β the slope of f_t in f_0, its limit is
μ = (E[f_t] - β E[f_0]) / (1 - β).  The drift is extrapolated to this limit, with a standard error that grows if the
chains are slow.

A model that takes long to run has few chains.  Each then has a *twin*, a chain of the guide's density with the same
start and random numbers, and a known mean.  It is a control variate: if the guide is nearly right, both have nearly the
same noise.

Coupling Control Variates for Markov Chain Monte Carlo (Goodman, Lin 2009, Journal of Computational Physics 228).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .findings import Finding

FLAG, SURE = 0.08, 0.05  # a certain error exceeds FLAG, and exceeds SURE by some standard errors
CERTAIN = 3.0  # standard errors by which a certain error exceeds what is sure to be right
SLOWEST = 0.95  # a larger slope tells nothing about the limit of a chain
SLOW = 0.8  # a larger slope is not known well enough to compare a chain with its twin


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
        return (self.errors > FLAG) & (self.errors - times * self.noise > SURE)

    def unless_beyond(self, limit: float, other: Drift) -> Drift:
        """Return these errors, but another's where those are certain to exceed a limit."""
        beyond = other.beyond(limit).repeat_interleave(2, 0)  # of the errors and their noise, then of variances
        return Drift(*(new.where(of, old) for new, of, old in zip(other, beyond, self, strict=True)))

    def beyond(self, limit: float) -> Tensor:
        """Return True for each error that certainly exceeds a limit, ``(2, K)``."""
        return self.errors - CERTAIN * self.noise > limit

    def pooled_with(self, other: Drift) -> Drift:
        """Return the precision-weighted mean of two independent estimates."""
        share = self.noise.square() / (self.noise.square() + other.noise.square()).clamp_min(1e-30)  # of other
        values = torch.stack(self[::2]).lerp(torch.stack(other[::2]), share)
        noise = ((1 - share) * self.noise).hypot(share * other.noise)
        return Drift(values[0], noise[0], values[1], 2 * noise[1])

    def worst(self, names: list[str], among: Tensor | None = None, kind: str = "") -> Finding:
        """Return a finding of the largest error, or of the most significant one among some errors, ``(2, K)``."""
        clear = self.errors if among is None else (self.errors / self.noise.clamp_min(1e-12)).where(among, -1)
        is_sd, i = divmod(int(clear.argmax()), len(names))
        size, noise = (self.ratio, self.ratio_se) if is_sd else (self.error, self.error_se)
        of = "sd" if is_sd else "mean"
        return Finding(kind or of, names[i], float(size[i]), float(noise[i]), of=of)


class Mean:
    """Running mean of tensors of one shape.

    Attributes:
        count: The number of tensors so far.
    """

    def __init__(self) -> None:
        self._total, self.count = torch.zeros(()), 0

    def add(self, value: Tensor) -> None:
        """Add a tensor."""
        self._total, self.count = value + self._total.to(value.device), self.count + 1

    def __call__(self) -> Tensor:
        """Return the mean."""
        return self._total / self.count


class DriftMeter:
    """Accumulator that compares N chains with the guide.

    Args:
        reference: The quantities at many draws of the guide, ``(M, K)``.
        start: The quantities at the starts of the chains, ``(N, K)``.
    """

    def __init__(self, reference: Tensor, start: Tensor) -> None:
        reference = reference.double()
        self._loc, scale = reference.mean(0), reference.std(0)
        self._scale = scale.where(scale > 0, 1.0)
        self._reference, self._start = self._standard(reference), self._standard(start)
        self._exponents = torch.arange(1, 5).to(start.device)[:, None, None]
        self._powers, self._of_twins = Mean(), Mean()  # the latter up to the second power

    def record(self, quantities: Tensor, of_twins: Tensor | None = None) -> None:
        """Add the current quantities of the chains, ``(N, K)``, and always or never those of their twins."""
        self._powers.add(self._standard(quantities) ** self._exponents)
        if of_twins is not None:
            self._of_twins.add(self._standard(of_twins) ** self._exponents[:2])

    def drift(self) -> Drift:
        """Return the errors that the chains show so far."""
        if not self._start.shape[1]:
            return Drift(*self._start[:1].expand(4, 0))
        first, second, third, fourth = self._powers()  # (N, K) each
        twin, square = self._of_twins() if self._of_twins.count else (None, None)
        m, mean_se = arrival(self._reference, self._start, first, second, twin)
        variance, variance_se = arrival(  # of squares about the mean, whose decay does not depend on the mean
            (self._reference - m).square(),
            (self._start - m).square(),
            second - 2 * m * first + m**2,
            fourth - 4 * m * third + 6 * m**2 * second - 4 * m**3 * first + m**4,
            None if twin is None or square is None else square - 2 * m * twin + m**2,
        )
        variance_se = variance_se.hypot(3 * mean_se.square())  # an error of m of k standard errors adds k² mean_se²
        here = second.mean(0) - first.mean(0).square()  # for chains too slow to show the limit
        variance = variance.where(variance > 2 * variance_se, torch.maximum(variance, here)).clamp_min(1e-12)
        return Drift(-m / variance.sqrt(), mean_se / variance.sqrt(), variance, variance_se)

    def so_far(self) -> Drift:
        """Return the errors without extrapolation, which are smaller if the chains have not arrived."""
        if not self._start.shape[1]:
            return self.drift()
        first, second, *_ = self._powers()
        m = first.mean(0)
        squares, of_guide = second - 2 * m * first + m**2, (self._reference - m).square()
        number, drawn = len(first), len(of_guide)
        variance = squares.mean(0).clamp_min(1e-12)
        mean_se = (first.var(0) / number + self._reference.var(0) / drawn).sqrt()
        variance_se = (squares.var(0) / number + of_guide.var(0) / drawn).sqrt()
        return Drift(-m / variance.sqrt(), mean_se / variance.sqrt(), variance, variance_se)

    def _standard(self, quantities: Tensor) -> Tensor:
        return (quantities.double() - self._loc) / self._scale


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
        by = by.where(slope < SLOW, 0.0)
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
    slope = ((off * moved).mean(0) / scale).clamp(0, SLOWEST)
    return slope, moved - slope * off


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
    mean_se = (excess * (standard - mean)).norm(dim=0)
    variance_se = (excess * (squares - variance)).norm(dim=0)
    return Drift(-mean / variance.sqrt(), mean_se / variance.sqrt(), variance, variance_se)
