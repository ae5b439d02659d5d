"""Modes and evidence of a posterior, from an annealed population and a guide that covers its modes.

The population finds the modes and their weights (:mod:`pyro_flows.sampling.annealed_population`).  A mixture of
Gaussians at the modes becomes the base of a flow, which is trained on the particles and then by the ELBO.  If the
weights of this guide's draws are reliable, the draws replace the particles: their evidence and mode weights are less
noisy.  If they are not, or miss evidence that the population has, the particles are kept.  If the weights may mislead,
the particles move on as chains in the guide's coordinates, and bridge sampling combines both kinds of draws to the
evidence.

Sequential Monte Carlo Samplers (Del Moral, Doucet, Jasra 2006); Annealed Flow Transport Monte Carlo (Arbel, Matthews,
Doucet 2021, arXiv:2102.07501).
"""

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
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ..arguments import check_flags, check_integers, check_program
from ..diagnostics import Psis
from ..diagnostics.guide_space import prior_of, target_of
from ..diagnostics.importance import weigh
from ..distributions import ModesBase
from ..guides import AutoFlow
from ..programs import Program
from ..programs.density import Density
from ..programs.model_and_guide import Task
from ..programs.program import runs_programs
from ..sampling.annealed_population import ISLANDS, Effort, Population, Reference, bridge, moved_on
from ..sampling.annealed_population import anneal as anneal_population
from ..sampling.modes import CLIMBS, ModeMixture, ways_up
from ..training import Training, distributed
from ..training.loop import Fit
from .density import fit_density
from .program_checks import NoScore, check_bounded, check_proper
from .svi import fit_svi

CALLER = "anneal"
FitOnce = Callable[..., Fit | None]


@dataclass(frozen=True)
class Covering:
    """Settings of a guide that covers modes.

    Attributes:
        draws: Weighted draws of the guide.
        batch: Draws per run of the model.
        enough: The effective share of the draws from which no training is needed.
        epochs: The largest number of epochs of training on the particles.
        gentle: The learning rate of the ELBO over a base with modes, which large steps would lose.
        converges: k-hat below which the weights have a variance, and their mean a known error.
        clear: k-hat below which draws of the guide alone give the evidence.
        surprise: Nats by which the posterior exceeds the guide at a particle that the guide lacks.
        lacks: The share of such particles that a guide may have.
        less: Nats of evidence by which the guide may fall short of the population.
        rounds: Rounds of expectation maximisation of the weights of modes.
    """

    draws: int = 20_000
    batch: int = 4096
    enough: float = 0.9
    epochs: int = 50
    gentle: float = 0.003
    converges: float = 0.5
    clear: float = 0.3
    surprise: float = 3.0
    lacks: float = 0.02
    less: float = 0.1
    rounds: int = 50


COVERING = Covering()


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
        modes += f", and {len(self.modes) - 8} more" if len(self.modes) > 8 else ""
        return (
            f"Annealed(log_evidence={self.log_evidence:.3f} ± {self.log_evidence_se:.3f}, modes=[{modes}], "
            f"ess={self.ess:.0f} of {len(self.log_weights)}, seconds={self.seconds:.1f})"
        )


@runs_programs
def anneal(
    model: Callable[..., Any],
    *args: Any,
    num_particles: int = 2048,
    fit: bool = True,
    progress: bool = True,
    **kwargs: Any,
) -> Annealed:
    """Find the modes of a posterior, their weights, and the evidence.

    Particles start as draws of the prior, or of a wide Gaussian if the prior is flat.  They are annealed to the
    posterior p(z | x) in steps of temperature (Del Moral, Doucet, Jasra 2006)::

        r(z)¹⁻ᵝ p(z, x)ᵝ,    β from 0 to 1

    At each temperature they are weighted, resampled on 16 islands, and moved by Hamiltonian Monte Carlo with adaptive
    steps.  Places whose climbs end at one connected top are one mode.  Then an :class:`AutoFlow` is built over a base
    with these modes, and fitted to the particles and by the ELBO.

    Args:
        model: A Pyro model; discrete latents of finite support are summed out.
        *args: The model's arguments.
        num_particles: The number of particles, rounded up to a multiple of 16; more particles find smaller modes.
        fit: Whether to fit a guide.  Without one the evidence of a centred hierarchy may be several standard errors too
            low, since particles enter the neck of a funnel slowly.
        progress: Whether to show the progress bars of the fit.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.fitting.Annealed`.

    Raises:
        TypeError: If a guide is given.
        ValueError: If a number is out of its range, ``AutoFlow`` refuses the model, or hardly a draw of the prior has a
            density.  If the posterior is detectably improper; the error names the sites.  If the model's log-density is
            an estimate too noisy to weigh draws by.

    Warns:
        UserWarning: If the model runs one draw at a time, or its log-density is a visibly noisy estimate.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> pyro.set_rng_seed(0)
        >>> found = anneal(model, torch.tensor(2.0), num_particles=512, fit=False)
        >>> abs(found.log_evidence + 2.27) < 5 * found.log_evidence_se  # log Normal(2; 0, 2**0.5)
        True
    """
    check_integers(CALLER, ISLANDS * 4, num_particles=num_particles)
    check_flags(CALLER, fit=fit, progress=progress)
    check_program(model=model)
    if guides := [type(value).__name__ for value in args if isinstance(value, AutoGuide)]:
        must = f"the arguments after the model must be the model's own, got a guide, {guides[0]}"
        raise TypeError(f"{CALLER}: {must}. Leave it out: {CALLER}(model, ...) builds its own guide.")
    program = Program(model, kwargs=kwargs)
    guide = AutoFlow(program).setup(*args)

    def fit_once(guide: AutoFlow, **settings: Any) -> Fit:
        return fit_svi(program, guide, *args, progress=progress, **settings)

    task = Task(program, guide, args, {})
    check_proper(CALLER, Density(task), guide.start[0])
    return cover(task, num_particles, fit_once if fit else None)


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
                check_bounded(CALLER, guide, space, reference.draw(CLIMBS.some))
            found = anneal_population(reference, number, Effort())
            return found, ways_up(space.log_prob, reference.draw(CLIMBS.some))

        population, others = distributed.once(particles)
        if population is None:
            raise ValueError(f"{CALLER}: hardly a draw of the prior has a density; is the model's density finite?")
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
    population = modes.population
    start = _balanced(_weighted(_with_modes(task, modes), task), task)
    if start.psis.reliable and start.psis.ess > COVERING.enough * COVERING.draws:
        return start
    found = [start]
    if len(modes.places) > 1 or start.guide.has_circles:  # a flow starts uniform over angles
        guide, chances = copy.deepcopy(start.guide), population.log_weights.double().exp()
        rows = population.z[distributed.broadcast(lambda: chances.multinomial(len(chances), replacement=True))]
        with warnings.catch_warnings():  # resampled particles contain copies, which fit_density warns of
            warnings.simplefilter("ignore", UserWarning)
            options = Training(standardize=False, patience=5)
            fit_density(guide.flow, rows, training=options, max_epochs=COVERING.epochs, lr=1e-3, progress=False)
        fit = _trained(fit_once, guide, lr=COVERING.gentle)
        found.append(_balanced(_weighted(guide, task, fit), task))
    if not found[-1].psis.reliable or len(found) == 1:
        guide = _at_population(task, modes)
        if (fit := _trained(fit_once, guide)) is not None:
            found.append(_weighted(guide, task, fit))

    def quality(one: _Weighted) -> tuple[bool, bool, float, float]:
        """Return small values for a good guide; one that lacks a mode may have the least noise of all."""
        diverges, lacks = _faults(one, population)
        return diverges or lacks, lacks, one.psis.log_evidence_se, -one.psis.ess

    return min(found, key=quality)


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


def _weighted(guide: AutoFlow, task: Task, fit: Fit | None = None) -> _Weighted:
    """Draw from a guide and weight the draws; all processes use the draws of the first."""
    with pyro.validation_enabled(False):
        draws = distributed.once(lambda: Density.sound(task.of(guide)).draw(COVERING.draws))
    log_weights = (draws.log_p - draws.log_q).nan_to_num(-math.inf, -math.inf, -math.inf)
    return _Weighted(guide, draws.z, weigh(log_weights, CALLER), fit)


@torch.no_grad()
def _balanced(weighted: _Weighted, task: Task) -> _Weighted:
    """Fit the weights of the base's components to reliably weighted draws, which are less noisy than a population."""
    if not weighted.psis.reliable:
        return weighted
    guide, base = weighted.guide, cast(ModesBase, weighted.guide.flow.base)
    u = guide.get_transform(*task.model.args, **task.model.kwargs).inv(weighted.z)
    heights = torch.cat([base().component_distribution.log_prob(part.unsqueeze(1)) for part in u.split(1000)])
    shares = base.logits.softmax(-1)
    for _ in range(COVERING.rounds):
        chances = (heights + shares.log()).softmax(-1)
        shares = (weighted.psis.smoothed.to(u).exp() @ chances).clamp_min(1e-6)
    base.set(base.loc, base.scale_tril, shares)
    return _weighted(guide, task, weighted.fit)


def _summary(space: Density, modes: ModeMixture, weighted: _Weighted | None, began: float) -> Annealed:
    """Summarise the guide's weighted draws or the population, whichever is better."""
    population, number, bridged = modes.population, len(modes.places), None
    if weighted and not (weighted.psis.even or weighted.psis.khat < COVERING.clear or space.task.runs_one_by_one):
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
        draws=space.complete(z, COVERING.batch),
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
    guide = weighted.guide
    population = distributed.once(lambda: moved_on(target_of(Density.sound(task.of(guide))), population))
    of_p = population.log_p - guide.flow().log_prob(population.z)
    log_evidence, noise = bridge(population, of_p, weighted.psis.log_weights)
    rare, _ = population.share((of_p - log_evidence).nan_to_num(math.inf) > COVERING.surprise)
    return population, (log_evidence, math.hypot(noise, rare))


@torch.no_grad()
def _faults(weighted: _Weighted, population: Population) -> tuple[bool, bool]:
    """Return True if a guide's weights are noisier than the population, and True if it lacks mass of the population."""
    psis = weighted.psis
    is_sharp = (psis.even or psis.khat < COVERING.converges) and psis.log_evidence_se < population.log_evidence_se
    short = population.log_evidence - psis.log_evidence
    if short - 3 * math.hypot(population.log_evidence_se, psis.log_evidence_se) >= COVERING.less:
        return not is_sharp, True
    surprise = population.log_p - weighted.guide.flow().log_prob(population.z) - psis.log_evidence
    share, noise = population.share(surprise.nan_to_num(math.inf, math.inf, -math.inf) > COVERING.surprise)
    return not is_sharp, share - 2 * noise >= COVERING.lacks
