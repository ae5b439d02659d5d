"""How far chains that start from a guide's draws move away from the guide.

Chains that leave the posterior invariant stay where they are if the guide is the posterior; if not, they drift towards
it.  They need not arrive: where a function f decays as E[f_t | f_0] = μ + β (f_0 - μ), with β the slope of f_t in f_0,
it ends at μ = (E[f_t] - β E[f_0]) / (1 - β).  So a drift counts as what it would become, and its standard error grows
where the chains are slow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .findings import Finding

SLOWEST = 0.95  # beyond this slope nothing can be said of where a chain would go


class Drift(NamedTuple):
    """A guide's errors, for each of K quantities, as chains or weights see them.

    Attributes:
        error: The error of the guide's mean, in standard deviations of the posterior, ``(K,)``.
        error_se: Its standard error.
        variance: The posterior's variance over the guide's, ``(K,)``.
        variance_se: Its standard error.
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
        """Its standard error."""
        return self.variance_se * self.ratio**3 / 2

    @property
    def errors(self) -> Tensor:
        """The sizes of the errors, ``(2, K)``: of means, and half of those of variances, which for small ones are those
        of standard deviations, and whose noise is known."""
        return torch.stack((self.error.abs(), (self.variance - 1).abs() / 2))

    @property
    def noise(self) -> Tensor:
        """The standard errors of these, ``(2, K)``."""
        return torch.stack((self.error_se, self.variance_se / 2))

    def pooled_with(self, other: Drift) -> Drift:
        """The mean of two independent views, each weighed by its precision."""
        share = self.noise.square() / (self.noise.square() + other.noise.square()).clamp_min(1e-30)  # of the other
        values = torch.stack(self[::2]).lerp(torch.stack(other[::2]), share)
        noise = ((1 - share) * self.noise).hypot(share * other.noise)
        return Drift(values[0], noise[0], values[1], 2 * noise[1])

    def worst(self, names: list[str], among: Tensor | None = None, kind: str = "") -> Finding:
        """The largest error, or the clearest of some errors, ``(2, K)``, as a finding of its own kind or of another."""
        clear = self.errors if among is None else (self.errors / self.noise.clamp_min(1e-12)).where(among, -1)
        is_sd, i = divmod(int(clear.argmax()), len(names))
        size, noise = (self.ratio, self.ratio_se) if is_sd else (self.error, self.error_se)
        of = "sd" if is_sd else "mean"
        return Finding(kind or of, names[i], float(size[i]), float(noise[i]), of=of)


class DriftMeter:
    """Compares N chains with the guide.

    Args:
        reference: The quantities at many draws of the guide, ``(M, K)``.
        start: The quantities where the chains start, ``(N, K)``.
    """

    def __init__(self, reference: Tensor, start: Tensor) -> None:
        reference = reference.double()
        self._loc, scale = reference.mean(0), reference.std(0)
        self._scale = scale.where(scale > 0, 1.0)
        self._reference, self._start = self._standard(reference), self._standard(start)
        self._powers, self._count = torch.zeros(5, *start.shape, dtype=torch.float64, device=start.device), 0

    def record(self, quantities: Tensor) -> None:
        """Take note of where the chains are, ``(N, K)``."""
        standard = self._standard(quantities)
        for power in range(1, 5):
            self._powers[power] += standard**power
        self._count += 1

    def drift(self) -> Drift:
        """Return the errors that the chains see by now."""
        first, second, third, fourth = self._powers[1:] / self._count  # (N, K) each
        m, mean_se = arrival(self._reference, self._start, first, second)
        variance, variance_se = arrival(  # of squares about the mean, whose decay does not depend on it
            (self._reference - m).square(),
            (self._start - m).square(),
            second - 2 * m * first + m**2,
            fourth - 4 * m * third + 6 * m**2 * second - 4 * m**3 * first + m**4,
        )
        here = second.mean(0) - first.mean(0).square()  # where chains are slow, that of the posterior may be lost
        variance = variance.where(variance > 2 * variance_se, torch.maximum(variance, here)).clamp_min(1e-12)
        return Drift(-m / variance.sqrt(), mean_se / variance.sqrt(), variance, variance_se)

    def _standard(self, quantities: Tensor) -> Tensor:
        return (quantities.double() - self._loc) / self._scale


def arrival(reference: Tensor, start: Tensor, now: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of a function at which chains would arrive, ``(K,)``, and its standard error.

    Args:
        reference: The function at draws of the guide, ``(M, K)``.
        start: The function where the chains start, ``(N, K)``.
        now: The means of its values along each chain, ``(N, K)``.
        square: Those of its squares.
    """
    off, moved = start - start.mean(0), now - now.mean(0)
    spread = off.square().mean(0).clamp_min(1e-12)
    slope = ((off * moved).mean(0) / spread).clamp(0, SLOWEST)
    rest = 1 - slope
    mean = (now.mean(0) - slope * start.mean(0)) / rest
    scatter = (moved - slope * off).var(0) / len(start)
    # Few chains may not have met the rare large values that a heavy tail's variance comes from; many draws have.
    seen = (square.mean(0) - now.mean(0).square()).clamp_min(1e-12)
    scatter = scatter * (reference.var(0) / seen).clamp_min(1)
    of_slope = (now.mean(0) - start.mean(0)).square() * scatter / spread / rest**4
    return mean, (scatter / rest**2 + of_slope + reference.var(0) / len(reference)).sqrt()


def weighted_drift(quantities: Tensor, log_weights: Tensor) -> Drift:
    """A guide's errors as seen by the weights of its draws.

    Args:
        quantities: The quantities at M draws of the guide, ``(M, K)``.
        log_weights: The draws' log-weights, normalised, ``(M,)``.
    """
    quantities, share = quantities.double(), log_weights.double().exp().unsqueeze(-1)  # (M, K), (M, 1)
    scale = quantities.std(0)
    standard = (quantities - quantities.mean(0)) / scale.where(scale > 0, 1.0)
    mean = (share * standard).sum(0)
    squares = (standard - mean).square()
    variance = (share * squares).sum(0).clamp_min(1e-12)
    excess = share - 1 / len(share)  # what the weights change, and so all of the noise in the difference
    mean_se = (excess * (standard - mean)).norm(dim=0)
    variance_se = (excess * (squares - variance)).norm(dim=0)
    return Drift(-mean / variance.sqrt(), mean_se / variance.sqrt(), variance, variance_se)
