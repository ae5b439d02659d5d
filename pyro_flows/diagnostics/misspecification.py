"""A test of a simulator at one observation: could the model have made these data?

Comparing compare datasets with their own posterior predictive replicates.  Each maps N datasets and S replicates of
each to N numbers, in the same way for all, so that the numbers of datasets from one distribution are exchangeable.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import plots
from ..arguments import check_integers, check_numbers
from ..encoders.training_record import unjudged
from ..programs.program import Function, runs_programs
from ..programs.sites import labels_of
from .amortised import ObservationTest, Statistic, check_observed, largest, p_value, posteriors, simulator_of


@dataclass(frozen=True, repr=False)
class Misspecification(ObservationTest):
    """Test whether a model could have made an observation: the result of :func:`~pyro_flows.misspecification`.

    Attributes:
        names: The names of the T statistics.
        statistic: The largest of the statistics; each is 1 at its 98 % quantile, among simulated datasets.
        null: The same number of the B simulated datasets, ``(B,)``.
        p_value: The p-value of the largest statistic, exact for any guide and any number of simulations.
        level: The p-value at which the observation fails.
        fault: The fault that the largest statistic shows, in words.
        p_values: The p-value of each statistic by itself, ``(T,)``.
        entries: The names of the P entries of the data.
        residuals: The entries minus the mean of their posterior predictive replicates, in the replicates' standard
            deviations, ``(P,)``.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> from pyro_flows.encoders import MLPEncoder
        >>> def model(x=None):
        ...     theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1).to_event(1))
        ...     return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)
        >>> guide = AutoFlow(model, encoder=MLPEncoder(2, context_dim=8)).setup(torch.zeros(2))  # untrained
        >>> found = misspecification(model, guide, observed={"x": torch.tensor([20.0, 0.0])}, num_simulations=99)
        >>> found.passed, found.p_value, found.reason[:49]
        (False, 0.01, 'The model is unlikely to make these data (p = 0.0')
    """

    p_values: Tensor
    entries: list[str]
    residuals: Tensor

    @property
    def reason(self) -> str:
        """The result in words, which names the largest statistic."""
        if self.passed:
            return f"No statistic of {len(self.names)} tells these data from simulated ones (p = {self.p_value:.2g})."
        return f"The model is unlikely to make these data (p = {self.p_value:.2g}): {self.fault}."

    def plot(self) -> Any:
        """Plot residuals and statistics with :func:`pyro_flows.plots.misspecification`."""
        return plots.misspecification(self)


@runs_programs
@torch.no_grad()
@unjudged()
def misspecification(
    model: Function,
    guide: Any,
    *args: Any,
    observed: dict[str, Tensor],
    num_simulations: int = 999,
    num_samples: int = 40,
    level: float = 0.05,
    **kwargs: Any,
) -> Misspecification:
    """Test whether a model could have made an observation, by an amortised guide and simulations.

    Several statistics compare the observation with its posterior predictive replicates: latents are drawn from the
    guide, in all rows of a plate, and data from the model given these.  They are the Mahalanobis distance of the
    residuals, the largest residual, the largest sum of neighbouring ones, and for sets and series also the spread and
    the energy distance of the entries.  A further one is the distance of the encoder's context from those of
    simulations (Schmitt, Bürkner, Köthe, Radev 2021, arXiv:2112.08866).

    The same statistics of datasets from the prior predictive distribution, with replicates of their own, calibrate
    them: the largest statistic of the observation is ranked among theirs (Hjort, Dahl, Steinbakk 2006, Post-processing
    posterior predictive p values, JASA 101).  So the p-value is exact for any guide, and a bad guide costs only power.

    Args:
        model: A Pyro model that takes its data by arguments, as for :func:`~pyro_flows.fit_amortized`.
        guide: An ``AutoFlow`` with an encoder, or an ``AutoPlateFlow`` with a ``global_encoder``.
        *args: The model's arguments without the data.
        observed: The observation, by the names of the model's arguments.
        num_simulations: The number B of simulated datasets, at least 99.
        num_samples: The number S of replicates per dataset, at least 10.  The model runs B + (B + 1) S times.
        level: The p-value at which the observation fails.

    Returns:
        The :class:`~pyro_flows.diagnostics.Misspecification`.

    Raises:
        TypeError: If ``observed`` holds no tensors.
        ValueError: As for :func:`~pyro_flows.calibrate`, or if ``observed`` is not one dataset of the model.

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
        >>> misspecification(model, guide, observed={"x": torch.ones(2)}, num_simulations=99).null.shape
        torch.Size([99])
    """
    check_integers("misspecification", 99, num_simulations=num_simulations)
    check_integers("misspecification", 10, num_samples=num_samples)
    check_numbers("misspecification", above=0, below=1, level=level)
    simulator = simulator_of("misspecification", model, guide, args, kwargs)
    check_observed(guide, simulator, observed)
    drawn = simulator.draw(num_simulations)
    simulated = drawn.take(drawn.has_finite_data).data
    data = {name: torch.cat((x, observed[name].unsqueeze(0).to(x))) for name, x in simulated.items()}
    of = posteriors(guide, simulator, data)
    assert of.context is not None
    latents = {name: value.flatten(0, 1) for name, value in of.sample_all(num_samples).items()}
    made = simulator.draw(num_samples * len(of.context), latents).data
    replicates = {name: made[name].reshape(num_samples, *x.shape) for name, x in data.items()}
    predictive = Predictive(data, replicates, of.context)
    found = predictive.statistics()
    alone = [min(1.0, len(sides) * min(p_value(side.value, -1) for side in sides)) for sides in found.values()]
    together = largest([side for sides in found.values() for side in sides], -1, level)
    return Misspecification([*found], *together, torch.tensor(alone), predictive.names, predictive.residuals()[0][-1])


@dataclass(frozen=True)
class Comparing:
    """Constants of the statistics.

    Attributes:
        shrunk: The weight of the identity in a correlation matrix.
        widest: Entries of a dataset beyond which their correlations are left out.
        points: Entries of a dataset in an energy distance, at most.
        others: Entries of its replicates there.
        fewest: Entries of a dataset that have a distribution.
        tiny: Of the standard deviation of all datasets: smaller ones are round-off.
    """

    shrunk: float = 0.1
    widest: int = 1000
    points: int = 100
    others: int = 300
    fewest: int = 4
    tiny: float = 1e-6


COMPARING = Comparing()


class Predictive(NamedTuple):
    """N datasets, the last of them observed, with their replicates.

    Attributes:
        data: The datasets, by the model's arguments, each ``(N, *shape)``.
        replicates: S replicates of each, ``(S, N, *shape)``.
        contexts: The encoder's contexts of the datasets, ``(N, context_dim)``.
    """

    data: dict[str, Tensor]
    replicates: dict[str, Tensor]
    contexts: Tensor

    @property
    def names(self) -> list[str]:
        """The names of the P entries of a dataset."""
        return [label for name, x in self.data.items() for label in labels_of(name, x.shape[1:])]

    def residuals(self) -> tuple[Tensor, Tensor]:
        """Return datasets ``(N, P)`` and replicates ``(S, N, P)`` minus the replicates' means, over their sds."""
        x = torch.cat([value.reshape(len(value), -1).float() for value in self.data.values()], -1)
        y = torch.cat([y.reshape(*y.shape[:2], -1).float() for y in self.replicates.values()], -1)
        y = y.nan_to_num(0.0, 0.0, 0.0)  # any number does: the p-value is exact for every statistic
        loc, scale = y.mean(0), y.std(0)
        scale = scale.clamp(min=1e-30).maximum(COMPARING.tiny * x.std(0))
        return (x - loc) / scale, (y - loc) / scale

    def statistics(self) -> dict[str, list[Statistic]]:
        """Return all statistics by name, some with their negative, whose large values show another fault."""
        x, y = self.residuals()
        distance = (_whitened(x, y.flatten(0, 1)) if x.shape[1] <= COMPARING.widest else x.T).square().mean(0)
        away = (self.contexts - self.contexts.mean(0)) / self.contexts.std(0).clamp(min=1e-9)
        remote = _whitened(away, away).square().mean(0).log1p()
        far = f"{self.names[int(x[-1].abs().argmax())]} lies far from its replicates"
        words = "the data scatter {} around their replicates than simulated datasets do"
        found = {
            "distance from replicates": _more_or_less(distance.clamp(min=1e-30).log() / 2, words),
            "largest residual": [Statistic(x.abs().amax(1).log1p(), far)],
            "largest sum of residuals": [_run(x, self.names)],
            "distance from simulations": [Statistic(remote, "the prior and the simulator make no such data")],
        }
        for name, data in self.data.items():
            points, others = _points(data, self.replicates[name])
            if points.shape[1] >= COMPARING.fewest:
                own, other = (part.std(1).square().mean(-1).clamp(min=1e-30).log() / 2 for part in (points, others))
                words = f"the entries of {name} vary {{}} than those of its replicates"
                found[f"spread of {name}"] = _more_or_less(own - other, words)
                words = f"the entries of {name} have another distribution than those of its replicates"
                found[f"energy distance of {name}"] = [Statistic(_energy(points, others), words)]
        return found


def _more_or_less(value: Tensor, words: str) -> list[Statistic]:
    return [Statistic(value, words.format("more")), Statistic(-value, words.format("less"))]


def _whitened(x: Tensor, others: Tensor) -> Tensor:
    """Return vectors x, ``(N, P)``, whose Mahalanobis distance is that of other vectors, as columns ``(P, N)``."""
    shrunk = COMPARING.shrunk * torch.eye(x.shape[1]).to(x)
    covariance = (1 - COMPARING.shrunk) * others.T @ others / len(others) + shrunk
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), x.T, upper=False)


def _run(x: Tensor, names: list[str]) -> Statistic:
    """Return the largest sum of neighbouring residuals over the square root of their number."""
    size = x.shape[1]
    total = torch.cat((torch.zeros_like(x[:, :1]), x.cumsum(1)), 1)
    lengths = [length for length in (2**k for k in range(1, size.bit_length())) if length < size] + [size]
    sums = [(total[:, length:] - total[:, :-length]) / length**0.5 for length in lengths]
    best = max(range(len(sums)), key=lambda k: float(sums[k][-1].abs().max()))
    first = int(sums[best][-1].abs().argmax())
    side = "higher" if sums[best][-1, first] > 0 else "lower"
    span = f"{names[first]} to {names[first + lengths[best] - 1]}" if size > 1 else names[0]
    value = torch.cat(sums, 1).abs().amax(1).log1p()
    return Statistic(value, f"the data at {span} lie {side} than their replicates")


def _points(data: Tensor, replicates: Tensor) -> tuple[Tensor, Tensor]:
    """Return a dataset's entries along its first dimension, ``(N, n, d)``, and a share of all replicates' entries."""
    x = data.float().reshape(len(data), data.shape[1] if data.dim() > 1 else 1, -1)
    y = replicates.float().nan_to_num(0.0, 0.0, 0.0).reshape(len(replicates), *x.shape).transpose(0, 1).flatten(1, 2)
    kept = torch.linspace(0, x.shape[1] - 1, min(COMPARING.points, x.shape[1])).long()
    return x[:, kept], y[:, torch.randperm(y.shape[1])[: COMPARING.others]]


def _energy(points: Tensor, others: Tensor) -> Tensor:
    """Return the energy distance of the entries from those of replicates."""
    # Features that are constant in replicates, such as the first steps of a mask, must not divide by zero.
    least = COMPARING.tiny * torch.cat((points, others), 1).flatten(0, 1).std(0)
    scale = others.std(1, keepdim=True).maximum(least)
    scale = torch.where(scale > 0, scale, 1.0)
    x, y = points / scale, others / scale
    one, two = y.tensor_split(2, 1)
    return 2 * torch.cdist(x, y).mean((1, 2)) - torch.cdist(x, x).mean((1, 2)) - torch.cdist(one, two).mean((1, 2))
