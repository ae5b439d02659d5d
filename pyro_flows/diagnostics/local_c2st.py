"""A test of an amortised posterior at one observation, by simulations near it."""

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
from .amortised import check_amortised, check_observed
from .largest_statistic import p_value
from .local_scores import evidence
from .neighbours import neighbours_of

SHARES = 0.015, 0.06  # of the simulations: the nearest rows to look at, few and many
FEWEST = 50  # rows to look at


@dataclass(frozen=True)
class LocalC2ST:
    """Test of an amortised posterior at one observation: the result of :func:`local_c2st`.

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

    names: list[str]
    statistic: float
    null: Tensor
    p_value: float
    level: float
    fault: str
    location: Tensor
    spread: Tensor
    shift: Tensor
    ratio: Tensor
    truths: Tensor
    draws: Tensor
    distance: Tensor

    @property
    def passed(self) -> bool:
        """True if the p-value is above the level, which holds for exact guides with probability ``1 - level``."""
        return self.p_value > self.level

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

    def __repr__(self) -> str:
        return f"LocalC2ST(passed={self.passed}, p_value={self.p_value:.3g}): {self.reason}"


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
        >>> fit = fit_amortized(model, guide, num_simulations=200, max_epochs=2, progress=False)
        >>> local_c2st(model, guide, observed={"x": torch.ones(2)}, num_simulations=1000).null.shape
        torch.Size([999])
    """
    check_integers("local_c2st", 1000, num_simulations=num_simulations)
    check_integers("local_c2st", 10, num_samples=num_samples)
    check_integers("local_c2st", 100, num_null=num_null)
    check_numbers("local_c2st", above=0, below=1, level=level)
    check_amortised("local_c2st", guide)
    simulator = Simulator("local_c2st", model, args, kwargs)
    check_observed(guide, simulator, observed)
    rows = [max(FEWEST, round(share * num_simulations)) for share in SHARES]
    near = neighbours_of(
        guide,
        simulator,
        {name: value.unsqueeze(0) for name, value in observed.items()},
        num_simulations=num_simulations,
        number=rows[-1],
        num_samples=num_samples,
    )
    found = evidence(near, rows, num_null)
    return LocalC2ST(
        names=near.names,
        statistic=float(found.statistic[0]),
        null=found.statistic[1:],
        p_value=p_value(found.statistic, 0),
        level=level,
        fault=found.fault,
        location=found.moments[0],
        spread=found.moments[1],
        shift=found.sizes[0],
        ratio=found.sizes[1],
        truths=found.standard[0],
        draws=found.standard[1],
        distance=near.distance,
    )
