"""The drift of Markov chains that start from a guide's draws.

Chains leave the posterior invariant, so they drift if and only if the guide is not the posterior.  They need not
converge: if a function f decays as E[f_t | f_0] = μ + β (f_0 - μ), with β the slope of f_t in f_0, its limit is
μ = (E[f_t] - β E[f_0]) / (1 - β).  The drift is extrapolated to this limit, with a standard error that grows if the
chains are slow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .findings import Finding

FLAG, SURE = 0.08, 0.05  # a certain error exceeds FLAG, and exceeds SURE by some standard errors
SLOWEST = 0.95  # a larger slope tells nothing about the limit of a chain


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
        self._powers, self._count = torch.zeros(5, *start.shape, dtype=torch.float64, device=start.device), 0

    def record(self, quantities: Tensor) -> None:
        """Add the current quantities of the chains, ``(N, K)``."""
        standard = self._standard(quantities)
        for power in range(1, 5):
            self._powers[power] += standard**power
        self._count += 1

    def drift(self) -> Drift:
        """Return the errors that the chains show so far."""
        first, second, third, fourth = self._powers[1:] / self._count  # (N, K) each
        m, mean_se = arrival(self._reference, self._start, first, second)
        variance, variance_se = arrival(  # of squares about the mean, whose decay does not depend on the mean
            (self._reference - m).square(),
            (self._start - m).square(),
            second - 2 * m * first + m**2,
            fourth - 4 * m * third + 6 * m**2 * second - 4 * m**3 * first + m**4,
        )
        variance_se = variance_se.hypot(3 * mean_se.square())  # an error of m of k standard errors adds k² mean_se²
        here = second.mean(0) - first.mean(0).square()  # for chains too slow to show the limit
        variance = variance.where(variance > 2 * variance_se, torch.maximum(variance, here)).clamp_min(1e-12)
        return Drift(-m / variance.sqrt(), mean_se / variance.sqrt(), variance, variance_se)

    def _standard(self, quantities: Tensor) -> Tensor:
        return (quantities.double() - self._loc) / self._scale


def arrival(reference: Tensor, start: Tensor, now: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Return the limit of a function's mean along chains, ``(K,)``, and its standard error.

    Args:
        reference: The function at draws of the guide, ``(M, K)``.
        start: The function at the starts of the chains, ``(N, K)``.
        now: The mean of the function along each chain, ``(N, K)``.
        square: The mean of its square along each chain, ``(N, K)``.
    """
    off, moved = start - start.mean(0), now - now.mean(0)
    scale = off.square().mean(0).clamp_min(1e-12)
    slope = ((off * moved).mean(0) / scale).clamp(0, SLOWEST)
    rest = 1 - slope
    mean = (now.mean(0) - slope * start.mean(0)) / rest
    scatter = (moved - slope * off).var(0) / len(start)
    # Few chains may miss the rare large values that make the variance of a heavy tail; the many draws contain them.
    seen = (square.mean(0) - now.mean(0).square()).clamp_min(1e-12)
    scatter = scatter * (reference.var(0) / seen).clamp_min(1)
    of_slope = (now.mean(0) - start.mean(0)).square() * scatter / scale / rest**4
    return mean, (scatter / rest**2 + of_slope + reference.var(0) / len(reference)).sqrt()


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
