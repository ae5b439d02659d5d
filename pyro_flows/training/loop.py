"""One training loop for everything that has a loss.

Any optimisers, with step sizes that rise and fall (:mod:`.stopping`) and gradients clipped by norm.  The
state with the best running loss is kept, or the average of states with the best loss on held-out data; whatever ends
the run, an error and Ctrl-C included, leaves the parameters in it.  With a checkpoint a run that was killed goes on
where it was, to the same end.  Several processes take each step together.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import plots
from ..arguments import check_choice, check_numbers
from ..memory import keep_memory
from ..threads import Threads, using
from . import checkpoint as checkpoints
from . import distributed
from .gradients import backward
from .interrupts import hold_interrupts
from .state import HeldOut, Optimizer, Run
from .stopping import Horizon

AGAIN = 5.0  # seconds within which a launcher passes Ctrl-C on to processes that had it already
UNSOLVED = 10  # steps in a row that are skipped where an equation cannot be solved, which takes time to find out


@dataclass(frozen=True)
class Fit:
    """The record of a fit.

    Attributes:
        guide: What was trained: the guide, or the flow; of several rungs the one that was kept.
        losses: The loss of each step, ``(steps,)``, in nats or what the objective measures; NaN where it was skipped.
        best_loss: The running mean of the loss, or the loss on held-out data, at the state that was kept.
        best_step: The step after which that state was kept.
        steps: The number of steps taken.
        skipped: How many of them were skipped because the loss or a gradient was not finite, or could not be found.
        seconds: The wall time of the steps, those before a resumption included, and of the checks of ``escalate``; not
            that of finding a start.
        stopped: Why the run ended: ``"steps"``, ``"converged"`` if its losses show that an ``AutoFlow`` has,
            ``"interrupted"``, or ``"held-out"`` where held-out data stopped it.
        check: What a check said of the guide, a :class:`~pyro_flows.Check`, where ``escalate`` asked for one.
        samples: Exact draws, a :class:`~pyro_flows.Samples`, where ``escalate`` had to go as far as that.
        rungs: All fits that were made with ``escalate`` or ``restarts``, from the first to the last.
        held_out: The loss on held-out data after each epoch, ``(epochs,)``, where there were some.

    Example::

        >>> import torch
        >>> from pyro_flows import fit_density, flows
        >>> flow = flows.realnvp(2, num_transforms=1, hidden_dims=(8,))
        >>> fit = fit_density(flow, torch.randn(100, 2), max_epochs=2, batch_size=30, progress=False)
        >>> fit.steps, fit.losses.shape, fit.held_out.shape, fit.stopped  # 90 rows to train on, 10 held out
        (6, torch.Size([6]), torch.Size([2]), 'steps')
    """

    guide: Any
    losses: Tensor
    best_loss: float
    best_step: int
    steps: int
    skipped: int
    seconds: float
    stopped: str
    check: Any = None
    samples: Any = None
    rungs: tuple[Any, ...] = ()
    held_out: Tensor | None = None

    def plot(self) -> Any:
        """Picture the losses: :func:`pyro_flows.plots.history`."""
        return plots.history(self)

    def __repr__(self) -> str:
        rungs = "".join(f"\n{number}. {rung}" for number, rung in enumerate(self.rungs, 1))
        return (
            f"Fit(best_loss={self.best_loss:.4f} at step {self.best_step}, steps={self.steps}, skipped={self.skipped}, "
            f"seconds={self.seconds:.1f}, stopped={self.stopped!r}){rungs}"
        )


def check_settings(caller: str, *, on_nonfinite: str, **numbers: float | None) -> None:
    """Refuse settings that are out of their range, by name and value; None stands for a default."""
    check_numbers(caller, above=0, optional=True, **numbers)
    check_choice(caller, ("skip", "raise"), on_nonfinite=on_nonfinite)


def descend(
    loss: Callable[[], Tensor],
    parameters: list[Tensor],
    optimizers: Sequence[Optimizer],
    *,
    trained: Any,
    steps: int,
    lr: float,
    clip_norm: float,
    on_nonfinite: str,
    progress: bool,
    diagnose: Callable[[], str],
    share: Callable[[], float] = lambda: 1 / distributed.size(),
    settled: Callable[[], bool] = lambda: True,
    checkpoint: Path | None = None,
    settings: dict[str, Any] | None = None,
    companion: Any = None,
    held_out: HeldOut | None = None,
    show: Callable[[float], str] = "{:.3f} nats".format,
    caller: str = "fit_svi",
    work: float = math.inf,
    noise: float = 0.0,
    window: int = 50,
    patience: int = 100,
) -> Fit:
    """Minimise a loss.

    Args:
        loss: Computes the loss, anew each time; of several processes, that of this one's rows or draws.
        parameters: The tensors to train.
        optimizers: What trains them, each some of them.
        trained: What the record shall name as trained.
        steps: The number of steps, at most.
        lr: The largest step size; it is reached within 100 steps and falls to zero along a cosine.
        clip_norm: The largest norm of a gradient.
        on_nonfinite: ``"skip"`` passes over steps whose loss or gradient is not finite and gives up after ``patience``
            in a row; ``"raise"`` gives up at the first.
        progress: Whether to show a progress bar.
        diagnose: Says what is not finite, for the error.
        share: What share of the rows or draws of all processes those of the last loss were; by default equal shares.
        settled: Whether losses can be compared by now; as long as they cannot, the latest state counts as the best.
        checkpoint: A file for the state of the run, from which it goes on if it is there.
        settings: What else tells this run from another, of which a checkpoint is refused.
        companion: What has a state beside the parameters, with ``state_dict`` and ``load_state_dict``.
        held_out: What judges states on data that are not trained on, in place of the running loss.
        show: Writes a loss on held-out data for the progress bar.
        caller: The public function that asks, for errors.
        work: About how many operations of floating point a step takes.
        noise: The standard deviation of the losses, in nats, below which the run ends soon; 0 to take all steps.
        window: The number of steps over which the loss is averaged to judge a state.
        patience: How many steps in a row may be skipped.
    """
    keep_memory()
    module = trained if isinstance(trained, torch.nn.Module) else torch.nn.Module()
    buffers, everything = list(module.buffers()), [*parameters, *module.parameters(), *module.buffers()]
    settings = {"steps": steps, "lr": lr, "clip_norm": clip_norm, **(settings or {})}
    settings["shapes"] = [list(parameter.shape) for parameter in parameters]
    distributed.agree(caller, settings, parameters)
    distributed.broadcast_tensors(everything)
    run = Run(parameters, optimizers, companion, buffers, held_out.decay if held_out else None)
    if checkpoint is not None and (state := checkpoints.read(checkpoint, settings, caller)) is not None:
        run.load_state_dict(state)
    else:
        distributed.seed(trained)
    losses, best, saver = run.losses, run.best, checkpoints.Saver(caller, checkpoint, settings)
    in_a_row, stopped, start, threads = 0, "", time.perf_counter() - run.seconds, Threads(work)
    horizon = Horizon(steps, noise, torch.finfo(parameters[0].dtype).eps)
    horizon.observe(losses)
    bar = tqdm(
        total=steps,
        initial=len(losses),
        disable=not progress or distributed.rank() > 0,
        unit="step",
        dynamic_ncols=True,
    )

    def save() -> None:
        run.seconds = time.perf_counter() - start
        saver.save(run)

    def wishes() -> list[bool]:
        return [bool(asked()), saver.due]

    try:
        with hold_interrupts(0.0 if distributed.alone() else AGAIN) as asked, using(1):
            for step in range(len(losses) + 1, horizon.last + 1 if not run.stopped else 0):
                began = time.perf_counter()
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = lr * horizon.share(step)
                    optimizer.zero_grad()
                number, error, unsolved, wished = backward(loss, share, parameters, clip_norm, wishes)
                losses.append(number)
                if math.isfinite(number):
                    for optimizer in optimizers:
                        optimizer.step()
                    if run.average:
                        run.average.update(step)
                    in_a_row = 0
                else:
                    in_a_row += 1
                    limit = UNSOLVED if unsolved else patience
                    if on_nonfinite == "raise" or in_a_row >= limit:
                        known = str(error).splitlines()[0].rstrip(".") if error else ""
                        words = [word for word in (ask(diagnose), known) if word]
                        fullest = max(distributed.all_gather(lambda: words), key=len)  # noqa: B023
                        raise FloatingPointError(
                            f"The loss or its gradient was not finite at step {step}"
                            f"{f' and at the {in_a_row - 1} before' if in_a_row > 1 else ''}: {'; '.join(fullest)}. "
                            f"Try a smaller lr (now {lr:g}) or init_scale, or a float64 model."
                        )
                threads.saw(time.perf_counter() - began)
                torch.set_num_threads(threads.number)
                horizon.observe(losses)
                bar.total = horizon.last
                bar.update()
                if step % (held_out.every if held_out else window) == 0 or step == horizon.last:
                    if held_out and run.average:
                        with run.average.in_place():
                            run.held_out.append(held_out.loss(len(run.held_out) + 1))
                            best.improve(run.held_out[-1], step)
                    else:
                        best.offer(losses[-window:], step, comparable=settled())
                    skipped = sum(not math.isfinite(value) for value in losses)
                    shown = f"held-out loss {show(best.latest)}" if held_out else f"loss {best.latest:.3f}"
                    shown += ", converged" if horizon.converged_at else ""
                    bar.set_postfix_str(shown + (f", {skipped} skipped" if skipped else ""))
                    if held_out and step - best.step >= held_out.patience * held_out.every:
                        run.stopped = "held-out"
                stop, due = wishes() if distributed.alone() else wished
                if step == horizon.last or run.stopped or due:
                    save()
                if stop and (held_out or step < horizon.last):
                    stopped = "interrupted"
                    raise KeyboardInterrupt
                if run.stopped or step == horizon.last:
                    break
    except KeyboardInterrupt:
        if not (stopped or distributed.alone()):  # the others do not know of it
            raise
        stopped = "interrupted"
        save()
        if not held_out and len(losses) % window >= 10:
            best.offer(losses[-(len(losses) % window) :], len(losses), comparable=settled())
        elif run.average and not best.step and len(losses) >= 10:  # the first epoch may be long
            with run.average.in_place():
                best.offer(losses[-window:], len(losses), comparable=False)
    finally:
        bar.close()
        best.restore()
    saver.conclude()
    distributed.broadcast_tensors(everything)
    if held_out and losses and not any(map(math.isfinite, losses)):
        raise FloatingPointError(f"The loss or its gradient was not finite in any step: {ask(diagnose)}.")
    if stopped and distributed.rank() == 0:
        where = f"the best state, of step {best.step}" if best.step else "the state at the start"
        lost = f" (loss {best.mean:.3f})" if math.isfinite(best.mean) else ""
        onward = "  The same call goes on from the checkpoint." if saver.holds else ""
        print(f"Interrupted after {len(losses)} steps; kept {where}{lost}.{onward}", file=sys.stderr)
    return Fit(
        trained,
        torch.tensor(losses, dtype=torch.float64),
        best.mean,
        best.step,
        len(losses),
        sum(not math.isfinite(value) for value in losses),
        time.perf_counter() - start,
        run.stopped or stopped or ("converged" if horizon.converged_at else "steps"),
        held_out=torch.tensor(run.held_out, dtype=torch.float64) if held_out else None,
    )


def ask(diagnose: Callable[[], str]) -> str:
    """A diagnosis, or nothing where what it runs fails."""
    try:
        return diagnose()
    except (ValueError, RuntimeError, FloatingPointError):
        return ""
