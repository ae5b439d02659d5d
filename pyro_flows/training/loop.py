"""One training loop for everything that has a loss.

It takes any optimisers, with step sizes that rise and fall (:mod:`.stopping`) and gradients clipped by norm.  It keeps
the state with the best running loss, or the average of states with the best loss on held-out data.  The parameters are
left in that state however the run ends, also after an error or Ctrl-C.  A run with a checkpoint that was killed resumes
to the same end.  Several processes take each step together.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import plots
from ..programs.log_density import NonFiniteDraw, is_breakdown
from ..threads import Threads, keep_memory, using
from ..time_limit import seconds_left
from ..user_code import warn_user
from . import distributed
from .checkpoint import Checkpoint
from .distributed import fill
from .interrupts import hold_interrupts
from .stopping import NEAR, Horizon

AGAIN = 5.0  # seconds within which a launcher passes Ctrl-C on to processes that have received it already
UNSOLVED = 10  # consecutive steps that are skipped if an equation cannot be solved, since each failure takes long
OWN = "companions", "buffers"  # parts of the state that each process has of its own, unless rows are judged
FEW = 10  # steps, below which an interrupted window is not judged


@dataclass(frozen=True)
class Fit:
    """The record of a fit.

    Attributes:
        guide: The trained guide or flow.
        losses: The loss of each step, ``(steps,)``, in nats or the unit of the objective; NaN if the step was skipped.
        best_loss: The loss at the state that was kept: on held-out data, if there are any; in ``fit_svi`` a mean of new
            draws, if all data are used at once; otherwise the running mean of the loss.
        best_step: The step after which that state was kept.
        steps: The number of steps taken.
        skipped: The number of steps that were skipped, because the loss or a gradient was not finite or could not be
            computed.
        seconds: The wall time of the steps, including those before a resumption, without the search for a start.
        stopped: Why the run ended: ``"steps"``, ``"converged"`` if its losses or draws show that an ``AutoFlow`` has,
            ``"weights"`` if draws of an ``AutoFlow`` that was trained for weights can be weighted, ``"interrupted"``,
            or ``"held-out"`` if held-out data stopped it.
        held_out: The loss on held-out data after each epoch, ``(epochs,)``, if there were held-out data.

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
    held_out: Tensor | None = None

    def plot(self) -> Any:
        """Plot the losses: :func:`pyro_flows.plots.history`."""
        return plots.history(self)

    def __repr__(self) -> str:
        return (
            f"Fit(best_loss={self.best_loss:.4f} at step {self.best_step}, steps={self.steps}, skipped={self.skipped}, "
            f"seconds={self.seconds:.1f}, stopped={self.stopped!r})"
        )


@dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
        caller: The public function, for errors.
        steps: The largest number of steps.
        lr: The largest step size; it is reached within 100 steps and falls to zero along a cosine.
        clip_norm: The largest norm of a gradient.
        on_nonfinite: ``"skip"`` skips steps whose loss or gradient is not finite, and raises an error after
            ``patience`` consecutive ones; ``"raise"`` raises it at the first.
        progress: True to show a progress bar.
        checkpoint: A file for the state of the run, which resumes from it if it exists.
        marks: Further settings that identify the run; a checkpoint with other settings is refused.
        work: The approximate number of floating-point operations per step.
        noise: The standard deviation of the losses, in nats, below which the run has converged; 0 to take all steps.
        near: The gap, in units of that at convergence, below which draws are looked at; infinite for any.
        window: The number of steps over which the loss is averaged to judge a state.
        patience: The number of consecutive steps that may be skipped.
    """

    caller: str
    steps: int
    lr: float
    clip_norm: float
    on_nonfinite: str
    progress: bool
    checkpoint: Path | None = None
    marks: dict[str, Any] = field(default_factory=dict)
    work: float = math.inf
    noise: float = 0.0
    near: float = NEAR
    window: int = 50
    patience: int = 100


@dataclass(frozen=True)
class HeldOut:
    """Settings by which held-out data judge a run.

    Attributes:
        loss: Returns the loss on them, in nats, given the number of calls so far, including this one.
        every: The number of steps between two calls.
        patience: The number of calls without an improvement after which the run ends.
        decay: The decay of the average of the parameters; the average is judged and kept.
        show: Formats the loss for the progress bar.
    """

    loss: Callable[[int], float]
    every: int
    patience: int
    decay: float
    show: Callable[[float], str]


class Best:
    """The best state so far, judged by the mean loss of a window of steps.

    Losses are noisy: a later state replaces an earlier one unless it is worse than the lowest mean by more than two
    standard errors.

    Attributes:
        mean: The loss at the state that is kept.
        latest: The loss at the state that was judged last.
        step: The step after which the kept state was reached.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._state = [parameter.detach().clone() for parameter in parameters]
        self._lowest, self._noise = math.inf, math.inf
        self.mean, self.latest, self.step = math.nan, math.nan, 0

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_parameters"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def offer(self, losses: list[float], step: int, *, comparable: bool = True) -> None:
        """Keep the present state unless it is worse, or in any case if losses are not comparable."""
        recent = torch.tensor([value for value in losses if math.isfinite(value)], dtype=torch.float64)
        if not len(recent):
            return
        self.latest = recent.mean().item()
        error = recent.std().item() / math.sqrt(len(recent)) if len(recent) > 1 else math.inf
        if not comparable or self.latest <= self._lowest + 2 * min(error, self._noise):
            if comparable and self.latest < self._lowest:
                self._lowest, self._noise = self.latest, error
            self._keep(step)

    def improve(self, mean: float, step: int) -> None:
        """Keep the present state if its loss on held-out data, which are the same each time, is lower."""
        self.latest = mean
        if mean < self._lowest:
            self._lowest = mean
            self._keep(step)

    def _keep(self, step: int) -> None:
        self.mean, self.step = self.latest, step
        fill(self._state, self._parameters)

    def restore(self) -> None:
        """Set the parameters to the kept state."""
        fill(self._parameters, self._state)


@dataclass(eq=False)
class Descent:
    """One run that minimises a loss.

    Attributes:
        loss: Computes the loss, anew at each call.  Each of several processes computes it on its own rows or draws.
        parameters: The tensors to train.
        optimizers: Their optimisers, of torch or with the same methods; each trains some of them.
        settings: The settings of the run.
        trained: The guide or flow; its buffers belong to the state of the run.
        diagnose: Returns what is not finite, for the error.
        companions: The objective and the source of rows.  The states of those with ``load_state_dict`` belong to the
            run; a source has the same state in all processes.  A ``share`` is the share of this process in the rows of
            the last loss; by default all have equal shares.  While a ``settled`` is False, losses are not comparable,
            and the latest state counts as the best.
        judge: Judges states by held-out data; None to judge them by the running loss.
        is_good: Returns True, in all processes, if draws of the present state show that the run has converged; None to
            go by the losses alone.
        is_ready: The same of draws of the start, after which few steps follow.

    Raises:
        ValueError: If the checkpoint is one of another run, or several processes do not fit the same.
    """

    loss: Callable[[], Tensor]
    parameters: list[Tensor]
    optimizers: Sequence[Any]
    settings: Settings
    trained: Any
    diagnose: Callable[[], str]
    companions: Sequence[Any] = ()
    judge: HeldOut | None = None
    is_good: Callable[[], bool] | None = None
    is_ready: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        keep_memory()
        settings, parameters = self.settings, self.parameters
        module = self.trained if isinstance(self.trained, torch.nn.Module) else torch.nn.Module()
        self.buffers, self.tensors = list(module.buffers()), [*parameters, *module.parameters(), *module.buffers()]
        marks = {"steps": settings.steps, "lr": settings.lr, "clip_norm": settings.clip_norm, **settings.marks}
        marks["shapes"] = [list(parameter.shape) for parameter in parameters]
        distributed.agree(settings.caller, marks, self.tensors)
        # An average generalises better than any single state (Polyak, Juditsky 1992, Acceleration of Stochastic
        # Approximation by Averaging).
        self.average = [parameter.detach().clone() for parameter in parameters] if self.judge else []
        self.best = Best([*parameters, *(buffer for buffer in self.buffers if buffer.is_floating_point())])
        self.losses: list[float] = []
        self.held_out: list[float] = []
        self.start, self.threads = time.perf_counter(), Threads(settings.work)
        self.checkpoint = Checkpoint(settings.caller, settings.checkpoint, marks)
        eps = torch.finfo(parameters[0].dtype).eps
        self.horizon = Horizon(settings.steps, settings.noise, eps, self.is_good, settings.near)
        state = self.checkpoint.read()
        if state is None:
            distributed.seed(module)
        else:
            self.load_state_dict(state)

    def fit(self) -> Fit:
        """Take steps, and leave the parameters at their best state.

        Raises:
            FloatingPointError: If the loss or its gradient stays non-finite.

        Warns:
            UserWarning: If more than a fifth of the steps was skipped, or the last ones.
        """
        try:
            stopped = self._take_steps()
        finally:
            self.best.restore()
        seconds = time.perf_counter() - self.start
        self.checkpoint.conclude()
        distributed.broadcast_tensors(self.tensors)
        if self.judge and self.step and self.skipped == self.step:
            raise FloatingPointError(f"The loss or its gradient was not finite in any step: {self._cause()}.")
        if stopped == "interrupted" and distributed.rank() == 0:
            where = f"the best state, of step {self.best.step}" if self.best.step else "the state at the start"
            lost = f" (loss {self.best.mean:.3f})" if math.isfinite(self.best.mean) else ""
            saved = self.checkpoint.path is not None and not self.checkpoint.problem
            onward = "  The same call resumes from the checkpoint." if saved else ""
            why = "Time was up" if seconds_left() < 0 else "Interrupted"
            print(f"{why} after {self.step} steps; kept {where}{lost}.{onward}", file=sys.stderr)
        last = self._skipped_last
        if self.skipped > self.step / 5 or last > 1:
            words = f"{self.skipped} of {self.step} steps were skipped, as loss or gradient were not finite"
            end = f"the last {last} among them" if last > 1 else "the others trained the guide"
            cause = self._cause()
            warn_user(f"{self.settings.caller}: {words}; {end}{f': {cause}' if cause else ''}.")
        losses, held_out = (torch.tensor(values, dtype=torch.float64) for values in (self.losses, self.held_out))
        record = self.trained, losses, self.best.mean, self.best.step, self.step, self.skipped, seconds, stopped
        return Fit(*record, held_out=held_out if self.judge else None)

    @property
    def step(self) -> int:
        """The number of steps taken."""
        return len(self.losses)

    @property
    def skipped(self) -> int:
        """The number of steps whose loss or gradient was not finite."""
        return sum(not math.isfinite(value) for value in self.losses)

    @property
    def _skipped_last(self) -> int:
        """The number of steps at the end that were skipped."""
        return next((n for n, value in enumerate(reversed(self.losses)) if math.isfinite(value)), self.step)

    def _cause(self) -> str:
        """Return the diagnosis, or an empty string if it fails."""
        try:
            return self.diagnose()
        except (ValueError, RuntimeError, FloatingPointError):
            return ""

    def _take_steps(self) -> str:
        """Take steps until there is a reason to stop, and return the reason."""
        alone, stopped = distributed.size() == 1, self._reason_to_stop()
        every = self.judge.every if self.judge else self.settings.window
        hidden = not self.settings.progress
        bar = tqdm(total=self.settings.steps, initial=self.step, disable=hidden, unit="step", dynamic_ncols=True)
        try:
            with bar, hold_interrupts(0.0 if alone else AGAIN) as asked, using(1):
                if not self.step:
                    self.horizon.begin(self.is_ready)
                while not stopped:
                    with self.threads.turn(1):
                        interrupted, due = self._take_step(asked)
                    self.horizon.observe(self.losses)
                    bar.total = self.horizon.last
                    bar.update()
                    if self.step % every == 0 or self.step == self.horizon.last:
                        bar.set_postfix_str(self._judge())
                    stopped = self._reason_to_stop(interrupted=interrupted)
                    if stopped or due:
                        self.checkpoint.save(self.state_dict(), () if self.judge else OWN)
        except KeyboardInterrupt:  # within a step
            if not alone:  # the others do not know of it
                raise
            stopped = "interrupted"
            self.checkpoint.save(self.state_dict(), () if self.judge else OWN)
        if stopped == "interrupted":  # the steps since the last judgement count too, if they are not few
            rest = self.step % self.settings.window
            if self.judge:  # a first epoch may be long
                rest = 0 if self.best.step else min(self.step, self.settings.window)
            if rest >= FEW:
                with self._averaged():
                    self.best.offer(self.losses[-rest:], self.step, comparable=self._comparable)
        return stopped

    def _reason_to_stop(self, *, interrupted: bool = False) -> str:
        """Return why the run ends now, or an empty string if it goes on."""
        judge = self.judge
        stale = judge is not None and self.step - self.best.step >= judge.patience * judge.every
        return self.horizon.reason_to_stop(self.step, stale=stale, interrupted=interrupted)

    def _take_step(self, asked: Callable[[], bool]) -> tuple[bool, bool]:
        """Take a step, or skip it if its loss or gradient is not finite.

        Returns:
            True if a process was asked to stop, and True if one is to save.
        """
        step = self.step + 1
        for parameter in self.parameters:
            parameter.grad = None
        loss, error = self._backward()
        flags = [isinstance(error, FloatingPointError), asked(), self.checkpoint.due]
        share = next((one.share for one in self.companions if hasattr(one, "share")), None)  # known after the loss
        total, (unsolved, interrupted, due) = distributed.add_up(self.parameters, loss, share, flags)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        value, is_finite = torch.stack((total, norm.isfinite().to(total))).tolist()  # one read, for which a GPU waits
        self.losses.append(value if is_finite else math.nan)
        if math.isfinite(self.losses[-1]):
            for optimizer in self.optimizers:
                optimizer.param_groups[0]["lr"] = self.settings.lr * self.horizon.share(step)
                optimizer.step()
            if self.judge:
                with torch.no_grad():  # early states count less than the decay alone would give them
                    weight = 1 - min(self.judge.decay, (1 + step) / (10 + step))
                    torch._foreach_lerp_(self.average, self.parameters, weight)
        else:
            self._check_skipped(error, UNSOLVED if unsolved else self.settings.patience)
        return interrupted, due

    def _backward(self) -> tuple[Tensor, Exception | None]:
        """Compute the gradients; return the loss, NaN if the model broke down, and the error that says why."""
        try:
            loss = self.loss()
            loss.backward()
            return loss.detach(), None
        except NonFiniteDraw:  # it counts as a loss that is not finite
            return torch.tensor(math.nan), None
        except Exception as error:
            if not is_breakdown(error):
                raise
            return torch.tensor(math.nan), error

    def _check_skipped(self, error: Exception | None, limit: int) -> None:
        """Raise FloatingPointError if as many consecutive steps were skipped as are allowed."""
        number = self._skipped_last
        if self.settings.on_nonfinite == "skip" and number < limit:
            return
        known = str(error).splitlines()[0].rstrip(".") if error else ""
        words = [word for word in (self._cause(), known) if word]
        fullest = max(distributed.all_gather(lambda: words), key=len)
        before = f" and at the {number - 1} before" if number > 1 else ""
        raise FloatingPointError(
            f"The loss or its gradient was not finite at step {self.step}{before}: {'; '.join(fullest)}. "
            f"Try a smaller lr (now {self.settings.lr:g}) or init_scale, or a float64 model."
        )

    def _judge(self) -> str:
        """Judge the present state, keep it if it is the best, and return words for the progress bar."""
        if self.judge:
            with self._averaged():
                self.held_out.append(self.judge.loss(len(self.held_out) + 1))
                self.best.improve(self.held_out[-1], self.step)
            shown = f"held-out loss {self.judge.show(self.best.latest)}"
        else:
            self.best.offer(self.losses[-self.settings.window :], self.step, comparable=self._comparable)
            shown = f"loss {self.best.latest:.3f}"
        if self.horizon.converged_at is not None:
            shown += ", draws can be weighted" if self.horizon.by_draws else ", converged"
        return shown + (f", {self.skipped} skipped" if self.skipped else "")

    @property
    def _comparable(self) -> bool:
        """True if losses are comparable with later ones."""
        return not self.judge and all(getattr(one, "settled", True) for one in self.companions)

    @property
    def _kept(self) -> list[Any]:
        """The companions whose states belong to the run."""
        return [one for one in self.companions if hasattr(one, "load_state_dict")]

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Set the parameters to their average for a while, if there is one."""
        tensors = self.parameters if self.judge else []
        kept = [tensor.detach().clone() for tensor in tensors]
        fill(tensors, self.average)
        try:
            yield
        finally:
            fill(tensors, kept)

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "companions": [one.state_dict() for one in self._kept],
            "buffers": self.buffers,
            "average": self.average,
            "best": self.best.state_dict(),
            "losses": self.losses,
            "held_out": self.held_out,
            "converged_at": self.horizon.converged_at,
            "by_draws": self.horizon.by_draws,
            "seconds": time.perf_counter() - self.start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("parameters", "buffers", "average"):
            fill(getattr(self, name), state[name])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        for companion, kept in zip(self._kept, state["companions"], strict=True):
            companion.load_state_dict(kept)
        self.best.load_state_dict(state["best"])
        self.losses, self.held_out = state["losses"], state["held_out"]
        self.horizon.resume(self.step, state["converged_at"], by_draws=state["by_draws"])
        self.start = time.perf_counter() - state["seconds"]
