"""Modes and evidence: a population annealed from the prior, and a guide that covers whatever modes it has found.

The population finds modes and what each weighs (:mod:`pyro_flows.sampling.population`).  A mixture of Gaussians at the
modes becomes the base of a flow, which is trained on the particles, then by the ELBO.  Draws of that guide, weighed,
are better than the particles where the weights are reliable: their evidence has less noise, and so have the modes'
weights.  Where they are not, or see less evidence than the population, the particles stand.

Sequential Monte Carlo Samplers (Del Moral, Doucet, Jasra 2006); Annealed Flow Transport Monte Carlo (Arbel, Matthews,
Doucet 2021, arXiv:2102.07501).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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
ENOUGH_ESS = 0.9  # the effective share of draws at which nothing is left to train
EPOCHS, GENTLE = 50, 0.003  # of training on the particles; the step size of the ELBO over a base with modes
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
        fit: The record of its fit; None if there was nothing to train.
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
    weighed, record = None, None
    if fit:
        weighed, record = _fitted(task, model, tops, {"progress": progress, "vectorize": vectorize})
    with pyro.validation_enabled(False):
        return _summed_up(space, tops, weighed, record, start)


class _Weighed(NamedTuple):
    """Draws of a guide, weighed."""

    guide: AutoFlow
    z: Tensor
    log_weights: Tensor
    psis: Psis


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


def _fitted(task: Task, model: Callable[..., Any], tops: Tops, settings: dict[str, Any]) -> tuple[_Weighed, Fit | None]:
    """A guide that covers the modes, weighed, and the record of its fit.

    Where the Gaussians at the modes are as good as the posterior already, there is nothing to train.  Where training
    makes weights worse, as it may over a base of many modes, the start is kept.
    """
    args, kwargs = task.model.args, task.model.kwargs
    guide = _started(model, tops, args, kwargs)
    has_modes = isinstance(guide.flow.base, ModesBase)
    start = _weighed(model, guide, task) if has_modes else None
    if start and start.psis.reliable and start.psis.ess > ENOUGH_ESS * DRAWS:
        return start, None
    guide = copy.deepcopy(guide)
    if has_modes or guide.has_circles:
        picked = tops.population.log_weights.double().exp().multinomial(len(tops.labels), replacement=True)
        rows = tops.population.z[picked]
        fit_density(guide.flow, rows, standardize=False, max_epochs=EPOCHS, patience=5, lr=1e-3, progress=False)
    fit = fit_svi(
        model, guide, *args, warm_start=False, lr=GENTLE if has_modes else None, model_kwargs=kwargs, **settings
    )
    trained = _weighed(model, guide, task)
    if start and (start.psis.log_evidence_se, start.psis.khat) < (trained.psis.log_evidence_se, trained.psis.khat):
        return start, None
    return trained, fit


def _started(model: Callable[..., Any], tops: Tops, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AutoFlow:
    """A guide whose base has the modes, if there are several, in coordinates in which the population is white."""
    guide, number = AutoFlow(model).setup(*args, **kwargs), len(tops.places)
    if guide.has_circles:
        return guide
    chart = White(tops.population.z, tops.population.log_weights.exp())
    if number > 1:
        guide = AutoFlow(model, default_flow, base=partial(ModesBase, num_components=2 * number)).setup(*args, **kwargs)
        _set_modes(guide, tops, chart)
    guide.start_at(chart.loc, chart.scale_tril)
    return guide


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


def _weighed(model: Callable[..., Any], guide: AutoFlow, task: Task) -> _Weighed:
    """Weigh a guide's draws."""
    args, kwargs = task.model.args, task.model.kwargs
    with pyro.validation_enabled(False):
        draws = sound_space(Task(model, guide, args, kwargs, task.model.engine)).draw(DRAWS)
    psis = weigh(draws.log_p - draws.log_q)
    return _Weighed(guide, draws.z, psis.smoothed.to(draws.z), psis)


def _summed_up(space: Space, tops: Tops, weighed: _Weighed | None, fit: Fit | None, start: float) -> Annealed:
    """The better of the guide's weighed draws and the population."""
    population, number = tops.population, len(tops.places)
    z, log_weights = population.z, population.log_weights
    log_evidence, noise = population.log_evidence, population.log_evidence_se
    shares = [population.share(tops.labels == k) for k in range(number)]
    is_weighed = weighed is not None and _covers(weighed.psis, population)
    if weighed and is_weighed:
        z, log_weights = weighed.z, weighed.log_weights
        log_evidence, noise = weighed.psis.log_evidence, weighed.psis.log_evidence_se
        labels, weights = tops.label(z), log_weights.exp()
        inside = [weights * (labels == k) for k in range(number)]
        shares = [(float(w.sum()), float((w - w.sum() * weights).norm())) for w in inside]
    place = space.values(torch.stack(tops.places))
    places = [{name: place[name][k] for name in space.task.latents} for k in range(number)]
    modes = [Mode(*share, at, height) for share, at, height in zip(shares, places, tops.heights, strict=True)]
    return Annealed(
        draws=space.values(z),
        log_weights=log_weights,
        log_evidence=log_evidence,
        log_evidence_se=noise,
        modes=sorted(modes, key=lambda mode: -mode.weight),
        guide=weighed.guide if weighed else None,
        fit=fit,
        psis=weighed.psis if weighed else None,
        is_weighed=is_weighed,
        population=population,
        seconds=time.perf_counter() - start,
    )


def _covers(psis: Psis, population: Population) -> bool:
    """Whether a guide's weights are reliable, better than the population, and see no less evidence."""
    short = population.log_evidence - psis.log_evidence
    noise = math.hypot(population.log_evidence_se, psis.log_evidence_se)
    return psis.reliable and psis.log_evidence_se < population.log_evidence_se and short - 3 * noise < LESS
