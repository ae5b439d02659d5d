"""A guide that covers all modes of a posterior, and the evidence, from a population that has found them.

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
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..diagnostics import Psis
from ..diagnostics.importance import weigh
from ..distributions import ModesBase
from ..guides import AutoFlow
from ..guides.recipe import default_flow
from ..programs.log_density import LogDensity, or_nan
from ..programs.space import Space, sound_space
from ..programs.task import Task
from ..sampling.charts import White
from ..sampling.gaussian import Gaussian, match_top
from ..sampling.mixture import ENOUGH as FITTED
from ..sampling.mixture import Mixture
from ..sampling.modes import NARROW, SOME, ascend, climb, components, ways_up
from ..sampling.population import ISLANDS, Effort, Population, anneal
from ..sampling.reference import Reference
from ..training import processes
from ..training.loop import Fit
from .density import fit_density

ENOUGH = 5  # particles a dimension that a mode's own covariance takes
DRAWS, PROBES = 20_000, 1000  # draws of the guide that are weighed, and of each mode without particles
BATCH = 4096  # draws whose values are computed at once
WIDER = 1.5, 0.02  # each mode has a Gaussian that is as much wider, with a share
ENOUGH_ESS = 0.9  # the effective share of draws at which nothing is left to train
EPOCHS, GENTLE = 50, 0.003  # of training on the particles; the step size of the ELBO over a base with modes
CONVERGES = 0.5  # k-hat below which the weights have a variance, and their mean an error that can be known
PARTS = 8  # Gaussians in each mode at most, and half of those in all modes but for one each
OTHERS, LITTLE = 8, 6.0  # modes without particles that are looked at; nats by which they may lie below the evidence
FEW = 0.002  # the share of the particles that a mode must have, to be more than a place where climbs got stuck
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
        fit: The record of its fit; None if there was nothing to train.
        psis: How the guide's draws weigh.
        is_weighed: Whether draws, evidence and weights of modes come from the guide; else they are the population's.
        population: The population itself.
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


def _merged(labels: Tensor, x: Tensor) -> Tensor:
    """Give places of modes with next to no places to those next to them; return labels ``(N,)`` without gaps."""
    counts = labels.bincount()
    kept = (counts >= min(float(counts.max()), max(2.0, FEW * len(labels))))[labels]
    if not bool(kept.all()):
        labels = labels.clone()
        labels[~kept] = labels[kept][torch.cdist(x[~kept], x[kept]).argmin(-1)]
    return labels.unique(return_inverse=True)[1]


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
        population = processes.first(lambda: anneal(reference, -(-number // ISLANDS) * ISLANDS, Effort()))
        processes.as_one()
        if population is None:
            raise ValueError("anneal: hardly a draw of the prior has a density; is the model's density finite?")
        others = ways_up(or_nan(space.log_p), reference.draw(SOME))
        tops = Tops(space, population, others if starts is None else torch.cat((others, starts)))
    weighed, fit = _fitted(task, tops, fit_once) if fit_once else (None, None)
    with pyro.validation_enabled(False):
        return _summed_up(space, tops, weighed, fit, start)


class _Weighed(NamedTuple):
    """Draws of a guide, weighed."""

    guide: AutoFlow
    z: Tensor
    log_weights: Tensor
    psis: Psis


class Tops:
    """The modes that a population has found, and others, in which it has no particles.

    Args:
        space: The space of a guide that draws packed, unconstrained latents.
        population: The population.
        starts: Places from which climbs look for other modes, ``(n, D)``.

    Attributes:
        labels: The mode of each particle, ``(N,)``.
        places: Where each mode is highest, ``(K, D)``.
        heights: The log-density there, ``(K,)`` in nats.
        laws: A Gaussian around each.
        weights: About what each weighs, ``(K,)``, relative to the population.
    """

    def __init__(self, space: Space, population: Population, starts: Tensor) -> None:
        centre, density = _opposite_the_gap(space, population.z), or_nan(space.log_p)
        z = space.wrapped(population.z, centre)
        self.population = population = population._replace(z=z)
        chart = White(z, population.log_weights.exp())
        ends = space.wrapped(torch.cat([ascend(density, chart, part) for part in z.split(1024)]), centre)
        self.labels = _merged(components(density, chart, ends), chart.inverse(ends))
        with torch.no_grad():
            heights = density(ends).nan_to_num(-math.inf, math.inf, -math.inf)
        tops = [int(heights.where(self.labels == k, -math.inf).argmax()) for k in range(int(self.labels.max()) + 1)]
        places, laws, self._own = list(ends[tops]), self._gaussians(), len(tops)
        weights = [population.share(self.labels == k)[0] for k in range(len(tops))]
        more = space.wrapped(climb(density, chart, starts, NARROW), centre)
        for top in _others(density, chart, ends[tops], torch.cat((more, ends[tops]))):
            found = match_top(density, top, chart.scale_tril)
            if found is not None and self._lacks(found):
                places.append(top)
                laws.append((found.loc, found.scale_tril))
                weights.append(math.exp(found.elbo - population.log_evidence))
        self.places, self.weights = torch.stack(places), torch.tensor(weights).to(z)
        with torch.no_grad():
            self.heights = density(self.places)
        loc, scale_tril = (torch.stack(list(part)) for part in zip(*laws, strict=True))
        self.laws = MultivariateNormal(loc, scale_tril=scale_tril)

    def _lacks(self, found: Gaussian) -> bool:
        """Whether a mode has mass that counts and next to no particles."""
        apart = self.population.z - found.loc
        distance = torch.linalg.solve_triangular(found.scale_tril, apart.T, upper=False).norm(dim=0)
        share, _ = self.population.share(distance < math.sqrt(len(found.loc)) + 3)
        mass = found.elbo - self.population.log_evidence
        return mass > -LITTLE and share < math.exp(min(mass, 0.0)) / 4

    def _gaussians(self) -> list[tuple[Tensor, Tensor]]:
        """A Gaussian around the particles of each mode; modes of few of them share what is known of all."""
        z, log_weights = self.population.z, self.population.log_weights
        parts = [self.labels == k for k in range(int(self.labels.max()) + 1)]
        within = [White(z[mine], (log_weights[mine] - log_weights[mine].max()).exp()) for mine in parts]
        loc = torch.stack([white.loc for white in within])
        pooled = White(z - loc[self.labels], log_weights.exp()).scale_tril
        enough = [int(mine.sum()) > ENOUGH * z.shape[1] for mine in parts]
        factors = [white.scale_tril if known else pooled for white, known in zip(within, enough, strict=True)]
        return list(zip(loc, factors, strict=True))

    def mixture(self) -> Mixture:
        """Gaussians for the base of a guide: some for each mode, fitted to its particles, and a wider one."""
        own, population, (wider, share) = self._own, self.population, WIDER
        loc, factor, weights = self.laws.loc, self.laws.scale_tril, self.weights.clamp_min(1e-4)
        most = len(population.z) // (own * FITTED * loc.shape[1])
        number = max(1, min(PARTS, 2 * PARTS // own, most))
        parts = [(loc[:own], factor[:own])]  # at the mode's mean, others at particles of the mode
        for _ in range(number - 1):
            chances = torch.stack([self.labels == k for k in range(own)]).double()
            parts.append((population.z[chances.multinomial(1).squeeze(-1)], factor[:own] / 2))
        locs, factors = (torch.cat(list(part)) for part in zip(*parts, strict=True))
        seen = Mixture(locs, factors, weights[:own].repeat(number) / number)
        seen = seen.fitted(population.z, population.log_weights.exp()) if number > 1 else seen
        return Mixture(
            torch.cat((seen.loc, loc[own:], loc)),
            torch.cat((seen.scale_tril, factor[own:], wider * factor)),
            torch.cat((seen.weights, weights[own:], share * weights)),
        )

    @torch.no_grad()
    def together(self, density: LogDensity) -> tuple[Tensor, Tensor, float, float, list[tuple[float, float]]]:
        """The particles and weighed draws of the modes that have none: places and log-weights, normalised, the log
        evidence and its standard error, and what each mode weighs, with its standard error."""
        population, own = self.population, self._own
        shares = [population.share(self.labels == k) for k in range(own)]
        if own == len(self.places):
            summary = population.log_evidence, population.log_evidence_se
            return population.z, population.log_weights, *summary, shares
        z, log_weights, noises = [population.z], [population.log_weights.double() + population.log_evidence], []
        for k in range(own, len(self.places)):
            law = MultivariateNormal(self.laws.loc[k], scale_tril=self.laws.scale_tril[k])
            x = law.sample(torch.Size((PROBES,)))
            found = (density(x) - law.log_prob(x)).where(self.label(x) == k, -math.inf).double()
            weights = found.nan_to_num(-math.inf, -math.inf, -math.inf).softmax(0)
            noises.append(float((weights - 1 / PROBES).norm()))
            z.append(x)
            log_weights.append(found.nan_to_num(-math.inf, -math.inf, -math.inf) - math.log(PROBES))
        log_evidence = float(torch.cat(log_weights).logsumexp(0))
        masses = [math.exp(float(part.logsumexp(0)) - log_evidence) for part in log_weights]
        shares = [(masses[0] * share, masses[0] * noise) for share, noise in shares]
        shares += [(mass, mass * noise) for mass, noise in zip(masses[1:], noises, strict=True)]
        noise = math.hypot(masses[0] * population.log_evidence_se, *(noise for _, noise in shares[own:]))
        return torch.cat(z), (torch.cat(log_weights) - log_evidence).to(z[0]), log_evidence, noise, shares

    def label(self, z: Tensor) -> Tensor:
        """The mode that each of other vectors most likely belongs to, ``(N,)``."""
        if len(self.places) == 1:
            return torch.zeros(len(z), dtype=torch.long, device=z.device)
        return torch.cat(
            [(self.laws.log_prob(part.unsqueeze(1)) + self.weights.log()).argmax(-1) for part in z.split(1000)]
        )


def _opposite_the_gap(space: Space, z: Tensor) -> Tensor:
    """The angle, in each coordinate, that lies opposite to the largest gap between those of places, ``(D,)``."""
    ordered = space.wrapped(z, torch.zeros_like(z[0])).sort(0).values
    gaps = torch.cat((ordered[1:], ordered[:1] + 2 * math.pi)) - ordered
    largest = gaps.argmax(0, keepdim=True)
    return (ordered.gather(0, largest) + gaps.gather(0, largest) / 2).squeeze(0) + math.pi


@torch.no_grad()
def _others(density: LogDensity, chart: White, tops: Tensor, ends: Tensor) -> list[Tensor]:
    """The highest of some places, each ``(D,)``, of the modes without and with one of the given tops."""
    heights = density(ends).nan_to_num(-math.inf, -math.inf, -math.inf)
    ends, heights = ends[heights.isfinite()], heights[heights.isfinite()]
    labels = components(density, chart, torch.cat((tops, ends)))
    known, labels = labels[: len(tops)], labels[len(tops) :]
    found = [int(heights.where(labels == label, -math.inf).argmax()) for label in labels.unique()]
    found.sort(key=lambda top: -float(heights[top]))
    is_known = [bool((known == labels[top]).any()) for top in found]
    kinds = ([top for top, old in zip(found, is_known, strict=True) if old == kind] for kind in (False, True))
    return [ends[top] for tops in kinds for top in tops[:OTHERS]]


def _fitted(task: Task, tops: Tops, fit_once: FitOnce) -> tuple[_Weighed, Fit | None]:
    """A guide that covers the modes, weighed, and the record of its fit.

    Where Gaussians at the modes are as good as the posterior already, there is nothing to train.  Where training makes
    weights worse, as it may over a base of many modes, the start is kept.
    """
    guide, has_modes, start = _started(task, tops), len(tops.places) > 1, None
    if not guide.has_circles:
        start = _balanced(_weighed(guide, task), task)
        if start.psis.reliable and start.psis.ess > ENOUGH_ESS * DRAWS:
            return start, None
        guide = copy.deepcopy(start.guide) if has_modes else _plain(task, tops)
    if has_modes or guide.has_circles:
        chances = tops.population.log_weights.double().exp()
        rows = tops.population.z[processes.first(lambda: chances.multinomial(len(chances), replacement=True))]
        with warnings.catch_warnings():  # of values that repeat, as those of resampled particles do
            warnings.simplefilter("ignore", UserWarning)
            fit_density(guide.flow, rows, standardize=False, max_epochs=EPOCHS, patience=5, lr=1e-3, progress=False)
    fit = fit_once(guide, warm_start=False, **({"lr": GENTLE} if has_modes else {}))
    trained = _weighed(guide, task)
    if has_modes and start:
        trained = _balanced(trained, task)
    if start and _quality(start, tops.population) < _quality(trained, tops.population):
        return start, None
    return trained, fit


def _plain(task: Task, tops: Tops) -> AutoFlow:
    """A guide of one mode, in coordinates in which the population is white."""
    guide = AutoFlow(task.model.call).setup(*task.model.args, **task.model.kwargs)
    if not guide.has_circles:
        chart = White(tops.population.z, tops.population.log_weights.exp())
        guide.start_at(chart.loc, chart.scale_tril)
    return guide


def _started(task: Task, tops: Tops) -> AutoFlow:
    """A guide whose base has the modes, unless there are angles, in coordinates in which the population is white."""
    plain = _plain(task, tops)
    if plain.has_circles:
        return plain
    mixture, chart = tops.mixture(), White(tops.population.z, tops.population.log_weights.exp())
    base = partial(ModesBase, num_components=len(mixture.weights))
    guide = AutoFlow(task.model.call, default_flow, base=base).setup(*task.model.args, **task.model.kwargs)
    _set_modes(guide, mixture, chart)
    guide.start_at(chart.loc, chart.scale_tril)
    return guide


@torch.no_grad()
def _set_modes(guide: AutoFlow, mixture: Mixture, chart: White) -> None:
    """Put the base's components at the modes, in coordinates in which the population is white.

    Small ones get more than they weigh, so that weighed draws tell what that is.
    """
    base = guide.flow.base
    assert isinstance(base, ModesBase)
    factor = torch.linalg.solve_triangular(chart.scale_tril, mixture.scale_tril, upper=False)
    base.set(chart.inverse(mixture.loc), factor, mixture.weights.sqrt())


def _weighed(guide: AutoFlow, task: Task) -> _Weighed:
    """Weigh a guide's draws; of several processes all go by what the first has drawn."""
    model = task.model

    def drawn() -> tuple[Tensor, Psis]:
        draws = sound_space(Task(model.call, guide, model.args, model.kwargs, model.engine)).draw(DRAWS)
        return draws.z, weigh((draws.log_p - draws.log_q).nan_to_num(-math.inf, -math.inf, -math.inf))

    with pyro.validation_enabled(False):
        z, psis = processes.first(drawn)
        processes.as_one()
    return _Weighed(guide, z, psis.smoothed.to(z), psis)


@torch.no_grad()
def _balanced(weighed: _Weighed, task: Task) -> _Weighed:
    """Give each mode of the base what reliable weights say it weighs: the population knows that to a few hundredths."""
    if not weighed.psis.reliable:
        return weighed
    guide, base = weighed.guide, weighed.guide.flow.base
    assert isinstance(base, ModesBase)
    law, u = base(), guide.get_transform(*task.model.args, **task.model.kwargs).inv(weighed.z)
    chances = [law.component_distribution.log_prob(part.unsqueeze(1)) + base.logits for part in u.split(1000)]
    shares = weighed.log_weights.exp() @ torch.cat(chances).softmax(-1)
    base.set(base.loc, base.scale_tril, shares.clamp_min(1e-6))
    return _weighed(guide, task)


def _summed_up(space: Space, tops: Tops, weighed: _Weighed | None, fit: Fit | None, start: float) -> Annealed:
    """The better of the guide's weighed draws and the population."""
    population, number = tops.population, len(tops.places)
    z, log_weights, log_evidence, noise, shares = tops.together(or_nan(space.log_p))
    is_weighed = weighed is not None and _covers(weighed, population)
    if weighed and is_weighed:
        z, log_weights = weighed.z, weighed.log_weights
        log_evidence, noise = weighed.psis.log_evidence, weighed.psis.log_evidence_se
        labels, weights = tops.label(z), log_weights.exp()
        inside = [weights * (labels == k) for k in range(number)]
        shares = [(float(w.sum()), float((w - w.sum() * weights).norm())) for w in inside]
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


def _quality(weighed: _Weighed, population: Population) -> tuple[bool, float]:
    """Return what is small for a good guide: one that lacks a mode may have the least noise of all."""
    return not _covers(weighed, population), weighed.psis.log_evidence_se


@torch.no_grad()
def _covers(weighed: _Weighed, population: Population) -> bool:
    """True if a guide's weights converge, have less noise than the population, and lack none of what it has found."""
    psis = weighed.psis
    if psis.khat >= CONVERGES or psis.log_evidence_se >= population.log_evidence_se:
        return False
    short = population.log_evidence - psis.log_evidence
    if short - 3 * math.hypot(population.log_evidence_se, psis.log_evidence_se) >= LESS:
        return False
    surprise = population.log_p - weighed.guide.flow().log_prob(population.z) - psis.log_evidence
    share, noise = population.share(surprise.nan_to_num(math.inf, math.inf, -math.inf) > SURPRISE)
    return share - 2 * noise < LACKS
