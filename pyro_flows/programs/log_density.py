"""Log-densities over vectors: where a model breaks down, many draws part by part, and as many runs as a time allows."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode

from ..compiler_state import is_recording
from ..graphs import Traced
from ..threads import Threads
from ..time_limit import check_time
from ..user_code import warn_user
from ..vjp import LogDensity, value_and_score

LEAST = 64  # the least size of parts of vectors that cost little
SPARE = 8  # vectors that fit into the cache, per vector whose cost is little beside that of a graph for another size
VALUED = 4  # vectors without gradients per vector with one, since nothing is kept for these
GRADIENT = 3  # runs that one with a gradient counts as


class NonFiniteDraw(FloatingPointError):
    """Draw of a guide that is not finite: ``fit_svi`` skips the step, as it does if a loss is not finite."""


def or_nan(density: LogDensity, *shape: int) -> LogDensity:
    """Return a log-density that is NaN where the model breaks down; if need be, halving finds the draws at fault.

    Args:
        density: The log-density, or several for each draw, ``(N, *shape)``.
        *shape: The shape of several.
    """

    def guarded(z: Tensor) -> Tensor:
        for mode in (contextlib.nullcontext(), _Singular()):
            try:
                with pyro.validation_enabled(False), mode:
                    return density(z)
            except Exception as error:
                if not is_breakdown(error):
                    raise
                if not isinstance(error, LinAlgError):
                    break
        if is_recording():  # a graph would make the draws of these places NaN in each call
            raise FloatingPointError("the model breaks down at some draws")
        if len(z) == 1:
            return (z.sum() * math.nan).expand(1, *shape)
        return torch.cat([guarded(half) for half in z.chunk(2)])

    return guarded


def _factor(input: Tensor, upper: bool = False) -> Tensor:
    factor, fault = torch.linalg.cholesky_ex(input, upper=upper)
    return factor.masked_fill((fault != 0)[..., None, None], math.nan)


def _inverse(input: Tensor, upper: bool = False) -> Tensor:
    singular = (input.diagonal(dim1=-2, dim2=-1) == 0).any(-1)
    return torch.cholesky_inverse(input.masked_fill(singular[..., None, None], math.nan), upper=upper)


_SAFE = {
    **dict.fromkeys((torch.linalg.cholesky, torch.cholesky, torch.Tensor.cholesky), _factor),
    **dict.fromkeys((torch.cholesky_inverse, torch.Tensor.cholesky_inverse), _inverse),
}


class _Singular(TorchFunctionMode):
    """Gives matrices without a factor or inverse one of NaN, instead of an error for the whole batch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _SAFE.get(func, func)(*args, **(kwargs or {}))


def is_breakdown(error: Exception) -> bool:
    """True if a model broke down at a draw too far out, whose density then counts as not finite.

    A distribution refused its parameters, a matrix was not positive definite, or an equation could not be solved.
    """
    # torch raises ValueError for refused parameters, and only the message differs from other errors.
    refused = isinstance(error, ValueError) and "invalid values" in str(error)
    return refused or isinstance(error, LinAlgError | FloatingPointError)


def part_size(number: int, size: int) -> int:
    """Return the size of parts of N vectors that is nearest to a given size; the last part may be smaller."""
    return math.ceil(number / max(1, round(number / size)))


def standard_sizes(number: int, largest: int) -> list[int]:
    """Return sizes of parts that hold N vectors together: powers of two, so that few graphs serve any N.

    A part may be larger than the vectors left for it if the vectors added cost little.

    Args:
        number: The number N.
        largest: The size of a part that fits into the cache.
    """
    found, spare = list[int](), largest // SPARE
    least = 1 << (min(spare + 1, LEAST).bit_length() - 1)
    while number > 0:
        size = 1 << (max(number, least) - 1).bit_length()
        if size - number > spare or size > largest:
            size = 1 << (min(number, largest).bit_length() - 1)
        found.append(size)
        number -= size
    return found


def in_parts(densities: Sequence[Callable[..., Tensor]], size: int, threads: Threads) -> Callable[..., Tensor]:
    """Return a sum of log-densities that finds its values and scores part by part, from graphs where possible.

    Memory then holds the graph of one part only.  The sum has no second derivatives.

    Args:
        densities: The log-densities of vectors, and of further tensors that are the same for all vectors.
        size: The approximate number of vectors in a part, at most half as many again.
        threads: The number of threads to work on a part.
    """
    scored = [Traced(functools.partial(value_and_score, density)) for density in densities]
    valued = [Traced(functools.partial(_values, density)) for density in densities]
    threads_without_gradient = Threads()

    def total(z: Tensor, *others: Tensor) -> Tensor:
        if torch.is_grad_enabled() and z.requires_grad:
            return _InParts.apply(scored, size, threads, z, *others)
        parts, sizes = z.split(part_size(len(z), VALUED * size)), standard_sizes(len(z), VALUED * size)
        runs = [lambda part, own=density: own(part, *others) for density in densities]
        if len(sizes) == 1 and all(one.is_traced for one in valued):  # graphs do not pay where arithmetic takes longer
            parts = (_filled(z, sizes[0]),)
            runs = [lambda part, own=one: torch.as_tensor(own(part, *others)[0]) for one in valued]
        found = list[Tensor]()
        for part in parts:
            check_time()
            with threads_without_gradient.turn(len(part), size / 2):
                found.append(sum((run(part) for run in runs), torch.zeros(())))
        return torch.cat(found)[: len(z)]

    return total


@torch.no_grad()
def _values(density: Callable[..., Tensor], z: Tensor, *others: Tensor) -> tuple[Tensor]:
    return (density(z, *others),)


def _filled(z: Tensor, size: int) -> Tensor:
    """Return vectors followed by copies of the last one."""
    return torch.cat((z, z[-1:].expand(size - len(z), -1))) if size > len(z) else z


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scored: Sequence[Traced], size: int, threads: Threads, z: Tensor, *others: Tensor) -> Tensor:
        parts, found = list(z.split(part_size(len(z), size))), []
        if all(one.is_traced for one in scored):
            sizes = standard_sizes(len(z), size)
            parts = list(_filled(z, sum(sizes)).split(sizes))
        for part in parts:
            check_time()
            value, score = torch.zeros(()), torch.zeros_like(part)
            for one in scored:
                with threads.turn(len(part), size / 2):
                    own, of_part = (torch.as_tensor(of) for of in one(part, *others))
                value, score = value + own, score + of_part
            found.append((value, score))
        values, scores = (torch.cat(of)[: len(z)] for of in zip(*found, strict=True))
        ctx.save_for_backward(scores)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_p: Tensor) -> tuple[Tensor | None, ...]:
        (score,) = ctx.saved_tensors
        return None, None, None, of_log_p.unsqueeze(-1) * score, *(None for _ in ctx.needs_input_grad[4:])


class RunBudget:
    """A budget for searches: a number of runs, and those that are spent.

    Models that run many draws at once have no limit, or that of a clock.

    Args:
        seconds: The time to spend.
        cost: The time of one run, in seconds, of a model that runs one draw at a time; 0 for others.
        by_clock: True if a search ends by the clock too, whatever its runs cost.

    Attributes:
        number: The number of runs, infinite for models that run many draws at once.
        cost: The time of one run.
    """

    def __init__(self, seconds: float, cost: float, by_clock: bool = False) -> None:
        self.number, self.cost = seconds / cost if cost else math.inf, cost
        self._seconds, self._end = seconds, time.perf_counter() + (seconds if by_clock else math.inf)
        self._spent, self._is_told = 0, False

    def is_spent(self) -> bool:
        """Return True once all runs, or the time, are spent."""
        return self._spent > self.number or (not self.cost and time.perf_counter() > self._end)

    def counted(self, density: LogDensity) -> LogDensity:
        """Return a log-density whose runs are counted."""

        def run(z: Tensor) -> Tensor:
            self._spent += len(z) * (GRADIENT if torch.is_grad_enabled() and z.requires_grad else 1)
            return density(z)

        return run

    def watched(self, watch: Callable[..., bool], caller: str) -> Callable[..., bool]:
        """Return a function that ends a search, as ``watch`` does, and warns, once all runs are spent."""

        def watch_runs(*words: str) -> bool:
            if self.is_spent() and not self._is_told:
                self._is_told = True
                warn_user(f"{caller}: the search for a start ended after {self.number:.0f} runs, as {self.words}.")
            return watch(*words) or self.is_spent()

        return watch_runs

    @property
    def words(self) -> str:
        """The reason for the budget, as a clause."""
        if not self.cost:
            return f"it took {self._seconds:g} s"
        return f"the model runs one draw at a time, and a run takes {self.cost:.2g} s"
