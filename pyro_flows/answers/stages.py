"""The stages of an answer: fit, check, chains from a guide, and a population that finds modes.

Each stage leaves a step that says what it found.  The best guide so far, or converged chains, become the draws.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import validation_enabled
from torch import Tensor

from ..diagnostics import Check, Finding, check
from ..diagnostics.findings import VERDICTS
from ..diagnostics.importance import Psis, reweighted
from ..fitting import fit_svi
from ..fitting.chains_with_progress import exact
from ..fitting.mode_covering import cover, space_of
from ..guides import AutoFlow
from ..programs.model_and_guide import Task
from ..sampling import Samples
from ..sampling.converged_chains import Goal
from ..training.loop import Fit
from .record import Posterior, Question, Step

LOST = "mode", "far", "evidence", "blind"  # findings of mass that chains may not reach
PARTICLES = 2048  # of a population that searches for modes
SWEEPS = 1000  # the most of chains
LEAST = 400  # effective draws, below which R-hat says little
LESS = 0.1  # nats of evidence by which a guide may fall short of an earlier one
STARTS = 8  # draws of each guide from which climbs to modes start
PER_DRAW = 4  # weighted draws for each that is kept


@dataclass(frozen=True)
class Judged:
    """A guide and its check; None if there was no time for one."""

    guide: Any
    check: Check | None

    @property
    def misses(self) -> bool:
        """True if mass was found that chains from this guide may not reach."""
        return self.check is not None and any(finding.kind in LOST for finding in self.check.findings)

    @property
    def rank(self) -> tuple[int, float]:
        """The rank of the verdict, and the evidence lower bound in nats."""
        if self.check is None:
            return -1, -math.inf
        return -VERDICTS.index(self.check.verdict), float(self.check.psis.log_weights.mean())


@dataclass
class Stages:
    """The stages of one answer, and what they have found so far.

    Attributes:
        question: The model with its arguments.
        num_draws: The number of draws.
        progress: True to say which stage runs.
        judged: The guides that were fitted, with their checks.
        chains: The latest chains.
        steps: The stages so far.
    """

    question: Question
    num_draws: int
    progress: bool
    judged: list[Judged] = field(default_factory=list)
    chains: Samples | None = None
    steps: list[Step] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time a stage, and record it with the verdict and the words that are left in the list."""
        began, said = time.perf_counter(), ["", ""]
        if self.progress:
            print(f"posterior: {name} ...", file=sys.stderr)
        try:
            yield said
        except BaseException as error:
            said[1] = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}"
            raise
        finally:
            self.steps.append(Step(name, time.perf_counter() - began, *said))
            if self.progress:
                print(f"posterior: {self.steps[-1]}", file=sys.stderr)

    def fit(self, guide: Any) -> None:
        """Fit a guide, unless it was trained before."""
        model, args, kwargs = self.question
        with self.step("fit") as said:
            words = "trained before"
            if getattr(guide, "is_fresh", True):
                fit = fit_svi(model, guide, *args, progress=self.progress, **kwargs)
                words = f"loss {fit.best_loss:.3f} after {fit.steps} steps ({fit.stopped})"
            said[1] = f"{type(guide).__name__}, {words}"
            self.judged.append(Judged(guide, None))
            if words.endswith("(interrupted)"):
                raise KeyboardInterrupt

    def check(self) -> None:
        """Check the latest guide, and compare its evidence with that of earlier ones."""
        (model, args, kwargs), guide = self.question, self.judged[-1].guide
        with self.step("check") as said:
            found = self._compared(check(model, guide, *args, **kwargs))
            self.judged[-1] = Judged(guide, found)
            said[:] = found.verdict, found.reason

    def sample(self) -> None:
        """Run chains from the best guide.

        Some start where checks have found mass that guides lack.  If these do not mix with the others, R-hat is large.
        """
        with self.step("chains") as said, validation_enabled(False):
            space = space_of(self.best.guide, self._task(self.best.guide))
            others = torch.cat(lost) if (lost := self._lost()) else None
            goal = Goal(max(LEAST, self.num_draws), SWEEPS)
            self.chains = exact(space, goal, None, progress=self.progress, others=others)
            said[:] = "trust" if self.chains.converged else "do not trust", self.chains.worst

    def cover(self) -> None:
        """Fit a guide to the modes of a population, and to places with mass that earlier guides know."""
        with self.step("population") as said:
            guide = AutoFlow(self.question.model).setup(*self.question.args, **self.question.kwargs)
            found = cover(self._task(guide), PARTICLES, self._fit_again, self._places())
            self.judged.append(Judged(found.guide, None))
            said[1] = f"{len(found.modes)} mode{'s' * (len(found.modes) > 1)}"

    def _fit_again(self, guide: AutoFlow, **settings: Any) -> Fit:
        model, args, kwargs = self.question
        return fit_svi(model, guide, *args, progress=self.progress, **settings, **kwargs)

    def _task(self, guide: Any) -> Task:
        return Task(self.question.model, guide, self.question.args, self.question.kwargs)

    @torch.no_grad()
    def _places(self) -> Tensor | None:
        """Return places with mass, ``(n, D)``: draws of earlier guides of all latents, and places that these lack."""
        flows = [one.guide.flow for one in self.judged if isinstance(one.guide, AutoFlow)]
        places = [*self._lost(), *(flow().sample((STARTS,)) for flow in flows)]
        return torch.cat(places) if places else None

    def _lost(self) -> list[Tensor]:
        """Return the places, each ``(1, D)``, where checks have found mass that a guide lacks."""
        found = [one.check.missing.place for one in self.judged if one.check]
        return [place.unsqueeze(0) for place in found if place is not None]

    def _compared(self, found: Check) -> Check:
        """Add a finding to a check if its guide has less evidence than an earlier one."""
        for one in self.judged:
            if one.check and one.check.psis.reliable:
                lost = one.check.log_evidence - found.log_evidence
                if lost - 3 * math.hypot(one.check.log_evidence_se, found.log_evidence_se) > LESS:
                    return replace(found, findings=(Finding("evidence", "fit", lost), *found.findings))
        return found

    @property
    def best(self) -> Judged:
        """The guide with the best verdict and, among equals, the highest evidence lower bound."""
        return max(self.judged, key=lambda one: one.rank)

    @property
    def is_settled(self) -> bool:
        """True if the draws can be trusted as they are, or by their weights, or are exact."""
        exact = self.chains is not None and self.chains.converged and not self.best.misses
        checked = self.best.check if self.judged else None
        return exact or (checked is not None and checked.verdict != "do not trust")

    def result(self, seconds: float) -> Posterior:
        """Return the answer: converged chains, or draws of the best guide, weighted if their weights are reliable."""
        best, chains = self.best, self.chains
        checked = best.check
        if chains is not None and not (checked and checked.verdict != "do not trust"):
            draws, psis = _thinned(chains, self.num_draws), checked.psis if checked else None
            exact = chains.converged and not best.misses
            verdict = "trust" if exact else "do not trust"
            reason = "The chains have" + ("" if exact else " not") + f" converged: {chains.worst}."
            if not exact and checked:
                reason += f" Of the guide: {checked.reason}"
        else:
            draws, psis = self._drawn(best)
            verdict, reason, chains = *self._verdict(checked), None
        known = psis is not None and psis.reliable and verdict == "trust"
        evidence = (psis.log_evidence, psis.log_evidence_se) if psis and known else (math.nan, math.nan)
        return Posterior(
            draws, verdict, reason, *evidence, tuple(self.steps), seconds, best.guide, chains, self.question
        )

    def _verdict(self, checked: Check | None) -> tuple[str, str]:
        if checked is None:
            return "do not trust", "The guide was not checked."
        if checked.verdict == "reweight":
            return "trust", f"The draws are resampled by their weights. Of the guide: {checked.reason}"
        return checked.verdict, checked.reason

    def _drawn(self, best: Judged) -> tuple[dict[str, Tensor], Psis | None]:
        """Return draws of a guide, resampled by their weights if these are reliable, and the weights."""
        task, number = self._task(best.guide), self.num_draws
        with validation_enabled(False):
            task.check()
            weighted = best.check is not None and best.check.psis.reliable and best.check.verdict != "do not trust"
            found = task.draw(PER_DRAW * number if weighted else number)
            psis = best.check.psis if best.check else None
            if weighted:
                found, psis = reweighted(found, number, "posterior", task)
            return task.values(found.latents), psis


def _thinned(chains: Samples, number: int) -> dict[str, Tensor]:
    """Return draws of chains, evenly spread over all of them."""
    size = next(iter(chains.flat.values())).shape[0]
    kept = (torch.arange(number) * size) // number if size >= number else torch.arange(number) % size
    return {name: value[kept] for name, value in chains.flat.items()}
