"""A test of a simulator at one observation: could the model have made these data?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import plots
from ..arguments import check_integers, check_numbers
from ..encoders.training_record import unjudged
from ..programs.plate_nesting import runs_programs
from ..programs.simulator import Simulator
from .amortised import check_amortised, check_observed, posteriors
from .largest_statistic import p_value, scaled
from .predictive_statistics import Predictive, Statistic


@dataclass(frozen=True)
class Misspecification:
    """Test whether a model could have made an observation: the result of :func:`misspecification`.

    Attributes:
        names: The names of the T statistics.
        p_values: The p-value of each by itself, ``(T,)``.
        statistic: The largest of the statistics; each is 1 at its 98 % quantile, among simulated datasets.
        null: The same number of the B simulated datasets, ``(B,)``.
        p_value: The p-value of the largest statistic, exact for any guide and any number of simulations.
        level: The p-value at which the observation fails.
        fault: The fault that the largest statistic shows, in words.
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

    names: list[str]
    p_values: Tensor
    statistic: float
    null: Tensor
    p_value: float
    level: float
    fault: str
    entries: list[str]
    residuals: Tensor

    @property
    def passed(self) -> bool:
        """True if the p-value is above the level, which holds for data of the model with probability ``1 - level``."""
        return self.p_value > self.level

    @property
    def reason(self) -> str:
        """The result in words, which names the largest statistic."""
        if self.passed:
            return f"No statistic of {len(self.names)} tells these data from simulated ones (p = {self.p_value:.2g})."
        return f"The model is unlikely to make these data (p = {self.p_value:.2g}): {self.fault}."

    def plot(self) -> Any:
        """Plot residuals and statistics with :func:`pyro_flows.plots.misspecification`."""
        return plots.misspecification(self)

    def __repr__(self) -> str:
        return f"Misspecification(passed={self.passed}, p_value={self.p_value:.3g}): {self.reason}"


@runs_programs
@torch.no_grad()
@unjudged()
def misspecification(
    model: Callable[..., Any],
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
        >>> fit = fit_amortized(model, guide, num_simulations=200, max_epochs=2, progress=False)
        >>> misspecification(model, guide, observed={"x": torch.ones(2)}, num_simulations=99).null.shape
        torch.Size([99])
    """
    check_integers("misspecification", 99, num_simulations=num_simulations)
    check_integers("misspecification", 10, num_samples=num_samples)
    check_numbers("misspecification", above=0, below=1, level=level)
    check_amortised("misspecification", guide)
    simulator = Simulator("misspecification", model, args, kwargs)
    check_observed(guide, simulator, observed)
    predictive = _replicate(guide, simulator, observed, num_simulations, num_samples)
    found = predictive.statistics()
    sides = [side for statistic in found for side in _sides(statistic)]
    together = torch.stack([side.value for side in sides])
    largest = together.amax(0)
    alone = [min(1.0, len(_sides(f)) * min(p_value(side.value, -1) for side in _sides(f))) for f in found]
    return Misspecification(
        names=[statistic.name for statistic in found],
        p_values=torch.tensor(alone),
        statistic=float(largest[-1]),
        null=largest[:-1],
        p_value=p_value(largest, -1),
        level=level,
        fault=sides[int(together[:, -1].argmax())].high,
        entries=predictive.names,
        residuals=predictive.residuals()[0][-1],
    )


def _sides(found: Statistic) -> list[Statistic]:
    """Return a statistic on the common scale, and also its negative if small values show a fault."""
    sides = [found._replace(value=scaled(found.value))]
    return [*sides, Statistic(found.name, scaled(-found.value), found.low)] if found.low else sides


def _replicate(
    guide: Any,
    simulator: Simulator,
    observed: dict[str, Tensor],
    num_simulations: int,
    num_samples: int,
) -> Predictive:
    """Simulate datasets, append the observation, and draw posterior predictive replicates of each."""
    drawn = simulator.draw(num_simulations)
    simulated = drawn.take(drawn.has_finite_data).data
    data = {name: torch.cat((x, observed[name].unsqueeze(0).to(x))) for name, x in simulated.items()}
    of = posteriors(guide, simulator, data)
    assert of.context is not None
    latents = {name: value.flatten(0, 1) for name, value in of.sample_all(num_samples).items()}
    made = simulator.draw(num_samples * len(of.context), latents).data
    return Predictive(data, {name: made[name].reshape(num_samples, *x.shape) for name, x in data.items()}, of.context)
