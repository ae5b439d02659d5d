"""A verdict on a guide: whether its draws can be believed, and why.

Weights say how far the guide is from the posterior where it draws, and k-hat whether they can be believed themselves.
Short chains from its draws say what lies next to them: they drift if the guide is wrong (:mod:`.drift`,
:mod:`.marginal_errors`).  A population that is annealed from the prior says what lies far away
(:mod:`.missing_mass`), and many more draws of the guide whether a few of them lie where the posterior has nothing
(:mod:`.outliers`).  None of these needs to know the answer, and together they leave little room.

A guide's draws are to be trusted if each mean is right to a tenth of a standard deviation, each standard deviation to a
tenth of itself, each distribution function to a twentieth or so, and hardly any mass is missing.  What is not right is
a finding (:mod:`.findings`), and the verdict is the worst that follows from any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from .. import plots
from ..arguments import check_integers, joined
from ..programs.latent_space import LatentSpace, Scored, sound_space
from ..programs.log_density import or_nan
from ..programs.nesting import runs_programs
from ..programs.task import Task, check_trained
from ..sampling.chains import FROZEN, Chains
from ..sampling.coordinates import Coordinates, White, guide_coordinates
from .drift import Drift, DriftMeter, weighted_drift
from .findings import Finding, worst
from .importance import Psis, weigh
from .marginal_errors import Shape, ShapeMeter, weighted_shape
from .missing_mass import Missing, search
from .outliers import outliers

LIMIT = 0.1  # errors beyond this, in standard deviations, are not to be trusted
BENT = 0.3  # the same along whitened directions, for which correlations and far tails count
FLAG, SURE = 0.08, 0.05  # what an error must exceed, and what it must exceed by three standard errors, to be a drift
CERTAIN = 3.0  # how many standard errors lie between an error that is certain and SURE
DOUBT = 2.5  # how many standard errors an error beyond the limit must have that chains alone see
CALM = 0.5  # k-hat below which weights that see no error are believed more
CONTRARY = 2.0  # by how many standard errors more chains must then be certain, or doubt
OUTSIDE = 0.002  # the share of draws that may have no density: more are no matter of a number that overflows
UNEQUAL = 0.4  # the total variation from the posterior beyond which reliable weights are to be heard
LOST = 0.05  # the share of the posterior's mass that must not be missed
WORST_KHAT = 1.0  # beyond this the weights have no mean
ADAPT, BLOCK, BLOCKS = 4, 10, 5  # sweeps of the chains: to adapt their steps, between judgements, and at most
TRIES = 4  # times as many sweeps to adapt steps that are far too long


@dataclass(frozen=True)
class Check:
    """The verdict on a guide and what it rests on: the result of :func:`check`.

    The errors that ``chains``, ``directions`` and ``weighted`` hold are, for each of K quantities, ``error``, that of
    the guide's mean in standard deviations of the posterior, and ``variance``, the posterior's over the guide's, with
    the standard errors ``error_se`` and ``variance_se``, each ``(K,)``; there are D + 2 directions.

    Attributes:
        findings: What is wrong with the draws, or cannot be told of them: each a
            :class:`~pyro_flows.diagnostics.Finding`.  None if they are to be trusted.
        psis: k-hat, the effective sample size, the log evidence, its standard error, and the weights: a
            :class:`~pyro_flows.Psis`.
        chains: The guide's errors as short chains from its draws see them.
        directions: The same along directions of the unconstrained space in which the guide's draws are white: the D
            coordinates, and those two in which the chains have spread most and least while their steps were adapted.
        weighted: The same as the weights see them.
        shapes: The errors of the guide's distribution functions, of the K quantities and of the distance from the
            middle, as chains see them and as weights do: each ``error`` and ``error_se``, ``(K + 1,)``.
        names: The names of the K quantities that the errors are of: latent and deterministic sites, number by number.
        missing: The mass found where the guide draws nothing: its ``share`` of the posterior's, between 0 and 1, with
            the standard error ``share_se``, its ``place``, a vector ``(D,)`` or None, and the ``error`` of the guide's
            moments that it makes.
        outliers: By how much rare draws of the guide, where the posterior has next to nothing, enlarge the variance of
            each quantity, relative to it, ``(K,)``.
        acceptance: The chains' mean acceptance, between 0 and 1, in each of the coordinates that they moved in.
        seconds: The wall time.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> found = check(model, model, num_samples=2000, num_chains=128)
        >>> found.trusted, found.names, found.chains.error.shape, found.missing.share
        (True, ['x[0]', 'x[1]'], torch.Size([2]), 0.0)
    """

    findings: tuple[Finding, ...]
    psis: Psis
    chains: Drift
    directions: Drift
    weighted: Drift
    shapes: tuple[Shape, Shape]
    names: list[str]
    missing: Missing
    outliers: Tensor
    acceptance: list[float]
    seconds: float

    @property
    def verdict(self) -> str:
        """``"trust"`` the guide's draws as they are; ``"reweight"`` them first; or ``"do not trust"`` them."""
        return worst(self.findings)

    @property
    def reason(self) -> str:
        """Why, in words."""
        for finding in self.findings:
            if finding.verdict == self.verdict:
                if self.verdict == "do not trust":
                    return str(finding)
                mend = f"but their weights are reliable (k-hat {self.khat:.2f}): resample the draws by their weights."
                return f"{str(finding)[:-1]}, {mend}"
        largest = max(0.01, float(self._moments.errors.max()))
        found = f"Weights, chains and search find no error of a mean or sd beyond {largest:.2f} sd."
        if not self.psis.reliable:
            found += f" Use the draws as they are: their weights are not reliable (k-hat {self.khat:.2f})."
        return found

    @property
    def trusted(self) -> bool:
        """True if the verdict is ``"trust"``."""
        return self.verdict == "trust"

    @property
    def misses_a_mode(self) -> bool:
        """True if mass was found far away from a guide that is right where it draws."""
        return any(finding.kind in ("mode", "far") for finding in self.findings)

    @property
    def khat(self) -> float:
        """The shape of the tail of the weights."""
        return self.psis.khat

    @property
    def ess(self) -> float:
        """The effective sample size of the smoothed weights."""
        return self.psis.ess

    @property
    def log_evidence(self) -> float:
        """The log evidence, in nats, as far as the guide reaches."""
        return self.psis.log_evidence

    @property
    def log_evidence_se(self) -> float:
        """Its standard error, in nats."""
        return self.psis.log_evidence_se

    @property
    def drift(self) -> float:
        """The largest error of a mean, in standard deviations."""
        return float(self._moments.error.abs().max())

    @property
    def sd_ratios(self) -> tuple[float, float]:
        """The smallest and the largest ratio of the guide's standard deviations to the posterior's."""
        return float(self._moments.ratio.min()), float(self._moments.ratio.max())

    @property
    def _moments(self) -> Drift:
        """The errors that chains see, pooled with those that reliable weights see if the draws are trusted."""
        return self.chains.pooled_with(self.weighted) if self.trusted and self.psis.reliable else self.chains

    def __repr__(self) -> str:
        low, high = self.sd_ratios
        return (
            f"Check({self.verdict!r}, khat={self.khat:.2f}, log_evidence={self.log_evidence:.3f} ± "
            f"{self.log_evidence_se:.3f}, drift={self.drift:.2f}, sd_ratios={low:.2f}–{high:.2f}, "
            f"missing={self.missing.share:.2f}, seconds={self.seconds:.1f})\n{self.reason}"
        )

    def plot(self) -> Any:
        """Picture the errors of each quantity and the weights: :func:`pyro_flows.plots.check`."""
        return plots.check(self)


@runs_programs
def check(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int | None = None,
    num_chains: int | None = None,
    vectorize: str = "auto",
    max_plate_nesting: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Check:
    """Judge whether any Pyro guide's draws can be trusted.

    The guide is the posterior if weights, chains and search find nothing: its weights hardly vary, short Markov chains
    from its draws (Hamiltonian Monte Carlo in the coordinates of its base, and in whitened ones) stay where they are,
    and a population that is annealed from the prior finds no mass that it misses.  Each error is seen with its standard
    error; the chains go on until they tell.  Draws are trusted if each mean is right to a tenth of a standard deviation
    and each standard deviation to a tenth of itself, and no marginal has another shape.  Costs a part of a fit.

    Args:
        model: A Pyro model; discrete latents that the guide lacks are summed out.
        guide: A trained guide of the same latents.
        *args: The model's arguments.
        num_samples: The number of draws that are weighed, at least 100; by default 10,000, or 1,000 where the model
            runs one draw at a time.
        num_chains: The number of chains, at least 16; by default 256, or 16 where the model runs one draw at a time.
        vectorize: The way to run many draws: ``"plate"``, ``"vmap"`` or ``"loop"``; by default the first of these that
            does to draws what single runs do (*Any Pyro program* in the docs).
        max_plate_nesting: How many dimensions the plates of model and guide take; by default what one run shows.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Returns:
        The :class:`~pyro_flows.Check`.

    Raises:
        ValueError: If a number is out of its range; if the guide was never trained, is a point, of another model, or
            has no density over its draws; if a discrete latent of infinite support is left to the model, or a plate is
            subsampled; if the model has no latents; or if a weight is not finite, or all are zero.

    Warns:
        UserWarning: If the model runs one draw at a time, or its log-density is an estimate whose noise shows.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def narrow():
        ...     pyro.sample("x", dist.Normal(0.0, 0.7))
        >>> pyro.set_rng_seed(0)
        >>> check(model, narrow).verdict
        'reweight'
    """
    start, kwargs = time.perf_counter(), joined("check", kwargs, model_kwargs)
    check_integers("check", 100, optional=True, num_samples=num_samples)
    check_integers("check", 16, optional=True, num_chains=num_chains)
    check_trained("check", guide)
    with pyro.validation_enabled(False):  # a draw of no density is for the weights to show
        space = sound_space(Task(model, guide, args, kwargs, vectorize))
        alone = space.task.runs_one_by_one
        draws = space.draw(num_samples or (1000 if alone else 10_000))
        psis = weigh(draws.log_p - draws.log_q)
        judged = _judged(space, draws.quantities)
        names = [name for name, used in zip(space.read.names, judged.tolist(), strict=True) if used]
        charts, white = guide_coordinates(space, draws.z)
        looked_at = _Looked(space, white, judged)
        weighted = weighted_drift(draws.quantities[:, judged], psis.smoothed)
        of_weights = weighted_shape(looked_at.features(draws.quantities, draws.z), psis.smoothed.to(draws.z.device))
        calm = _is_calm(psis, weighted)
        count = num_chains or (16 if alone else 256)
        chains, directions, of_chains, acceptance = _run(looked_at, charts, draws, count, calm)
        missing = search(space, white, draws, judged)
        rare = torch.zeros_like(weighted.error) if alone else outliers(space, draws, psis)[judged]
    shapes, seconds = (of_chains, of_weights), time.perf_counter() - start
    seen = Check((), psis, chains, directions, weighted, shapes, names, missing, rare, acceptance, seconds)
    return replace(seen, findings=tuple(judge(seen)))


class _Looked(NamedTuple):
    """The space, coordinates and quantities of a check.

    Attributes:
        space: The guide's space.
        white: Coordinates in which the guide's draws have mean 0 and the identity as covariance.
        judged: The quantities that are judged, ``(K,)`` of bool.
    """

    space: LatentSpace
    white: White
    judged: Tensor

    def features(self, quantities: Tensor, z: Tensor) -> Tensor:
        """The quantities whose distributions are judged, and the distance from the middle, ``(N, K + 1)``."""
        distance = self.white.inverse(z).square().sum(-1, keepdim=True)
        if self.space.read.has_angles:  # which have no middle
            distance = torch.zeros_like(distance)
        return torch.cat((quantities[:, self.judged], distance), -1)


def _judged(space: LatentSpace, quantities: Tensor) -> Tensor:
    """Which quantities are judged, ``(K,)``: those that vary, and are finite."""
    spread = quantities.double().std(0)
    varies = spread > 1e-6 * quantities.double().mean(0).abs().clamp_min(1e-12)
    for name in space.task.latents:
        if not any(v for v, site in zip(varies.tolist(), space.read.sites, strict=True) if site == name):
            raise ValueError(f"the guide's site {name!r} is a point: it has the same value in all draws.")
    return varies & quantities.isfinite().all(0)


def _run(
    looked_at: _Looked, charts: list[Coordinates], draws: Scored, num_chains: int, calm: bool
) -> tuple[Drift, Drift, Shape, list[float]]:
    """Run chains from new draws of the guide until they tell whether they drift, and how much.

    Args:
        looked_at: What is looked at.
        charts: The coordinates that the chains move in.
        draws: Draws of the guide.
        num_chains: The number of chains.
        calm: Whether the weights see no error at all, so that chains need only not see one either.
    """
    space, white, judged = looked_at
    began = space.draw(num_chains)
    chains = Chains(or_nan(space.log_p), charts, began.z)
    meter = DriftMeter(draws.quantities[:, judged], began.quantities[:, judged])
    shape = ShapeMeter(looked_at.features(draws.quantities, draws.z), looked_at.features(began.quantities, began.z))
    places = []
    for number in range(TRIES * ADAPT):
        if number >= ADAPT and max(chains.acceptance) > FROZEN:
            break
        chains.sweep(adapt=True)
        places.append(white.inverse(chains.z))
    extremes = torch.linalg.eigh(torch.cov(torch.cat(places).T).reshape(space.dim, space.dim)).eigenvectors[:, [0, -1]]
    axes = torch.cat((torch.eye(space.dim).to(extremes), extremes), -1)
    compass = DriftMeter(white.inverse(draws.z) @ axes, white.inverse(began.z) @ axes)
    for block in range(BLOCKS):
        for _ in range(BLOCK):
            chains.sweep(adapt=False)
            quantities = space.quantities(chains.z)
            meter.record(quantities[:, judged])
            shape.record(looked_at.features(quantities, chains.z))
            compass.record(white.inverse(chains.z) @ axes)
        drift = meter.drift()
        right = drift.errors + (0.0 if calm else 1.5) * drift.noise < LIMIT
        if bool(right.all()) or (block > 0 and is_off(drift, CERTAIN + CONTRARY * calm)):
            break
    directions = compass.drift()
    if space.read.has_angles:  # a density that is periodic has neither mean nor variance along it
        directions = Drift(*(part[:0] for part in directions))
    return drift, directions, shape.shape(), chains.acceptance


def _is_calm(psis: Psis, weighted: Drift) -> bool:
    """Return True if the weights converge and see no error."""
    return (psis.khat < CALM or psis.even) and bool((weighted.errors + 2 * weighted.noise < SURE).all())


def judge(seen: Check) -> list[Finding]:
    """Return the findings that follow from what a check has seen, whatever findings it holds already."""
    return [*_elsewhere(seen), *_off(seen), *_outside(seen), *_misshapen(seen)] or _doubts(seen)


def _more(seen: Check) -> float:
    """Return by how many standard errors more chains must be certain, where weights see no error at all."""
    return CONTRARY * _is_calm(seen.psis, seen.weighted)


def _flags(seen: Check) -> tuple[Tensor, Tensor]:
    """Return which errors are certain, ``(2, K)``, of those that chains see and of those that weights see."""
    return _flagged(seen.chains, CERTAIN + _more(seen)), _flagged(seen.weighted) & seen.psis.reliable


def _flagged(drift: Drift, times: float = CERTAIN) -> Tensor:
    """Which errors are there for sure, ``(2, K)``."""
    return (drift.errors > FLAG) & (drift.errors - times * drift.noise > SURE)


def is_off(drift: Drift, times: float = CERTAIN) -> bool:
    """True if some error is certain."""
    return bool(_flagged(drift, times).any())


def _elsewhere(seen: Check) -> Iterator[Finding]:
    """The posterior's mass that cannot be seen from the guide's draws."""
    share, noise, _, error, is_blind = seen.missing
    if share > max(LOST, noise):  # what may be there is not to be passed over
        flags, _ = _flags(seen)
        if bool(flags.any()):
            drift = seen.chains.worst(seen.names, flags)
            yield Finding("collapsed", drift.moment, share, noise)
        else:
            yield Finding("mode", "", share, noise)
    elif error is not None and share > noise:
        far = (error.errors > LIMIT) & (error.errors > 2 * error.noise)
        if bool(far.any()):
            yield error.worst(seen.names, far, "far")
    if is_blind:
        yield Finding("blind")
    if max(seen.acceptance) < FROZEN:
        yield Finding("frozen", "", max(seen.acceptance))


def _off(seen: Check) -> Iterator[Finding]:
    """The moment that is off for sure."""
    for drift, flags in zip((seen.chains, seen.weighted), _flags(seen), strict=True):
        if bool(flags.any()):
            mended = seen.psis.reliable and _agree(seen.chains, seen.weighted)
            yield replace(drift.worst(seen.names, flags), verdict="reweight" if mended else "do not trust")
            return


def _outside(seen: Check) -> Iterator[Finding]:
    """Draws where the posterior has next to nothing: some without a density, or a few that spoil a moment."""
    verdict = "reweight" if seen.psis.reliable else "do not trust"
    outside = float((seen.psis.log_weights == -torch.inf).double().mean())
    if outside > OUTSIDE:
        yield Finding("outside", "", outside, verdict=verdict)
    ratios = (1 + seen.outliers).sqrt()
    if bool((ratios > 1 + LIMIT).any()):
        i = int(ratios.argmax())
        yield Finding("outliers", seen.names[i], float(ratios[i]), verdict=verdict)


def _misshapen(seen: Check) -> Iterator[Finding]:
    """The distribution that is off for sure, and weights that say that the draws count unequally."""
    of_chains, of_weights = seen.shapes
    reliable, told = seen.psis.reliable, bool(of_weights.flagged.any())
    if bool(of_chains.flagged.any()) or (reliable and told):
        shape = of_weights if reliable and told else of_chains
        verdict = "reweight" if reliable and told else "do not trust"
        names = [*seen.names, "the distance from the middle"]
        i = shape.worst
        yield Finding("shape", names[i], float(shape.error[i]), float(shape.error_se[i]), verdict)
    weights = seen.psis.smoothed.exp() * len(seen.psis.smoothed)
    apart = float((weights - 1).abs().mean()) / 2  # the total variation between guide and posterior
    if reliable and apart > UNEQUAL:
        yield Finding("weights", "", apart, verdict="reweight")


def _doubts(seen: Check) -> list[Finding]:
    """Return the gravest doubt about draws that have no certain error, if there is one."""
    psis, chains, directions, names = seen.psis, seen.chains, seen.directions, seen.names
    bent = directions.errors - 3 * directions.noise > BENT
    if bool(bent.any()):
        labels = [f"whitened direction {i}" for i in range(len(directions.error))]
        return [directions.worst(labels, bent, "whitened")]
    if psis.khat >= WORST_KHAT and not psis.even:
        return [Finding("tails", "", psis.khat)]
    pooled = chains.pooled_with(seen.weighted) if psis.reliable else chains
    told = torch.maximum(pooled.errors, pooled.noise) <= LIMIT  # False also where chains have overflown to no number
    if not bool(told.all()):
        return [pooled.worst(names, kind="unclear")]
    doubtful = (chains.errors > LIMIT) & (chains.errors > (DOUBT + _more(seen)) * chains.noise)
    doubtful[1] &= chains.variance > 1  # too narrow: what weights cannot see
    return [chains.worst(names, doubtful, "doubt")] if bool(doubtful.any()) else []


def _agree(chains: Drift, weighted: Drift) -> bool:
    """Return True if chains and weights see the same errors."""
    signed = [torch.stack((drift.error, (drift.variance - 1) / 2)) for drift in (chains, weighted)]
    apart, noise = (signed[0] - signed[1]).abs(), chains.noise.hypot(weighted.noise)
    size = 1 + weighted.errors  # large errors need only be seen alike in proportion
    return not bool(((apart > FLAG * size) & (apart > 3 * noise)).any()) and bool((weighted.noise < LIMIT * size).all())
