"""The draws of an answer: of converged chains, or of the best guide, corrected by its weights if these are reliable."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from pyro import validation_enabled
from torch import Tensor

from ..diagnostics.importance import weigh
from ..programs.density import Density
from ..programs.engines import Values
from ..programs.model_and_guide import Task
from ..sampling import Samples
from ..sampling.annealed_population import ISLANDS, Population, bridge
from ..sampling.resampling import systematic
from ..vjp import LogDensity
from .record import Posterior
from .stages import Judged, Stages

PER_DRAW = 4  # weighted draws for each that is kept, so that few are kept twice


class Evidence(NamedTuple):
    """The log evidence and its standard error, in nats; NaN if they are unknown."""

    value: float = math.nan
    noise: float = math.nan


def answered(stages: Stages, began: float) -> Posterior:
    """Return the answer that the stages have found."""
    best, trusted = stages.best, stages.is_settled
    chains = None if best.is_usable else stages.chains
    with validation_enabled(False):  # draws without a density are no errors
        task, number = stages.task(best.guide), stages.num_draws
        draws, evidence = _of_chains(task, number, chains) if chains else _of_guide(task, stages, best)
    return Posterior(
        draws=draws,
        verdict="trust" if trusted else "do not trust",
        reason=_reason(task, best, chains, trusted),
        log_evidence=evidence.value if trusted else math.nan,
        log_evidence_se=evidence.noise if trusted else math.nan,
        steps=tuple(stages.steps),
        seconds=time.perf_counter() - began,
        guide=best.guide,
        chains=chains,
        question=stages.question,
    )


def _reason(task: Task, best: Judged, chains: Samples | None, trusted: bool) -> str:
    """Return the reason for the verdict on the draws."""
    if task.draws_rows:
        return f"The guide was not checked: {task.subsampled}. Check it with arguments by which it runs over all rows."
    if best.check is None:
        return "The guide was not checked."
    of_guide = best.check.reason
    if chains is None:
        return f"The draws are resampled. {of_guide}" if best.check.verdict == "reweight" else of_guide
    state = "The draws are exact: chains have converged" if trusted else "The chains have not converged"
    return f"{state} ({chains.worst}). Of the guide: {of_guide}"


def _of_chains(task: Task, number: int, chains: Samples) -> tuple[Values, Evidence]:
    """Return draws of chains, evenly spread over all of them, and the evidence."""
    size = len(next(iter(chains.flat.values())))
    kept = torch.arange(number) * size // number
    draws = {name: value[kept] for name, value in chains.flat.items()}
    return draws, _bridged(Density.sound(task), draws)


def _of_guide(task: Task, stages: Stages, best: Judged) -> tuple[Values, Evidence]:
    """Return draws of a guide, resampled by their weights if these are reliable, and the evidence then."""
    question, number = stages.question, stages.num_draws
    if task.draws_rows:  # the guide itself draws all rows
        return best.guide.sample(number, *question.args, **question.kwargs), Evidence()
    checked = best.check
    task = task.check()
    if checked is None or not (best.is_usable and checked.psis.reliable):
        return task.values(task.draw(number).latents), Evidence()
    found = task.draw(PER_DRAW * number)
    psis = weigh(found.log_p - found.log_q, "posterior", task, found.latents_at)
    if checked.trusted and not psis.reliable:  # k-hat is itself an estimate
        return task.values(found.take(torch.arange(number)).latents), Evidence()
    kept = systematic(psis.smoothed.double().exp(), number)
    latents = found.latents_at(kept[torch.randperm(number, device=kept.device)])
    return task.values(latents), Evidence(psis.log_evidence, psis.log_evidence_se)


@torch.no_grad()
def _bridged(space: Density, draws: Values) -> Evidence:
    """Return the evidence by bridge sampling between exact draws and draws of the guide (Meng, Wong 1996)."""
    size = len(next(iter(draws.values()))) // ISLANDS * ISLANDS
    z = space.placement.located({name: draws[name][:size] for name in space.task.latents}) if size else None
    if z is None or not space.placement.has_log_q:
        return Evidence()
    log_p = _in_batches(space.log_prob, z)
    even = torch.full((len(z),), -math.log(len(z))).to(log_p)
    exact = Population(z, even, log_p, torch.zeros(ISLANDS), [0.0, 1.0])
    of_guide = space.draw(len(z))
    return Evidence(*bridge(exact, log_p - _in_batches(space.placement.log_q, z), of_guide.log_p - of_guide.log_q))


def _in_batches(density: LogDensity, z: Tensor) -> Tensor:
    return torch.cat([density(part) for part in z.split(1000)])
