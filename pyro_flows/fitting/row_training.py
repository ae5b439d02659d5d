"""Training on rows: batches of a source, and an average of states that is judged by held-out rows.

In mixed precision networks compute in bfloat16, while transforms and log-determinants keep their precision.  Mixed
Precision Training (Micikevicius et al. 2017, arXiv:1710.03740).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_flags, check_integers, check_kind, check_numbers
from ..conditioners import Conditioner
from ..data.batches import Batch, Rows, Source, mean_of
from ..encoders import Standardize
from ..flows import Flow
from ..objectives import FlowMatching, Likelihood
from ..threads import OPERATIONS
from ..training import Fit, Training, distributed
from ..training.checkpoint import check_path
from ..training.interrupts import uninterrupted
from ..training.loop import Descent, HeldOut, Settings
from ..transforms import FixedAffine, QuantileMap
from .recorded_loss import RecordedLoss


@dataclass(eq=False)
class RowTraining:
    """Training of a flow or guide on rows, as the user of a public function wants it.

    Args:
        caller: The public function, for errors.
        options: The user's options, or None.
        epochs: The largest number of passes through the rows.
        batch_size: The number of rows per step, or None.
        lr: The largest step size.
        checkpoint: A file for the state of the run, or None.
        progress: True to show a progress bar.
        ends: The longest suffix that is added to the name of the file.

    Attributes:
        training: The options, by default the usual ones.
        objective: The objective of the user, or the default one.
        in_nats: True if the objective is a mean of -log p.
        file: The path of the checkpoint, or None.

    Raises:
        ValueError: If an argument is out of its range.
    """

    caller: str
    options: Training | None
    epochs: int
    batch_size: int | None
    lr: float
    checkpoint: Any
    progress: bool
    ends: str = ""

    def __post_init__(self) -> None:
        caller = self.caller
        check_integers(caller, max_epochs=self.epochs)
        check_integers(caller, optional=True, batch_size=self.batch_size)
        check_numbers(caller, above=0, lr=self.lr)
        check_flags(caller, progress=self.progress)
        self.training = Training() if self.options is None else self.options
        check_kind(caller, Training, "training.Training(...)", training=self.training)
        if caller != "fit_density":
            self.training.check_for(caller)
        self.objective = Likelihood() if self.training.objective is None else self.training.objective
        self.in_nats = bool(getattr(self.objective, "in_nats", False))
        self.file = check_path(caller, "checkpoint", self.checkpoint, self.ends)

    def fit(
        self,
        trained: nn.Module,
        rows: tuple[Source, Source],
        loss: Callable[[Batch], Tensor],
        diagnose: Callable[[], str],
        marks: dict[str, Any],
        *,
        show: Callable[[float], str] | None = None,
        clip_norm: float = 5.0,
        end_epoch: Callable[[int], None] = lambda _: None,
    ) -> Fit:
        """Minimise a loss of rows by Adam, and leave the trained module in evaluation mode.

        Args:
            trained: The flow or guide.
            rows: The rows to train on, and those held out.
            loss: Returns the mean loss of a batch.
            diagnose: Returns what is not finite, for errors.
            marks: Settings that identify the run, such as checksums of the rows.
            show: Formats a loss for the progress bar.
            clip_norm: The largest norm of a gradient, unless the user gives another.
            end_epoch: Called after each epoch with its number.
        """
        training, (source, held_out) = self.training, rows
        if training.mixed_precision:
            check_single(self.caller, trained)

        @torch.no_grad()
        def judged(epoch: int) -> float:
            trained.eval()
            with torch.random.fork_rng():
                torch.manual_seed(distributed.rank())
                found = mean_of(loss, held_out)
                end_epoch(epoch)
            trained.train()
            return found

        parameters, moved = _trained(trained)
        size = source.size if isinstance(source, Rows) else None  # a loader may have batches of any size
        pixels = math.prod(getattr(trained, "event_shape", ())[1:])  # which share the weights of a convolution
        options = {"ema_decay": training.ema_decay, "mixed_precision": training.mixed_precision}
        settings = Settings(
            self.caller,
            self.epochs * source.steps,
            lr=self.lr,
            clip_norm=training.gradients.clip_norm or clip_norm,
            on_nonfinite=training.gradients.on_nonfinite,
            progress=self.progress and not distributed.rank(),
            checkpoint=self.file,
            marks={**marks, "batch_size": size, "objective": repr(self.objective), **options},
            work=OPERATIONS * (size or math.inf) * pixels * sum(parameter.numel() for parameter in moved),
        )
        show = show or ("{:.3f} nats" if self.in_nats else "{:.4f}").format
        judge = HeldOut(judged, source.steps, training.patience, training.ema_decay, show)
        trained.train()
        try:
            with networks_in_bfloat16(trained) if training.mixed_precision else contextlib.nullcontext():
                with uninterrupted():  # the first optimiser imports the compiler
                    adam = torch.optim.Adam(moved, lr=self.lr, foreach=True)
                run = parameters, [adam], settings, trained, diagnose, [source], judge
                return Descent(self._step(trained, loss, parameters, source), *run).fit()
        finally:
            trained.eval()

    def _step(
        self, trained: nn.Module, loss: Callable[[Batch], Tensor], parameters: list[Tensor], source: Source
    ) -> Callable[[], Tensor]:
        """Return a function that takes the next batch and returns its loss, from a graph where that is worthwhile.

        The steps of images spend their time in convolutions, and a recording would hold all of their tensors at once.
        The batches of a loader may have many shapes.  Losses of the user may change from step to step.
        """
        ours = type(self.objective) in (Likelihood, FlowMatching) and len(getattr(trained, "event_shape", ())) < 2
        compiled = any(getattr(part, "is_compiled", False) or part._compiled_call_impl for part in trained.modules())
        if not ours or compiled or self.training.mixed_precision or not isinstance(source, Rows):
            return lambda: loss(source.next())

        def of_batch(x: Tensor, context: Tensor | None = None) -> Tensor:
            return loss((x, context))

        recorded = RecordedLoss(of_batch, parameters)
        return lambda: recorded(*(part for part in source.next() if part is not None))


def _trained(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that require gradients, and those among them that steps move: not those set from data."""
    parameters: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    standing = [part for part in module.modules() if isinstance(part, FixedAffine | QuantileMap | Standardize)]
    fixed = {parameter for part in standing for parameter in part.parameters()}
    return parameters, [parameter for parameter in parameters if parameter not in fixed]


def check_single(caller: str, module: nn.Module) -> None:
    """Raise ValueError unless all parameters of a module are in float32, as mixed precision needs."""
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if wrong := [*(dtypes - {torch.float32})]:
        raise ValueError(f"{caller}: mixed_precision is for flows in float32, got one in {wrong[0]}. Use flow.float().")


@contextlib.contextmanager
def networks_in_bfloat16(flow: nn.Module) -> Iterator[None]:
    """Let the conditioners of a flow compute in bfloat16; their weights and outputs keep their dtype."""

    def restore(part: nn.Module, forward: Any) -> None:
        del part.forward
        if forward is not None:  # set by the user on this object
            part.forward = forward

    with contextlib.ExitStack() as stack:
        for part in flow.modules():
            if isinstance(part, Flow):
                stack.enter_context(part.uncompiled())  # a compiled graph would keep the networks as they were
            elif isinstance(part, Conditioner):
                stack.callback(restore, part, vars(part).get("forward"))
                part.forward = functools.partial(_in_bfloat16, part.forward)  # type: ignore[assignment, method-assign]
        yield


def _in_bfloat16(forward: Callable[..., Tensor | None], x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    with torch.autocast(x.device.type, torch.bfloat16):
        params = forward(x, *args, **kwargs)
    return None if params is None else params.to(x.dtype)
