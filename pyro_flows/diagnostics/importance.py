"""How far to trust a guide: Pareto-smoothed importance sampling.

With draws z from the guide q and log-weights log p(z, x) - log q(z), the mean weight estimates the evidence p(x), and
the shape k-hat of a generalised Pareto distribution fitted to the largest weights says whether that works: below 0.7
(below 0.5: well), or below 1 - 1 / log10 S for few draws.  It looks only where the guide looks: a mode that the guide
misses does not raise k-hat.

Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry 2015, arXiv:1507.02646); Yes, but Did It Work?
(Yao, Vehtari, Simpson, Gelman 2018, arXiv:1802.02538).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from .. import plots
from ..checks import is_integer, joined
from ..compat import psislw
from ..programs.nesting import takes_nesting
from ..programs.task import Task


@dataclass(frozen=True)
class Psis:
    """How a guide's draws weigh against the model: the result of :func:`psis`.

    With draws z_s of the guide q, weights w_s, and v_s the smoothed ones, normalised::

        w_s = p(z_s, x) / q(z_s),    log evidence ≈ log 1/S Σ_s w_s,    ESS = 1 / Σ_s v_s²

    Attributes:
        khat: The shape of the tail of the weights; ``-inf`` where all weights are equal.
        threshold: ``min(1 - 1 / log10 S, 0.7)``: below it, reweighted estimates can be trusted where the guide looks.
        ess: The effective sample size of the smoothed weights, between 1 and S.
        log_evidence: The logarithm of the mean weight, in nats: log p(x) where the guide covers the posterior.
        log_evidence_se: Its standard error, in nats.
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
        """Whether k-hat is below its threshold."""
        return self.khat < self.threshold

    def plot(self) -> Any:
        """Picture the weights: :func:`pyro_flows.plots.weights`."""
        return plots.weights(self)

    def __repr__(self) -> str:
        evidence = f"{self.log_evidence:.3f} ± {self.log_evidence_se:.3f}"
        return (
            f"Psis(khat={self.khat:.2f}, threshold={self.threshold:.2f}, "
            f"ess={self.ess:.0f} of {len(self.log_weights)}, log_evidence={evidence})"
        )


@takes_nesting
def psis(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 10_000,
    batch_size: int = 1000,
    vectorize: str = "auto",
    max_plate_nesting: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Psis:
    """Weigh draws of any Pyro guide against the model: k-hat, the effective sample size and the log evidence.

    The weights are p(z, x) / q(z), smoothed by a generalised Pareto distribution that is fitted to the largest; k-hat
    is its shape (Vehtari, Simpson, Gelman, Yao, Gabry 2015, arXiv:1507.02646; Yao et al. 2018, arXiv:1802.02538).  It
    looks only where the guide looks: a mode that the guide misses does not raise it, so see :func:`~pyro_flows.check`
    too.

    Args:
        model: A Pyro model.
        guide: A Pyro guide of the same latents.
        *args: The model's arguments.
        num_samples: The number S of draws, at least 25.
        batch_size: How many draws are run at once.
        vectorize: The way to run many draws: ``"plate"``, ``"vmap"`` or ``"loop"``; by default the first of these that
            does to draws what single runs do (*Any Pyro program* in the docs).
        max_plate_nesting: How many dimensions the plates of model and guide take; by default what one run shows.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Returns:
        The :class:`~pyro_flows.Psis`.

    Raises:
        ValueError: If a number is out of its range; if the guide is a point, lacks a latent of the model or has one of
            another model; if a plate is subsampled; or if a weight is not finite, or all are zero.

    Warns:
        UserWarning: If the model runs one draw at a time, or its log-density is an estimate whose noise shows.

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
    if not is_integer(num_samples) or num_samples < 25:
        raise ValueError(f"psis: num_samples must be at least 25 to fit a tail, got {num_samples!r}.")
    kwargs = joined("psis", kwargs, model_kwargs)
    with pyro.validation_enabled(False):  # a draw of no density is for the weights to show
        draws = Task(model, guide, args, kwargs, vectorize).check().draw(num_samples, batch_size)
    return weigh(draws.log_p - draws.log_q)


def weigh(log_weights: Tensor) -> Psis:
    """Summarise raw log-weights, ``(S,)`` in nats."""
    if log_weights.isnan().any() or (log_weights == math.inf).any():
        bad = int((log_weights.isnan() | (log_weights == math.inf)).sum())
        raise ValueError(
            f"psis: {bad} of {len(log_weights)} log-weights are NaN or +inf; the model's density is not finite."
        )
    if (log_weights == -math.inf).all():
        raise ValueError("psis: all log-weights are -inf; the guide draws only where the model has no density.")
    raw, size = log_weights.double().cpu(), len(log_weights)
    relative = (raw - raw.max()).exp()
    mean = relative.mean()
    log_smoothed, khat = psislw(raw.numpy())
    smoothed = torch.as_tensor(log_smoothed).log_softmax(0)
    return Psis(
        khat=khat,
        threshold=min(1 - 1 / math.log10(size), 0.7),
        ess=float(1 / smoothed.exp().square().sum()),
        log_evidence=float(raw.max() + mean.log()),
        log_evidence_se=float(relative.std() / mean / math.sqrt(size)),
        log_weights=log_weights,
        smoothed=smoothed.to(log_weights),
    )
