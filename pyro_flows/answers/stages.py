"""The stages of an answer: a fit, its check, chains from a guide, and a population that finds modes.

Each stage adds to what is known, guides with their checks and the latest chains, and leaves a step that says what it
found.  :mod:`.posterior` orders the stages.  The draws of the answer are those of chains, or of the best guide, which
reliable weights correct.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import validation_enabled
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..diagnostics import Check, Finding, check
from ..diagnostics.findings import VERDICTS
from ..diagnostics.importance import weigh
from ..fitting import fit_svi
from ..fitting.annealing import cover
from ..fitting.exact_draws import exact
from ..fitting.program_checks import check_proper
from ..guides import AutoFlow
from ..programs.density import Density
from ..programs.model_and_guide import Task
from ..programs.sites import Values
from ..sampling import Samples
from ..sampling.annealed_population import ISLANDS, Population, bridge, systematic
from ..sampling.converged_chains import Goal
from ..time_limit import TimeUp, seconds_left, taken_over, within
from ..training.interrupts import hold_interrupts
from ..training.loop import Fit
from ..user_code import warn_user
from .record import Posterior, Question, Step

LOST = "mode", "far", "evidence", "blind"  # findings of mass that chains may not reach
UNKNOWN = math.nan, math.nan  # the evidence and its error
BATCH = 1000  # draws per run of the model


@dataclass(frozen=True)
class Effort:
    """The effort of the stages.

    Attributes:
        particles: The size of a population that searches for modes: one of 2,048 finds modes of 1 % of the mass.
        latents: The most latents of a model for a population, which takes the longer the more there are.
        chains: The chains of a model that runs many draws at once: R-hat asks for 100 effective draws of each.
        sweeps: The most sweeps of chains; those that have not converged by then rarely do.
        longest: The factor by which heavy tails may lengthen a run: only ``num_draws`` of its draws are kept.
        least_ess: The least effective sample size of chains, below which R-hat says little.
        starts: The draws of each guide from which climbs to modes start.
        drawing: The share of a time limit that draws may take, even if no time is left.
        told: The seconds after which drawing counts as a step.
        share: The share of a time limit that a fit may take, so that time is left to check it.
        lost_evidence: The nats by which the evidence of a guide may fall short of an earlier one's.
        per_draw: The effective number of weighted draws for each that is kept, so that few are kept twice.
        most_per_draw: The most weighted draws for each.
        bridged: The most draws of chains, and of a guide, that give the evidence.
        least_overlap: The least effective number of either on which the evidence rests.
    """

    particles: int = 2048
    latents: int = 300
    chains: int = 64
    sweeps: int = 1000
    longest: float = 2.0
    least_ess: int = 400
    starts: int = 8
    drawing: float = 0.1
    told: float = 10.0
    share: float = 0.6
    lost_evidence: float = 0.1
    per_draw: int = 2
    most_per_draw: int = 8
    bridged: int = 4096
    least_overlap: int = 100


EFFORT = Effort()


@dataclass(frozen=True)
class Judged:
    """A guide and its check; None if there was no time for one, or it is not possible."""

    guide: Any
    check: Check | None = None

    @property
    def is_usable(self) -> bool:
        """True if the guide's draws can be used, as they are or by their weights."""
        return self.check is not None and self.check.verdict != "do not trust"

    @property
    def misses_mass(self) -> bool:
        """True if mass was found that chains from this guide may not reach."""
        return self.check is not None and any(finding.kind in LOST for finding in self.check.findings)

    @property
    def rank(self) -> tuple[int, float]:
        """The rank of the verdict, and the evidence lower bound in nats."""
        if self.check is None:
            return -len(VERDICTS), -math.inf
        return -VERDICTS.index(self.check.verdict), float(self.check.psis.log_weights.mean())


@dataclass
class Stages:
    """The stages of one answer, and what they have found so far.

    Attributes:
        question: The model with its arguments.
        num_draws: The number of draws.
        progress: True to say which stage runs, and what it has found.
        seconds: The time limit.
        judged: The guides so far, with their checks.
        chains: The latest chains.
        steps: The steps so far.
        is_rough: True if the latest guide was trained only until its draws could be weighted.
    """

    question: Question
    num_draws: int
    progress: bool
    seconds: float = math.inf
    judged: list[Judged] = field(default_factory=list)
    chains: Samples | None = None
    steps: list[Step] = field(default_factory=list)
    is_rough: bool = False

    @property
    def best(self) -> Judged:
        """The guide with the best verdict and, among equals, the highest evidence lower bound."""
        return max(self.judged, key=lambda one: one.rank)

    @property
    def is_exact(self) -> bool:
        """True if chains have converged, and no mass is known that they may not have reached."""
        return self.chains is not None and self.chains.converged and not self.best.misses_mass

    @property
    def is_settled(self) -> bool:
        """True if the answer can be trusted."""
        return self.is_exact or self.best.is_usable

    @property
    def can_check(self) -> bool:
        """True if guides draw all rows of all plates, so that their draws can be weighed."""
        return not self.task.draws_rows

    @property
    def can_cover(self) -> bool:
        """True if a population can be expected to arrive in the time that is left."""
        is_small = not self.task.runs_one_by_one and Density(self.task).dim <= EFFORT.latents
        return is_small and seconds_left() > self.steps[0].seconds

    @property
    def task(self) -> Task:
        """The model with the best guide."""
        return self._task(self.best.guide)

    def fit(self, guide: Any, *, is_given: bool = False) -> None:
        """Fit a guide until its draws can be weighted, unless it was trained before.

        One that is given was, unless it is known to be untrained.
        """
        with self._step("fit") as said:
            said[1] = type(guide).__name__
            if not _is_fresh(guide, otherwise=not is_given):
                said[1] += ", trained before"
            else:
                if isinstance(guide, AutoFlow):
                    with taken_over():  # half a guide could not be drawn from
                        guide.setup(*self.question.args, **self.question.kwargs)
                    check_proper("posterior", Density(self._task(guide)), guide.start[0])
                try:
                    fit = self._fit(guide, steps="for_weights")
                except KeyboardInterrupt:
                    if not getattr(guide, "is_fresh", True):  # what was trained can be drawn from
                        self.judged.append(Judged(guide))
                    raise
                if getattr(guide, "is_fresh", False) and seconds_left() < math.inf:  # no step was taken
                    raise TimeUp
                said[1], self.is_rough = _described(guide, fit), fit.stopped == "weights"
        self.judged.append(Judged(guide))

    def fit_on(self) -> None:
        """Fit the latest guide until it has converged."""
        guide, self.is_rough = self.judged[-1].guide, False
        self.judged[-1] = Judged(guide)  # its check is of an earlier state
        with self._step("fit", " on") as said:
            said[1] = _described(guide, self._fit(guide))

    def check(self) -> None:
        """Check the latest guide, and compare its evidence with that of earlier ones."""
        (model, args, kwargs, _), guide = self.question, self.judged[-1].guide
        with self._step("check", " (weights, chains, search for modes; it can take as long as the fit)") as said:
            found = self._compared(check(model, guide, *args, **kwargs))
            self.judged[-1] = Judged(guide, found)
            said[:] = found.verdict, found.reason

    def sample(self) -> None:
        """Run chains from the best guide.

        Some start where checks have found mass that guides lack.  If these do not mix with the others, R-hat is large.
        """
        with self._step("chains") as said, validation_enabled(False):
            goal = Goal(max(EFFORT.least_ess, self.num_draws), EFFORT.sweeps, EFFORT.longest)
            number = None if self.task.runs_one_by_one else EFFORT.chains
            self.chains = exact(Density.sound(self.task), goal, number, progress=self.progress, others=self._places())
            said[:] = "trust" if self.is_exact else "do not trust", self.chains.worst
            if not self.chains.converged and self.chains.sweeps < EFFORT.sweeps:
                raise TimeUp if seconds_left() < 0 else KeyboardInterrupt

    def cover(self) -> None:
        """Fit a guide to the modes of a population, and to places with mass that earlier guides know."""
        with self._step("population") as said:
            guide = AutoFlow(self.question.model).setup(*self.question.args, **self.question.kwargs)
            places = self._places(also=[one.guide for one in self.judged if isinstance(one.guide, AutoFlow)])
            found = cover(self._task(guide), EFFORT.particles, self._fit, places)
            self.judged.append(Judged(found.guide))
            said[1] = f"{len(found.modes)} mode{'s' * (len(found.modes) > 1)}"

    def answer(self, began: float) -> Posterior:
        """Return the answer: draws of the best guide if they can be used, or else of chains if there are any."""
        left = self.seconds - (time.perf_counter() - began)
        first = self.steps[0].seconds if self.steps else 0.0  # no later stage is begun in less time
        is_short = self.can_check and not self.is_settled and left < first
        given = max(left, EFFORT.drawing * self.seconds)
        best, chains = self.best, None if self.best.is_usable else self.chains
        with self._drawn(), validation_enabled(False):  # draws without a density are no errors
            found = (*self._of_chains(chains, given), False) if chains else self._of_guide(best, given)
        draws, evidence, resampled = found
        reason = self._reason(chains) + f" The time was too short: give more than {self.seconds:g} seconds." * is_short
        if not self.is_settled:
            evidence = UNKNOWN
        elif chains and math.isnan(evidence[0]):
            reason += " The evidence is unknown: the guide hardly overlaps the posterior, or has no density."
        verdict, seconds = "trust" if self.is_settled else "do not trust", time.perf_counter() - began
        record = draws, verdict, reason, *evidence, tuple(self.steps), seconds, best.guide, chains, self.question
        return Posterior(*record, resampled)

    def _task(self, guide: Any) -> Task:
        return Task(self.question.model, guide, self.question.args, self.question.kwargs)

    @contextmanager
    def _step(self, name: str, doing: str = "") -> Iterator[list[str]]:
        """Time a stage, and record it with the verdict and the words that are left in the list."""
        began, said = time.perf_counter(), ["", ""]
        self._say(f"{name}{doing} ...")
        try:
            yield said
        except KeyboardInterrupt as error:
            said[1] = " ".join(["out of time" if isinstance(error, TimeUp) else "interrupted", said[1]]).strip()
            raise
        except BaseException as error:
            said[1] = f"failed: {error}"
            raise
        finally:
            self.steps.append(Step(name, time.perf_counter() - began, *said))
            self._say(str(self.steps[-1]))

    @contextmanager
    def _drawn(self) -> Iterator[None]:
        """Hold a first Ctrl-C back while draws are made, and record a step if that takes long."""
        began = time.perf_counter()
        with hold_interrupts(notice="posterior: the draws are completed; Ctrl-C again gives them up.\n") as asked:
            yield
            seconds = time.perf_counter() - began
            if asked() or seconds > EFFORT.told:
                was = self.steps and self.steps[-1].said.startswith("interrupted")
                self.steps.append(Step("draws", seconds, "", "interrupted" if asked() or was else ""))

    def _within(self, number: int, left: float, each: int) -> int:
        """Return how many of some draws a model that runs one at a time makes in the seconds left."""
        runs = self.task.settle().budget(left).number if math.isfinite(left) else math.inf
        return min(number, max(int(min(runs, number * each) / each), 1))

    def _say(self, words: str) -> None:
        if self.progress:
            print(f"posterior: {words}", file=sys.stderr)

    def _fit(self, guide: Any, **settings: Any) -> Fit:
        """Fit a guide within its share of the time."""
        model, args, kwargs, _ = self.question
        with within(EFFORT.share * seconds_left()):
            fit = fit_svi(model, guide, *args, progress=self.progress, **settings, **kwargs)
            is_up = seconds_left() < 0
        if fit.stopped == "interrupted" and not is_up:
            raise KeyboardInterrupt
        return fit

    @torch.no_grad()
    def _places(self, also: Sequence[AutoFlow] = ()) -> Tensor | None:
        """Return places where checks have found mass that guides lack, and draws of some guides: ``(n, D)`` or None."""
        lost = [one.check.missing.place for one in self.judged if one.check and one.check.missing.place is not None]
        places = [*(place.unsqueeze(0) for place in lost), *(guide.flow().sample((EFFORT.starts,)) for guide in also)]
        return torch.cat(places) if places else None

    def _compared(self, found: Check) -> Check:
        """Add a finding to a check if its guide has less evidence than an earlier one."""
        for one in self.judged:
            if one.check and one.check.psis.reliable:
                lost = one.check.log_evidence - found.log_evidence
                if lost - 3 * math.hypot(one.check.log_evidence_se, found.log_evidence_se) > EFFORT.lost_evidence:
                    return replace(found, findings=(Finding("evidence", "fit", lost), *found.findings))
        return found

    def _reason(self, chains: Samples | None) -> str:
        """Return the reason for the verdict on the draws."""
        checked, part = self.best.check, "" if self.can_check else f": {self.task.subsampled}"
        if checked is None:
            return f"The guide was not checked{part}."
        if chains is None and checked.verdict != "reweight":
            return checked.reason
        if chains is None:
            fault = next(str(finding) for finding in checked.findings if finding.verdict == checked.verdict)
            return f"The draws are resampled by reliable weights (k-hat {checked.khat:.2f}). Of the guide: {fault}"
        state = "The draws are exact: chains have converged" if self.is_exact else "The chains have not converged"
        return f"{state} ({chains.worst}). Of the guide: {checked.reason}"

    def _of_guide(self, best: Judged, left: float) -> tuple[Values, tuple[float, float], bool]:
        """Return draws of a guide, the evidence, and True if reliable weights have resampled the draws."""
        task, number, checked = self.task, self.num_draws, best.check
        if not self.can_check:  # the guide itself draws all rows
            return best.guide.sample(number, *self.question.args, **self.question.kwargs), UNKNOWN, False
        share = checked.psis.ess / len(checked.psis.log_weights) if checked and best.is_usable else 1.0
        each = min(math.ceil(EFFORT.per_draw / share), EFFORT.most_per_draw)
        task, number = task.check(), self._within(number, left, each + 1)
        if number < self.num_draws:
            warn_user(f"posterior: the time allows for {number:,} draws. Give more seconds.")
        if checked is None or not best.is_usable or math.isinf(checked.log_evidence_se):
            return task.values(task.draw(number).latents), UNKNOWN, False
        found = task.draw(each * number)
        psis = weigh(found.log_p - found.log_q, "posterior", task, found.latents_at)
        kept, resampled = torch.arange(number), psis.reliable or not checked.trusted  # k-hat is itself an estimate
        if resampled:
            kept = systematic(psis.smoothed.double().exp(), number)[torch.randperm(number)]
        evidence = (psis.log_evidence, psis.log_evidence_se) if math.isfinite(psis.log_evidence_se) else UNKNOWN
        return task.values(found.latents_at(kept)), evidence, resampled

    @torch.no_grad()
    def _of_chains(self, chains: Samples, left: float) -> tuple[Values, tuple[float, float]]:
        """Return draws of chains, evenly spread over all of them, and the evidence.

        It comes from bridge sampling between these draws and draws of the guide (Meng, Wong 1996).
        """
        number, recorded = self.num_draws, len(next(iter(chains.flat.values())))
        draws = {name: value[_spread(number, recorded)] for name, value in chains.flat.items()}
        try:
            return draws, self._bridged(
                chains, self._within(min(recorded, EFFORT.bridged), left, 2) // ISLANDS * ISLANDS
            )
        except Exception as error:  # the draws of the chains are in hand
            warn_user(f"posterior: the evidence is unknown. {error}")
            return draws, UNKNOWN

    def _bridged(self, chains: Samples, size: int) -> tuple[float, float]:
        """Return the evidence from some of the draws of chains, and as many of the guide; unknown if few overlap."""
        space = Density.sound(self.task)
        kept = _spread(size, len(next(iter(chains.flat.values()))))
        z = space.located({name: chains.flat[name][kept] for name in space.task.latents}) if size else None
        if z is None or not space.has_log_q:
            return UNKNOWN
        log_p, log_q = (torch.cat([of(part) for part in z.split(BATCH)]) for of in (space.log_prob, space.log_q))
        even = torch.full((len(z),), -math.log(len(z))).to(log_p)
        known, of_guide = Population(z, even, log_p, torch.zeros(ISLANDS), [0.0, 1.0]), space.draw(len(z))
        of_p, of_q = log_p - log_q, of_guide.log_p - of_guide.log_q
        log_r, error = bridge(known, of_p, of_q)
        overlap = min(_effective(of_q - log_r), _effective(log_r - of_p))
        return (log_r, error) if math.isfinite(error) and overlap >= EFFORT.least_overlap else UNKNOWN


def _described(guide: Any, fit: Fit) -> str:
    """Return what a fit of a guide has come to, in words."""
    end = ", when its share of the time was up" if fit.stopped == "interrupted" else ""
    return f"{type(guide).__name__}, loss {fit.best_loss:.3f} after {fit.steps} steps{end}"


def _is_fresh(guide: Any, *, otherwise: bool) -> bool:
    """True if a guide says that it is untrained; if it does not say, what counts otherwise."""
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        return True
    return bool(getattr(guide, "is_fresh", otherwise and not isinstance(guide, AutoGuide)))


def _spread(number: int, total: int) -> Tensor:
    """Return some indices of draws, evenly spread over all of them."""
    return torch.arange(number) * total // max(number, 1)


def _effective(log_odds: Tensor) -> float:
    """Return the effective number of draws of one density in a bridge to another, as many of whose draws there are."""
    share = logsigmoid(log_odds.double().nan_to_num(-math.inf, math.inf, -math.inf))
    return float((2 * share.logsumexp(0) - (2 * share).logsumexp(0)).exp().nan_to_num(0.0))
