"""Errors of a guide's moments, of its distribution functions, and of the scales that many latents share.

Short chains start from the guide's draws (:mod:`.short_chains`).  They drift away if the guide is wrong.  Weights of
the draws estimate the same errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .short_chains import Meter, arrival


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
    """

    right: float = 0.1
    bent: float = 0.3
    flag: float = 0.08
    sure: float = 0.05
    certain: float = 3.0
    contrary: float = 2.0


TOLERANCE = Tolerance()


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
        return (self.errors > TOLERANCE.flag) & (self.errors - times * self.noise > TOLERANCE.sure)

    def unless_beyond(self, limit: float, other: Drift) -> Drift:
        """Return these errors, but another's where those are certain to exceed a limit."""
        beyond = other.beyond(limit).repeat_interleave(2, 0)  # of the errors and their noise, then of variances
        return Drift(*(new.where(of, old) for new, of, old in zip(other, beyond, self, strict=True)))

    def is_right(self, times: float) -> bool:
        """Return True if all errors are small, with some standard errors added to each."""
        return bool((self.errors + times * self.noise < TOLERANCE.right).all())

    def beyond(self, limit: float) -> Tensor:
        """Return True for each error that certainly exceeds a limit, ``(2, K)``."""
        return self.errors - TOLERANCE.certain * self.noise > limit

    def pooled_with(self, other: Drift) -> Drift:
        """Return the precision-weighted mean of two independent estimates."""
        share = self.noise.square() / (self.noise.square() + other.noise.square()).clamp_min(1e-30)  # of other
        values = torch.stack(self[::2]).lerp(torch.stack(other[::2]), share)
        noise = ((1 - share) * self.noise).hypot(share * other.noise)
        return Drift(values[0], noise[0], values[1], 2 * noise[1])


class DriftMeter(Meter):
    """Accumulator of the moments of N chains, standardised by the guide's draws."""

    def __init__(self, reference: Tensor, start: Tensor) -> None:
        self._loc, scale = reference.double().mean(0), reference.double().std(0)
        self._scale = scale.where(scale > 0, 1.0)
        super().__init__(reference, start, powers=4)

    def function(self, quantities: Tensor) -> Tensor:
        """Return standardised quantities."""
        return (quantities.double() - self._loc) / self._scale

    def drift(self) -> Drift:
        """Return the errors that the chains show so far."""
        if not self.start.shape[1]:
            return Drift(*self.start[:1].expand(4, 0))
        first, second, third, fourth = self.powers  # (N, K) each
        twin, square = (None, None) if self.twins is None else self.twins[:2]
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
        return Drift(-m / variance.sqrt(), mean_se / variance.sqrt(), variance, variance_se)

    def so_far(self) -> Drift:
        """Return the errors without extrapolation, which are smaller if the chains have not arrived."""
        if not self.start.shape[1]:
            return self.drift()
        first, second, *_ = self.powers
        m = first.mean(0)
        squares, of_guide = second - 2 * m * first + m**2, (self.reference - m).square()
        number, drawn = len(first), len(of_guide)
        variance = squares.mean(0).clamp_min(1e-12)
        mean_se = (first.var(0) / number + self.reference.var(0) / drawn).sqrt()
        variance_se = (squares.var(0) / number + of_guide.var(0) / drawn).sqrt()
        return Drift(-m / variance.sqrt(), mean_se / variance.sqrt(), variance, variance_se)


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


@dataclass(frozen=True)
class Quantiles:
    """Constants of a comparison of distribution functions.

    Attributes:
        levels: The quantiles at which they are compared.
        flag: An error that is certain exceeds this.
        sure: It also exceeds this, by some standard errors.
        times: These standard errors.
        draws: The draws of the guide that estimate its noise.
    """

    levels: tuple[float, ...] = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
    flag: float = 0.06
    sure: float = 0.03
    times: float = 4.0
    draws: int = 2000


QUANTILES = Quantiles()


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
        """The sizes of the errors, some standard errors subtracted from each, ``(K,)``."""
        return self.error.abs() - QUANTILES.times * self.error_se

    @property
    def flagged(self) -> Tensor:
        """True for each error that is certain, ``(K,)``."""
        return (self.error.abs() > QUANTILES.flag) & (self.significance > QUANTILES.sure)


class ShapeMeter(Meter):
    """Accumulator of the shares of N chains below quantiles of the guide's draws."""

    def __init__(self, reference: Tensor, start: Tensor) -> None:
        self._levels = _quantiles(reference)
        super().__init__(reference[: QUANTILES.draws], start, powers=1)

    def function(self, quantities: Tensor) -> Tensor:
        """Return the indicators, ``(N, K) -> (N, L K)``."""
        return (quantities.unsqueeze(1) <= self._levels).flatten(1).double()

    def shape(self) -> Shape:
        """Return the errors that the chains show so far."""
        (mean,), twin = self.powers, None if self.twins is None else self.twins[0]
        arrived = arrival(self.reference, self.start, mean, mean, twin)
        found, noise = (part.reshape(len(QUANTILES.levels), -1) for part in arrived)
        return _clearest(found - self.reference.mean(0).reshape(len(QUANTILES.levels), -1), noise)


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
    return _clearest(torch.stack(errors), torch.stack(noise))


def _quantiles(quantities: Tensor) -> Tensor:
    """Return the quantiles of each quantity, ``(L, K)``, as values of draws, which is right for repeated values too."""
    places = [min(int(level * len(quantities)), len(quantities) - 1) for level in QUANTILES.levels]
    return quantities.sort(0).values[places]


def _clearest(errors: Tensor, noise: Tensor) -> Shape:
    """Return the most significant error of each quantity, from the errors at all levels ``(L, K)``."""
    clearest = (errors.abs() - QUANTILES.times * noise).argmax(0, keepdim=True)
    return Shape(errors.gather(0, clearest)[0], noise.gather(0, clearest)[0])


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
