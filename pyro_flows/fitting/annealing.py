"""Modes and evidence: a population annealed from the prior, and a guide that covers whatever modes it has found.

The population finds modes and what each weighs (:mod:`pyro_flows.sampling.population`).  A mixture of Gaussians at the
modes becomes the base of a flow, which is trained on the particles, then by the ELBO.  Draws of that guide, weighed,
are better than the particles where the weights are reliable: their evidence has less noise, and so have the modes'
weights.  Where they are not, or see less evidence than the population, the particles stand.

Sequential Monte Carlo Samplers (Del Moral, Doucet, Jasra 2006); Annealed Flow Transport Monte Carlo (Arbel, Matthews,
Doucet 2021, arXiv:2102.07501).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..checks import check_flags, check_integers, joined
from ..diagnostics import Psis
from ..diagnostics.importance import weigh
from ..distributions import ModesBase
from ..guides import AutoFlow
from ..guides.recipe import default_flow
from ..programs.log_density import or_nan
from ..programs.nesting import takes_nesting
from ..programs.space import Space, sound_space
from ..programs.task import Task
from ..sampling.charts import White
from ..sampling.modes import climb, components
from ..sampling.population import ISLANDS, Effort, Population
from ..sampling.population import anneal as anneal_population
from ..sampling.reference import Reference
from ..training.loop import Fit
from .density import fit_density
from .svi import fit_svi

CALLER = "anneal"
ENOUGH = 5  # particles a dimension that a mode's own covariance takes
DRAWS = 20_000  # draws of the guide that are weighed
WIDER = 2.0, 0.1  # each Gaussian has one beside it that is as much wider, with a share
LESS = 0.1  # nats of evidence by which the guide may fall short of the population


@dataclass(frozen=True)
class Mode:
    """A mode of a posterior.

    Attributes:
        weight: Its share of the posterior's mass.
        weight_se: The standard error of that.
        place: Where it is highest, in the unconstrained space: name of a latent -> its value, ``site_shape``.
        log_density: The posterior's log-density there, over the unconstrained space and not normalised, in nats.
    """

    weight: float
    weight_se: float
    place: dict[str, Tensor]
    log_density: float


@dataclass(frozen=True)
class Annealed:
    """Modes, evidence and weighted draws of a posterior: the result of :func:`anneal`.

    Attributes:
        draws: Weighted draws of latents and deterministic sites: name -> ``(N, *site_shape)``.
        log_weights: Their log-weights, normalised, ``(N,)``.
        log_evidence: The log evidence, in nats.
        log_evidence_se: Its standard error, in nats.
        modes: The modes, the heaviest first.
        guide: An ``AutoFlow`` that covers them, or None if none was asked for.
        fit: The record of its fit.
        psis: How the guide's draws weigh.
        is_weighed: Whether draws, evidence and weights of modes come from the guide; else they are the population's.
        population: The population itself.
        seconds: The wall time.

    Example::

        >>> import pyro
        >>> import pyro.distributions as dist
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


@takes_nesting
def anneal(
    model: Callable[..., Any],
    *args: Any,
    num_particles: int = 2048,
    fit: bool = True,
    progress: bool = True,
    vectorize: str = "auto",
    max_plate_nesting: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Annealed:
    """Find the modes of a posterior, what each weighs, and the evidence.

    Particles start as draws of the prior, or of a wide Gaussian where the prior is flat, and are annealed to the
    posterior p(z | x) in steps of temperature (Del Moral, Doucet, Jasra 2006)::

        r(z)¹⁻ᵝ p(z, x)ᵝ,    β from 0 to 1

    At each they are weighed, resampled on 16 islands, and moved by Hamiltonian Monte Carlo, with steps that the
    population learns.  Places from which climbs lead to one connected top are one mode.  Then an :class:`AutoFlow` is
    built over a base with these modes and fitted, to the particles and by the ELBO.

    Args:
        model: A Pyro model; discrete latents of finite support are summed out.
        *args: The model's arguments.
        num_particles: The number of particles, rounded up to a multiple of 16: more find smaller modes.
        fit: Whether to fit a guide.
        progress: Whether to show the progress bars of its fit.
        vectorize: The way to run many draws: ``"plate"``, ``"vmap"`` or ``"loop"``; by default the first of these that
            does to draws what single runs do (*Any Pyro program* in the docs).
        max_plate_nesting: How many dimensions the plates of the model take; by default what one run shows.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Returns:
        The :class:`~pyro_flows.Annealed`.

    Raises:
        ValueError: If a number is out of its range, the model is one that ``AutoFlow`` refuses, or hardly a draw of the
            prior has a density.

    Warns:
        UserWarning: If the model runs one draw at a time, or its log-density is an estimate whose noise shows.

    Example::

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> pyro.set_rng_seed(0)
        >>> found = anneal(model, torch.tensor(2.0), num_particles=512, fit=False)
        >>> abs(found.log_evidence + 2.27) < 5 * found.log_evidence_se  # log Normal(2; 0, 2**0.5)
        True
    """
    start, kwargs = time.perf_counter(), joined(CALLER, kwargs, model_kwargs)
    check_integers(CALLER, ISLANDS * 4, num_particles=num_particles)
    check_flags(CALLER, fit=fit, progress=progress)
    first = AutoFlow(model).setup(*args, **kwargs)
    task = Task(model, first, args, kwargs, vectorize)
    number = -(-num_particles // ISLANDS) * ISLANDS
    with pyro.validation_enabled(False):
        space = sound_space(task)
        population = anneal_population(Reference(space, first.start[0]), number, Effort())
        if population is None:
            raise ValueError(f"{CALLER}: hardly a draw of the prior has a density; is the model's density finite?")
        tops = Tops(space, population)
    guide, record, weighed = None, None, None
    if fit:
        guide, record = _fitted(model, tops, args, kwargs, {"progress": progress, "vectorize": vectorize})
        with pyro.validation_enabled(False):
            weighed = _weighed(Task(model, guide, args, kwargs, vectorize))
    return _summed_up(space, tops, weighed, guide, record, start)


class Tops:
    """The modes that a population has found.

    Args:
        space: The space of a guide that draws packed, unconstrained latents.
        population: The population.

    Attributes:
        labels: The mode of each particle, ``(N,)``.
        places: Where each mode is highest, ``(K, D)``.
        laws: A Gaussian around each.
    """

    def __init__(self, space: Space, population: Population) -> None:
        self.space, self.population = space, population
        density, z = or_nan(space.log_p), population.z
        chart = White(z, population.log_weights.exp())
        ends = torch.cat([climb(density, chart, part) for part in z.split(1024)])
        self.labels = components(density, chart, ends)
        with torch.no_grad():
            heights = density(ends).nan_to_num(-math.inf, math.inf, -math.inf)
        self.places, self.heights = [], []
        for label in range(int(self.labels.max()) + 1):
            mine = heights.where(self.labels == label, -math.inf)
            self.places.append(ends[int(mine.argmax())])
            self.heights.append(float(mine.max()))
        self.weights = torch.tensor([population.share(self.labels == k)[0] for k in range(len(self.places))]).to(z)
        self.laws = self._gaussians(z)

    def _gaussians(self, z: Tensor) -> MultivariateNormal:
        """A Gaussian around each mode; modes of few particles share what is known of all."""
        weights, dim = self.population.log_weights.exp(), z.shape[1]
        loc = torch.stack([White(z[self.labels == k]).loc for k in range(len(self.places))])
        pooled = White(z - loc[self.labels], weights).scale_tril
        factors = []
        for k in range(len(loc)):
            mine = self.labels == k
            factors.append(White(z[mine], weights[mine]).scale_tril if mine.sum() > ENOUGH * dim else pooled)
        return MultivariateNormal(loc, scale_tril=torch.stack(factors))

    def label(self, z: Tensor) -> Tensor:
        """The mode that each of other vectors most likely belongs to, ``(N,)``."""
        if len(self.places) == 1:
            return torch.zeros(len(z), dtype=torch.long)
        return torch.cat(
            [(self.laws.log_prob(part.unsqueeze(1)) + self.weights.log()).argmax(-1) for part in z.split(1000)]
        )


def _fitted(
    model: Callable[..., Any], tops: Tops, args: tuple[Any, ...], kwargs: dict[str, Any], settings: dict[str, Any]
) -> tuple[AutoFlow, Fit]:
    """A guide over a base with the modes, trained on the particles and then by the ELBO."""
    population, number = tops.population, len(tops.places)
    picked = population.log_weights.double().exp().multinomial(len(population.z), replacement=True)
    z = population.z[picked]
    guide = AutoFlow(model).setup(*args, **kwargs)
    if not guide.has_circles:
        chart = White(population.z, population.log_weights.exp())
        if number > 1:
            base = partial(ModesBase, num_components=2 * number)
            guide = AutoFlow(model, default_flow, base=base).setup(*args, **kwargs)
        guide.start_at(chart.loc, chart.scale_tril)
        if number > 1:
            _set_modes(guide, tops, chart)
    if number > 1 or guide.has_circles:
        fit_density(guide.flow, z, standardize=False, max_epochs=50, patience=5, lr=3e-3, progress=False)
    fit = fit_svi(model, guide, *args, warm_start=False, model_kwargs=kwargs, **settings)
    return guide, fit


@torch.no_grad()
def _set_modes(guide: AutoFlow, tops: Tops, chart: White) -> None:
    """Put the base's components at the modes, in coordinates in which the population is white."""
    wider, share = WIDER
    loc = chart.inverse(tops.laws.loc)
    factor = torch.linalg.solve_triangular(chart.scale_tril, tops.laws.scale_tril, upper=False)
    base = guide.flow.base
    assert isinstance(base, ModesBase)
    weights = tops.weights.clamp_min(1e-4)
    base.set(
        torch.cat((loc, loc)), torch.cat((factor, wider * factor)), torch.cat(((1 - share) * weights, share * weights))
    )


@dataclass(frozen=True)
class _Weighed:
    """Draws of the guide, weighed."""

    z: Tensor
    log_weights: Tensor
    psis: Psis


def _weighed(task: Task) -> _Weighed:
    draws = sound_space(task).draw(DRAWS)
    psis = weigh(draws.log_p - draws.log_q)
    return _Weighed(draws.z, psis.log_weights.log_softmax(0), psis)


def _summed_up(
    space: Space, tops: Tops, weighed: _Weighed | None, guide: AutoFlow | None, fit: Fit | None, start: float
) -> Annealed:
    """The better of the guide's weighed draws and the population."""
    population, psis = tops.population, weighed.psis if weighed else None
    log_evidence, noise = population.log_evidence, population.log_evidence_se
    z, log_weights, is_weighed = population.z, population.log_weights, False
    shares = [population.share(tops.labels == k) for k in range(len(tops.places))]
    if weighed and psis and psis.reliable:
        short = log_evidence - psis.log_evidence
        if short - 3 * math.hypot(noise, psis.log_evidence_se) < LESS:
            log_evidence, noise, is_weighed = psis.log_evidence, psis.log_evidence_se, True
            z, log_weights = weighed.z, weighed.log_weights
            labels, weights = tops.label(z), log_weights.exp()
            inside = [weights * (labels == k) for k in range(len(tops.places))]
            shares = [(float(w.sum()), float((w - w.sum() * weights).norm())) for w in inside]
    place = space.values(torch.stack(tops.places))
    latents = space.task.latents
    modes = [
        Mode(*shares[k], {name: place[name][k] for name in latents}, tops.heights[k]) for k in range(len(tops.places))
    ]
    modes.sort(key=lambda mode: -mode.weight)
    values = space.values(z)
    seconds = time.perf_counter() - start
    return Annealed(values, log_weights, log_evidence, noise, modes, guide, fit, psis, is_weighed, population, seconds)
