"""The verdict on a guide: whether its draws can be trusted, and why.

Three tests look at the draws, and none needs the true posterior:

* importance weights compare guide and posterior at the draws, and k-hat tells whether the weights are reliable; many
  more draws show whether a few lie where the posterior has no density (:mod:`.few_latents`);
* short Markov chains from the draws drift if the guide is wrong nearby (:mod:`.drift`);
* a population annealed from the prior finds mass that lies far away (:mod:`.missing_modes`).

Beyond 1,000 latents the first two look at some quantities: at all numbers of small sites, such as scales, at those
that scores suspect, and at random ones.  The last is left out.  So are k-hat and other measures in which small errors
of many latents add up.

Draws are trusted if each mean is right to 0.1 standard deviations, each standard deviation to 10 %, each distribution
function to about 0.05, and hardly any mass is missing.  Each error is a finding (:mod:`.findings`), and the verdict is
the worst that follows from any finding.
"""

import time
from dataclasses import dataclass
from typing import Any

import pyro

from .. import plots
from ..arguments import check_integers
from ..programs.checks import check_trained
from ..programs.density import Density
from ..programs.model_and_guide import Task
from ..programs.program import Function, runs_programs
from . import few_latents, many_latents
from .drift import Drift
from .findings import NEXT, Finding, judge, worst
from .importance import WEIGHING
from .measurements import Measurements

LITTLE = 0.01  # the share of missing mass below which it is printed in four decimals


@dataclass(frozen=True)
class Check(Measurements):
    """The verdict on a guide and all measurements: the result of :func:`check`.

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

    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """``"trust"``, ``"reweight"`` (usable after reweighting) or ``"do not trust"``."""
        return worst(self.findings)

    @property
    def reason(self) -> str:
        """The reason for the verdict, in words."""
        if gravest := self._gravest:
            if gravest.verdict == "do not trust":
                return str(gravest)
            mend = f"but their weights are reliable (k-hat {self.khat:.2f}): resample the draws by their weights."
            return f"{str(gravest)[:-1]}, {mend}"
        largest = max(0.01, float(self._moments.errors.max()))
        found = f"Weights, chains and search find no error of a mean or sd beyond {largest:.2f} sd."
        if self.scope:
            found = f"No error of a mean or sd beyond {largest:.2f} sd was found. {self.scope}"
        elif not self.psis.reliable:
            found += f" Use the draws as they are: their weights are not reliable (k-hat {self.khat:.2f})."
        if self.rows:
            found += f" Weights of single rows have a k-hat of at most {', '.join(map(str, self.rows))}."
        return found

    @property
    def _gravest(self) -> Finding | None:
        """The first finding that the verdict follows from."""
        return next((finding for finding in self.findings if finding.verdict == self.verdict), None)

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
        return self.moments if self.trusted else self.chains

    def __repr__(self) -> str:
        low, high = self.sd_ratios
        share, gravest = self.missing.share, self._gravest
        after = NEXT["weights"] if self.verdict == "reweight" else gravest.next if gravest else ""
        missing = (
            "?" if self.scope and not share > 0 else f"{share:.{4 if self.findings and 0 < share < LITTLE else 2}f}"
        )
        return (
            f"Check({self.verdict!r}, khat={self.khat:.2f}, log_evidence={self.log_evidence:.3f} ± "
            f"{self.log_evidence_se:.3f}, drift={self.drift:.2f}, sd_ratios={low:.2f}–{high:.2f}, "
            f"missing={missing}, seconds={self.seconds:.1f})\n{f'{self.reason} {after}'.strip()}"
        )

    def plot(self) -> Any:
        """Plot the errors of each quantity and the weights with :func:`pyro_flows.plots.check`."""
        return plots.check(self)


@runs_programs
def check(
    model: Function,
    guide: Function,
    *args: Any,
    num_samples: int | None = None,
    num_chains: int | None = None,
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
        **kwargs: The model's keyword arguments.

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
    check_integers("check", 100, optional=True, num_samples=num_samples)
    check_integers("check", 16, optional=True, num_chains=num_chains)
    check_trained("check", guide)
    return assess(Task(model, guide, args, kwargs), num_samples, num_chains)


def assess(task: Task, num_samples: int | None = None, num_chains: int | None = None) -> Check:
    """Return the verdict on the guide of a task: see :func:`check`."""
    start = time.perf_counter()
    with pyro.validation_enabled(False):  # because the weights show draws without a density
        space = Density.sound(task)
        look = many_latents.look if space.dim > WEIGHING.many else few_latents.look
        seen = look(space, num_samples, num_chains)
    return Check(**vars(seen), findings=tuple(judge(seen)), seconds=time.perf_counter() - start)
