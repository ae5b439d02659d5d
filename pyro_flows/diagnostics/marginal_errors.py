"""Errors of a guide's marginal distribution functions, as estimated by chains and by weights.

At some quantiles of the guide's draws, the posterior's probability below the quantile is the mean of an indicator.
Chains estimate this mean as they do any other (:mod:`.drift`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .drift import Mean, arrival
from .findings import Finding

LEVELS = 0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975
SHAPE, SURE, TIMES = 0.06, 0.03, 4.0  # a certain error exceeds SHAPE, and exceeds SURE by TIMES standard errors
FEW = 2000  # draws of the guide, to estimate its noise


class Shape(NamedTuple):
    """The errors of a guide's distribution functions, for each of K quantities at its most significant quantile.

    Attributes:
        error: The posterior's distribution function minus the guide's, ``(K,)``.
        error_se: The standard error, ``(K,)``.
    """

    error: Tensor
    error_se: Tensor

    @property
    def flagged(self) -> Tensor:
        """True for each error that is certain, ``(K,)``."""
        return (self.error.abs() > SHAPE) & (self.error.abs() - TIMES * self.error_se > SURE)

    def worst(self, names: list[str], verdict: str) -> Finding:
        """Return a finding of the most significant error."""
        i = int((self.error.abs() - TIMES * self.error_se).argmax())
        return Finding("shape", names[i], float(self.error[i]), float(self.error_se[i]), verdict)


class ShapeMeter:
    """Accumulator that compares N chains with the guide.

    Args:
        reference: The quantities at many draws of the guide, ``(M, K)``.
        start: The quantities at the starts of the chains, ``(N, K)``.
    """

    def __init__(self, reference: Tensor, start: Tensor) -> None:
        self._levels = _quantiles(reference)
        self._reference, self._start = self._below(reference[:FEW]), self._below(start)
        self._shares, self._of_twins = Mean(), Mean()

    def record(self, quantities: Tensor, of_twins: Tensor | None = None) -> None:
        """Add the current quantities of the chains, ``(N, K)``, and always or never those of their twins."""
        self._shares.add(self._below(quantities))
        if of_twins is not None:
            self._of_twins.add(self._below(of_twins))

    def shape(self) -> Shape:
        """Return the errors that the chains show so far."""
        mean, twin = self._shares(), self._of_twins() if self._of_twins.count else None
        arrived = arrival(self._reference, self._start, mean, mean, twin)
        found, noise = (part.reshape(len(LEVELS), -1) for part in arrived)
        return _clearest(found - self._reference.mean(0).reshape(len(LEVELS), -1), noise)

    def _below(self, quantities: Tensor) -> Tensor:
        """Return the indicators, ``(N, L K)``."""
        return (quantities.unsqueeze(1) <= self._levels).flatten(1).double()


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
    places = [min(int(level * len(quantities)), len(quantities) - 1) for level in LEVELS]
    return quantities.sort(0).values[places]


def _clearest(errors: Tensor, noise: Tensor) -> Shape:
    """Return the most significant error of each quantity, from the errors at all levels ``(L, K)``."""
    clearest = (errors.abs() - TIMES * noise).argmax(0, keepdim=True)
    return Shape(errors.gather(0, clearest)[0], noise.gather(0, clearest)[0])
