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

import torch
from torch import Tensor

from . import plots
from .compat import psislw
from .draws import draw


@dataclass(frozen=True)
class Psis:
    """The result of :func:`psis`.

    Attributes:
        khat: The shape of the tail of the weights; ``-inf`` where all weights are equal.
        threshold: ``min(1 - 1 / log10 S, 0.7)``: below it, reweighted estimates can be trusted where the guide looks.
        ess: The effective sample size of the smoothed weights, between 1 and S.
        log_evidence: The logarithm of the mean weight, in nats: log p(x) where the guide covers the posterior.
        log_evidence_se: Its standard error, in nats.
        log_weights: The raw log-weights log p - log q, ``(S,)``.
        smoothed: The smoothed log-weights, normalised: their exponentials sum to one, ``(S,)``.
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


def psis(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 10_000,
    batch_size: int = 1000,
    vectorize: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Psis:
    """Weigh draws of any Pyro guide against the model.

    Args:
        model: A Pyro model.
        guide: A Pyro guide of the same latents.
        *args: The model's arguments.
        num_samples: The number S of draws.
        batch_size: How many draws are run at once.
        vectorize: Run draws side by side under an outer plate; the model must then broadcast to the left of its plates,
            as it must for ``Trace_ELBO(vectorize_particles=True)``.  False runs them one after the other.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Raises:
        ValueError: If ``num_samples`` is too small, or no weight is finite.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("x", dist.Normal(0.0, 1.1))
        >>> bool(psis(model, guide).khat < 0.5)
        True
    """
    if num_samples < 25:
        raise ValueError(f"psis: num_samples must be at least 25 to fit a tail, got {num_samples}.")
    kwargs = {**kwargs, **(model_kwargs or {})}
    batches = draw(model, guide, args, kwargs, num_samples, batch_size=batch_size, vectorize=vectorize)
    return weigh(torch.cat([batch.log_p - batch.log_q for batch in batches]))


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
