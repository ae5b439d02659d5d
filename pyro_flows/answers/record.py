"""The record of an answer: draws of a posterior, and how far to trust them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import plots
from ..diagnostics import to_arviz
from ..persistence import save
from ..persistence.classes import BY_TYPE, register
from ..programs import Program
from ..sampling import Samples
from .predictions import predicted
from .table import arrays_of, table_of

SHOWN = 12  # lines of the table in a notebook


class Question(NamedTuple):
    """A model with the arguments that it is run with.

    Attributes:
        model: The model, with its arguments if the guide was made from both.
        args: The arguments, if a guide was given that is called with them.
        kwargs: The keyword arguments then.
        bare: The model without arguments.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bare: Callable[..., Any]


class Step(NamedTuple):
    """One stage on the way to an answer.

    Attributes:
        name: The stage: ``"fit"``, ``"check"``, ``"chains"`` or ``"population"``.
        seconds: Its wall time.
        verdict: The verdict on the draws that it could judge, or an empty string.
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


@dataclass(frozen=True, repr=False)
class Posterior:
    """Draws of a posterior, and how far to trust them: the result of :func:`~pyro_flows.posterior`.

    Attributes:
        draws: Draws of the latents and deterministic sites, all of equal weight: name -> ``(num_draws, *site_shape)``.
        verdict: ``"trust"`` or ``"do not trust"``.
        reason: The reason for the verdict, in words.
        log_evidence: The log evidence, in nats; NaN if it is unknown: the draws cannot be trusted, or the weights of a
            trusted guide have no mean.
        log_evidence_se: Its standard error, in nats.
        steps: The stages that were tried, in their order.
        seconds: The wall time.
        guide: The guide that the draws come from, or that the chains started from.
        chains: The chains, with R-hat and effective sample sizes; None if the draws come from a guide.
        question: The model and its arguments, which are not saved; None after :func:`~pyro_flows.load`.
        resampled: True if draws of the guide were resampled by their weights.

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
    question: Question | None = field(default=None)
    resampled: bool = False

    @property
    def interrupted(self) -> bool:
        """True if Ctrl-C has ended it."""
        return self.steps[-1].said.startswith("interrupted")

    @property
    def trusted(self) -> bool:
        """True if the verdict is ``"trust"``."""
        return self.verdict == "trust"

    def summary(self, **labels: list[str]) -> str:
        """Return a table to print: mean, sd and quantiles of each number, with R-hat and ESS if it comes from chains.

        Args:
            **labels: Names for the numbers of a site, in place of their indices.

        Raises:
            ValueError: If a site has other labels than numbers.
        """
        columns = {}
        if self.chains is not None:
            ess = self.chains.ess_bulk.minimum(self.chains.ess_tail)
            for name, rhat, size in zip(self.chains.names, self.chains.rhat, ess, strict=True):
                columns[name] = f"{float(rhat):.3f}", f"{float(size):.0f}"
        return "\n".join(table_of(arrays_of(self.draws), labels, ("R-hat", "ESS"), columns))

    def predictive(self, model: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw predictions: the sites of a model that are not given, at each draw of the posterior.

        Draws of latents are put into the sites of the same names and shapes, and all others are sampled.  So rows of a
        plate that are new in number are drawn given the latents outside of it.

        Args:
            model: The model; by default the one that was asked about.  Give None if arguments follow.
            *args: Its new arguments, with None for data that are to be predicted.  Without any arguments the observed
                sites are drawn anew at the data of the fit.
            **kwargs: Its new keyword arguments.

        Returns:
            Observed sites that were drawn, other sites without draws here, and deterministic ones: name ->
            ``(num_draws, *site_shape)``.

        Raises:
            TypeError: If the model cannot be called, such as data that are given without None before them.
            ValueError: If a loaded answer is given no model, or no site is left to predict.
        """
        if not (model is None or callable(model)):
            fault = f"model must be a model or None, got a {type(model).__name__}"
            raise TypeError(f"predictive: {fault}. Give None first: predictive(None, x).")
        if model is None and self.question is None:
            raise ValueError("predictive: model must be given to a loaded answer, got None. Give the model of the fit.")
        if self.question and model is None and not (args or kwargs):
            return predicted(self.draws, *self.question[:3], again=True)
        found = predicted(self.draws, model or self.question.bare, args, kwargs, again=False)  # type: ignore[union-attr]
        if not found:
            fault = "the arguments must leave a site to predict, but all sites are given"
            raise ValueError(f"predictive: {fault}. Give None in place of the data: predictive(None, x, None).")
        return found

    def to_arviz(self, **settings: Any) -> Any:
        """Return the draws in ArviZ's container, with their chains if they come from chains.

        Draws of a guide are one chain, with the attributes ``inference_method="variational"`` and
        ``importance_resampled`` (1 or 0).

        Args:
            **settings: Settings of :func:`~pyro_flows.to_arviz`, such as ``posterior_predictive=True``.

        Raises:
            ValueError: If the answer was loaded, and so has no model.
        """
        if self.question is None:
            anew = "Draw from its guide anew by pf.to_arviz(model, found.guide, ...)"
            raise ValueError(f"to_arviz: a loaded answer has no model. {anew}, or ask again by pf.posterior(...).")
        model, args, kwargs, _ = self.question
        data = to_arviz(Program(model, kwargs=kwargs), self._as_chains(), *args, **settings)
        for group in data.values() if self.chains is None else ():
            del group.attrs["converged"], group.attrs["divergences"]
            group.attrs.update(inference_method="variational", importance_resampled=int(self.resampled))
        return data

    def _as_chains(self) -> Samples:
        """Return the chains, or the draws as one chain."""
        if self.chains is not None:
            return self.chains
        none, draws = torch.zeros(0), {name: value.unsqueeze(0) for name, value in self.draws.items()}
        return Samples(draws, [], none, none, none, self.trusted, 0, [], math.nan, 0, self.seconds, self.guide)

    def plot(self) -> Any:
        """Plot the marginals of the first twelve numbers, by :func:`pyro_flows.plots.marginals`.

        For others give it their draws: ``pf.plots.marginals({"theta": found.draws["theta"][:, 12:24]})``.
        """
        return plots.marginals(arrays_of(self.draws))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the draws and the facts to a file, for :func:`pyro_flows.load`, without model, data and chains.

        A guide of pyro_flows is in the file too.

        Args:
            path: The file, which is replaced if it exists.

        Raises:
            OSError: If the file cannot be written; then nothing has changed.
            ValueError: If draws are sparse or of complex128, or the guide holds parts of your own classes; leave it
                out, by ``dataclasses.replace(answer, guide=None)``.
        """
        save(self, path)

    def parts(self) -> dict[str, Any]:
        """Return what a file holds of the answer."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("chains", "question")}
        guide = self.guide if type(self.guide) in BY_TYPE else None
        return {**own, "steps": [tuple(step) for step in self.steps], "guide": guide}

    @classmethod
    def from_parts(
        cls, draws: dict[str, Tensor], steps: Sequence[Sequence[Any]], guide: Any = None, **facts: Any
    ) -> Posterior:
        """Build an answer from its :meth:`parts`.

        Raises:
            TypeError: If a part is missing.
            ValueError: If a part is not of its kind.
        """
        made = cls(draws, steps=tuple(Step(*step) for step in steps), guide=guide, **facts)
        numbers = made.log_evidence, made.log_evidence_se, made.seconds, *(step.seconds for step in made.steps)
        texts = made.reason, *(text for step in made.steps for text in (step.name, step.verdict, step.said))
        kinds = {
            "draws": isinstance(draws, dict) and all(isinstance(v, Tensor) and v.ndim for v in draws.values()),
            "names": isinstance(draws, dict) and all(isinstance(name, str) for name in draws),
            "verdict": made.verdict in ("trust", "do not trust"),
            "numbers": all(type(number) in (int, float) for number in numbers),
            "texts": all(isinstance(text, str) for text in texts),
            "steps": bool(made.steps),
            "guide": guide is None or isinstance(guide, nn.Module),
            "chains": made.chains is None and made.question is None,
        }
        if wrong := [name for name, fits in kinds.items() if not fits]:
            raise ValueError(f"its {wrong[0]} are not those of an answer")
        return made

    def __repr__(self) -> str:
        lines = self.summary().splitlines()
        more = [f"... {len(lines) - SHOWN} more lines, see summary()"] if len(lines) > SHOWN else []
        known = f", log evidence {self.log_evidence:.3f} ± {self.log_evidence_se:.3f}"
        stages = " → ".join(step.name for step in self.steps)
        end = f"{stages}: {self.seconds:.1f} s{'' if math.isnan(self.log_evidence) else known}"
        return "\n".join([f"Posterior: {self.verdict}. {self.reason}", *lines[:SHOWN], *more, end])


register("answers.Posterior", Posterior)
