"""The ladder: fits of growing effort, each judged, until one can be trusted.

A Gaussian; the guide's flow; more couplings before it, trained for longer; a guide that covers the modes which a
population has found; and exact draws by chains, also where a guide can be trusted but its weights see errors that are
small, or cannot be relied on.  What comes next depends on what the check has found: longer training finds no mode that
is missing.  Restarts, from draws of the prior or from far around the start, guard against spurious modes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro import validation_enabled
from torch import Tensor

from ..diagnostics import Check, Finding, check
from ..flows import Flow
from ..guides import AutoFlow
from ..guides.recipe import affine_couplings
from ..programs.latent_space import LatentSpace, sound_space
from ..programs.log_density import or_nan
from ..programs.task import Task
from ..sampling.run import Goal
from ..sampling.samples import Samples
from ..training import distributed
from ..training.loop import Fit
from ..transforms import ActNorm
from .chain_run import exact
from .mode_covering import cover

LOST = "mode", "far", "evidence", "blind"  # findings of mass that chains may not come to
ORDER = "do not trust", "reweight", "trust"
PARTICLES = 2048  # of a population that looks for modes
EXACT = Goal(4000, 1000)  # what is asked of exact draws
DRAWS = 8  # of each earlier guide, from which modes are looked for
LESS = 0.1  # nats of evidence that a rung must not lack against an earlier one
SMALL = 0.05  # the error of a variance that a trusted guide may have for sure
TRIES = 8  # places of which a restart takes the best


@dataclass(frozen=True)
class Rung:
    """One fit of several.

    Attributes:
        name: What was fitted.
        fit: The record of the fit, with its guide.
        check: What the check said of the guide; None for a fit that was not checked.
        seconds: The wall time of both.
        samples: Exact draws from the guide, where these are the rung.
    """

    name: str
    fit: Fit
    check: Check | None
    seconds: float
    samples: Samples | None = None

    @property
    def elbo(self) -> float:
        """The evidence lower bound, in nats: that of the check's draws, or else of the last steps."""
        if self.check:
            return float(self.check.psis.log_weights.mean())
        return -math.inf if math.isnan(self.fit.best_loss) else -self.fit.best_loss

    def __repr__(self) -> str:
        said = f"{self.check.verdict}. {self.check.reason}" if self.check else "not checked"
        said = repr(self.samples) if self.samples else said
        return f"{self.name} (loss {self.fit.best_loss:.3f}, {self.fit.steps} steps, {self.seconds:.0f} s): {said}"


@dataclass
class Ladder:
    """Makes fits of a model, judges them and remembers them.

    Attributes:
        fit_once: Fits a guide: ``fit_once(guide, **settings)``.
        task: The model, and the guide to begin with.
        settings: Settings of each fit.
        checkpoint: The stem of the files for the states of fits.
        rungs: The fits, from the first to the last.
        stopped: Why no more are made, or an empty string.
    """

    fit_once: Callable[..., Fit]
    task: Task
    settings: dict[str, Any]
    checkpoint: str | os.PathLike[str] | None
    rungs: list[Rung] = field(default_factory=list)
    stopped: str = ""

    def fit(self, name: str, guide: AutoFlow, **settings: Any) -> Fit | None:
        """Fit a guide; None where that breaks off and there is an earlier rung to keep.

        Raises:
            FloatingPointError: If the loss or its gradient stays non-finite.
        """
        try:
            return self._fit(name, guide, **settings)
        except (KeyboardInterrupt, ValueError, distributed.Parted) as error:
            self.break_off(name, error)
            return None

    def _fit(self, name: str, guide: AutoFlow, **settings: Any) -> Fit:
        file = self.checkpoint and Path(f"{os.fspath(self.checkpoint)}.{name.replace(' ', '-')}")
        fit = self.fit_once(guide, **{**self.settings, **settings}, checkpoint=file)
        self.stopped = "interrupted" if fit.stopped == "interrupted" else self.stopped
        return fit

    def climb(self, name: str, guide: AutoFlow, **settings: Any) -> None:
        """Fit a guide and judge it."""
        if fit := self.fit(name, guide, **settings):
            self.judge(name, fit, fit.seconds)

    def cover(self, name: str) -> None:
        """Fit a guide to the modes that a population finds, and those that earlier rungs tell of, and judge it."""
        start = time.perf_counter()
        try:
            found = cover(self.task, PARTICLES, partial(self._fit, name), distributed.broadcast(self._places))
        except (KeyboardInterrupt, ValueError, FloatingPointError, distributed.Parted) as error:
            self.break_off(name, error)
            return
        if found.guide is not None:
            self.judge(name, found.fit or untrained(found.guide, found.log_evidence), time.perf_counter() - start)

    @torch.no_grad()
    def _places(self) -> Tensor | None:
        """Return places where earlier rungs have found mass, ``(n, D)``: draws of their guides, and lost places."""
        places = [rung.fit.guide.flow().sample((DRAWS,)) for rung in self.rungs]
        places += [place.unsqueeze(0) for place in self._lost()]
        return torch.cat(places) if places else None

    def _lost(self) -> list[Tensor]:
        """Return the places, each ``(D,)``, where checks have found mass that a guide lacks."""
        found = [rung.check.missing.place for rung in self.rungs if rung.check]
        return [place for place in found if place is not None]

    def sample(self, name: str) -> None:
        """Draw exactly, from the best guide, unless it misses a mode, which chains would miss as well.

        Some chains start where checks have found mass that guides lack.  If they do not mix with the others, R-hat is
        large.
        """
        start, best = time.perf_counter(), self.best
        if best.check is None or distributed.size() > 1:
            return
        if any(finding.kind in LOST for finding in best.check.findings):
            return
        model = self.task.model
        task = Task(model.call, best.fit.guide, model.args, model.kwargs, self.settings["vectorize"])
        with validation_enabled(False):
            lost = self._lost()
            others = torch.stack(lost) if lost else None
            samples = exact(sound_space(task), EXACT, None, progress=self.settings["progress"], others=others)
        self.note(Rung(name, best.fit, best.check, time.perf_counter() - start, samples))

    def judge(self, name: str, fit: Fit, seconds: float) -> None:
        """Judge a fit, unless the run was interrupted, also in view of the evidence of earlier ones."""
        start, found = time.perf_counter(), None
        if not self.stopped:
            try:
                model, vectorize = self.task.model, self.settings["vectorize"]
                checked = check(model.call, fit.guide, *model.args, vectorize=vectorize, model_kwargs=model.kwargs)
                found = self._compared(checked)
            except KeyboardInterrupt:
                self.stopped = "interrupted"
            except ValueError as error:
                if not distributed.rank():  # which judges for all
                    self.break_off(name, error)
        self.note(Rung(name, fit, found, seconds + time.perf_counter() - start))

    def break_off(self, name: str, error: BaseException) -> None:
        """End the ladder where it is; with nothing to keep, or where another process is at a loss, with the error."""
        if not self.rungs or (isinstance(error, distributed.Parted) and not error.refused):
            raise error
        self.stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{name}: {error}"

    def note(self, rung: Rung) -> None:
        """Remember a fit, of several processes as the first judges it, and say so."""
        found, self.stopped = distributed.broadcast(lambda: (rung.check, self.stopped))
        self.rungs.append(dataclasses.replace(rung, check=found))
        if self.settings["progress"] and distributed.rank() == 0:
            print(f"{len(self.rungs)}. {rung}", file=sys.stderr)

    @property
    def ended(self) -> bool:
        """True if no further guide is needed."""
        return bool(self.stopped) or (bool(self.rungs) and self._rank(self.rungs[-1]) == len(ORDER) - 1)

    @property
    def is_sure(self) -> bool:
        """True if the ladder has ended, and the weights of the trusted guide are reliable and see no error."""
        last = self.rungs[-1].check if self.rungs else None
        if self.stopped or last is None or not self.ended:
            return bool(self.stopped)
        error = (last.weighted.variance - 1).abs() - 2 * last.weighted.variance_se
        return last.psis.reliable and not bool((error > SMALL).any())

    @property
    def misses_a_mode(self) -> bool:
        """True if the last check has found a mode that the guide misses."""
        last = self.rungs[-1].check if self.rungs else None
        return last is not None and last.misses_a_mode

    @property
    def best(self) -> Rung:
        """The rung with the best verdict and, among these, the highest evidence lower bound."""
        return max(self.rungs, key=lambda rung: (self._rank(rung), rung.elbo))

    def result(self) -> Fit:
        """The best fit, with all rungs."""
        best, self.stopped = self.best, distributed.broadcast(lambda: self.stopped)
        return dataclasses.replace(
            best.fit,
            check=best.check,
            samples=self.rungs[-1].samples,
            rungs=tuple(self.rungs),
            seconds=sum(rung.seconds for rung in self.rungs),
            stopped=self.stopped or best.fit.stopped,
        )

    def _rank(self, rung: Rung) -> int:
        return ORDER.index(rung.check.verdict) if rung.check else -1

    def _compared(self, found: Check) -> Check:
        """A check, which trusts no guide that has less evidence than an earlier one."""
        for rung in self.rungs:
            if rung.check and rung.check.psis.reliable:
                lost = rung.check.log_evidence - found.log_evidence
                if lost - 3 * math.hypot(rung.check.log_evidence_se, found.log_evidence_se) > LESS:
                    return dataclasses.replace(found, findings=(Finding("evidence", rung.name, lost), *found.findings))
        return found


def climb(ladder: Ladder, guide: AutoFlow, *, escalate: bool, restarts: int) -> Fit:
    """Fit a guide, from several places or with growing effort or both; return the best fit, with all rungs."""
    if not escalate:
        _restarted(ladder, guide, restarts)
        return ladder.result()
    try:
        _train(ladder, guide, restarts)
    except FloatingPointError as error:  # as where the posterior has a hard edge, which a population can bear
        if ladder.settings["on_nonfinite"] == "raise":
            raise
        warnings.warn(f"fit_svi: training broke down; a population takes over. {error}", stacklevel=4)
        ladder.cover("annealed")
    else:
        if not ladder.ended:
            ladder.cover("annealed")
    if not ladder.ended and ladder.misses_a_mode:
        ladder.cover("annealed again")
    if not ladder.is_sure:
        ladder.sample("exact draws")
    return ladder.result()


def _train(ladder: Ladder, guide: AutoFlow, restarts: int) -> None:
    """Climb by the ELBO, until a mode is missing, which longer training does not find."""
    if guide.is_fresh and not guide.has_circles:
        gaussian = guide.rebuilt(lambda dim: Flow([ActNorm(dim)]))
        ladder.climb("Gaussian", gaussian, steps=gaussian.schedule().steps // 2)
    if not (ladder.ended or ladder.misses_a_mode) and (flow := _restarted(ladder, guide, restarts)):
        ladder.judge("flow", flow, 0.0 if restarts > 1 else flow.seconds)
    if not (ladder.ended or ladder.misses_a_mode):
        deeper = (copy.deepcopy if guide.has_circles else _deepened)(ladder.rungs[-1].fit.guide)
        ladder.climb("deeper and longer", deeper, steps=2 * guide.schedule().steps, lr=guide.schedule().lr / 2)


def untrained(guide: AutoFlow, log_evidence: float) -> Fit:
    """The record of a guide that a population has placed, and that there was nothing to train in."""
    return Fit(guide, torch.zeros(0), -log_evidence, 0, 0, 0, 0.0, "steps")


def _restarted(ladder: Ladder, guide: AutoFlow, restarts: int) -> Fit | None:
    """The best of several fits of one flow, the first from the guide's own start."""
    best = ladder.fit("flow", guide)
    if best is None or restarts == 1:
        return best
    before = len(ladder.rungs)
    ladder.note(Rung("start 1", best, None, best.seconds))
    for number in range(2, restarts + 1):
        if ladder.stopped:
            break
        again = guide.rebuilt()
        place = _elsewhere(LatentSpace(ladder.task), guide.start[0])
        again.start_at(place, guide.start[1] * torch.eye(len(place)).to(place))
        try:
            fit = ladder.fit(f"start {number}", again)
        except FloatingPointError as error:
            ladder.break_off(f"start {number}", error)
            break
        if fit:
            ladder.note(Rung(f"start {number}", fit, None, fit.seconds))
    return max(ladder.rungs[before:], key=lambda rung: rung.elbo).fit


@torch.no_grad()
def _elsewhere(space: LatentSpace, start: Tensor) -> Tensor:
    """The most likely of some draws from the prior, or of some within 2 of the origin, in the dtype of the start."""
    wide = (4 * torch.rand(TRIES, space.dim) - 2).to(start)
    with validation_enabled(False):
        found = space.prior(wide)
    places = wide if found is None else found
    heights = or_nan(space.log_p)(places).nan_to_num(-math.inf, -math.inf, -math.inf)
    return places[heights.argmax()]


def _deepened(guide: AutoFlow) -> AutoFlow:
    """A guide that draws as the given one does, with more couplings, wider ones, between the base and its flow."""
    *layers, learned, fixed = guide.flow.transforms

    def deeper(dim: int) -> Flow:
        more = affine_couplings(dim, hidden_dims=(128, 128))
        return Flow([*more.transforms, *copy.deepcopy(layers)], copy.deepcopy(guide.flow.base))

    new = guide.rebuilt(deeper)
    new.flow.base.load_state_dict(guide.flow.base.state_dict())
    for mine, kept in zip(new.flow.transforms[-2:], (learned, fixed), strict=True):
        mine.load_state_dict(kept.state_dict())
    return new
