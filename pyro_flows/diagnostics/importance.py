"""Importance sampling: weigh a guide's draws, and resample them.

For draws z of the guide q the log-weights are log p(z, x) - log q(z).  The mean weight estimates the evidence p(x).
k-hat is the shape of a generalised Pareto distribution fitted to the largest weights.  Estimates are reliable if it is
below 0.7, or below 1 - 1 / log10 S for few draws, and good below 0.5.  A mode that the guide misses does not raise
k-hat, because no draw shows it.

If k-hat is low, resampled draws are draws of the posterior.  Systematic resampling puts N points u, u + 1/N, u + 2/N,
..., with u uniform on [0, 1/N), on the weights laid end to end.  It keeps a draw of weight w N w times on average,
rounded up or down, with less noise than independent picks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from .. import plots
from ..arguments import check_integers
from ..programs.checks import check_likelihood, flat_by_mask
from ..programs.engines import View
from ..programs.model_and_guide import Draws, Task
from ..programs.program import Function, runs_programs
from ..programs.sites import Values
from ..sampling.annealed_population import systematic
from ..user_code import warn_user
from .unreached import check_reach

LatentsAt = Callable[[Tensor], Values]  # returns the model's latents at the draws with some indices, (K,)
EVEN = 1.0  # nats by which the largest of even weights may exceed their mean
ROUND_OFF = 1e-4  # nats by which weights of an even tail differ
FEWEST = 5  # weights in the tail


@dataclass(frozen=True)
class Weighing:
    """Numbers of draws to weigh.

    Attributes:
        least: The fewest draws that have a tail to fit.
        usual: The draws by default.
        alone: The draws if the model runs one draw at a time.
        slow: The draws if a check of such a model, ``runs`` runs, takes longer than ``seconds``.
        many: The latents beyond which small errors of many of them add up in k-hat.
        of_many: The fewest draws then.
        numbers: The numbers in all draws of so many latents, and in those that run at once.
        held: The numbers in the draws that are only looked at.
        batch: The most draws that run at once.
    """

    least: int = 25
    usual: int = 10_000
    alone: int = 1000
    slow: int = 300
    runs: int = 20_000
    seconds: float = 180.0
    many: int = 1000
    of_many: int = 500
    numbers: int = 10_000_000
    held: int = 20_000_000
    batch: int = 1000

    def too_slow(self, task: Task) -> str:
        """Return the reason why a check of a model takes too long, in words, or an empty string."""
        budget = task.budget(self.seconds)
        return budget.words if budget.number < self.runs else ""

    def at_once(self, task: Task) -> int:
        """Return the number of draws of a settled task that run at once, which depends on the numbers in them."""
        return max(1, min(self.batch, self.numbers // max(task.model.largest, task.guide.largest)))

    def number(self, task: Task, dim: int) -> int:
        """Return the default number of draws of a settled task and D latents; of many it depends on their numbers."""
        found = self.alone if task.runs_one_by_one else self.usual
        found = self.slow if self.too_slow(task) else found
        if dim <= self.many:
            return found
        return min(found, max(self.of_many, self.numbers // max(dim, task.model.largest)))


WEIGHING = Weighing()


@dataclass(frozen=True)
class Psis:
    """Importance weights of a guide's draws: the result of :func:`psis`.

    For draws z_s of the guide q, with weights w_s and normalised smoothed weights v_s::

        w_s = p(z_s, x) / q(z_s),    log evidence ≈ log 1/S Σ_s w_s,    ESS = 1 / Σ_s v_s²

    Attributes:
        khat: The shape of the tail of the weights; ``-inf`` if all weights are equal.
        threshold: ``min(1 - 1 / log10 S, 0.7)``.  Below it, reweighted estimates are reliable where the guide draws.
        ess: The effective sample size of the smoothed weights, between 1 and S.
        log_evidence: The logarithm of the mean weight, in nats: log p(x) if the guide covers the posterior.
        log_evidence_se: The standard error of ``log_evidence``, in nats.  It includes one weight beyond the largest, of
            the size that k-hat predicts, and is infinite if k-hat is 1 or more.  Mass that the guide misses is not
            included.
        log_weights: The raw log-weights log p - log q, ``(S,)``, in nats.
        smoothed: The smoothed log-weights, normalised: their exponentials sum to one, ``(S,)``.

    Example::

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("x", dist.Normal(0.0, 1.1))
        >>> found = psis(model, guide, num_samples=1000)
        >>> found.reliable, found.log_weights.shape, round(found.smoothed.exp().sum().item(), 3)
        (True, torch.Size([1000]), 1.0)
    """

    khat: float
    threshold: float
    ess: float
    log_evidence: float
    log_evidence_se: float
    log_weights: Tensor
    smoothed: Tensor

    @property
    def reliable(self) -> bool:
        """True if k-hat is below its threshold, or the weights are even."""
        return self.khat < self.threshold or self.even

    @property
    def even(self) -> bool:
        """True if no weight exceeds e times the mean, so that the tail is too short for k-hat to matter."""
        return float(self.log_weights.max()) - self.log_evidence < EVEN

    def plot(self) -> Any:
        """Plot the weights with :func:`pyro_flows.plots.weights`."""
        return plots.weights(self)

    def __repr__(self) -> str:
        return (
            f"Psis(khat={self.khat:.2f}, threshold={self.threshold:.2f}, ess={self.ess:.0f} of {len(self.log_weights)},"
            f" log_evidence={self.log_evidence:.3f} ± {self.log_evidence_se:.3f})"
        )


@runs_programs
def psis(model: Function, guide: Function, *args: Any, num_samples: int = 10_000, **kwargs: Any) -> Psis:
    """Return k-hat, effective sample size and log evidence of any Pyro guide, by importance sampling.

    The weights are p(z, x) / q(z).  The largest are smoothed by a generalised Pareto distribution, and k-hat is its
    shape (Vehtari, Simpson, Gelman, Yao, Gabry 2015, arXiv:1507.02646; Yao, Vehtari, Simpson, Gelman 2018,
    arXiv:1802.02538).  A mode that the guide misses does not raise k-hat, so see :func:`~pyro_flows.check` too.

    Args:
        model: A Pyro model.
        guide: A Pyro guide of the same latents.
        *args: The model's arguments.
        num_samples: The number S of draws, at least 25.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.Psis`.

    Raises:
        ValueError: If a number is out of its range, the guide is a point, the latents of model and guide differ, a
            plate is subsampled, a weight is not finite, or all weights are zero.  If the guide's support leaves out
            more than 1 % of the posterior's mass.

    Warns:
        UserWarning: If the model runs one draw at a time, or its log-density is an estimate with visible noise.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("x", dist.Normal(1.0, 0.75))  # the posterior is Normal(1, 0.71)
        >>> found = psis(model, guide)
        >>> found.reliable, round(found.log_evidence, 1)  # log Normal(2; 0, 2**0.5)
        (True, -2.3)
    """
    check_integers("psis", WEIGHING.least, num_samples=num_samples)
    task, draws = _drawn("psis", Task(model, guide, args, kwargs), num_samples)
    return weigh(draws.log_p - draws.log_q, "psis", task, draws.latents_at)


def _drawn(caller: str, task: Task, number: int) -> tuple[Task, Draws]:
    """Return a task whose draws can be weighed, and draws; raise ValueError if the guide does not reach the mass."""
    with pyro.validation_enabled(False):  # because the weights show draws without a density
        task = task.check()
        check_reach(caller, task)
        return task, task.draw(number, WEIGHING.at_once(task.settle()))


def weigh(
    log_weights: Tensor, caller: str = "psis", task: Task | None = None, latents: LatentsAt | None = None
) -> Psis:
    """Return the summary of raw log-weights, ``(S,)`` in nats, of the draws of a task.

    Args:
        log_weights: The log-weights.
        caller: The public function, for errors.
        task: The task, if errors are to name its sites.
        latents: The model's latents.

    Raises:
        ValueError: If a weight is NaN or infinite, or all weights are zero.
    """
    bad = (log_weights.isnan() | (log_weights == math.inf)).nonzero()
    if len(bad):
        cause = _cause(task, latents(bad[0])) if task and latents else "from the model's density"
        raise ValueError(f"{caller}: {len(bad)} of {len(log_weights)} log-weights are NaN or +inf: {cause}.")
    if (log_weights == -math.inf).all():
        if task is not None:
            check_likelihood(caller, task.traces[0])
        fault = "all log-weights are -inf; the guide draws only where the model has no density"
        raise ValueError(f"{caller}: {fault}. Fit the guide to this model and these data first.")
    raw, size = log_weights.double().cpu(), len(log_weights)
    relative = (raw - raw.max()).exp()
    mean, noise = relative.mean(), relative.std() / math.sqrt(size)
    smoothed, khat = smooth(raw)
    largest = float(1 / mean)  # of the weights, in units of their mean
    tail = khat if largest > math.exp(EVEN) else min(khat, 0.0)
    unseen = (largest - 1) / (1 - tail) if tail < 1 else math.inf  # the expected excess of a weight beyond the largest
    threshold, ess = min(1 - 1 / math.log10(size), 0.7), float(1 / smoothed.exp().square().sum())
    evidence = float(raw.max() + mean.log()), math.hypot(float(noise / mean), unseen / size)
    return Psis(khat, threshold, ess, *evidence, log_weights, smoothed.to(log_weights))


def _cause(task: Task, latents: Values) -> str:
    """Return in words which site has no finite density at a draw, ``(1, *site_shape)``, and the way out."""
    way = flat_by_mask(*task.traces)
    way = f"The posterior may be improper: {way}" if way else "Fit a new guide, and look at its losses"
    for name, value in latents.items():
        if not value.isfinite().all():
            return f"the guide draws latent site {name!r} at {float(value[~value.isfinite()][0])}. {way}"
    if task.model.enumerated:
        return f"the model's log-density, discrete latents summed out, or the guide's is not finite. {way}"

    def read(view: View) -> Values:
        return {name: view.log_prob(name.__eq__) for name in view.trace.nodes}

    for name, value in task.model.by("loop").run(read, latents, 1).items():
        if not value.isfinite().all():
            return f"the log-density of the model's site {name!r} is {float(value)}. {way}"
    return f"the guide's log-density is not finite. {way}"


@runs_programs
def resample(
    model: Function, guide: Function, *args: Any, num_samples: int = 1000, num_weighed: int = 10_000, **kwargs: Any
) -> dict[str, Tensor]:
    """Return draws of any Pyro guide, resampled by Pareto-smoothed weights to be closer to the posterior.

    A draw of normalised weight w is kept N w times, rounded up or down at random (systematic resampling: Douc, Cappé,
    Moulines 2005, arXiv:cs/0507025).  The same seed gives the same draws (``pyro.set_rng_seed``).  Draws of large
    weight are repeated, so N draws have less information than N independent ones.

    Args:
        model: A Pyro model.
        guide: A Pyro guide of the same latents.
        *args: The model's arguments.
        num_samples: The number N of draws to keep.
        num_weighed: The number of weighted draws of the guide to choose from, at least 25; N if N is larger.
        **kwargs: The model's keyword arguments.

    Returns:
        For each latent and deterministic site of the model, values of shape ``(num_samples, *site_shape)``.

    Raises:
        ValueError: If a number is out of its range, or :func:`~pyro_flows.psis` refuses the guide or its weights.

    Warns:
        UserWarning: If k-hat is above its threshold, so that the draws cannot be trusted.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("x", dist.Normal(0.0, 1.5))
        >>> pyro.set_rng_seed(0)
        >>> draws = resample(model, guide, num_samples=4000)
        >>> draws["x"].shape, bool((draws["x"].std() - 1).abs() < 0.1)
        (torch.Size([4000]), True)
    """
    check_integers("resample", num_samples=num_samples)
    check_integers("resample", WEIGHING.least, num_weighed=num_weighed)
    task, draws = _drawn("resample", Task(model, guide, args, kwargs), max(num_samples, num_weighed))
    kept, _ = reweighted(draws, num_samples, "resample", task)
    return task.values(kept.latents, WEIGHING.at_once(task))


def reweighted(draws: Draws, number: int, caller: str, task: Task | None = None) -> tuple[Draws, Psis]:
    """Return draws of a task resampled by their weights, and the summary of the weights."""
    psis = weigh(draws.log_p - draws.log_q, caller, task, draws.latents_at)
    if not psis.reliable:
        warn_user(
            f"{caller}: k-hat is {psis.khat:.2f}, above {psis.threshold:.2f}: a few draws hold most of the weight, and "
            "the resampled draws cannot be trusted. Fit the guide longer, or use a flow with more layers."
        )
    kept = systematic(psis.smoothed.double().softmax(-1), number)
    return draws.take(kept[torch.randperm(number, device=kept.device)]), psis


def smooth(log_weights: Tensor) -> tuple[Tensor, float]:
    """Smooth raw log-weights.

    If the largest weights are equal, up to the round-off of float32 log-densities, there is no tail to smooth and k-hat
    is -inf.

    Args:
        log_weights: ``(S,)``, in double precision; not all are -inf.

    Returns:
        The normalised log-weights, ``(S,)``, and k-hat, which is inf if too few weights of the tail are positive.
    """
    size = len(log_weights)
    relative, order = (log_weights - log_weights.max()).sort()
    number = math.ceil(min(size / 5, 3 * math.sqrt(size)))
    if -relative[-number] < ROUND_OFF:
        return log_weights.log_softmax(0), -math.inf
    cutoff = relative[-number - 1].clamp_min(math.log(torch.finfo(relative.dtype).tiny))
    above = relative > cutoff
    tail = relative[above].exp() - cutoff.exp()
    khat, sigma = fit_generalized_pareto(tail) if len(tail) >= FEWEST else (math.inf, 0.0)
    if not (math.isfinite(khat) and sigma > 0):
        return log_weights.log_softmax(0), math.inf if math.isnan(khat) else khat
    levels = torch.arange(0.5, len(tail), dtype=tail.dtype, device=tail.device) / len(tail)
    exponential = -torch.log1p(-levels)
    quantiles = exponential if khat == 0 else torch.expm1(khat * exponential) / khat
    smoothed = relative.clone()
    smoothed[above] = (sigma * quantiles + cutoff.exp()).log().clamp_max(0)
    return torch.empty_like(relative).scatter_(0, order, smoothed).log_softmax(0), khat
