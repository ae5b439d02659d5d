"""Convergence of many chains: rank-normalised split R-hat and effective sample sizes, for many quantities at once.

Each chain is split into halves.  Values are replaced by normal scores of their ranks r among all S draws,
Φ⁻¹((r - 3/8) / (S + 1/4)).  With n draws per half, W the mean variance within halves and B/n the variance of their
means, R-hat² = (n - 1)/n + B/(n W).  It is the larger of two, of the values and of their distances from the median.
The effective sample size is S over the autocorrelation time, of the scores (bulk) and of the indicators of the 5 % and
95 % quantiles (tail).  For a standard deviation it is the number of normal draws that estimate it as well as the half
chains do.

Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of MCMC (Vehtari, Gelman,
Simpson, Carpenter, Bürkner 2021, arXiv:1903.08008).
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 400_000  # numbers per block, few enough for the cache
LINE = 8  # the fewest quantities per block, for whole cache lines
FEWEST = 8  # draws per chain: each half needs four
DIRECT = 8  # lags whose covariances are summed directly; a Fourier transform gives all lags if these do not suffice


class Convergence(NamedTuple):
    """The convergence of chains, for each of K quantities.

    Attributes:
        rhat: Rank-normalised split R-hat, ``(K,)``; 1 for constants, infinite where draws are NaN.
        ess_bulk: The effective sample size of the bulk.
        ess_tail: The smaller effective sample size of the 5 % and the 95 % quantile.
        ess_sd: The number of normal draws that estimate the standard deviation as well; infinite where it overflows.
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

    @property
    def drifts(self) -> bool:
        """True if a quantity drifts by more than chance explains: at the level 0.0005, corrected for all tests."""
        level = torch.tensor(1 - 0.0005 / (2 * max(1, self.drift.numel())), dtype=torch.float64)
        return bool((self.drift > torch.special.ndtri(level)).any())


def convergence(draws: Tensor) -> Convergence:
    """Summarise draws of K quantities by C chains of n draws, ``(C, n, K)``, with n at least 8."""
    half, parts = draws.shape[1] // 2, list[Convergence]()
    for some in draws.detach().split(max(LINE, BLOCK // draws[..., 0].numel()), -1):
        centre = some[:, 0].nan_to_num(0.0, 0.0, 0.0).median(0).values  # for precision in float32
        some = (some - centre).float().cpu()
        halves = torch.cat((some[:, :half], some[:, -half:]))  # without the middle draw of an odd number
        parts.append(_summary(halves.permute(2, 1, 0).flatten(1), half))  # (K, S), with S = 2 n C
    return Convergence(*map(torch.cat, zip(*parts, strict=True)))


def _summary(columns: Tensor, length: int) -> Convergence:
    """Summarise K quantities, ``(K, S)``: time by time, the first and then the second halves of all chains."""
    unknown, size = columns.isnan().any(-1), columns.shape[1]
    columns = columns.nan_to_num(0.0, math.inf, -math.inf)
    ordered, order = _sort(columns)
    constant = ordered[:, 0] == ordered[:, -1]
    median = ordered[:, (size - 1) // 2, None]
    distances = (columns - median).abs().nan_to_num(math.inf)
    scores, folded = (_normal_scores(*part).unflatten(1, (length, -1)) for part in ((ordered, order), _sort(distances)))
    tails = []
    for share in (0.05, 0.95):
        place = share * (size - 1)
        low, high = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
        tails.append(_ess((columns <= low.lerp(high, place % 1).unsqueeze(-1)).to(scores).view_as(scores)))
    rhat, drift = (torch.maximum(of(scores), of(folded)) for of in (_rhat, _drift))
    rhat, drift = (x.masked_fill(constant, y).masked_fill(unknown, math.inf) for x, y in ((rhat, 1), (drift, 0)))
    sizes = _ess(scores), torch.minimum(*tails), _ess_of_sd(columns.view_as(scores))
    bulk, tail, sd = (x.masked_fill(constant, size).masked_fill(unknown, 0) for x in sizes)
    return Convergence(rhat, bulk, tail, sd, drift)


def _sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows of numbers; return them and their indices.  Numpy sorts several times faster than torch."""
    order = torch.from_numpy(np.argsort(x.numpy(), -1))
    return x.gather(-1, order), order


def _normal_scores(ordered: Tensor, order: Tensor) -> Tensor:
    """Return the normal scores of ranks; equal values share their mean rank."""
    size = ordered.shape[-1]
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[:, 1:], ordered[:, :-1], out=is_first[:, 1:])
    first = np.flatnonzero(is_first.numpy())  # numpy finds and repeats several times faster than torch
    counts = np.diff(first, append=ordered.numel())
    scores = torch.from_numpy(np.repeat(_scores_of_ranks(size).numpy()[2 * (first % size) + counts - 1], counts))
    return torch.empty_like(ordered).scatter_(-1, order, scores.view_as(ordered))


@functools.lru_cache(maxsize=4)
def _scores_of_ranks(size: int) -> Tensor:
    """Return the normal scores of the mean ranks 1, 1.5, 2, …, S."""
    ranks = torch.arange(2 * size - 1, dtype=torch.float64) / 2 + 1
    return torch.special.ndtri((ranks - 0.375) / (size + 0.25)).float()


def _rhat(x: Tensor) -> Tensor:
    """Return R-hat of K quantities in half chains, ``(K, n, 2 C)``."""
    length, means = x.shape[1], x.mean(1, keepdim=True)
    within = (x - means).square().mean((1, 2)) * length / (length - 1)
    return ((length - 1) / length + means.flatten(1).var(-1) / within).sqrt().nan_to_num(1.0, math.inf)


def _ess_of_sd(x: Tensor) -> Tensor:
    """Return how many normal draws estimate each standard deviation as well as half chains do, ``(K, n, 2 C)``."""
    centred = x - x.mean((1, 2), keepdim=True)
    squares = (centred / centred.abs().amax((1, 2), keepdim=True)).square().mean(1)
    return (2 * squares.shape[-1] * (squares.mean(-1) / squares.std(-1)).square()).nan_to_num(math.inf)


def _drift(x: Tensor) -> Tensor:
    """Return the mean change between the halves of chains, ``(K, n, 2 C)``, in standard errors."""
    first, second = x.mean(1).chunk(2, -1)  # (K, C)
    change, freedom = second - first, first.shape[-1] - 1
    t = change.mean(-1) / (change.std(-1) / math.sqrt(freedom + 1))
    # With few chains this is Student's t, which is turned into a normal score (Wallace 1959).
    normal = (freedom * (t.square() / freedom).log1p()).sqrt() * (8 * freedom + 1) / (8 * freedom + 3)
    return normal.nan_to_num(0.0, math.inf)


def _ess(x: Tensor) -> Tensor:
    """Return the effective sample size of K quantities in half chains, ``(K, n, 2 C)``.

    The autocorrelation time is a sum over Geyer's initial monotone sequence of pairs of lags.
    """
    (length, chains), size = x.shape[1:], x[0].numel()
    means, lags = x.mean(1, keepdim=True), 2 * ((length - 1) // 2)
    centred = x - means
    flat = centred.flatten(1)
    shifts = range(0, chains * min(DIRECT, lags), chains)
    covariance = torch.stack([torch.linalg.vecdot(flat[:, : size - by], flat[:, by:]) for by in shifts], -1) / size
    within = covariance[:, :1] * length / (length - 1)
    total = covariance[:, :1] + means.flatten(1).var(-1, keepdim=True)

    def correlations(covariance: Tensor) -> Tensor:
        """Return the correlations in pairs of lags, ``(K, pairs, 2)``."""
        return torch.cat((torch.ones_like(total), 1 - (within - covariance[:, 1:]) / total), -1).unflatten(-1, (-1, 2))

    found = correlations(covariance)
    if lags > DIRECT and (found.sum(-1) > 0).all(-1).any():
        spectrum = torch.view_as_real(torch.fft.rfft(centred.mT, n=2 * length))
        power = spectrum.square().mean(1).sum(-1)
        found = correlations(torch.fft.irfft(power, n=2 * length)[:, :lags] / length)
    even, pairs = found[..., 0], found.sum(-1)
    kept = (pairs > 0).cumprod(-1).bool()
    kept[:, -1] = False  # the last pair counts by half, like the first negative one
    last = even.gather(-1, kept.sum(-1, keepdim=True)).squeeze(-1).clamp_min(0)
    times = -1 + 2 * (pairs.cummin(-1).values * kept).sum(-1) + last
    return (size / times.clamp_min(1 / math.log10(size))).nan_to_num(size)
