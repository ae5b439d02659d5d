"""Convergence of many chains: rank-normalised split R-hat and effective sample sizes, for many quantities at once.

Each chain is split into halves, and values are replaced by normal scores of their ranks r among all S draws,
Φ⁻¹((r - 3/8) / (S + 1/4)).  With n draws in each half, W the mean variance within halves and B/n the variance of their
means, R-hat² = (n - 1)/n + B/(n W).  The larger of two counts, that of the values and that of their distances from the
median.  The effective sample size is S over the autocorrelation time, of the scores (bulk) and of the indicators of the
5 % and 95 % quantiles (tail).  That of the standard deviation is the number of normal draws that would tell it as well
as the half chains do.

Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of MCMC (Vehtari, Gelman,
Simpson, Carpenter, Bürkner 2021, arXiv:1903.08008).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIRECT = 10  # pairs of lags that are summed directly; where correlations last longer, Fourier transforms are faster
BLOCK = 400_000  # numbers that are looked at together, few enough for the cache
LINE = 64  # quantities that are transposed together, for whole lines of the cache
FEWEST = 8  # draws in a chain: each half needs four


class Convergence(NamedTuple):
    """How far chains have converged, for each of K quantities.

    Attributes:
        rhat: Rank-normalised split R-hat, ``(K,)``; 1 for constants, infinite where draws are NaN.
        ess_bulk: The effective sample size of the bulk.
        ess_tail: The smaller of those of the 5 % and the 95 % quantile.
        ess_sd: The number of normal draws that would tell the standard deviation as well; infinite where it overflows.
        drift: The mean change from the first half of the chains to the second, in standard errors: the larger of the
            values' and of their distances from the median.
    """

    rhat: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    ess_sd: Tensor
    drift: Tensor

    @property
    def ess(self) -> Tensor:
        """The smaller effective sample size, ``(K,)``."""
        return torch.minimum(self.ess_bulk, self.ess_tail)


def convergence(draws: Tensor) -> Convergence:
    """Summarise draws of K quantities by C chains of n draws, ``(C, n, K)``, at least 8 in each."""
    half, step = draws.shape[1] // 2, max(1, BLOCK // (len(draws) * draws.shape[1]))
    parts = []
    for some in draws.detach().split(LINE, -1):
        centre = some[:, 0].nan_to_num(0.0, 0.0, 0.0).median(0).values  # so that float32 does
        some = (some - centre).float().cpu()
        halves = torch.cat((some[:, :half], some[:, -half:]), 1)  # without the one in the middle
        columns = halves.permute(2, 1, 0).contiguous().flatten(1)  # (K, S), with S = 2 n C
        parts += [_converged(part, (-1, 2, half, len(draws))) for part in columns.split(step)]
    return Convergence(*(torch.cat(found) for found in zip(*parts, strict=True)))


def _converged(columns: Tensor, shape: tuple[int, int, int, int]) -> Convergence:
    """Summarise K quantities, ``(K, S)``, of the shape ``(K, 2, n, C)``: slices along time are contiguous."""
    unknown = columns.isnan().any(-1)
    columns = columns.nan_to_num(0.0, math.inf, -math.inf)
    ordered, order = _sort(columns)
    constant = ordered[:, 0] == ordered[:, -1]
    scores = _normal_scores(ordered, order).view(shape)
    median = ordered[:, (columns.shape[1] - 1) // 2, None]
    folded = _normal_scores(*_sort((columns - median).abs().nan_to_num(math.inf))).view(shape)
    rhat = torch.maximum(_rhat(scores), _rhat(folded))
    size = columns.shape[1]
    tails = []
    for share in (0.05, 0.95):
        place = share * (size - 1)
        low, high = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
        below = columns <= low.lerp(high, place % 1).unsqueeze(-1)
        tails.append(_ess(below.to(scores).view(shape)))
    ess_bulk, ess_tail = _ess(scores), torch.minimum(*tails)
    ess_sd, drift = _ess_of_sd(columns.view(shape)), torch.maximum(_drift(scores), _drift(folded))
    rhat, drift = (x.masked_fill(constant, y).masked_fill(unknown, math.inf) for x, y in ((rhat, 1), (drift, 0)))
    sizes = [x.masked_fill(constant, size).masked_fill(unknown, 0) for x in (ess_bulk, ess_tail, ess_sd)]
    return Convergence(rhat, sizes[0], sizes[1], sizes[2], drift)


def _sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows of float32 numbers; return them and where they were.

    Numbers and places are packed into integers, since numpy sorts these several times faster than torch sorts either.
    """
    bits = (x + 0.0).view(torch.int32)  # no negative zero
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered as the numbers are
    packed = (keys.long() << 32) | torch.arange(x.shape[-1])
    packed.numpy().sort(-1)
    order = packed & 0xFFFFFFFF
    keys = (packed >> 32).int()
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32), order


def _normal_scores(ordered: Tensor, order: Tensor) -> Tensor:
    """The normal scores of ranks, where equal values share their mean rank."""
    size = ordered.shape[-1]
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[:, 1:], ordered[:, :-1], out=is_first[:, 1:])
    first = np.flatnonzero(is_first.numpy())  # numpy finds and repeats several times faster than torch
    counts = np.diff(first, append=ordered.numel())
    scores = torch.from_numpy(np.repeat(_scores_of_ranks(size).numpy()[2 * (first % size) + counts - 1], counts))
    return torch.empty_like(ordered).scatter_(-1, order, scores.view_as(ordered))


@functools.lru_cache(maxsize=4)
def _scores_of_ranks(size: int) -> Tensor:
    """The normal scores of the mean ranks 1, 1.5, 2, …, S."""
    ranks = torch.arange(2 * size - 1, dtype=torch.float64) / 2 + 1
    return torch.special.ndtri((ranks - 0.375) / (size + 0.25)).float()


def _rhat(x: Tensor) -> Tensor:
    """R-hat of K quantities in half chains, ``(K, 2, n, C)``."""
    means, length = x.mean(2), x.shape[2]
    within = (x - means.unsqueeze(2)).square().mean((1, 2, 3)) * length / (length - 1)
    return ((length - 1) / length + means.flatten(1).var(-1) / within).sqrt().nan_to_num(1.0, math.inf)


def _ess_of_sd(x: Tensor) -> Tensor:
    """Return how many normal draws would tell each standard deviation as well as half chains do, ``(K, 2, n, C)``."""
    apart = x - x.mean((1, 2, 3), keepdim=True)
    squares = (apart / apart.abs().amax((1, 2, 3), keepdim=True)).square().mean(2).flatten(1)
    return (2 * squares.shape[-1] * (squares.mean(-1) / squares.std(-1)).square()).nan_to_num(math.inf)


def _drift(x: Tensor) -> Tensor:
    first, second = x.mean(2).unbind(1)  # (K, C)
    change, freedom = second - first, first.shape[-1] - 1
    t = change.mean(-1) / (change.std(-1) / math.sqrt(freedom + 1))
    # Student's t becomes normal (Wallace 1959), since there may be few chains.
    normal = (freedom * (t.square() / freedom).log1p()).sqrt() * (8 * freedom + 1) / (8 * freedom + 3)
    return normal.nan_to_num(0.0, math.inf)


def _ess(x: Tensor) -> Tensor:
    """The effective sample size of K quantities in half chains, ``(K, 2, n, C)``: Geyer's initial monotone sequence."""
    length, chains = x.shape[2], 2 * x.shape[3]
    means = x.mean(2, keepdim=True)
    x = x - means
    variance = _product(x, x) / (chains * (length - 1))
    total = variance * (length - 1) / length + means.flatten(1).var(-1)

    def correlations(covariance: Tensor, rows: Tensor | slice) -> Tensor:
        return 1 - (variance[rows, None] - covariance) / total[rows, None]

    pairs = min(DIRECT, (length - 1) // 2)
    covariances, lasts = [variance], torch.ones_like(variance, dtype=torch.bool)
    for lag in range(1, 2 * pairs):
        covariances.append(_product(x[:, :, : length - lag], x[:, :, lag:]) / (chains * length))
        if lag % 2:
            found = correlations(torch.stack(covariances, -1), slice(None))
            lasts &= found[:, -2:].sum(-1) > 0
            if not lasts.any():
                break
    times = _time(found)
    if pairs == DIRECT and len(longer := lasts.nonzero().squeeze(-1)):
        spectrum = torch.fft.rfft(x[longer].transpose(2, 3), n=2 * length)
        power = (spectrum.real.square() + spectrum.imag.square()).mean((1, 2))
        covariance = torch.fft.irfft(power, n=2 * length)[:, : length - length % 2] / length
        covariance[:, 0] = variance[longer]
        times[longer] = _time(correlations(covariance, longer))
    size = chains * length
    return (size / times.clamp_min(1 / math.log10(size))).nan_to_num(size)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The sum of the products of all numbers in each row, ``(K, 2, n, C)`` to ``(K,)``."""
    return torch.linalg.vecdot(x.flatten(2), y.flatten(2)).sum(-1)


def _time(correlations: Tensor) -> Tensor:
    """The autocorrelation time, from correlations at lags from 0, an even number, ``(K, L)``."""
    even = correlations[:, ::2]
    pairs = even + correlations[:, 1::2]
    kept = (pairs > 0).cumprod(-1).bool()
    kept[:, -1] = False  # the last pair counts by half, as the first that is negative does
    monotone = pairs.cummin(-1).values
    ends = even.gather(-1, kept.sum(-1, keepdim=True)).squeeze(-1).clamp_min(0)
    return -1 + 2 * (monotone * kept).sum(-1) + ends
