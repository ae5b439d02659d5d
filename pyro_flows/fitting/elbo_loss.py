"""The loss of one step of a fit by an ELBO, as the training loop calls it, and its mean at the end.

The settings of ``fit_svi``, its warm-up, decay and clipping, were tuned for weights as torch initialises and scales
them.  Guides store their networks in units that are safe with any optimiser; training puts these aside.  The parameters
of each row take larger steps than shared ones, since each row is seen once in many steps.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine, validation_enabled
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.utils.data import DataLoader

from ..conditioners.base import Paced
from ..data.batches import Stream
from ..diagnostics.importance import smooth
from ..flows import Flow
from ..guides.base import holders
from ..guides.contexts import RowContexts
from ..objectives import PathELBO
from ..objectives.plain import PlainELBO
from ..programs.density import Density
from ..programs.log_density import is_breakdown
from ..programs.model_and_guide import Lifted, Task
from ..programs.plate_rows import Shuffled
from ..programs.program import leaves_of
from ..training import distributed
from ..training.randomness import unchanged
from ..transforms.carried import InSingle
from ..vjp import is_plain
from .program_checks import is_vectorised
from .recorded_loss import RecordedLoss


def batches_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelBatches | None:
    """Return the batches of the loader among the arguments of a model, or None.

    Raises:
        ValueError: If there are two, or one is a keyword argument.
    """
    if named := [name for name, value in kwargs.items() if isinstance(value, DataLoader)]:
        raise ValueError(f"fit_svi: {named[0]}= is a DataLoader. Give it as a positional argument.")
    loaders = [value for value in args if isinstance(value, DataLoader)]
    if len(loaders) > 1:
        raise ValueError("fit_svi: the model has two DataLoaders among its arguments. Give one, of tuples of tensors.")
    return ModelBatches(loaders[0], args) if loaders else None


class ModelBatches(Stream):
    """Arguments of a model with the values of a loader's next batch in place of the loader.

    A batch that is a tuple or list is several arguments, any other value one.  Each of several processes takes its
    share of the rows of all tensors that have as many as the first.

    Args:
        loader: The loader.
        args: The arguments, with the loader.
    """

    caller = "fit_svi"

    def __init__(self, loader: DataLoader, args: tuple[Any, ...]) -> None:
        super().__init__(loader, lambda item: item)
        self._args, self.loader = args, loader
        self.others = tuple(value for value in args if value is not loader)
        try:
            self.steps = len(loader)
        except TypeError:  # the dataset has no length, or no end
            self.steps = sys.maxsize
        if not self.steps:
            raise ValueError("fit_svi: the DataLoader has no batches.")

    def next(self) -> tuple[Any, ...]:
        """Return the arguments of the model with this process's rows of the next batch."""
        item = distributed.broadcast(lambda: next(self._items))
        if isinstance(item, Mapping):
            raise TypeError("fit_svi: a batch of the DataLoader is a dict; give tuples, by collate_fn or the dataset.")
        values = tuple(item) if isinstance(item, tuple | list) else (item,)
        number = next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 0)
        own, self.share = distributed.share(number)
        taken = tuple(_rows(value, own, number) for value in values)
        found: list[Any] = []
        for value in self._args:
            found += taken if value is self.loader else [value]
        return tuple(found)

    def feed(self, task: Task, *, is_lifted: bool) -> None:
        """Give the next batch to a model and its guide.

        Args:
            task: The model and the guide.
            is_lifted: True if an engine runs the model, which then has the rows of the first batch.
        """
        args, model = self.next(), task.model
        if (is_lifted or model.enumerated) and _sizes(args) != _sizes(model.args):
            seen = f"{_sizes(args)} numbers of rows after {_sizes(model.args)}"
            why = "its discrete latents are summed out" if model.enumerated else f"the model{model.fault}"
            fault = f"the batches of the DataLoader have {seen}, and they must have the same, as {why}"
            raise ValueError(f"fit_svi: {fault}. Give DataLoader(..., drop_last=True).")
        model.args = task.guide.args = args


def _rows(value: Any, own: slice, number: int) -> Any:
    return value[own] if isinstance(value, Tensor) and value.dim() and len(value) == number else value


def _sizes(args: tuple[Any, ...]) -> list[int]:
    return [len(value) for value in args if isinstance(value, Tensor) and value.dim()]


# The attributes in which Pyro's JIT objectives keep compiled functions.
COMPILED = "_loss_and_surrogate_loss", "_differentiable_loss", "_jit_loss_and_surrogate_loss"
OF_ROWS = 32.0  # the unit of the parameters of rows, unless the rows start near the posterior
# The number of new losses in a mean: the fewest, which tell how noisy they are, and the most, about a tenth of the time
# of a short fit.  Fewer are taken once the standard error is below the last one, in nats: the digits of a fit.
LEAST, MOST, SHARP = 10, 50, 0.01
# Draws that show whether a fit has converged.  It has if their k-hat is below LIGHT, and their weights change no mean
# by more than CLOSE standard deviations, and no standard deviation by more than that share.
LOOKED_AT, LIGHT, CLOSE = 2048, 0.4, 0.05
# Draws can be weighted if at least the share ENOUGH of them is effective.  The larger this share, the heavier the tail
# may be: k-hat is below LIGHTEST plus LENIENT times the share.  At the start it must be below LIGHTER.
ENOUGH, LIGHTEST, LENIENT, LIGHTER = 0.25, 0.45, 0.25, 0.3


class ELBOLoss:
    """An objective of a model and a guide, on their next minibatch if the data come in batches.

    Args:
        task: The model and the guide.
        objective: The objective.
        batches: The source of the model's arguments in each step; None if they stay the same.

    Attributes:
        program: The model as the objective runs it: unchanged, or lifted if the objective needs that.
        trained: The tensors that the loss depends on, once :meth:`parameters` has found them.
    """

    def __init__(self, task: Task, objective: Any, batches: ModelBatches | None) -> None:
        self.task, self.objective, self.batches = task, objective, batches
        self._steps = dict[int, RecordedLoss]()  # by the number of draws, or 0 for that of the objective
        self.trained = list[Tensor]()
        sums_itself = not isinstance(objective, Trace_ELBO) or isinstance(objective, TraceMeanField_ELBO)
        self.program: Any = task.model.call
        if isinstance(objective, TraceEnum_ELBO):
            self.program = task.model.marked
        elif not sums_itself and (task.model.enumerated or is_vectorised(objective)):
            with unchanged():
                self.program = task.broadcasting

    @property
    def companions(self) -> list[Any]:
        """The objects whose states belong to the run."""
        return [self.objective, self.batches] if self.batches else [self.objective]

    @property
    def repeats(self) -> bool:
        """True if the loss, at the end of the run, is the same function of the guide at each call."""
        objective = self.objective
        if self.batches or self.task.subsampled or not hasattr(objective, "differentiable_loss"):
            return False
        compiled = vars(objective).keys() & {*COMPILED}
        return not compiled and getattr(objective, "settled", True) and not hasattr(objective, "num_steps")

    def __call__(self) -> Tensor:
        """Return the loss of a step, from a graph if the step is the same function of the parameters each time."""
        if self.batches or not self.trained or type(self.objective) not in (PathELBO, PlainELBO):
            return self.plain()
        rows = [part.next(*part.sizes) for part in self._shuffled if part.sizes]
        return self._from_graph(0, self._at_rows, *rows)

    def _at_rows(self, *rows: Tensor) -> Tensor:
        """Return the loss at given rows of the plates that the guide subsamples."""
        parts = [part for part in self._shuffled if part.sizes]
        for part, own in zip(parts, rows, strict=True):
            part.held = own
        try:
            return self.plain()
        finally:
            for part in parts:
                part.held = None

    @functools.cached_property
    def _shuffled(self) -> list[Shuffled]:
        return [part for part in parts_of(self._guide, self.trained) if isinstance(part, Shuffled)]

    def plain(self) -> Tensor:
        """Return the loss of a step, from a run of model and guide."""
        is_lifted = isinstance(self.program, Lifted)
        if self.batches:
            self.batches.feed(self.task, is_lifted=is_lifted)
        model, guide, objective = self.task.model, self.task.guide.call, self.objective
        if hasattr(objective, "differentiable_loss"):
            # A lifted model is one factor, without the plates whose rows are given; an engine has validated it.
            silent = self.task.has_bare_dimensions or is_lifted
            with validation_enabled(False) if silent else contextlib.nullcontext():
                return objective.differentiable_loss(self.program, guide, *model.args, **model.kwargs)
        # An objective such as RenyiELBO fills in the gradients itself, one such as ReweightedWakeSleep has two losses.
        found = objective.loss_and_grads(self.program, guide, *model.args, **model.kwargs)
        return torch.tensor(sum(found) if isinstance(found, tuple) else found, requires_grad=True)

    def joint(self) -> Tensor:
        """Return the loss of a ``PathELBO`` and one flow, without the handlers that an ELBO runs a guide under.

        The flow runs in single precision if it is plain, and in its own where that overflows.
        """
        number = self.objective.num_particles
        found = self._from_graph(number, functools.partial(self._loss_of, self._quick, number))
        return found if found.isfinite() else self._loss_of(self._guide.flow, number)

    def _from_graph(self, key: int, loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return a loss, from a graph where that is possible."""
        if key not in self._steps:
            self._steps[key] = RecordedLoss(loss, self.trained)
        return self._steps[key](*inputs)

    @property
    def _guide(self) -> Any:
        return self.task.guide.call

    @functools.cached_property
    def _quick(self) -> Flow:
        flow: Any = self._guide.flow
        single = self._guide.has_default_flow and is_plain([flow]) and InSingle.suits(flow.unscaled)
        return Flow([InSingle(flow.unscaled), *flow.scaled], flow.base) if single else flow

    @functools.cached_property
    def _space(self) -> Density:
        return Density(self.task)

    def _loss_of(self, flow: Flow, number: int) -> Tensor:
        z, log_q = flow().with_path_gradient().rsample_and_log_prob((number,))
        return (log_q - self._space.log_prob(z)).mean()

    def is_good(self) -> bool:
        """True if weighted draws show that a flow, whose loss is joint, has converged: their tail and their moments."""
        return self._is_shown(is_close)

    def can_be_weighted(self) -> bool:
        """True if draws of a flow, whose loss is joint, can be weighted: their tail and their effective number."""
        return self._is_shown(lambda z, log_weights: is_steady(log_weights))

    def is_ready(self) -> bool:
        """The same of the start, with a lighter tail: the first steps are worth more than those after them."""
        return self._is_shown(lambda z, log_weights: is_steady(log_weights, LIGHTER, 0.0))

    @torch.no_grad()
    def _is_shown(self, by: Callable[[Tensor, Tensor], bool]) -> bool:
        with unchanged():
            pyro.set_rng_seed(distributed.rank())  # so that a run that was resumed finds the same
            z, log_q = self._quick().rsample_and_log_prob((LOOKED_AT,))
            raw = (self._space.log_prob(z) - log_q).double()
        return all(distributed.all_gather(lambda: by(z.double(), raw)))

    def parameters(self) -> list[Tensor]:
        """Return the tensors that the loss depends on, in modules and in Pyro's param statements."""
        with poutine.trace(param_only=True) as capture:
            try:
                self()
            except (ValueError, LinAlgError, FloatingPointError) as error:
                if not is_breakdown(error):
                    raise
        found = leaves_of(capture.trace, self.task.model.call, self.task.guide.call)
        unique = {id(parameter): parameter for parameter in found if parameter is not None and parameter.requires_grad}
        if not unique:
            raise ValueError("fit_svi: neither the guide nor the model has parameters to train.")
        self.trained = list(unique.values())
        return self.trained


def is_steady(log_weights: Tensor, least: float = LIGHTEST, lenient: float = LENIENT) -> bool:
    """True if log-weights, ``(S,)``, have a light tail and a large effective share."""
    if not log_weights.isfinite().all():
        return False
    smoothed, khat = smooth(log_weights)
    share = 1 / float(smoothed.exp().square().sum()) / len(smoothed)
    return share > ENOUGH and khat < least + lenient * share


def is_close(z: Tensor, log_weights: Tensor) -> bool:
    """True if weights of draws, ``(S, D)``, have a light tail and hardly change means and standard deviations."""
    if not (log_weights.isfinite().all() and z.isfinite().all()):
        return False
    smoothed, khat = smooth(log_weights)
    weights, (sd, mean) = smoothed.exp(), torch.std_mean(z, 0)
    change = (weights @ z - mean) / sd
    ratio = (weights @ (z - mean).square() - (change * sd).square()).sqrt() / sd
    return khat < LIGHT and bool((change.abs() < CLOSE).all() and ((ratio - 1).abs() < CLOSE).all())


def fresh_mean(loss: Callable[[], Tensor]) -> float:
    """Return the mean of new losses, NaN if none is finite; random numbers are left alone."""
    found: list[float] = []
    with unchanged():
        pyro.set_rng_seed(distributed.rank())  # so that a run that was resumed finds the same
        while len(found) < LEAST or (len(found) < MOST and torch.tensor(found).std() > SHARP * len(found) ** 0.5):
            try:
                found.append(float(loss().detach()))  # TraceEnum_ELBO needs gradients
            except Exception as error:
                if not is_breakdown(error):
                    raise
                found.append(math.nan)
    every = [value for values in distributed.all_gather(lambda: found) for value in values if math.isfinite(value)]
    return sum(every) / len(every) if every else math.nan


def guides_of(guide: Any, parameters: list[Tensor]) -> list[Any]:
    """Return a guide that is a module; guides that a function calls are found by their parameters."""
    return [guide] if isinstance(guide, nn.Module) else holders(parameters)


def parts_of(guide: Any, parameters: list[Tensor]) -> list[nn.Module]:
    """Return all modules of a guide."""
    return [part for one in guides_of(guide, parameters) for part in one.modules()]


@contextlib.contextmanager
def in_training(guide: Any, parameters: list[Tensor], objective: Any, *, rows_near: bool = False) -> Iterator[None]:
    """Put a guide into training mode, without paces; afterwards into evaluation mode, with its own.

    The outputs of the guide stay the same, bit for bit.

    Args:
        guide: The guide.
        parameters: The tensors that are trained.
        objective: The loss, whose compiled functions are dropped, since units are constants in them.
        rows_near: True if rows of plates start near their posteriors.
    """

    def forget_compiled() -> None:
        for name in {*COMPILED} & getattr(objective, "__dict__", {}).keys():
            setattr(objective, name, None)

    with contextlib.ExitStack() as stack:
        stack.callback(forget_compiled)
        for one in guides_of(guide, parameters):  # a module may keep a part of it in evaluation mode
            stack.callback(one.eval)
            one.train()
        for part in parts_of(guide, parameters):
            if isinstance(part, Paced):
                stack.callback(part.set_unit, part.unit)
                part.set_unit(OF_ROWS if isinstance(part, RowContexts) and not rows_near else 1.0)
        forget_compiled()
        yield
