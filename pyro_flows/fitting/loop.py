"""One training loop for everything that has a loss.

Adam (Kingma, Ba 2014, arXiv:1412.6980) with a cosine decay (Loshchilov, Hutter 2016, arXiv:1608.03983) and gradients
clipped by norm.  The state with the best running loss is kept; whatever ends the run, an error and Ctrl-C included,
leaves the parameters in it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from tqdm import tqdm


@dataclass(frozen=True)
class Fit:
    """The record of a fit.

    Attributes:
        guide: What was trained.
        losses: The loss of each step, ``(steps,)``, in nats; NaN for a step that was skipped.
        best_loss: The running mean of the loss at the state that was kept.
        best_step: The step after which that state was kept.
        steps: The number of steps taken.
        skipped: How many of them were skipped because the loss or a gradient was not finite.
        seconds: The wall time.
        stopped: Why the run ended: ``"steps"`` or ``"interrupted"``.
    """

    guide: Any
    losses: Tensor
    best_loss: float
    best_step: int
    steps: int
    skipped: int
    seconds: float
    stopped: str

    def __repr__(self) -> str:
        return (
            f"Fit(best_loss={self.best_loss:.4f} at step {self.best_step}, steps={self.steps}, skipped={self.skipped}, "
            f"seconds={self.seconds:.1f}, stopped={self.stopped!r})"
        )


def descend(
    loss: Callable[[], Tensor],
    parameters: list[Tensor],
    *,
    trained: Any,
    steps: int,
    lr: float,
    clip_norm: float,
    on_nonfinite: str,
    progress: bool,
    diagnose: Callable[[], str],
    window: int = 50,
    patience: int = 100,
) -> Fit:
    """Minimise a loss.

    Args:
        loss: Computes the loss, anew each time.
        parameters: The tensors to train.
        trained: What the record shall name as trained.
        steps: The number of steps.
        lr: The largest step size; it is reached within 100 steps and falls to zero along a cosine.
        clip_norm: The largest norm of a gradient.
        on_nonfinite: ``"skip"`` passes over steps whose loss or gradient is not finite and gives up after ``patience``
            in a row; ``"raise"`` gives up at the first.
        progress: Whether to show a progress bar.
        diagnose: Says what is not finite, for the error.
        window: The number of steps over which the loss is averaged to judge a state.
        patience: How many steps in a row may be skipped.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses: list[float] = []
    best = _Best(parameters)
    skipped = in_a_row = 0
    stopped, start = "steps", time.perf_counter()
    bar = tqdm(total=steps, disable=not progress, unit="step", dynamic_ncols=True, leave=True)
    try:
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(step, steps)
            optimizer.zero_grad()
            number, cause = _backward(loss, parameters, clip_norm)
            losses.append(number)
            if math.isfinite(number):
                optimizer.step()
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                if on_nonfinite == "raise" or in_a_row == patience:
                    cause = "; ".join(filter(None, (_ask(diagnose), cause)))
                    raise FloatingPointError(
                        f"The loss or its gradient was not finite at step {step}"
                        f"{f' and at the {in_a_row - 1} before' if in_a_row > 1 else ''}: {cause}. "
                        f"Try a smaller lr (now {lr:g}) or init_scale, or a float64 model."
                    )
            bar.update()
            if step % window == 0 or step == steps:
                best.offer(losses[-window:], step)
                bar.set_postfix_str(f"loss {best.latest:.3f}" + (f", {skipped} skipped" if skipped else ""))
    except KeyboardInterrupt:
        stopped = "interrupted"
        if len(losses) % window >= 10:
            best.offer(losses[-(len(losses) % window) :], len(losses))
    finally:
        bar.close()
        best.restore()
    if stopped == "interrupted":
        where = f"the best state, of step {best.step}" if best.step else "the state at the start"
        print(f"Interrupted after {len(losses)} steps; kept {where} (loss {best.mean:.3f}).", file=sys.stderr)
    return Fit(
        trained,
        torch.tensor(losses, dtype=torch.float64),
        best.mean,
        best.step,
        len(losses),
        skipped,
        time.perf_counter() - start,
        stopped,
    )


def _backward(loss: Callable[[], Tensor], parameters: list[Tensor], clip_norm: float) -> tuple[float, str]:
    """Compute loss and clipped gradients: the loss, NaN if any of it is not finite, and the reason where one is known.

    A draw so far out that a distribution refuses its parameters, or a matrix is no longer positive definite, counts as
    not finite too.
    """
    try:
        value = loss()
        value.backward()
    except (ValueError, LinAlgError) as error:
        if isinstance(error, ValueError) and "invalid values" not in str(error):
            raise
        return math.nan, str(error).splitlines()[0]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    return (value.item() if norm.isfinite() else math.nan), ""


def _schedule(step: int, steps: int) -> float:
    """The step size, as a share of the largest: up along a line, since Adam's first steps are all of full size and
    deep flows compound them, then down along a cosine."""
    warm_up = min(100, max(20, steps / 4))
    return min(1.0, step / warm_up) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def _ask(diagnose: Callable[[], str]) -> str:
    """A diagnosis, or nothing where what it runs fails."""
    try:
        return diagnose()
    except (ValueError, RuntimeError):
        return ""


class _Best:
    """The best state seen so far, judged by the mean loss of a window of steps.

    Losses are noisy: a later state replaces an earlier one unless it is worse than the lowest mean by more than two
    standard errors.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._state = [parameter.detach().clone() for parameter in parameters]
        self._lowest, self._noise = math.inf, math.inf
        self.mean, self.latest, self.step = math.nan, math.nan, 0

    def offer(self, losses: list[float], step: int) -> None:
        recent = torch.tensor([value for value in losses if math.isfinite(value)], dtype=torch.float64)
        if len(recent) < 2:
            return
        self.latest = recent.mean().item()
        error = recent.std().item() / math.sqrt(len(recent))
        if self.latest <= self._lowest + 2 * min(error, self._noise):
            if self.latest < self._lowest:
                self._lowest, self._noise = self.latest, error
            self.mean, self.step = self.latest, step
            for kept, parameter in zip(self._state, self._parameters, strict=True):
                kept.copy_(parameter.detach())

    def restore(self) -> None:
        with torch.no_grad():
            for kept, parameter in zip(self._state, self._parameters, strict=True):
                parameter.copy_(kept)
