"""The verdict on a guide: whether its draws can be trusted, and why.

Three tests look at the draws, and none needs the true posterior:

* importance weights compare guide and posterior at the draws, and k-hat tells whether the weights are reliable; many
  more draws show whether a few lie where the posterior has no density (:mod:`.outliers`);
* short Markov chains from the draws drift if the guide is wrong nearby (:mod:`.drift`, :mod:`.marginal_errors`);
* a population annealed from the prior finds mass that lies far away (:mod:`.missing_modes`).

Beyond 1,000 latents the first two look at some quantities: at all numbers of small sites, such as scales, at those
that scores suspect (:mod:`.suspects`), and at random ones.  The last is left out.  So are k-hat and other measures in
which small errors of many latents add up.

Draws are trusted if each mean is right to 0.1 standard deviations, each standard deviation to 10 %, each distribution
function to about 0.05, and hardly any mass is missing.  Each error is a finding (:mod:`.findings`), and the verdict is
the worst that follows from any finding.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from .. import plots
from ..arguments import check_integers, joined
from ..programs.latent_space import LatentSpace, Scored, sound_space
from ..programs.log_density import or_nan
from ..programs.model_and_guide import Task, check_trained
from ..programs.plate_nesting import runs_programs
from ..sampling.chains import FROZEN, Chains
from ..sampling.coordinates import Coordinates, White, guide_coordinates, guide_density
from .drift import CERTAIN, FLAG, SURE, Drift, DriftMeter, weighted_drift
from .findings import NEXT, Finding, worst
from .importance import MANY, Psis, number_to_weigh, weigh
from .marginal_errors import Shape, ShapeMeter, weighted_shape
from .missing_modes import Missing, beyond_support, search
from .outliers import outliers
from .row_weights import RowWeights, row_weights
from .spreads import SpreadMeter, Spreads
from .suspects import Suspects, suspects

LIMIT = 0.1  # the largest error of trusted draws, in standard deviations
BENT = 0.3  # the same along whitened directions, which show correlations and far tails
DOUBT = 2.5  # standard errors of an error beyond LIMIT that chains alone must show
CALM = 0.5  # k-hat below which weights that show no error count for more
CONTRARY = 2.0  # additional standard errors that chains must then show
OUTSIDE = 0.002  # the share of draws without a density that numerical overflow may explain
UNEQUAL = 0.4  # the total variation distance beyond which reliable weights must be used
LOST = 0.05  # the largest share of the posterior's mass that a trusted guide may miss
LITTLE = 0.01  # the share of missing mass below which it is printed in four decimals
COLLAPSED = 0.5  # the missing share from which a guide that lacks a neck lacks the rest as well
WORST_KHAT = 1.0  # beyond it the weights have no mean
ADAPT, BLOCK, SWEEPS = 4, 10, 50  # sweeps to adapt steps, sweeps per block, and the most afterwards
SHORT = 5  # sweeps per block of chains with twins, which have little noise
TRIES = 4  # times ADAPT, the most sweeps to adapt steps that are far too long
LOOKED, SMALL = 100, 16  # quantities then, and the size of sites all of whose numbers are among them
NUMBERS = 100_000  # of chains, about
SLOWEST = 10.0  # the variance of means of chains, in units of independent sweeps, beyond which a spread is unknown
SLOW, WHOLE = 180.0, 20_000  # seconds for a model that runs one draw at a time, and the runs of a whole check of it
CHAINS, ALONE, FEWEST = 256, 16, 32  # chains, if the model runs one draw at a time, and of many latents
BATCH = 20_000_000  # numbers of draws that are found at once


@dataclass(frozen=True)
class Check:
    """The verdict on a guide and its evidence: the result of :func:`check`.

    ``chains``, ``directions`` and ``weighted`` hold errors of the guide, each a tensor ``(K,)`` over K quantities.
    ``error`` is the error of the mean in standard deviations of the posterior, ``variance`` the posterior's variance
    over the guide's; ``error_se`` and ``variance_se`` are their standard errors.

    Attributes:
        findings: The faults found, each a :class:`~pyro_flows.diagnostics.Finding`; empty if the draws can be trusted.
        psis: k-hat, effective sample size, log evidence and weights, as a :class:`~pyro_flows.Psis`.
        chains: The guide's errors, estimated by short chains from its draws.
        directions: The same along D + 2 directions of the unconstrained space, whitened by the guide's draws: the D
            coordinates, and the two in which the chains spread most and least while their steps were adapted.  With
            more than 1,000 latents, along those in which the posterior is widest and narrowest, and along the predicted
            error of the mean.
        weighted: The guide's errors, estimated by the weights.
        shapes: The errors of the guide's distribution functions, estimated by chains and by weights.  Each has
            ``error`` and ``error_se``, ``(K + 1,)``, for the K quantities and for the distance from the centre.
        names: The names of the K quantities: latent and deterministic sites, element by element.
        missing: The mass found outside the guide: ``share`` of the posterior's mass, between 0 and 1, its standard
            error ``share_se``, a ``place`` ``(D,)`` or None, and the resulting ``error`` of the guide's moments.  It is
            0 if nothing was looked for.
        outliers: The relative increase of each variance by rare draws where the posterior has almost no density,
            ``(K,)``.
        acceptance: The mean acceptance of the chains, between 0 and 1, in each set of coordinates.
        seconds: The wall time.
        spreads: If there are more than 1,000 latents, the errors of the root mean square of each large site: the
            ``names`` of S sites, the relative ``error`` and its ``noise``, and the ``slowness`` of the chains, ``(S,)``
            each.
        scope: What was looked at, in words, if there are more than 1,000 latents, or what was left out of a check of a
            slow model; otherwise empty.
        rows: Then, for each set of plates with many rows, what the weights of single rows show: the largest ``khat``
            of a row, and the ``name``, ``error`` and ``noise`` of the mean that is wrong by the most standard errors.

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
    spreads: Spreads | None = None
    scope: str = ""
    rows: tuple[RowWeights, ...] = ()

    @property
    def verdict(self) -> str:
        """``"trust"``, ``"reweight"`` (usable after reweighting) or ``"do not trust"``."""
        return worst(self.findings)

    @property
    def reason(self) -> str:
        """The reason for the verdict, in words."""
        for finding in self.findings:
            if finding.verdict == self.verdict:
                if self.verdict == "do not trust":
                    return str(finding)
                mend = f"but their weights are reliable (k-hat {self.khat:.2f}): resample the draws by their weights."
                return f"{str(finding)[:-1]}, {mend}"
        largest = max(0.01, float(self._moments.errors.max()))
        if self.scope:
            found = f"No error of a mean or sd beyond {largest:.2f} sd was found. {self.scope}"
            return (
                f"{found} Weights of single rows have a k-hat of at most {', '.join(map(str, self.rows))}."
                if self.rows
                else found
            )
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
        """The log evidence in nats, of the region that the guide covers."""
        return self.psis.log_evidence

    @property
    def log_evidence_se(self) -> float:
        """The standard error of the log evidence, in nats."""
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
        """The errors shown by chains, pooled with those of reliable weights if the draws are trusted."""
        return self.chains.pooled_with(self.weighted) if self.trusted and self.psis.reliable else self.chains

    def __repr__(self) -> str:
        low, high = self.sd_ratios
        share = self.missing.share
        missing = "?" if self.scope else f"{share:.{4 if self.findings and 0 < share < LITTLE else 2}f}"
        return (
            f"Check({self.verdict!r}, khat={self.khat:.2f}, log_evidence={self.log_evidence:.3f} ± "
            f"{self.log_evidence_se:.3f}, drift={self.drift:.2f}, sd_ratios={low:.2f}–{high:.2f}, "
            f"missing={missing}, seconds={self.seconds:.1f})\n{' '.join([self.reason, *self._next])}"
        )

    @property
    def _next(self) -> list[str]:
        """The next step in a sentence, unless the draws are right as they are."""
        if self.verdict == "reweight":
            return ["Use pf.resample(model, guide, ...)."]
        return [NEXT[finding.kind] for finding in self.findings if finding.verdict == self.verdict][:1]

    def plot(self) -> Any:
        """Plot the errors of each quantity and the weights with :func:`pyro_flows.plots.check`."""
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
    """Judge whether the draws of any Pyro guide can be trusted.

    Three tests look for errors: importance weights, short Markov chains from the guide's draws, and a search for mass
    that the guide misses.  The chains are Hamiltonian Monte Carlo in the guide's base coordinates and in whitened
    coordinates; they drift if the guide is wrong.  The search anneals a population from the prior.  Each error has a
    standard error, and the chains run until it is small enough.

    Draws are trusted if each mean is right to 0.1 standard deviations, each standard deviation to 10 %, and no marginal
    distribution has a wrong shape.  A check takes hundreds of gradients of the model's density, each
    at hundreds of draws.

    With more than 1,000 latents it looks at 100 to 150 quantities: all numbers of small sites, those of the others that
    scores suspect, and random ones.  It does not search for missing mass then, and refuses no draws for their k-hat.

    Args:
        model: A Pyro model; discrete latents that the guide lacks are summed out.
        guide: A trained guide of the same latents.
        *args: The model's arguments.
        num_samples: The number of weighted draws, at least 100; by default 10,000, or 1,000 if the model runs one draw
            at a time, and down to 500 for many latents.  If 20,000 such runs take more than three minutes, it is 300,
            and there is no search for missing mass.
        num_chains: The number of chains, at least 16; by default 256, or 16 if the model runs one draw at a time, and
            down to 32 for many latents.
        vectorize: The engine that runs many draws: ``"plate"``, ``"vmap"`` or ``"loop"``.  By default the first whose
            results agree with single runs (*Any Pyro program* in the docs).
        max_plate_nesting: The number of dimensions that the plates of model and guide take; found by a run by default.
        model_kwargs: Keyword arguments of the model whose names clash with arguments above.
        **kwargs: The model's other keyword arguments.

    Returns:
        The :class:`~pyro_flows.Check`.

    Raises:
        ValueError: If a number is out of its range.  If the guide is untrained, is a point, belongs to another model or
            has no density at its draws.  If the model has no latents, a subsampled plate, or a discrete latent of
            infinite support that the guide lacks.  If a weight is not finite, or all weights are zero.

    Warns:
        UserWarning: If the model runs one draw at a time, or its log-density is an estimate with visible noise.

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
    task = Task(model, guide, args, kwargs, vectorize)
    with pyro.validation_enabled(False):  # because the weights show draws without a density
        space = sound_space(task)
        alone, (number, count, at_once) = space.task.runs_one_by_one, _sizes(space)
        suspected = suspects(space, at_once) if space.dim > MANY else None
        scope = _looked_at(space, suspected) or _left_out(space)
        draws = space.draw(num_samples or number, at_once)
        psis = weigh(draws.log_p - draws.log_q, "check", space.task, lambda index: space.latents(draws.z[index]))
        draws = _varying(space, draws)
        # Whitened by themselves, draws would lie nearer to the middle than other draws of the guide do.
        half = draws.z[::2]
        charts, white = ([suspected.chart], White(half)) if suspected else guide_coordinates(space, half)
        weighted = weighted_drift(draws.quantities, psis.smoothed)
        of_weights = weighted_shape(_with_distance(space, white, draws.quantities, draws.z), psis.smoothed)
        calm = _is_calm(psis, weighted)
        met = _run(space, charts, white, draws, num_chains or count, calm, suspected)
        directions = met.directions
        if suspected and psis.reliable and not space.read.angles:
            along = suspected.chart.inverse(draws.z) @ suspected.directions
            directions = directions.pooled_with(weighted_drift(along.detach(), psis.smoothed))
        missing = beyond_support(space) if scope else search(space, white, draws, psis.log_evidence)
        rows = row_weights(space, at_once) if suspected else ()
        rare = torch.zeros_like(weighted.error) if alone or scope else outliers(space, draws, psis)
    of_all = (met.chains, directions, weighted, (met.shape, of_weights), space.read.names)
    spent = time.perf_counter() - start
    seen = Check((), psis, *of_all, missing, rare, met.acceptance, spent, met.spreads, scope, rows)
    return replace(seen, findings=tuple(judge(seen)))


def _looked_at(space: LatentSpace, suspected: Suspects | None) -> str:
    """Keep all quantities of small sites, suspects, and a random part of the others, if there are many; say which."""
    if suspected is None:
        return ""
    sites, sizes = space.read.sites, Counter(space.read.sites)
    small = torch.tensor([sizes[site] <= SMALL for site in sites])
    chosen = torch.rand(len(sites)).masked_fill(small, -1).argsort()[: max(LOOKED, int(small.sum()))]
    chosen = torch.cat((chosen, suspected.quantities.cpu()))
    space.read.keep(torch.zeros(len(sites), dtype=torch.bool).index_fill(0, chosen, True))
    kept = Counter(space.read.sites)
    whole = [f"all of {site!r}" for site, size in sizes.items() if kept[site] == size]
    parts = [f"{kept[site]} of the {size:,} numbers of {site!r}" for site, size in sizes.items() if kept[site] < size]
    seen = f"{', '.join([*whole, *parts])}, the most suspect and random ones"
    return f"Weights and chains looked at {seen}, and not for other modes."


def _left_out(space: LatentSpace) -> str:
    """Return words on what a check leaves out since the model is slow, or an empty string."""
    runs = space.task.budget(SLOW)
    return f"There was no search for other modes, since {runs.words}." if runs.number < WHOLE else ""


def _sizes(space: LatentSpace) -> tuple[int, int, int]:
    """Return the default numbers of weighted draws, of chains, and of draws at once.

    With many latents they depend on the numbers in a draw, and in the largest tensor that the model computes from it.
    """
    draws, chains = number_to_weigh(space.task, space.dim), ALONE if space.task.runs_one_by_one else CHAINS
    draws = min(draws, 300) if _left_out(space) else draws
    if space.dim <= MANY:
        return draws, chains, 1000
    numbers = max(space.dim, space.task.model.largest)
    return draws, min(chains, max(FEWEST, NUMBERS // numbers)), max(1, min(1000, BATCH // numbers))


def _varying(space: LatentSpace, draws: Scored) -> Scored:
    """Leave out the quantities that are constant or not finite; raise ValueError for a guide that is a point."""
    quantities = draws.quantities.double()
    varies = quantities.std(0) > 1e-6 * quantities.mean(0).abs().clamp_min(1e-12)
    for name in space.task.latents:
        if name not in compress(space.read.sites, varies.tolist()):
            raise ValueError(f"the guide's site {name!r} is a point: it has the same value in all draws.")
    used = varies & quantities.isfinite().all(0)
    space.read.keep(used)
    return draws._replace(quantities=draws.quantities[:, used])


def _with_distance(space: LatentSpace, white: White, quantities: Tensor, z: Tensor) -> Tensor:
    """Append the squared distance of z from the centre: ``(N, K) -> (N, K + 1)``.

    It is 0 if some latents are angles, and with many latents, whose small errors add up in it.
    """
    distance = white.inverse(z).square().sum(-1, keepdim=True)
    if space.read.angles or space.dim > MANY:
        distance = torch.zeros_like(distance)
    return torch.cat((quantities, distance), -1)


class _Met(NamedTuple):
    """The errors that chains show, as in :class:`Check`."""

    chains: Drift
    directions: Drift
    shape: Shape
    spreads: Spreads | None
    acceptance: list[float]


@torch.no_grad()
def _run(
    space: LatentSpace,
    charts: list[Coordinates],
    white: White,
    draws: Scored,
    num_chains: int,
    calm: bool,
    suspected: Suspects | None,
) -> _Met:
    """Run chains from new draws of the guide until their drift is decided.

    Args:
        space: The guide's space.
        charts: The coordinates of the chains.
        white: Coordinates in which every second draw of the guide has mean 0 and the identity as covariance.
        draws: Draws of the guide.
        num_chains: The number of chains.
        calm: Whether the weights show no error, so that weaker evidence of the chains suffices.
        suspected: The directions to look at, if there are many latents.
    """
    began, places = space.draw(num_chains), list[Tensor]()
    twin = guide_density(space, suspected.chart) if suspected else None
    start = began.z if twin is None else torch.cat((began.z, began.z))
    runs = space.task.budget(SLOW)
    chains = Chains(or_nan(runs.counted(space.log_p)), charts, start, twin=twin)
    for z in chains.sweeps(TRIES * ADAPT, adapt=True):
        places.append(z)
        if len(places) >= ADAPT and max(chains.acceptance) > FROZEN:
            break
    chart, axes = (
        (suspected.chart, suspected.directions) if suspected else (white, _axes(white.inverse(torch.cat(places))))
    )
    if space.read.angles:  # because periodic coordinates have neither mean nor variance
        axes = axes[:, :0]
    others, squares = Scored(*(part[1::2] for part in draws)), _Squares(space, white)
    meter = DriftMeter(draws.quantities, began.quantities)
    shape = ShapeMeter(*(_with_distance(space, white, some.quantities, some.z) for some in (others, began)))
    compass = DriftMeter(*(chart.inverse(some.z) @ axes for some in (others, began)))
    spread = SpreadMeter(squares.names, *(squares(some.z) for some in (others, began)))
    size = SHORT if twin else BLOCK
    for block in range(SWEEPS // size):
        for z in chains.sweeps(size, adapt=False):
            quantities = space.quantities(z)
            meter.record(*quantities.split(num_chains))
            shape.record(*_with_distance(space, white, quantities, z).split(num_chains))
            compass.record(*(chart.inverse(z) @ axes).split(num_chains))
            spread.record(*squares(z).split(num_chains))
        drift, along, wide = meter.drift(), compass.drift().unless_beyond(BENT, compass.so_far()), spread.spreads()
        right = bool((drift.errors + (0.0 if calm else 1.5) * drift.noise < LIMIT).all())
        off = bool(drift.flagged(CERTAIN + CONTRARY * calm).any())
        if suspected:
            right &= bool((along.errors + along.noise < BENT).all() and wide.are_clear(LIMIT, SLOWEST).all())
            off |= bool(along.beyond(BENT).any())
        if right or (block > 0 and off) or runs.is_spent:
            break
    return _Met(drift, along, shape.shape(), wide if suspected else None, chains.acceptance)


class _Squares:
    """Function that returns the mean square of each large site's whitened coordinates, ``(N, D) -> (N, S)``.

    Args:
        space: The guide's space.
        white: Its whitened coordinates.

    Attributes:
        names: The names of the sites; none if there are few latents, or if some are angles.
    """

    def __init__(self, space: LatentSpace, white: White) -> None:
        sizes = Counter(space.coordinates if space.dim > MANY and not space.read.angles else [])
        self.names = [name for name, size in sizes.items() if size > SMALL]
        own = [[name == site for site in space.coordinates] for name in self.names]
        self._share = torch.tensor(own).reshape(len(own), space.dim).to(white.loc)  # (S, D)
        self._share /= self._share.sum(-1, keepdim=True)
        self._white = white

    def __call__(self, z: Tensor) -> Tensor:
        return self._white.inverse(z).square() @ self._share.T if self.names else z[:, :0]


def _axes(x: Tensor) -> Tensor:
    """Return all directions of whitened places ``(N, D)``, and the two in which they spread least and most."""
    covariance = torch.cov(x.T).reshape(x.shape[1], x.shape[1])
    extremes = torch.linalg.eigh(covariance).eigenvectors[:, [0, -1]]
    return torch.cat((torch.eye(len(covariance)).to(extremes), extremes), -1)


def _is_calm(psis: Psis, weighted: Drift) -> bool:
    """Return True if the weights are reliable and show no error."""
    return (psis.khat < CALM or psis.even) and bool((weighted.errors + 2 * weighted.noise < SURE).all())


def judge(seen: Check) -> list[Finding]:
    """Return the findings of a check from its measurements, whatever findings it already has."""
    return [*_elsewhere(seen), *_off(seen), *_in_rows(seen), *_outside(seen), *_misshapen(seen)] or _doubts(seen)


def _more(seen: Check) -> float:
    """Return the additional standard errors that chains must show, which is positive if weights show no error."""
    return CONTRARY * _is_calm(seen.psis, seen.weighted)


def _flags(seen: Check) -> tuple[Tensor, Tensor]:
    """Return True for each certain error, ``(2, K)``: of chains, and of weights."""
    return seen.chains.flagged(CERTAIN + _more(seen)), seen.weighted.flagged(CERTAIN) & seen.psis.reliable


def _elsewhere(seen: Check) -> Iterator[Finding]:
    """Yield findings of mass that the guide misses, and of searches and chains that failed."""
    share, noise, _, error, is_blind, neck, outside, _ = seen.missing
    if outside and not share <= max(LOST, noise):  # also if the share is unknown
        yield Finding("support", outside, share, noise)
    elif share > max(LOST, noise):  # mass within its noise still counts
        flags, _ = _flags(seen)
        if neck and share < COLLAPSED:
            yield Finding("neck", neck, share, noise)
        elif bool(flags.any()):
            drift = seen.chains.worst(seen.names, flags)
            yield Finding("collapsed", drift.moment, share, noise)
        else:
            yield Finding("mode", "", share, noise)
    elif error is not None and share > noise:
        far = (error.errors > LIMIT) & (error.errors > 2 * error.noise)
        if bool(far.any()):
            found = replace(error.worst(seen.names, far, "far"), share=share)
            yield Finding("neck", f"{neck} ({found.moment})", share, noise) if neck else found
    if is_blind:
        yield Finding("blind")
    if max(seen.acceptance) < FROZEN:
        yield Finding("frozen", "", max(seen.acceptance))


def _off(seen: Check) -> Iterator[Finding]:
    """Yield the most significant certain error of a moment."""
    for drift, flags in zip((seen.chains, seen.weighted), _flags(seen), strict=True):
        if bool(flags.any()):
            mended = seen.psis.reliable and _agree(seen.chains, seen.weighted)
            yield replace(drift.worst(seen.names, flags), verdict="reweight" if mended else "do not trust")
            return


def _in_rows(seen: Check) -> Iterator[Finding]:
    """Yield the certain errors of means that the weights of single rows show, for each set of plates."""
    for rows in seen.rows:
        if rows.is_off(LIMIT):
            yield Finding("mean", rows.name, rows.error, rows.noise)


def _outside(seen: Check) -> Iterator[Finding]:
    """Yield findings of draws without a density, and of rare draws that spoil a moment."""
    verdict = "reweight" if seen.psis.reliable else "do not trust"
    outside = float((seen.psis.log_weights == -torch.inf).double().mean())
    if outside > OUTSIDE:
        yield Finding("outside", "", outside, verdict=verdict)
    ratios = (1 + seen.outliers).sqrt()
    if bool((ratios > 1 + LIMIT).any()):
        i = int(ratios.argmax())
        yield Finding("outliers", seen.names[i], float(ratios[i]), verdict=verdict)


def _misshapen(seen: Check) -> Iterator[Finding]:
    """Yield the certain error of a distribution function, and reliable weights that are very unequal."""
    of_chains, of_weights = seen.shapes
    told = seen.psis.reliable and bool(of_weights.flagged.any())
    shape, verdict = (of_weights, "reweight") if told else (of_chains, "do not trust")
    if bool(shape.flagged.any()):
        yield shape.worst([*seen.names, "the distance from the middle"], verdict)
    weights = seen.psis.smoothed.exp() * len(seen.psis.smoothed)
    apart = float((weights - 1).abs().mean()) / 2  # the total variation distance between guide and posterior
    if seen.psis.reliable and apart > UNEQUAL and not seen.spreads:  # small errors of many latents add up
        yield Finding("weights", "", apart, verdict="reweight")


def _doubts(seen: Check) -> list[Finding]:
    """Return the gravest doubt about draws without a certain error, or nothing."""
    psis, chains, directions, names = seen.psis, seen.chains, seen.directions, seen.names
    bent = directions.beyond(BENT)
    labels = [f"whitened direction {i}" for i in range(len(directions.error))]
    if bool(bent.any()):
        return [directions.worst(labels, bent, "whitened")]
    if psis.khat >= WORST_KHAT and not psis.even and not seen.spreads:
        return [Finding("tails", "", psis.khat)]
    if seen.spreads and not psis.even:
        for name, error, noise, slowness in zip(*seen.spreads, strict=True):
            if slowness >= SLOWEST:
                return [Finding("slow", name, float(slowness))]
            if error.abs() + noise >= LIMIT:
                return [Finding("unclear", f"all of {name}", 1 / (1 + float(error)), float(noise), of="sd")]
    pooled = chains.pooled_with(seen.weighted) if psis.reliable else chains
    told = torch.maximum(pooled.errors, pooled.noise) <= LIMIT  # False for NaN too, from chains that overflowed
    if not bool(told.all()):
        return [pooled.worst(names, kind="unclear")]
    dim = (directions.noise > BENT) & (directions.variance > 1)
    if seen.spreads and bool(dim.any()):
        return [directions.worst(labels, dim, "unclear")]
    doubtful = (chains.errors > LIMIT) & (chains.errors > (DOUBT + _more(seen)) * chains.noise)
    doubtful[1] &= chains.variance > 1  # guides that are too narrow, which weights cannot show
    return [chains.worst(names, doubtful, "doubt")] if bool(doubtful.any()) else []


def _agree(chains: Drift, weighted: Drift) -> bool:
    """Return True if chains and weights show the same errors."""
    apart, noise = (chains.signed - weighted.signed).abs(), chains.noise.hypot(weighted.noise)
    size = 1 + weighted.errors  # large errors need only agree in proportion
    return not bool(((apart > FLAG * size) & (apart > 3 * noise)).any()) and bool((weighted.noise < LIMIT * size).all())
