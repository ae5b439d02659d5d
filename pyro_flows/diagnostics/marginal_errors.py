"""Errors of a guide's marginal distribution functions, as estimated by chains and by weights.

At some quantiles of the guide's draws, the posterior's probability below the quantile is the mean of an indicator.
Chains estimate this mean as they do any other (:mod:`.drift`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .short_chains import Meter, arrival


@dataclass(frozen=True)
class Comparison:
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


COMPARISON = Comparison()


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
        return self.error.abs() - COMPARISON.times * self.error_se

    @property
    def flagged(self) -> Tensor:
        """True for each error that is certain, ``(K,)``."""
        return (self.error.abs() > COMPARISON.flag) & (self.significance > COMPARISON.sure)


class ShapeMeter(Meter):
    """Accumulator of the shares of N chains below quantiles of the guide's draws."""

    def __init__(self, reference: Tensor, start: Tensor) -> None:
        self._levels = _quantiles(reference)
        super().__init__(reference[: COMPARISON.draws], start, powers=1)

    def function(self, quantities: Tensor) -> Tensor:
        """Return the indicators, ``(N, K) -> (N, L K)``."""
        return (quantities.unsqueeze(1) <= self._levels).flatten(1).double()

    def shape(self) -> Shape:
        """Return the errors that the chains show so far."""
        (mean,), twin = self.powers, None if self.twins is None else self.twins[0]
        arrived = arrival(self.reference, self.start, mean, mean, twin)
        found, noise = (part.reshape(len(COMPARISON.levels), -1) for part in arrived)
        return _clearest(found - self.reference.mean(0).reshape(len(COMPARISON.levels), -1), noise)


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
    places = [min(int(level * len(quantities)), len(quantities) - 1) for level in COMPARISON.levels]
    return quantities.sort(0).values[places]


def _clearest(errors: Tensor, noise: Tensor) -> Shape:
    """Return the most significant error of each quantity, from the errors at all levels ``(L, K)``."""
    clearest = (errors.abs() - COMPARISON.times * noise).argmax(0, keepdim=True)
    return Shape(errors.gather(0, clearest)[0], noise.gather(0, clearest)[0])
