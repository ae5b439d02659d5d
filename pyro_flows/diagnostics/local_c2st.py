"""A test of an amortised posterior at one observation, by simulations near it.

A logistic regression on features φ separates the true latents of the rows from draws of the guide, with the rows
weighted by their nearness w to the observation.  At coefficients zero its gradient is G = Σ_i w_i (φ(true_i) - E φ_i),
where E φ_i is the mean over the row's candidates.  After one Newton step, the mean squared deviation of its
probabilities from 1/2 is proportional to Gᵀ V⁻¹ G.  L-C2ST uses this deviation as its statistic.

If the guide is right, any candidate of a row may be the true one, with known probabilities.  So statistics of true
latents and of candidates picked at random are exchangeable.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .. import plots
from ..arguments import check_integers, check_numbers
from ..encoders.training_record import unjudged
from ..programs.program import runs_programs
from .amortised import simulator_of
from .largest_statistic import Largest, ObservationTest, Statistic, largest
from .neighbours import Neighbours, neighbours_of


@dataclass(frozen=True, repr=False)
class LocalC2ST(ObservationTest):
    """Test of an amortised posterior at one observation: the result of :func:`~pyro_flows.local_c2st`.

    Attributes:
        names: The names of the K elements of the latents.
        statistic: The largest of several statistics; each is 1 at its 98 % quantile for an exact guide.
        null: The same statistic for an exact guide, ``(R,)``.
        p_value: The p-value, exact for any number of simulations.
        level: The p-value at which the guide fails.
        fault: The fault that the largest statistic shows, in words.
        location: The mean of true latents minus that of draws, in standard errors, ``(K,)``.
        spread: The mean square of true latents minus that of draws, in standard errors, ``(K,)``.
        shift: The mean of true latents minus that of draws, in standard deviations of the draws, ``(K,)``.
        ratio: The standard deviation of true latents over that of draws, ``(K,)``.
        truths: True latents of the n nearest rows, standardised in each row, ``(n, K)``.
        draws: One draw of the guide for each row, standardised likewise, ``(n, K)``.
        distance: The distance of each row's posterior from that of the observation, in its standard deviations,
            ``(n,)``.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> from pyro_flows.encoders import MLPEncoder
        >>> def model(x=None):
        ...     theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1).to_event(1))
        ...     return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)
        >>> narrow = AutoFlow(model, encoder=MLPEncoder(2, context_dim=8)).setup(torch.zeros(2))  # untrained
        >>> found = local_c2st(model, narrow, observed={"x": torch.ones(2)}, num_simulations=1000)
        >>> found.passed, found.p_value, found.reason[:37]
        (False, 0.001, 'The draws are not right for this data')
    """

    location: Tensor
    spread: Tensor
    shift: Tensor
    ratio: Tensor
    truths: Tensor
    draws: Tensor
    distance: Tensor

    @property
    def reason(self) -> str:
        """The result in words, which names the worst latent or the number of simulations that show no error."""
        if self.passed:
            near = f"{len(self.distance)} simulations within {float(self.distance[-1]):.2g} standard deviations"
            return f"No test finds an error for this dataset (p = {self.p_value:.2g}), by {near} of its posterior."
        shift, ratio = self.shift[self.shift.abs().argmax()], self.ratio[self.ratio.log().abs().argmax()]
        sizes = (
            f"Means are off by up to {float(shift.abs()):.2g} standard deviations, spreads by a factor of {ratio:.2g}"
        )
        return f"The draws are not right for this dataset (p = {self.p_value:.2g}): {self.fault}. {sizes}."

    def plot(self) -> Any:
        """Plot the latents near the observation and the statistic with :func:`pyro_flows.plots.local_c2st`."""
        return plots.local_c2st(self)


@runs_programs
@torch.no_grad()
@unjudged()
def local_c2st(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    observed: dict[str, Tensor],
    num_simulations: int = 20_000,
    num_samples: int = 31,
    num_null: int = 999,
    level: float = 0.01,
    **kwargs: Any,
) -> LocalC2ST:
    """Test an amortised guide at one observation, by new simulations near it.

    Over the simulations whose data are near the observation, the true latents and the guide's draws must have the same
    distribution.  A classifier that is weighted by the nearness separates them: a local classifier two-sample test
    (Linhart, Gramfort, Rodrigues 2023, arXiv:2306.03580), in the coordinates of the flow's base and of each latent.  It
    is a logistic regression after one Newton step, with quadratic and periodic features.  The largest of its statistics
    is compared with those of draws in place of the true latents, so that the p-value is exact.

    Half of the simulations take their latents from the prior, and half from a widened posterior of the observation,
    whose effect on the null distribution is computed.  No likelihood is evaluated.

    Of a hierarchy it tests the latents outside of the plate, and those in one row at random.  The posterior of the
    observation then proposes only those outside of the plate.

    Args:
        model: A Pyro model that takes its data by arguments, as for :func:`~pyro_flows.fit_amortized`.
        guide: An ``AutoFlow`` with an encoder, or an ``AutoPlateFlow`` with a ``global_encoder``.
        *args: The model's arguments without the data.
        observed: The observation, by the names of the model's arguments.
        num_simulations: The number of simulations, at least 1000.  The nearest 6 % of them are used.
        num_samples: The number of the guide's draws per simulation, at least 10.
        num_null: The number R of null statistics, at least 100.
        level: The p-value at which the guide fails.

    Returns:
        The :class:`~pyro_flows.diagnostics.LocalC2ST`.

    Raises:
        TypeError: If ``observed`` holds no tensors.
        ValueError: As for :func:`~pyro_flows.calibrate`, if ``observed`` is not one dataset of the model, or if no
            simulations are near it.  Then :func:`~pyro_flows.misspecification` tells more.
        FloatingPointError: If the guide's draws for ``observed`` are not finite.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow, fit_amortized
        >>> from pyro_flows.encoders import MLPEncoder
        >>> def model(x=None):
        ...     theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1).to_event(1))
        ...     return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)
        >>> guide = AutoFlow(model, encoder=MLPEncoder(2, context_dim=8))
        >>> fit = fit_amortized(model, guide, simulations=200, max_epochs=2, progress=False)
        >>> local_c2st(model, guide, observed={"x": torch.ones(2)}, num_simulations=1000).null.shape
        torch.Size([999])
    """
    check_integers("local_c2st", 1000, num_simulations=num_simulations)
    check_integers("local_c2st", 10, num_samples=num_samples)
    check_integers("local_c2st", 100, num_null=num_null)
    check_numbers("local_c2st", above=0, below=1, level=level)
    simulator = simulator_of("local_c2st", model, guide, args, kwargs, observed)
    rows = [max(SCORING.rows, round(share * num_simulations)) for share in SCORING.shares]
    near = neighbours_of(
        guide,
        simulator,
        {name: value.unsqueeze(0) for name, value in observed.items()},
        num_simulations=num_simulations,
        number=rows[-1],
        num_samples=num_samples,
    )
    found, tensors = scored(near, rows, num_null, level)
    return LocalC2ST(near.names, *found, *tensors, near.distance)


@dataclass(frozen=True)
class Scoring:
    """Constants of the features, and of their statistics.

    Attributes:
        cut: The standard deviations at which coordinates are cut off: one draw in a heavy tail must not decide.
        frequencies: Those of the features of a latent's shape.
        waves: The random features of the joint shape.
        paired: The latents beyond which pairs are left out.
        ridge: The ridge of V, relative to its mean eigenvalue.
        shares: The shares of the simulations that are looked at, the nearest few and the nearest many.
        rows: The fewest rows to look at.
    """

    cut: float = 5.0
    frequencies: tuple[float, ...] = (1.5, 2.5)
    waves: int = 48
    paired: int = 40
    ridge: float = 0.01
    shares: tuple[float, ...] = (0.015, 0.06)
    rows: int = 50


SCORING = Scoring()
Shown = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Features(NamedTuple):
    """Features of candidates.

    Attributes:
        values: ``(n, M + 1, P)``.
        faults: The fault that each feature shows if true latents have more of it than draws, and if they have less: P
            pairs, or none if only all features together show one.
    """

    values: Tensor
    faults: list[tuple[str, str]]


def scored(found: Neighbours, rows: list[int], repeats: int, level: float) -> tuple[Largest, Shown]:
    """Compute all statistics of true latents, and of R sets of candidates picked at random.

    Args:
        found: The rows.
        rows: The numbers of nearest rows to look at.
        repeats: The number R of picks.
        level: The p-value at which the true latents fail.

    Returns:
        The largest statistic, and the tensors of :class:`LocalC2ST` from ``location`` to ``draws``.
    """
    names, shares = found.names, found.log_weights.softmax(1)
    picks = torch.cat((torch.zeros_like(shares[:, :1], dtype=torch.long), shares.multinomial(repeats, True)), 1).T
    standard = _standardised(found.numbers, shares)
    base = found.base.nan_to_num(SCORING.cut, SCORING.cut, -SCORING.cut).clamp(-SCORING.cut, SCORING.cut)
    moments = _moments(standard, names)
    named = [moments, _pairs(standard, names), _shapes(standard, names)]
    scores: list[Statistic] = []
    for number in rows:
        part = _Choices(shares[:number], picks[:, :number], _weights(found.distance, number))
        scores += [part.largest(features) for features in named if features.faults]
        scores += [part.joint(features) for features in (_quadratic(base), _waves(base))]
    z, mean = (sums[0, : 2 * len(names)].reshape(2, -1) for sums in (part.standardised(moments), part.sums(moments)[0]))
    shift, more = mean / part.weights.sum()
    ratio = (1 + more).clamp(min=0).sqrt()  # candidates have the mean square 1
    first = standard[torch.arange(len(standard)).to(picks), picks[1]]
    return largest(scores, 0, level), (z[0], z[1], shift, ratio, standard[:, 0], first)


class _Choices(NamedTuple):
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

    def largest(self, features: Features) -> Statistic:
        """Return the largest standardised gradient of all features."""
        z = self.standardised(features)
        best = int(z[0].abs().argmax())
        return Statistic(z.abs().amax(1), features.faults[best][int(z[0, best] < 0)])

    def joint(self, features: Features) -> Statistic:
        """Return the square root of Gᵀ V⁻¹ G."""
        total, variance = self.sums(features)
        ridge = SCORING.ridge * variance.diagonal().mean().clamp(min=1e-12)
        factor = torch.linalg.cholesky(variance + ridge * torch.eye(len(variance)).to(variance))
        size = torch.linalg.solve_triangular(factor, total.T, upper=False).norm(dim=0)
        return Statistic(size, "the joint distribution of the draws is wrong", weight=0.5)  # a named latent tells more


def _weights(distance: Tensor, number: int) -> Tensor:
    """Return weights that fall to zero at the row after the last, ``(number,)``."""
    reach = distance[min(number, len(distance) - 1)].clamp(min=1e-12)
    return 1 - 0.99 * (distance[:number] / reach).clamp(max=1).square()


def _standardised(numbers: Tensor, shares: Tensor) -> Tensor:
    """Return numbers ``(n, M + 1, K)`` minus their mean in each row, over their standard deviation there."""
    loc = (shares.unsqueeze(-1) * numbers).sum(1, keepdim=True)
    scale = (shares.unsqueeze(-1) * (numbers - loc).square()).sum(1, keepdim=True).sqrt()
    return ((numbers - loc) / scale).nan_to_num(0.0, SCORING.cut, -SCORING.cut).clamp(-SCORING.cut, SCORING.cut)


def _moments(t: Tensor, names: list[str]) -> Features:
    columns, faults = [t, t**2], [(f"the draws of {n} lie too low", f"the draws of {n} lie too high") for n in names]
    faults += [(f"the draws of {n} lie too narrow", f"the draws of {n} lie too wide") for n in names]
    if len(names) > 1:
        columns.append((t**2).sum(-1, keepdim=True))
        faults.append(("the draws of all latents lie too narrow", "the draws of all latents lie too wide"))
    return Features(torch.cat(columns, -1), faults)


def _pairs(t: Tensor, names: list[str]) -> Features:
    pairs = list(itertools.combinations(range(len(names)), 2)) if len(names) <= SCORING.paired else []
    first, second = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    words = [f"the correlation of the draws of {names[a]} and {names[b]} is too" for a, b in pairs]
    return Features(t[..., first] * t[..., second], [(f"{word} low", f"{word} high") for word in words])


def _shapes(t: Tensor, names: list[str]) -> Features:
    waves = [wave(frequency * t) for frequency in SCORING.frequencies for wave in (torch.cos, torch.sin)]
    fault = [2 * (f"the distribution of the draws of {name} has a wrong shape",) for name in names]
    return Features(torch.cat(waves, -1), fault * len(waves))


def _quadratic(u: Tensor) -> Features:
    size = u.shape[-1]
    first, second = torch.triu_indices(size, size) if size <= SCORING.paired else torch.arange(size).expand(2, -1)
    return Features(torch.cat((u, u[..., first] * u[..., second]), -1), [])


def _waves(u: Tensor) -> Features:
    directions = torch.randn(u.shape[-1], SCORING.waves).to(u) * 1.5 / u.shape[-1] ** 0.5
    phase = u @ directions
    return Features(torch.cat((phase.cos(), phase.sin()), -1), [])
