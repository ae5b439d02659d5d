"""Score tests that separate the true latents of rows from a guide's draws, and their exact null distribution.

A logistic regression on features φ separates the true latents of the rows from draws of the guide, with the rows
weighted by their nearness w to an observation.  At coefficients zero its gradient is G = Σ_i w_i (φ(true_i) - E φ_i),
where E φ_i is the mean over the row's candidates.  After one Newton step, the mean squared deviation of its
probabilities from 1/2 is proportional to Gᵀ V⁻¹ G.  L-C2ST uses this deviation as its statistic.

If the guide is right, any candidate of a row may be the true one, with known probabilities.  So statistics of true
latents and of candidates picked at random are exchangeable.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .largest_statistic import scaled
from .neighbours import Neighbours

CUT = 5.0  # standard deviations at which coordinates are cut off: one draw in a heavy tail must not decide
FREQUENCIES = 1.5, 2.5  # of the features of a latent's shape
WAVES = 48  # random features of the joint shape
MOST = 40  # latents beyond which pairs are left out
LEAST = 0.01  # the ridge of V, relative to its mean eigenvalue
JOINT = "the joint distribution of the draws is wrong"
DOUBT = 0.5  # the weight of this fault, since one that names a latent tells more


class Features(NamedTuple):
    """Features of candidates.

    Attributes:
        values: ``(n, M + 1, P)``.
        faults: The fault that each feature shows if true latents have more of it than draws, and if they have less: P
            pairs, or none if only all features together show one.
    """

    values: Tensor
    faults: list[tuple[str, str]]


class Evidence(NamedTuple):
    """Statistics of true latents, and of R sets of candidates picked at random.

    Attributes:
        statistic: The largest of all statistics, of the true latents and then of R picks, ``(R + 1,)``.  Each is scaled
            such that picks have the median 0 and the 98 % quantile 1.
        fault: The fault that the largest statistic of the true latents shows, in words.
        moments: The differences of means and of mean squares of each latent, true ones minus candidates, over their
            standard errors, ``(2, K)``.
        sizes: The difference of means, and the ratio of standard deviations, in units of candidates, ``(2, K)``.
        standard: The latents of true ones and of the first pick, standardised within rows, each ``(n, K)``.
    """

    statistic: Tensor
    fault: str
    moments: Tensor
    sizes: Tensor
    standard: tuple[Tensor, Tensor]


def evidence(found: Neighbours, rows: list[int], repeats: int) -> Evidence:
    """Compute all statistics.

    Args:
        found: The rows.
        rows: The numbers of nearest rows to look at.
        repeats: The number R of picks.
    """
    names, shares = found.names, found.log_weights.softmax(1)
    picks = torch.cat((torch.zeros_like(shares[:, :1], dtype=torch.long), shares.multinomial(repeats, True)), 1).T
    standard = _standardised(found.numbers, shares)
    base = found.base.nan_to_num(CUT, CUT, -CUT).clamp(-CUT, CUT)
    moments = _moments(standard, names)
    named = [moments, _pairs(standard, names), _shapes(standard, names)]
    scores: list[_Score] = []
    for number in rows:
        part = _Rows(shares[:number], picks[:, :number], _weights(found.distance, number))
        scores += [part.largest(features) for features in named if features.faults]
        scores += [part.joint(features) for features in (_quadratic(base), _waves(base))]
    values = torch.stack([scaled(score.value) for score in scores])
    told = values[:, 0] * torch.tensor([DOUBT if score.fault == JOINT else 1.0 for score in scores]).to(values)
    z, mean = (sums[0, : 2 * len(names)].reshape(2, -1) for sums in (part.standardised(moments), part.sums(moments)[0]))
    shift, more = mean / part.weights.sum()
    sizes = torch.stack((shift, (1 + more).clamp(min=0).sqrt()))  # candidates have the mean square 1
    first = standard[torch.arange(len(standard)).to(picks), picks[1]]
    return Evidence(values.amax(0), scores[int(told.argmax())].fault, z, sizes, (standard[:, 0], first))


class _Score(NamedTuple):
    """A statistic of true latents and of R picks, ``(R + 1,)``, and the fault that it shows in words."""

    value: Tensor
    fault: str


class _Rows(NamedTuple):
    """Rows with a choice of one candidate for each.

    Attributes:
        shares: The probability of each candidate to be the true one, ``(n, M + 1)``.
        picks: The true candidates, and R random choices, ``(R + 1, n)``.
        weights: The weights of the rows, ``(n,)``.
    """

    shares: Tensor
    picks: Tensor
    weights: Tensor

    def sums(self, features: Features) -> tuple[Tensor, Tensor]:
        """Return the gradient G of each choice, ``(R + 1, P)``, and its covariance over choices, ``(P, P)``."""
        values = features.values[: len(self.weights)]
        centred = values - (self.shares.unsqueeze(-1) * values).sum(1, keepdim=True)
        scale = self.weights.unsqueeze(-1) * self.shares.sqrt()
        table, spread = (part.flatten(0, 1) for part in (centred, scale.unsqueeze(-1) * centred))
        places = self.picks + values.shape[1] * torch.arange(len(values)).to(self.picks)
        each = self.weights.to(table).expand(len(places), -1).contiguous()
        total = embedding_bag(places, table.contiguous(), mode="sum", per_sample_weights=each)
        return total, spread.T @ spread

    def standardised(self, features: Features) -> Tensor:
        """Return each feature's gradient over its standard deviation, ``(R + 1, P)``."""
        total, variance = self.sums(features)
        return total / variance.diagonal().clamp(min=1e-12).sqrt()

    def largest(self, features: Features) -> _Score:
        """Return the largest standardised gradient of all features."""
        z = self.standardised(features)
        best = int(z[0].abs().argmax())
        return _Score(z.abs().amax(1), features.faults[best][int(z[0, best] < 0)])

    def joint(self, features: Features) -> _Score:
        """Return the square root of Gᵀ V⁻¹ G."""
        total, variance = self.sums(features)
        ridge = LEAST * variance.diagonal().mean().clamp(min=1e-12)
        factor = torch.linalg.cholesky(variance + ridge * torch.eye(len(variance)).to(variance))
        return _Score(torch.linalg.solve_triangular(factor, total.T, upper=False).norm(dim=0), JOINT)


def _weights(distance: Tensor, number: int) -> Tensor:
    """Return weights that fall to zero at the row after the last, ``(number,)``."""
    reach = distance[min(number, len(distance) - 1)].clamp(min=1e-12)
    return 1 - 0.99 * (distance[:number] / reach).clamp(max=1).square()


def _standardised(numbers: Tensor, shares: Tensor) -> Tensor:
    """Return numbers ``(n, M + 1, K)`` minus their mean in each row, over their standard deviation there."""
    loc = (shares.unsqueeze(-1) * numbers).sum(1, keepdim=True)
    scale = (shares.unsqueeze(-1) * (numbers - loc).square()).sum(1, keepdim=True).sqrt()
    return ((numbers - loc) / scale).nan_to_num(0.0, CUT, -CUT).clamp(-CUT, CUT)


def _moments(t: Tensor, names: list[str]) -> Features:
    columns, faults = [t, t**2], [(f"the draws of {n} lie too low", f"the draws of {n} lie too high") for n in names]
    faults += [(f"the draws of {n} lie too narrow", f"the draws of {n} lie too wide") for n in names]
    if len(names) > 1:
        columns.append((t**2).sum(-1, keepdim=True))
        faults.append(("the draws of all latents lie too narrow", "the draws of all latents lie too wide"))
    return Features(torch.cat(columns, -1), faults)


def _pairs(t: Tensor, names: list[str]) -> Features:
    pairs = list(itertools.combinations(range(len(names)), 2)) if len(names) <= MOST else []
    first, second = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    words = [f"the correlation of the draws of {names[a]} and {names[b]} is too" for a, b in pairs]
    return Features(t[..., first] * t[..., second], [(f"{word} low", f"{word} high") for word in words])


def _shapes(t: Tensor, names: list[str]) -> Features:
    waves = [wave(frequency * t) for frequency in FREQUENCIES for wave in (torch.cos, torch.sin)]
    fault = [2 * (f"the distribution of the draws of {name} has a wrong shape",) for name in names]
    return Features(torch.cat(waves, -1), fault * len(waves))


def _quadratic(u: Tensor) -> Features:
    size = u.shape[-1]
    first, second = torch.triu_indices(size, size) if size <= MOST else torch.arange(size).expand(2, -1)
    return Features(torch.cat((u, u[..., first] * u[..., second]), -1), [])


def _waves(u: Tensor) -> Features:
    directions = torch.randn(u.shape[-1], WAVES).to(u) * 1.5 / u.shape[-1] ** 0.5
    phase = u @ directions
    return Features(torch.cat((phase.cos(), phase.sin()), -1), [])
