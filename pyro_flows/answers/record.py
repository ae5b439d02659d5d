"""The answer to a question about a model: draws of its posterior, and how far to trust them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from pyro.infer import Predictive
from torch import Tensor

from .. import plots
from ..diagnostics import to_arviz
from ..persistence import save
from ..persistence.classes import BY_TYPE, register
from ..sampling import Samples
from .table import table_of

SHOWN = 12  # rows of the table in a notebook


class Step(NamedTuple):
    """One stage on the way to an answer.

    Attributes:
        name: The stage: ``"fit"``, ``"check"``, ``"chains"`` or ``"population"``.
        seconds: Its wall time.
        verdict: The verdict on what it found, or an empty string.
        said: The result in words.

    Example::

        >>> print(Step("check", 1.2, "trust", "Weights, chains and search find no error."))
        check (1.2 s): trust. Weights, chains and search find no error.
    """

    name: str
    seconds: float
    verdict: str
    said: str

    def __str__(self) -> str:
        return f"{self.name} ({self.seconds:.1f} s): {f'{self.verdict}. ' if self.verdict else ''}{self.said}"


class Question(NamedTuple):
    """A model with its arguments."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Posterior:
    """Draws of a posterior, and how far to trust them: the result of :func:`~pyro_flows.posterior`.

    Attributes:
        draws: Draws of the latents and deterministic sites, all of equal weight: name -> ``(num_draws, *site_shape)``.
        verdict: ``"trust"`` or ``"do not trust"``.
        reason: The reason for the verdict, in words.
        log_evidence: The log evidence, in nats; NaN if it is not known.
        log_evidence_se: Its standard error, in nats; NaN if it is not known.
        steps: The stages that were tried, in their order.
        seconds: The wall time.
        guide: The guide that the draws come from, or that the chains started from.
        chains: The chains, with R-hat and effective sample sizes; None if the draws come from a guide.
        question: The model and its arguments, which are not saved; None after :func:`~pyro_flows.load`.

    Example::

        >>> import pyro, torch, pyro_flows as pf
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> found = pf.posterior(model, torch.tensor(2.0), progress=False)
        >>> found.verdict, found.draws["x"].shape, bool((found.draws["x"].mean() - 1).abs() < 0.1)
        ('trust', torch.Size([4000]), True)
        >>> [step.name for step in found.steps]
        ['fit', 'check']
    """

    draws: dict[str, Tensor]
    verdict: str
    reason: str
    log_evidence: float
    log_evidence_se: float
    steps: tuple[Step, ...]
    seconds: float
    guide: Any = None
    chains: Samples | None = None
    question: Question | None = field(default=None, repr=False)

    @property
    def trusted(self) -> bool:
        """True if the verdict is ``"trust"``."""
        return self.verdict == "trust"

    def summary(self) -> str:
        """Return a table of means, standard deviations and quantiles of each number, to print."""
        return "\n".join(table_of({name: value.numpy(force=True) for name, value in self.draws.items()}, {}))

    def predictive(self, model: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return predictions: draws of the sites that have no draws here, given those that have.

        Args:
            model: The model; by default the one that was asked about.  Give None if arguments follow.
            *args: Its new arguments, in which None stands for data that are to be predicted.
            **kwargs: Its new keyword arguments.

        Raises:
            ValueError: If a loaded answer gets no model.
        """
        if model is None and self.question is None:
            raise ValueError("predictive: model must be given, since a loaded answer has none, got None.")
        asked = model or (self.question.model if self.question else None)
        return Predictive(asked, posterior_samples=self.draws)(*args, **kwargs)

    def to_arviz(self, **settings: Any) -> Any:
        """Return the draws in ArviZ's container, as :func:`~pyro_flows.to_arviz` does.

        Args:
            **settings: Its settings.

        Raises:
            ValueError: If the answer was loaded, and so has no model.
        """
        if self.question is None:
            raise ValueError("to_arviz: a loaded answer has no model.")
        model, args, kwargs = self.question
        return to_arviz(model, self._as_chains(), *args, **settings, **kwargs)

    def _as_chains(self) -> Samples:
        """Return the chains, or the draws as one chain."""
        if self.chains is not None:
            return self.chains
        nan, draws = torch.full((1,), math.nan), {name: value.unsqueeze(0) for name, value in self.draws.items()}
        return Samples(draws, ["all"], nan, nan, nan, self.trusted, 0, [], math.nan, 0, self.seconds, self.guide)

    def plot(self) -> Any:
        """Plot the marginals: :func:`pyro_flows.plots.marginals`."""
        return plots.marginals(self.draws)

    def without_question(self) -> Posterior:
        """Return the answer without the model and its data."""
        return replace(self, question=None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the draws and the facts to a file, for :func:`pyro_flows.load`, without model, data and chains.

        A guide of pyro_flows is in the file too.

        Args:
            path: The file, which is replaced if it exists.

        Raises:
            OSError: If the file cannot be written; then nothing has changed.
            ValueError: If the guide holds parts of your own classes; leave it out, by
                ``dataclasses.replace(answer, guide=None)``.
        """
        save(self, path)

    def parts(self) -> dict[str, Any]:
        """Return what a file holds of the answer."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("chains", "question")}
        guide = self.guide if type(self.guide) in BY_TYPE else None
        return {**own, "steps": [tuple(step) for step in self.steps], "guide": guide}

    @classmethod
    def from_parts(cls, steps: Sequence[Sequence[Any]], **parts: Any) -> Posterior:
        """Build an answer from its :meth:`parts`."""
        return cls(steps=tuple(Step(*step) for step in steps), **parts)

    def __repr__(self) -> str:
        lines = [f"Posterior: {self.verdict}. {self.reason}", *self.summary().splitlines()[: SHOWN + 1]]
        return "\n".join([*lines, f"{', '.join(step.name for step in self.steps)}: {self.seconds:.1f} s"])


register("answers.Posterior", Posterior)
