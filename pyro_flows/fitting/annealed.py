"""Modes, evidence and weighted draws of a posterior, as found by an annealed population."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..diagnostics import Psis
from ..guides import AutoFlow
from ..sampling.annealed_population import Population
from ..training.loop import Fit


@dataclass(frozen=True)
class Mode:
    """A mode of a posterior.

    Attributes:
        weight: Its share of the posterior's mass.
        weight_se: The standard error of the weight.
        place: Its highest place, in the unconstrained space: name of a latent -> its value, ``site_shape``.
        log_density: The posterior's log-density there, over the unconstrained space and not normalised, in nats.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import anneal
        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 1.0))
        >>> (mode,) = anneal(model, num_particles=256, fit=False).modes
        >>> round(mode.weight, 6), round(mode.place["x"].item(), 1)
        (1.0, 3.0)
    """

    weight: float
    weight_se: float
    place: dict[str, Tensor]
    log_density: float


@dataclass(frozen=True)
class Annealed:
    """Modes, evidence and weighted draws of a posterior: the result of :func:`~pyro_flows.anneal`.

    Attributes:
        draws: Weighted draws of latents and deterministic sites: name -> ``(N, *site_shape)``.
        log_weights: Their normalised log-weights, ``(N,)``.
        log_evidence: The log evidence, in nats.
        log_evidence_se: The standard error of the log evidence, in nats.
        modes: The modes, the heaviest first.
        guide: An ``AutoFlow`` that covers the modes, or None if none was asked for.
        fit: The record of its fit; None if no training was needed, or training broke down, as at hard
            edges, or the model has no scores.
        psis: The weights of the guide's draws.
        is_weighed: True if draws and weights of modes come from the guide, False if from the population.
        population: The population, with draws of modes that it had missed.
        seconds: The wall time.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import anneal
        >>> def model():  # x is near 4 or near -4
        ...     x = pyro.sample("x", dist.Normal(0.0, 5.0))
        ...     pyro.sample("y", dist.Normal(x**2, 1.0), obs=torch.tensor(16.0))
        >>> pyro.set_rng_seed(0)
        >>> found = anneal(model, num_particles=512, fit=False)
        >>> len(found.modes), abs(found.modes[0].weight - 0.5) < 0.2, round(abs(found.modes[0].place["x"].item()))
        (2, True, 4)
    """

    draws: dict[str, Tensor]
    log_weights: Tensor
    log_evidence: float
    log_evidence_se: float
    modes: list[Mode]
    guide: AutoFlow | None
    fit: Fit | None
    psis: Psis | None
    is_weighed: bool
    population: Population
    seconds: float

    @property
    def temperatures(self) -> list[float]:
        """The inverse temperatures of the population, from 0 to 1."""
        return self.population.temperatures

    @property
    def ess(self) -> float:
        """The effective sample size of the draws."""
        return float(1 / self.log_weights.double().exp().square().sum())

    def __repr__(self) -> str:
        modes = ", ".join(f"{mode.weight:.3f} ± {mode.weight_se:.3f}" for mode in self.modes[:8])
        more = f", and {len(self.modes) - 8} more" if len(self.modes) > 8 else ""
        return (
            f"Annealed(log_evidence={self.log_evidence:.3f} ± {self.log_evidence_se:.3f}, modes=[{modes}{more}], "
            f"ess={self.ess:.0f} of {len(self.log_weights)}, seconds={self.seconds:.1f})"
        )
