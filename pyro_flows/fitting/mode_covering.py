"""A guide that covers all modes of a posterior, and the evidence, from a population that has found them.

The population finds modes and what each weighs (:mod:`pyro_flows.sampling.population`).  A mixture of Gaussians at the
modes becomes the base of a flow, which is trained on the particles, then by the ELBO.  Draws of that guide, weighed,
are better than the particles where the weights are reliable: their evidence has less noise, and so have the modes'
weights.  Where they are not, or see less evidence than the population, the particles stand.  Where weights may mislead,
the particles move on as chains in the guide's coordinates, and both kinds of draws together give the evidence.

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
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from ..diagnostics import Psis
from ..diagnostics.importance import weigh
from ..distributions import ModesBase
from ..guides import AutoFlow
from ..programs.latent_space import LatentSpace, sound_space
from ..programs.log_density import or_nan
from ..programs.task import Task
from ..sampling.bridge import bridge, moved_on
from ..sampling.mixture import ROUNDS
from ..sampling.mode_mixture import Tops
from ..sampling.modes import SOME, ways_up
from ..sampling.population import ISLANDS, Effort, Population, anneal
from ..sampling.start_distribution import Reference
from ..training import distributed
from ..training.loop import Fit
from ..transforms import FixedAffine
from .density import fit_density

DRAWS = 20_000  # draws of the guide that are weighed
BATCH = 4096  # draws whose values are computed at once
ENOUGH_ESS = 0.9  # the effective share of draws at which nothing is left to train
EPOCHS, GENTLE = 50, 0.003  # of training on the particles; the step size of the ELBO over a base with modes
CONVERGES = 0.5  # k-hat below which the weights have a variance, and their mean an error that can be known
CLEAR = 0.3  # k-hat below which draws of the guide alone tell the evidence
SURPRISE = 3.0  # nats by which the posterior exceeds a guide that has too little at a particle
LACKS = 0.02  # the share of the population at which a guide may have too little
LESS = 0.1  # nats of evidence by which the guide may fall short of the population


@dataclass(frozen=True)
class Mode:
    """A mode of a posterior.

    Attributes:
        weight: Its share of the posterior's mass.
        weight_se: The standard error of that.
        place: Where it is highest, in the unconstrained space: name of a latent -> its value, ``site_shape``.
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
        log_weights: Their log-weights, normalised, ``(N,)``.
        log_evidence: The log evidence, in nats.
        log_evidence_se: Its standard error, in nats.
        modes: The modes, the heaviest first.
        guide: An ``AutoFlow`` that covers them, or None if none was asked for.
        fit: The record of its fit; None if there was nothing to train, or training broke down, as at hard edges.
        psis: How the guide's draws weigh.
        is_weighed: Whether draws and weights of modes come from the guide; else they are the population's.
        population: The population itself, with draws of modes that it had missed.
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
        """The inverse temperatures that the population went through, from 0 to 1."""
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
    """Anneal a population to a posterior, and cover what it has found by a guide.

    Args:
        task: The model, and an ``AutoFlow`` of it, which need not be trained.
        number: The number of particles, rounded up to a multiple of 16.
        fit_once: Fits a guide, ``fit_once(guide, **settings)``; None to have none.
        starts: Places to look for modes from that particles may miss, ``(n, D)``.

    Raises:
        ValueError: If hardly a draw of the prior has a density.
    """
    start, guide = time.perf_counter(), task.guide.call
    assert isinstance(guide, AutoFlow)
    with pyro.validation_enabled(False):
        space = sound_space(task)
        reference = Reference(space, guide.start[0])

        def found() -> tuple[Population | None, Tensor]:
            population = anneal(reference, -(-number // ISLANDS) * ISLANDS, Effort())
            return population, ways_up(or_nan(space.log_p), reference.draw(SOME))

        population, others = distributed.broadcast(found)
        distributed.sync()
        if population is None:
            raise ValueError("anneal: hardly a draw of the prior has a density; is the model's density finite?")
        tops = Tops(space, population, others if starts is None else torch.cat((others, starts)))
    weighed, fit = _fitted(task, tops, fit_once) if fit_once else (None, None)
    if weighed:  # anew, as the best of some guides owes that to its draws in part
        weighed = _weighed(weighed.guide, task)
    with pyro.validation_enabled(False):
        return _summed_up(task, space, tops, weighed, fit, start)


class _Weighed(NamedTuple):
    """Draws of a guide, weighed."""

    guide: AutoFlow
    z: Tensor
    log_weights: Tensor
    psis: Psis


def _fitted(task: Task, tops: Tops, fit_once: FitOnce) -> tuple[_Weighed, Fit | None]:
    """A guide that covers the modes, weighed, and the record of its fit.

    There is nothing to train where Gaussians at the modes are the posterior already.  Else a flow is trained over these
    modes, and one over a single Gaussian where that may be better: the neck of a funnel looks like a mode.  The best of
    all is kept, since training over a base of many modes may make weights worse.
    """
    start = _balanced(_weighed(_with_modes(task, tops), task), task)
    if start.psis.reliable and start.psis.ess > ENOUGH_ESS * DRAWS:
        return start, None
    found: list[tuple[_Weighed, Fit | None]] = [(start, None)]
    if len(tops.places) > 1 or start.guide.has_circles:  # a flow is uniform over angles at its start
        guide = copy.deepcopy(start.guide)
        _teach(guide, tops.population)
        fit = _trained(fit_once, guide, lr=GENTLE)
        found.append((_balanced(_weighed(guide, task), task), fit))
    if not found[-1][0].psis.reliable or len(found) == 1:
        guide = _placed(task, tops)
        if (fit := _trained(fit_once, guide)) is not None:
            found.append((_weighed(guide, task), fit))
    return min(found, key=lambda one: _quality(one[0], tops.population))


def _teach(guide: AutoFlow, population: Population) -> None:
    """Train a guide's flow on particles."""
    chances = population.log_weights.double().exp()
    rows = population.z[distributed.broadcast(lambda: chances.multinomial(len(chances), replacement=True))]
    with warnings.catch_warnings():  # of values that repeat, as those of resampled particles do
        warnings.simplefilter("ignore", UserWarning)
        fit_density(guide.flow, rows, standardize=False, max_epochs=EPOCHS, patience=5, lr=1e-3, progress=False)


def _trained(fit_once: FitOnce, guide: AutoFlow, **settings: Any) -> Fit | None:
    """Fit a guide by the ELBO; None for a posterior with hard edges, where KL(q || p) is infinite."""
    try:
        return fit_once(guide, warm_start=False, **settings)
    except FloatingPointError:
        return None


def _placed(task: Task, tops: Tops, **settings: Any) -> AutoFlow:
    """Build a guide in coordinates in which the population is white, but for angles."""
    guide = AutoFlow(task.model.call, **settings).setup(*task.model.args, **task.model.kwargs)
    guide.start_at(tops.chart.loc, tops.chart.scale_tril)
    return guide


@torch.no_grad()
def _with_modes(task: Task, tops: Tops) -> AutoFlow:
    """Build a guide whose base has the modes.

    Small components get more than they weigh, so that weighed draws can tell their weights.
    """
    mixture, known = tops.mixture(), task.guide.call
    assert isinstance(known, AutoFlow)
    build = partial(ModesBase, num_components=len(mixture.weights), circular=known.circular)
    guide = _placed(task, tops, base=build)
    base, fixed = guide.flow.base, guide.flow.transforms[-1]
    assert isinstance(base, ModesBase)
    assert isinstance(fixed, FixedAffine)
    scale = fixed.scale if fixed.dense else fixed.scale.diag()
    factor = torch.linalg.solve_triangular(scale, mixture.scale_tril, upper=False)
    base.set(fixed.inverse_and_log_det(mixture.loc)[0], factor, mixture.weights.sqrt())
    return guide


def _space_of(guide: AutoFlow, task: Task) -> LatentSpace:
    model = task.model
    return sound_space(Task(model.call, guide, model.args, model.kwargs, model.engine))


def _weighed(guide: AutoFlow, task: Task) -> _Weighed:
    """Weigh a guide's draws; of several processes all go by what the first has drawn."""

    def drawn() -> tuple[Tensor, Psis]:
        draws = _space_of(guide, task).draw(DRAWS)
        return draws.z, weigh((draws.log_p - draws.log_q).nan_to_num(-math.inf, -math.inf, -math.inf))

    with pyro.validation_enabled(False):
        z, psis = distributed.broadcast(drawn)
        distributed.sync()
    return _Weighed(guide, z, psis.smoothed.to(z), psis)


@torch.no_grad()
def _balanced(weighed: _Weighed, task: Task) -> _Weighed:
    """Give the base's components the shares that reliable weights say: those of a population have more noise."""
    if not weighed.psis.reliable:
        return weighed
    guide, base = weighed.guide, weighed.guide.flow.base
    assert isinstance(base, ModesBase)
    law, u = base(), guide.get_transform(*task.model.args, **task.model.kwargs).inv(weighed.z)
    heights = torch.cat([law.component_distribution.log_prob(part.unsqueeze(1)) for part in u.split(1000)])
    shares = base.logits.softmax(-1)
    for _ in range(ROUNDS):
        chances = (heights + shares.log()).softmax(-1)
        shares = (weighed.log_weights.exp() @ chances).clamp_min(1e-6)
    base.set(base.loc, base.scale_tril, shares)
    return _weighed(guide, task)


def _summed_up(
    task: Task, space: LatentSpace, tops: Tops, weighed: _Weighed | None, fit: Fit | None, start: float
) -> Annealed:
    """The better of the guide's weighed draws and the population."""
    population, number, bridged = tops.population, len(tops.places), None
    is_clear = weighed is None or weighed.psis.even or weighed.psis.khat < CLEAR
    if weighed and not (is_clear or task.runs_one_by_one):
        population, bridged = _bridged(task, weighed, population)
    is_weighed = weighed is not None and _covers(weighed, population)
    if weighed and is_weighed:
        z, log_weights = weighed.z, weighed.log_weights
        log_evidence, noise = weighed.psis.log_evidence, weighed.psis.log_evidence_se
        labels, weights = tops.label(z), log_weights.exp()
        inside = [weights * (labels == k) for k in range(number)]
        shares = [(float(w.sum()), float((w - w.sum() * weights).norm())) for w in inside]
    else:
        z, log_weights = population.z, population.log_weights
        log_evidence, noise = population.log_evidence, population.log_evidence_se
        labels = tops.label(z) if bridged else tops.labels
        shares = [population.share(labels == k) for k in range(number)]
    if bridged and bridged[1] < population.log_evidence_se:
        log_evidence, noise = bridged
    place = space.values(tops.places)
    places = [{name: place[name][k] for name in space.task.latents} for k in range(number)]
    modes = [Mode(*share, at, height) for share, at, height in zip(shares, places, tops.heights.tolist(), strict=True)]
    return Annealed(
        draws=space.drawn_back(z, BATCH),
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


@torch.no_grad()
def _bridged(task: Task, weighed: _Weighed, population: Population) -> tuple[Population, tuple[float, float]]:
    """Move the particles on; return them, and the log evidence with its standard error.

    Only particles know the mass in places where the guide hardly draws, and they may be slow to reach it.  So the error
    includes that mass.
    """
    population = distributed.broadcast(lambda: moved_on(_space_of(weighed.guide, task), population))
    distributed.sync()
    of_p = population.log_p - weighed.guide.flow().log_prob(population.z)
    log_evidence, noise = bridge(population, of_p, weighed.psis.log_weights)
    rare, _ = population.share((of_p - log_evidence).nan_to_num(math.inf) > SURPRISE)
    return population, (log_evidence, math.hypot(noise, rare))


def _quality(weighed: _Weighed, population: Population) -> tuple[bool, bool, float, float]:
    """Return what is small for a good guide: one that lacks a mode may have the least noise of all."""
    lacks, psis = _lacks(weighed, population), weighed.psis
    return lacks or not _converges(psis, population), lacks, psis.log_evidence_se, -psis.ess


def _covers(weighed: _Weighed, population: Population) -> bool:
    """True if a guide's weights converge, and lack none of what the population has found."""
    return _converges(weighed.psis, population) and not _lacks(weighed, population)


def _converges(psis: Psis, population: Population) -> bool:
    """True if weights converge and have less noise than the population."""
    return (psis.even or psis.khat < CONVERGES) and psis.log_evidence_se < population.log_evidence_se


@torch.no_grad()
def _lacks(weighed: _Weighed, population: Population) -> bool:
    """True if a guide falls short of what the population has found."""
    psis = weighed.psis
    short = population.log_evidence - psis.log_evidence
    if short - 3 * math.hypot(population.log_evidence_se, psis.log_evidence_se) >= LESS:
        return True
    surprise = population.log_p - weighed.guide.flow().log_prob(population.z) - psis.log_evidence
    share, noise = population.share(surprise.nan_to_num(math.inf, math.inf, -math.inf) > SURPRISE)
    return share - 2 * noise >= LACKS
