"""A guide that covers all modes of a posterior, and the evidence, from an annealed population.

The population finds the modes and their weights (:mod:`pyro_flows.sampling.annealed_population`).  A mixture of
Gaussians at the modes becomes the base of a flow, which is trained on the particles and then by the ELBO.  If the
weights of this guide's draws are reliable, the draws replace the particles: their evidence and mode weights are less
noisy.  If they are not, or miss evidence that the population has, the particles are kept.  If the weights may mislead,
the particles move on as chains in the guide's coordinates, and bridge sampling combines both kinds of draws to the
evidence.

Sequential Monte Carlo Samplers (Del Moral, Doucet, Jasra 2006); Annealed Flow Transport Monte Carlo (Arbel, Matthews,
Doucet 2021, arXiv:2102.07501).
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import pyro
import torch
from torch import Tensor

from ..diagnostics import Psis
from ..diagnostics.guide_space import prior_of, target_of
from ..diagnostics.importance import weigh
from ..distributions import ModesBase
from ..guides import AutoFlow
from ..programs.density import Density
from ..programs.model_and_guide import Task
from ..sampling.annealed_population import ISLANDS, Effort, Population, anneal, bridge, moved_on
from ..sampling.climbs import SOME, ways_up
from ..sampling.mode_mixture import ROUNDS, ModeMixture
from ..sampling.start_distribution import Reference
from ..training import Training, distributed
from ..training.loop import Fit
from .density import fit_density
from .propriety import check_bounded
from .score_check import NoScore

DRAWS = 20_000  # weighted draws of the guide
BATCH = 4096  # draws per run of the model
ENOUGH_ESS = 0.9  # effective share of the draws from which no training is needed
EPOCHS, GENTLE = 50, 0.003  # of training on the particles; the learning rate of the ELBO over a base with modes
CONVERGES = 0.5  # k-hat below which the weights have a variance, and their mean a known error
CLEAR = 0.3  # k-hat below which draws of the guide alone give the evidence
SURPRISE = 3.0  # nats by which the posterior exceeds the guide at a particle that the guide lacks
LACKS = 0.02  # share of such particles that a guide may have
LESS = 0.1  # nats of evidence by which the guide may fall short of the population


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


FitOnce = Callable[..., Fit | None]


def cover(task: Task, number: int, fit_once: FitOnce | None, starts: Tensor | None = None) -> Annealed:
    """Anneal a population to a posterior, and cover its modes by a guide.

    Args:
        task: The model, and an ``AutoFlow`` of it, trained or not.
        number: The number of particles, rounded up to a multiple of 16.
        fit_once: Fits a guide, ``fit_once(guide, **settings)``; None for no guide.
        starts: Starts of climbs to modes that particles may miss, ``(n, D)``.

    Raises:
        ValueError: If hardly a draw of the prior has a density, or the posterior is detectably improper.
    """
    began, guide = time.perf_counter(), cast(AutoFlow, task.guide.call)
    with pyro.validation_enabled(False):
        space, at = Density.sound(task), guide.start[0]
        reference, number = Reference(prior_of(space), at), -(-number // ISLANDS) * ISLANDS

        def particles() -> tuple[Population | None, Tensor]:
            with torch.random.fork_rng([at.device] if at.is_cuda else []):  # the particles do not depend on the check
                check_bounded("anneal", guide, space, reference.draw(SOME))
            return anneal(reference, number, Effort()), ways_up(space.log_prob, reference.draw(SOME))

        population, others = distributed.broadcast(particles)
        distributed.sync()
        if population is None:
            raise ValueError("anneal: hardly a draw of the prior has a density; is the model's density finite?")
        starts = others if starts is None else torch.cat((others, starts))
        modes = ModeMixture(space.log_prob, space.wrapped, population, starts)
    weighted = _fitted(space.task, modes, fit_once) if fit_once else None
    if weighted:  # the best of several guides is best for its draws in part, so these are replaced
        weighted = _weighted(weighted.guide, space.task, weighted.fit)
    with pyro.validation_enabled(False):
        return _summary(space, modes, weighted, began)


class _Weighted(NamedTuple):
    """A guide with draws z, ``(N, D)``, their weights, and the record of its fit, if it was trained."""

    guide: AutoFlow
    z: Tensor
    psis: Psis
    fit: Fit | None


def _fitted(task: Task, modes: ModeMixture, fit_once: FitOnce) -> _Weighted:
    """Fit a guide that covers the modes, and draw from it.

    If Gaussians at the modes are the posterior already, no training is needed.  Else a flow is trained over these
    modes, and one over a single Gaussian if that may be better: the neck of a funnel looks like a mode.  The best guide
    is kept, since training over a base of many modes may make weights worse.
    """
    start = _balanced(_weighted(_with_modes(task, modes), task), task)
    if start.psis.reliable and start.psis.ess > ENOUGH_ESS * DRAWS:
        return start
    found = [start]
    if len(modes.places) > 1 or start.guide.has_circles:  # a flow starts uniform over angles
        guide = copy.deepcopy(start.guide)
        _teach(guide, modes.population)
        fit = _trained(fit_once, guide, lr=GENTLE)
        found.append(_balanced(_weighted(guide, task, fit), task))
    if not found[-1].psis.reliable or len(found) == 1:
        guide = _at_population(task, modes)
        if (fit := _trained(fit_once, guide)) is not None:
            found.append(_weighted(guide, task, fit))

    def quality(one: _Weighted) -> tuple[bool, bool, float, float]:
        """Return small values for a good guide; one that lacks a mode may have the least noise of all."""
        diverges, lacks = _faults(one, modes.population)
        return diverges or lacks, lacks, one.psis.log_evidence_se, -one.psis.ess

    return min(found, key=quality)


def _teach(guide: AutoFlow, population: Population) -> None:
    """Train a guide's flow on particles."""
    chances = population.log_weights.double().exp()
    rows = population.z[distributed.broadcast(lambda: chances.multinomial(len(chances), replacement=True))]
    with warnings.catch_warnings():  # resampled particles contain copies, which fit_density warns of
        warnings.simplefilter("ignore", UserWarning)
        fit_density(
            guide.flow,
            rows,
            training=Training(standardize=False, patience=5),
            max_epochs=EPOCHS,
            lr=1e-3,
            progress=False,
        )


def _trained(fit_once: FitOnce, guide: AutoFlow, **settings: Any) -> Fit | None:
    """Fit a guide by the ELBO; None for a model without scores, or with hard edges, where KL(q || p) is infinite."""
    try:
        return fit_once(guide, warm_start=False, **settings)
    except (FloatingPointError, NoScore):
        return None


def _at_population(task: Task, modes: ModeMixture, **settings: Any) -> AutoFlow:
    """Build a guide in coordinates in which the population is white, except angles."""
    guide = AutoFlow(task.model.call, **settings).setup(*task.model.args, **task.model.kwargs)
    guide.start_at(modes.white.loc, modes.white.scale_tril)
    return guide


@torch.no_grad()
def _with_modes(task: Task, modes: ModeMixture) -> AutoFlow:
    """Build a guide whose base has the modes.

    Small components get more weight than they have, so that weighted draws estimate it well.
    """
    mixture = modes.mixture()
    circular = cast(AutoFlow, task.guide.call).circular
    build = partial(ModesBase, num_components=len(mixture.weights), circular=circular)
    guide = _at_population(task, modes, base=build)
    base = cast(ModesBase, guide.flow.base)
    divide = partial(torch.linalg.solve_triangular, guide.flow.scale_tril, upper=False)
    places = divide((mixture.loc - guide.flow.fixed.loc).mT).mT
    base.set(places, divide(mixture.scale_tril), mixture.weights.sqrt())
    return guide


def space_of(guide: Any, task: Task) -> Density:
    """Return the latent space of another guide of a task's model."""
    return Density.sound(task.of(guide))


def _weighted(guide: AutoFlow, task: Task, fit: Fit | None = None) -> _Weighted:
    """Draw from a guide and weight the draws; all processes use the draws of the first."""
    with pyro.validation_enabled(False):
        draws = distributed.broadcast(lambda: space_of(guide, task).draw(DRAWS))
        distributed.sync()
    log_weights = (draws.log_p - draws.log_q).nan_to_num(-math.inf, -math.inf, -math.inf)
    return _Weighted(guide, draws.z, weigh(log_weights, "anneal"), fit)


@torch.no_grad()
def _balanced(weighted: _Weighted, task: Task) -> _Weighted:
    """Fit the weights of the base's components to reliably weighted draws, which are less noisy than a population."""
    if not weighted.psis.reliable:
        return weighted
    guide, base = weighted.guide, cast(ModesBase, weighted.guide.flow.base)
    u = guide.get_transform(*task.model.args, **task.model.kwargs).inv(weighted.z)
    heights = torch.cat([base().component_distribution.log_prob(part.unsqueeze(1)) for part in u.split(1000)])
    shares = base.logits.softmax(-1)
    for _ in range(ROUNDS):
        chances = (heights + shares.log()).softmax(-1)
        shares = (weighted.psis.smoothed.to(u).exp() @ chances).clamp_min(1e-6)
    base.set(base.loc, base.scale_tril, shares)
    return _weighted(guide, task, weighted.fit)


def _summary(space: Density, modes: ModeMixture, weighted: _Weighted | None, began: float) -> Annealed:
    """Summarise the guide's weighted draws or the population, whichever is better."""
    population, number, bridged = modes.population, len(modes.places), None
    if weighted and not (weighted.psis.even or weighted.psis.khat < CLEAR or space.task.runs_one_by_one):
        population, bridged = _bridged(space.task, weighted, population)
    source: Psis | Population = population
    if weighted and not any(_faults(weighted, population)):
        source, z, log_weights = weighted.psis, weighted.z, weighted.psis.smoothed.to(weighted.z)
        labels, weights = modes.label(z), log_weights.exp()
        inside = [weights * (labels == k) for k in range(number)]
        shares = [(float(w.sum()), float((w - w.sum() * weights).norm())) for w in inside]
    else:
        z, log_weights = population.z, population.log_weights
        labels = modes.label(z) if bridged else modes.labels
        shares = [population.share(labels == k) for k in range(number)]
    log_evidence, noise = source.log_evidence, source.log_evidence_se
    if bridged and bridged[1] < population.log_evidence_se:
        log_evidence, noise = bridged
    values = space.values(modes.places)
    places = [{name: values[name][k] for name in space.task.latents} for k in range(number)]
    found = [Mode(*share, at, height) for share, at, height in zip(shares, places, modes.heights.tolist(), strict=True)]
    return Annealed(
        draws=space.complete(z, BATCH),
        log_weights=log_weights,
        log_evidence=log_evidence,
        log_evidence_se=noise,
        modes=sorted(found, key=lambda mode: -mode.weight),
        guide=weighted.guide if weighted else None,
        fit=weighted.fit if weighted else None,
        psis=weighted.psis if weighted else None,
        is_weighed=source is not population,
        population=population,
        seconds=time.perf_counter() - began,
    )


@torch.no_grad()
def _bridged(task: Task, weighted: _Weighted, population: Population) -> tuple[Population, tuple[float, float]]:
    """Move the particles on; return them, and the log evidence with its standard error.

    Only particles estimate the mass where the guide rarely draws, and they may be slow to reach it.  So the error
    includes that mass.
    """
    population = distributed.broadcast(lambda: moved_on(target_of(space_of(weighted.guide, task)), population))
    distributed.sync()
    of_p = population.log_p - weighted.guide.flow().log_prob(population.z)
    log_evidence, noise = bridge(population, of_p, weighted.psis.log_weights)
    rare, _ = population.share((of_p - log_evidence).nan_to_num(math.inf) > SURPRISE)
    return population, (log_evidence, math.hypot(noise, rare))


@torch.no_grad()
def _faults(weighted: _Weighted, population: Population) -> tuple[bool, bool]:
    """Return True if a guide's weights are noisier than the population, and True if it lacks mass of the population."""
    psis = weighted.psis
    is_sharp = (psis.even or psis.khat < CONVERGES) and psis.log_evidence_se < population.log_evidence_se
    short = population.log_evidence - psis.log_evidence
    if short - 3 * math.hypot(population.log_evidence_se, psis.log_evidence_se) >= LESS:
        return not is_sharp, True
    surprise = population.log_p - weighted.guide.flow().log_prob(population.z) - psis.log_evidence
    share, noise = population.share(surprise.nan_to_num(math.inf, math.inf, -math.inf) > SURPRISE)
    return not is_sharp, share - 2 * noise >= LACKS
