"""Calibration of amortised posteriors: tests over datasets that the model simulates, whose true latents are known."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import plots
from ..arguments import check_integers
from ..encoders.training_record import unjudged
from ..guides.amortised import OfDatasets
from ..programs.program import Function, runs_programs
from .amortised import check_model, posteriors, simulator_of

LIMIT = 0.01 / 3  # the p-value of each of three tests below which the draws are not calibrated


@dataclass(frozen=True)
class Calibration:
    """Tests of an amortised posterior over M simulated datasets: the result of :func:`~pyro_flows.calibrate`.

    Each of the three tests has values u that are uniform on (0, 1) if the posterior is right.  Its p-value is that of
    the Kolmogorov-Smirnov test of u (location) and of ``|2 u - 1|`` (spread).  Small p-values indicate a wrong guide.

    Attributes:
        names: The names of the K elements of the latents.
        ranks: The rank of each true element among draws, as a fraction, ``(M, K)``.
        coverage: The level of the smallest highest-density region that contains the truth, ``(M,)``.
        tarp: The level of the smallest ball around a random point that contains the truth, ``(M,)``.
        rank_p: The p-value of the ranks of each element, ``(K,)``.
        sbc_p: The p-value of all ranks, with Bonferroni's correction.
        coverage_p: The p-value of the coverage.
        tarp_p: The p-value of TARP.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> from pyro_flows.encoders import MLPEncoder
        >>> def model(x=None):
        ...     theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1).to_event(1))
        ...     return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)
        >>> narrow = AutoFlow(model, encoder=MLPEncoder(2, context_dim=8)).setup(torch.zeros(2))  # untrained
        >>> found = calibrate(model, narrow, num_simulations=50, num_samples=20)
        >>> found.ranks.shape, found.coverage.shape, found.calibrated, found.reason[:29]
        (torch.Size([50, 2]), torch.Size([50]), False, 'The draws are not calibrated:')
    """

    names: list[str]
    ranks: Tensor
    coverage: Tensor
    tarp: Tensor
    rank_p: Tensor
    sbc_p: float
    coverage_p: float
    tarp_p: float

    @property
    def calibrated(self) -> bool:
        """True if no p-value is below 0.01 / 3, which holds for exact guides in 99 % of all cases."""
        return min(self.sbc_p, self.coverage_p, self.tarp_p) > LIMIT

    @property
    def reason(self) -> str:
        """The result in words, which names the tests that fail or the share of the truths in regions of 90 %."""
        if self.calibrated:
            inside = 100 * float((self.coverage <= 0.9).double().mean())
            found = f"{inside:.1f} % of the truths lie in regions of 90 %"
            return f"No test finds an error over {len(self.ranks)} datasets; {found}."
        worst = int(self.rank_p.argmin())
        bias = float(self.ranks[:, worst].mean()) - 0.5
        spread = float((2 * self.ranks[:, worst] - 1).abs().mean()) - 0.5
        side = "low" if bias > 0 else "high"
        how = f"too {side}" if abs(bias) > abs(spread) else "too narrow" if spread > 0 else "too wide"
        width = "wide" if self.coverage.mean() < 0.5 else "narrow"
        faults = {
            f"the ranks of {self.names[worst]} are not uniform, since its draws lie {how}": self.sbc_p,
            f"{_share(self.coverage)}, since the draws lie too {width}": self.coverage_p,
            f"by TARP {_share(self.tarp)}": self.tarp_p,
        }
        return f"The draws are not calibrated: {'; '.join(fault for fault, p in faults.items() if p <= LIMIT)}."

    def plot(self) -> Any:
        """Plot the three tests with :func:`pyro_flows.plots.calibration`."""
        return plots.calibration(self)

    def __repr__(self) -> str:
        return (
            f"Calibration(calibrated={self.calibrated}, sbc_p={self.sbc_p:.3g}, coverage_p={self.coverage_p:.3g}, "
            f"tarp_p={self.tarp_p:.3g}): {self.reason}"
        )


@runs_programs
@torch.no_grad()
@unjudged()
def calibrate(
    model: Function, guide: Any, *args: Any, num_simulations: int = 1000, num_samples: int = 500, **kwargs: Any
) -> Calibration:
    """Test the calibration of an amortised guide on new simulations of the model.

    Over simulated datasets, the true latents and the guide's draws must have the same distribution:

    * *Ranks*: the rank of the truth among draws is uniform (Talts, Betancourt, Simpson, Vehtari, Gelman 2018,
      arXiv:1804.06788).
    * *Coverage*: highest-density regions of level γ contain the truth for a fraction γ of the datasets (Hermans et al.
      2021, arXiv:2110.06581).
    * *TARP*: so do balls of level γ around points that do not depend on the truth (Lemos, Coogan, Hezaveh,
      Perreault-Levasseur 2023, arXiv:2302.03026).

    The tests average over data from the prior predictive distribution.  A guide that ignores the data and returns the
    prior passes them too.

    Args:
        model: A Pyro model that takes its data by arguments, as for :func:`~pyro_flows.fit_amortized`.
        guide: An ``AutoFlow`` with an encoder, or an ``AutoPlateFlow`` with a ``global_encoder``; of its rows, one at
            random counts for each dataset.
        *args: The model's arguments without the data.
        num_simulations: The number M of datasets, at least 20.
        num_samples: The number of draws per dataset, at least 20.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.diagnostics.Calibration`.

    Raises:
        ValueError: If a number is out of its range, or the guide is not amortised or is untrained.  If the model cannot
            be simulated, as for :func:`~pyro_flows.simulate`, or has other latents than the guide.

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
        >>> calibrate(model, guide, num_simulations=200, num_samples=50).ranks.shape
        torch.Size([200, 2])
    """
    check_integers("calibrate", 20, num_simulations=num_simulations, num_samples=num_samples)
    simulator = simulator_of("calibrate", model, guide, args, kwargs)
    known = simulator.draw(num_simulations)
    check_model(guide, simulator, known.row(0))
    parts = []
    for rows in torch.arange(num_simulations).split(max(1, 100_000 // num_samples)):
        some = known.take(rows)
        posterior = posteriors(guide, simulator, some.data)
        parts.append(_compare(posterior, some.latents, num_samples))
    ranks, coverage, truth, draws = map(torch.cat, zip(*parts, strict=True))
    tarp = _tarp(truth, draws)
    rank_p = torch.tensor([uniformity(column, num_samples) for column in ranks.T], dtype=torch.float64)
    sbc_p = min(1.0, float(rank_p.min()) * len(rank_p))
    coverage_p, tarp_p = uniformity(coverage, num_samples), uniformity(tarp, num_samples)
    return Calibration(posterior.labels, ranks, coverage, tarp, rank_p, sbc_p, coverage_p, tarp_p)


def _compare(posterior: OfDatasets, latents: dict[str, Tensor], num_samples: int) -> tuple[Tensor, ...]:
    """Place the truths of M datasets among S draws.

    Returns:
        Ranks ``(M, K)``, coverage ``(M,)``, and the unconstrained truths ``(M, D)`` and draws ``(M, S, D)``.
    """
    truths, draws = posterior.pick(latents), posterior.sample(num_samples)
    truth, z = posterior.pack(truths)[0], posterior.pack(draws)[0]
    ranks = torch.cat([(draws[n] < t).double().mean(0).reshape(len(truth), -1) for n, t in truths.items()], 1)
    higher = posterior.log_prob(draws) > posterior.log_prob(truths)
    return ranks, higher.double().mean(0), truth, z.transpose(0, 1)


def _share(levels: Tensor) -> str:
    """Return words for the share of truths in regions of 90 %, or of 50 % if that share is further off."""

    def excess(level: float) -> float:
        return float((levels <= level).double().mean()) - level

    noise = 0.3 / len(levels) ** 0.5  # the standard deviation of the share in regions of 90 %
    level = 0.9 if abs(excess(0.9)) > min(3 * noise, abs(excess(0.5))) else 0.5
    return f"{100 * (level + excess(level)):.1f} % of the truths lie in regions of {100 * level:.0f} %"


def _tarp(truth: Tensor, draws: Tensor) -> Tensor:
    """Return the fraction of draws that are closer than the truth to the truth of another dataset, ``(M,)``.

    Distances are in standard deviations of the truth.
    """
    scale = truth.std(0)
    other = truth.roll(int(torch.randint(1, len(truth), ())), 0)
    nearer = ((draws - other[:, None]) / scale).norm(dim=-1) < ((truth - other) / scale).norm(dim=-1)[:, None]
    return nearer.double().mean(1)


def uniformity(shares: Tensor, num_samples: int) -> float:
    """Return the p-value of the hypothesis that fractions of ``num_samples`` draws, ``(M,)``, are uniform.

    A fraction has S + 1 equally likely values; noise within these steps makes it continuous.
    """
    from scipy import stats

    steps = shares * num_samples
    u = ((steps + torch.rand_like(steps)) / (num_samples + 1)).cpu().numpy()
    return min(1.0, 2 * min(float(stats.kstest(part, "uniform").pvalue) for part in (u, abs(2 * u - 1))))
