"""The ladder: fits of growing effort, each checked, until one is trusted.

Its rungs are a Gaussian; the guide's flow; a flow with more couplings that trains longer; a guide that covers the modes
of an annealed population; and exact draws by chains.  Exact draws follow too if a trusted guide's weights show small
errors or are unreliable.  The findings of the check decide what comes next, since longer training finds no missing
mode.  Restarts, from draws of the prior or from far around the start, guard against spurious modes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import sys
import time
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
from ..guides.default_flows import affine_couplings
from ..programs.latent_space import LatentSpace
from ..programs.log_density import or_nan
from ..programs.model_and_guide import Task
from ..sampling import Samples
from ..sampling.converged_chains import Goal
from ..training import distributed
from ..training.loop import Fit
from ..transforms import ActNorm
from ..user_code import warn_user
from .chains_with_progress import exact
from .mode_covering import cover, space_of

LOST = "mode", "far", "evidence", "blind"  # findings of mass that chains may not reach
ORDER = "do not trust", "reweight", "trust"
PARTICLES = 2048  # of a population that searches for modes
EXACT = Goal(4000, 1000)  # of exact draws
DRAWS = 8  # starts of climbs to modes, per earlier guide
LESS = 0.1  # nats of evidence by which a rung may fall short of an earlier one
SMALL = 0.05  # error of a variance that a trusted guide may certainly have
TRIES = 8  # candidates for the start of a restart


@dataclass(frozen=True)
class Rung:
    """One of several fits.

    Attributes:
        name: The name of the fit.
        fit: The record of the fit, with its guide.
        check: The check of the guide; None if there was none.
        seconds: The wall time of both.
        samples: Exact draws from the guide, if these are the rung.
    """

    name: str
    fit: Fit
    check: Check | None
    seconds: float
    samples: Samples | None = None

    @property
    def elbo(self) -> float:
        """The evidence lower bound, in nats: the mean over the check's draws, or else over the last steps."""
        if self.check:
            return float(self.check.psis.log_weights.mean())
        return -math.inf if math.isnan(self.fit.best_loss) else -self.fit.best_loss

    @property
    def rank(self) -> int:
        """The rank of the verdict; -1 without a check."""
        return ORDER.index(self.check.verdict) if self.check else -1

    def __repr__(self) -> str:
        if self.samples:  # the fit is that of an earlier rung
            return f"{self.name} ({self.seconds:.0f} s): {self.samples!r}"
        said = f"{self.check.verdict}. {self.check.reason}" if self.check else "not checked"
        return f"{self.name} (loss {self.fit.best_loss:.3f}, {self.fit.steps} steps, {self.seconds:.0f} s): {said}"


@dataclass
class Ladder:
    """A sequence of fits of one model, and their checks.

    Attributes:
        fit_once: Fits a guide: ``fit_once(guide, **settings)``.
        task: The model, and the guide to begin with.
        settings: The settings of each fit.
        checkpoint: The stem of the checkpoint files.
        rungs: The fits, from the first to the last.
        stopped: The reason to stop, or an empty string.
        name: The name of the latest attempt at a rung.
    """

    fit_once: Callable[..., Fit]
    task: Task
    settings: dict[str, Any]
    checkpoint: str | os.PathLike[str] | None
    rungs: list[Rung] = field(default_factory=list)
    stopped: str = ""
    name: str = ""

    def fit(self, name: str, guide: AutoFlow, **settings: Any) -> Fit:
        """Fit a guide."""
        self.name = name
        file = self.checkpoint and Path(f"{os.fspath(self.checkpoint)}.{name.replace(' ', '-')}")
        fit = self.fit_once(guide, **{**self.settings, **settings}, checkpoint=file)
        self.stopped = "interrupted" if fit.stopped == "interrupted" else self.stopped
        return fit

    def climb(self, name: str, guide: AutoFlow, **settings: Any) -> None:
        """Fit a guide and check it."""
        fit = self.fit(name, guide, **settings)
        self.judge(name, fit, fit.seconds)

    def cover(self, name: str) -> None:
        """Fit a guide to the modes of a population and to places with mass from earlier rungs, and check it."""
        start, self.name = time.perf_counter(), name
        found = cover(self.task, PARTICLES, partial(self.fit, name), distributed.broadcast(self._places))
        if found.guide is not None:
            # Without training there is no record of a fit.
            fit = found.fit or Fit(found.guide, torch.zeros(0), -found.log_evidence, 0, 0, 0, 0.0, "steps")
            self.judge(name, fit, time.perf_counter() - start)

    @torch.no_grad()
    def _places(self) -> Tensor | None:
        """Return places with mass, ``(n, D)``: draws of earlier guides, and places that these lack."""
        places = [*self._lost(), *(rung.fit.guide.flow().sample((DRAWS,)) for rung in self.rungs)]
        return torch.cat(places) if places else None

    def _lost(self) -> list[Tensor]:
        """Return the places, each ``(1, D)``, where checks have found mass that a guide lacks."""
        found = [rung.check.missing.place for rung in self.rungs if rung.check]
        return [place.unsqueeze(0) for place in found if place is not None]

    def sample(self, name: str) -> None:
        """Sample exactly from the best guide, unless it misses a mode, which chains would miss as well.

        Some chains start where checks have found mass that guides lack.  If they do not mix with the others, R-hat is
        large.
        """
        start, best, self.name = time.perf_counter(), self.best, name
        if best.check is None or distributed.size() > 1 or any(one.kind in LOST for one in best.check.findings):
            return
        others = torch.cat(lost) if (lost := self._lost()) else None
        with validation_enabled(False):
            space = space_of(best.fit.guide, self.task, self.settings["vectorize"])
            samples = exact(space, EXACT, None, progress=self.settings["progress"], others=others)
        self.note(Rung(name, best.fit, best.check, time.perf_counter() - start, samples))

    def judge(self, name: str, fit: Fit, seconds: float) -> None:
        """Check a fit, unless the run was interrupted, and compare it with the evidence of earlier ones."""
        start, found, self.name = time.perf_counter(), None, name
        if not self.stopped:
            try:
                model, vectorize = self.task.model, self.settings["vectorize"]
                checked = check(model.call, fit.guide, *model.args, vectorize=vectorize, model_kwargs=model.kwargs)
                found = self._compared(checked)
            except KeyboardInterrupt:
                self.stopped = "interrupted"
            except ValueError as error:
                if not distributed.rank():  # process 0 judges for all
                    self.break_off(error)
        self.note(Rung(name, fit, found, seconds + time.perf_counter() - start))

    def break_off(self, error: BaseException) -> None:
        """Stop; raise the error if no rung can be kept, or a process failed unexpectedly."""
        if not self.rungs or (isinstance(error, distributed.Parted) and not error.refused):
            raise error
        self.stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{self.name}: {error}"

    def note(self, rung: Rung) -> None:
        """Record a fit, with the check of process 0, and print it."""
        found, self.stopped = distributed.broadcast(lambda: (rung.check, self.stopped))
        self.rungs.append(dataclasses.replace(rung, check=found))
        if self.settings["progress"] and distributed.rank() == 0:
            print(f"{len(self.rungs)}. {rung}", file=sys.stderr)

    @property
    def last(self) -> Check | None:
        """The check of the last rung."""
        return self.rungs[-1].check if self.rungs else None

    @property
    def ended(self) -> bool:
        """True if no further guide is needed."""
        return bool(self.stopped) or (self.last is not None and self.last.trusted)

    @property
    def is_sure(self) -> bool:
        """True if the ladder has ended, and the weights of the trusted guide are reliable and show no error."""
        if self.stopped or self.last is None or not self.last.trusted:
            return bool(self.stopped)
        error = (self.last.weighted.variance - 1).abs() - 2 * self.last.weighted.variance_se
        return self.last.psis.reliable and not bool((error > SMALL).any())

    @property
    def misses_a_mode(self) -> bool:
        """True if the last check has found a mode that the guide misses."""
        return self.last is not None and self.last.misses_a_mode

    @property
    def best(self) -> Rung:
        """The rung with the best verdict and, among equals, the highest evidence lower bound."""
        return max(self.rungs, key=lambda rung: (rung.rank, rung.elbo))

    def result(self) -> Fit:
        """Return the best fit, with all rungs."""
        best, self.stopped = self.best, distributed.broadcast(lambda: self.stopped)
        return dataclasses.replace(
            best.fit,
            check=best.check,
            samples=self.rungs[-1].samples,
            rungs=tuple(self.rungs),
            seconds=sum(rung.seconds for rung in self.rungs),
            stopped=self.stopped or best.fit.stopped,
        )

    def _compared(self, found: Check) -> Check:
        """Add a finding to a check if its guide has less evidence than an earlier one."""
        for rung in self.rungs:
            if rung.check and rung.check.psis.reliable:
                lost = rung.check.log_evidence - found.log_evidence
                if lost - 3 * math.hypot(rung.check.log_evidence_se, found.log_evidence_se) > LESS:
                    return dataclasses.replace(found, findings=(Finding("evidence", rung.name, lost), *found.findings))
        return found


def climb(ladder: Ladder, guide: AutoFlow, *, escalate: bool, restarts: int) -> Fit:
    """Fit a guide, from several starts or with growing effort or both; return the best fit, with all rungs."""
    try:
        (_escalated if escalate else _restarted)(ladder, guide, restarts)
    except (KeyboardInterrupt, ValueError, FloatingPointError, distributed.Parted) as error:
        ladder.break_off(error)
    return ladder.result()


def _escalated(ladder: Ladder, guide: AutoFlow, restarts: int) -> None:
    """Make rungs until one is trusted."""
    try:
        _train(ladder, guide, restarts)
    except FloatingPointError as error:  # for example at a hard edge, where a population still works
        if ladder.settings["on_nonfinite"] == "raise":
            raise
        warn_user(f"fit_svi: training broke down; a population takes over. {error}")
    if not ladder.ended:
        ladder.cover("annealed")
    if not ladder.ended and ladder.misses_a_mode:
        ladder.cover("annealed again")
    if not ladder.is_sure:
        ladder.sample("exact draws")


def _train(ladder: Ladder, guide: AutoFlow, restarts: int) -> None:
    """Train guides by the ELBO until one is trusted or misses a mode, which longer training does not find."""
    if guide.is_fresh and not guide.has_circles:
        gaussian = guide.rebuilt(lambda dim: Flow([ActNorm(dim)]))
        ladder.climb("Gaussian", gaussian, steps=gaussian.schedule().steps // 2)
    if not (ladder.ended or ladder.misses_a_mode):
        flow = _restarted(ladder, guide, restarts)
        ladder.judge("flow", flow, 0.0 if restarts > 1 else flow.seconds)
    if not (ladder.ended or ladder.misses_a_mode):
        deeper = (copy.deepcopy if guide.has_circles else _deepened)(ladder.rungs[-1].fit.guide)
        ladder.climb("deeper and longer", deeper, steps=2 * guide.schedule().steps, lr=guide.schedule().lr / 2)


def _restarted(ladder: Ladder, guide: AutoFlow, restarts: int) -> Fit:
    """Return the best of several fits of one flow, the first from the guide's own start."""
    best, before = ladder.fit("flow", guide), len(ladder.rungs)
    if restarts == 1:
        return best
    ladder.note(Rung("start 1", best, None, best.seconds))
    for number in range(2, restarts + 1):
        if ladder.stopped:
            break
        again, name = guide.rebuilt(), f"start {number}"
        place = _elsewhere(LatentSpace(ladder.task), guide.start[0])
        again.start_at(place, torch.full_like(place, guide.start[1]))
        fit = ladder.fit(name, again)
        ladder.note(Rung(name, fit, None, fit.seconds))
    return max(ladder.rungs[before:], key=lambda rung: rung.elbo).fit


@torch.no_grad()
def _elsewhere(space: LatentSpace, start: Tensor) -> Tensor:
    """Return the most likely of some draws from the prior, or of some places within 2 of the origin."""
    wide = (4 * torch.rand(TRIES, space.dim) - 2).to(start)
    found = space.prior(wide)
    places = found.where(found.isfinite(), wide)
    heights = or_nan(space.log_p)(places).nan_to_num(-math.inf, -math.inf, -math.inf)
    return places[heights.argmax()]


def _deepened(guide: AutoFlow) -> AutoFlow:
    """Build a guide with the same distribution, and with more, wider couplings between the base and the flow."""

    def deeper(dim: int) -> Flow:
        more = affine_couplings(dim, hidden_dims=(128, 128))
        return Flow([*more.transforms, *copy.deepcopy(guide.flow.couplings)], copy.deepcopy(guide.flow.base))

    new = guide.rebuilt(deeper)
    new.flow.base.load_state_dict(guide.flow.base.state_dict())
    for own, kept in zip(new.flow.ends, guide.flow.ends, strict=True):
        own.load_state_dict(kept.state_dict())
    return new
